"""The card of a repository of dictionaries (README.md), written from what was measured.

Each push rewrites everything between two marks from the JSON files of all dictionaries in the
repository. What a user wrote around the marks stays. In the metadata, the library, models, datasets
and metrics are replaced by those of the dictionaries; the rest stays. Text from files (names of
models, corpora, arms) is escaped, so that it cannot become markup.
"""

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from llm_wsae.artifact.provenance import portable
from llm_wsae.dictionary.hub.card_data import Facts
from llm_wsae.dictionary.hub.card_tables import (
    dictionaries_table,
    escape,
    explanations_section,
    fidelity_notes,
    is_plain,
    monosemanticity_section,
    rule_words,
    with_baselines,
)
from llm_wsae.errors import LlmWsaeError
from llm_wsae.outside import mapping, parse_yaml, text
from llm_wsae.terminal import markdown

BEGIN = "<!-- llm-wsae push writes everything from here … -->"
END = "<!-- … to here -->"
LIBRARY = "llm-wsae"
PAPER = "arXiv 2506.15963"
TAGS = (
    "sparse-autoencoder",
    "weighted-sparse-autoencoder",
    "mechanistic-interpretability",
    "saelens",
    "transformer-lens",
)
_METRICS = ("explained_variance", "ce_recovered", "kl", "l0")  # the Hub indexes them
_RENAMED = {"seed": "seed of the batches"}  # "seed" is the row of the initial weights
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # a token, not hf_hub_download


def card(
    repo_id: str,
    dictionaries: Sequence[Facts],
    *,
    old: str = "",
    license: str | None = None,
    revision: str | None = None,
) -> str:
    """The complete README.md.

    ``old`` is the existing card, ``revision`` the branch. Raises LlmWsaeError if the metadata of
    ``old`` cannot be read.
    """
    theirs, around = _parsed(repo_id, old)
    metadata = _yaml(_merge(theirs, _metadata(repo_id, dictionaries, license)))
    ours = f"{BEGIN}\n\n{_body(repo_id, dictionaries, revision)}\n\n{END}"
    if END in around.partition(BEGIN)[2]:
        before, rest = around.split(BEGIN, 1)
        parts = [before.strip("\n"), ours, rest.rpartition(END)[2].strip("\n")]
    else:
        parts = [around.strip("\n"), ours]
    whole = "\n\n".join(part for part in parts if part)
    return _TOKEN.sub("…", f"---\n{metadata}---\n\n{whole}\n")


def _metadata(repo_id: str, dictionaries: Sequence[Facts], license: str | None) -> dict[str, Any]:
    """What the Hub indexes; ``_merge`` omits keys without a value."""
    measured = [d for d in dictionaries if d.metric("fvu") is not None]
    models = dict.fromkeys(d.hub_model for d in dictionaries if d.hub_model)
    datasets = dict.fromkeys(name for d in dictionaries for name in d.hub_datasets)
    return {
        "library_name": LIBRARY,
        "license": license,
        "tags": list(TAGS),
        "base_model": list(models),
        "datasets": list(datasets),
        "metrics": [m for m in _METRICS if any(d.metric(m) is not None for d in measured)],
        "model-index": [{"name": repo_id.split("/")[-1], "results": [_result(d) for d in measured]}]
        if measured
        else [],
    }


def _result(d: Facts) -> dict[str, Any]:
    """One dictionary's entry in the model index."""
    names = {m: d.metric(m) for m in _METRICS}
    return {
        "task": {"type": "feature-extraction", "name": d.sae_id},
        "dataset": {
            "type": "text" if d.measured_on else next(iter(d.hub_datasets), "text"),
            "name": f"held-out text of {d.measured_on or d.corpus or 'the corpus'}",
        },
        "metrics": [
            {"type": m, "name": m, "value": round(value, 6)}
            for m, value in names.items()
            if value is not None
        ],
    }


def _merge(old: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The old metadata, updated; tags and model index are united."""
    merged = {**old, **{key: value for key, value in ours.items() if value not in (None, [])}}
    tags = old.get("tags")
    theirs = [tag for tag in (tags if isinstance(tags, list) else []) if isinstance(tag, str)]
    merged["tags"] = list(dict.fromkeys([*ours["tags"], *theirs]))
    index = old.get("model-index")
    names = {entry["name"] for entry in ours["model-index"]}
    others = [
        entry
        for entry in (index if isinstance(index, list) else [])
        if text(mapping(entry).get("name")) not in names
    ]
    if ours["model-index"] or others:
        merged["model-index"] = [*ours["model-index"], *others]
    return merged


def _parsed(repo_id: str, old: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and text."""
    found = REGEX_YAML_BLOCK.search(old)
    if found is None:
        return {}, old
    try:
        return parse_yaml(found[2], "its metadata"), old[found.end() :]
    except LlmWsaeError as error:
        raise LlmWsaeError(
            f"the README.md of {repo_id} begins with metadata that cannot be read, so it is left "
            f"alone ({error}); fix it on the Hub and push again"
        ) from error


def _yaml(metadata: dict[str, Any]) -> str:
    stated = {name: value for name, value in metadata.items() if value is not None}
    return yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)


