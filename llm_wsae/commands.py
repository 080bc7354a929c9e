"""The commands: one function each, whose signature is its options and whose docstring is its help.

Each returns the JSON object and the text for people. Everything heavy is imported inside, so that
help comes at once.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from llm_wsae.data.config import HarvestConfig
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluate.config import EvaluateConfig
from llm_wsae.files import write_json
from llm_wsae.model.site import Site
from llm_wsae.record import plain, versions, write_record
from llm_wsae.train.config import TrainConfig

Device = Literal["auto", "cuda", "mps", "cpu"]
Result = tuple[dict[str, Any], str]  # the JSON object, the text for people


def run(
    model: str,
    corpus: str,
    site: tuple[str, ...],
    out: Path,
    tokens: int = 1_000_000,
    context_size: int = 128,
    rule: tuple[str, ...] = ("uniform", "variance"),
    alpha: tuple[float, ...] = (0.5, -0.25),
    k: tuple[int, ...] = (32,),
    expansion: int = 8,
    seeds: tuple[int, ...] = (0,),
    train_tokens: int | None = None,
    eval_tokens: int = 50_000,
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
) -> Result:
    """Harvest, weigh, train a plain and weighted dictionaries, evaluate: everything in one folder.

    Run it again to go on after an interruption; a harvest or training is never done twice.

    Args:
        model: Hub id, local folder or .gguf file of a causal language model.
        corpus: Hub dataset, .txt/.jsonl/.parquet file or folder, or text package; a+b mixes.
        site: Residual-stream sites in TransformerLens names, e.g. blocks.8.hook_resid_post.
        out: Folder that receives everything.
        tokens: Tokens to harvest.
        context_size: Tokens per context.
        rule: Weight rules; the plain dictionary is "uniform".
        alpha: Exponents of the weights γ = score^α, for every rule but uniform.
        k: Active latents per token.
        expansion: Latents per dimension.
        seeds: Seeds of the initial weights, one dictionary each.
        train_tokens: Rows to train on in all; the default is one pass over the harvest.
        eval_tokens: Held-out rows to measure on.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where to compute.
    """
    from llm_wsae.run import run as run_all

    harvest_config = HarvestConfig(tokens=tokens, context_size=context_size)
    train_config = TrainConfig(expansion=expansion, tokens=train_tokens, device=device)
    evaluate_config = EvaluateConfig(tokens=eval_tokens)
    started, sites = time.monotonic(), _sites(site)
    language_model = _load_model(model, revision, device)
    results = run_all(
        language_model,
        corpus,
        sites,
        out,
        rules=rule,
        alphas=alpha,
        ks=k,
        seeds=seeds,
        text_column=text_column,
        harvest_config=harvest_config,
        train_config=train_config,
        evaluate_config=evaluate_config,
    )
    settings = {"harvest": harvest_config, "train": train_config, "evaluate": evaluate_config}
    asked = {"model": language_model.name, "corpus": corpus, "site": site, "rule": rule}
    write_record(
        out / "run.json", "run", {**asked, "alpha": alpha, "k": k, "seeds": seeds, **settings}
    )
    first = next(iter(results.values()))
    dictionary, report = first.folder / next(iter(first.dictionaries)), out / "report-100k.json"
    again = ["llm-wsae", "evaluate", dictionary, "--model", model, "--corpus", corpus]
    again += ["--tokens", 100_000, "--out", report]
    lines = [f"\n{result.text()}\n" for result in results.values()]
    lines += [_cost(started), "next: the same measurement on other text, e.g."]
    lines += [f"  {shlex.join(map(str, again))}"]
    return {str(place): result.to_dict() for place, result in results.items()}, "\n".join(lines)


def harvest(
    model: str,
    corpus: str,
    site: tuple[str, ...],
    out: Path,
    config: tyro.conf.OmitArgPrefixes[HarvestConfig] = HarvestConfig(),  # noqa: B008 - frozen
    part: Literal["train", "heldout", "all"] = "train",
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
) -> Result:
    """Write a model's activations at some sites into an activation store.

    Args:
        model: Hub id, local folder or .gguf file of a causal language model.
        corpus: Hub dataset, .txt/.jsonl/.parquet file or folder, or text package; a+b mixes.
        site: Residual-stream sites in TransformerLens names, e.g. blocks.8.hook_resid_post.
        out: Folder of the store; one that is not complete is gone on with.
        part: Which documents: those for training, those held out, or all.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
    """
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.harvest import harvest as harvest_into

    started, sites = time.monotonic(), _sites(site)
    text = Corpus.open(corpus, part, text_column=text_column)
    language_model = _load_model(model, revision, device)
    store = harvest_into(language_model, text, sites, out, config)
    write_record(
        out / "harvest.json",
        "harvest",
        {
            "model": language_model.name,
            "corpus": corpus,
            "site": site,
            "part": part,
            **vars(config),
        },
    )
    massive = {str(s): store.statistics(s).massive_count for s in store.sites}
    facts = {"store": str(out), "rows": store.num_rows, "d_in": store.d_in, "massive": massive}
    lines = [f"{store.num_rows:,} rows of {store.d_in} dimensions at each site in {out}"]
    lines += [f"  {s}: {count} massive activations" for s, count in massive.items()]
    return facts, "\n".join([*lines, _cost(started)])


def weigh(
    store: tyro.conf.Positional[Path],
    site: str,
    out: Path,
    rule: str = "variance",
    alpha: float = 0.5,
) -> Result:
    """Print the profile of a site's dimensions and write loss weights made by a rule.

    Args:
        store: Activation store.
        site: One of its sites.
        out: Weights file to write (.safetensors); the plot and the record go beside it.
        rule: Weight rule.
        alpha: Exponent of the weights γ = score^α.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.plots import plot_profile
    from llm_wsae.statistics.profile import profile, profile_text
    from llm_wsae.train.arms import choose_weights

    if out.suffix != ".safetensors":  # its neighbours .png and .json are written too
        raise UsageError(f"the weights go into a .safetensors file, so --out cannot be {out}")
    place = Site.parse(site)
    statistics = ActivationStore.open(store).statistics(place)
    weights = choose_weights(statistics, ("uniform", rule), (alpha,))
    facts = profile(statistics, weights)
    weights[-1].save(out, {"site": site})
    plot = out.with_suffix(".png")
    plot_profile(statistics, weights, site, plot)
    write_record(
        out.with_suffix(".json"),
        "weigh",
        {"store": store, "site": site, "rule": rule, "alpha": alpha},
    )
    return facts, f"{profile_text(facts)}\n\nweights  {out}\nplot     {plot}"


