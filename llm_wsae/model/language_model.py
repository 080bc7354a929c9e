"""The language model that is explained: activations at sites, logits, logits with the activation
at a site replaced, embeddings, identity. Names and meanings are TransformerLens'.

The forward passes are the model's own. They give the numbers of ``hidden_states``: exactly, or up
to rounding if ``load`` put faster norms, gates and attention into the model.
"""

import copy
import functools
import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.machine.hardware import DTYPES, choose_device, fast_dtype, name_of
from llm_wsae.model.cpu_modules import (
    PrepackedWeights,
    fuse_norms_and_gates,
    use_short_attention,
)
from llm_wsae.model.forward import Blocks, Head, Unembedding, Visit, find_paths, text_config
from llm_wsae.model.loading import check_causal, load_model
from llm_wsae.model.site import Site
from llm_wsae.model.spread import device_of, is_spread, parameters, weight_of
from llm_wsae.outside import parsing

Ids = Integer[Tensor, "contexts positions"]
Stream = Float[Tensor, "contexts positions d_model"]
Logits = Float[Tensor, "contexts positions vocab"]
SPREAD = "spread"
_SAMPLES = 64  # of a parameter
# Settings that change the computation; each architecture has some of them.
_SETTINGS = (
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "hidden_act",
    "activation_function",
    "sliding_window",
    "use_parallel_residual",
)


