"""Several stores as one: all rows of the first, then those of the second, and so on.

Machines that share no folder each harvest other text into a store of their own. Nothing is copied:
rows are read where they are, and the statistics of all rows are merged from those of the stores.
"""

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import numpy as np

from llm_wsae.artifact.artifact import differences
from llm_wsae.data.manifest import Manifest
from llm_wsae.data.packing import NO_DOCUMENT, Contexts
from llm_wsae.data.shard_reader import RowShard
from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site
from llm_wsae.outside import number
from llm_wsae.statistics.moments import Statistics

CHANCE = 0.01
"""Share of a store's documents that may be in another one: every large corpus repeats some."""
_COMPARED = 32  # first tokens of a document


def open_stores(folders: Sequence[Path | str]) -> ActivationStore:
    """Open a store, or several of one model, with the same sites and settings, as one.

    Rows, and so batches, are byte for byte those of one store with the rows of all, in the order of
    the folders. The statistics are merged in float64: numbers of rows, extremes and massive rows
    are those of one harvest, moments differ by rounding, and the sample is another one, as uniform.

    Raises UsageError for no store, or one that is named twice; LlmWsaeError if a store is
    unfinished, does not fit the first, is of another part of its corpus or holds the same text as
    another.
    """
    places = [Path(folder).resolve() for folder in folders]
    if not places:
        raise UsageError("name at least one activation store")
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{folder} is listed twice; name each store once")
    stores = [ActivationStore.open(folder) for folder in folders]
    if len(stores) == 1:
        return stores[0]
    for store in stores[1:]:
        _check_fit(store, stores[0])
    for pair in combinations(stores, 2):
        _check_texts(*pair)
    return StoresInTurn(stores)


class StoresInTurn(ActivationStore):
    """Several stores, read one after the other; ``open_stores`` makes one."""

    def __init__(self, stores: Sequence[ActivationStore]):
        manifests = [store.manifest for store in stores]
        super().__init__(stores[0].folder, _joined(manifests))
        self.stores = stores
        self._first_shards = list(accumulate((len(m.shards) for m in manifests), initial=0))
        # a section is at most of one document, and the next one counts once it has begun
        sections = [m.shards[-1].next[0] + 1 for m in manifests]
        self._documents_before = list(accumulate(sections, initial=0))

    def statistics(self, site: Site) -> Statistics:
        """The statistics of all rows of a site. Raises as those of one store do."""
        first, *others = (store.statistics(site) for store in self.stores)
        for other in others:
            first.merge(other)
        return first

    def evidence(self, site: Site, need: str) -> tuple[Path, dict[str, Any]]:
        """Beside what was measured of the first store alone."""
        path, rows = super().evidence(site, need)
        return path.with_name(f"{site}.{need}.{rows['rows'][:16]}.safetensors"), rows

    def row_shards(self, site: Site) -> list[RowShard]:
        """The files of a site's rows, in their order. Raises UsageError if the stores lack it."""
        return [shard for store in self.stores for shard in store.row_shards(site)]

    def identity(self, site: Site) -> dict[str, Any]:
        """JSON values that identify a site's rows in this order, wherever the stores are."""
        digests = [store.identity(site)["sha256"] for store in self.stores]
        whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        return {**super().identity(site), "sha256": whole, "stores": len(digests)}

    def _load_tokens(self, shard: int) -> Contexts:
        place = bisect.bisect_right(self._first_shards, shard) - 1
        contexts = self.stores[place].contexts(shard - self._first_shards[place])
        before = self._documents_before[place]
        document = np.where(
            contexts.document >= 0, contexts.document + np.int32(before), NO_DOCUMENT
        )
        return contexts._replace(
            document=document.astype(np.int32),
            headers={number + before: header for number, header in contexts.headers.items()},
        )


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    """All shards of all stores; their files are found by ``row_shards`` alone."""
    return replace(
        manifests[0],
        corpus=_corpus_of([manifest.corpus for manifest in manifests]),
        num_contexts=sum(manifest.num_contexts for manifest in manifests),
        shards=[shard for manifest in manifests for shard in manifest.shards],
        statistics={},
    )


def _corpus_of(corpora: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All texts as one corpus, named as ``Corpus.open`` names it: ``a+b``.

    Documents are held out by their names. So the held-out part of ``a+b`` is held out of each
    store.
    """
    names, prints = (
        "+".join(dict.fromkeys(str(corpus.get(key)) for corpus in corpora))
        for key in ("name", "fingerprint")
    )
    least = min(number(corpus.get("heldout_fraction")) or 0.0 for corpus in corpora)
    return {**corpora[0], "name": names, "fingerprint": prints, "heldout_fraction": least}


def _check_fit(store: ActivationStore, first: ActivationStore) -> None:
    """Raises LlmWsaeError unless rows of both can be trained on together."""
    owners = ("the first store", "this one")
    if clauses := differences(_in_common(first.manifest), _in_common(store.manifest), owners):
        raise LlmWsaeError(
            f"{store.folder} does not fit {first.folder} ({clauses}); use stores of one model with "
            "the same sites and settings, and the same --part of their texts"
        )


def _in_common(manifest: Manifest) -> dict[str, Any]:
    """What stores must have in common. A model may have several names, and how many contexts go
    through it at a time depends on the machine."""
    return {
        "model": {key: manifest.model[key] for key in ("weights_sha256", "dtype")},
        "part": manifest.corpus.get("part"),  # what was held out of one would be trained on
        **{name: getattr(manifest, name) for name in ("sites", "dtype", "d_in", "bos_token_id")},
        "packing": manifest.packing,
    }


def _check_texts(one: ActivationStore, other: ActivationStore) -> None:
    """Raises LlmWsaeError if two stores hold the same text, as far as this can be told.

    They do if both begin the same part of a corpus, or if more than ``CHANCE`` of the documents of
    one are in the other: with the same name and the same first tokens.
    """
    what = ""
    if one.manifest.corpus == other.manifest.corpus:
        what = f"the beginning of {one.manifest.corpus['name']}"
    else:
        mine, theirs = ({digest for _, digest in _documents(store)} for store in (one, other))
        shared, fewest = mine & theirs, min(len(mine), len(theirs))
        if len(shared) > CHANCE * fewest:
            name = next(name for name, digest in _documents(one) if digest in shared)
            what = f"{len(shared):,} documents, such as {name!r}"
    if what:
        raise LlmWsaeError(
            f"{one.folder} and {other.folder} hold the same text ({what}), whose rows would count "
            "twice; harvest another text for one of them"
        )


def _documents(store: ActivationStore) -> Iterator[tuple[str, bytes]]:
    """Of every document that begins in the store, the name, and a digest of it and the first
    tokens."""
    for shard in range(len(store.manifest.shards)):
        contexts = store.contexts(shard)
        ids, document = contexts.ids.ravel(), contexts.document.ravel()
        begins = (contexts.offset.ravel() == 0) & (document != NO_DOCUMENT)
        for at in np.flatnonzero(begins).tolist():
            own = document[at : at + _COMPARED] == document[at]
            name = str(contexts.headers.get(int(document[at]), {}).get("name"))
            text = name.encode(errors="replace") + ids[at : at + _COMPARED][own].tobytes()
            yield name, hashlib.blake2b(text, digest_size=8).digest()
