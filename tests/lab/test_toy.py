"""The toy experiment, small, with the ordinary trainer; and what it measures."""

import json
from itertools import islice, permutations

import pytest
import torch
from command_line import call, content, works

from llm_wsae.data.shuffling import ActivationSource, MemorySource
from llm_wsae.lab.theory import Superposition, features_per_latent, matched_loss, measure
from llm_wsae.model.site import Site

SITE = Site.parse("blocks.0.hook_resid_post")
NAMES = ["uniform", "variance-a0.5", "whitening-a0.5", "random directions", "closed form"]


def test_rows_in_memory_are_a_source():
    rows = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    source = MemorySource(rows, SITE)
    assert isinstance(source, ActivationSource) and source.num_rows == 3000
    first, second, third = islice(source.batches(1000, 7), 3)
    every = torch.cat([first, second, third])
    assert torch.equal(every.sort(dim=0).values, rows.sort(dim=0).values)
    assert not torch.equal(every, rows)
    assert torch.equal(next(source.batches(1000, 7, start=2)), third)
    assert source.statistics().count == 3000
    covariance = source.second_moment().covariance()
    torch.testing.assert_close(covariance, rows.double().T.cov(correction=0), rtol=1e-3, atol=1e-4)
    assert source.identity() == MemorySource(rows.double(), SITE).identity()
    assert source.identity() != MemorySource(rows + 1, SITE).identity()


@pytest.mark.slow
def test_every_dictionary_is_compared_with_the_truth_and_a_finished_one_is_only_read(tmp_path):
    words = ("theory", "--sparsity", 0.99, "--seeds", 0, "--steps", 150, "--out", tmp_path)
    text = works(*words).out
    found = json.loads((tmp_path / "theory.json").read_text())["found"]["0.99"]
    assert list(found) == NAMES and all(name in text for name in NAMES)
    trained, random, best = (found[name][0] for name in ("uniform", *NAMES[-2:]))
    assert random["mmcs"] < trained["mmcs"] < best["mmcs"] == pytest.approx(1, abs=0.01)
    assert trained["l_gt"] < random["l_gt"]
    before = content(tmp_path)
    again = works(*words, "--seeds", 0, 1, "--json").json["found"]["0.99"]
    assert {name: of_seeds[:1] for name, of_seeds in again.items()} == found
    kept = {path: data for path, data in before.items() if "seed0" in str(path)}
    assert kept and kept.items() <= content(tmp_path).items()
    assert "intact" in works("verify", tmp_path).out
    other = call(*words, "--steps", 151)
    assert other.code == 1 and "num_steps" in other.err.replace(" ", "_")


def test_what_cannot_be_run_is_refused(tmp_path):
    for words, said in (
        (("--sparsity", 1), "there is no feature to find"),
        (("--sparsity", 1.5), "sparsity"),
        (("--rule", "sensitivity"), "cannot measure what the rule sensitivity reads"),
        (("--rule", "varance"), "varance"),
        (("--steps", 0), "steps"),
    ):
        result = call("theory", *words, "--out", tmp_path / "out")
        assert result.code == 2 and said in result.err and not (tmp_path / "out").exists()


# --- what is measured ---


def features(rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two features that are alone on their dimensions, and a pair that shares the third."""
    mixing = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -1]])
    return mixing, Superposition(mixing, 0.7).features(rows, torch.Generator().manual_seed(0))


def test_the_truth_is_found_whole_in_any_order_and_scale_with_spare_latents():
    mixing, x = features()
    order, scale = torch.tensor([2, 0, 3, 1]), torch.tensor([3.0, 0.1, 1, 1])
    spare = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for decoder, codes in (
        (mixing.T[order], x[:, order]),
        (torch.cat([mixing.T / scale[:, None], spare]),
         torch.cat([x * scale, torch.zeros(len(x), 2)], 1)),
    ):  # fmt: skip
        found = measure(decoder, codes, mixing, x)
        assert found.l_gt == pytest.approx(0, abs=1e-6)
        assert found.mmcs == pytest.approx(1) and found.recovered == 1
        assert found.features_per_latent == pytest.approx(1, abs=0.01)


def test_directions_count_with_their_sign():
    mixing, x = features()
    opposite = measure(-mixing.T[:1], x[:, :1], mixing, x)
    # the cosines of −e₀ with e₀, e₁, e₂, −e₂
    assert opposite.mmcs == pytest.approx((-1 + 0 + 0 + 0) / 4) and opposite.recovered == 0
    tilted = torch.tensor([[1.0, 0.2, 0], [0, 1, 1]])
    assert measure(tilted, x[:, :2], mixing, x).recovered == 0.25  # only e₀, at cosine 0.98


def test_a_feature_without_a_latent_is_missed_whole_and_the_matching_is_the_best_of_all():
    x = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]])
    assert matched_loss(x[:, :2], x) == pytest.approx(9 / 14)
    # One latent for two features can serve one of them: x = (1, 0), (0, 2), z = 1, 2,
    # best for the second: ⟨x₂, z⟩²/‖z‖² = 16/5 of 5.
    both, z = torch.tensor([[1.0, 0], [0, 2.0]]), torch.tensor([[1.0], [2.0]])
    assert matched_loss(z, both) == pytest.approx(1 - 16 / 25)
    g = torch.Generator().manual_seed(1)
    x, codes = torch.rand(50, 4, generator=g), torch.rand(50, 5, generator=g)

    def left(j: int, i: int) -> float:
        scale = x[:, j] @ codes[:, i] / codes[:, i].square().sum()
        return float((x[:, j] - scale * codes[:, i]).square().sum())

    sums = [sum(left(j, i) for j, i in enumerate(own)) for own in permutations(range(5), 4)]
    assert matched_loss(codes, x) == pytest.approx(min(sums) / float(x.square().sum()), abs=1e-5)


def test_latents_count_by_their_variance():
    """What latents that hardly fire correlate with is chance, and looks like a mixture of all."""
    _, x = features(40_000)
    rows = torch.randint(len(x), (3, 10), generator=torch.Generator().manual_seed(1))
    rare = torch.zeros(len(x), 10).scatter(0, rows, 0.3)  # each on three rows
    assert features_per_latent(rare, x) > 1.5
    assert features_per_latent(torch.cat([x, rare], 1), x) == pytest.approx(1, abs=0.02)
    two = x[:, :1] + x[:, 1:2]
    assert features_per_latent(two, x) == pytest.approx(2, abs=0.05)
    # the second varies twice as much as the first: (1·1 + 2·2) / 3
    of_both = features_per_latent(torch.cat([x[:, :1], two], 1), x)
    assert of_both == pytest.approx(5 / 3, abs=0.03)
    constant = features_per_latent(torch.ones(len(x), 1), x)
    assert constant != constant
