"""Single latents: where they fire, what they say, who is near; and text that cannot harm."""

import json

import pytest
import torch
from hostile import with_hostile_tokens
from looping import over
from small_dictionaries import make_dictionary
from tiny import BOS, EOS, VOCAB, WIDTH, WORDS, tiny_hf_model, tiny_model, tiny_tokenizer

from llm_wsae import inspect
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting import inspection
from llm_wsae.inspecting.directions import Readout, Vocabulary
from llm_wsae.inspecting.inspection import firings, latents_text, read_sentence, sentence_text
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.terminal import printable, printable_json

SITE = Site.parse("blocks.1.hook_resid_post")
SPARSITIES = {"topk": TopK(4), "relu": ReLU(), "jumprelu": JumpReLU()}


def dictionary_for(model, kind="topk", **info):
    """80 latents, about four active at a time, for the tiny model's rows."""
    described = {"model": model.identity(), **info}
    made = make_dictionary(d_in=model.d_model, sparsity=SPARSITIES[kind], **described)
    made.W_enc.data *= 25  # the tiny model's rows are short
    if kind != "topk":
        made.b_enc.data -= 4
    if made.threshold is not None:
        made.threshold.data.fill_(0.5)
    return made


def all_latents(store, dictionary):
    """Dense latents of every row; massive rows have none."""
    rows = store.rows(SITE, 0, store.num_rows).float()
    usable = rows.norm(dim=1) <= (dictionary.info.massive_threshold or torch.inf)
    return dictionary.encode(rows) * usable[:, None], usable


@over(kind=SPARSITIES, share=(1.0, 0.8), stride=(1, 4))
def test_density_and_top_contexts_are_those_of_all_rows(
    store, model, kind, share, stride, monkeypatch
):
    monkeypatch.setattr(inspection, "_ROWS_AT_ONCE", 700)
    norms = store.rows(SITE, 0, store.num_rows).norm(dim=1)
    one = dictionary_for(model, kind, massive_threshold=float(norms.quantile(share)))
    dense, usable = all_latents(store, one)
    assert 0 <= int((~usable).sum()) < store.num_rows / 4
    context = store.locate(torch.arange(store.num_rows)).context
    often = (dense > 0).sum(0)
    latents = [int(often.argmax()), *often.argsort()[20:60:10].tolist(), int(often.argmin())]
    # a small store is looked at whole
    how = {} if stride == 1 else {"sample_rows": store.num_rows // stride}
    found, _ = firings(store, one, torch.tensor(latents), top=6, **how)
    for latent, firing in zip(latents, found, strict=True):
        values = dense[:, latent]
        seen = values[::stride][usable[::stride]]
        fires = seen > 0
        assert firing.rows_looked_at == len(seen)
        assert firing.density == pytest.approx(float(fires.float().mean()))
        mean = pytest.approx(float(seen[fires].mean()), rel=1e-4) if fires.any() else None
        assert firing.mean_activation == mean
        best = torch.zeros(int(context.max()) + 1).scatter_reduce_(0, context, values, "amax")
        expected = best.sort(descending=True).values[:6]
        assert firing.values == pytest.approx(expected[expected > 0].tolist(), rel=1e-5)
        assert values[firing.rows].tolist() == pytest.approx(firing.values, rel=1e-5)
        assert len(context[firing.rows].unique()) == len(firing.rows)
    assert len(found[0].rows) == 6 > len(found[-1].rows)


def test_examples_lead_back_to_the_text(store, model):
    one = dictionary_for(model)
    dense, _ = all_latents(store, one)
    latent = int((dense > 0).sum(0).argmax())
    (view,) = inspect(one, [latent], store=store, model=model, top=5).latents
    activations = [example.activation for example in view.examples]
    assert len(activations) == 5 and activations == sorted(activations, reverse=True)
    assert view.firing.values == activations
    lines = (store.folder.parent / "text.jsonl").read_text().splitlines()
    for example in view.examples:
        where = store.locate(torch.tensor([example.row]))
        header = store.document(example.row)
        assert example.document == header["name"]
        words, at = json.loads(lines[header["labels"]["number"]])["text"].split(), int(where.offset)
        before, after = example.text.before.split(), example.text.after.split()
        assert example.text.token.split() == [words[at]]
        assert words[at - len(before) : at + 1 + len(after)] == [*before, words[at], *after]


def test_neighbours_and_dimensions(model):
    one = dictionary_for(model)
    one.W_dec.data[7] = 3 * one.W_dec[5]  # the same direction, longer
    one.W_dec.data[9] = 0
    one.W_dec.data[9, 3] = -2
    first, second = inspect(one, [5, 9, 5], top=4).latents  # each once
    assert (first.latent, second.latent, first.neighbours[0].latent) == (5, 9, 7)
    cosine = torch.nn.functional.cosine_similarity(one.W_dec[5], one.W_dec, dim=1)
    cosine[5] = -2
    values, near = cosine.sort(descending=True)
    assert [n.latent for n in first.neighbours] == near[:4].tolist()
    assert [n.cosine for n in first.neighbours] == pytest.approx(values[:4].tolist(), abs=1e-5)
    w = one.W_dec[5].double()
    assert first.effective_dimensions == pytest.approx(float((w**2).sum() ** 2 / (w**4).sum()))
    share, largest = (w**2 / (w**2).sum()).sort(descending=True)
    assert [d.share for d in first.dimensions] == pytest.approx(share[:4].tolist())
    assert [d.dimension for d in first.dimensions] == largest[:4].tolist()
    assert first.promotes is None and first.firing is None and first.examples == []
    only = second.dimensions[0]
    assert second.effective_dimensions == pytest.approx(1)
    assert (only.dimension, only.decoder, only.share) == (3, -2, pytest.approx(1))
    matrix = torch.randn(model.d_model, model.d_model)
    for gamma, expected in (
        ({"gamma": one.extras["gamma"]}, float(one.extras["gamma"][3])),
        ({"gamma": matrix}, float(matrix[:, 3].norm())),
        ({}, None),
    ):
        one.extras = gamma
        (view,) = inspect(one, [9], top=1).latents
        assert view.dimensions[0].gamma == pytest.approx(expected)


@over(family=["gpt2", "llama", "gemma2", "neox", "unknown"])
def test_promoted_tokens_are_those_whose_logits_grow(family):
    """Far out along a direction, the stream is nothing but that direction."""
    live = LanguageModel.from_live(tiny_hf_model(family), None)
    direction = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(4))
    logits = Readout(live).logits(direction)
    assert logits.shape == (2, VOCAB)
    torch.testing.assert_close(logits.mean(1), torch.zeros(2), atol=1e-4, rtol=0)
    ids = torch.zeros(2, 1, dtype=torch.long)
    last = Site(live.num_blocks - 1, "post")
    with torch.no_grad():
        there, back = (
            live.resume(ids, last, sign * 1e4 * direction[:, None])[:, 0] for sign in (1, -1)
        )
    if family == "gemma2":  # whose logits are capped, which keeps their order
        assert logits.argsort(dim=1)[:, -3:].tolist() == there.argsort(dim=1)[:, -3:].tolist()
        return
    expected = (there - back) / 2  # without the norm's bias, if the norm is known
    if live.paths.ln_final is None:
        expected = direction / direction.square().mean(1, keepdim=True).sqrt() @ live.W_U
    expected = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@over(kind=SPARSITIES)
