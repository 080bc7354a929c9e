"""What the sparse operations take and return: codes, gradients, weights with Adam's moments.

Codes say which latents are active in each row, and how much. ``Codes`` has the same number of slots
in every row and is what users see. ``RaggedCodes`` is what the operations work on: rows may differ
in length, as they do in ReLU, JumpReLU and BatchTopK.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.machine.hardware import DeferredScalar

T = TypeVar("T")
_FEWEST = 64
_SPARE = 1.25  # of what the longest row needed: the next batch's may need more

BETAS = (0.9, 0.999)  # of Adam, as in torch.optim.Adam
EPSILON = 1e-15
"""Of Adam. torch's 1e-8 is no small number beside the gradients of a loss that is a mean over
dimensions, where its weights are steep: dimensions that count little would hardly move."""
SMALLEST_NORM = 1e-8  # a decoder row is divided by its norm, or by this if it is smaller

Rows = Float[Tensor, "batch d_in"]
Weights = Float[Tensor, "d_sae d_in"]  # of the encoder or the decoder: a row for each latent
PerLatent = Float[Tensor, " d_sae"]
PerDimension = Float[Tensor, " d_in"]
PerSlot = Float[Tensor, " active"]
Gradients = tuple[Tensor, Tensor, Tensor]
"""By the encoder [d_sae, d_in], the decoder [d_sae, d_in] and the encoder's bias [d_sae]."""


class Codes(NamedTuple):
    """The active latents of a batch. A value of 0 is an unused slot, whichever latent it names."""

    indices: Int[Tensor, "batch k"]  # latent numbers, int64, in no particular order
    values: Float[Tensor, "batch k"]  # latent activations, ≥ 0


class RaggedCodes(NamedTuple):
    """The active latents of all rows end to end; a value of 0 is an unused slot."""

    indices: Int[Tensor, " active"]  # latent numbers, int64, in no order within a row
    values: PerSlot  # latent activations, ≥ 0
    offsets: Int[Tensor, " batch_and_one"]  # row i owns offsets[i] up to offsets[i + 1], int64

    @property
    def num_rows(self) -> int:
        """Of the batch, those without any slot included."""
        return len(self.offsets) - 1

    def rows(self) -> Int[Tensor, " active"]:
        """The row that each slot belongs to."""
        numbers = torch.arange(self.num_rows, device=self.offsets.device)
        # told the size of the output, the device need not be asked for it
        return numbers.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))


class Product(NamedTuple):
    """What the encoder multiplies: rows, encoder and bias in one dtype, that of the product."""

    x: Rows
    encoder: Weights
    bias: PerLatent

    def pre(self) -> Float[Tensor, "batch d_sae"]:
        """Pre-activations x·encoderᵀ + bias."""
        return torch.addmm(self.bias, self.x, self.encoder.T)

    def tiles(self, rows: int) -> list["Product"]:
        """Parts of at most ``rows`` rows; without any row, one empty part."""
        return [self._replace(x=tile) for tile in self.x.split(rows)]


class SubsetGradients(NamedTuple):
    """Gradients by the weights of some latents only."""

    latents: Int[Tensor, " some"]  # each at most once
    encoder: Float[Tensor, "some d_in"]
    decoder: Float[Tensor, "some d_in"]
    bias: Float[Tensor, " some"]

    def places(self, d_sae: int, dtype: torch.dtype) -> Int[Tensor, " d_sae"]:
        """Which of the rows is each latent's, or -1."""
        places = torch.full((d_sae,), -1, dtype=dtype, device=self.latents.device)
        places[self.latents] = torch.arange(len(self.latents), dtype=dtype, device=places.device)
        return places

    def add_to(self, sums: Gradients) -> None:
        """Add them to the gradients by the weights of all latents."""
        for dense, part in zip(sums, self[1:], strict=True):
            dense.index_add_(0, self.latents, part)


class SparseGradients(NamedTuple):
    """What the gradients by the latents' weights are sums of: a term for every active latent."""

    codes: RaggedCodes
    x: Rows  # float32, or rounded to bfloat16; the sums are float32 all the same
    output_gradient: Float[Tensor, "batches d_in"]
    """By the reconstructions, in the dtype of ``x``. There may be several of each row, all of one
    kind before all of the next, as there are rows of the codes: row i belongs to x[i mod batch]."""
    by_value: PerSlot  # by each active pre-activation, as of ``value_gradients``
    more: SubsetGradients | None = None  # what else some latents get


