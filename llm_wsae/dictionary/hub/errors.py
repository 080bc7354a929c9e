"""What can go wrong between this machine and the Hub, each in one sentence.

The client's messages are paragraphs, and it wraps failures in failures (an upload thread's in a
RuntimeError, a refused connection in a missing cache entry). So the chain of causes is searched for
the one that says what happened. A token is never part of a sentence.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import check_token, reason
from llm_wsae.terminal import without_secrets

_LOGIN = "(`hf auth login`, or the variable HF_TOKEN)"
_LONGEST_ANSWER = 300
_CHANGED = (
    "{repo} was changed by someone else in the meantime, and nothing was written; run the same "
    "command again"
)
_BY_STATUS = {
    403: f"your token may not do that with {{repo}}; log in with one that may {_LOGIN}",
    409: _CHANGED,
    412: _CHANGED,
    429: "the Hub refuses more requests for now; run the same command again later",
}


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure inside the block into one sentence. Keep it to the client's calls, and to
    what reads answers: a server that answers oddly makes the client raise anything.

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
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # the client's own, of whichever version

    for one in _causes(error):
        if isinstance(one, LlmWsaeError):  # of an answer that is too long
            return one
        if isinstance(one, errors.OfflineModeIsEnabled):
            return LlmWsaeError(
                f"HF_HUB_OFFLINE is set, so the Hub cannot be asked about {repo_id}, and the local "
                "cache does not hold it; unset it"
            )
        if isinstance(one, errors.HFValidationError):
            return UsageError(
                f"{repo_id!r} cannot be the name of a repository on the Hub; give user/name"
            )
        if isinstance(one, errors.HfHubHTTPError):
            return _answer(one, repo_id, revision)
        if isinstance(one, httpx.ConnectError | httpx.ConnectTimeout | httpx.InvalidURL):
            return LlmWsaeError(
                f"the Hub ({constants.ENDPOINT}) cannot be reached to ask about {repo_id}; check "
                "the network and run the same command again"
            )
        if isinstance(one, httpx.HTTPError):
            return LlmWsaeError(
                f"the connection to the Hub broke off ({type(one).__name__}), and nothing of "
                f"{repo_id} is half written; run the same command again"
            )
    said = without_secrets(reason(error))
    if isinstance(error, OSError):
        return LlmWsaeError(f"reading or writing files for {repo_id} failed: {said}")
    return LlmWsaeError(
        f"an answer of the Hub ({constants.ENDPOINT}) about {repo_id} cannot be used: {said}"
    )


def _answer(error, repo_id: str, revision: str | None) -> LlmWsaeError:  # an HfHubHTTPError
    """The Hub answered, but not with what was asked for."""
    from huggingface_hub import errors, get_token

    status = error.response.status_code
    said = without_secrets(" ".join(str(error.server_message or "").split()))[:_LONGEST_ANSWER]
    if isinstance(error, errors.GatedRepoError):
        return LlmWsaeError(f"{repo_id} is gated: accept its terms on the Hub and log in {_LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{repo_id} has no revision {revision!r}; look at its branches on the Hub"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return LlmWsaeError(f"{repo_id} lost a file while it was read; run the same command again")
    if status == 401 and "credentials" in said:
        return LlmWsaeError(f"the Hub does not accept your token; log in again {_LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        without = " that can be seen or written without a token"
        reason = without if get_token() is None else ", or your token may not see it"
        return UsageError(
            f"there is no repository {repo_id} on the Hub{reason}; check the name, or log in as "
            f"someone who may {_LOGIN}"
        )
    if status >= 500:
        return LlmWsaeError(
            f"the Hub failed with status {status}, and {repo_id} was left as it was; run the same "
            "command again later"
        )
    known = _BY_STATUS.get(status, f"the Hub refused with status {status} about {{repo}}: {{said}}")
    return LlmWsaeError(known.format(repo=repo_id, said=said or "it gave no reason"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
