"""What ``inspect`` found about latents and a text, formatted for a terminal."""

from collections.abc import Sequence

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.inspecting.latents import Example, Latent, Word
from llm_wsae.inspecting.sentence import Token
from llm_wsae.terminal import printable

_LEFT, _RIGHT = 56, 32  # characters shown on either side of the marked token
_STRONGEST = 5  # latents shown for each token of a text


def latents_text(dictionary: Dictionary, latents: Sequence[Latent]) -> str:
    """All latents, one paragraph each."""
    return "\n\n".join(_latent(dictionary, latent) for latent in latents)


def sentence_text(tokens: Sequence[Token], latents: Sequence[int]) -> str:
    """Each token with its strongest latents, then where each of ``latents`` fires."""
    names = [f"«{printable(token.token)}»" for token in tokens]
    width = max(map(len, names))
    lines = ["latents that fire, with their activations"]
    for name, token in zip(names, tokens, strict=True):
        shown = [f"{one.latent} {one.activation:.2f}" for one in token.latents[:_STRONGEST]]
        more = len(token.latents) - len(shown)
        shown += [f"and {more} more"] if more else []
        lines.append(f"  {name:<{width}}  {' · '.join(shown) or '—'}")
    for latent in latents:
        fires = [
            f"{name} {one.activation:.2f}"
            for name, token in zip(names, tokens, strict=True)
            for one in token.latents
            if one.latent == latent
        ]
        lines.append(f"latent {latent}: {' · '.join(fires) if fires else 'silent'}")
    return "\n".join(lines)


def _latent(dictionary: Dictionary, latent: Latent) -> str:
    site, name = dictionary.info.site, printable(dictionary.info.name)
    lines = [f"latent {latent.latent} of {name} at {site}"]
    if firing := latent.firing:
        share, looked = 100 * firing.density, firing.rows_looked_at
        mean = firing.mean_activation
        lines.append(
            f"density     {share:.3g} % of {looked:,} rows, evenly spread over the store"
            + ("" if mean is None else f"; {mean:.2f} on average where it fires")
        )
    if latent.promotes is not None and latent.suppresses is not None:
        lines.append(f"promotes    {_words(latent.promotes)}")
        lines.append(f"suppresses  {_words(latent.suppresses)}")
    near = " · ".join(f"{n.latent} {n.cosine:.2f}" for n in latent.neighbours)
    lines.append(f"nearest     {near}  (latent, cosine)")
    total = dictionary.d_in
    lines.append(f"writes to   effectively {latent.effective_dimensions:.1f} of {total} dimensions")
    lines.append(f"            {'dimension':>9}{'decoder':>10}{'share %':>10}{'weight γ':>10}")
    for d in latent.dimensions:
        gamma = "—" if d.gamma is None else f"{d.gamma:.3f}"
        lines.append(
            f"            {d.dimension:>9}{d.decoder:>10.4f}{100 * d.share:>10.2f}{gamma:>10}"
        )
    if latent.firing:
        lines += _contexts(latent.firing.searched_all, latent.examples)
    return "\n".join(lines)


def _words(words: Sequence[Word]) -> str:
    return " · ".join(f"«{printable(word.token)}» {word.logit:+.2f}" for word in words)


def _contexts(searched_all: bool, examples: Sequence[Example]) -> list[str]:
    if not examples:
        where = "in this store" if searched_all else "on the rows where it comes closest to firing"
        return [f"contexts    none: it does not fire {where}"]
    lines = ["contexts    its largest activations, one per context"]
    for example in examples:
        text = example.text
        before, token, after = map(printable, (text.before, text.token, text.after))
        before = before if len(before) <= _LEFT else "…" + before[1 - _LEFT :]
        after = after if len(after) <= _RIGHT else after[: _RIGHT - 1] + "…"
        lines.append(f"{example.activation:>10.2f}  {before:>{_LEFT}}«{token}»{after}")
    return lines
