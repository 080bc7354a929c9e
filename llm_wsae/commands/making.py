"""The commands that make stores, weights, dictionaries, runs and studies."""

# ruff: noqa: RUF009 - the defaults are frozen

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from llm_wsae.artifact.artifact import check_file, check_folder, is_record_of
from llm_wsae.commands import Result
from llm_wsae.data.config import HarvestConfig, PackConfig, StreamConfig
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.lab.config import Study, TheoryConfig
from llm_wsae.machine.processes import leads
from llm_wsae.model.site import Site, sites_of
from llm_wsae.outside import check_numbers
from llm_wsae.pipeline.request import (
    RUN_RECORD,
    Flat,
    Grid,
    ModelConfig,
    OptionalModelConfig,
    Part,
    Run,
    Stores,
    TextConfig,
    changed,
    check_some,
    words_of,
    write_request,
)
from llm_wsae.terminal import aligned
from llm_wsae.training.config import TrainConfig, check_skip
from llm_wsae.weights.config import RuleInputConfig, WeightConfig
from llm_wsae.weights.rules import Rule

if TYPE_CHECKING:
    from llm_wsae.data.rows import SiteRows
    from llm_wsae.pipeline.run import SiteResult

_STARTED = time.monotonic()


def _cost() -> str:
    """Time and memory that the process took, in words."""
    from llm_wsae.machine.hardware import peak_memory_bytes

    minutes, seconds = divmod(round(time.monotonic() - _STARTED), 60)
    peak = peak_memory_bytes() / 2**30
    return f"took {minutes} min {seconds:02} s, peak memory {peak:.1f} GiB"


@dataclass(frozen=True, kw_only=True)
class Harvest:
    site: tuple[str, ...]
    """Sites, named as in TransformerLens: blocks.8.hook_resid_post. A whole MLP, blocks.8.mlp, is
    what it reads and what it writes; 'blocks.*.mlp' names every block's."""
    out: Path
    """Folder of the store."""
    part: Part = "train"
    """Which documents to read: those for training, those held out, or all."""
    model: Flat[ModelConfig]
    corpus: Flat[TextConfig]
    harvesting: Flat[HarvestConfig] = HarvestConfig()

    def __post_init__(self) -> None:
        sites_of(self.site)


def harvest(request: Harvest) -> Result:
    """Write a model's activations at some sites into an activation store.

    Run it again to resume after an interruption.
    """
    from llm_wsae.data.harvesting import harvest as harvest_into
    from llm_wsae.data.store import MANIFEST, Manifest

    out = request.out
    check_folder(out)
    text = request.corpus.open(request.part)
    begun = Manifest.load(out).model if (out / MANIFEST).is_file() else None
    model = request.model.load(begun)
    sites = sites_of(request.site, model.num_blocks)
    store = harvest_into(model, text, sites, out, request.harvesting)
    if leads():
        write_request(out / "harvest.json", "harvest", request, model=model.name)
    massive = {str(s): store.statistics(s).massive_count for s in store.sites}
    size = store.text_size()
    facts = {"store": str(out), "rows": store.num_rows, "d_in": store.d_in, "massive": massive}
    facts |= {"documents": size.documents, "effective_documents": size.effective}
    lines = [f"{store.num_rows:,} rows of {store.d_in} dimensions at each site in {out}"]
    lines += [size.text("text"), *(f"note: {warning}" for warning in size.warnings())]
    lines += [f"  {s}: {count:,} massive activations" for s, count in massive.items()]
    return facts, "\n".join([*lines, _cost()])


