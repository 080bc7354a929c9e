"""What the parts of interop.py share: tools in their environments, differences, tables. Below it,
dictionaries and weights of ours in the real tools.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks import PEER_SCRIPTS, ROOT, peer_python
from safetensors.torch import load_file, save_file

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, Sparsity, TopK
from llm_wsae.errors import LlmWsaeError

TOLERANCE = 1e-5
NOT_READ = -1.0  # in the place of a difference


class Part(NamedTuple):
    """What a part found."""

    text: str
    ok: bool


def peer(name: str, script: str, out: Path, **environment: str) -> str:
    """Run a script, perhaps with words after it, in a tool's environment; its versions in words."""
    file, *words = script.split()
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [peer_python(name), PEER_SCRIPTS / file, out, *words],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
        sys.exit(f"peers/{script} failed in the environment of {name}")
    versions = json.loads((out / "versions.json").read_text())
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest |a − b| / (1 + |b|)."""
    return float(((ours - theirs).abs() / (1 + theirs.abs())).max())


class Compared(NamedTuple):
    """One dictionary, read here and by the tool that wrote it."""

    read_as: str
    """The kind of dictionary that it became here, or why it was refused."""
    latents: float
    reconstruction: float
    ok: bool


def compare(dictionary: Dictionary, expected: Path) -> Compared:
    """Both differences, and whether they are small.

    A tool whose latents are all 0 or all active would prove nothing, so neither passes.
    """
    made = load_file(expected)
    latents = dictionary.encode(made["x"])
    found = [
        difference(latents, made["latents"]),
        difference(dictionary(made["x"]), made["reconstruction"]),
    ]
    active = float((made["latents"] > 0).float().sum(1).mean())
    ok = max(found) <= TOLERANCE and 0.5 < active < dictionary.d_sae - 0.5
    return Compared(dictionary.sparsity.architecture, *found, ok)


def table(found: dict[str, Compared], what: str = "written") -> str:
    """One row for all that was read as the same kind, with their largest differences."""
    lines = [f"| read as | {what} | latents | reconstruction |", "|---|---|--:|--:|"]
    for kind in dict.fromkeys(one.read_as for one in found.values()):
        own = {name: one for name, one in found.items() if one.read_as == kind}
        names = ", ".join(f"`{name}`{'' if one.ok else ' **NO**'}" for name, one in own.items())
        worst = (max(one[place] for one in own.values()) for place in (1, 2))
        cells = ("" if value == NOT_READ else f"{value:.1e}" for value in worst)
        lines.append(f"| {kind} | {names} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_all(out: Path, refused: set[str]) -> Part:
    """A table of all dictionaries that a tool wrote below ``out``."""
    found = {}
    for expected in sorted(out.rglob("*.expected.safetensors")):
        folder = expected.with_name(expected.name.removesuffix(".expected.safetensors"))
        name = str(folder.relative_to(out))
        try:
            one = compare(Dictionary.load(folder), expected)
            found[name] = one._replace(ok=one.ok and name not in refused)
        except LlmWsaeError as error:
            reason = str(error).replace(str(folder), "…").replace("|", "\\|")
            found[name] = Compared(f"refused: {reason}", NOT_READ, NOT_READ, name in refused)
    return Part(table(found), bool(found) and all(one.ok for one in found.values()))


# --- ours in the real tools ---

D_IN, D_SAE, K, SITE = 48, 384, 8, "blocks.1.hook_resid_post"
_TESTS = (
    "model/test_language_model.py",
    "attaching/test_attaching.py",
    "dictionary/test_folder.py",
    "training/architectures/test_architectures_learn.py",
    "saelens/test_saelens_plugin.py",
)


def make(sparsity: Sparsity, seed: int, site: str = SITE, skip: bool = False) -> Dictionary:
    """A dictionary of ours with random directions."""
    torch.manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN))
    return Dictionary(
        W_enc=W_dec.T * 0.5,
        W_dec=W_dec,
        b_enc=torch.randn(D_SAE) / 4 - 0.5,
        b_dec=torch.randn(D_IN) / 4,
        threshold=torch.rand(D_SAE) if sparsity.has_threshold else None,
        W_skip=torch.randn(D_IN, D_IN) / 8 if skip else None,
        sparsity=sparsity,
        info=DictionaryInfo(
            site=site,
            name=sparsity.architecture,
            context_size=128,
            prepend_bos=True,
            model={"name": "tiny"},
            corpus={"name": "words"},
        ),
        extras={"gamma": torch.ones(D_IN)},
    )


def ours_saved(out: Path) -> dict[str, Path]:
    """Folders of ours by name: each kind of sparsity, one with matrices in bfloat16, and
    transcoders (of TopK, SAELens has none)."""
    kinds = {"topk": TopK(K), "standard": ReLU(), "jumprelu": JumpReLU(), "topk-bfloat16": TopK(K)}
    kinds |= {f"{end}transcoder": JumpReLU() for end in ("", "skip-")} | {"relu-transcoder": ReLU()}
    folders = {}
    for seed, (name, sparsity) in enumerate(kinds.items()):
        folders[name] = out / "ours" / name
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        site = "blocks.1.mlp" if name.endswith("transcoder") else SITE
        dictionary = make(sparsity, seed, site, skip=name.startswith("skip"))
        dictionary.info = replace(dictionary.info, name=name)
        dictionary.save(folders[name], dtype=dtype)
        x = torch.randn(300, D_IN) * 2 + torch.randn(D_IN)
        save_file({"x": x}, out / f"{name}.rows.safetensors")
    return folders


def ours_in_saelens(out: Path) -> Part:
    """Ours from disk and from a Hub."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from hub_server import WRITER, HubServer

    out.mkdir(parents=True)
    folders, repo = ours_saved(out), "user/ours"
    job = {
        "disk": {name: str(folder) for name, folder in folders.items()},
        "hub": {name: [repo, f"{Dictionary.load(f).site}/{name}"] for name, f in folders.items()},
    }
    (out / "job.json").write_text(json.dumps(job))
    with HubServer() as hub:
        environment = hub.environment(out / "home", WRITER) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        push = [sys.executable, "-m", "llm_wsae", "push", *folders.values(), repo]
        subprocess.run(push, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE)
        version = peer("saelens", "in_saelens.py load", out, **environment)
    found = {
        f"{how}-{name}": compare(
            Dictionary.load(folder), out / f"{how}-{name}.expected.safetensors"
        )
        for how in job
        for name, folder in folders.items()
    }
    text = f"""## Here → SAELens

{version}. `disk`: `SAE.load_from_disk` of a folder of ours; `hub`: `llm-wsae push` to a server that
speaks the Hub's protocol, then `SAE.from_pretrained`.

{table(found, "loaded by SAELens")}"""
    return Part(text, all(one.ok for one in found.values()))


