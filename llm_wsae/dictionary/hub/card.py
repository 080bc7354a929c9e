"""The card of a repository of dictionaries (README.md), written from what was measured.

Each push rewrites everything between two marks, and in the metadata the library, models, datasets
and metrics; what else a user wrote stays. Text from files (names of models, corpora, arms) is
escaped, so that it cannot become markup.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import RepoCard
from huggingface_hub.utils import yaml_dump

from llm_wsae.artifact.provenance import portable
from llm_wsae.dictionary.folder import EXPLANATIONS
from llm_wsae.dictionary.info import Facts
from llm_wsae.outside import integer, mapping, parsing, text
from llm_wsae.statistics.measures import FIDELITY, MEASURES, Measure, score_text
from llm_wsae.terminal import markdown

BEGIN = "<!-- llm-wsae push writes everything from here … -->"
END = "<!-- … to here -->"
_TAGS = (
    "sparse-autoencoder",
    "weighted-sparse-autoencoder",
    "mechanistic-interpretability",
    "saelens",
    "transformer-lens",
)
_METRICS = ("explained_variance", "ce_recovered", "kl", "l0")  # the Hub indexes them
_LONGEST = 200  # characters of a foreign text
_MARKUP = re.compile(r"([\\`*_\[\]|~#!$])")
_NONE = "—"
_JUDGED = ("detection", "fuzzing", "intruder", "graded")  # by a language model
_BASELINES = {
    "raw dimensions": "two latents for each dimension of the activations, untrained",
    "frozen random": "random directions, untrained",
    "frozen decoder": "random directions, beside which only the encoder was trained",
    "frozen encoder": "a random encoder, beside which only the decoder was trained",
}
_BASELINE = "none"  # the rule of a baseline
_SHOWN = [measure for measure in FIDELITY if measure.card]
_OF_THE_TEXT = {  # titles, metrics and their digits
    "held-out tokens": ("rows", 0),
    "documents": ("documents", 0),
    "effective documents": ("effective_documents", 0),
    "CE of the model": ("ce_clean", 3),
    "with the reconstruction": ("ce_spliced", 3),
    "with the mean": ("ce_mean_ablated", 3),
    "with zeros": ("ce_zero_ablated", 3),
    "CE recovered against the mean": ("ce_recovered_mean", 3),
    "massive tokens": ("massive_rows", 0),
    "FVU with them": ("fvu_with_massive", 3),
}
_WITH_OWNER = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the Hub
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # a token, not hf_hub_download
_BODY = """{begin}

# Sparse autoencoders for the residual stream{of_models}

{dictionaries} of the residual stream at {sites}: each row becomes a sparse sum of directions.
A rule other than *uniform* weights the error of every dimension by γ = score^α (weighted sparse
autoencoders, arXiv 2506.15963), or trains in the space of the weights (*space*). *uniform* is the
plain sparse autoencoder to compare with.

## Dictionaries

{measured}

## How to use them

In this package, and on the command line:

```python
from llm_wsae import Dictionary

dictionary = Dictionary.from_pretrained({names}{revision})
codes = dictionary.encode_sparse(activations)  # [tokens, {width}] at {site}
reconstruction = dictionary.decode(codes)
```

```bash
llm-wsae list {repo_id}{option}
llm-wsae pull {repo_id} {word}{option} --out dictionaries
```

{saelens}## How they were made

{made}

{end}"""
_SAELENS = """In SAELens ≥ 6, whose layout the files follow:

```python
from sae_lens import SAE

sae = SAE.from_pretrained({names})
```

"""


def card(
    repo_id: str,
    dictionaries: Sequence[Facts],
    *,
    old: str = "",
    license: str | None = None,
    revision: str | None = None,
) -> str:
    """The complete README.md; ``old`` is the existing card, ``revision`` the branch. Raises
    LlmWsaeError if the metadata of ``old`` cannot be read."""
    if not old.lstrip().startswith("---"):
        old = f"---\n\n---\n{old}"  # the client warns of a card without metadata
    with parsing(
        f"the README.md of {repo_id} begins with metadata that cannot be read, so it is left "
        "alone; correct it on the Hub and push again"
    ):
        theirs = RepoCard(old)
    metadata = yaml_dump(_metadata(repo_id, dictionaries, license, vars(theirs.data)))
    before, rest = theirs.text, ""
    if END in before.partition(BEGIN)[2]:
        before, after = before.split(BEGIN, 1)
        rest = after.rpartition(END)[2]
    parts = [before.strip("\n"), _body(repo_id, dictionaries, revision), rest.strip("\n")]
    whole = "\n\n".join(part for part in parts if part)
    return _TOKEN.sub("…", f"---\n{metadata}---\n\n{whole}\n")


def _metadata(
    repo_id: str, dictionaries: Sequence[Facts], license: str | None, old: Mapping[str, Any]
) -> dict[str, Any]:
    """What the Hub indexes: the old metadata, updated; tags and model index are united."""
    name = repo_id.split("/")[-1]
    tags, index = (
        found if isinstance(found := old.get(key), list) else [] for key in ("tags", "model-index")
    )
    measured = [d for d in dictionaries if d.metric("fvu") is not None]
    results = [one for one in map(_result, measured) if one["metrics"]]
    # only what came from the Hub has a revision
    models = [d.model for d in dictionaries if d.model and text(d.info.model.get("revision"))]
    ours = {
        "library_name": "llm-wsae",
        "license": license,
        "tags": list(dict.fromkeys([*_TAGS, *(tag for tag in tags if isinstance(tag, str))])),
        "base_model": list(dict.fromkeys(models)),
        "datasets": list(dict.fromkeys(own for d in dictionaries for own in _hub_datasets(d))),
        "metrics": [m for m in _METRICS if any(d.metric(m) is not None for d in measured)],
        "model-index": [
            *([{"name": name, "results": results}] if results else []),
            *(entry for entry in index if mapping(entry).get("name") != name),
        ],
    }
    return {**old, **{key: value for key, value in ours.items() if value}}


def _hub_datasets(d: Facts) -> list[str]:
    """The Hub datasets among the corpus' parts: those whose names have an owner."""
    parts = [part.split(":")[0] for part in (d.corpus or "").split("+")]
    return [part for part in parts if _WITH_OWNER.fullmatch(part)]


