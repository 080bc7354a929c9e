"""Building the C++ kernels with whatever compiler the machine has, when they are first needed.

The package installs and runs without a compiler, so nothing is built at installation. The library
goes to the user's cache under a name made of everything that decides its content, and is built
beside it first, so that processes that build at once do not disturb each other. When it cannot be
built, one sentence on stderr says why and the plain operations take over; so they do, in silence,
when the environment has LLM_WSAE_NO_COMPILER=1.

A library is code, so it is loaded only if nobody else can have written it, and if it is whole: its
name also holds the digest of its content. One that is damaged is built again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from llm_wsae.artifact.files import write_atomic
from llm_wsae.errors import LlmWsaeError

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
_WAY_OUT = "set XDG_CACHE_HOME to a folder of yours"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if they have not been; None where that is not possible."""
    if os.environ.get("LLM_WSAE_NO_COMPILER", "") not in ("", "0"):
        return None
    try:
        return ctypes.CDLL(str(_built(cache_folder())))
    except (LlmWsaeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(
            f"llm_wsae: the fast CPU kernels could not be built ({error}), so the slower ones of "
            "torch are used; LLM_WSAE_NO_COMPILER=1 silences this",
            file=sys.stderr,
        )
        return None


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME, if that is an absolute path, else ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        root = Path.home() / ".cache"  # a RuntimeError for a user without a home
    return root / "llm_wsae" / "kernels"


def _built(folder: Path) -> Path:
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    sources = [source.read_bytes() for source in SOURCES]
    key = _digest(repr((sources, compiler, version, _processor(), _COMMON, _MACHINE)).encode())
    for own in (folder.parent, folder):
        own.mkdir(0o700, parents=True, exist_ok=True)
    _check_private(folder)
    for kept in folder.glob(f"{key}-*.so"):
        if _is_intact(kept):
            return kept
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as place:
        fresh = Path(place) / "kernels.so"
        _compile(compiler, fresh)
        data = fresh.read_bytes()
    target = folder / f"{key}-{_digest(data)}.so"
    write_atomic(target, lambda partial: partial.write_bytes(data))
    return target


def _is_intact(library: Path) -> bool:
    """Whether this user built it and it is whole; one that is not would end the process."""
    found = library.stat()
    mine = found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE
    return mine and library.stem.endswith(f"-{_digest(library.read_bytes())}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _check_private(folder: Path) -> None:
    """Raises LlmWsaeError if somebody else could put a library into the folder, and so run code.

    If the folder is our own but others can write to it, their permission is taken away.
    """
    for own in (folder.parent, folder):
        found = own.stat()
        if found.st_uid != os.geteuid():
            raise LlmWsaeError(f"{own} belongs to another user; {_WAY_OUT}")
        if found.st_mode & _OTHERS_WRITE:
            own.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)
    root = folder.parents[1]
    mode = root.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # whoever likes can rename what is in it
        raise LlmWsaeError(f"everybody can write to {root}; {_WAY_OUT}")


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise LlmWsaeError(f"none of {', '.join(_COMPILERS)} is installed")


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
    raise LlmWsaeError(f"{compiler} failed: {complaint}")


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(told)}))
