"""The commands that measure, show, explain and export finished dictionaries."""

# ruff: noqa: RUF009 - the defaults are frozen

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from llm_wsae.artifact.artifact import check_file, is_record_of
from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import number_formats, plain, versions
from llm_wsae.commands import Result
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.explaining.protocol import ExplainConfig
from llm_wsae.inspecting import check_asked
from llm_wsae.pipeline.request import (
    Flag,
    Flat,
    ModelConfig,
    OptionalModelConfig,
    OptionalTextConfig,
    Part,
    Spelt,
    TextConfig,
    changed,
    check_none_given,
    check_some,
    named,
    note,
)

Dict = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DICT")]
Dicts = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DICT…")]
_NAMED = 3  # files without a digest that people are told of; --json names all


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    dictionaries: Dicts
    """Dictionaries: folders of them, repositories on the Hub, pretrained names."""
    out: Path
    """JSON report to write."""
    part: Part = "heldout"
    """Which documents to read: those for training, those held out, or all."""
    monosemantic: Flag = False
    """Also measure how monosemantic the latents are, with a sentence encoder."""
    baselines: bool = True
    """Two untrained baselines, the dimensions themselves and a random dictionary, are measured,
    too; trained dictionaries should do better."""
    keep: Flag = False
    """Also store the results in the dictionaries' own folders, for their cards, with those of the
    baselines measured beside them (dictionaries that are half random count as such)."""
    model: Flat[ModelConfig]
    corpus: Flat[TextConfig]
    fidelity: Flat[EvaluateConfig] = EvaluateConfig()
    score: Annotated[
        MonosemanticConfig,
        named(  # with the resamplings and the seed of fidelity
            "score", MonosemanticConfig, bootstraps=tyro.conf.Suppress, seed=tyro.conf.Suppress
        ),
        Spelt,
    ] = MonosemanticConfig()

    def __post_init__(self) -> None:
        check_some(self.dictionaries, "dictionary folder")
        if self.keep and self.part != "heldout":
            raise UsageError("--keep stores what was measured on held-out text; omit --part")
        if not self.monosemantic:
            check_none_given("score", self.score, "--monosemantic")


def evaluate(request: Evaluate) -> Result:
    """Measure how faithful dictionaries are on held-out text and, if asked, how monosemantic."""
    from llm_wsae.data.corpus import TEXT_OF_PART
    from llm_wsae.data.packing import Packer
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.finding import find_dictionaries
    from llm_wsae.dictionary.folder import check_keeps_measurements, keep_measurements, names_of
    from llm_wsae.evaluation.baselines import baselines_of, half_random_beside
    from llm_wsae.evaluation.checks import common_packing, notes_on_text
    from llm_wsae.evaluation.fidelity.evaluator import evaluate as measure
    from llm_wsae.evaluation.heldout import take_contexts
    from llm_wsae.evaluation.monosemanticity.evaluator import (
        MonosemanticityEvaluator,
        card_numbers,
    )

    out, part, keep, fidelity = request.out, request.part, request.keep, request.fidelity
    check_file(out, is_record_of("evaluate"))
    folders = names_of(find_dictionaries(request.dictionaries))
    for folder in folders.values() if keep else ():
        check_keeps_measurements(folder)
    loaded = {name: Dictionary.load(path) for name, path in folders.items()}
    common_packing(loaded)  # raises before a model is loaded
    text = request.corpus.open(part)
    seen = notes_on_text(loaded, text.identity())
    if keep and seen:
        raise UsageError(f"{seen[0]}, so no result counts as held out; omit --keep")
    language_model = request.model.load()
    packing = common_packing(loaded, language_model.max_context)
    contexts = Packer.for_model(language_model, packing).contexts(text)
    scorer = None
    if request.monosemantic:  # before the long work: it reads its text and finds its encoder
        score = replace(request.score, bootstraps=fidelity.bootstraps, seed=fidelity.seed)
        scorer = MonosemanticityEvaluator(language_model, text, packing, score)
    taken = take_contexts(contexts, fidelity.tokens)
    measured = loaded | (baselines_of(loaded, language_model, taken) if request.baselines else {})
    report = measure(measured, language_model, taken, fidelity)
    report = replace(report, text=TEXT_OF_PART[part], notes=[*report.notes, *seen])
    facts, tables = report.to_dict(), [report.table()]
    found = {
        name: {"fidelity": {"corpus": text.name, **own}} for name, own in report.summaries().items()
    }
    if scorer is not None:
        scores = replace(scorer.score(measured), text=TEXT_OF_PART[part])
        facts["monosemanticity"] = scores.to_dict()
        tables.append(scores.table())
        for name in measured:
            found[name]["monosemanticity"] = card_numbers(scores, name)
    asked = {"dictionaries": list(folders.values()), "corpus": request.corpus.corpus, "part": part}
    made = {"number_formats": number_formats, "versions": versions()}
    write_json(out, {"command": "evaluate", **plain(asked), **made, **facts})
    for name, folder in folders.items() if keep else ():
        own = loaded[name]
        untrained = {k: d for k, d in measured.items() if k not in loaded and d.site == own.site}
        beside = {d.info.name: k for k, d in untrained.items()} | half_random_beside(own, loaded)
        numbers = {label: found[other] for label, other in beside.items()}
        keep_measurements(folder, {**found[name], "baselines": numbers}, own.weights_sha256)
    return facts, "\n\n".join([*tables, f"report  {out}"])