def _result(d: Facts) -> dict[str, Any]:
    """What was measured of one dictionary, as the model index has it."""
    held_out = text(d.measured("fidelity").get("corpus")) or d.corpus
    own = next(iter(_hub_datasets(d)), "text") if held_out == d.corpus else "text"
    values = {metric: d.metric(metric) for metric in _METRICS}
    return {
        "task": {"type": "feature-extraction", "name": d.sae_id},
        "dataset": {"name": f"held-out text of {held_out or 'the corpus'}", "type": own},
        "metrics": [
            {"type": metric, "value": round(value, 6), "name": metric}
            for metric, value in values.items()
            if value is not None
        ],
    }


def _body(repo_id: str, dictionaries: Sequence[Facts], revision: str | None) -> str:
    first, count = dictionaries[0], len(dictionaries)
    models = dict.fromkeys(escape(d.model) for d in dictionaries if d.model)
    names = f"{json.dumps(repo_id)}, {json.dumps(first.sae_id)}"
    made = [part for d in dictionaries for part in (f"### {escape(d.sae_id)}", *making(d))]
    return _BODY.format(
        begin=BEGIN,
        end=END,
        of_models=f" of {', '.join(models)}" if models else "",
        dictionaries=f"{count} {'dictionary' if count == 1 else 'dictionaries'}",
        sites=", ".join(dict.fromkeys(escape(d.info.site) for d in dictionaries)),
        measured="\n\n".join([*tables(dictionaries), *_explanations(dictionaries)]),
        names=names,
        revision=f", revision={json.dumps(revision)}" if revision else "",
        width=first.d_in or "d_in",
        site=first.info.site,
        repo_id=repo_id,
        word=shlex.quote(first.sae_id),
        option=f" --revision {shlex.quote(revision)}" if revision else "",
        # SAELens reads the default branch only
        saelens="" if revision else _SAELENS.format(names=names),
        made="\n\n".join(made),
    )


def making(d: Facts) -> list[str]:
    """How a dictionary was made: the command, the settings."""
    info, training = d.info, dict(d.info.training)
    command, versions = text(training.pop("command", None)), mapping(training.pop("versions", None))
    revision = text(info.model.get("revision"))
    known = {
        "model": f"{d.model} ({revision})" if d.model and revision else d.model,
        "text": d.corpus,
        "site": info.site,
        "rule": info.rule if info.rule == "uniform" else f"{rule_words(d)}, α = {info.alpha:g}",
        "context size": info.context_size,
        "rows": info.store.get("num_rows"),
        "seed": info.seed,
        # "seed" is that of the initial weights
        **{"seed of the batches" if key == "seed" else key: training[key] for key in training},
        "llm-wsae": d.package_version,
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
    }
    rows = [
        [escape(name.replace("_", " ")), escape(str(value))]
        for name, value in known.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
        if name not in ("d_in", "d_sae")
    ]
    table = markdown([["", ""], *rows], left=2)
    if not command:
        return [table]
    command = portable(command).replace("`", "'").replace("\n", " ").replace("<!--", "<! --")
    return [f"```bash\n{command}\n```", table]


def escape(value: str) -> str:
    """The text escaped: one line, no Markdown, no HTML, of limited length."""
    line = "".join(c for c in " ".join(value.split()) if c.isprintable())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", line)


def rule_words(d: Facts) -> str:
    """The rule that made the weights, with the space where these are one."""
    return d.info.rule + (", space" if d.info.weights.get("place") == "space" else "")


