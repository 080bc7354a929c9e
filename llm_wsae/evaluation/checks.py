"""Do dictionaries, a model and a text belong together?"""

from collections.abc import Mapping
from typing import Any

from llm_wsae.data.config import PackConfig
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import CENTRED
from llm_wsae.errors import UsageError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import number
from llm_wsae.training.config import RATE, SHARED_RATE


def check_fit(dictionaries: Mapping[str, Dictionary], model: LanguageModel, verb: str) -> None:
    """Raise UsageError if there is no dictionary to ``verb``, or if one does not fit the model."""
    if not dictionaries:
        raise UsageError(f"there is no dictionary to {verb}; name at least one")
    for name, dictionary in dictionaries.items():
        model.check_site(dictionary.site)
        if dictionary.d_in != model.d_model:
            raise UsageError(
                f"dictionary {name!r} has {dictionary.d_in} dimensions, but {model.name} has "
                f"{model.d_model}; {verb} it on the model it was trained on"
            )


def plain_beside(dictionaries: Mapping[str, Dictionary]) -> dict[str, str]:
    """Of each weighted dictionary, the plain one trained beside it, if it is there: with the same
    rows, seed, sparsity and settings. Those of other tools do not say what they were trained on."""

    def training(name: str) -> tuple[Any, ...]:
        info = dictionaries[name].info
        settings = {k: v for k, v in info.training.items() if k not in ("command", "versions")}
        # those in a space have another rate than the plain ones beside them
        settings[RATE] = settings.pop(SHARED_RATE, settings.get(RATE))
        return info.site, info.seed, info.store, settings

    found = {}
    plain = [name for name, one in dictionaries.items() if one.info.rule == "uniform"]
    for name, one in dictionaries.items():
        beside = [other for other in plain if training(other) == training(name)]
        if beside and name not in plain and one.info.store:
            found[name] = beside[0]
    return found


def common_packing(
    dictionaries: Mapping[str, Dictionary], max_context: int | None = None
) -> PackConfig:
    """How the contexts were packed that all dictionaries were trained on, and how held-out text is
    to be. Raises UsageError when they were trained on differently packed contexts.

    Dictionaries of other tools record at most the size of their contexts and whether these began
    with BOS. Where all are such, the text has the shortest of their contexts, so that none sees a
    position it was not trained on, with BOS if one had it, else the default; and never longer ones
    than ``max_context``, which is the model's.
    """
    packings = {name: one.info.store.get("packing") for name, one in dictionaries.items()}
    found = {PackConfig.remembered(own): n for n, own in packings.items() if own is not None}
    if len(found) > 1:
        names = " and ".join(repr(name) for name in list(found.values())[:2])
        raise UsageError(
            f"{names} were trained on differently packed contexts; evaluate them one by one"
        )
    if found:
        return next(iter(found))
    infos = [dictionary.info for dictionary in dictionaries.values()]
    sizes = [i.context_size for i in infos if i.context_size is not None and i.context_size > 1]
    begun = [i.prepend_bos for i in infos if i.prepend_bos is not None]
    shortest = min(sizes, default=PackConfig.context_size)
    return PackConfig(
        context_size=shortest if max_context is None else min(shortest, max_context),
        prepend_bos=any(begun) if begun else PackConfig.prepend_bos,
    )


def notes_on_text(dictionaries: Mapping[str, Dictionary], corpus: Mapping[str, Any]) -> list[str]:
    """A sentence for every dictionary that may have been trained on text that is held out now.

    ``corpus`` is the identity of the evaluated corpus. Documents are held out by their names in it,
    so only a training on the same corpus, with at least as much held out, is sure not to have seen
    them. Of a corpus with another name nothing is said.
    """
    trained_on = {n: one.info.corpus for n, one in dictionaries.items()}
    same = {n: own for n, own in trained_on.items() if own.get("name") == corpus["name"]}
    if corpus["part"] != "heldout":
        said = f"{corpus['name']} was not read where it is held out: this text may have been seen"
        return [said] if same else []
    notes = []
    for name, trained in same.items():
        if trained.get("part") not in (None, "train"):
            why = f"on all of {corpus['name']}"
        elif (number(trained.get("heldout_fraction", 1.0)) or 0) < corpus["heldout_fraction"]:
            why = f"with less of {corpus['name']} held out"
        elif trained.get("fingerprint", corpus["fingerprint"]) != corpus["fingerprint"]:
            why = f"on another version of {corpus['name']}"
        else:
            continue
        notes.append(f"dictionary {name!r} was trained {why}: it may have seen this text")
    return notes


def notes_on_weights(dictionaries: Mapping[str, Dictionary], model: LanguageModel) -> list[str]:
    """A sentence for every dictionary that was trained on centred activations, or on other weights
    than this model's."""
    infos, identity = {name: one.info for name, one in dictionaries.items()}, model.identity()
    centred = [name for name, info in infos.items() if info.model.get(CENTRED)]
    others = [name for name, info in infos.items() if info.is_of_other_weights(identity)]
    lacking = "activations whose rows have mean 0: its reconstructions lack the mean"
    notes = [f"dictionary {name!r} was trained on {lacking}" for name in centred]
    weights = f"other weights than those of this {model.name}"
    return notes + [f"dictionary {name!r} was trained on {weights}" for name in others]
