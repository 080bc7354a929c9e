"""Every firing of a dictionary in a store, by latent: one pass over the rows, onto the disk.

What a page shows of a latent can be chosen while the rows pass by. The edges of a histogram, or the
share of the tokens between two activations, need all firings of the latent at once, and those of
all latents may not fit into memory. So each batch of latents has a file; a firing takes 12 bytes.
With 32 active latents a row that is a third of what the row itself takes at 576 dimensions in
bfloat16.
"""

import functools
import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.atomic_folder import replacing
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import load_own_tensors, save_own_tensors, sha256, write_error
from llm_wsae.inspecting.firings import not_massive
from llm_wsae.outside import mapping
from llm_wsae.pages.collecting import ROWS_AT_ONCE

MOST_CORRELATED = 1 << 23
"""The most firings from which the correlations between latents are computed."""
_FIRING = np.dtype([("latent", "<i4"), ("row", "<i4"), ("value", "<f4")])
_SUMS = "sums.safetensors"


class FiringsByLatent:
    """The firings of a dictionary, opened for reading one batch of latents after another.

    Massive rows count as silent, and not at all in correlations with dimensions.
    """

    def __init__(self, folder: Path, d_sae: int, at_once: int, num_rows: int):
        """``at_once`` latents share a file; ``num_rows`` were looked at. Raises LlmWsaeError if a
        file is missing or damaged."""
        self._folder, self._d_sae, self._at_once = folder, d_sae, at_once
        self._num_rows = num_rows
        self._way_out = f"delete {folder} and run the same command again"
        what = "sums of a pass over a store"
        tensors, facts = load_own_tensors(folder / _SUMS, what, self._way_out)
        self._sums = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._digests = mapping(facts.get("firings"))

    @classmethod
    def of(
        cls, store: ActivationStore, dictionary: Dictionary, num_rows: int, at_once: int, out: Path
    ) -> "FiringsByLatent":
        """Those in the folder ``out``, where one pass over the rows puts them if it is not there.

        Raises LlmWsaeError if the rows cannot be read or the files cannot be written; the folder is
        complete or absent.
        """
        if not out.is_dir():
            with replacing(out, lambda folder: None) as new:
                new.mkdir()
                _write(store, dictionary, num_rows, at_once, new)
        return cls(out, dictionary.d_sae, at_once, num_rows)

    def batch(self, number: int) -> list[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """Of each latent of a batch: the rows on which it fires, ascending, and its activations."""
        found = self._read(number)
        found = found[np.argsort(found["latent"], kind="stable")]  # rows stay in their order
        first = number * self._at_once
        latents = np.arange(first, min(first + self._at_once, self._d_sae) + 1)
        edges = np.searchsorted(found["latent"], latents)
        return [
            (found["row"][start:stop], found["value"][start:stop])
            for start, stop in pairwise(edges.tolist())
        ]

    def with_dimensions(
        self, number: int, totals: Float[np.ndarray, " latents"], squares: np.ndarray
    ) -> tuple[Float[np.ndarray, "latents d_in"], Float[np.ndarray, "latents d_in"]]:
        """Pearson correlation and cosine of the activations of a batch of latents with every
        dimension. ``totals`` and ``squares`` are the sums of the activations and their squares."""
        first = number * self._at_once
        products = self._sums["products"][first : first + len(totals)].astype(np.float64)
        centre, x, x2 = (self._sums[name] for name in ("centre", "x", "x2"))
        rows = int(self._sums["rows"])
        covariance = products - np.outer(totals, x) / max(rows, 1)
        spread = _outer(squares - totals**2 / max(rows, 1), x2 - x**2 / max(rows, 1))
        length = _outer(squares, x2 + 2 * centre * x + rows * centre**2)
        return _ratio(covariance, spread), _ratio(products + np.outer(totals, centre), length)

    def with_latents(
        self, number: int
    ) -> tuple[Float[np.ndarray, "latents d_sae"], Float[np.ndarray, "latents d_sae"]]:
        """Pearson correlation and cosine of the activations of a batch of latents with those of
        every latent, on rows evenly spread over the store: all, unless too many latents fire."""
        rows, by_latent, by_row, totals, squares = self._sample
        own = slice(number * self._at_once, (number + 1) * self._at_once)
        both = (by_latent[own] @ by_row).toarray().astype(np.float64)
        spread = _outer((squares - totals**2 / rows)[own], squares - totals**2 / rows)
        pearson = _ratio(both - np.outer(totals[own], totals) / rows, spread)
        return pearson, _ratio(both, _outer(squares[own], squares))

    @functools.cached_property
    def _sample(self) -> tuple[int, csr_matrix, csr_matrix, np.ndarray, np.ndarray]:
        """Number of sampled rows; the codes on them by latent and by row; sums of the activations
        of each latent, and of their squares."""
        batches = range(-(-self._d_sae // self._at_once))
        firings = sum(self._path(number).stat().st_size for number in batches) // _FIRING.itemsize
        stride = max(1, -(-firings // MOST_CORRELATED))
        rows = -(-self._num_rows // stride)
        parts = (self._read(number) for number in batches)
        every = np.concatenate([part[part["row"] % stride == 0] for part in parts])
        place = (every["latent"], every["row"] // stride)
        by_latent = csr_matrix((every["value"], place), shape=(self._d_sae, rows))
        totals, squares = (
            np.asarray(one.sum(1, dtype=np.float64)).ravel()
            for one in (by_latent, by_latent.multiply(by_latent))
        )
        return rows, by_latent, by_latent.T.tocsr(), totals, squares

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.firings"

    def _read(self, number: int) -> np.ndarray:
        path = self._path(number)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self._digests.get(path.name):
            raise LlmWsaeError(f"{path} is damaged: its checksum does not match; {self._way_out}")
        return np.frombuffer(data, dtype=_FIRING)


class Example(NamedTuple):
    """A context to show of a latent, and the group for which it was chosen."""

    row: int
    """Its firing that counts."""
    lower: float
    """The least activation of the group; −1 for the strongest contexts."""
    upper: float
    """The largest one."""
    share: float
    """Of all tokens, those with such an activation; −1 for the strongest contexts."""


def choose(
    rows: Int[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    context: Int[np.ndarray, " rows"],
    positions: int,
    top: int,
    intervals: int,
    per_interval: int,
    seed: int,
) -> Iterator[Example]:
    """The ``top`` strongest contexts of a latent that fires on ``rows``; then, the highest first,
    random ones of equal intervals between 0 and its largest activation. No context comes twice in
    a group. ``context`` is that of every row, ``positions`` the number of tokens.
    """
    if len(rows) == 0:
        return
    draw, largest = np.random.default_rng(seed), float(values.max())
    for row in _of_different_contexts(rows[np.argsort(-values, kind="stable")], context, top):
        yield Example(row, -1.0, largest, -1.0)
    edges = np.linspace(0, largest, intervals + 1).tolist()
    for lower, upper in reversed(list(pairwise(edges))):
        inside = (values >= lower) & (values <= upper)
        silent = 0 if lower else positions - len(values)
        share = (int(inside.sum()) + silent) / positions
        drawn = draw.permutation(rows[inside])
        for row in _of_different_contexts(drawn, context, per_interval):
            yield Example(row, lower, upper, share)


def _of_different_contexts(rows: np.ndarray, context: np.ndarray, count: int) -> list[int]:
    """The first rows that are of ``count`` different contexts."""
    first = np.unique(context[rows], return_index=True)[1]
    return rows[np.sort(first)[:count]].tolist()


def _write(
    store: ActivationStore, dictionary: Dictionary, num_rows: int, at_once: int, folder: Path
) -> None:
    """One pass over the rows."""
    assert num_rows < 2**31  # what a firing has room for
    reader = store.reader(dictionary.site)
    paths = [folder / f"{n}.firings" for n in range(-(-dictionary.d_sae // at_once))]
    for path in paths:
        path.touch()
    centre = store.statistics(dictionary.site).mean.float()
    sums = _Sums(dictionary.d_sae, centre)
    with tqdm(total=num_rows, desc="rows of the store", unit="row", unit_scale=True) as bar:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, num_rows)
            x = reader.rows(start, stop)
            usable = torch.where(not_massive(dictionary, x.float()))[0]
            x = x[usable].float()
            codes = dictionary.encode_sparse(x)
            place, slot = torch.where(codes.values > 0)
            found = np.empty(len(place), dtype=_FIRING)
            found["latent"] = codes.indices[place, slot].numpy()
            found["row"] = (usable[place] + start).numpy()
            found["value"] = codes.values[place, slot].numpy()
            sums.add(x - centre, place.numpy(), found["latent"], found["value"])
            found = found[np.argsort(found["latent"], kind="stable")]
            edges = np.searchsorted(found["latent"], np.arange(len(paths) + 1) * at_once)
            for path, first, stop in zip(paths, edges[:-1], edges[1:], strict=True):
                _append(path, found[first:stop])
            bar.update(stop - start)
    facts = {"firings": {path.name: sha256(path) for path in paths}}
    save_own_tensors(folder / _SUMS, sums.tensors(), facts)


class _Sums:
    """Sums over the rows, from which the correlations with dimensions follow. The rows are counted
    from a centre, so that nothing is lost where a dimension's mean is far from 0."""

    def __init__(self, d_sae: int, centre: Tensor):
        self._centre = centre
        self._rows = 0
        self._x = np.zeros(len(centre))
        self._x2 = np.zeros(len(centre))
        self._products = np.zeros((d_sae, len(centre)), dtype=np.float32)

    def add(self, x: Tensor, row: np.ndarray, latent: np.ndarray, value: np.ndarray) -> None:
        """Centred rows and the firings on them."""
        self._rows += len(x)
        self._x += x.sum(0, dtype=torch.float64).numpy()
        self._x2 += x.square().sum(0, dtype=torch.float64).numpy()
        codes = csr_matrix((value, (latent, row)), shape=(len(self._products), len(x)))
        self._products += codes @ x.numpy()

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        arrays = {"x": self._x, "x2": self._x2, "products": self._products}
        rows = torch.tensor(self._rows)
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
            "rows": rows,
            "centre": self._centre.double(),
        }


def _append(path: Path, firings: np.ndarray) -> None:
    try:
        with open(path, "ab") as file:
            file.write(firings.tobytes())
    except OSError as error:
        refusal = write_error(path, error)
        assert refusal is not None
        raise refusal from error


def _outer(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """√(one · other) of all pairs; rounding may have made a sum of squares negative."""
    return np.sqrt(np.outer(one.clip(min=0), other.clip(min=0)))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