@dataclass(frozen=True, kw_only=True)
class Weigh:
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
    """A dictionary of the site, which the rule participation needs."""
    model: Flat[OptionalModelConfig] = OptionalModelConfig()
    """The model of the store, for the rule sensitivity."""
    weights: Flat[WeightConfig] = WeightConfig()
    measure: Flat[RuleInputConfig] = RuleInputConfig()

    def __post_init__(self) -> None:
        check_some(self.stores, "activation store")
        if self.out.suffix != ".safetensors":  # its neighbours .png and .json are written too
            raise UsageError(
                f"the weights go into a .safetensors file, so --out cannot be {self.out}"
            )
        check_numbers(self)
        Site.parse(self.site)
        rule = Rule.parse(self.rule)
        rule.form(self.weights)
        idle = [] if rule.need == "dictionary" or self.dictionary is None else ["--dictionary"]
        idle += [] if rule.need == "fisher" else [*changed(self.model), *changed(self.measure)]
        if idle:
            raise UsageError(
                f"omit {' and '.join(idle)}, which the rule {rule.name!r} does not use"
            )


def weigh(request: Weigh) -> Result:
    """Print the profile of a site's dimensions and write loss weights made by a rule."""
    from llm_wsae.data.store import open_stores
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.finding import find_dictionary
    from llm_wsae.pipeline.plots import plot_profile
    from llm_wsae.weights.loss_weights import choose_weights, is_weights_file
    from llm_wsae.weights.profile import profile, profile_text
    from llm_wsae.weights.weighing import measure_inputs

    out, model, rule = request.out, request.model, Rule.parse(request.rule)
    first = request.dictionary
    figure, record = out.with_suffix(".png"), out.with_suffix(".json")
    check_file(out, is_weights_file)
    check_file(figure, lambda _: out.is_file())
    check_file(record, is_record_of("weigh"))
    site, store = Site.parse(request.site), open_stores(request.stores)
    inputs = measure_inputs(
        [rule],
        store,
        site,
        model=model.load(store.manifest.model) if model.model else None,
        dictionary=None if first is None else Dictionary.load(find_dictionary(first)),
        config=request.measure,
    )
    chosen = choose_weights(inputs, ("uniform", rule), (request.alpha,), config=request.weights)
    facts = profile(inputs.statistics, chosen)
    chosen[-1].save(out, {"site": str(site.writes)})
    plot_profile(inputs.statistics, chosen, request.site, figure)
    write_request(record, "weigh", request)
    return facts, f"{profile_text(facts)}\n\nweights  {out}\nfigure   {figure}"


@dataclass(frozen=True, kw_only=True)
class Stream(StreamConfig, TextConfig, OptionalModelConfig):
    """Instead of a store: a model and a text, whose rows are trained on as they are computed."""

    corpus: str | None = None  # type: ignore[assignment]
    device: tyro.conf.Suppress[str] = "auto"  # type: ignore[assignment]  # that of the training


@dataclass(frozen=True, kw_only=True)
class Train:
    stores: Stores = ()
    """Activation stores, of one model with the same sites and settings."""
    site: tuple[str, ...]
    """Sites, named as in TransformerLens: blocks.8.hook_resid_post. A whole MLP, blocks.8.mlp, is
    that of a transcoder; 'blocks.*.mlp' names every block's."""
    out: Path
    """Folder for the dictionaries, one folder for each; with several sites, a folder for each site
    that holds its own."""
    weights: Path | None = None
    """Weights file that counts as one more rule: made by weigh for this site, or a vector or matrix
    of your own."""
    grid: Flat[Grid] = Grid()
    weigh: Flat[WeightConfig] = WeightConfig()
    training: Flat[TrainConfig] = TrainConfig()
    stream: Flat[Stream] = Stream()

    def __post_init__(self) -> None:
        check_skip(sites_of(self.site), self.training)
        self.grid.check(self.weigh)
        of_finish = changed(self.stream, OptionalModelConfig) if self.training.finish else {}
        idle = [name for name in changed(self.stream) if name not in of_finish]
        idle += ["--device spread"] if self.training.device == "spread" else []
        if self.stores and idle:
            raise UsageError(
                f"{idle[0]} is for training without a store; drop it, or drop {self.stores[0]}"
            )
        if self.stores and self.training.finish and self.stream.model is None:
            raise UsageError("--finish runs the model: name that of the store with --model")
        if not self.stores and (self.stream.model is None or self.stream.corpus is None):
            raise UsageError(
                "give a STORE to train on, or --model and --corpus to train without one"
            )
        if not self.stores and self.training.tokens is None:
            raise UsageError("a stream has no end: set --tokens, the number of rows to train on")

    def folders(self, num_blocks: int) -> dict[Site, Path]:
        """The folder of each site, in a model of that many blocks."""
        sites = sites_of(self.site, num_blocks)
        return {site: self.out if len(sites) == 1 else self.out / str(site) for site in sites}

    def rows(self) -> "SiteRows":
        """The stores as one, or the stream."""
        from llm_wsae.data.store import open_stores
        from llm_wsae.training.checkpoint import recorded

        if self.stores:
            return open_stores(self.stores)
        from llm_wsae.data.streaming import ActivationStreams  # with the language model: seconds

        text = self.stream.open("train")
        there = [self.out, *(folder for name in self.site for folder in self.out.glob(name))]
        trainings = filter(None, map(recorded, there))
        begun = next((one["rows"].get("model") for one in trainings), None)
        model = replace(self.stream, device=self.training.device).load(begun)
        sites = sites_of(self.site, model.num_blocks)
        return ActivationStreams(model, text, sites, self.stream, self.out)


