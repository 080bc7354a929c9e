"""TopK whose decoder stays random: the latents' directions mean nothing, only their firing is
learnt (the Frozen Decoder of Korznikov et al. 2026, arXiv 2602.14111)."""

from llm_wsae.training.frozen import Frozen


class FrozenDecoder(Frozen):
    """A baseline. Exactly k active latents in every row, or fewer if fewer are positive."""

    name = "frozen-decoder"
    half = "decoder"


ARCHITECTURE = FrozenDecoder