def train(
    store: tyro.conf.Positional[Path],
    site: str,
    out: Path,
    rule: tuple[str, ...] = ("uniform", "variance"),
    alpha: tuple[float, ...] = (0.5,),
    weights: Path | None = None,
    k: tuple[int, ...] = (32,),
    l1: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (0,),
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008 - frozen
) -> Result:
    """Train dictionaries on a store: every rule × α × sparsity × seed, in one pass over the rows.

    Args:
        store: Activation store.
        site: One of its sites.
        out: Folder that receives one dictionary folder per arm; a stopped training goes on.
        rule: Weight rules; the plain dictionary is "uniform".
        alpha: Exponents of the weights γ = score^α, for every rule but uniform.
        weights: A weights file, as one more choice of weights.
        k: Active latents per token, a TopK dictionary each.
        l1: L1 coefficients, a ReLU dictionary each.
        seeds: Seeds of the initial weights, a dictionary each.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.statistics.weights import LossWeights
    from llm_wsae.train.arms import choose_weights, make_arms
    from llm_wsae.train.trainer import train as train_arms

    started = time.monotonic()
    source = ActivationStore.open(store).source(Site.parse(site))
    own = LossWeights.load(weights) if weights else None
    chosen = choose_weights(source.statistics(), rule, alpha, own)
    arms = make_arms(chosen, k, l1, seeds)
    dictionaries = train_arms(source, arms, config, out)
    asked = {"store": store, "site": site, "rule": rule, "alpha": alpha, "weights": weights}
    write_record(
        out / "train.json", "train", {**asked, "k": k, "l1": l1, "seeds": seeds, **vars(config)}
    )
    facts = {name: d.info.metrics["training"] for name, d in dictionaries.items()}
    lines = [f"{'dictionary':<32}{'train FVU':>10}{'L0':>8}{'dead %':>8}"]
    for name, numbers in facts.items():
        lines.append(
            f"{name:<32}{numbers['fvu']:>10.4f}{numbers['l0']:>8.1f}{100 * numbers['dead']:>8.1f}"
        )
    return facts, "\n".join([*lines, "", f"in {out}/<dictionary>", _cost(started)])


def evaluate(
    dictionaries: tyro.conf.Positional[tuple[Path, ...]],
    model: str,
    corpus: str,
    out: Path,
    config: tyro.conf.OmitArgPrefixes[EvaluateConfig] = EvaluateConfig(),  # noqa: B008 - frozen
    part: Literal["heldout", "train", "all"] = "heldout",
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
) -> Result:
    """Measure what dictionaries keep of the model, on held-out text.

    Args:
        dictionaries: Dictionary folders.
        model: The model they explain: Hub id, local folder or .gguf file.
        corpus: Hub dataset, .txt/.jsonl/.parquet file or folder, or text package; a+b mixes.
        out: JSON report to write.
        part: Which documents: those held out, those for training, or all.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
    """
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.tokens import Packer
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.evaluate.contexts import packing_of
    from llm_wsae.evaluate.fidelity import evaluate as measure

    if not dictionaries:
        raise UsageError("name at least one dictionary folder")
    if out.is_dir():
        raise UsageError(f"--out is the JSON report to write, but {out} is a folder")
    loaded = {_label(path, dictionaries): Dictionary.load(path) for path in dictionaries}
    packing, text = packing_of(loaded), Corpus.open(corpus, part, text_column=text_column)
    language_model = _load_model(model, revision, device)
    contexts = Packer.for_model(language_model, packing).contexts(text)
    report = measure(loaded, language_model, contexts, config)
    asked = {"dictionaries": dictionaries, "corpus": corpus, "part": part}
    write_json(
        out, {"command": "evaluate", **plain(asked), "versions": versions(), **report.to_dict()}
    )
    return report.to_dict(), f"{report.table()}\n\nreport  {out}"


def verify(folder: tyro.conf.Positional[Path]) -> Result:
    """Check every byte of an activation store or a dictionary, and name what is damaged.

    Args:
        folder: Store or dictionary folder.
    """
    from llm_wsae.data.manifest import MANIFEST
    from llm_wsae.data.verify import verify_store
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.files import CFG, INFO, changed_files

    if not folder.is_dir():
        raise LlmWsaeError(f"there is no folder {folder}")
    if (folder / MANIFEST).exists():
        kind, problems = "store", verify_store(folder)
        if problems:
            raise LlmWsaeError("; ".join(problems))
    elif (folder / CFG).exists() or (folder / INFO).exists():
        kind = "dictionary"
        Dictionary.load(folder)
        if changed := changed_files(folder):
            raise LlmWsaeError(f"in {folder}, {' and '.join(changed)} changed since it was saved")
    else:
        raise LlmWsaeError(
            f"{folder} is neither an activation store (with a {MANIFEST}) nor a dictionary (with "
            f"a {CFG})"
        )
    return {"folder": str(folder), "kind": kind, "ok": True}, f"{folder}: {kind} is whole"


def _load_model(model: str, revision: str | None, device: str) -> Any:
    from llm_wsae.model.language_model import LanguageModel

    print(f"loading {model}", file=sys.stderr)
    return LanguageModel.load(model, revision=revision, device=device)


def _sites(names: tuple[str, ...]) -> list[Site]:
    if not names:
        raise UsageError("name at least one site, e.g. --site blocks.8.hook_resid_post")
    return [Site.parse(name) for name in names]


def _label(path: Path, paths: tuple[Path, ...]) -> str:
    """The folder's name, or as much of the path as tells it from the others."""
    same = [p for p in paths if p.name == path.name]
    return path.name if len(same) == 1 else str(path)


def _cost(started: float) -> str:
    from llm_wsae.hardware import peak_memory_bytes

    seconds = time.monotonic() - started
    peak = peak_memory_bytes() / 2**30
    return f"took {seconds // 60:.0f} min {seconds % 60:02.0f} s, peak memory {peak:.1f} GiB"


COMMANDS: dict[str, Callable[..., Result]] = {
    "run": run,
    "harvest": harvest,
    "weigh": weigh,
    "train": train,
    "evaluate": evaluate,
    "verify": verify,
}
