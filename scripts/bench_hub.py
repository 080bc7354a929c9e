"""Memory of a push and a pull of a large dictionary, against the Hub of the tests.

    python scripts/bench_hub.py                     # 768 → 24576, 38 M parameters, float32
    python scripts/bench_hub.py --shape 576x4608 --dtype bfloat16 --write

The server is another process. A client process first sends a tiny dictionary there and back, so
that everything is imported; from there on its peak of resident memory (VmHWM, which counts mapped
pages of files too) is measured while it pushes the folder and pulls it into another one. The bytes
that come back are compared with those that were sent.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPO = "user/bench"


def make(folder: Path, shape: str, dtype: str) -> None:
    """A dictionary of random numbers."""
    import torch

    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.info import DictionaryInfo
    from llm_wsae.dictionary.sparsity import TopK

    d_in, d_sae = (int(number) for number in shape.split("x"))
    Dictionary(
        W_enc=torch.randn(d_in, d_sae),
        W_dec=torch.randn(d_sae, d_in),
        b_enc=torch.zeros(d_sae),
        b_dec=torch.zeros(d_in),
        sparsity=TopK(1),
        info=DictionaryInfo(site="blocks.0.hook_resid_post", name=folder.name),
        extras={"gamma": torch.ones(d_in), "robust_variance": torch.rand(d_in)},
    ).save(folder, dtype=getattr(torch, dtype))


def status(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(key)


def client(folder: Path, tiny: Path, out: Path) -> None:
    """Push and pull; prints one JSON object a line."""
    from llm_wsae.dictionary.hub.pulling import pull
    from llm_wsae.dictionary.hub.pushing import push

    push([tiny], f"{REPO}-tiny")
    pull(f"{REPO}-tiny", out / "tiny")
    for name, work in (
        ("push", lambda: push([folder], REPO)),
        ("pull", lambda: pull(REPO, out)),
    ):
        baseline, started = status("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        work()
        seconds = time.perf_counter() - started
        print(json.dumps({"name": name, "bytes": status("VmHWM") - baseline, "seconds": seconds}))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="768x24576", help="d_in x d_sae")
    parser.add_argument("--dtype", default="float32", help="of the matrices on disk")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    parser.add_argument("--client", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(*options.client)
        return

    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from benchmarks import machine, write_benchmark
    from hub_server import WRITER, HubServer

    here = machine(threads=1)
    with tempfile.TemporaryDirectory() as name, HubServer(Path(name) / "hub") as hub:
        place = Path(name)
        make(place / "large", options.shape, options.dtype)
        make(place / "tiny", "8x16", options.dtype)
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--client", place / "large", place / "tiny", place / "out"],
            env={**os.environ, **hub.environment(place / "home", WRITER), **quiet},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        back = place / "out" / "blocks.0.hook_resid_post" / "large"
        same = digests(back) == digests(place / "large")
        size = sum(path.stat().st_size for path in back.iterdir())
    d_in, d_sae = (int(number) for number in options.shape.split("x"))
    lines = [
        f"{d_in} → {d_sae}, {(2 * d_in * d_sae + d_in + d_sae) / 1e6:.1f} M parameters in "
        f"{options.dtype}: a folder of {size / 1e6:.1f} MB. The bytes that came back are "
        f"{'the same' if same else 'NOT THE SAME'}.",
        "",
        "| | peak memory beyond imports, MB | × the folder | s |",
        "|---|--:|--:|--:|",
    ]
    for line in done.stdout.splitlines():
        found = json.loads(line)
        share = found["bytes"] / size
        lines.append(
            f"| {found['name']} | {found['bytes'] / 1e6:.0f} | {share:.2f} | "
            f"{found['seconds']:.1f} |"
        )
    lines += ["", f"{here}."]
    print("\n".join(lines))
    if options.write:
        write_benchmark("hub", "## Push and pull\n\n" + "\n".join(lines))
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
