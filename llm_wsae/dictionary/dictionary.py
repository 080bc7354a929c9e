"""A trained dictionary: encode activations into sparse latents, decode them, save and load.

    latents = sparsity(x · W_enc + b_enc)        ŷ = latents · W_dec + b_dec (+ x · W_skipᵀ)

An autoencoder's ŷ stands for x itself; a transcoder reads what an MLP reads, and its ŷ stands for
what the MLP writes. Centring and scaling were folded into the tensors, so encoding never subtracts
``b_dec`` and takes the model's activations as they are.
"""

import copy
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_wsae.dictionary.folder import INFO, Content, write_folder
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import Sparsity, to_dense
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes, ragged
from llm_wsae.sparse.operations import decode as decode_codes

DENSE_DENSITY = 0.1
"""A latent that fires on a larger share of the rows is dense."""
PRETRAINED = Path(__file__).parents[2] / "checkpoints"
"""The folder of pretrained dictionaries, in a clone."""


class Dictionary(nn.Module):
    """A sparse autoencoder or, at the site of an MLP, a transcoder, of ``d_in`` dimensions and
    ``d_sae`` latents, float32, frozen until ``requires_grad_()`` is called; gradients with respect
    to the input always flow.

    ``info`` says how it was made. ``extras`` holds, on the CPU, what SAELens has no place for: the
    loss weights ``gamma``, [d_in] or [d_in, d_in], and statistics of the training rows (``mean``,
    ``variance``, ``robust_variance``, each [d_in]; a transcoder's are of what it writes).
    ``threshold`` is JumpReLU's, ``W_skip`` a transcoder's affine skip.

    Raises UsageError if the tensors, the sparsity and the site do not fit each other.
    """

    threshold: nn.Parameter | None
    W_skip: nn.Parameter | None

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "encoder_in encoder_sae"],
        W_dec: Float[Tensor, "decoder_sae decoder_in"],
        b_enc: Float[Tensor, " bias_sae"],
        b_dec: Float[Tensor, " bias_in"],
        sparsity: Sparsity,
        info: DictionaryInfo,
        threshold: Float[Tensor, " threshold_sae"] | None = None,
        W_skip: Float[Tensor, "skip_out skip_in"] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        d_in, d_sae = W_enc.shape
        if sparsity.has_threshold != (threshold is not None):
            raise UsageError(
                f"a dictionary of the {sparsity.architecture} architecture "
                f"{'needs a' if sparsity.has_threshold else 'has no'} threshold for each latent"
            )
        if W_skip is not None and not Site.parse(info.site).is_mlp:
            raise UsageError(f"a skip is for transcoders, but {info.site} is not a whole MLP")
        extras = dict(extras or {})
        tensors: dict[str, Tensor | None] = {"W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        tensors |= {"threshold": threshold, "W_skip": W_skip}
        shapes: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_in), "W_skip": (d_in, d_in)}
        shapes |= {"b_enc": (d_sae,), "threshold": (d_sae,)}
        for name, tensor in (*tensors.items(), *extras.items()):
            shape = shapes.get(name, (d_in,))
            allowed = [shape] if name in tensors else [shape, (d_in, d_in)]
            if tensor is not None and tuple(tensor.shape) not in allowed:
                raise UsageError(
                    f"{name} has the shape {list(tensor.shape)}, but W_enc is [{d_in}, {d_sae}], "
                    f"so {name} must be {list(shape)}"
                )
        sparsity.check(d_sae)
        Site.parse(info.site)
        self.W_enc, self.W_dec = _parameter(W_enc), _parameter(W_dec)
        self.b_enc, self.b_dec = _parameter(b_enc), _parameter(b_dec)
        for name, own in (("threshold", threshold), ("W_skip", W_skip)):
            self.register_parameter(name, None if own is None else _parameter(own))
        self.sparsity = sparsity
        self.info = info
        self.extras = {key: tensor.detach().cpu().clone() for key, tensor in extras.items()}
        self.folder: Path | None = None  # where it was loaded from
        self.weights_sha256: str | None = None  # of the file there; None for other tools' folders

    @property
    def d_in(self) -> int:
        """Number of dimensions."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def site(self) -> Site:
        """Where in the model it belongs."""
        return Site.parse(self.info.site)

    def decoder_digest(self) -> str:
        """SHA-256 of the decoder's float32 numbers: what tells that a report is about it."""
        return hashlib.sha256(self.W_dec.detach().cpu().numpy().tobytes()).hexdigest()

    def on_cpu(self) -> "Dictionary":
        """This dictionary if it is on the CPU, otherwise a copy of it there."""
        return self if self.W_enc.device.type == "cpu" else copy.deepcopy(self).cpu()

    def encode_sparse(self, x: Float[Tensor, "*rows d_in"]) -> Codes:
        """The active latents of every row: indices and values ``[*rows, k]``. Raises UsageError for
        rows of another width, LlmWsaeError for NaN or infinity."""
        codes = self._codes(x)
        shape = (*x.shape[:-1], codes.indices.shape[1])
        return Codes(codes.indices.view(shape), codes.values.view(shape))

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """All latents of every row, dense. Raises as ``encode_sparse`` does."""
        return to_dense(self.encode_sparse(x), self.d_sae)

    def decode(
        self,
        latents: Float[Tensor, "*rows d_sae"] | Codes,
        x: Float[Tensor, "*rows d_in"] | None = None,
    ) -> Float[Tensor, "*rows d_in"]:
        """What the latents write; with the rows that were encoded, what the skip adds to it, if
        there is one. Raises UsageError when dense ones have another width, or a skip lacks x."""
        if self.W_skip is not None:
            if x is None:
                raise UsageError("this transcoder has a skip: decode needs the rows x, too")
            through = x.to(self.W_dec.dtype) @ self.W_skip.T
            return self._decode(latents) + through
        return self._decode(latents)

    def _decode(self, latents: Tensor | Codes) -> Tensor:
        if isinstance(latents, Codes):
            *rows, width = latents.indices.shape
            flat = Codes(latents.indices.reshape(-1, width), latents.values.reshape(-1, width))
            return decode_codes(ragged(flat), self.W_dec, self.b_dec).view(*rows, self.d_in)
        if latents.shape[-1] != self.d_sae:
            raise UsageError(
                f"the latents are {latents.shape[-1]} wide, but this dictionary has {self.d_sae}"
            )
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """The reconstruction of every row, in the dictionary's dtype."""
        return self.decode(self.encode_sparse(x), x)

    def save(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the dictionary folder; ``dtype`` is that of the two matrices on disk.

        An older dictionary there is replaced; any other folder is refused. bfloat16 and float16
        round the weights: measure the reloaded dictionary. Raises as ``folder.write_folder`` does.
        """
        weights: dict[str, Tensor] = dict(self.named_parameters())
        write_folder(Path(folder), Content(weights, self.sparsity, self.info, self.extras), dtype)

    @classmethod
    def load(
        cls, folder: Path | str, *, site: str | None = None, device: torch.device | str = "cpu"
    ) -> "Dictionary":
        """Read a dictionary folder, of this package, SAELens, sparsify or dictionary_learning.

        ``site`` is for a foreign folder that names none. Raises UsageError if it names another one,
        LlmWsaeError if it cannot be read or belongs to no site.
        """
        found = reading.read(Path(folder), site)
        try:
            new = cls(
                **found.weights, sparsity=found.sparsity, info=found.info, extras=found.extras
            )
        except (UsageError, ValueError) as error:
            raise LlmWsaeError(f"the dictionary in {folder} cannot be used: {error}") from error
        new.folder, new.weights_sha256 = Path(folder), found.weights_sha256
        return new.to(device)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        sae_id: str | None = None,
        *,
        revision: str | None = None,
        site: str | None = None,
        device: torch.device | str = "cpu",
    ) -> "Dictionary":
        """Read a dictionary from a repository on the Hub, through the local cache (also offline).

        ``sae_id`` is its folder, ``<site>/<name>`` for one pushed by this package; None takes the
        only one. Raises as ``hub.transfer.fetch`` and ``load`` do.
        """
        from llm_wsae.dictionary.hub.transfer import fetch

        return cls.load(fetch(repo_id, sae_id, revision=revision), site=site, device=device)

    def save_pretrained(self, folder: Path | str) -> None:
        """``save``, under the name that libraries of the Hub share."""
        self.save(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        license: str | None = None,
    ) -> str:
        """Push it, without explanations, as ``hub.transfer.push``; the commit's address."""
        from llm_wsae.dictionary.hub.transfer import push

        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "dictionary"
            self.save(own)
            return push([own], repo_id, private=private, revision=revision, license=license).url

    def extra_repr(self) -> str:
        """What ``print`` shows of the dictionary."""
        alpha = "" if self.info.rule == "uniform" else f" alpha={self.info.alpha:g}"
        return (
            f"{self.info.name!r} at {self.site}: {self.d_in} dimensions, {self.d_sae} latents, "
            f"{self.sparsity}, rule={self.info.rule}{alpha}"
        )

    def _codes(self, x: Tensor) -> Codes:
        if x.shape[-1] != self.d_in:
            raise UsageError(
                f"the activations are {x.shape[-1]} wide, but this dictionary reads {self.d_in} "
                f"dimensions ({self.site.reads})"
            )
        rows = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        # The selection must never see a NaN: it would come out as some k latents.
        finite = torch.isfinite(rows).all(1)
        if not bool(finite.all()):
            raise LlmWsaeError(
                f"{int((~finite).sum())} of {len(rows)} rows to encode hold NaN or infinity"
            )
        return self.sparsity.encode(rows, self.W_enc.T, self.b_enc, self.threshold)


def _parameter(tensor: Tensor) -> nn.Parameter:
    own = tensor.detach().to(torch.float32, copy=True).contiguous()  # its owner may change it
    return nn.Parameter(own, requires_grad=False)


def pretrained() -> dict[str, Path]:
    """The folders of the clone's pretrained dictionaries by name; empty without a clone."""
    return {
        path.parent.relative_to(PRETRAINED).as_posix(): path.parent
        for path in sorted(PRETRAINED.glob(f"*/*/*/{INFO}"))
    }


def load_pretrained(
    name: str,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> Dictionary:
    """Open a pretrained dictionary: ``smollm2-135m/blocks.9.hook_resid_post/uniform-k32``.

    ``name`` is ``<model>/<site>/<dictionary>``, in ``checkpoints/`` of a clone or, with a
    ``repo_id``, in a repository on the Hub that holds the dictionaries of this model. Raises
    UsageError for an unknown name, LlmWsaeError if there is no clone, and as
    ``Dictionary.from_pretrained`` does.
    """
    if repo_id is not None:
        sae_id = name.partition("/")[2] or name
        return Dictionary.from_pretrained(repo_id, sae_id, revision=revision, device=device)
    if revision is not None:
        raise UsageError("a revision needs a repository on the Hub; name it with repo_id")
    known = pretrained()
    if not known:
        raise LlmWsaeError(
            f"there are no pretrained dictionaries here: they are in {PRETRAINED.name}/ of "
            "llm-wsae's repository, not in the installed package; install it from a clone with pip "
            "install -e, open one with Dictionary.load, or name a repository on the Hub that holds "
            "them with repo_id"
        )
    if name not in known:
        raise UsageError(f"there is no pretrained dictionary {name!r}; {nearest(name, known)}")
    return Dictionary.load(known[name], device=device)
