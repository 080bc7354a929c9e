"""TopK (Gao et al. 2024): the k largest latents of every row reconstruct it."""

from llm_wsae.sparse.operations import encode_topk
from llm_wsae.training.architecture import Architecture, Batch, Parameters, Step, sparse_step
from llm_wsae.weights.loss_weights import Gamma


class LargestOfRow(Architecture):
    """k active latents in every row, or fewer if fewer are positive."""

    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) and its gradients."""
        codes = encode_topk(batch.product(parameters), min(self.k, self.num_latents))
        unmasked = codes._replace(values=codes.values * batch.mask[:, None])
        active = batch.exact(self.strategy.topk(unmasked, self.k), parameters)
        return sparse_step(active, parameters, batch, metric, self.strategy)


class TopK(LargestOfRow):
    """Of the architectures that choose the largest latents of a row, the one in which all learn."""

    name = "topk"
    has_free_lengths = True

    @classmethod
    def label(cls, level: int | float) -> str:
        return f"k{level}"


ARCHITECTURE = TopK
