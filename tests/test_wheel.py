"""The package works from a wheel, outside its clone."""

import os
import shutil
import subprocess
import sys
import zipfile

from places import ROOT

SCRIPT = """
import llm_wsae
from llm_wsae.pages.frame import filled
from llm_wsae.sparse.backends.cpu import SOURCES
assert "<title>" in filled("report.html", {}) and all(path.is_file() for path in SOURCES)
print(llm_wsae.__file__)
"""


def test_a_wheel_has_every_file_and_works_outside_the_clone(tmp_path):
    source = tmp_path / "source"
    names = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "llm_wsae", source / "llm_wsae", ignore=names)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("llm_wsae/")}
    there = [path for path in (ROOT / "llm_wsae").rglob("*") if path.is_file()]
    there = [path for path in there if path.suffix != ".pyc"]
    assert packed == {path.relative_to(ROOT).as_posix() for path in there}
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(tmp_path / "site/llm_wsae/__init__.py")
