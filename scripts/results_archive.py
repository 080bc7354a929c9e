"""The measurements behind the docs, one compressed table for each study.

    python scripts/results_archive.py scripts/results/planted.jsonl.gz FOLDER

unpacks an archive into the folder it was made from, which `llm-wsae study` or `llm-wsae theory`
then resumes. Every line of an archive is one JSON file of that folder: ``{"file": its path,
"content": what it holds}``. Reports and figures are not kept: they are rebuilt from these files.
"""

import argparse
import gzip
import io
import json
from pathlib import Path
from typing import Any

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import read_own_json, write_atomic, write_json

_KEPT = ("*.json", "*/*.json", "*/results/*.json")
_REBUILT = ("report.json",)


def pack(folder: Path, archive: Path) -> None:
    """Write the JSON files of a folder into an archive; the same files give the same bytes."""
    files = sorted({path for pattern in _KEPT for path in folder.glob(pattern)})
    lines = [
        {
            "file": str(path.relative_to(folder)),
            "content": read_own_json(path, "file of a study"),
        }
        for path in files
        if path.name not in _REBUILT
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(text.encode())
    write_atomic(archive, lambda partial: partial.write_bytes(packed.getvalue()))


def read(archive: Path) -> dict[str, Any]:
    """What the files hold, by path. Raises LlmWsaeError if the archive is missing or damaged."""
    try:
        with gzip.open(archive, "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        return {line["file"]: line["content"] for line in lines}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise LlmWsaeError(f"{archive} is not a readable archive of results: {error}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Write the files into a folder, each as it was packed."""
    for name, content in read(archive).items():
        write_json(folder / name, content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    unpack(asked.archive, asked.folder)
