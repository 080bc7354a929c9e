"""The page that `llm-wsae dashboard` writes: its size, its speed, the memory that it takes.

    python scripts/bench_page.py            # the embedded SmolLM2-135M and State of the Union

Pages of the pretrained dictionaries after block 9 (4,608 latents): one, two side by side, and one
of 24,576 latents, which are noisy copies of trained ones, so that they fire as those do.

- Building: the command, each run in a process of its own: its time and its largest resident memory;
  of one dictionary also on a quarter of the rows. And of one dictionary, in turning order, the rows
  read and encoded alone, the pass that collects what latents do, and the whole page; a ratio is the
  median over repeats of the ratio within a repeat.
- Using: a headless Chromium opens each page anew several times. First view is the time from the
  navigation to the painted overview, a search that from the key to the painted list.
- Asking: `--live` over its own server, a sentence of 50 tokens.
"""

import argparse
import base64
import gzip
import json
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from bench_harvest import measure, ratio
from bench_memory import SITE, peak_megabytes
from benchmarks import ROOT, embedded_model, machine, write_benchmark

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.harvesting import harvest
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pages.collecting import ROWS_AT_ONCE, collect
from llm_wsae.pages.dashboard import dashboard
from llm_wsae.pages.live import listen, serve

TRAINED = ROOT / "checkpoints/smollm2-135m" / SITE
PLAIN, WEIGHTED = "uniform-k32", "whitening-a0.5-k32"
WIDE = 24_576
TOP, BANDS = 10, 10
WORDS = ("the", "gov", "congress", "war", "tax", "1", "#12", "e", "ing", "peace trea")
SENTENCE = "The state of our Union is strong, and our people are at work. " * 4
NOTES = (
    "Contexts shown are at most 20 a latent; rare latents have fewer. The command's time and "
    "memory include Python, torch and the model. First view and search: medians, in brackets the "
    "slowest. encode: the rows of one dictionary read and encoded alone. pass: with all that is "
    "collected of its latents. page: everything, from the opened store to the file; what a page "
    "needs beyond its pass does not grow with the rows."
)


def wide(dictionary: Dictionary, d_sae: int) -> Dictionary:
    """``d_sae`` latents, each one of the dictionary's with noise of half its length."""
    draw = torch.Generator().manual_seed(0)
    copies = torch.arange(d_sae) % dictionary.d_sae

    def noisy(rows: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(rows.shape, generator=draw)
        return rows + 0.5 * noise * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5

    return Dictionary(
        W_enc=noisy(dictionary.W_enc.T[copies]).T.contiguous(),
        W_dec=noisy(dictionary.W_dec[copies]),
        b_enc=dictionary.b_enc[copies],
        b_dec=dictionary.b_dec.detach(),
        sparsity=dictionary.sparsity,
        info=replace(dictionary.info, name=f"{d_sae} latents", metrics={}),
        extras=dictionary.extras,
    )


def encode(store: ActivationStore, dictionary: Dictionary) -> None:
    """Read and encode every row."""
    reader = store.reader(dictionary.site)
    for start in range(0, store.num_rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, store.num_rows)
        dictionary.encode_sparse(reader.rows(start, stop).float())


def build_speeds(
    store: ActivationStore, model: LanguageModel, dictionary: Dictionary, out: Path, repeats: int
) -> str:
    """Rows per second of three ways, and what the two others have of the first."""
    named = {PLAIN: dictionary}
    ways = {
        "encode": partial(encode, store, dictionary),
        "pass": partial(collect, store, named, TOP, BANDS),
        "page": partial(dashboard, named, store, model, out, top=TOP, bands=BANDS),
    }
    speeds = measure({name: (store.num_rows, way) for name, way in ways.items()}, repeats)
    cells = [f"{name} {statistics.median(values):,.0f}" for name, values in speeds.items()]
    shares = [f"{ratio(speeds, way, 'encode'):.2f} for the {way}" for way in ("pass", "page")]
    return (
        f"Rows a second, {dictionary.d_sae:,} latents: {', '.join(cells)}. Of encoding's speed: "
        f"{', '.join(shares)}."
    )


def contexts_shown(page: Path) -> int:
    """The contexts of all latents of a page."""
    chunks = re.findall(r'id="chunk-\d+-\d+">([^<]*)<', page.read_text(encoding="utf-8"))
    latents = [
        one for chunk in chunks for one in json.loads(gzip.decompress(base64.b64decode(chunk)))
    ]
    return sum(len(one["examples"]) for one in latents)


PAINTED = (
    "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"
)


def in_browser(page: Path, repeats: int) -> list[str]:
    """Cells of one line: milliseconds of the first view and of a search."""
    from playwright.sync_api import sync_playwright

    first, search = [], []
    with sync_playwright() as playwright:
        for repeat in range(repeats + 1):  # the first of all is not counted
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.as_uri())
            shown = tab.evaluate(f"drawing.then(() => {PAINTED})")
            tab.click("text=list them")
            tab.wait_for_selector("article h2")
            taken = [
                tab.evaluate(
                    "async word => { const box = document.getElementById('search'); "
                    "const begin = performance.now(); box.value = word; "
                    f"box.dispatchEvent(new Event('input')); return await {PAINTED} - begin; }}",
                    word,
                )
                for word in WORDS
            ]
            if repeat:
                first.append(shown)
                search += taken
            browser.close()
    return [f"{statistics.median(ms):,.0f} [{max(ms):,.0f}]" for ms in (first, search)]


