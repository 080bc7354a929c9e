"""How held-out text is packed for dictionaries: as the text that they were trained on."""

from collections.abc import Mapping

from llm_wsae.data.config import PackConfig
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError


def packing_of(dictionaries: Mapping[str, Dictionary]) -> PackConfig:
    """The packing that all dictionaries were trained with; the default where it is unknown.

    Raises UsageError when they were trained with different ones.
    """
    found = {}
    for name, dictionary in dictionaries.items():
        packing = dictionary.info.store.get("packing")
        if packing is not None:
            found[PackConfig.remembered(packing)] = name
    if len(found) > 1:
        names = " and ".join(repr(name) for name in list(found.values())[:2])
        raise UsageError(
            f"{names} were trained on differently packed contexts; evaluate them one by one"
        )
    return next(iter(found), PackConfig())
