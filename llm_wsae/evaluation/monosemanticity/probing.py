"""Linear probes of concepts, in closed form, for all concepts at once.

A probe's direction is Fisher's discriminant: the inverse of the (slightly regularised) covariance
of the training units, times the difference of the class means. Least squares on the labels gives
the same direction, whatever the share of positives. The probe is tested on the documents of the
other half, by the area under the ROC curve, which needs neither threshold nor intercept. Each half
serves once for training and once for testing.

Sparse probing (Gurnee et al. 2023, arXiv 2305.01610) gives the probe only the best k columns: those
with the largest correlation with the concept, the same order as by the F statistic.

A table holds a number for each column (latent or dimension) and unit: [columns, units], sparse or
dense.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.concepts import Concepts

PROBE_SIZES = (1, 2, 5)
_MAX_ITEMS = 1000  # test units of each class; more would add little certainty
# Share of each column's variance that is added to the covariance's diagonal: it regularises dense
# probes; in sparse ones it only keeps a constant column from causing a division by zero.
RIDGE_DENSE, RIDGE_SPARSE = 1e-2, 1e-4
_TINY = 1e-12


class Split(NamedTuple):
    """Concepts with one half of the documents for training and the other half for testing."""

    positive: Float[Tensor, "units concepts"]
    """1 for training examples."""
    negative: Float[Tensor, "units concepts"]
    """1 for training counterexamples."""
    items: Int[Tensor, "concepts items"]
    """Test units: first ``num_examples`` examples, then counterexamples."""
    counts: Bool[Tensor, "concepts items"]
    """Whether the item counts: concepts have different numbers of test units."""
    num_examples: int

    def test(self, scores: Float[Tensor, "concepts items"]) -> Float[Tensor, " concepts"]:
        """The area under the ROC curve of every concept's scores."""
        n = self.num_examples
        return auroc(scores[:, :n], scores[:, n:], self.counts[:, :n], self.counts[:, n:])


class Exam(NamedTuple):
    """The concepts of one kind of units, with dense probes of a site's activations that were
    trained on one half of the documents."""

    families: list[str]
    split: Split
    directions: Float[Tensor, "d_in concepts"]
    scores: Float[Tensor, "concepts items"]
    """Of the test units; above 0 where a probe predicts an example."""

    def accuracy(self) -> Float[Tensor, " concepts"]:
        """Of the dense probes."""
        return accuracy(self.scores, self.split.counts, self.split.num_examples)


def auroc(
    positive: Float[Tensor, "columns p"],
    negative: Float[Tensor, "columns n"],
    positive_counts: Bool[Tensor, "columns p"],
    negative_counts: Bool[Tensor, "columns n"],
) -> Float[Tensor, " columns"]:
    """Probability that a positive item scores above a negative one; a tie counts half.

    Of each column, only the items marked in ``positive_counts`` and ``negative_counts`` are used;
    NaN where one of them marks none.
    """
    ordered = negative.where(negative_counts, torch.inf).sort(1).values
    sought = positive.contiguous()
    below = torch.searchsorted(ordered, sought)
    # Not above: the negatives come before the infinities, which no finite score reaches.
    not_above = torch.searchsorted(ordered, sought, right=True)
    wins = (below + not_above).double().where(positive_counts, 0.0).sum(1) / 2
    return wins / (positive_counts.sum(1) * negative_counts.sum(1))


def accuracy(
    scores: Float[Tensor, "*_ items"], counts: Bool[Tensor, "*_ items"], num_examples: int
) -> Float[Tensor, "*_"]:
    """Mean share, of examples and of counterexamples, on the right side of 0: the first
    ``num_examples`` items are examples. Only items in ``counts`` count."""
    right = torch.cat([scores[..., :num_examples] > 0, scores[..., num_examples:] <= 0], -1)
    shares = [
        (right & counts)[..., side].sum(-1).double() / counts[..., side].sum(-1)
        for side in (slice(num_examples), slice(num_examples, None))
    ]
    return (shares[0] + shares[1]) / 2


def splits(concepts: Concepts, seed: int) -> list[Split]:
    """Both ways to train on one half and test on the other."""
    return [_split(concepts, train, seed) for train in (concepts.half, ~concepts.half)]


def _split(concepts: Concepts, train: Tensor, seed: int) -> Split:
    trained = concepts.applies & train[:, None]
    tested = (concepts.applies & ~train[:, None]).T
    positive, negative = concepts.positive, concepts.positive.T
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    sides = []
    for side in (tested & negative, tested & ~negative):
        # Up to _MAX_ITEMS of each class, in random order; where there are fewer, the rest is void.
        found = side[:, order].float().sort(dim=1, descending=True, stable=True)
        width = min(_MAX_ITEMS, int(side.sum(1).max())) if side.numel() else 0
        sides.append((order[found.indices[:, :width]], found.values[:, :width] > 0))
    (yes, is_yes), (no, is_no) = sides
    return Split(
        (trained & positive).float(),
        (trained & ~positive).float(),
        torch.cat([yes, no], 1),
        torch.cat([is_yes, is_no], 1),
        yes.shape[1],
    )