class LanguageModel:
    """A causal language model of transformers, frozen and in eval mode. Threads that call its
    methods at once wait for each other; visits, while they are open, see the passes of all threads.

    Attributes: ``hf_model`` and ``tokenizer`` of transformers; ``name`` (Hub id, or the bare name
    of a file or folder), ``revision`` (commit hash or None), ``device``, ``dtype``; ``num_blocks``,
    ``d_model``; ``max_context`` (tokens it can read, None if unlimited); ``bos_token_id`` (or
    None); ``paths`` (where its modules are).
    """

    def __init__(self, hf_model: Any, tokenizer: Any, name: str, revision: str | None = None):
        """Wrap a frozen model in eval mode; use ``load`` or ``from_live``."""
        config = text_config(hf_model)
        self.paths = find_paths(hf_model)
        self.hf_model, self.tokenizer = hf_model, tokenizer
        self.name, self.revision = name, revision
        self.device: torch.device = device_of(hf_model)
        self.dtype: torch.dtype = hf_model.dtype
        self._blocks = Blocks(hf_model, self.paths)
        self._one_pass = threading.RLock()
        self.num_blocks = len(self._blocks)
        self.d_model: int = config.hidden_size
        self._prepacked = PrepackedWeights(hf_model)
        self._head = Head(hf_model, self._blocks, self._prepacked, self.d_model)
        self.max_context: int | None = getattr(config, "max_position_embeddings", None)
        # Ask the tokenizer: configurations often name a BOS that was never used in training.
        source = config if tokenizer is None else tokenizer
        self.bos_token_id: int | None = source.bos_token_id

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        download: bool = True,
    ) -> "LanguageModel":
        """Load a model by Hub id, local folder or ``.gguf`` file.

        ``device``: auto (cuda, then mps, then cpu), a torch device name, or spread: over all
        accelerators, then memory, then disk. ``dtype``: float32, bfloat16, float16, or auto, the
        faster of the first two, measured on a CPU. Without ``download``, a model of the Hub is
        taken from the local cache or not at all.

        Raises UsageError for a name, revision, device or dtype that cannot be right, LlmWsaeError
        if the model cannot be fetched or read.
        """
        name, known = str(dtype).removeprefix("torch."), ("auto", *DTYPES)
        if name not in known:
            raise UsageError(f"there is no dtype {name!r}; {nearest(name, known)}")
        place = choose_device("auto" if device == SPREAD else device)
        wanted = fast_dtype(place) if name == "auto" else DTYPES[name]
        parted = device == SPREAD
        hf_model, tokenizer, found, commit = load_model(model, revision, wanted, download, parted)
        if not parted:
            hf_model = hf_model.to(place)
        hf_model.eval().requires_grad_(False)
        use_short_attention(hf_model)
        fuse_norms_and_gates(hf_model)
        with parsing(f"{model} can be loaded but not used"):  # e.g. for a damaged configuration
            made = cls(hf_model, tokenizer, found, commit)
            tokenizer(["a text"], add_special_tokens=False, verbose=False)
            made.logits(torch.zeros(1, 2, dtype=torch.long))
        return made

    @classmethod
    def from_live(
        cls, model: Any, tokenizer: Any = None, name: str | None = None
    ) -> "LanguageModel":
        """Take a live model, of transformers or in a TransformerLens bridge, and its tokenizer; the
        default is the bridge's own (none if only token ids will be used). The model is not
        changed: a copy of its structure shares the weights. One that accelerate has spread over
        devices (``device_map``) is used as it is, and must be in eval mode. Raises UsageError if it
        is not a causal language model, or such a one in training mode."""
        hf_model = live_model(model)
        if tokenizer is None and hf_model is not model:
            tokenizer = model.tokenizer
        if not is_spread(hf_model):  # accelerate's hooks hold on to the modules
            hf_model = share_weights(hf_model)
        elif hf_model.training:
            raise UsageError("the model is in training mode; call its eval() first")
        return cls(hf_model, tokenizer, name or type(hf_model).__name__)

    def check_site(self, site: Site) -> None:
        """Raises UsageError if the model has no such site."""
        site.check(self.num_blocks)
        for point in {site.reads, site.writes}:
            if (why := self._blocks.why_not(point)) is not None:
                raise UsageError(f"{self.name} has no {site}: {why}")

    # no_grad rather than inference_mode: just as fast here, and callers may then change the rows in
    # place or differentiate from them on.
    @torch.no_grad()
    def activations(self, ids: Ids, sites: Sequence[Site]) -> dict[Site, Stream]:
        """The activations at each site, in the model's dtype; nothing after the last site is
        computed. On a CPU the contexts are divided among the cores: a caller's own hooks on
        ``hf_model`` see a few at a time, in several threads; those of ``visiting`` see all at once.

        Raises UsageError for a site that the model lacks or contexts that it cannot read.
        """
        if not sites:
            raise UsageError("there is no site to record at; name at least one")
        ids = self._checked(ids, sites)
        with self._one_pass:
            recorded = self._blocks.record(ids, sites)
        return {site: self._stream(recorded[site], ids, site) for site in sites}

    @torch.no_grad()
    def logits(self, ids: Ids) -> Logits:
        """Next-token logits, in the model's dtype."""
        ids = self._checked(ids, ())
        with self._one_pass:
            return self._blocks.run(ids).logits

    def resume(
        self, ids: Ids, site: Site, hidden: Stream, entrance: Stream | None = None
    ) -> Logits:
        """Logits with ``hidden`` as the activations at ``site``, in which they are differentiable.
        Only what follows is computed; ``ids`` still gives positions and mask. Beside the stream,
        ``entrance`` is the stream at ``site.entrance``, which is computed if it is not given. At
        ``mid`` the block's output becomes hidden + mlp(norm(hidden)); a TransformerLens hook there
        replaces only the norm's input.

        Raises UsageError for a site that the model lacks, LlmWsaeError if the architecture does not
        allow an activation between attention and MLP.
        """
        ids, hidden, entrance = self._resumed(ids, site, hidden, entrance)
        before = None if entrance is None else lambda: entrance
        with self._one_pass, self._blocks.entering(site, lambda: hidden, before):
            return self._blocks.run(ids).logits

    @torch.no_grad()
    def resume_to(
        self,
        ids: Ids,
        sites: Sequence[Site],
        site: Site,
        hidden: Stream,
        entrance: Stream | None = None,
    ) -> dict[Site, Stream]:
        """As ``resume``, up to the activations at later ``sites``."""
        ids, hidden, entrance = self._resumed(ids, site, hidden, entrance)
        ids = self._checked(ids, sites)
        with self._one_pass:
            recorded = self._blocks.record(ids, sites, site, hidden, entrance)
        return {one: recorded[one].to(ids.device) for one in sites}

    def resume_to_end(
        self, ids: Ids, site: Site, hidden: Stream, entrance: Stream | None = None
    ) -> Stream:
        """As ``resume``, up to the last block's output, whose rows ``unembedding`` takes."""
        end = Site(self.num_blocks - 1, "post")
        return self.resume_to(ids, [end], site, hidden, entrance)[end]

    def _resumed(
        self, ids: Tensor, site: Site, hidden: Tensor, entrance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a pass that is resumed takes, on its device."""
        ids = self._checked(ids, (site,))
        if entrance is None and not site.is_of_stream:
            entrance = self.activations(ids, [site.entrance])[site.entrance]
        hidden = hidden.to(self.device, self.dtype)
        return ids, hidden, None if entrance is None else entrance.to(self.device, self.dtype)

    @contextmanager
    def unembedding(self) -> Iterator[Unembedding]:
        """While open, it makes logits of rows of the last block's output, in any thread if
        ``side_by_side``."""
        with self._one_pass, self._head.opened() as unembedding:
            yield unembedding

    @contextmanager
    def prepacked(self) -> Iterator[None]:
        """While open, passes on a CPU are faster, for the memory of a copy of the weights, which
        must not change meanwhile."""
        with self._one_pass:
            self._prepacked.open()
        try:
            yield
        finally:
            with self._one_pass:
                self._prepacked.close()

    @property
    def side_by_side(self) -> bool:
        """Whether it may compute in several threads at once: on one CPU, with no visit open."""
        return self._blocks.side_by_side

    def visiting(self, visits: Sequence[tuple[Site, Visit]]) -> AbstractContextManager[None]:
        """While open, every forward pass gives each visit the activations at its site [contexts,
        positions, d_model] and continues with what it returns, or unchanged if that is None. Raises
        as ``resume`` does."""
        for site, _ in visits:
            self.check_site(site)
        return self._blocks.visiting(visits)

    @functools.cached_property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The token embedding, TransformerLens' ``W_E``."""
        return weight_of(self.hf_model.get_input_embeddings())

    @functools.cached_property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The unembedding, TransformerLens' ``W_U`` (the final norm is not folded in)."""
        return weight_of(self.hf_model.get_output_embeddings()).T

    def identity(self) -> dict[str, str | int | None]:
        """What a manifest records of the model; ``weights_sha256`` and ``dtype`` identify it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.hf_model).__name__,
            "dtype": name_of(self.dtype),
            "num_blocks": self.num_blocks,
            "d_model": self.d_model,
            "weights_sha256": self._fingerprint,
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        """SHA-256 over the name, shape and a sample of every parameter, and the settings that
        change what they compute: of one model the same on any device and in any format."""
        config = text_config(self.hf_model)
        settings = {key: getattr(config, key, None) for key in _SETTINGS}
        found = [(name, list(p.shape), _sample(p)) for name, p in parameters(self.hf_model)]
        shapes = [[name, shape] for name, shape, _ in found]
        head = json.dumps([settings, shapes], sort_keys=True, default=str)
        digest = hashlib.sha256(head.encode())
        digest.update(torch.cat([one for *_, one in found]).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def _checked(self, ids: Tensor, sites: Sequence[Site]) -> Tensor:
        """The ids as the model takes them, after checking the request."""
        for site in sites:
            self.check_site(site)
            if site.is_mlp:
                raise UsageError(
                    f"{site} is a whole MLP, which has no activations of its own; take those of "
                    f"{site.reads} or {site.writes}"
                )
        if ids.numel() == 0:
            raise UsageError(f"{self.name} needs at least one context of one token")
        known = getattr(self.hf_model.get_input_embeddings(), "num_embeddings", math.inf)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= known:
            raise UsageError(
                f"{self.name} has {known} tokens, but was given ids from {low} to {high}; use its "
                "own tokenizer"
            )
        if self.max_context is not None and ids.shape[1] > self.max_context:
            raise UsageError(
                f"contexts of {ids.shape[1]} tokens are too long for {self.name}, "
                f"which reads at most {self.max_context}"
            )
        return ids.to(self.device, torch.long)

    def _stream(self, hidden: Tensor, ids: Tensor, site: Site) -> Tensor:
        if hidden.shape != (*ids.shape, self.d_model):
            way_out = "; use its hook_resid_pre or _post" if site.point == "mid" else ""
            raise LlmWsaeError(
                f"{self.name} keeps a tensor of shape {tuple(hidden.shape)} at {site}, not one "
                f"vector of {self.d_model} per token, which is not supported{way_out}"
            )
        return hidden.to(ids.device)  # where a model is spread, each block has its own


def _sample(parameter: Tensor) -> Tensor:
    """Up to 64 values spread over a parameter [samples], in bfloat16 on the CPU."""
    flat = parameter.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES)
    return flat[::stride][:_SAMPLES].to(torch.bfloat16).cpu()


def scored_positions(
    keep: Bool[Tensor, "contexts positions"],
) -> Bool[Tensor, "contexts positions-1"]:
    """Which positions' predictions count: t does if it is not before the context's first kept
    position and the token that it predicts, t + 1, is kept. A position between them that is not
    kept is scored, too: a replacement before it affects its prediction."""
    begun = keep.cumsum(1) > 0
    return begun[:, :-1] & keep[:, 1:]


def live_model(model: Any) -> Any:
    """The causal language model of transformers that ``model`` is, or that a TransformerLens bridge
    calls. Raises UsageError for anything else."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    hf_model = model.original_model if isinstance(model, TransformerBridge) else model
    if not isinstance(hf_model, PreTrainedModel) or hf_model.get_output_embeddings() is None:
        raise UsageError(
            f"{type(model).__name__} is not a causal language model of transformers (one with a "
            "head over the vocabulary) or a TransformerLens bridge; pass what AutoModelForCausalLM"
            ".from_pretrained or TransformerBridge.boot_transformers returns"
        )
    check_causal(type(hf_model).__name__, hf_model)
    return hf_model


def share_weights(hf_model: nn.Module) -> Any:
    """A copy of the modules, configurations and buffers over the same parameter memory, frozen."""
    memo: dict[int, Any] = {}
    for one in hf_model.parameters():
        # a frozen one as it is: if quantised, it carries more than memory
        frozen = nn.Parameter(one.detach(), requires_grad=False) if one.requires_grad else one
        memo[id(one)] = frozen
    return copy.deepcopy(hf_model, memo).eval()