def tests(out: Path) -> Part:
    """Our own tests of what depends on TransformerLens or SAELens, in SAELens' environment."""
    python = peer_python("saelens")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-e", f"{ROOT}[test]"], check=True)
    run = [python, "-m", "pytest", "-o", "addopts=", *(ROOT / "tests" / name for name in _TESTS)]
    done = subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines, ok = done.stdout.strip().splitlines(), done.returncode == 0
    if not ok:
        print("\n".join(lines[-40:]), file=sys.stderr)
    found = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|error)", lines[-1]))
    look = "from importlib.metadata import version; print(version('transformer-lens'))"
    version = subprocess.run([python, "-c", look], stdout=subprocess.PIPE, text=True, check=True)
    verdict = "" if ok else " **NO**"
    text = f"""## Our tests beside SAELens

{", ".join(f"`{name}`" for name in _TESTS)}
in SAELens' environment, with transformer-lens {version.stdout.strip()}: {found}.{verdict}
All tests run with TransformerLens 4 too, beside which SAELens cannot be installed."""
    return Part(text, ok)


def plugin(out: Path) -> Part:
    """SAELens' runner with weights of ours."""
    version = peer("saelens", "train_saelens.py", out)
    facts: dict[str, Any] = json.loads((out / "facts.json").read_text())
    every, found = bool(facts["ones_equal_plain"]), {}
    for name in facts["losses"]:
        dictionary = Dictionary.load(out / name)
        found[name] = compare(dictionary, out / f"{name}.expected.safetensors")
        info = Dictionary.load(facts["checkpoints"][name]).info
        every = every and found[name].ok and dictionary.info.rule == "variance"
        every = every and (info.rule, info.alpha) == (dictionary.info.rule, dictionary.info.alpha)
    losses = []
    for name, (loss, weighted, unweighted) in facts["losses"].items():
        every = every and abs(loss - weighted) <= TOLERANCE * weighted
        losses.append(
            f"`{name}`: the loss is {loss:.6f}, ‖Γ(x − x̂)‖² of the same codes {weighted:.6f}, "
            f"‖x − x̂‖² {unweighted:.6f}."
        )
    plain, weighted = facts["unexplained"]["plain"], facts["unexplained"]["topk"]
    every = every and weighted[0] < plain[0] and weighted[1] > plain[1]
    text = f"""## The weighted training class in SAELens' runner

{version}; 150 steps of `LanguageModelSAETrainingRunner` on a random model, weights of √1.9 for the
first half of the dimensions and √0.1 for the second.

- {chr(10).join(losses).replace(chr(10), chr(10) + "- ")}
- Unexplained variance of the first and the second half: {weighted[0]:.3f} and {weighted[1]:.3f},
  trained plainly {plain[0]:.3f} and {plain[1]:.3f}.
- With weights of 1 every parameter {"equals" if facts["ones_equal_plain"] else "DIFFERS FROM"} that
  of SAELens' own class, bit for bit.
- What the runner saved is read with rule and α.

{table(found, "saved by the runner")}"""
    return Part(text, every)
