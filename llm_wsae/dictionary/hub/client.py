"""Requests to a Hub, which may be anybody's server, and what can go wrong, each in one sentence.

Files and lists are not fetched by the client's own functions: those name files of the cache after
headers of the answer, and read as long as the server sends. Here every answer has a limit on its
size and its time, and only the caller names files. The client writes to the Hub.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import parse_qs, quote, urlsplit

from huggingface_hub import close_session, constants, errors, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import check_token, hub_is_unreachable, parse_json, reason
from llm_wsae.terminal import without_secrets

TIMEOUT = 30
"""Seconds in which something must arrive."""
LONGEST_ANSWER = 60.0
"""Seconds in which an answer must be complete, a file's content apart."""
SLOWEST = 10_000
"""Bytes of a file's content that must arrive in a second, on average."""
_LARGEST_ANSWER = 8 << 20  # bytes; a page of a listing has a thousand files
_TRIES = 5  # of a download that brings nothing
_LOGIN = "log in (`hf auth login`, or the variable HF_TOKEN)"
_AGAIN = "run the same command again"
_KNOWN: tuple[tuple[Any, type[LlmWsaeError], str], ...] = (  # the first class that fits
    (
        errors.OfflineModeIsEnabled,
        LlmWsaeError,
        "HF_HUB_OFFLINE is set, so the Hub cannot be asked about {repo}, and the local cache does "
        "not hold it; unset it",
    ),
    (
        errors.HFValidationError,
        UsageError,
        "{repo!r} cannot be the name of a repository on the Hub; give user/name",
    ),
    (
        errors.GatedRepoError,
        LlmWsaeError,
        f"{{repo}} is gated: accept its terms on the Hub and {_LOGIN}",
    ),
    (
        errors.RevisionNotFoundError,
        UsageError,
        "{repo} has no revision {revision!r}; look at its branches on the Hub",
    ),
    (
        errors.RepositoryNotFoundError,
        UsageError,
        f"there is no repository {{repo}} on the Hub that you may see; check the name, or {_LOGIN}",
    ),
    (
        httpx.TransportError,
        LlmWsaeError,
        "the connection to the Hub ({hub}) failed ({kind}), and nothing of {repo} is half written; "
        f"check the network and {_AGAIN}",
    ),
)
_CHANGED = (
    f"{{repo}} was changed by someone else in the meantime, and nothing was written; {_AGAIN}"
)
_BY_STATUS = {
    401: f"the Hub does not accept your token, or needs one; {_LOGIN}",
    403: f"your token may not do that with {{repo}}; {_LOGIN} as someone who may",
    409: _CHANGED,
    412: _CHANGED,
}


def ask(path: str, asked: Mapping[str, str] | None = None) -> tuple[Any, str | None]:
    """What the Hub's API answers for ``/api/models/<path>``, a JSON value, and the cursor to the
    next page of a listing, if there is one.

    Raises LlmWsaeError for an answer that is no JSON, too long or too slow, and the client's errors
    for refusals and broken connections.
    """
    body = bytearray()
    url = f"{constants.ENDPOINT}/api/models/{path}"
    with _answer(url, LONGEST_ANSWER, params=asked) as response:
        for piece in response.iter_raw():
            body += piece
            if len(body) > _LARGEST_ANSWER:
                raise LlmWsaeError(
                    f"the Hub ({constants.ENDPOINT}) answered {path} with more than "
                    f"{_LARGEST_ANSWER:,} bytes, which are not read"
                )
        after = response.links.get("next", {}).get("url")
    # Of the next page's address only the cursor is used: the rest could be anyone's.
    cursor = parse_qs(urlsplit(after).query)["cursor"][0] if after else None
    return parse_json(
        bytes(body), f"the answer of the Hub ({constants.ENDPOINT}) to {path}"
    ), cursor


