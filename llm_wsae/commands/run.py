"""The whole job as one command."""

import shlex
import time
from pathlib import Path

from llm_wsae.commands.common import (
    Config,
    Device,
    ModelDtype,
    Result,
    check_counts,
    cost,
    load_model,
    sites_of,
)
from llm_wsae.data.config import HarvestConfig
from llm_wsae.evaluation.fidelity.config import EvaluateConfig
from llm_wsae.provenance import write_record
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.weights.config import WeightConfig


def run(
    model: str,
    corpus: str,
    site: tuple[str, ...],
    out: Path | None = None,
    tokens: int = 1_000_000,
    context_size: int = 128,
    rule: tuple[str, ...] = ("uniform", "variance"),
    alpha: tuple[float, ...] = (0.5, -0.25),
    k: tuple[int, ...] = (32,),
    architecture: tuple[ArchitectureName, ...] = ("topk",),
    expansion: int = 8,
    seeds: tuple[int, ...] = (0,),
    train_tokens: int | None = None,
    eval_tokens: int = 50_000,
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
    model_dtype: ModelDtype = "auto",
    weigh: Config[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
) -> Result:
    """Harvest, weigh, train a plain and weighted dictionaries, evaluate: everything in one folder.

    Run it again to go on after an interruption; a harvest or training is never done twice.

    Args:
        model: Hub id, local folder or .gguf file of a causal language model.
        corpus: Hub dataset (name@revision), .txt/.jsonl/.parquet file or folder, text package; a+b.
        site: Residual-stream sites in TransformerLens names, e.g. blocks.8.hook_resid_post.
        out: Folder that receives everything; runs/NAME by default, of a model owner/NAME.
        tokens: Tokens to harvest.
        context_size: Tokens per context.
        rule: Weight rules; the plain dictionary is "uniform".
        alpha: Exponents of the weights γ = score^α, for every rule but uniform.
        k: Active latents per token.
        architecture: Kinds of dictionary: topk has k latents in every token, the others on average.
        expansion: Latents per dimension.
        seeds: Seeds of the initial weights, one dictionary each.
        train_tokens: Rows to train on in all; the default is one pass over the harvest.
        eval_tokens: Held-out rows to measure on.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where to compute.
        model_dtype: Number format of the model; auto is bfloat16 where the hardware is fast in it.
    """
    from llm_wsae.pipeline import run as run_all

    check_counts(eval_tokens=eval_tokens)
    harvest_config = HarvestConfig(tokens=tokens, context_size=context_size)
    train_config = TrainConfig(expansion=expansion, tokens=train_tokens, device=device)
    evaluate_config = EvaluateConfig(tokens=eval_tokens)
    started, sites, out = time.monotonic(), sites_of(site), out or _folder_of(model)
    language_model = load_model(model, revision, device, model_dtype)
    results = run_all(
        language_model,
        corpus,
        sites,
        out,
        rules=rule,
        alphas=alpha,
        ks=k,
        architectures=architecture,
        init_seeds=seeds,
        text_column=text_column,
        harvest_config=harvest_config,
        weight_config=weigh,
        train_config=train_config,
        evaluate_config=evaluate_config,
    )
    settings = {"harvest": harvest_config, "weigh": weigh}
    settings |= {"train": train_config, "evaluate": evaluate_config}
    asked = {"model": language_model.name, "corpus": corpus, "site": site, "rule": rule}
    asked |= {"alpha": alpha, "k": k, "architecture": architecture, "seeds": seeds}
    write_record(out / "run.json", "run", {**asked, **settings})
    first = next(iter(results.values()))
    dictionary, report = first.folder / next(iter(first.dictionaries)), out / "report-100k.json"
    again = ["llm-wsae", "evaluate", dictionary, "--model", model, "--corpus", corpus]
    again += ["--tokens", 100_000, "--out", report]
    given = {"--text-column": text_column, "--revision": revision}
    given |= {"--device": device if device != "auto" else None}
    given |= {"--model-dtype": model_dtype if model_dtype != "auto" else None}
    again += [word for option, value in given.items() if value for word in (option, value)]
    lines = [f"\n{result.text()}\n" for result in results.values()]
    lines += [cost(started), "next: the same measurement on more of the held-out text, e.g."]
    lines += [f"  {shlex.join(map(str, again))}"]
    return {str(place): result.to_dict() for place, result in results.items()}, "\n".join(lines)


def _folder_of(model: str) -> Path:
    return Path("runs") / Path(model).resolve().name.removesuffix(".gguf")
