"""Features planted upstream: after an early block, from where the model carries them to a site.

Plants in the rows of a site (``lab.planting``) are put where we choose, and the model does not use
them. Here known directions are added to the stream after an early block, on known tokens, and the
model computes on. When they fire is still known. The direction in which they arrive at the site,
how loud they are there, what company they have and what they do to the output is up to the model.

Which plants fire, and how strongly, is drawn from the plants' seed and the ids of the context. So
every reader of a context sees the same firings: a harvest that is resumed, another process, the
measurement afterwards. Nothing fires on a context's first position, whose activations are massive.

Every plant is measured before any dictionary is:

- a *probe*, a logistic regression on the rows of the site, is the ceiling of what a latent could
  find there;
- planted alone, it shows in which direction and how loudly it *arrives*, and its *effect*: the KL
  divergence that it causes in the prediction of the next token.

Plants whose probe has an F1 below 0.9, or whose effect is below 0.01 nats, do not count: the site
does not have them, or the model does not use them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import read_own_json, write_json
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest, kept_rows
from llm_wsae.data.packing import Contexts, Packer
from llm_wsae.data.rows import CHUNK_ROWS
from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.fidelity.next_token import next_token_sums
from llm_wsae.lab.config import UpstreamConfig, check_reached
from llm_wsae.lab.planting import (
    SPREAD,
    Firings,
    KnownSource,
    Plants,
    check_not_drowned,
    median_norm,
)
from llm_wsae.machine.processes import join
from llm_wsae.model.language_model import Ids, LanguageModel, Logits, Stream, scored_positions
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics

LEAST_PROBE_F1, LEAST_EFFECT = 0.9, 0.01
MEASURED = "plants.json"
STORE, HELDOUT_STORE = "store", "heldout"
_NORM_CONTEXTS, _CONTEXTS_AT_ONCE = 128, 32  # in which the stream's median norm is measured
_ALONE_CONTEXTS, _ALONE_SHARE = 4, 1 / 16  # where a plant fires when it is alone
_PROBE_ROWS, _PROBE_STEPS = 1 << 17, 20  # of a probe's training, at most


@dataclass(frozen=True)
class UpstreamPlants:
    """Features to add to the stream at a site: x′ = x + Σ_j a_j v_j over those that fire."""

    site: Site
    directions: Float[Tensor, "plants d_model"]  # unit vectors v, float32
    strength: Float[np.ndarray, " plants"]  # mean strength of each, in the units of the stream
    relative_strength: Float[np.ndarray, " plants"]  # the same in its median norms, as asked for
    probability: Float[np.ndarray, " plants"]  # that it fires on a token
    seed: int

    def strengths(
        self, ids: Int[np.ndarray, " positions"]
    ) -> Float[np.ndarray, "positions plants"]:
        """How strongly each plant fires at each position of a context; 0 where it is silent."""
        seen = hashlib.sha256(ids.astype("<i4").tobytes()).digest()
        draw = np.random.default_rng((self.seed, 2, int.from_bytes(seen[:8], "little")))
        shape = len(ids), len(self.strength)
        fires = draw.random(shape, dtype=np.float32) < self.probability
        fires[0] = False
        varied = 1 + SPREAD * draw.uniform(-1, 1, shape)
        return (fires * varied * self.strength).astype(np.float32)

    def identity(self) -> str:
        """A digest of all that determines what is planted."""
        digest = hashlib.sha256(f"{self.site} {self.seed}".encode())
        digest.update(self.directions.numpy().tobytes())
        digest.update(self.strength.tobytes() + self.probability.tobytes())
        return digest.hexdigest()


def draw_plants(
    model: LanguageModel, text: Iterable[Contexts], config: UpstreamConfig
) -> UpstreamPlants:
    """Draw plants for a model: isotropic directions, probabilities log-uniform. Their strengths are
    in median norms of the centred stream, measured on the contexts of ``text`` and rounded to three
    digits, so that processors that round differently plant the same.

    Raises UsageError for a block that the model lacks, or plants that would drown the stream.
    """
    site = Site(config.block, "post")
    model.check_site(site)
    rows = torch.cat([kept_rows(model, contexts, [site])[site].float() for contexts in text])
    found = Statistics(model.d_model, 1).update(rows, torch.zeros(len(rows), dtype=torch.long))
    norm = float(f"{median_norm(found):.3g}")
    draw = np.random.default_rng((config.seed, 0))
    relative = np.repeat(config.strengths, config.per_strength)
    directions = draw.standard_normal((len(relative), model.d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    low, high = np.log([config.rarest, config.commonest])
    probability = np.exp(draw.uniform(low, high, len(relative)))
    check_not_drowned(
        directions, relative, probability, "lower strengths, commonest or per-strength"
    )
    unit = torch.from_numpy(directions).float()
    return UpstreamPlants(site, unit, relative * norm, relative, probability, config.seed)


class PlantedModel(LanguageModel):
    """A language model into whose stream plants are added: its activations at later sites and its
    logits are those with them. Resumed at a later site it is the model itself."""

    def __init__(self, model: LanguageModel, plants: UpstreamPlants):
        super().__init__(model.hf_model, model.tokenizer, model.name, model.revision)
        self.plants = plants

    @torch.no_grad()
    def activations(self, ids: Ids, sites: Sequence[Site]) -> dict[Site, Stream]:
        """As LanguageModel's. Raises UsageError also for a site that no plant reaches."""
        for site in sites:
            check_reached(site, self.plants.site)
        return self.resume_to(ids, sites, self.plants.site, self._planted(ids))

    @torch.no_grad()
    def logits(self, ids: Ids) -> Logits:
        """As LanguageModel's, with the plants."""
        return self.resume(ids, self.plants.site, self._planted(ids))

    def identity(self) -> dict[str, str | int | None]:
        """As LanguageModel's, and what is planted."""
        return {**super().identity(), "planted": self.plants.identity()}

    def _planted(self, ids: Ids) -> Stream:
        clean = super().activations(ids, [self.plants.site])[self.plants.site]
        strengths = np.stack([self.plants.strengths(one) for one in ids.cpu().numpy()])
        added = torch.from_numpy(strengths) @ self.plants.directions
        return clean + added.to(clean)


