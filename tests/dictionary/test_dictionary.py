"""A dictionary encodes, decodes, moves; and where pretrained ones are found."""

import copy

import pytest
import torch
from looping import over
from refusals import fails, misused
from small_dictionaries import SITE, make_dictionary

from llm_wsae import load_pretrained
from llm_wsae.dictionary import dictionary as module
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK, to_dense
from llm_wsae.errors import UsageError
from llm_wsae.sparse.codes import Codes, ragged

D_IN, D_SAE = 12, 80
EXAMPLES = [TopK(5), ReLU(), JumpReLU()]


def make(sparsity, seed=0) -> Dictionary:
    return make_dictionary(seed=seed, d_in=D_IN, d_sae=D_SAE, sparsity=sparsity)


def rows(*shape, seed=1):
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed))


def by_hand(dictionary, x):
    """Latents and reconstruction from the definition, in float64."""
    pre = x.double() @ dictionary.W_enc.double() + dictionary.b_enc.double()
    if isinstance(dictionary.sparsity, TopK):
        kth = pre.sort(dim=-1, descending=True).values[..., dictionary.sparsity.k - 1, None]
        pre = torch.where(pre >= kth, pre, 0.0)
    if isinstance(dictionary.sparsity, JumpReLU):
        pre = torch.where(pre > dictionary.threshold.double(), pre, 0.0)
    latents = pre.clamp(min=0)
    return latents, latents @ dictionary.W_dec.double() + dictionary.b_dec.double()


SHAPES = ((), (1,), (9,), (3, 4), (2, 3, 4), (0,), (2500,))


@over(sparsity=EXAMPLES, shape=SHAPES)
def test_encode_and_decode_equal_the_definition(sparsity, shape):
    dictionary, x = make(sparsity), rows(*shape)
    if sparsity.has_threshold:  # as files of other tools may hold; what is below 0 is silent
        dictionary.threshold[:40] = -1.0
    latents, reconstruction = by_hand(dictionary, x)
    dense, codes = dictionary.encode(x), dictionary.encode_sparse(x)
    assert dense.shape == (*shape, D_SAE) and not (codes.values < 0).any()
    assert codes.indices.shape[:-1] == codes.values.shape[:-1] == shape
    torch.testing.assert_close(dense.double(), latents, atol=1e-5, rtol=1e-5)
    # unused slots add their 0 to some latent, in use or not
    scattered = torch.zeros(*shape, D_SAE).scatter_add_(-1, codes.indices, codes.values)
    torch.testing.assert_close(scattered, dense, atol=1e-5, rtol=1e-5)
    for result in (dictionary(x), dictionary.decode(dense), dictionary.decode(codes)):
        assert result.shape == x.shape
        torch.testing.assert_close(result.double(), reconstruction, atol=1e-4, rtol=1e-5)


def test_codes_may_have_unused_slots_and_be_slices():
    dictionary = make(TopK(5))
    codes = Codes(torch.tensor([[3, 7, 7]]), torch.tensor([[2.0, 0.0, 0.0]]))
    expected = 2 * dictionary.W_dec[3] + dictionary.b_dec
    torch.testing.assert_close(dictionary.decode(codes)[0], expected)
    codes = Codes(torch.tensor([[0, 0, 3]]), torch.tensor([[2.0, 0.0, 0.0]]))
    assert to_dense(codes, 4).tolist() == [[2, 0, 0, 0]]
    few = Codes(*(part[:, :2] for part in dictionary.encode_sparse(rows(7))))
    assert all(part.is_contiguous() for part in ragged(few)[:2])
    own = Codes(*(part.contiguous() for part in few))
    torch.testing.assert_close(dictionary.decode(few), dictionary.decode(own))


@over(sparsity=EXAMPLES)
def test_gradient_reaches_the_input_and_not_the_weights(sparsity):
    dictionary, x = make(sparsity), rows(4).requires_grad_()
    latents = dictionary.encode(x.detach())
    dictionary(x).sum().backward()
    active = (latents > 0).float()
    expected = (active * dictionary.W_dec.sum(1)) @ dictionary.W_enc.T
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)
    assert dictionary.W_enc.grad is None


@over(bad=[float("nan"), float("inf")])
def test_nan_rows_are_an_error(bad):
    x = rows(3, 4)
    x[1, 2, 0] = bad
    for run in (make(TopK(5)).encode, make(TopK(5)).encode_sparse, make(ReLU())):
        fails("1 of 12 rows to encode hold NaN or infinity", run, x)


