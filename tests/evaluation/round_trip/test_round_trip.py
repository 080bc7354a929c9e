"""The recovery report: every number is that of a slow look in float64, and what cannot be measured
is refused."""

import json

import numpy as np
import pytest
import torch
from command_line import SITE, call, content, works
from small_dictionaries import make_dictionary
from torch import Tensor

from llm_wsae import RecoverConfig, recover
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.baselines import frozen_random
from llm_wsae.evaluation.round_trip import sums
from llm_wsae.evaluation.round_trip.injection import inject
from llm_wsae.evaluation.round_trip.measuring import KEPT, _Collector, measure_round_trip
from llm_wsae.model.site import Site
from llm_wsae.theory.closed_form import gap_matrix, loss_gap
from llm_wsae.theory.superposition import digon_mixing, planted

PLAIN = "trained/uniform-k4"
D_IN, D_SAE, ROWS = 6, 15, 240
CONFIG = RecoverConfig(rows=ROWS, injections=40)


def of_kind(kind: str) -> Dictionary:
    """A random dictionary whose encoder has something to do with its decoder; its last latent is
    dead."""
    made = make_dictionary(d_in=D_IN, d_sae=D_SAE)
    encoder = 0.7 * made.W_dec.T + 0.2 * made.W_enc
    bias = 0.3 * made.b_enc
    bias[-1] = -1e6
    sparsity = {"topk": TopK(4), "relu": ReLU(), "jumprelu": JumpReLU()}[kind]
    return Dictionary(
        W_enc=encoder,
        W_dec=0.6 * made.W_dec,
        b_enc=bias,
        b_dec=made.b_dec,
        sparsity=sparsity,
        info=made.info,
        threshold=torch.full((D_SAE,), 0.5) if kind == "jumprelu" else None,
    )