@dataclass(frozen=True, kw_only=True)
class Inspect:
    dictionary: Dict
    """Dictionary: a folder, user/repo/name on the Hub, or a pretrained name."""
    latent: tuple[int, ...] = ()
    """Latents to look at."""
    store: Path | None = None
    """Activation store of the same model; adds density and top contexts."""
    text: str | None = None
    """A sentence; shows which latents fire on it."""
    top: int = 10
    """Number of contexts, tokens, neighbours and dimensions to show."""
    model: Flat[OptionalModelConfig] = OptionalModelConfig()
    """The model that the dictionary explains; may be omitted if the Hub's cache has it."""

    def __post_init__(self) -> None:
        check_asked(self.latent, self.text, self.store)


def inspect(request: Inspect) -> Result:
    """Look at latents (where they fire, which tokens they promote, what they write), or a text."""
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.finding import find_dictionary
    from llm_wsae.inspecting.inspection import inspect, latents_text, sentence_text

    model, folder = request.model, find_dictionary(request.dictionary)
    opened = Dictionary.load(folder)
    how = {name: getattr(request, name) for name in ("store", "text", "top")}
    how |= {"model": model.model, "revision": model.revision, "device": model.device}
    found = inspect(opened, request.latent, dtype=model.model_dtype, **how)
    facts: dict[str, Any] = {"dictionary": str(folder), "latents": found.latents}
    parts = [latents_text(opened, found.latents)] if found.latents else []
    if found.no_model is not None:
        parts.append(f"tokens are not shown: {found.no_model}")
    if found.tokens is not None:
        facts["tokens"] = found.tokens
        parts.append(sentence_text(found.tokens, [view.latent for view in found.latents]))
    return facts, "\n\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class Steer:
    dictionary: Dict
    """Dictionary: a folder, user/repo/name on the Hub, or a pretrained name."""
    latent: int
    """Latent to turn up or down."""
    text: str
    """Beginning of a text, which the model continues."""
    how: Literal["add", "clamp", "ablate"] = "add"
    """add: strength × largest activation × decoder row is added to the stream. clamp: the latent's
    activation is set to strength × largest. ablate: it is set to 0."""
    strength: tuple[float, ...] = ()
    """Strengths in multiples of the latent's largest activation; the default is -1 0.5 1 2 4."""
    sweep: Flag = False
    """Try strengths from 0.25 to 8, to find where the model begins to break."""
    new_tokens: int = 40
    """Tokens that the model writes."""
    store: Path | None = None
    """Activation store of the site; the largest activation is that in its first 100,000 rows."""
    tokens: int = 20_000
    """Without a store: tokens of held-out text in which the largest activation is measured."""
    model: Flat[ModelConfig]
    corpus: Flat[OptionalTextConfig] = OptionalTextConfig()

    def __post_init__(self) -> None:
        if (self.store is None) == (self.corpus.corpus is None):
            raise UsageError(
                "the latent's largest activation is measured either on the rows of a store or on a "
                "text; give one of --store and --corpus"
            )
        if sum((bool(self.strength), self.sweep, self.how == "ablate")) > 1:
            raise UsageError("--strength, --sweep and --how ablate exclude each other; give one")


def steer(request: Steer) -> Result:
    """Let the model write with one latent turned up or down, and measure the effect."""
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.finding import find_dictionary
    from llm_wsae.inspecting.inspection import check_latent
    from llm_wsae.steering import STRENGTHS, SWEEP, steer

    opened = Dictionary.load(find_dictionary(request.dictionary))
    check_latent(opened, request.latent)  # before the model is loaded
    store = None if request.store is None else ActivationStore.open(request.store)
    source = request.corpus.open("heldout") if store is None else store
    model = request.model.load(None if store is None else store.manifest.model)
    strengths = request.strength or (SWEEP if request.sweep else STRENGTHS)
    asked = {name: getattr(request, name) for name in ("how", "new_tokens", "tokens")}
    found = steer(opened, model, request.latent, request.text, source, strengths=strengths, **asked)
    facts = {"dictionary": str(request.dictionary), **vars(found), "verdict": found.verdict}
    return facts, found.table()


