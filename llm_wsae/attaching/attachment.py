"""Dictionaries inside a running model, as a context manager::

    with attach(model, dictionary) as attached:
        attached.edit(dictionary.site, Steer(latent=123, strength=8.0))
        ids = model.generate(ids, max_new_tokens=40)

While the block is open, the stream x at the dictionary's site is split, x = x̂ + error with
x̂ = latents · W_dec + b_dec, the latents are edited, and the stream is recombined. With the error,
only the difference that the edits make is added to x, so that a model with a dictionary and no edit
computes exactly the numbers of the model alone.

Rows that the dictionary's training excluded keep the model's stream, as in ``evaluate``, and have
no latents: massive activations, padding, and the first positions of a context, or with ``keep`` the
positions that it excludes.

In a bridge the latents also have a name, ``<site>.hook_sae_acts_post`` as in SAELens, for
``run_with_cache``, ``run_with_hooks`` and ``add_hook``: all latents [contexts, positions, d_sae],
edits included. The model continues with what a hook makes of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.attaching.edits import Edit, Function
from llm_wsae.attaching.splice import Splice
from llm_wsae.attaching.targets import Bridge, target_of, watching
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError, nearest
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes


class Attached:
    """The dictionaries at their sites; what ``attach`` gives.

    Attributes: ``error``, whether what the dictionaries miss is added back; ``keep`` [contexts,
    positions], which positions may be changed (None: as in training; positions after its end
    always may). Both can be set between forward passes.
    """

    def __init__(self, splices: dict[Site, Splice], error: bool, keep: Tensor | None):
        self._splices = splices
        self.error = error
        self.keep = keep

    @property
    def sites(self) -> list[Site]:
        """The sites with a dictionary, in the order of a forward pass."""
        return list(self._splices)

    def edit(self, site: Site | str, *edits: Edit | Function) -> None:
        """Add edits at a site; they act in the order in which they were added.

        An edit is ``Ablate``, ``Clamp``, ``Scale``, ``Steer``, or a function of all latents
        [contexts, positions, d_sae] that returns new ones, or None if it only reads them or changes
        them in place.

        Raises UsageError if no dictionary is attached there, it has no such latent, or positions
        are negative.
        """
        splice = self._splice(site)
        for edit in edits:
            splice.check(edit)
        splice.edits += edits

    def clear(self, site: Site | str | None = None) -> None:
        """Remove the edits at a site, or at all sites."""
        for splice in self._splices.values() if site is None else [self._splice(site)]:
            splice.edits.clear()

    def codes(self, site: Site | str) -> Codes:
        """The active latents of the last forward pass, edits included: indices and values
        [contexts, positions, slots]. Raises UsageError if there was none."""
        codes = self._splice(site).codes
        if codes is None:
            raise UsageError(f"no forward pass has reached {site} yet")
        return codes

    def latents(self, site: Site | str) -> Float[Tensor, "contexts positions d_sae"]:
        """All latents of the last forward pass, dense. Raises as ``codes`` does."""
        codes = self.codes(site)
        d_sae = self._splice(site).dictionary.d_sae
        dense = codes.values.new_zeros(*codes.values.shape[:-1], d_sae)
        return dense.scatter_add(-1, codes.indices, codes.values)

    def _splice(self, site: Site | str) -> Splice:
        known = {str(place): splice for place, splice in self._splices.items()}
        if str(site) not in known:
            raise UsageError(f"no dictionary is attached at {site}; {nearest(str(site), known)}")
        return known[str(site)]


@contextmanager
def attach(
    model: Any,
    dictionaries: Dictionary | Sequence[Dictionary],
    *,
    error: bool = True,
    keep: Bool[Tensor, "contexts positions"] | None = None,
) -> Iterator[Attached]:
    """Attach dictionaries to a model for the duration of a ``with`` block.

    ``model`` is a TransformerBridge (its weights as loaded, neither folded nor centred), a causal
    language model of transformers, or a LanguageModel. When the block ends, also by an error, the
    model is as before. Generation works with all of them, with or without a cache. (The cache of
    TransformerLens 3.9 and 4.3 does not work with transformers 5.24 in most architectures, whether
    or not anything is attached: generate with ``use_past_kv_cache=False``.)

    The model itself is changed within the block, so passes of other threads go through the
    dictionaries too, edits included; give each thread a model of its own, or let them take turns.

    ``error`` adds back what the dictionaries miss. Without it the model continues with the
    reconstruction, and its cross-entropy is what ``evaluate`` reports if ``keep`` is the mask of
    the text's kept positions. With ``keep`` None, each dictionary skips as many positions at the
    beginning of a context as its training did (one if that is not known), and treats later special
    tokens as text.

    Raises UsageError for another kind of model, for two dictionaries at one site (nest two blocks
    instead), or for one that does not fit the model; LlmWsaeError if an architecture does not allow
    a replacement between attention and MLP.
    """
    target = target_of(model)
    chosen = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    splices: dict[Site, Splice] = {}
    for dictionary in sorted(chosen, key=lambda one: one.site):
        site = dictionary.site
        target.check_site(site)
        if site in splices:
            raise UsageError(
                f"two dictionaries belong to {site}; attach one of them, or nest two blocks"
            )
        if dictionary.d_in != target.d_model:
            raise UsageError(
                f"the dictionary for {site} has {dictionary.d_in} dimensions, but {target.name} "
                f"has {target.d_model}; attach it to the model it was trained on"
            )
        splices[site] = Splice(dictionary)
    attached = Attached(splices, error, keep)
    naming: AbstractContextManager[Mapping[Site, Any]] = nullcontext({})
    if isinstance(target, Bridge):
        naming = target.naming(attached.sites)
    with watching(target) as calls, naming as points:

        def visit(splice: Splice, hidden: Tensor) -> Tensor | None:
            return splice.visit(hidden, calls[0], attached.keep, attached.error)

        for site, point in points.items():
            splices[site].point = point
        with target.visiting({site: partial(visit, splice) for site, splice in splices.items()}):
            yield attached