def correlations(
    table: Float[Tensor, "columns units"], split: Split
) -> Float[Tensor, "concepts columns"]:
    """Correlation of each column with each concept on the training units; 0 for a constant."""
    n1, n0 = split.positive.sum(0).double(), split.negative.sum(0).double()
    mean1 = (table @ split.positive).double() / n1
    mean0 = (table @ split.negative).double() / n0
    share = n1 / (n1 + n0)
    mean = share * mean1 + (1 - share) * mean0
    square = (table.square() @ (split.positive + split.negative)).double() / (n1 + n0)
    variance = square - mean.square()
    found = (mean1 - mean0) * (share * (1 - share)).sqrt() / variance.clamp(min=_TINY).sqrt()
    return found.where(variance > 1e-6 * square, 0.0).T.float()


def best_columns(
    score: Float[Tensor, "concepts columns"], allowed: Bool[Tensor, " columns"], count: int
) -> Int[Tensor, "concepts count"]:
    """The ``count`` allowed columns of highest score, the best first; -1 where there are fewer."""
    score = score.where(allowed, -torch.inf)
    lack = max(0, count - score.shape[1])
    score = torch.nn.functional.pad(score, (0, lack), value=-torch.inf)
    best = score.topk(count, dim=1)
    return best.indices.where(best.values > -torch.inf, -1)


class SelectedColumns(NamedTuple):
    """Columns that any concept selected, as one dense matrix, and each concept's place in it."""

    columns: Int[Tensor, " n"]
    values: Float[Tensor, "units n_and_one"]
    """The last column is 0 and stands for no column."""
    place: Int[Tensor, "concepts count"]

    @classmethod
    def of(
        cls, table: Float[Tensor, "columns units"], chosen: Int[Tensor, "concepts count"]
    ) -> "SelectedColumns":
        """Take the ``chosen`` columns of a table."""
        columns = chosen[chosen >= 0].unique()
        taken = table.index_select(0, columns)
        dense = taken.to_dense() if taken.is_sparse else taken
        values = torch.nn.functional.pad(dense.T, (0, 1)).contiguous()
        place = torch.searchsorted(columns, chosen.clamp(min=0).contiguous())
        return cls(columns, values, place.where(chosen >= 0, len(columns)))


def sparse_probes(taken: SelectedColumns, split: Split, size: int) -> Float[Tensor, " concepts"]:
    """Area under the ROC curve of probes on each concept's first ``size`` columns."""
    place = taken.place[:, :size]
    trained = ((split.positive + split.negative) > 0).any(1)
    values = taken.values[trained][:, place].double()  # [units, concepts, size]
    yes, no = split.positive[trained].double(), split.negative[trained].double()
    means = [
        torch.einsum("uck,uc->ck", values, one) / one.sum(0)[:, None] for one in (yes, no, yes + no)
    ]
    weight, centred = yes + no, (values - means[2]).permute(1, 0, 2)
    covariance = (centred * weight.T[:, :, None]).mT @ centred / weight.sum(0)[:, None, None]
    direction = _discriminant(covariance, (means[0] - means[1])[:, :, None], RIDGE_SPARSE)
    tested = taken.values[split.items[:, :, None], place[:, None, :]]
    return split.test((tested.double() * direction[:, None, :, 0]).sum(2))


def dense_probes(
    x: Float[Tensor, "units d_in"], split: Split
) -> tuple[Float[Tensor, "d_in concepts"], Float[Tensor, "concepts items"]]:
    """A probe on all dimensions for every concept: its direction, and x · direction − threshold of
    its test units. The threshold is midway between the means of the classes."""
    weight = split.positive + split.negative
    directions = torch.zeros(x.shape[1], weight.shape[1], dtype=torch.float64)
    thresholds = torch.zeros(weight.shape[1], dtype=torch.float64)
    # Concepts that apply to the same units share their covariance.
    masks, which = (weight > 0).unique(dim=1, return_inverse=True)
    for number, mask in enumerate(masks.T):
        mine = which == number
        rows = x[mask].double()
        covariance = torch.cov(rows.T, correction=0)
        yes, no = split.positive[mask][:, mine].double(), split.negative[mask][:, mine].double()
        mean1, mean0 = rows.T @ (yes / yes.sum(0)), rows.T @ (no / no.sum(0))
        directions[:, mine] = _discriminant(covariance, mean1 - mean0, RIDGE_DENSE)
        thresholds[mine] = ((mean1 + mean0) / 2 * directions[:, mine]).sum(0)
    found = directions.float()
    return found, (x @ found - thresholds.float()).T.gather(1, split.items)


def _discriminant(covariance: Tensor, difference: Tensor, ridge: float) -> Tensor:
    """(covariance + ridge · its diagonal)⁻¹ · difference, for one or a batch of them."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    regular = covariance + torch.diag_embed(ridge * variance + _TINY)
    return torch.linalg.solve(regular, difference)