class Arrived(NamedTuple):
    """What becomes of plants that are planted alone."""

    directions: Float[Tensor, "plants d_in"]  # unit vectors: the mean change of a site's rows
    strength: Float[Tensor, " plants"]  # its length, in the units of the rows
    effect: Float[Tensor, " plants"]  # mean KL of the next token, in nats


@torch.no_grad()
def arrived(
    model: LanguageModel, plants: UpstreamPlants, contexts: Contexts, site: Site
) -> Arrived:
    """Plant each plant alone, at its mean strength on some tokens of the contexts, and compare with
    the ``model``, which has none. What arrives is measured on the same tokens."""
    place, end = plants.site, Site(model.num_blocks - 1, "post")
    ids = torch.from_numpy(contexts.ids).to(model.device)
    allowed = scored_positions(torch.from_numpy(contexts.keep)).to(model.device)
    allowed[:, 0] = False
    clean_there = model.activations(ids, [place])[place]
    clean = model.resume_to(ids, [site, end], place, clean_there)
    draw = np.random.default_rng((plants.seed, 3))
    changes, effects = [], []
    each = zip(plants.directions, plants.strength, strict=True)
    for direction, strength in tqdm(each, "plants", len(plants.strength)):
        fires = torch.from_numpy(draw.random(allowed.shape) < _ALONE_SHARE).to(ids.device) & allowed
        if not fires.any():
            fires = allowed
        hidden = clean_there.clone()
        hidden[:, :-1][fires] += (direction * float(strength)).to(hidden)
        found = model.resume_to(ids, [site, end], place, hidden)
        change = (found[site].float() - clean[site].float())[:, :-1][fires]
        changes.append(change.mean(0).cpu())
        [(_, divergence)] = next_token_sums(model, clean[end], [found[end]], ids, fires)[1]
        effects.append(float(divergence.sum()) / int(fires.sum()))
    mean = torch.stack(changes)
    length = mean.norm(dim=1)
    return Arrived(mean / length.clamp(min=1e-30)[:, None], length, torch.tensor(effects))


def known_rows(
    store: ActivationStore, site: Site, plants: UpstreamPlants
) -> Iterator[tuple[Float[Tensor, "rows d_in"], Float[np.ndarray, "rows plants"]]]:
    """The rows of a planted model's store, in runs of up to 1,024 of a shard, with the strength of
    every plant in them."""
    reader, start = store.reader(site), 0
    for shard in range(len(store.manifest.shards)):
        each = store.contexts(shard).each()
        strengths = np.concatenate([plants.strengths(one.ids)[one.keep] for one in each])
        for first in range(0, len(strengths), CHUNK_ROWS):
            known = strengths[first : first + CHUNK_ROWS]
            yield reader.rows(start, start + len(known)).float(), known
            start += len(known)