def asking(model: LanguageModel, dictionary: Dictionary, page: Path, repeats: int) -> str:
    """Seconds until the latents of a sentence of 50 tokens are there, over HTTP."""
    ids = model.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"][:50]
    text = model.tokenizer.decode(ids)
    addresses: list[str] = []
    listening = listen(0)
    served = (page, model, {PLAIN: dictionary}, listening, addresses.append)
    threading.Thread(target=serve, args=served, daemon=True).start()
    while not addresses:
        time.sleep(0.1)
    question = json.dumps({"text": text, "dictionary": 0}).encode()
    request = urllib.request.Request(
        f"{addresses[0]}ask", question, {"content-type": "application/json"}
    )
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        with urllib.request.urlopen(request) as reply:
            tokens = json.loads(reply.read())["tokens"]
        taken.append(time.perf_counter() - begin)
    return (
        f"`--live` answers a sentence of {len(tokens)} tokens (BOS included) in "
        f"{statistics.median(taken[1:]):.2f} s [{max(taken[1:]):.2f}], the first time in "
        f"{taken[0]:.2f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--store", help="one that is there, instead of a harvest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()
    if shutil.which("chromium") is None:
        sys.exit("there is no Chromium here")

    busy = machine(torch.get_num_threads())
    path = embedded_model()
    model = LanguageModel.load(path)
    plain = Dictionary.load(TRAINED / PLAIN)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = HarvestConfig(tokens=args.tokens)
        if args.store:
            store = ActivationStore.open(args.store)
        else:
            text = Corpus.open("sotu")
            store = harvest(model, text, [Site.parse(SITE)], folder / "store", config)
        wide(plain, WIDE).save(folder / "wide")
        lines = []
        for title, dictionaries in (
            ("4,608", [TRAINED / PLAIN]),
            ("2 × 4,608", [TRAINED / PLAIN, TRAINED / WEIGHTED]),
            (f"{WIDE:,}", [folder / "wide"]),
        ):
            page = folder / f"{len(lines)}.html"
            command = ["dashboard", *dictionaries, "--store", store.folder, "--model", path]
            command += ["--top", TOP, "--bands", BANDS, "--out", page, "--rows"]
            begin = time.monotonic()
            peak = peak_megabytes(*command, store.num_rows)
            cells = [f"{time.monotonic() - begin:,.0f}", f"{peak:,.0f}"]
            cells += [f"{page.stat().st_size / 1e6:.1f}", f"{contexts_shown(page):,}"]
            lines.append([title, *cells, *in_browser(page, args.repeats)])
        few = store.num_rows // 4
        peaks = [
            peak_megabytes(
                "dashboard", TRAINED / PLAIN, "--store", store.folder, "--model", path,
                "--top", TOP, "--bands", BANDS, "--out", folder / "few.html", "--rows", few,
            )
            for _ in range(args.repeats)
        ]  # fmt: skip
        fewer = (
            f"On {few:,} rows the command for {plain.d_sae:,} latents takes "
            f"{statistics.median(peaks):,.0f} MB [{min(peaks):,.0f}, {max(peaks):,.0f}]."
        )
        speeds = build_speeds(store, model, plain, folder / "again.html", args.repeats)
        answered = asking(model, plain, folder / "0.html", args.repeats)

    head = ["latents", "command, s", "its peak MB", "page, MB"]
    head += ["contexts shown", "first view, ms", "search, ms"]
    text = "\n".join(
        [
            f"## The page, SmolLM2-135M, {SITE}, {store.num_rows:,} rows",
            "",
            *(f"| {' | '.join(line)} |" for line in (head, ["--:"] * len(head), *lines)),
            "",
            fewer,
            "",
            speeds,
            "",
            answered,
            "",
            NOTES,
            "",
            f"{busy}. {args.repeats} repeats.",
        ]
    )
    print(text)
    if args.write:
        write_benchmark("page", text)


if __name__ == "__main__":
    main()
