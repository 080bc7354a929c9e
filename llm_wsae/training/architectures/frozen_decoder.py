"""TopK whose decoder stays random: the latents' directions mean nothing, only their firing is
learnt (the Frozen Decoder of Korznikov et al. 2026, arXiv 2602.14111)."""

from llm_wsae.training.architectures.frozen_encoder import Frozen


class FrozenDecoder(Frozen):
    """A baseline."""

    name = "frozen-decoder"
    half = "decoder"


ARCHITECTURE = FrozenDecoder
