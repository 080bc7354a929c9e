"""The process of the command line: ``llm-wsae``, ``python -m llm_wsae``, also under torchrun.

Ctrl-C raises KeyboardInterrupt, so that what was begun is left in order. While modules are imported
that could garble the exception, and after the work nobody would catch it: then the process just
ends. An output that is closed, or cannot show every character, gives no traceback. No library can
ask anything: there is no standard input.
"""

import atexit
import os
import signal
import sys
import traceback
from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT
_IMPORTING = "<frozen importlib._bootstrap>"


def main() -> int:
    """Run the command of ``sys.argv``; the exit code."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    try:
        if listens:
            signal.signal(signal.SIGINT, _interrupted)
            # the first to be registered is the last to run: then Python restores the default
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        _open_streams()
        from llm_wsae.cli import main as run

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        if listens:
            signal.signal(signal.SIGINT, _leave)
        _close_streams()


def _interrupted(number: int, frame: FrameType | None) -> None:
    if any(one.f_code.co_filename == _IMPORTING for one, _ in traceback.walk_stack(frame)):
        _leave()
    raise KeyboardInterrupt


def _leave(*_: object) -> None:
    os._exit(_INTERRUPTED)


def _open_streams() -> None:
    sys.stdin = open(os.devnull)  # noqa: SIM115 - open to the end
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")


def _close_streams() -> None:
    """Flush what is left; a stream that fails is replaced, or Python would say so at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
