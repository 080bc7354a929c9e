"""The command that measures a site's dimensions and chooses their weights."""

# ruff: noqa: RUF009 - the defaults are frozen

from dataclasses import dataclass
from pathlib import Path

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.commands.options import Result
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.outside import check_numbers
from llm_wsae.pipeline.request import Flat, LoadConfig, Stores, changed, write_request
from llm_wsae.weights.config import RuleInputConfig, WeightConfig


@dataclass(frozen=True, kw_only=True)
class Weigh:
    """What ``weigh`` is asked for."""

    stores: Stores
    """Activation stores, of one model with the same sites and settings."""
    site: str
    """One of their sites."""
    out: Path
    """Weights file to write (.safetensors); the figure and the record go next to it."""
    rule: str = "variance"
    """Weight rule; permuted: or rotated: before it names its control."""
    alpha: float = 0.5
    """Exponent of the weights γ = score^α, or power of the matrix."""
    dictionary: Path | None = None
    """First dictionary of the site, for the rule participation."""
    model: str | None = None
    """Model of the store, for the rule sensitivity."""
    weights: Flat[WeightConfig] = WeightConfig()
    measure: Flat[RuleInputConfig] = RuleInputConfig()
    loading: Flat[LoadConfig] = LoadConfig()

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":  # its neighbours .png and .json are written too
            raise UsageError(
                f"the weights go into a .safetensors file, so --out cannot be {self.out}"
            )
        check_numbers(self)


def weigh(request: Weigh) -> Result:
    """Print the profile of a site's dimensions and write loss weights made by a rule."""
    from llm_wsae.data.stores import open_stores
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.pipeline.plots import plot_profile
    from llm_wsae.weights.choosing import choose_weights
    from llm_wsae.weights.loss_weights import is_weights_file
    from llm_wsae.weights.profile import profile, profile_text
    from llm_wsae.weights.rules import Rule
    from llm_wsae.weights.weighing import measure_inputs

    out, model, dictionary = request.out, request.model, request.dictionary
    figure, record = out.with_suffix(".png"), out.with_suffix(".json")
    check_file(out, is_weights_file)
    check_file(figure, lambda _: out.is_file())
    check_file(record, is_record_of("weigh"))
    place, store, rule = Site.parse(request.site), open_stores(request.stores), request.rule
    parsed = Rule.parse(rule)
    parsed.form(request.weights)  # refused before anything is measured
    idle = [] if parsed.need == "dictionary" or dictionary is None else ["--dictionary"]
    if parsed.need != "fisher":
        idle += [] if model is None else ["--model"]
        idle += [*changed(request.loading), *changed(request.measure)]
    if idle:
        raise UsageError(f"omit {' and '.join(idle)}, which the rule {rule!r} does not use")
    inputs = measure_inputs(
        [parsed],
        store,
        place,
        model=request.loading.load_model(model, store.manifest.model) if model else None,
        dictionary=Dictionary.load(dictionary) if dictionary else None,
        config=request.measure,
    )
    chosen = choose_weights(inputs, ("uniform", parsed), (request.alpha,), config=request.weights)
    facts = profile(inputs.statistics, chosen)
    chosen[-1].save(out, {"site": request.site})
    plot_profile(inputs.statistics, chosen, request.site, figure)
    write_request(record, "weigh", request)
    return facts, f"{profile_text(facts)}\n\nweights  {out}\nfigure   {figure}"