@dataclass(frozen=True, kw_only=True)
class _OnStore:
    store: Path
    """Activation store of the site."""
    model: Flat[ModelConfig]
    """The model that the store came from."""


@dataclass(frozen=True, kw_only=True)
class Dashboard(_OnStore):
    dictionaries: Dicts
    """Dictionaries, named as for `evaluate`."""
    out: Path
    """HTML file to write. It needs no network and no other file."""
    prompt: tuple[str, ...] = ()
    """Sentences whose latents are shown token by token."""
    top: int = 10
    """Strongest contexts shown for each latent."""
    bands: int = 10
    """Number of quantile bands of its activation; one more context is shown from each."""
    rows: int | None = None
    """Number of rows to look at, from the beginning of the store; the default is all."""
    scores: Path | None = None
    """Report of `evaluate --monosemantic`, whose scores of latents become measures here."""
    live: Flag = False
    """Also serve the page on this machine, to type sentences and steer the model."""
    port: int = 0
    """Port to serve it on; 0 takes a free one."""

    def __post_init__(self) -> None:
        check_some(self.dictionaries, "dictionary folder")
        if self.out.suffix not in (".html", ".htm"):
            raise UsageError(f"the page is an HTML file, so --out cannot be {self.out}")
        if self.port and not self.live:
            raise UsageError("--port is for --live; add that")


def dashboard(request: Dashboard) -> Result:
    """Write one HTML file that shows what dictionaries found, alone and side by side."""
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.finding import find_dictionaries
    from llm_wsae.pages import dashboard as pages
    from llm_wsae.pages.frame import is_page
    from llm_wsae.pages.telling import told

    out, live, port = request.out, request.live, request.port
    check_file(out, is_page)  # before the model is loaded
    listening = None
    if live:  # refused before the work
        if not (find_spec("uvicorn") and find_spec("starlette")):
            raise UsageError("--live needs a server: pip install 'llm-wsae[page]'")
        from llm_wsae.pages.live import listen, serve

        listening = listen(port)
    named = pages.named_dictionaries(find_dictionaries(request.dictionaries))
    store = ActivationStore.open(request.store)
    model = request.model.load(store.manifest.model)
    shown = {name: getattr(request, name) for name in ("top", "bands", "rows", "scores", "live")}
    page = pages.dashboard(named, store, model, out, prompts=request.prompt, **shown)
    if listening is not None:
        serve(out, model, named, listening, lambda address: note(f"open {address}"))
    where = f"page  {page.path}  ({page.megabytes:.1f} MB; open it in a browser)"
    facts = {"page": page.path, "megabytes": page.megabytes, "found": page.found}
    return facts, f"{told(page.found)}\n\n{where}"


@dataclass(frozen=True, kw_only=True)
class Explain(_OnStore):
    dictionaries: Dicts
    """Dictionary folders; the explanations are kept in them."""
    endpoint: str
    """Address of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1. Its key is read
    from LLM_WSAE_API_KEY, for OpenAI's also from OPENAI_API_KEY."""
    explainer: str
    """Name of the language model there, which explains and judges."""
    out: Path
    """Folder of the answers and the report."""
    yes: Flag = False
    """Ask the questions, and pay for them."""
    explaining: Flat[ExplainConfig] = ExplainConfig()

    def __post_init__(self) -> None:
        check_some(self.dictionaries, "dictionary folder")


