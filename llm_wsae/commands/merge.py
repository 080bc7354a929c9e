"""The command that makes one store from several."""

import time
from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.commands.options import Flag, Result, cost
from llm_wsae.outputs import check_folder
from llm_wsae.provenance import write_record
from llm_wsae.terminal import printable


def merge(
    stores: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="STORE…")],
    out: Path,
    link: Flag = False,
) -> Result:
    """Make one activation store from several that were harvested from different texts.

    Run it again to resume after an interruption.

    Args:
        stores: Activation stores of one model, with the same sites and settings.
        out: Folder of the new store.
        link: Share the files of the stores through hard links, on one file system, instead of
            copying them: damage to one is then damage to both.
    """
    from llm_wsae.data.merging import merge as merge_into

    started = time.monotonic()
    check_folder(out)
    merged = merge_into(stores, out, link)
    write_record(out / "merge.json", "merge", {"stores": stores, "link": link})
    rows = iter(merged.manifest.shards)
    parts = [
        {
            "corpus": part.corpus["name"],
            "part": part.corpus.get("part"),
            "rows": sum(next(rows).rows for _ in range(part.num_shards)),
        }
        for part in merged.manifest.parts
    ]
    massive = {str(s): merged.statistics(s).massive_count for s in merged.sites}
    facts = {"store": str(out), "rows": merged.num_rows, "d_in": merged.d_in, "massive": massive}
    lines = [f"{merged.num_rows:,} rows of {merged.d_in} dimensions at each site in {out}"]
    lines += [
        printable(f"  {part['rows']:,} from {part['corpus']} ({part['part']})") for part in parts
    ]
    lines += [f"  {s}: {count:,} massive activations" for s, count in massive.items()]
    return {**facts, "parts": parts}, "\n".join([*lines, cost(started)])
