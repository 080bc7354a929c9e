"""The covariance sums of a store's rows, which every whitening starts from: measured when a harvest
ends, and kept in the store.

They leave out massive rows. Which rows those are depends on the median norm, and so is known only
when all rows are there: this is one more pass over them.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.shard_reader import RowReader
from llm_wsae.data.shuffling import SiteRows
from llm_wsae.data.stored_measurement import StoredMeasurement
from llm_wsae.machine.processes import Processes, join, leads
from llm_wsae.model.site import Site
from llm_wsae.statistics.second_moment import SecondMoment

_PARTS = 16  # of the rows; as many processes at most share the work
_ROWS_AT_ONCE = 16_384


@runtime_checkable
class _Store(SiteRows, Protocol):
    num_rows: int

    @property
    def stores(self) -> Sequence["_Store"]: ...

    def reader(self, site: Site) -> RowReader: ...


def second_moment_of(store: _Store, site: Site) -> SecondMoment:
    """The covariance sums of all usual rows of a site. Where the store does not hold them, one pass
    measures them, and they are kept.

    The processes of this run divide the rows. What they sum is merged in the order of the rows, so
    that it does not depend on their number.
    """
    kept, processes = StoredMeasurement(store, site, "second_moment"), join()
    tensors = kept.read_tensors() or _added_up(store, site)
    if processes.lead(lambda: tensors is not None):
        if tensors is not None:
            return SecondMoment.from_tensors(tensors)
        processes = Processes()  # this one does not see the file yet: it measures for itself
    found = SecondMoment(store.d_in)
    mine = _sums_of_parts(store, site, range(processes.rank, _PARTS, processes.size))
    for _ in range(0, _PARTS, processes.size):
        for part in processes.gather(next(mine, None)):
            if part is not None:
                found.merge(part)
    kept.write_tensors(found.to_tensors())
    return found


def _sums_of_parts(store: _Store, site: Site, parts: Sequence[int]) -> Iterator[SecondMoment]:
    """The sums over each of these parts of the rows."""
    threshold, reader = store.statistics(site).massive_threshold, store.reader(site)
    ends = [store.num_rows * number // _PARTS for number in range(_PARTS + 1)]
    with tqdm(
        total=sum(ends[part + 1] - ends[part] for part in parts),
        desc="covariance",
        unit="row",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not leads(),
    ) as bar:
        for part in parts:
            found = SecondMoment(store.d_in)
            for start in range(ends[part], ends[part + 1], _ROWS_AT_ONCE):
                rows = reader.rows(start, min(start + _ROWS_AT_ONCE, ends[part + 1])).float()
                found.update(rows[rows.norm(dim=1) <= threshold])
                bar.update(len(rows))
            yield found


def _added_up(store: _Store, site: Site) -> dict[str, Tensor] | None:
    """Of several stores, the sums that each of them holds, together; None unless they are of the
    same rows: usual ones by the threshold of all rows."""
    if len(store.stores) == 1:
        return None
    whole, total = store.statistics(site), SecondMoment(store.d_in)
    for one in store.stores:
        tensors = StoredMeasurement(one, site, "second_moment").read_tensors()
        if tensors is None or not one.statistics(site).same_are_massive(whole):
            return None
        total.merge(SecondMoment.from_tensors(tensors))
    return total.to_tensors()
