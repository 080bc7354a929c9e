"""The command that measures a site's dimensions and chooses their weights."""

from pathlib import Path

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.artifact.provenance import write_record
from llm_wsae.commands.options import Flat, LoadOptions, Result, Stores, changed_options
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.outside import check_number
from llm_wsae.weights.config import RuleInputConfig, WeightConfig


def weigh(
    stores: Stores,
    site: str,
    out: Path,
    rule: str = "variance",
    alpha: float = 0.5,
    dictionary: Path | None = None,
    model: str | None = None,
    weights: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    measure: Flat[RuleInputConfig] = RuleInputConfig(),  # noqa: B008 - frozen
    loading: Flat[LoadOptions] = LoadOptions(),  # noqa: B008 - frozen
) -> Result:
    """Print the profile of a site's dimensions and write loss weights made by a rule.

    Args:
        stores: Activation stores, of one model with the same sites and settings.
        site: One of their sites.
        out: Weights file to write (.safetensors); the figure and the record go next to it.
        rule: Weight rule; permuted: or rotated: before it names its control.
        alpha: Exponent of the weights γ = score^α, or power of the matrix.
        dictionary: First dictionary of the site, for the rule participation.
        model: Model of the store, for the rule sensitivity.
    """
    from llm_wsae.data.stores import open_stores
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.pipeline.plots import plot_profile
    from llm_wsae.weights.choosing import choose_weights
    from llm_wsae.weights.loss_weights import is_weights_file
    from llm_wsae.weights.profile import profile, profile_text
    from llm_wsae.weights.rules import Rule
    from llm_wsae.weights.weighing import measure_inputs

    if out.suffix != ".safetensors":  # its neighbours .png and .json are written too
        raise UsageError(f"the weights go into a .safetensors file, so --out cannot be {out}")
    figure, record = out.with_suffix(".png"), out.with_suffix(".json")
    check_file(out, is_weights_file)
    check_file(figure, lambda _: out.is_file())
    check_file(record, is_record_of("weigh"))
    check_number("alpha", alpha)
    place, opened = Site.parse(site), open_stores(stores)
    parsed = Rule.parse(rule)
    parsed.form(weights)  # refused before anything is measured
    with_model = parsed.need == "fisher"
    idle = [] if parsed.need == "dictionary" or dictionary is None else ["--dictionary"]
    if not with_model:
        idle += [] if model is None else ["--model"]
        idle += [*changed_options(loading), *changed_options(measure)]
    if idle:
        raise UsageError(f"omit {' and '.join(idle)}, which the rule {rule!r} does not use")
    inputs = measure_inputs(
        [parsed],
        opened,
        place,
        model=loading.load(model, opened.manifest.model) if model else None,
        dictionary=Dictionary.load(dictionary) if dictionary else None,
        config=measure,
    )
    chosen = choose_weights(inputs, ("uniform", parsed), (alpha,), config=weights)
    facts = profile(inputs.statistics, chosen)
    chosen[-1].save(out, {"site": site})
    plot_profile(inputs.statistics, chosen, site, figure)
    asked = {"stores": stores, "site": site, "rule": rule, "alpha": alpha, **vars(weights)}
    asked |= {"dictionary": dictionary, "model": model, **vars(measure)}
    write_record(record, "weigh", asked)
    return facts, f"{profile_text(facts)}\n\nweights  {out}\nfigure   {figure}"
