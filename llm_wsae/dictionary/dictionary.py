"""A trained dictionary: encode activations into sparse latents, decode them, save and load.

    latents = sparsity(x · W_enc + b_enc)        x̂ = latents · W_dec + b_dec

Centring and scaling of the inputs were folded into the four tensors, so encoding never subtracts
``b_dec`` and takes the model's activations as they are. ``load_pretrained`` opens those of the
project by name.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_wsae.dictionary.folder import INFO, is_dictionary, write_folder
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import Sparsity, to_dense
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes, ragged
from llm_wsae.sparse.operations import decode as decode_codes

DENSE_DENSITY = 0.1
"""A latent that fires on a larger share of the rows is dense."""
_FOLDER = "checkpoints"
_PACKAGE = Path(__file__).parents[1]


class Dictionary(nn.Module):
    """A sparse autoencoder of ``d_in`` dimensions and ``d_sae`` latents, float32, frozen.

    ``info`` says how it was made. ``extras`` holds, on the CPU, what SAELens has no place for: the
    loss weights ``gamma`` [d_in] and statistics of the training rows (``mean``, ``variance``,
    ``robust_variance``, each [d_in]). Parameters do not require gradients until
    ``requires_grad_()`` is called; gradients with respect to the input always flow. ``threshold``
    belongs to JumpReLU: a latent is active where its pre-activation exceeds it.

    Raises UsageError if the tensors' shapes fit neither each other nor the sparsity, if there is a
    threshold without JumpReLU or JumpReLU without a threshold, or if ``info.site`` is not the name
    of a site.
    """

    threshold: nn.Parameter | None

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
        extras: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        d_in, d_sae = W_enc.shape
        if sparsity.has_threshold != (threshold is not None):
            raise UsageError(
                f"a dictionary of the {sparsity.architecture} architecture "
                f"{'needs a' if sparsity.has_threshold else 'has no'} threshold for each latent"
            )
        for name, tensor, shape in (
            ("W_dec", W_dec, (d_sae, d_in)),
            ("b_enc", b_enc, (d_sae,)),
            ("b_dec", b_dec, (d_in,)),
            ("threshold", threshold, (d_sae,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise UsageError(
                    f"{name} has the shape {list(tensor.shape)}, but W_enc is [{d_in}, {d_sae}], "
                    f"so {name} must be {list(shape)}"
                )
        sparsity.check(d_sae)
        Site.parse(info.site)
        self.W_enc = _parameter(W_enc)
        self.W_dec = _parameter(W_dec)
        self.b_enc = _parameter(b_enc)
        self.b_dec = _parameter(b_dec)
        self.register_parameter("threshold", None if threshold is None else _parameter(threshold))
        self.sparsity = sparsity
        self.info = info
        self.extras = {key: tensor.detach().cpu() for key, tensor in (extras or {}).items()}
        self.folder: Path | None = None
        """Where it was loaded from."""
        self.weights_sha256: str | None = None
        """Of the file of weights there; None for other tools' folders."""

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
        """The point of the residual stream whose rows it encodes."""
        return Site.parse(self.info.site)

    def decoder_digest(self) -> str:
        """SHA-256 of the decoder's float32 numbers: what tells that a report is about it."""
        return hashlib.sha256(self.W_dec.detach().cpu().numpy().tobytes()).hexdigest()

    def on_cpu(self) -> "Dictionary":
        """This dictionary if it is on the CPU, otherwise a copy of it there."""
        if self.W_enc.device.type == "cpu":
            return self
        tensors = {name: parameter.cpu() for name, parameter in self.named_parameters()}
        copied = Dictionary(**tensors, sparsity=self.sparsity, info=self.info, extras=self.extras)
        copied.folder, copied.weights_sha256 = self.folder, self.weights_sha256
        return copied

    def encode_sparse(self, x: Float[Tensor, "*rows d_in"]) -> Codes:
        """The active latents of every row: indices and values ``[*rows, k]``.

        Raises UsageError for rows of another width, LlmWsaeError for NaN or infinite rows.
        """
        codes = self._codes(x)
        shape = (*x.shape[:-1], codes.indices.shape[1])
        return Codes(codes.indices.view(shape), codes.values.view(shape))

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """All latents of every row, dense. Raises as ``encode_sparse`` does."""
        dense = to_dense(self._codes(x), self.d_sae)
        return dense.view(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Float[Tensor, "*rows d_sae"] | Codes) -> Float[Tensor, "*rows d_in"]:
        """The reconstruction from dense latents or from codes.

        Raises UsageError when dense latents have another width.
        """
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
        return self.decode(self.encode_sparse(x))

    def save(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the dictionary folder; ``dtype`` is that of the two matrices on disk.

        An older dictionary there is replaced; any other folder is refused. With bfloat16 or
        float16 the file is half as large and the weights are rounded once: measure the reloaded
        dictionary, not this one. Raises as ``folder.write_folder`` does.
        """
        write_folder(
            Path(folder),
            dict(self.named_parameters()),
            self.sparsity,
            self.info,
            self.extras,
            dtype,
        )

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        site: str | None = None,
        device: torch.device | str = "cpu",
    ) -> "Dictionary":
        """Read a dictionary folder, of this package or of another tool (SAELens, sparsify,
        dictionary_learning).

        ``site`` is for a foreign folder that does not say which site its dictionary belongs to.
        Raises as ``formats.reading.read`` does.
        """
        content = reading.read(Path(folder), site)
        new = cls(
            **content.weights,
            sparsity=content.sparsity,
            info=content.info,
            extras=content.extras,
        )
        new.folder, new.weights_sha256 = Path(folder), content.weights_sha256
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
        only one. Raises as ``hub.pulling.fetch`` and ``load`` do.
        """
        from llm_wsae.dictionary.hub.pulling import fetch

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
        """Push it to a repository on the Hub and return the commit's address; see
        ``hub.pushing.push``, which alone also sends explanations, those beside a saved one."""
        from llm_wsae.dictionary.hub.pushing import push

        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "dictionary")
            return push(
                [Path(folder) / "dictionary"],
                repo_id,
                private=private,
                revision=revision,
                license=license,
            ).url

    def extra_repr(self) -> str:
        """What ``print`` shows of the dictionary."""
        return (
            f"{self.info.name!r} at {self.site}: {self.d_in} dimensions, {self.d_sae} latents, "
            f"{self.sparsity}, rule={self.info.rule} alpha={self.info.alpha:g}"
        )

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise UsageError(
                f"the activations are {x.shape[-1]} wide, but this dictionary reads {self.d_in} "
                f"dimensions ({self.site})"
            )
        rows = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        # The selection must never see a NaN: it would come out as some k latents. This one pass
        # over the rows costs nothing compared with the encoder's product.
        finite = torch.isfinite(rows).all(1)
        if not bool(finite.all()):
            raise LlmWsaeError(
                f"{int((~finite).sum())} of {len(rows)} rows to encode hold NaN or infinity"
            )
        return rows

    def _codes(self, x: Tensor) -> Codes:
        return self.sparsity.encode(self._rows(x), self.W_enc.T, self.b_enc, self.threshold)