def _body(repo_id: str, dictionaries: Sequence[Facts], revision: str | None) -> str:
    models = dict.fromkeys(escape(d.model) for d in dictionaries if d.model)
    sites = dict.fromkeys(escape(d.info.site) for d in dictionaries)
    of = f" of {', '.join(models)}" if models else ""
    measured = with_baselines(dictionaries)
    parts = [
        f"# Sparse autoencoders for the residual stream{of}",
        f"{len(dictionaries)} "
        f"{'dictionary' if len(dictionaries) == 1 else 'dictionaries'} that explain the residual "
        f"stream at {', '.join(sites)} as sparse sums of directions{_trained(dictionaries)}. A "
        "rule other than *uniform* weights the error of every dimension by γ = score^α "
        f"(weighted sparse autoencoders, {PAPER}), or trains in the space of the weights "
        "(*space*); *uniform* is the plain sparse autoencoder to compare with.",
        "## Dictionaries",
        dictionaries_table(measured),
        *fidelity_notes(measured),
    ]
    if scores := monosemanticity_section(measured):
        parts += ["## Monosemanticity", *scores]
    if explained := explanations_section(dictionaries):
        parts += ["## Explanations by a language model", *explained]
    parts += ["## How to use them", *_usage(repo_id, dictionaries[0], revision)]
    parts += ["## How they were made"]
    for d in dictionaries:
        parts += [f"### {escape(d.sae_id)}", *making(d)]
    return "\n\n".join(parts)


def _trained(dictionaries: Sequence[Facts]) -> str:
    """The tool that trained them, if it is the same for all."""
    tools = {text(d.info.training.get("trained with")) or LIBRARY for d in dictionaries}
    return f", trained with {escape(tools.pop())}" if len(tools) == 1 else ""


def _usage(repo_id: str, d: Facts, revision: str | None) -> list[str]:
    names = f"{json.dumps(repo_id)}, {json.dumps(d.sae_id)}"
    at = f", revision={json.dumps(revision)}" if revision else ""
    flag = f" --revision {shlex.quote(revision)}" if revision else ""
    width = d.d_in or "d_in"
    ours = f"""```python
from llm_wsae import Dictionary

dictionary = Dictionary.from_pretrained({names}{at})
codes = dictionary.encode_sparse(activations)  # [tokens, {width}] at {d.info.site}
reconstruction = dictionary.decode(codes)
```"""
    saelens = f"""```python
from sae_lens import SAE

sae = SAE.from_pretrained({names})
```"""
    shell = f"""```bash
llm-wsae list {repo_id}{flag}
llm-wsae pull {repo_id} {shlex.quote(d.sae_id)}{flag} --out dictionaries
```"""
    parts = ["In this package, and on the command line:", ours, shell]
    if not revision:  # SAELens reads the default branch only
        parts += ["In SAELens ≥ 6, whose layout the files follow:", saelens]
    return parts


def making(d: Facts) -> list[str]:
    """How a dictionary was made: the command, the settings."""
    info, training = d.info, d.info.training
    rows = [
        ("model", d.model, text(info.model.get("revision"))),
        ("text", d.corpus, None),
        ("site", info.site, None),
        ("rule", info.rule if is_plain(d) else f"{rule_words(d)}, α = {info.alpha:g}", None),
        ("context size", info.context_size, None),
        ("rows", info.store.get("num_rows"), None),
        ("seed", info.seed, None),
        *((_RENAMED.get(key, key), value, None) for key, value in training.items()),
        ("llm-wsae", d.package_version, None),
    ]
    listed = {
        escape(name.replace("_", " ")): escape(f"{value} ({extra})" if extra else str(value))
        for name, value, extra in rows
        if isinstance(value, str | int | float) and not isinstance(value, bool)
        if name not in ("command", "d_in", "d_sae")
    }
    versions = mapping(training.get("versions"))
    if versions:
        listed["versions"] = escape(", ".join(f"{k} {v}" for k, v in versions.items()))
    parts = [markdown([["", ""], *map(list, listed.items())], left=2)]
    if command := text(training.get("command")):
        command = portable(command).replace("`", "'").replace("\n", " ").replace("<!--", "<! --")
        parts = [f"```bash\n{command}\n```", *parts]
    return parts