def test_a_dictionary_may_be_on_another_device_than_the_rows(store, model, kind):
    one, moved = dictionary_for(model, kind), dictionary_for(model, kind).to("cuda")
    latents = (all_latents(store, one)[0] > 0).sum(0).argsort(descending=True)[:3].tolist()
    asked = {"store": store, "model": model, "text": "w5 w17 w30", "top": 4}
    expected, found = (inspect(each, latents, **asked) for each in (one, moved))
    assert found.latents == expected.latents and found.latents[0].firing.density > 0
    for token, other in zip(found.tokens, expected.tokens, strict=True):
        assert [a.latent for a in token.latents] == [a.latent for a in other.latents]
        activations = [a.activation for a in other.latents]
        assert [a.activation for a in token.latents] == pytest.approx(activations, rel=1e-2)
    assert moved.W_enc.device.type == "cuda"  # it is left where it was


def test_words_are_the_best_and_the_worst_tokens(model):
    one = dictionary_for(model)
    assert one.on_cpu() is one
    (view,) = inspect(one, [3], model=model).latents
    logits = Readout(model).logits(one.W_dec[[3]])[0]
    assert [w.id for w in view.promotes] == logits.argsort(descending=True)[:10].tolist()
    assert [w.id for w in view.suppresses] == logits.argsort()[:10].tolist()
    assert view.promotes[0].logit == pytest.approx(float(logits.max()))
    shown = [w for w in view.promotes if w.id < len(WORDS)]
    assert [w.token for w in shown] == [WORDS[w.id] for w in shown]
    live = tiny_hf_model("llama")
    live.resize_token_embeddings(VOCAB + 12)  # which no token uses
    wide = LanguageModel.from_live(live, tiny_tokenizer())
    assert Readout(wide).logits(torch.ones(1, WIDTH)).shape == (1, VOCAB)


