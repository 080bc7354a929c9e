"""The command that lists what a repository on the Hub holds."""

from typing import TYPE_CHECKING, Any

from llm_wsae.commands.options import RepoId, Result
from llm_wsae.terminal import printable

if TYPE_CHECKING:
    from llm_wsae.dictionary.hub.card_data import Facts


def list_repository(
    repo_id: RepoId,
    revision: str | None = None,
) -> Result:
    """List the dictionaries in a repository on the Hub, with their measurements.

    Args:
        repo_id: Repository, user/name.
        revision: Branch, tag or commit.
    """
    from llm_wsae.dictionary.hub.transfer import list_dictionaries

    found = list_dictionaries(repo_id, revision=revision)
    width = max(len("dictionary"), *(len(d.sae_id) for d in found))
    lines = [f"{'dictionary':<{width}}  {'size':>14}  {'sparsity':<16}{'FVU':>7}{'CE rec.':>9}"]
    for d in found:
        size = f"{d.d_in or '?'} → {d.d_sae or '?'}"
        numbers = [_digits(d.metric("fvu"), 7), _digits(d.metric("ce_recovered"), 9)]
        name, sparsity = printable(d.sae_id), printable(d.sparsity)
        lines.append(f"{name:<{width}}  {size:>14}  {sparsity:<16}{''.join(numbers)}")
    return {"repo_id": repo_id, "dictionaries": [_json(d) for d in found]}, "\n".join(lines)


def _json(d: "Facts") -> dict[str, Any]:
    return {
        "sae_id": d.sae_id,
        "site": d.info.site,
        "d_in": d.d_in,
        "d_sae": d.d_sae,
        "sparsity": d.sparsity,
        "k": d.k,
        "rule": d.info.rule,
        "alpha": d.info.alpha,
        "model": d.model,
        "corpus": d.corpus,
        "metrics": d.info.metrics,
    }


def _digits(value: float | None, width: int) -> str:
    return f"{'—' if value is None else f'{value:.3f}':>{width}}"
