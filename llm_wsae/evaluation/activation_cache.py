"""The residual stream of the contexts that dictionaries are measured on, kept where there is room.

So the model's part before a site runs once, and, for what is not replaced, the part behind it too.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

_CACHE_BYTES = 1 << 30
_SAME_LOGITS = 0.05  # relative; half precision in another order is far below


class Streams:
    """Activations by site and batch, and the logits that the model makes of them."""

    def __init__(self, model: LanguageModel, batches: Sequence[Tensor]):
        """``batches`` are token ids [contexts, positions]."""
        self._model, self._ids = model, batches
        self._room = _CACHE_BYTES
        self._kept: dict[tuple[Site, int], Tensor] = {}

    def at(self, number: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations of a batch; as many as there is room for are kept, for what comes next."""
        found = {site: self._kept[site, number] for site in sites if (site, number) in self._kept}
        missing = [site for site in sites if site not in found]
        if missing:
            for site, hidden in self._model.activations(self._ids[number], missing).items():
                found[site] = hidden
                self._keep(site, number, hidden)
        return found

    def clean_logits(self, number: int, last: Site, activations: Mapping[Site, Tensor]) -> Tensor:
        """Logits of a batch, made from the activations as those of every variant are, so that a
        perfect splice gives the same numbers. What leaves the last block is kept, too.

        Raises LlmWsaeError for a model whose blocks hand on more than the residual stream.
        """
        ids, end = self._ids[number], Site(self._model.num_blocks - 1, "post")
        if (end, number) in self._kept:
            return self._model.resume(ids, end, self._kept[end, number])
        seen: dict[Site, Tensor] = {}  # the last visit counts: a model's first one is a trial
        with self._model.visiting({end: lambda hidden: seen.update({end: hidden})}):
            logits = self._model.resume(ids, last, activations[last])
        if number == 0:
            self._check_clean(ids, last, logits)
        if seen[end].dtype == self._model.dtype:  # a wider stream would be rounded on its way back
            self._keep(end, number, seen[end])
        return logits

    def _check_clean(self, ids: Tensor, site: Site, logits: Tensor) -> None:
        """Raise LlmWsaeError if the model, entered at the site, is not the model as it is."""
        whole = self._model.logits(ids).float()
        if not (logits.float() - whole).norm() <= _SAME_LOGITS * whole.norm():
            raise LlmWsaeError(
                f"{self._model.name} predicts something else when it is entered at {site} with its "
                "own activations: its blocks hand on more than the residual stream, so its "
                "predictions cannot judge dictionaries there"
            )

    def _keep(self, site: Site, number: int, hidden: Tensor) -> None:
        self._room -= hidden.nbytes
        if self._room >= 0:
            self._kept[site, number] = hidden