def download(
    repo_id: str,
    commit: str,
    path: str,
    file: IO[bytes],
    size: int,
    progress: Callable[[int], object],
) -> None:
    """Add to an open ``file`` what it lacks of ``size`` bytes; it may hold the beginning.

    ``progress`` is told how many bytes arrive. A connection that breaks is opened again. Raises
    LlmWsaeError if the server sends too much or too slowly, and the client's errors otherwise.
    """
    url = f"{constants.ENDPOINT}/{repo_id}/resolve/{commit}/{quote(path)}"
    until = time.monotonic() + LONGEST_ANSWER + size / SLOWEST
    tries = _TRIES
    while (have := file.tell()) < size:
        header = {"Range": f"bytes={have}-"} if have else {}
        try:
            with _answer(url, until - time.monotonic(), headers=header) as response:
                if response.status_code != 206:
                    have = file.seek(0)
                    file.truncate()
                for piece in response.iter_raw():
                    if file.tell() + len(piece) > size:
                        raise LlmWsaeError(
                            f"the Hub ({constants.ENDPOINT}) sends more for {path} of {repo_id} "
                            f"than the {size:,} bytes that it lists, so it is not read"
                        )
                    file.write(piece)
                    progress(len(piece))
            if file.tell() < size:
                raise httpx.RemoteProtocolError("the answer is shorter than the file")
        except (httpx.TransportError, errors.HfHubHTTPError) as error:
            tries = tries - 1 if file.tell() <= have else _TRIES
            if not tries or not hub_is_unreachable(error):
                raise
            time.sleep(1)


@contextmanager
def _answer(url: str, seconds: float, *, headers: Any = None, params: Any = None) -> Iterator[Any]:
    """The answer to a GET, its body not yet read; after some seconds the connection is closed.

    Raises the client's error for an answer that refuses; only its headers are read.
    """
    sent = {**build_hf_headers(), "Accept-Encoding": "identity", **(headers or {})}
    closing = threading.Timer(max(seconds, 0), close_session)
    closing.daemon = True
    begun = time.monotonic()
    closing.start()
    try:
        with get_session().stream(
            "GET", url, params=params, headers=sent, timeout=TIMEOUT
        ) as response:
            if response.status_code not in (200, 206):
                said = {k: v for k, v in response.headers.items() if k.startswith("x-error-")}
                hf_raise_for_status(
                    httpx.Response(response.status_code, headers=said, request=response.request)
                )
                raise ValueError(f"it has the status {response.status_code}")
            yield response
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        if time.monotonic() - begun < seconds:
            raise
        raise LlmWsaeError(
            f"the Hub ({constants.ENDPOINT}) answers too slowly, so the connection was closed; run "
            "the same command again later"
        ) from error
    finally:
        closing.cancel()


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure inside the block into one sentence. Keep it to requests, and to what reads
    answers: a server that answers oddly makes the client raise anything.

    Raises UsageError when a name is wrong (repository, revision), LlmWsaeError for everything else:
    no access, no network, a failing server, a full disk.
    """
    check_token()
    try:
        yield
    except (LlmWsaeError, MemoryError):
        raise
    except Exception as error:
        raise _sentence(error, repo_id, revision) from error


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> LlmWsaeError:
    """The client wraps failures in failures, so the causes are searched for one that is known."""
    known = {"repo": repo_id, "revision": revision, "hub": constants.ENDPOINT}
    cause: BaseException | None = error
    while cause is not None:
        for kinds, ours, sentence in _KNOWN:
            if isinstance(cause, kinds):
                return ours(sentence.format(**known, kind=type(cause).__name__))
        if isinstance(cause, errors.HfHubHTTPError):
            status, said = cause.response.status_code, str(cause.server_message or "")
            said = f" ({without_secrets(' '.join(said.split()))[:300]})" if said else ""
            other = f"the Hub answered with status {status} about {{repo}}{{said}}; {_AGAIN} later"
            return LlmWsaeError(_BY_STATUS.get(status, other).format(**known, said=said))
        cause = cause.__cause__ or cause.__context__
    said = without_secrets(reason(error))
    if isinstance(error, OSError):
        return LlmWsaeError(f"reading or writing files for {repo_id} failed: {said}")
    return LlmWsaeError(
        f"an answer of the Hub ({constants.ENDPOINT}) about {repo_id} cannot be used: {said}"
    )
