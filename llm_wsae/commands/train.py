"""The command that trains dictionaries."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.artifact.provenance import write_record
from llm_wsae.commands.options import (
    Flat,
    GridOptions,
    Result,
    Stores,
    StreamOptions,
    cost,
    sites_of,
)
from llm_wsae.errors import UsageError
from llm_wsae.machine.processes import leads
from llm_wsae.training.config import TrainConfig
from llm_wsae.weights.config import WeightConfig

RECORD = "train.json"


def train(
    *,
    stores: Stores = (),
    site: tuple[str, ...],
    out: Path,
    weights: Path | None = None,
    grid: Flat[GridOptions] = GridOptions(),  # noqa: B008 - frozen
    weigh: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    training: Flat[TrainConfig] = TrainConfig(),  # noqa: B008 - frozen
    stream: Flat[StreamOptions] = StreamOptions(),  # noqa: B008 - frozen
) -> Result:
    """Train dictionaries on a store, or on several as one, all of a site in one pass over the rows.

    Without a store: on a model's activations as they are computed, all sites in one pass.
    Run it again to resume after an interruption.

    Args:
        stores: Activation stores, of one model with the same sites and settings.
        site: Sites, named as in TransformerLens: blocks.8.hook_resid_post.
        out: Folder that receives one dictionary folder per combination; of several sites, one
            folder per site with these.
        weights: Weights file, as one more rule: weigh's of this site, or a custom vector or matrix.
    """
    import torch

    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.data.stores import open_stores
    from llm_wsae.data.streaming import ActivationStreams
    from llm_wsae.training.arm import make_arms
    from llm_wsae.training.checkpoint import check_same_rows, recorded
    from llm_wsae.training.trainer import check_arms, check_out, train_sites
    from llm_wsae.training.trainer import train as train_site
    from llm_wsae.weights.choosing import choose_weights
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.rules import RULES, Rule
    from llm_wsae.weights.weighing import measure_inputs, measure_stream_inputs

    started, sites = time.monotonic(), list(dict.fromkeys(sites_of(site)))
    check_file(out / RECORD, is_record_of("train"))
    check_out(out)
    stream.check_source(stores)
    model_device = training.device
    if model_device == "spread":
        if stores:
            raise UsageError(
                "--device spread spreads a model over devices, but training on a store runs no "
                "model; drop --device spread"
            )
        training = replace(training, device="auto")
    rules = [Rule.parse(name) for name in grid.rule]
    own = LossWeights.load(weights, weigh, sites) if weights else None
    folders = {place: out if len(sites) == 1 else out / str(place) for place in sites}
    rows: ActivationStore | ActivationStreams
    if stores:  # only what weigh has measured of it
        rows = open_stores(stores)
    else:
        if training.tokens is None:
            raise UsageError("a stream has no end: set --tokens, the number of rows to train on")
        assert stream.model is not None and stream.corpus is not None
        text = Corpus.open(stream.corpus, "train", stream.heldout_fraction, stream.text_column)
        trainings = filter(None, map(recorded, folders.values()))
        begun = next((one["rows"].get("model") for one in trainings), None)
        model = replace(stream, device=model_device).load(stream.model, begun)
        rows = ActivationStreams(model, text, sites, stream.config, out)
    kinds = (grid.k, grid.l1, grid.init_seeds, grid.architecture)
    # before minutes of measuring: whether such arms can be trained, on these rows, there
    plain = LossWeights(torch.ones(rows.d_in), RULES["uniform"])
    check_arms(make_arms([plain] if rules or own else [], *kinds), rows.d_in, training)
    for own_site, folder in folders.items():
        check_out(folder)
        check_same_rows(folder, rows.source(own_site).identity())
    measured = {
        place: measure_inputs(rules, rows, place)
        if isinstance(rows, ActivationStore)
        else measure_stream_inputs(rules, rows, place)
        for place in sites
    }
    arms = {
        place: make_arms(choose_weights(inputs, rules, grid.alpha, own, weigh), *kinds)
        for place, inputs in measured.items()
    }
    if len(sites) == 1 or isinstance(rows, ActivationStore):
        dictionaries = {
            place: train_site(rows.source(place), arms[place], training, folder)
            for place, folder in folders.items()
        }
    else:
        dictionaries = train_sites(rows, arms, training, out)
    if leads():
        asked = {"stores": stores, "site": site, "weights": weights, **vars(grid), **vars(training)}
        asked |= {} if stores else {"stream": stream}
        write_record(out / RECORD, "train", {**asked, "weigh": weigh})
    facts = {
        str(place): {name: d.info.metrics["training"] for name, d in of_site.items()}
        for place, of_site in dictionaries.items()
    }
    answer = next(iter(facts.values())) if len(facts) == 1 else facts
    return answer, "\n".join([*_tables(facts), f"dictionaries in {out}", cost(started)])


def _tables(facts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """The lines of one table for each site: what training measured of every dictionary."""
    width = max(32, *(len(name) + 2 for of_site in facts.values() for name in of_site))
    for place, of_site in facts.items():
        heading = "dictionary" if len(facts) == 1 else place
        yield f"{heading:<{width}}{'train FVU':>10}{'L0':>8}{'dead %':>8}"
        for name, numbers in of_site.items():
            yield (
                f"{name:<{width}}{numbers['fvu']:>10.4f}{numbers['l0']:>8.1f}"
                f"{100 * numbers['dead']:>8.1f}"
            )
        yield ""
