"""The whole job as one command."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.artifact.provenance import write_record
from llm_wsae.commands.options import (
    AutoGridOptions,
    CorpusOptions,
    EvaluateOptions,
    Flag,
    Flat,
    HarvestOptions,
    ModelOptions,
    Prefixed,
    Result,
    TrainOptions,
    cost,
    sites_of,
    stream_config,
)
from llm_wsae.data.config import HELDOUT, PackConfig, StreamConfig
from llm_wsae.machine.processes import leads
from llm_wsae.weights.config import WeightConfig

RECORD = "run.json"


def run(
    model: Flat[ModelOptions],
    corpus: Flat[CorpusOptions],
    site: tuple[str, ...],
    out: Path | None = None,
    stream: Flag = False,
    buffer_tokens: int = StreamConfig.buffer_tokens,
    statistics_tokens: int = StreamConfig.statistics_tokens,
    grid: Flat[AutoGridOptions] = AutoGridOptions(),  # noqa: B008 - frozen
    weigh: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    harvest: Prefixed[HarvestOptions] = HarvestOptions(),  # noqa: B008 - frozen
    train: Prefixed[TrainOptions] = TrainOptions(),  # noqa: B008 - frozen
    evaluate: Prefixed[EvaluateOptions] = EvaluateOptions(),  # noqa: B008 - frozen
) -> Result:
    """Harvest, weigh, train a plain and weighted dictionaries, evaluate: everything in one folder.

    Run it again to resume after an interruption: no harvest or training is done twice.

    Args:
        site: Residual-stream sites, named as in TransformerLens: blocks.8.hook_resid_post.
        out: Folder that receives everything; by default runs/NAME for a model owner/NAME.
        stream: Keep no rows on the disk; train on them as the model computes them.
        buffer_tokens: With --stream: tokens whose rows are shuffled together.
        statistics_tokens: With --stream: first tokens of the text, which weights are measured on.
    """
    from llm_wsae.evaluation.baselines import HALF_RANDOM
    from llm_wsae.pipeline.checks import model_begun
    from llm_wsae.pipeline.run import run as run_all

    started, sites = time.monotonic(), sites_of(site)
    out = out or Path("runs") / Path(model.model).resolve().name.removesuffix(".gguf")
    check_file(out / RECORD, is_record_of("run"))
    streaming = stream_config(stream, buffer_tokens, statistics_tokens, harvest)
    training = train.with_model_on(model.device)
    loaded = model.load(model.model, model_begun(out, sites))
    results = run_all(
        loaded,
        corpus.corpus,
        sites,
        out,
        rules=grid.rule,
        alphas=grid.alpha,
        ks=grid.k,
        l1s=grid.l1,
        architectures=grid.architecture,
        init_seeds=grid.init_seeds,
        text_column=corpus.text_column,
        heldout_fraction=corpus.heldout_fraction,
        harvest_config=harvest,
        stream_config=streaming,
        weight_config=weigh,
        train_config=training,
        evaluate_config=evaluate,
    )
    if not leads():  # rank 0 has the results
        return {}, ""
    asked = {"model": loaded.name, **vars(corpus), "site": site, **vars(grid)}
    settings = {"harvest": harvest, "weigh": weigh, "train": training, "evaluate": evaluate}
    settings |= {} if streaming is None else {"stream": streaming}
    write_record(out / RECORD, "run", {**asked, **settings})
    first = next(iter(results.values()))
    again = _evaluate_again(first.folder / next(iter(first.dictionaries)), model, corpus, out)
    lines = [f"\n{result.text()}\n" for result in results.values()]
    lines += [cost(started), f"next: measure on more of the held-out text, e.g.\n  {again}"]
    lines += [f"look at the dictionaries of {next(iter(results))} in a browser:"]
    if streaming is not None:  # a page needs rows
        lines += [f"  {_harvest(site, model, corpus, streaming, out)}"]
    latents = {
        name: one.d_sae
        for name, one in first.dictionaries.items()
        if one.info.training.get("architecture") not in HALF_RANDOM
    }
    latents = latents or {name: one.d_sae for name, one in first.dictionaries.items()}
    lines += [f"  {_page(first.folder, latents, model, out)}"]
    return {str(place): result.to_dict() for place, result in results.items()}, "\n".join(lines)


def _harvest(
    site: Sequence[str],
    model: ModelOptions,
    corpus: CorpusOptions,
    packing: PackConfig,
    out: Path,
) -> str:
    """The command that harvests rows to look at, packed as those trained on, as one would type
    it."""
    words = ["llm-wsae", "harvest", "--model", model.model, "--corpus", corpus.corpus]
    words += ["--site", *site, "--tokens", "100000", "--out", str(out / "store")]
    words += _reading(corpus)
    for field in fields(PackConfig):
        if (value := getattr(packing, field.name)) != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words + _loading(model))


def _evaluate_again(dictionary: Path, model: ModelOptions, corpus: CorpusOptions, out: Path) -> str:
    """The command that measures the dictionary on more text, as one would type it."""
    words = ["llm-wsae", "evaluate", str(dictionary)]
    words += ["--model", model.model, "--corpus", corpus.corpus]
    words += ["--tokens", "100000", "--out", str(out / "report-100k.json")]
    words += _reading(corpus)
    return shlex.join(words + _loading(model))


def _page(folder: Path, latents: Mapping[str, int], model: ModelOptions, out: Path) -> str:
    """The command that shows a site's dictionaries, as one would type it: as many, with as many
    examples, as a page has room for. ``latents`` are their numbers of latents, by name."""
    from llm_wsae.pages.dashboard import EXAMPLES, what_fits

    number, examples = what_fits(list(latents.values()))
    names = list(latents)[:number]
    words = ["llm-wsae", "dashboard", *(str(folder / name) for name in names)]
    words += ["--store", str(out / "store"), "--model", model.model, "--rows", "100000"]
    if examples < EXAMPLES:
        words += ["--top", str(examples), "--bands", str(examples)]
    return shlex.join([*words, "--out", str(out / "page.html"), *_loading(model)])


def _reading(corpus: CorpusOptions) -> list[str]:
    """The options of how the text is read, as far as they were given."""
    given = {"--text-column": corpus.text_column}
    fraction = corpus.heldout_fraction
    given |= {"--heldout-fraction": None if fraction == HELDOUT else f"{fraction:g}"}
    return [word for option, value in given.items() if value for word in (option, value)]


def _loading(model: ModelOptions) -> list[str]:
    """The options of how a model is loaded, as far as they were given."""
    given = {"--revision": model.revision}
    given |= {"--device": model.device if model.device != "auto" else None}
    given |= {"--model-dtype": model.model_dtype if model.model_dtype != "auto" else None}
    return [word for option, value in given.items() if value for word in (option, value)]
