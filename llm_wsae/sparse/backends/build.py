"""Building the C++ kernels with whatever compiler the machine has, when they are first needed.

The package installs and runs without a compiler, so nothing is built at installation. The library
goes to the user's cache under a name made of everything that decides its content, and is built
beside it first, so that processes that build at once do not disturb each other. When it cannot be
built, one sentence on stderr says why and the plain operations take over; so they do, in silence,
when the environment has LLM_WSAE_NO_COMPILER=1.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[1] / "kernels").iterdir())
_COMPILERS = ("g++", "clang++", "c++")
_COMMON = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_MACHINE = (  # from the fastest to what every compiler takes
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    (),
)
_LONGEST_SECONDS = 300  # of one compilation


class BuildFailed(Exception):
    """Why there is no library; never leaves this package."""


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if they have not been; None where that is not possible."""
    if os.environ.get("LLM_WSAE_NO_COMPILER", "") not in ("", "0"):
        return None
    try:
        return ctypes.CDLL(str(_built(cache_folder())))
    except (BuildFailed, OSError, subprocess.SubprocessError) as error:
        print(
            f"llm_wsae: the fast CPU kernels could not be built ({error}), so training goes on "
            "with the slower ones of torch; LLM_WSAE_NO_COMPILER=1 silences this",
            file=sys.stderr,
        )
        return None


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME, else ~/.cache."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user without a home
        raise BuildFailed(f"there is no folder to keep them in: {error}") from error
    return Path(root) / "llm_wsae" / "kernels"


def _built(folder: Path) -> Path:
    compiler = _compiler()
    content = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    sources = (source.read_bytes() for source in SOURCES)
    for part in (*sources, compiler.encode(), version, _processor().encode()):
        content.update(hashlib.sha256(part).digest())
    content.update(repr((_COMMON, _MACHINE)).encode())
    target = folder / f"{content.hexdigest()[:32]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as place:
            fresh = Path(place) / "kernels.so"
            _compile(compiler, fresh)
            os.replace(fresh, target)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise BuildFailed(f"none of {', '.join(_COMPILERS)} is installed")


def _compile(compiler: str, target: Path) -> None:
    complaint, files = "", [str(source) for source in SOURCES if source.suffix == ".cpp"]
    for machine in _MACHINE:
        done = subprocess.run(
            [compiler, *_COMMON, *machine, *files, "-o", str(target)],
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
        )
        if done.returncode == 0:
            return
        complaint = complaint or next(iter(done.stderr.splitlines()), "no reason given")
    raise BuildFailed(f"{compiler} failed: {complaint}")


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(told)}))