def probe_f1(
    rows: Float[Tensor, "rows d_in"],
    fires: Bool[Tensor, "rows plants"],
    test_rows: Float[Tensor, "test d_in"],
    test_fires: Bool[Tensor, "test plants"],
) -> Float[Tensor, " plants"]:
    """F1 on the test rows of one logistic regression for each plant (Σ loss + ½‖w‖² on whitened
    rows), predicting above the threshold whose F1 is largest on the rows of its training."""
    mean = rows.mean(0)
    covariance = (rows - mean).T.cov().double()
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    stretch = torch.linalg.inv(torch.linalg.cholesky(covariance)).T.float()
    x, wanted = (rows - mean) @ stretch, fires.float()
    # begins with Fisher's discriminant, which is nearly there
    share = wanted.mean(0).clamp(1e-6, 1 - 1e-6)
    there, elsewhere = x.T @ wanted, x.T @ (1 - wanted)
    there, elsewhere = there / (share * len(x)), elsewhere / ((1 - share) * len(x))
    weight = (there - elsewhere).requires_grad_()
    bias = share.logit() - (there.square() - elsewhere.square()).sum(0) / 2
    bias.requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        bar.update()
        solver.zero_grad()
        found = F.binary_cross_entropy_with_logits(x @ weight + bias, wanted, reduction="sum")
        total = found + weight.square().sum() / 2
        total.backward()
        return total

    with tqdm(desc="probes", unit="step") as bar:
        solver.step(loss)
    with torch.no_grad():
        cut = _best_cut(x @ weight, fires)
        predicted = ((test_rows - mean) @ stretch) @ weight >= cut
    both = (predicted & test_fires).sum(0)
    return 2 * both / (predicted.sum(0) + test_fires.sum(0)).clamp(min=1)


def _best_cut(
    scores: Float[Tensor, "rows plants"], fires: Bool[Tensor, "rows plants"]
) -> Float[Tensor, " plants"]:
    """Of each plant the threshold whose F1 is largest."""
    cuts = []
    for own, true in zip(scores.T, fires.T, strict=True):
        ordered, order = own.sort(descending=True)
        f1 = 2 * true[order].cumsum(0) / (torch.arange(1, len(own) + 1) + true.sum())
        cuts.append(ordered[f1.argmax()])
    return torch.stack(cuts)


@dataclass(frozen=True)
class MeasuredPlant:
    """One plant, as it was asked for and as it was found at the site."""

    strength: float  # planted: in median norms of the centred stream there
    probability: float
    probe_f1: float
    loudness: float  # on arrival: in median norms of the site's centred rows
    effect: float  # mean KL of the next token where it fires, in nats
    direction: list[float]  # unit vector, on arrival

    @property
    def counts(self) -> bool:
        """Whether the site has it and the model uses it."""
        return self.probe_f1 >= LEAST_PROBE_F1 and self.effect >= LEAST_EFFECT


class UpstreamSource(KnownSource):
    """One site of a planted model's store, as an ActivationSource, with the plants that count as
    they arrive there. ``heldout`` gives rows of held-out text with the truth."""

    def __init__(
        self,
        store: ActivationStore,
        heldout: ActivationStore,
        site: Site,
        model: PlantedModel,
        measured: Sequence[MeasuredPlant],
    ):
        """Raises LlmWsaeError if no plant counts."""
        super().__init__(store, site)
        self.model, self.measured, self._heldout = model, measured, heldout
        counting = [plant for plant in measured if plant.counts]
        if not counting:
            best, most = (
                max(getattr(p, name) for p in measured) for name in ("probe_f1", "effect")
            )
            raise LlmWsaeError(
                f"none of {len(measured)} features that were planted upstream counts at {site}: F1 "
                f"of a probe is at most {best:.2f} (needed: {LEAST_PROBE_F1}), the effect at most "
                f"{most:.3f} nats (needed: {LEAST_EFFECT}); plant stronger ones, or take another "
                "site"
            )
        self._counts = np.array([plant.counts for plant in measured])
        loudness = torch.tensor([plant.loudness for plant in counting], dtype=torch.float64)
        self.plants = Plants(
            directions=torch.tensor([plant.direction for plant in counting]),
            strength=loudness * median_norm(store.statistics(site)),
            relative_strength=tuple(loudness.tolist()),
            probability=torch.tensor([p.probability for p in counting], dtype=torch.float64),
            token=torch.full((len(counting),), -1),
            stratum=tuple(f"upstream {plant.strength:g}" for plant in counting),
            seed=model.plants.seed,
        )

    def heldout(self) -> Iterator[tuple[Float[Tensor, "rows d_in"], Firings]]:
        """The rows of held-out text, with what fires in them; in the order of the text."""
        planted = self.model.plants
        arriving = self.plants.strength.numpy() / planted.strength[self._counts]
        for rows, strengths in known_rows(self._heldout, self.site, planted):
            known = strengths[:, self._counts] * arriving
            row, plant = known.nonzero()
            yield rows, Firings(row, plant, known[row, plant])

    def words(self) -> str:
        """How many plants count, and how loudly they arrive."""
        counting = [plant for plant in self.measured if plant.counts]
        loudness, effect = (
            "{1:.2f} [{0:.2f}, {2:.2f}]".format(*np.quantile(values, (0.05, 0.5, 0.95)))
            for values in zip(*((plant.loudness, plant.effect) for plant in counting), strict=True)
        )
        return (
            f"planted upstream: {len(counting)} of {len(self.measured)} features count (F1 of the "
            f"probe at least {LEAST_PROBE_F1}, effect at least {LEAST_EFFECT} nats). They arrive "
            f"at {self.site} with {loudness} median norms, and change the next token by {effect} "
            "nats (median, 5 to 95 % of the features)."
        )


