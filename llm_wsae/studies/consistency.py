"""Do a study's seeds find the same latents? PW-MCC of the dictionaries that were kept.

No verdict depends on it: a seed also sets the order of the rows and a control's weights, and a
dictionary that ignores most dimensions has fewer ways to differ.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.monosemanticity.evaluator import pw_mcc
from llm_wsae.files import read_own_json, write_json
from llm_wsae.outside import typed


@dataclass(frozen=True)
class Agreement:
    """How similar the dictionaries of one label and k are that differ in their seeds."""

    label: str
    k: int
    seeds: tuple[int, ...]
    pw_mcc: float
    """Mean cosine of decoder rows, matched one to one, over pairs of seeds."""


Agreements = dict[tuple[str, int], Agreement]
"""By label and k."""


def measure(path: Path, kept: Mapping[tuple[str, int], Mapping[int, Path]]) -> Agreements:
    """The agreements in the file ``path``, extended by the dictionaries that are ``kept``.

    ``kept`` has the folders of each label and k by seed. A measured agreement stays when its
    dictionaries are deleted, and is measured again when there are other seeds.
    """
    found = read(path)
    new = {
        key: dict(sorted(folders.items()))
        for key, folders in kept.items()
        if len(folders) > 1 and not (key in found and set(folders) <= set(found[key].seeds))
    }
    for (label, k), folders in tqdm(new.items(), desc="seeds", unit="kind", disable=not new):
        decoders = [Dictionary.load(folder).W_dec.detach() for folder in folders.values()]
        found[label, k] = Agreement(label, k, tuple(folders), pw_mcc(decoders))
        write_json(path, {"agreements": [asdict(one) for one in found.values()]})
    return found


def read(path: Path) -> Agreements:
    """What was measured; empty without a file. Raises LlmWsaeError if the file is damaged."""
    if not path.exists():
        return {}
    way_out = "delete it to measure it again"
    content = read_own_json(path, "consistency of a study", way_out)
    try:
        listed = content["agreements"]
        found = [typed(Agreement(**one | {"seeds": tuple(one["seeds"])})) for one in listed]
        return {(one.label, one.k): one for one in found}
    except (KeyError, TypeError) as error:
        raise LlmWsaeError(
            f"{path} is not the consistency of a study's seeds ({error!r}); {way_out}"
        ) from error