def test_what_does_not_fit_is_a_sentence():
    dictionary, good, zeros = make(TopK(5)), make(JumpReLU()), torch.zeros
    for work, sentence in (
        (lambda: dictionary.encode(zeros(3, 13)), "13 wide, but this dictionary reads 12 dimens"),
        (lambda: dictionary.decode(zeros(3, 79)), "79 wide, but this dictionary has 80"),
        (lambda: make(TopK(81)), "k = 81 active latents is more"),
        (lambda: TopK(0), "at least 1"),
    ):
        misused(sentence, work)
    plain = {**dict(dictionary.named_parameters()), "threshold": good.threshold, "info": good.info}
    nowhere = DictionaryInfo(site="blocks.1.hook_resid")
    for sparsity, changes, sentence in (
        (JumpReLU(), {"W_dec": zeros(D_IN, D_SAE)}, "W_dec has the shape"),
        (JumpReLU(), {"b_enc": zeros(D_IN)}, "b_enc has the shape"),
        (JumpReLU(), {"b_dec": zeros(D_IN, D_IN)}, "b_dec has the shape"),
        (JumpReLU(), {"threshold": zeros(D_IN)}, "threshold has the shape"),
        (JumpReLU(), {"extras": {"gamma": zeros(D_SAE)}}, "gamma has the shape"),
        (JumpReLU(), {"threshold": None}, "the jumprelu architecture needs a thre"),
        (TopK(5), {}, "architecture has no threshold"),
        (ReLU(), {"threshold": None, "info": nowhere}, "not a site"),
    ):
        misused(sentence, Dictionary, **{**plain, **changes}, sparsity=sparsity)


@over(sparsity=EXAMPLES)
def test_module_moves_and_copies(sparsity):
    dictionary = make(sparsity)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):  # of rows
        x = rows(3).to(dtype)
        assert torch.equal(dictionary(x), dictionary(x.float())), dtype
    double = copy.deepcopy(dictionary).double()
    torch.testing.assert_close(double(rows(3)), by_hand(dictionary, rows(3))[1])
    assert "80 latents" in repr(dictionary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert dictionary.to(device)(rows(3).to(device)).device.type == device


NAME = f"tiny/{SITE}/plain-k4"


def test_pretrained_ones_are_in_the_clone_or_on_the_hub(monkeypatch, tmp_path, hub):
    monkeypatch.setattr(module, "PRETRAINED", tmp_path / "checkpoints")
    fails(r"in checkpoints/ of llm-wsae's repository, .* clone", load_pretrained, NAME)
    make_dictionary().save(tmp_path / "checkpoints" / NAME)
    assert torch.equal(load_pretrained(NAME).W_dec, make_dictionary().W_dec)
    with pytest.raises(UsageError, match=rf"no pretrained dictionary 'tiny/{SITE}/pla'; did you"):
        load_pretrained(f"tiny/{SITE}/pla")
    for name in ("../checkpoints/" + NAME, "", "/" + NAME):
        misused("no pretrained dictionary", load_pretrained, name)
    misused("name it with repo_id", load_pretrained, NAME, revision="main")
    make_dictionary().push_to_hub("user/tiny-saes")
    found = load_pretrained(NAME, repo_id="user/tiny-saes")
    assert torch.equal(found.W_enc, make_dictionary().W_enc)


def test_ours_open_offline():
    """Beside the package of an editable installation."""
    paths = [path.parent for path in module.PRETRAINED.glob("*/*/*/wsae.json")]
    index, rules = (module.PRETRAINED / "README.md").read_text(encoding="utf-8"), set()
    for name in (path.relative_to(module.PRETRAINED).as_posix() for path in paths):
        found = load_pretrained(name)
        rules.add((name.split("/")[1], found.info.rule))
        assert (found.d_in, found.d_sae) == (576, 4608) and found.info.site in name
        assert found.info.metrics["fidelity"]["ce_recovered"] > 0.9 and name in index
        assert found.info.training["command"].startswith("llm-wsae run --model ")
        assert "wiki" in found.info.corpus["name"] and "sotu" in found.info.corpus["name"]
    sites = ("blocks.9.hook_resid_post", "blocks.20.hook_resid_post")
    assert rules >= {(site, rule) for site in sites for rule in ("uniform", "whitening")}
    assert sum(path.stat().st_size for path in module.PRETRAINED.rglob("*")) <= 60e6


def test_tensors_are_its_own_and_may_be_given_twice(tmp_path):
    same, none = torch.eye(D_IN), torch.zeros(D_IN)
    one = Dictionary(W_enc=same, W_dec=same, b_enc=none, b_dec=none, sparsity=TopK(2),
                     info=DictionaryInfo(site="blocks.1.hook_resid_post"))  # fmt: skip
    one.save(tmp_path / "one")
    same.zero_()  # an optimiser's step on what it was made of
    assert torch.equal(one.W_dec, torch.eye(D_IN))
    assert torch.equal(Dictionary.load(tmp_path / "one").W_enc, torch.eye(D_IN))


def test_other_weights_are_told_as_far_as_they_can():
    def explains(other, **model):
        return not DictionaryInfo(site=SITE, model=model).is_of_other_weights(other)

    bf16 = {"weights_sha256": "a", "dtype": "bfloat16"}
    assert explains(bf16) and explains(bf16, weights_sha256="a", dtype="float32")
    assert not explains(bf16, weights_sha256="b", dtype="float32")
    assert explains(bf16, weights_sha256="b", dtype="float16")  # rounded once more
