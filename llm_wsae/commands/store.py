"""Commands about activations: harvest them into a store, weigh their dimensions."""

import time
from pathlib import Path
from typing import Literal

import tyro

from llm_wsae.commands.common import (
    Config,
    Device,
    ModelDtype,
    Result,
    cost,
    load_model,
    sites_of,
)
from llm_wsae.data.config import HarvestConfig
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.processes import leads
from llm_wsae.provenance import write_record
from llm_wsae.weights.config import RuleInputConfig, WeightConfig


def harvest(
    model: str,
    corpus: str,
    site: tuple[str, ...],
    out: Path,
    config: Config[HarvestConfig] = HarvestConfig(),  # noqa: B008 - frozen
    part: Literal["train", "heldout", "all"] = "train",
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
    model_dtype: ModelDtype = "auto",
) -> Result:
    """Write a model's activations at some sites into an activation store.

    Args:
        model: Hub id, local folder or .gguf file of a causal language model.
        corpus: Hub dataset (name@revision), .txt/.jsonl/.parquet file or folder, text package; a+b.
        site: Residual-stream sites in TransformerLens names, e.g. blocks.8.hook_resid_post.
        out: Folder of the store; one that is not complete is gone on with.
        part: Which documents: those for training, those held out, or all.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
        model_dtype: Number format of the model; auto is bfloat16 where the hardware is fast in it.
    """
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.harvesting import harvest as harvest_into

    started, sites = time.monotonic(), sites_of(site)
    text = Corpus.open(corpus, part, text_column=text_column)
    language_model = load_model(model, revision, device, model_dtype)
    store = harvest_into(language_model, text, sites, out, config)
    asked = {"model": language_model.name, "corpus": corpus, "site": site, "part": part}
    if leads():
        write_record(out / "harvest.json", "harvest", {**asked, **vars(config)})
    massive = {str(s): store.statistics(s).massive_count for s in store.sites}
    facts = {"store": str(out), "rows": store.num_rows, "d_in": store.d_in, "massive": massive}
    lines = [f"{store.num_rows:,} rows of {store.d_in} dimensions at each site in {out}"]
    lines += [f"  {s}: {count} massive activations" for s, count in massive.items()]
    return facts, "\n".join([*lines, cost(started)])


def weigh(
    store: tyro.conf.Positional[Path],
    site: str,
    out: Path,
    rule: str = "variance",
    alpha: float = 0.5,
    config: Config[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    dictionary: Path | None = None,
    model: str | None = None,
    measure: Config[RuleInputConfig] = RuleInputConfig(),  # noqa: B008 - frozen
    revision: str | None = None,
    device: Device = "auto",
    model_dtype: ModelDtype = "auto",
) -> Result:
    """Print the profile of a site's dimensions and write loss weights made by a rule.

    Args:
        store: Activation store.
        site: One of its sites.
        out: Weights file to write (.safetensors); the plot and the record go beside it.
        rule: Weight rule; permuted:RULE and rotated:RULE are controls.
        alpha: Exponent of the weights γ = score^α, or power of the matrix.
        dictionary: A first dictionary of the site, for the rules participation and gap.
        model: The model that made the store, for the rules sensitivity, leading-sensitivity
            and semantic.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
        model_dtype: Number format of the model; auto is the one that the store was made in.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.plots import plot_profile
    from llm_wsae.weighing import measure_inputs
    from llm_wsae.weights.choosing import choose_weights
    from llm_wsae.weights.profile import profile, profile_text
    from llm_wsae.weights.rules import Rule

    if out.suffix != ".safetensors":  # its neighbours .png and .json are written too
        raise UsageError(f"the weights go into a .safetensors file, so --out cannot be {out}")
    place, opened = Site.parse(site), ActivationStore.open(store)
    parsed = Rule.parse(rule)
    parsed.form(config)  # refused before anything is measured
    wanted = model if parsed.need in ("fisher", "coherence") else None
    first = dictionary if parsed.need == "dictionary" else None
    dtype = opened.model_dtype(model_dtype)
    inputs = measure_inputs(
        [parsed],
        opened,
        place,
        model=load_model(wanted, revision, device, dtype) if wanted else None,
        dictionary=Dictionary.load(first) if first else None,
        config=measure,
    )
    weights = choose_weights(inputs, ("uniform", parsed), (alpha,), config=config)
    facts = profile(inputs.statistics, weights)
    weights[-1].save(out, {"site": site})
    plot = out.with_suffix(".png")
    plot_profile(inputs.statistics, weights, site, plot)
    asked = {"store": store, "site": site, "rule": rule, "alpha": alpha, **vars(config)}
    asked |= {"dictionary": dictionary, "model": model, **vars(measure)}
    write_record(out.with_suffix(".json"), "weigh", asked)
    return facts, f"{profile_text(facts)}\n\nweights  {out}\nplot     {plot}"
