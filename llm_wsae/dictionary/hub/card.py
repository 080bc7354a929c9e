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
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

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
from llm_wsae.outside import mapping, parsing, text
from llm_wsae.terminal import markdown

BEGIN = "<!-- llm-wsae push writes everything from here … -->"
END = "<!-- … to here -->"
LIBRARY = "llm-wsae"
TAGS = (
    "sparse-autoencoder",
    "weighted-sparse-autoencoder",
    "mechanistic-interpretability",
    "saelens",
    "transformer-lens",
)
_METRICS = ("explained_variance", "ce_recovered", "kl", "l0")  # the Hub indexes them
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # a token, not hf_hub_download
_BODY = """{begin}

# Sparse autoencoders for the residual stream{of_models}

{dictionaries} of the residual stream at {sites}: each row becomes a sparse sum of directions\
{trained}. A rule other than *uniform* weights the error of every dimension by γ = score^α
(weighted sparse autoencoders, arXiv 2506.15963), or trains in the space of the weights (*space*).
*uniform* is the plain sparse autoencoder to compare with.

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
    """The complete README.md.

    ``old`` is the existing card, ``revision`` the branch. Raises LlmWsaeError if the metadata of
    ``old`` cannot be read.
    """
    theirs, around = _parsed(repo_id, old)
    metadata = yaml_dump(_metadata(repo_id, dictionaries, license, theirs))
    before, rest = around, ""
    if END in around.partition(BEGIN)[2]:
        before, after = around.split(BEGIN, 1)
        rest = after.rpartition(END)[2]
    parts = [before.strip("\n"), _body(repo_id, dictionaries, revision), rest.strip("\n")]
    whole = "\n\n".join(part for part in parts if part)
    return _TOKEN.sub("…", f"---\n{metadata}---\n\n{whole}\n")


def _parsed(repo_id: str, old: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and text."""
    found = REGEX_YAML_BLOCK.search(old)
    if found is None:
        return {}, old
    with parsing(
        f"the README.md of {repo_id} begins with metadata that cannot be read, so it is left "
        "alone; correct it on the Hub and push again"
    ):
        values = yaml.safe_load(found[2]) or {}
        if not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
            raise ValueError("it is not a list of names with values")
    return values, old[found.end() :]


def _metadata(
    repo_id: str, dictionaries: Sequence[Facts], license: str | None, old: dict[str, Any]
) -> dict[str, Any]:
    """What the Hub indexes: the old metadata, updated; tags and model index are united."""
    measured = [d for d in dictionaries if d.metric("fvu") is not None]
    name = repo_id.split("/")[-1]
    tags, index = (found if isinstance(found := old.get(key), list) else [] for key in _LISTS)
    # One call for each: it unites results on the same text.
    results = [
        one
        for d in measured
        for one in eval_results_to_model_index(name, _results(d))[0]["results"]
    ]
    ours = {
        "library_name": LIBRARY,
        "license": license,
        "tags": list(dict.fromkeys([*TAGS, *(tag for tag in tags if isinstance(tag, str))])),
        "base_model": list(dict.fromkeys(d.hub_model for d in dictionaries if d.hub_model)),
        "datasets": list(dict.fromkeys(own for d in dictionaries for own in d.hub_datasets)),
        "metrics": [m for m in _METRICS if any(d.metric(m) is not None for d in measured)],
        "model-index": [
            *([{"name": name, "results": results}] if results else []),
            *(entry for entry in index if mapping(entry).get("name") != name),
        ],
    }
    return {**old, **{key: value for key, value in ours.items() if value}}


_LISTS = ("tags", "model-index")


def _results(d: Facts) -> list[EvalResult]:
    """What was measured of one dictionary."""
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name=d.sae_id,
            dataset_type="text" if d.measured_on else next(iter(d.hub_datasets), "text"),
            dataset_name=f"held-out text of {d.measured_on or d.corpus or 'the corpus'}",
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 6),
        )
        for metric in _METRICS
        if (value := d.metric(metric)) is not None
    ]


def _body(repo_id: str, dictionaries: Sequence[Facts], revision: str | None) -> str:
    first, count = dictionaries[0], len(dictionaries)
    models = dict.fromkeys(escape(d.model) for d in dictionaries if d.model)
    tools = {text(d.info.training.get("trained with")) or LIBRARY for d in dictionaries}
    names = f"{json.dumps(repo_id)}, {json.dumps(first.sae_id)}"
    return _BODY.format(
        begin=BEGIN,
        end=END,
        of_models=f" of {', '.join(models)}" if models else "",
        dictionaries=f"{count} {'dictionary' if count == 1 else 'dictionaries'}",
        sites=", ".join(dict.fromkeys(escape(d.info.site) for d in dictionaries)),
        trained=f", trained with {escape(tools.pop())}" if len(tools) == 1 else "",
        measured="\n\n".join(_measured(dictionaries)),
        names=names,
        revision=f", revision={json.dumps(revision)}" if revision else "",
        width=first.d_in or "d_in",
        site=first.info.site,
        repo_id=repo_id,
        word=shlex.quote(first.sae_id),
        option=f" --revision {shlex.quote(revision)}" if revision else "",
        # SAELens reads the default branch only
        saelens="" if revision else _SAELENS.format(names=names),
        made="\n\n".join(
            part for d in dictionaries for part in (f"### {escape(d.sae_id)}", *making(d))
        ),
    )


def _measured(dictionaries: Sequence[Facts]) -> list[str]:
    all_of_them = with_baselines(dictionaries)
    parts = [dictionaries_table(all_of_them), *fidelity_notes(all_of_them)]
    if scores := monosemanticity_section(all_of_them):
        parts += ["## Monosemanticity", *scores]
    if explained := explanations_section(dictionaries):
        parts += ["## Explanations by a language model", *explained]
    return parts


def making(d: Facts) -> list[str]:
    """How a dictionary was made: the command, the settings."""
    info, training = d.info, dict(d.info.training)
    command, versions = text(training.pop("command", None)), mapping(training.pop("versions", None))
    revision = text(info.model.get("revision"))
    known = {
        "model": f"{d.model} ({revision})" if d.model and revision else d.model,
        "text": d.corpus,
        "site": info.site,
        "rule": info.rule if is_plain(d) else f"{rule_words(d)}, α = {info.alpha:g}",
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
    parts = [markdown([["", ""], *rows], left=2)]
    if command:
        command = portable(command).replace("`", "'").replace("\n", " ").replace("<!--", "<! --")
        parts = [f"```bash\n{command}\n```", *parts]
    return parts