def tables(dictionaries: Sequence[Facts]) -> list[str]:
    """What each dictionary is, how faithful to the model and how monosemantic; beside them the
    untrained and half-trained baselines."""
    everything = [*dictionaries, *_baselines(dictionaries)]
    head = ["dimensions → latents", "sparsity", "rule", "α", *(one.title for one in _SHOWN)]
    rows = {
        d.sae_id: [
            f"{_figure(d.d_in)} → {_figure(d.d_sae)}",
            escape(d.sparsity),
            escape(rule_words(d)),
            "" if d.info.rule in ("uniform", _BASELINE) else f"{d.info.alpha:g}",
            *(one.text(d.measured("fidelity")) for one in _SHOWN),
        ]
        for d in everything
    }
    first = _table(head, rows, left=4)
    return [first, *_fidelity_notes(everything), *_monosemanticity(everything)]


def _table(head: Iterable[str], rows: Mapping[str, Sequence[str]], left: int = 1) -> str:
    """The rows of dictionaries by their names."""
    named = [[f"`{name}`", *(cell or _NONE for cell in row)] for name, row in rows.items()]
    return markdown([["dictionary", *head], *named], left)


def _baselines(dictionaries: Sequence[Facts]) -> list[Facts]:
    """The baselines of each site, as they were measured beside a dictionary there."""
    found: dict[str, Facts] = {}
    for d in dictionaries:
        for name in _BASELINES:
            if metrics := mapping(d.measured("baselines").get(name)):
                info = replace(d.info, rule=_BASELINE, metrics=dict(metrics))
                sae_id = f"{name}, {d.info.site}"
                found.setdefault(sae_id, Facts(sae_id, "topk", d.d_in, None, None, info))
    return list(found.values())


def _fidelity_notes(dictionaries: Sequence[Facts]) -> list[str]:
    """What the columns mean, and the measured cross-entropies with their baselines."""
    measured = [d for d in dictionaries if d.metric("fvu") is not None]
    if not measured:
        return ["Their fidelity was not measured; `llm-wsae evaluate --keep` measures it."]
    notes = [_meanings(_SHOWN)]
    shown = [name for name in _BASELINES if any(d.sae_id.startswith(name) for d in measured)]
    if shown:
        said = "; ".join(f"{name}: {_BASELINES[name]}" for name in shown)
        notes.append(f"{said}. A number says little unless it is far from theirs.")
    notes.append(
        "Cross-entropies (CE) are in nats. Tokens with massive activations are excluded, and keep "
        "the model's own activation."
    )
    rows = {
        d.sae_id: [_figure(d.metric(name), digits) for name, digits in _OF_THE_TEXT.values()]
        for d in measured
    }
    return [*notes, _table(_OF_THE_TEXT, rows)]


def _monosemanticity(dictionaries: Sequence[Facts]) -> list[str]:
    """What the measures mean, and a table with a column for each, the control in brackets."""
    groups = {d.sae_id: d.measured("monosemanticity") for d in dictionaries}
    shown = [one for one in MEASURES.values() if any(map(one.text, groups.values()))]
    if not shown:
        return []
    rows = {name: [one.text(group) for one in shown] for name, group in groups.items()}
    return [
        "## Monosemanticity",
        "All on held-out text, without a language model as judge, with 95 % intervals. "
        + _meanings(shown),
        _table([one.title for one in shown], {k: row for k, row in rows.items() if any(row)}),
    ]


def _meanings(measures: Iterable[Measure]) -> str:
    return "; ".join(f"{one.title}: {one.meaning}" for one in measures) + "."


def _explanations(dictionaries: Sequence[Facts]) -> list[str]:
    """How well a language model explained every dictionary's latents; empty if it was not asked."""
    groups = {d.sae_id: d.measured("explanations") for d in dictionaries}
    rows = {}
    for name, found in groups.items():
        if integer(found.get("latents")) is None:
            continue
        counts = (_figure(integer(found.get(key))) for key in ("latents", "unread", "questions"))
        latents, unread, questions = counts
        scores = [score_text(found, key) for key in _JUDGED]
        explainer = escape(text(found.get("explainer")) or "")
        rows[name] = [explainer, latents, *scores, f"{unread} of {questions}"]
    if not rows:
        return []
    head = ["explained and judged by", "latents", *_JUDGED, "answers not readable"]
    return [
        "## Explanations by a language model",
        "Detection: does a text excite the latent, by its explanation? Fuzzing: are the marked "
        "tokens those that excite it? Both are balanced accuracies (chance: 0.5) on documents that "
        "the explainer did not see. Intruder: which of five texts does not excite it (accuracy "
        "without an explanation; chance: 0.2). Graded: does a text that excites the latent make "
        "yes likelier than one that does not (area under the ROC curve; chance: 0.5)? Means over a "
        f"sample of latents, with 95 % intervals over them. They are in `{EXPLANATIONS}`.",
        _table(head, rows, left=2),
    ]


def _figure(value: int | float | None, digits: int = 0) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"