def train(request: Train) -> Result:
    """Train dictionaries on a store, or on several as one, all of a site in one pass over the rows.

    Without a store: on a model's activations as they are computed, all sites in one pass.
    Run it again to resume after an interruption.
    """
    from llm_wsae.training.checkpoint import check_same_rows
    from llm_wsae.training.trainer import check_arms, check_out, train_sites
    from llm_wsae.training.trainer import train as train_site
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.weighing import measure_inputs

    grid, weigh, out = request.grid, request.weigh, request.out
    training, record = request.training, out / "train.json"
    check_file(record, is_record_of("train"))
    check_out(out)
    if training.device == "spread":  # which is for the model alone
        training = replace(training, device="auto")
    rows = request.rows()
    folders = request.folders(rows.num_blocks)
    written = [site.writes for site in folders]
    own = LossWeights.load(request.weights, weigh, written) if request.weights else None
    origins = {site: rows.source(site).identity() for site in folders}
    # before minutes of measuring: whether such arms can be trained, on these rows, there
    check_arms(grid.likely_arms(weigh, rows.d_in, own), rows.d_in, training)
    for site, folder in folders.items():
        check_out(folder)
        check_same_rows(folder, origins[site])
    model = rows.model
    if model is None and training.finish:
        recorded_model = next(iter(origins.values()))["model"]
        model = replace(request.stream, device=request.training.device).load(recorded_model)
    inputs = {site: measure_inputs(grid.rules, rows, site, model=model) for site in folders}
    arms = {site: grid.arms(grid.weights(one, weigh, own=own)) for site, one in inputs.items()}
    if len(arms) > 1:
        trained = train_sites(rows, arms, training, out, model)
    else:  # in the folder itself
        trained = {
            site: train_site(rows.source(site), of_site, training, out, model)
            for site, of_site in arms.items()
        }
    if leads():
        write_request(record, "train", request)
    facts = {
        str(site): {name: d.info.metrics["training"] for name, d in of_site.items()}
        for site, of_site in trained.items()
    }
    tables = [_trained(site, of_site) for site, of_site in facts.items()]
    answer = next(iter(facts.values())) if len(facts) == 1 else facts
    return answer, "\n\n".join([*tables, f"dictionaries in {out}\n{_cost()}"])


def _trained(site: str, dictionaries: Mapping[str, Mapping[str, float]]) -> str:
    """What training measured of every dictionary of a site."""
    rows = [
        [name, f"{found['fvu']:.4f}", f"{found['l0']:.1f}", f"{100 * found['dead']:.1f}"]
        for name, found in dictionaries.items()
    ]
    return aligned([[site, "train FVU", "L0", "dead %"], *rows])