def test_sentence(model):
    one = dictionary_for(model, store={"packing": {"drop_positions": 2}})
    tokens = read_sentence(model, one, "w5 w17 w5 </s> w30")
    ids = [BOS, 5, 17, 5, EOS, 30]
    assert [token.id for token in tokens] == ids
    dense = one.encode(model.activations(torch.tensor([ids]), [SITE])[SITE][0])
    dense[[0, 1, 4]] = 0  # not trained on: the first positions, and special tokens
    for own, token in zip(dense, tokens, strict=True):
        values, latents = (part[: int((own > 0).sum())] for part in own.sort(descending=True))
        assert [a.latent for a in token.latents] == latents.tolist()
        activations = pytest.approx(values.tolist(), rel=1e-4)
        assert [a.activation for a in token.latents] == activations
    strongest = tokens[2].latents[0]
    lines = sentence_text(tokens, [strongest.latent, 79]).splitlines()
    assert f"{strongest.latent} {strongest.activation:.2f}" in lines[3]
    assert lines[1].split() == ["«<s>»", "none"]
    assert f"latent {strongest.latent}: «w17» {strongest.activation:.2f}" in lines[7]
    norms = model.activations(torch.tensor([ids[1:4]]), [SITE])[SITE][0].norm(dim=1)
    most = float(norms[2]) + 1e-4
    one = dictionary_for(model, prepend_bos=False, massive_threshold=most)
    tokens = read_sentence(model, one, "w5 w17 w5")
    assert [token.id for token in tokens] == ids[1:4]
    fires = [bool(token.latents) for token in tokens]
    assert fires == [at > 0 and bool(norm <= most) for at, norm in enumerate(norms)]


def test_bad_requests_are_sentences(store, model):
    one, elsewhere = dictionary_for(model), dictionary_for(model, site="blocks.2.hook_resid_pre")
    strange = dictionary_for(model, weights={})
    strange.info.model["name"], strange.info.model["weights_sha256"] = "big", "0" * 64
    mute = LanguageModel.from_live(model.hf_model, None)
    other = tiny_model(seed=1)  # as wide, but of other weights
    small = make_dictionary()
    with_store, with_model = {"latents": [1], "store": store}, {"text": "w1", "model": model}
    for kind, said, dictionary, asked in (
        (UsageError, "no latent 80; plain-k4 has latents 0", one, {"latents": [3, 80]}),
        (UsageError, "no latent -1", one, {"latents": [-1]}),
        (UsageError, "has no blocks.2.hook_resid_pre; did you mean", elsewhere, with_store),
        (LlmWsaeError, "rows of 16 dimensions, but the dictionary reads 12", small, with_store),
        (LlmWsaeError, "made by .*, but .* trained on big .other weights", strange, with_store),
        (LlmWsaeError, "was made by .*model, not by tiny .other weights", dictionary_for(model),
         with_store | {"model": other}),
        (UsageError, "the text is empty", one, with_model | {"text": ""}),
        (UsageError, "of 101 tokens are too long", one, with_model | {"text": "w1 " * 100}),
        (UsageError, "reads 12 dimensions, but .*model has 16", small, with_model),
        (LlmWsaeError, "without a tokenizer", one, with_model | {"model": mute}),
    ):  # fmt: skip
        with pytest.raises(kind, match=said):
            inspect(dictionary, **asked)


NASTY = "a\x1b[2J\x07b\nc\td\u202ee\x9bf\u200bg\ud800"
TAME = r"a\x1b[2J\x07b\nc\td\u202ee\x9bf\u200bg\ud800"


def test_text_cannot_command_a_terminal():
    assert printable(NASTY) == TAME
    assert printable("größer 例 🙂") == "größer 例 🙂"
    shown = printable_json({"x": [NASTY, "größer \U000e0001"]})
    assert shown.isprintable() and json.loads(shown) == {"x": [NASTY, "größer \U000e0001"]}
    assert "größer" in shown


class NastyTokenizer:
    """Byte-level decoding, as a real one does it: a token can be part of a character."""

    pieces = (b"good", b" \xe2\x82", b"\xac", b"\x1b[31m", b"\n", b"\xff")

    def convert_ids_to_tokens(self, token):
        return ("good", "Ġâ\x82", "¬", "\x1b[31m", "\n", "ÿ")[token] if token < 6 else None

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def test_tokens_that_are_no_text_of_their_own():
    vocabulary = Vocabulary(NastyTokenizer())
    assert [vocabulary.text(token) for token in (0, 5, 9)] == ["good", "ÿ", "<9>"]
    assert vocabulary.pieces([0, 1, 2, 0], [2, 3]) == ["good ", "€", "good"]
    assert vocabulary.pieces([0, 3, 4], [1, 2]) == ["good", "\x1b[31m", "\n"]
    assert Vocabulary(None).pieces([4, 7, 1], [1, 2]) == ["<4>", "<7>", "<1>"]


def test_what_is_printed_is_printable(store, model):
    one = dictionary_for(model)
    dense, _ = all_latents(store, one)
    latents = (dense > 0).sum(0).argsort(descending=True)[:2].tolist()
    hostile = with_hostile_tokens(model, "\x1b]0;1\x07")
    views = inspect(one, latents, store=store, model=hostile, top=3).latents
    text = latents_text(one, views)
    assert all(line.isprintable() for line in text.splitlines())
    assert r"«\x1b]0;" in text
    for view in views:
        block = text[text.index(f"latent {view.latent} of plain-k4") :]
        assert f"density     {100 * view.firing.density:.3g} % of {store.num_rows:,}" in block
        assert block.count(f"{view.examples[0].activation:.2f}  ") >= 1
        assert f"{view.neighbours[0].latent} {view.neighbours[0].cosine:.2f}" in block
