"""The covariance sums of a store's rows, which every whitening starts from: measured when a harvest
ends, and kept in the store.

They leave out massive rows. Which rows those are depends on the median norm, and so is known only
when all rows are there: this is one more pass over them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.store import ActivationStore
from llm_wsae.data.stored_measurement import StoredMeasurement
from llm_wsae.data.stores import StoresInTurn
from llm_wsae.machine.processes import Processes, Several, collectives, join, leads
from llm_wsae.model.site import Site
from llm_wsae.statistics.second_moment import SecondMoment

_PARTS = 16  # of the rows; as many processes at most share the work
_ROWS_AT_ONCE = 16_384


def second_moment_of(
    store: ActivationStore, site: Site, processes: Processes | None = None
) -> SecondMoment:
    """The covariance sums of all usual rows of a site. Where the store does not hold them, one pass
    measures them, and they are kept.

    The processes of this run, unless others are named, divide the rows. What they sum is merged in
    the order of the rows, so that it does not depend on their number.
    """
    kept, processes = StoredMeasurement(store, site, "second_moment"), processes or join()
    tensors = kept.read_tensors() or _added_up(store, site)
    if processes.lead(lambda: tensors is not None):
        if tensors is not None:
            return SecondMoment.from_tensors(tensors)
        processes = Processes()  # this one does not see the file yet: it measures for itself
    found = SecondMoment(store.d_in)
    if isinstance(processes, Several):
        rank, size = processes.rank, processes.size
        mine = _sums_of_parts(store, site, range(rank, _PARTS, size))
        with collectives(processes, torch.device("cpu")) as connected:
            for first in range(0, _PARTS, size):
                own = next(mine, SecondMoment(store.d_in))
                processes.meet()  # however long that took
                for number in range(min(size, _PARTS - first)):
                    part = own if number == rank else SecondMoment(store.d_in)
                    found.merge(part.share(connected.sum_))
    else:
        for part in _sums_of_parts(store, site, range(_PARTS)):
            found.merge(part)
    kept.write_tensors(found.to_tensors())
    return found


def _sums_of_parts(
    store: ActivationStore, site: Site, parts: Sequence[int]
) -> Iterator[SecondMoment]:
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


def _added_up(store: ActivationStore, site: Site) -> dict[str, Tensor] | None:
    """Of several stores, the sums that each of them holds, together; None unless they are of the
    same rows: usual ones by the threshold of all rows."""
    if not isinstance(store, StoresInTurn):
        return None
    whole, total = store.statistics(site), SecondMoment(store.d_in)
    for one in store.stores:
        tensors = StoredMeasurement(one, site, "second_moment").read_tensors()
        if tensors is None or not one.statistics(site).same_are_massive(whole):
            return None
        total.merge(SecondMoment.from_tensors(tensors))
    return total.to_tensors()
