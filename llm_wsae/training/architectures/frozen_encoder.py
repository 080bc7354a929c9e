"""TopK whose encoder stays random: what latents read means nothing, only their bias and what they
write are learnt (the Frozen Encoder of Korznikov et al. 2026, arXiv 2602.14111)."""

from llm_wsae.training.frozen import Frozen


class FrozenEncoder(Frozen):
    """A baseline. Exactly k active latents in every row, or fewer if fewer are positive."""

    name = "frozen-encoder"
    half = "encoder"


ARCHITECTURE = FrozenEncoder