def run(request: Run) -> Result:
    """Harvest, weigh, train plain and weighted dictionaries, evaluate: everything in one folder.

    Run it again to resume after an interruption: no harvest or training is done twice.
    """
    from llm_wsae.pipeline.run import run as run_all

    check_file(request.folder / RUN_RECORD, is_record_of("run"))
    results = run_all(request)
    if not results:  # rank 0 has them
        return {}, ""
    lines = [f"\n{result.text()}\n" for result in results.values()]
    lines += [_cost(), *_next_commands(request, next(iter(results.values())))]
    return {str(place): result.to_dict() for place, result in results.items()}, "\n".join(lines)


def _next_commands(request: Run, first: "SiteResult") -> Iterator[str]:
    """What one may do with the dictionaries of the first site."""
    from llm_wsae.evaluation.baselines import HALF_RANDOM

    site = next(iter(first.dictionaries.values())).site
    yield f"next: look at the dictionaries of {site} in a browser"
    if request.stream:  # a page needs rows, packed as those trained on
        source = words_of(request.model) + words_of(request.corpus)
        store = ["--site", *request.site, "--tokens", 100_000, "--out", request.folder / "store"]
        yield _command("harvest", *source, *store, *words_of(request.harvest, PackConfig))
    every = first.dictionaries.items()
    sizes = {name: one.d_sae for name, one in every}
    kinds = {name: one.info.training.get("architecture") for name, one in every}
    shown = {name: size for name, size in sizes.items() if kinds[name] not in HALF_RANDOM}
    yield page_command(first.folder, shown or sizes, request)


def page_command(folder: Path, sizes: Mapping[str, int], request: Run) -> str:
    """The command that shows a site's dictionaries, as many, with as many examples, as a page has
    room for. ``sizes`` are their numbers of latents, by name."""
    from llm_wsae.pages.dashboard import EXAMPLES, what_fits

    number, examples = what_fits(list(sizes.values()))
    words = [*(folder / name for name in list(sizes)[:number]), "--store", request.folder / "store"]
    words += [*words_of(request.model), "--rows", 100_000]
    if examples < EXAMPLES:
        words += ["--top", examples, "--bands", examples]
    return _command("dashboard", *words, "--out", request.folder / "page.html")


def _command(*words: Any) -> str:
    return f"  {shlex.join(['llm-wsae', *map(str, words)])}"


def plan(request: Run) -> Result:
    """What a run takes, before anything is spent: rows, disk, memory, time by stage.

    It takes the options of run. What does not fit is said in a sentence, with exit code 1.
    """
    from llm_wsae.pipeline.planning import plan as plan_run

    found = plan_run(request)
    if shortage := found.shortage():
        raise LlmWsaeError(shortage)
    return found.to_dict(), f"{found.table()}\n{_cost()}"


def study(request: Study) -> Result:
    """Do weights help? Compare rules and their controls with plain dictionaries of the same k.

    Run it again to resume after an interruption, or with other rules or seeds to extend the
    study: no dictionary is trained twice, and the report is about all that was tried in the folder.
    """
    from llm_wsae.lab.studies.report import PAGE, REPORT
    from llm_wsae.lab.studies.runner import study as compare

    report = compare(request)
    written = f"report  {request.out / PAGE}, to open in a browser; {REPORT} beside it"
    return report.to_dict(), "\n".join([report.table(), "", written, _cost()])


@dataclass(frozen=True, kw_only=True)
class Theory:
    out: Path
    """Folder that receives the report and one training for each sparsity and seed."""
    toy: Flat[TheoryConfig] = TheoryConfig()


def theory(request: Theory) -> Result:
    """Repeat the paper's toy experiment: what dictionaries find where the features are known.

    Run it again to resume after an interruption, or with more seeds or sparsities to add them.
    """
    from llm_wsae.lab.theory import REPORT, run_toy

    report = run_toy(request.toy, request.out)
    lines = [report.table(), "", f"report   {request.out / REPORT}", _cost()]
    return report.to_dict(), "\n".join(lines)
