"""Do dictionaries and a model belong together?"""

from collections.abc import Mapping
from typing import Any

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import CENTRED
from llm_wsae.errors import UsageError
from llm_wsae.model.language_model import LanguageModel


def check_fit(dictionaries: Mapping[str, Dictionary], model: LanguageModel, verb: str) -> None:
    """Raise UsageError if there is no dictionary to ``verb``, or one does not fit the model."""
    if not dictionaries:
        raise UsageError(f"there is no dictionary to {verb}; name at least one")
    for name, dictionary in dictionaries.items():
        model.check_site(dictionary.site)
        if dictionary.d_in != model.d_model:
            raise UsageError(
                f"dictionary {name!r} has {dictionary.d_in} dimensions, but {model.name} has "
                f"{model.d_model}; {verb} it on the model it was trained on"
            )


def notes_on_text(dictionaries: Mapping[str, Dictionary], corpus: Mapping[str, Any]) -> list[str]:
    """A sentence for every dictionary that was trained on text which is held out now.

    ``corpus`` is the identity of the one that is measured on. A document is held out by its name in
    the corpus, so only training on the same corpus, with as much of it held out, is sure to have
    left it out. Nothing is said of a corpus with another name.
    """
    notes = []
    for name, dictionary in dictionaries.items():
        trained = dictionary.info.corpus
        if corpus["part"] != "heldout" or trained.get("name") != corpus["name"]:
            continue
        if trained.get("part") not in (None, "train"):
            why = f"on all of {corpus['name']}"
        elif trained.get("heldout_fraction", 1.0) < corpus["heldout_fraction"]:
            why = f"with less of {corpus['name']} held out"
        elif trained.get("fingerprint", corpus["fingerprint"]) != corpus["fingerprint"]:
            why = f"on another version of {corpus['name']}"
        else:
            continue
        notes.append(f"dictionary {name!r} was trained {why}: it may have seen this text")
    return notes


def notes_on_weights(dictionaries: Mapping[str, Dictionary], model: LanguageModel) -> list[str]:
    """A sentence for every dictionary that was trained on other weights than the model's, or on a
    stream that was treated."""
    own = model.identity()["weights_sha256"]
    centred = [
        f"dictionary {name!r} was trained on a stream whose rows have mean 0: what it reconstructs "
        "lacks their mean"
        for name, dictionary in dictionaries.items()
        if dictionary.info.model.get(CENTRED)
    ]
    return centred + [
        f"dictionary {name!r} was trained on other weights than these of {model.name}"
        for name, dictionary in dictionaries.items()
        if dictionary.info.model.get("weights_sha256") not in (None, own)
    ]
