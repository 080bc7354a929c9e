"""The command that trains dictionaries."""

# ruff: noqa: RUF009 - the defaults are frozen

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.commands.options import Result, cost
from llm_wsae.data.config import StreamConfig
from llm_wsae.errors import UsageError
from llm_wsae.machine.processes import leads
from llm_wsae.model.site import Site
from llm_wsae.pipeline.request import (
    Flat,
    Grid,
    ModelConfig,
    Stores,
    TextConfig,
    changed,
    sites_of,
    write_request,
)
from llm_wsae.training.config import TrainConfig
from llm_wsae.weights.config import WeightConfig

if TYPE_CHECKING:
    from llm_wsae.data.shuffling import SiteRows

RECORD = "train.json"


@dataclass(frozen=True, kw_only=True)
class Stream(StreamConfig, TextConfig, ModelConfig):
    """Instead of a store: a model and a text, whose rows are trained on as they are computed."""

    model: str | None = None  # type: ignore[assignment]
    corpus: str | None = None  # type: ignore[assignment]
    device: tyro.conf.Suppress[str] = "auto"  # type: ignore[assignment]  # that of the training


@dataclass(frozen=True, kw_only=True)
class Train:
    """What ``train`` is asked for."""

    stores: Stores = ()
    """Activation stores, of one model with the same sites and settings."""
    site: tuple[str, ...]
    """Sites, named as in TransformerLens: blocks.8.hook_resid_post."""
    out: Path
    """Folder that receives one dictionary folder per combination; of several sites, one folder per
    site with these."""
    weights: Path | None = None
    """Weights file, as one more rule: weigh's of this site, or a custom vector or matrix."""
    grid: Flat[Grid] = Grid()
    weigh: Flat[WeightConfig] = WeightConfig()
    training: Flat[TrainConfig] = TrainConfig()
    stream: Flat[Stream] = Stream()

    def __post_init__(self) -> None:
        self.grid.check(self.weigh)
        if self.stores and (given := [*changed(self.stream)]):
            raise UsageError(
                f"{given[0]} is for training without a store; drop it, or drop {self.stores[0]}"
            )
        if self.stores and self.training.device == "spread":
            raise UsageError(
                "--device spread spreads a model over devices, but training on a store runs no "
                "model; drop --device spread"
            )
        if not self.stores and (self.stream.model is None or self.stream.corpus is None):
            raise UsageError(
                "give a STORE to train on, or --model and --corpus to train without one"
            )
        if not self.stores and self.training.tokens is None:
            raise UsageError("a stream has no end: set --tokens, the number of rows to train on")

    @property
    def folders(self) -> dict[Site, Path]:
        """The folder of each site."""
        sites = sites_of(self.site)
        return {site: self.out if len(sites) == 1 else self.out / str(site) for site in sites}

    def rows(self) -> "SiteRows":
        """The stores as one, or the stream."""
        from llm_wsae.data.stores import open_stores
        from llm_wsae.data.streaming import ActivationStreams
        from llm_wsae.training.checkpoint import recorded

        if self.stores:
            return open_stores(self.stores)
        text = self.stream.open("train")
        trainings = filter(None, map(recorded, self.folders.values()))
        begun = next((one["rows"].get("model") for one in trainings), None)
        model = replace(self.stream, device=self.training.device).load(begun)
        return ActivationStreams(model, text, list(self.folders), self.stream, self.out)


def train(request: Train) -> Result:
    """Train dictionaries on a store, or on several as one, all of a site in one pass over the rows.

    Without a store: on a model's activations as they are computed, all sites in one pass.
    Run it again to resume after an interruption.
    """
    from llm_wsae.pipeline.training import stand_ins, weights_of
    from llm_wsae.training.checkpoint import check_same_rows
    from llm_wsae.training.trainer import check_arms, check_out, train_sites
    from llm_wsae.training.trainer import train as train_site
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.weighing import measure_inputs

    started, grid, weigh, out = time.monotonic(), request.grid, request.weigh, request.out
    folders, training = request.folders, request.training
    check_file(out / RECORD, is_record_of("train"))
    check_out(out)
    own = LossWeights.load(request.weights, weigh, folders) if request.weights else None
    if training.device == "spread":  # which is for the model alone
        training = replace(training, device="auto")
    rows = request.rows()
    # before minutes of measuring: whether such arms can be trained, on these rows, there
    likely = stand_ins(grid, weigh, rows.d_in) + ([own] if own else [])
    check_arms(grid.arms(likely), rows.d_in, training)
    for site, folder in folders.items():
        check_out(folder)
        check_same_rows(folder, rows.source(site).identity())
    inputs = {site: measure_inputs(grid.rules, rows, site) for site in folders}
    arms = {site: grid.arms(weights_of(one, grid, weigh, own=own)) for site, one in inputs.items()}
    if len(arms) > 1:
        trained = train_sites(rows, arms, training, out)
    else:  # in the folder itself
        trained = {s: train_site(rows.source(s), own, training, out) for s, own in arms.items()}
    if leads():
        write_request(out / RECORD, "train", request)
    facts = {
        str(site): {name: d.info.metrics["training"] for name, d in of_site.items()}
        for site, of_site in trained.items()
    }
    answer = next(iter(facts.values())) if len(facts) == 1 else facts
    return answer, "\n".join([*_tables(facts), f"dictionaries in {out}", cost(started)])


def _tables(facts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """The lines of one table for each site: what training measured of every dictionary."""
    width = max(32, *(len(name) + 2 for of_site in facts.values() for name in of_site))
    for site, of_site in facts.items():
        heading = "dictionary" if len(facts) == 1 else site
        yield f"{heading:<{width}}{'train FVU':>10}{'L0':>8}{'dead %':>8}"
        for name, numbers in of_site.items():
            yield (
                f"{name:<{width}}{numbers['fvu']:>10.4f}{numbers['l0']:>8.1f}"
                f"{100 * numbers['dead']:>8.1f}"
            )
        yield ""