def _parameter(tensor: Tensor) -> nn.Parameter:
    own = tensor.detach().to(torch.float32, copy=True).contiguous()  # its owner may change it
    return nn.Parameter(own, requires_grad=False)


def load_pretrained(
    name: str,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> Dictionary:
    """Open a pretrained dictionary: ``smollm2-135m/blocks.9.hook_resid_post/uniform-k32``.

    The project's own are in ``checkpoints/`` of its repository, ``<model>/<site>/<dictionary>``,
    listed in its README.md; they are too large for an installed package.

    Without ``repo_id``, it is read from ``checkpoints/`` of the clone of llm-wsae that the package
    runs from (an editable installation) or that contains the current folder; nothing is downloaded.
    With ``repo_id``, it is read from a repository on the Hub that holds the dictionaries of this
    model; there the model's name is dropped.

    Raises UsageError for an unknown name, LlmWsaeError if there is no clone, and as
    ``Dictionary.load`` and ``Dictionary.from_pretrained`` do.
    """
    if repo_id is not None:
        sae_id = name.partition("/")[2] or name
        return Dictionary.from_pretrained(repo_id, sae_id, revision=revision, device=device)
    if revision is not None:
        raise UsageError("a revision needs a repository on the Hub; name it with repo_id")
    known = _known()
    if not known:
        raise LlmWsaeError(
            f"there are no pretrained dictionaries here: they are in {_FOLDER}/ of llm-wsae's "
            "repository, not in the installed package; work in a clone of it, or name a "
            "repository on the Hub that holds them with repo_id"
        )
    if name not in known:
        raise UsageError(f"there is no pretrained dictionary {name!r}; {nearest(name, known)}")
    return Dictionary.load(known[name], device=device)


def _known() -> dict[str, Path]:
    """The folders of the pretrained dictionaries by name, from the nearest clone that has any."""
    here = Path.cwd()
    for clone in (_PACKAGE.parent, here, *here.parents):
        # Any project may have a folder of that name: this one's is next to the package's.
        if not (clone / _PACKAGE.name / "__init__.py").is_file():
            continue
        root = clone / _FOLDER
        found = {
            path.parent.relative_to(root).as_posix(): path.parent
            for path in sorted(root.glob(f"*/*/*/{INFO}"))
            if is_dictionary(path.parent)
        }
        if found:
            return found
    return {}