def plant_upstream(
    model: LanguageModel,
    text: Corpus,
    heldout: Corpus,
    site: Site,
    out: Path,
    config: UpstreamConfig = UpstreamConfig(),  # noqa: B008 - frozen
    rows: HarvestConfig = HarvestConfig(),  # noqa: B008 - frozen
) -> UpstreamSource:
    """Harvest a site of a model with features planted upstream into ``out``, measure each of them,
    and return the rows as a source to train on. The same call resumes what was stopped.

    ``text`` is trained on, ``heldout`` measured on. Raises as ``harvest`` and ``draw_plants`` do;
    LlmWsaeError if no plant counts.
    """
    check_reached(site, Site(config.block, "post"))
    packer = Packer.for_model(model, rows)
    first = list(packer.blocks(text, _CONTEXTS_AT_ONCE, limit=_NORM_CONTEXTS))
    planted = PlantedModel(model, draw_plants(model, first, config))
    store = harvest(planted, text, [site], out / STORE, rows)
    tested = HarvestConfig(**{**asdict(rows), "tokens": config.heldout_tokens})
    apart = harvest(planted, heldout, [site], out / HELDOUT_STORE, tested)

    path, rows_read = out / MEASURED, [store.num_rows, apart.num_rows]

    def measured() -> list[MeasuredPlant]:
        if path.exists():
            kept = read_own_json(path, "measurement of planted features")
            if kept["rows"] == rows_read:  # else a store has grown
                return [MeasuredPlant(**one) for one in kept["plants"]]
        alone = next(packer.blocks(heldout, _ALONE_CONTEXTS))
        found = _measure(model, planted.plants, store, apart, site, alone)
        write_json(path, {"rows": rows_read, "plants": [asdict(plant) for plant in found]})
        return found

    processes = join()
    with processes.together():
        found = processes.lead(measured)
    return UpstreamSource(store, apart, site, planted, found)


def _measure(
    model: LanguageModel,
    plants: UpstreamPlants,
    store: ActivationStore,
    heldout: ActivationStore,
    site: Site,
    contexts: Contexts,
) -> list[MeasuredPlant]:
    statistics = store.statistics(site)

    def usual(store: ActivationStore) -> tuple[Tensor, Tensor]:
        runs = islice(known_rows(store, site, plants), _PROBE_ROWS // CHUNK_ROWS)
        rows, strengths = zip(*runs, strict=True)
        x, fires = torch.cat(rows), torch.from_numpy(np.concatenate(strengths) > 0)
        kept = x.norm(dim=1) <= statistics.massive_threshold
        return x[kept], fires[kept]

    f1 = probe_f1(*usual(store), *usual(heldout))
    found = arrived(model, plants, contexts, site)
    loudness = found.strength / median_norm(statistics)
    columns = (
        torch.from_numpy(plants.relative_strength),
        torch.from_numpy(plants.probability),
        f1,
        loudness,
        found.effect,
        found.directions,
    )
    every = zip(*(column.tolist() for column in columns), strict=True)
    return [MeasuredPlant(*own) for own in every]