def explain(request: Explain) -> Result:
    """Have a language model explain latents, and score how well the explanations predict them.

    Without --yes it only says what it would cost. Run it again to resume after an interruption: no
    answer is paid for twice.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.finding import find_dictionaries
    from llm_wsae.explaining.endpoint import check_endpoint
    from llm_wsae.explaining.explaining import check_folders, price_of
    from llm_wsae.explaining.explaining import explain as explain_all

    endpoint, config = request.endpoint, request.explaining
    check_endpoint(endpoint)
    store = ActivationStore.open(request.store)
    folders = check_folders(find_dictionaries(request.dictionaries))
    sizes, most = [Dictionary.load(folder).d_sae for folder in folders.values()], config.latents
    price = price_of(config, sum(n if most == "all" else min(n, most) for n in sizes))
    if not request.yes:
        facts: dict[str, Any] = {"price": price, "done": False}
        return facts, f"{price}\nNothing was asked; add --yes to go on."
    model = request.model.load(store.manifest.model)
    found = explain_all(folders, store, model, endpoint, request.explainer, request.out, config)
    kept = [f"explanations  {folder}" for folder in folders.values()]
    return {"price": price, "done": True, **found.to_dict()}, "\n".join([found.table(), *kept])


@dataclass(frozen=True, kw_only=True)
class Export:
    dictionaries: Dicts
    """Dictionaries, named as for `evaluate`: for neuronpedia one, for circuit-tracer the transcoder
    of each block of a model."""
    to: Literal["neuronpedia", "circuit-tracer"]
    """Whose files to write."""
    out: Path
    """Folder to write them into."""
    store: Path | None = None
    """For neuronpedia: activation store of the site."""
    top: int = 20
    """For neuronpedia: strongest contexts shown for each latent."""
    bands: int = 5
    """For neuronpedia: quantile bands of its activation; a context is shown from each."""
    contexts: int | None = None
    """For neuronpedia: number of contexts to look at, from the beginning of the store; the default
    is all."""
    model_id: str | None = None
    """Name of the model on Neuronpedia; the default is the model's own."""
    sae_set: str | None = None
    """Name of the set of dictionaries there; the default is the dictionary's own."""
    sae_id_suffix: str | None = None
    """Suffix that tells apart dictionaries of the same set and block."""
    model: Flat[OptionalModelConfig] = OptionalModelConfig()
    """For neuronpedia: the model that the store came from."""

    def __post_init__(self) -> None:
        check_some(self.dictionaries, "dictionary folder")
        to_neuronpedia = self.to == "neuronpedia"
        if to_neuronpedia and (self.store is None or self.model.model is None):
            raise UsageError("neuronpedia shows contexts: give their --store and its --model")
        if to_neuronpedia and len(self.dictionaries) > 1:
            raise UsageError("neuronpedia takes one dictionary at a time; name one")
        always = {"--dictionaries", "--to", "--out", "--model"}
        idle = (changed(self).keys() - always) | changed(self.model).keys()
        if not to_neuronpedia and idle:
            raise UsageError(f"omit {' and '.join(sorted(idle))}, which are for neuronpedia")


def export(request: Export) -> Result:
    """Write latents as Neuronpedia imports them, or transcoders as circuit-tracer does."""
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.finding import find_dictionaries, find_dictionary

    if request.to == "circuit-tracer":
        from llm_wsae.dictionary.circuit_tracer import (
            save_transcoder_set,
            transcoder_set_in,
        )

        transcoder_set_in(request.out).check_place()
        folders = find_dictionaries(request.dictionaries)
        path = save_transcoder_set([Dictionary.load(folder) for folder in folders], request.out)
        facts = {"path": str(path), "transcoders": len(folders)}
        return facts, f"the transcoders of {len(folders)} blocks, for circuit-tracer: {path}"

    from llm_wsae.data.store import ActivationStore
    from llm_wsae.pages.neuronpedia import export_in, export_neuronpedia

    assert request.store is not None
    export_in(request.out).check_place()
    dictionary = find_dictionary(request.dictionaries[0])
    store = ActivationStore.open(request.store)
    model = request.model.load(store.manifest.model)
    names = ("top", "bands", "contexts", "model_id", "sae_set", "sae_id_suffix")
    shown = {name: getattr(request, name) for name in names}
    done = export_neuronpedia(dictionary, store, model, request.out, **shown)
    explained = f", {done.explained:,} of them explained" if done.explained else ""
    return vars(done), f"{done.latents:,} latents in {done.files} files{explained}: {done.path}"


@dataclass(frozen=True, kw_only=True)
class Verify:
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Store, dictionary, folder of a training, study or run, weights file, or JSON record; also
    another tool's dictionary, which has no checksums."""
    site: str | None = None
    """Site of a dictionary whose files do not name it."""


def verify(request: Verify) -> Result:
    """Check every byte of what llm-wsae wrote, and name what is damaged and what to do."""
    from llm_wsae.commands.verifying import verify as check

    path, found = request.path, check(request.path, request.site)
    if found.problems:
        raise LlmWsaeError("; ".join(found.problems))
    below = path if path.is_dir() else path.parent
    names = [str(file.relative_to(below)) for file in found.without_digest]
    facts = {"folder": str(path), "ok": True, "without_digest": names}
    if not names:
        return facts, f"{path} is intact"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return facts, (
        f"{path} can be read, but there is no checksum of {', '.join(names[:_NAMED])}{more}, which "
        "another tool wrote"
    )