class Slow:
    """The same dictionary in float64, dense, written from the definitions."""

    def __init__(self, one: Dictionary):
        names = ("W_enc", "W_dec", "b_enc", "b_dec")
        self.e, self.w, self.b, self.c = (getattr(one, name).double() for name in names)
        self.kind, self.k = one.sparsity.architecture, getattr(one.sparsity, "k", None)

    def encode(self, x: Tensor) -> Tensor:
        pre = x @ self.e + self.b
        if self.kind == "topk":
            return pre.where(pre >= pre.topk(self.k, dim=1).values[:, -1:], 0).relu()
        return pre.where(pre > 0.5, 0) if self.kind == "jumprelu" else pre.relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.w + self.c


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
def test_every_number_is_that_of_a_slow_look(kind, monkeypatch):
    monkeypatch.setattr(sums, "_ROWS_AT_ONCE", 30)
    one = of_kind(kind)
    slow = Slow(one)
    x = 2 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(5))
    found = measure_round_trip(one, x.split(50), ROWS, CONFIG)
    x = x.double()
    z = slow.encode(x)
    r = slow.encode(slow.decode(z))
    fires, both = z > 0, (z > 0) & (r > 0)
    count = fires.sum(0)
    assert count[-1] == 0 and (count[:-1] > 0).all() and torch.equal(found.sums.fires, count)
    ratio = torch.where(both, (z - r) / z, 0)
    close = dict(rtol=2e-4, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(
        found.sums.vanished, 1 - both.sum(0) / count, **close, check_dtype=False
    )
    torch.testing.assert_close(found.sums.shrunk, ratio.sum(0) / both.sum(0), **close)
    false = (r > 0) & ~fires
    torch.testing.assert_close(
        found.sums.false, false.sum(0) / (~fires).sum(0), **close, check_dtype=False
    )
    assert found.sums.vanished_share == pytest.approx(1 - float(both.sum() / fires.sum()), rel=1e-4)
    assert found.sums.mean_shrunk == pytest.approx(float(ratio.sum() / both.sum()), rel=1e-3)
    assert found.sums.false_per_row == pytest.approx(float(false.sum()) / ROWS)
    assert found.sums.l0 == pytest.approx(float(fires.sum()) / ROWS)
    assert found.curve[0].active == pytest.approx(
        float(fires[ROWS - 40 :].sum() + fires[:50].sum()) / 90
    )

    # theorem 4, with the matrix written out
    lost, energy = z - r, float(z.square().sum(1).mean())
    gap = ((lost @ gap_matrix(slow.w.T)) * lost).sum(1).mean()
    assert found.energy == pytest.approx(energy, rel=1e-4)
    assert found.gap == pytest.approx(float(gap) / energy, rel=1e-3, abs=1e-5)
    assert found.latent_loss == pytest.approx(float(lost.square().sum(1).mean()) / energy, rel=1e-3)

    # least squares on the active latents of every row
    best = torch.zeros_like(z)
    for row in range(ROWS):
        on = fires[row].nonzero()[:, 0]
        if len(on):
            best[row, on] = torch.linalg.lstsq(
                slow.w[on].T, x[row] - slow.c, driver="gelsd"
            ).solution
    if kind == "topk":  # else there are more active latents than dimensions, and no one solution
        close = dict(rtol=5e-3, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(found.refit, best.sum(0) / z.sum(0), **close)
        share = float((best * z).sum() / z.square().sum())
        assert found.refit_share == pytest.approx(share, rel=1e-3)

    # each latent's direction, at its own strengths, in the sampled rows where it is silent
    sample = x[torch.linspace(0, ROWS - 1, 40).round().long()]
    silent = slow.encode(sample) == 0
    assert torch.equal(found.injection.rows, torch.where(count > 0, silent.sum(0), 0))
    assert found.injection.missed[-1].isnan() and found.injection.answer[-1].isnan()
    for latent in range(D_SAE - 1):
        own = z[fires[:, latent], latent].sort().values
        assert float(found.strength[latent]) == pytest.approx(float(own[len(own) // 2]), rel=1e-4)

    # what others add to a latent's pre-activation where it fires
    for latent in range(D_SAE - 1):
        given = z[fires[:, latent]].mean(0) * (slow.w @ slow.e[:, latent])
        given[latent] = 0
        share, order = (given / z[fires[:, latent], latent].mean()).sort()
        there = share[:3] < -1e-6
        assert found.takers[latent][there].tolist() == order[:3][there].tolist()
        wanted = share[:3].clamp(max=0)
        torch.testing.assert_close(found.taken[latent], wanted, rtol=1e-3, atol=1e-5)
        assert (found.takers[latent][~there] == -1).all()


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
def test_an_injection_is_a_row_with_the_direction_added(kind):
    one, draw = of_kind(kind), torch.Generator().manual_seed(6)
    slow, x = Slow(one), torch.randn(30, D_IN, generator=draw)
    strength = 3 * torch.rand(D_SAE, 30, generator=draw)
    strength[2] = torch.nan
    found = inject(one, x, strength)
    silent = slow.encode(x.double()) == 0
    assert found.rows[2] == 0 and found.missed[2].isnan()
    for latent in [0, 1, *range(3, D_SAE)]:
        where = silent[:, latent]
        s = strength[latent].double()[where]
        z = slow.encode(x.double()[where] + s[:, None] * slow.w[latent])[:, latent]
        caught = z > 0
        assert found.rows[latent] == len(s)
        wanted = 1 - float(caught.double().mean()) if len(s) else torch.nan
        assert float(found.missed[latent]) == pytest.approx(wanted, abs=1e-6, nan_ok=True)
        slope = float((z * s)[caught].sum() / s[caught].square().sum())
        assert float(found.answer[latent]) == pytest.approx(slope, rel=1e-3, nan_ok=True)


def test_thinned_codes_are_fewer_and_all_else_is_the_same():
    one = of_kind("topk")
    x = 2 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(5))
    first, again = (measure_round_trip(one, x.split(50), ROWS, CONFIG) for _ in range(2))
    assert first.curve == again.curve and len(first.curve) == len(KEPT)
    kept = [point.active / first.curve[0].active for point in first.curve]
    assert kept == pytest.approx(KEPT, abs=0.08)
    other = measure_round_trip(one, x.split(50), ROWS, RecoverConfig(rows=ROWS, seed=1))
    assert other.curve[0] == first.curve[0] and other.curve[1] != first.curve[1]


def test_the_closed_form_is_where_theory_says_it_is():
    """In digons the codes themselves make the round trip unharmed, and injection finds what the
    opposite feature takes."""
    mixing = digon_mixing(2, 3)
    data = planted(mixing, 0.5)
    x = data.features(4000, torch.Generator().manual_seed(2))
    rows = mixing.T
    one = Dictionary(
        W_enc=rows.T,
        W_dec=rows,
        b_enc=torch.zeros(len(rows)),
        b_dec=torch.zeros(rows.shape[1]),
        sparsity=ReLU(),
        info=make_dictionary().info,
    )
    found = measure_round_trip(
        one, data.observe(x).split(512), 4000, RecoverConfig(injections=1000)
    )
    assert found.sums.vanished_share == 0 and found.sums.mean_shrunk == pytest.approx(0, abs=1e-6)
    assert found.gap == pytest.approx(0, abs=1e-6)
    assert abs(float(loss_gap(mixing, x))) > 0.01  # of the true features: the codes do not know
    alone, pairs = found.injection.missed[:2], found.injection.missed[2:]
    assert (alone == 0).all() and (pairs > 0.1).all()
    torch.testing.assert_close(
        found.injection.answer[:2], torch.ones(2).double(), rtol=1e-5, atol=0
    )
    assert (found.injection.answer[2:] < 0.95).all()


def test_the_random_dictionary_is_tied_centred_and_as_sparse():
    like, mean = of_kind("jumprelu"), torch.arange(D_IN).float()
    one = frozen_random(like, mean, 3.4, seed=0)
    assert one.sparsity == TopK(3) and torch.equal(one.W_enc, one.W_dec.T)
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert not one.encode(mean[None]).gt(1e-5).any()
    assert frozen_random(like, mean, 3.4, seed=1).decoder_digest() != one.decoder_digest()
    assert frozen_random(like, mean, 0.1, seed=0).sparsity == TopK(1)


@pytest.fixture(scope="module")
def report(world):
    """Printed, and in a folder."""
    out = world / "recovered"
    words = ("recover", world / PLAIN, "--store", world / "store", "--rows", 1500)
    before = content(world / "trained")
    printed = works(*words, "--out", out)
    assert content(world / "trained") == before and "recover" in printed.err
    return printed.out, json.loads((out / "recovery.json").read_text())


def test_the_command_measures_the_last_rows_and_says_so(world, report):
    text, facts = report
    store = ActivationStore.open(world / "store")
    one = Dictionary.load(world / PLAIN)
    last = store.rows(Site.parse(SITE), store.num_rows - 1500, store.num_rows).float()
    usual = last[last.norm(dim=1) <= one.info.massive_threshold]
    wanted = measure_round_trip(one, usual.split(1024), 1500, RecoverConfig(rows=1500))
    own = facts["dictionaries"]["uniform-k4"]
    assert own["trained"]["rows"] == len(usual) and own["site"] == SITE
    assert own["trained"]["vanished"] == pytest.approx(wanted.sums.vanished_share)
    assert own["per_latent"]["firings"] == wanted.sums.fires.tolist()
    assert own["random"]["l0"] == pytest.approx(own["trained"]["l0"], abs=0.5)
    assert {len(column) for column in own["per_latent"].values()} == {one.d_sae}
    assert len(own["trained"]["curve"]) == len(KEPT)
    assert set(own["trained"]["curve"][0]) == {"active", "vanished", "shrunk", "false"}
    cells = next(line for line in text.splitlines() if line.startswith("uniform-k4")).split()
    assert float(cells[2]) == pytest.approx(100 * own["trained"]["vanished"], abs=0.06)
    assert "frozen random" in text and "uniform-k4 was trained on these rows" in text
    assert facts["command"] == "recover" and facts["config"]["rows"] == 1500
    assert (world / "recovered/recovery.png").read_bytes().startswith(b"\x89PNG")
    again = works(
        "recover", world / PLAIN, "--store", world / "store", "--rows", 1500, "--json"
    ).json
    assert again["dictionaries"] == facts["dictionaries"]
    assert "recovery report is intact" in works("verify", world / "recovered").out


def test_from_python(world, report):
    dictionary, store = Dictionary.load(world / PLAIN), ActivationStore.open(world / "store")
    found = recover({"uniform-k4": dictionary}, store, RecoverConfig(rows=1500))
    assert json.loads(json.dumps(found.to_dict()))["dictionaries"] == report[1]["dictionaries"]


def test_what_cannot_be_measured_is_refused(world, tmp_path, monkeypatch):
    store, out = world / "store", tmp_path / "out"
    make_dictionary(site="blocks.0.hook_resid_post", d_in=16, d_sae=32).save(tmp_path / "elsewhere")
    make_dictionary(d_in=12).save(tmp_path / "narrow")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/recovery.json").write_text('{"mine": 1}')
    before = content(tmp_path)
    for words, code, said in (
        (("--store", store), 2, "name at least one dictionary"),
        ((tmp_path / "elsewhere", "--store", store), 2, "has no blocks.0.hook_resid_post"),
        ((tmp_path / "narrow", "--store", store), 1, "rows of 16 dimensions"),
        ((world / PLAIN, "--store", world / "nothing"), 1, "nothing"),
        ((world / PLAIN, "--store", store, "--rows", 0), 2, "at least 1"),
        ((world / PLAIN, "--store", store, "--out", tmp_path / "taken"), 1, "left alone"),
        ((world / PLAIN, "--store", store, "--site", "blocks.2.hook_resid_post"), 2, "blocks.2"),
    ):
        result = call("recover", *words, *(() if "--out" in words else ("--out", out)))
        assert result.code == code and said in result.err and result.out == "", result
        assert result.err.strip().count("\n") == 0 or "it/s" in result.err
    assert content(tmp_path) == before
    silent = of_kind("relu")
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    with pytest.raises(LlmWsaeError, match=r"no latent of plain-k4 fires on 240 rows"):
        measure_round_trip(silent, [torch.randn(ROWS, D_IN)], ROWS)
    with pytest.raises(LlmWsaeError, match="massive"):
        measure_round_trip(silent, [torch.empty(0, D_IN)], ROWS)
    with pytest.raises(UsageError, match="there is no dictionary"):
        recover({}, ActivationStore.open(store))


def test_a_damaged_report_is_noticed(world, report, tmp_path):
    text = (world / "recovered/recovery.json").read_text()
    path = tmp_path / "recovery.json"
    path.write_text(text.replace('"l0"', '"L0"', 1))
    assert call("verify", tmp_path).code == 1
    assert np.isfinite(report[1]["dictionaries"]["uniform-k4"]["trained"]["gap"])


def test_the_rows_of_injections_are_spread_over_however_many_there_are():
    for rows in (1, 2, 7, 240, 20_000_000, 33_554_440):  # float32 rounds the last two up
        at = _Collector(of_kind("topk"), rows, CONFIG)._is_sampled.nonzero()[:, 0]
        assert len(at) == min(rows, 40)
        assert np.abs(at.numpy() - np.linspace(0, rows - 1, len(at))).max() <= max(
            0.5, rows * 2**-23
        )