class Latents(NamedTuple):
    """All latents' weights, in place of which a step puts new ones, and their moments in Adam."""

    encoder: Weights
    decoder: Weights
    encoder_mean: Weights
    decoder_mean: Weights
    encoder_square: Weights
    decoder_square: Weights
    encoder_fast: Weights | None = None  # gets the new encoder, in its own dtype


class RawRows(NamedTuple):
    """What leads to the raw rows v and e of latents whose rows are v/L and L·e, where L is the norm
    of v (see ``training.arm.Optimiser``)."""

    lengths: PerLatent  # L, updated in place
    bias: PerLatent  # the encoder's, L times a raw one; it is only read


class Reconstruction(NamedTuple):
    """What a step needs to know about its reconstruction."""

    residual: Rows  # reconstruction − x, each row times its weight
    output_gradient: Rows  # the residual, each column times its weight, in the dtype asked for
    by_value: PerSlot  # gradient by each active pre-activation, as of ``value_gradients``
    row_errors: Float[Tensor, " batch"]  # Σ over columns of residual · output_gradient


def ragged(codes: Codes) -> RaggedCodes:
    """The same codes end to end; views, where indices and values are contiguous."""
    batch, k = codes.indices.shape
    offsets = torch.arange(batch + 1, device=codes.indices.device) * k
    indices, values = (part.reshape(-1).contiguous() for part in codes)
    return RaggedCodes(indices, values, offsets)


def padded(codes: RaggedCodes) -> Codes:
    """The same codes with as many slots in every row as the fullest needs, at least 1."""
    counts, rows = codes.offsets.diff(), codes.rows()
    slots = torch.arange(len(rows), device=rows.device) - codes.offsets[rows]
    shape = (len(counts), int(F.pad(counts, (0, 1), value=1).max()))
    indices, values = (part.new_zeros(shape).index_put((rows, slots), part) for part in codes[:2])
    return Codes(indices, values)


def joined(parts: Sequence[RaggedCodes]) -> RaggedCodes:
    """The rows of all parts, one part after the other."""
    starts = accumulate((len(part.indices) for part in parts[:-1]), initial=0)
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
    return RaggedCodes(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.values for part in parts]),
        torch.cat([parts[0].offsets[:1], *offsets]),
    )


def keep_slots(codes: RaggedCodes, keep: Bool[Tensor, " active"]) -> RaggedCodes:
    """The codes with only the slots for which ``keep`` is true."""
    before = offsets_of(keep)
    return RaggedCodes(codes.indices[keep], codes.values[keep], before[codes.offsets])


def offsets_of(counts: Int[Tensor, " rows"] | Bool[Tensor, " rows"]) -> Int[Tensor, " more"]:
    """Where each row begins, and where the last one ends, from how long they are."""
    return F.pad(counts.cumsum(0), (1, 0))


def exact_dtype(x: Tensor) -> torch.dtype:
    """Of sums: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class SlotCapacity:
    """How many slots a row gets on a GPU, which waiting for their number would leave idle: as many
    as the last rows suggest. Whether they were enough is read while it has other work; if not, the
    step is repeated."""

    def __init__(self) -> None:
        self.slots = _FEWEST
        self._longest: DeferredScalar | None = None

    def report(self, counts: Int[Tensor, " rows"]) -> None:
        """Take in how many entries the rows have, including those without a slot."""
        self._longest = DeferredScalar(F.pad(counts, (0, 1)).max())

    def enough(self) -> bool:
        """Whether all entries had a slot. If not, the next ones will, if they are as many."""
        if self._longest is None:
            return True
        longest, self._longest = int(self._longest.read()), None
        fits = longest <= self.slots
        self.slots = max(_FEWEST, 1 << int(_SPARE * longest).bit_length())
        return fits

    def retry(self, compute: Callable[[], T], all_agree: Callable[[bool], bool]) -> T:
        """What ``compute`` returns once all entries, in all processes, had a slot. On a CPU nothing
        is reported."""
        while True:
            result = compute()
            if self._longest is None or all_agree(self.enough()):
                return result
