"""How large a page will be, from how many latents and examples it is to show."""

from collections.abc import Sequence

MOST_MEGABYTES = 60
EXAMPLES = 10
"""Of each kind (strongest, and from bands), shown for a latent unless told otherwise."""
_FEWEST = 3  # of each kind, before a dictionary is left out rather
_BYTES_A_LATENT, _BYTES_AN_EXAMPLE = 200, 105  # packed: docs/log.md


def most_megabytes(latents: Sequence[int], examples: int, firings: Sequence[int] = ()) -> float:
    """Size of a page if every latent fires often enough to have that many examples.

    ``latents`` are those of each dictionary; ``firings``, if they are known, are the most that each
    has in the rows that are looked at.
    """
    shown = [count * examples for count in latents]
    if firings:
        shown = [min(*both) for both in zip(shown, firings, strict=True)]
    return (sum(latents) * _BYTES_A_LATENT + sum(shown) * _BYTES_AN_EXAMPLE) / 1e6


def what_fits(latents: Sequence[int]) -> tuple[int, int]:
    """How many of the dictionaries, from the first on, and how many examples of each kind, fit onto
    a page; one example of one dictionary if nothing does."""
    for number in range(len(latents), 0, -1):
        for examples in range(EXAMPLES, _FEWEST - 1 if number > 1 else 0, -1):
            if most_megabytes(latents[:number], 2 * examples) <= MOST_MEGABYTES:
                return number, examples
    return 1, 1
