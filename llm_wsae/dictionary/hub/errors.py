"""What can go wrong between here and the Hub, each in one sentence.

The client wraps failures in failures (an upload's thread in a RuntimeError, a refused connection in
a missing cache entry), so the whole chain of causes is looked at. A token is never part of a
sentence: nothing of the request is repeated but the repository's name.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from llm_wsae.errors import LlmWsaeError, UsageError, nearest

_LOGIN = "(`hf auth login`, or the variable HF_TOKEN)"
_TOKEN = re.compile(r"\bhf_\w+|Bearer\s+\S+")
_LONGEST_ANSWER = 300
_BAD_ANSWER = (ValueError, KeyError, TypeError)  # no JSON, or not what a Hub says


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure of the client inside the block (nothing else) into one sentence.

    Raises UsageError when a name is wrong (repository, revision), LlmWsaeError for everything else:
    no access, no network, a failing server, a full disk.
    """
    from huggingface_hub.utils import httpx

    try:
        yield
    except LlmWsaeError:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, *_BAD_ANSWER) as error:
        known = _sentence(error, repo_id, revision)
        if known is None:
            raise
        if _holds_the_token(error):
            raise known from None
        raise known from error


def unreachable(error: BaseException) -> bool:
    """Whether the Hub could not be asked at all, so that the cache may answer in its place."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError | OfflineModeIsEnabled)


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> LlmWsaeError | None:
    """None for what is no failure of the Hub but a mistake of ours."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx

    chain = list(_causes(error))
    for one in chain:
        if _holds_the_token(one):
            return LlmWsaeError(f"your token holds characters that no token has; log in {_LOGIN}")
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
                "the network and run the same again"
            )
        if isinstance(one, httpx.HTTPError):
            return LlmWsaeError(
                f"the connection to the Hub broke off ({type(one).__name__}), with nothing of "
                f"{repo_id} half written; run the same again"
            )
    if "Consistency check failed" in str(error):
        return LlmWsaeError(f"a file of {repo_id} arrived incomplete; run the same again")
    if isinstance(error, OSError):
        return LlmWsaeError(f"reading or writing files for {repo_id} failed: {error}")
    if isinstance(error, _BAD_ANSWER):
        return LlmWsaeError(
            f"an answer of the Hub ({constants.ENDPOINT}) about {repo_id} cannot be used: "
            f"{_clean(str(error))}"
        )
    return None


def _answer(error, repo_id: str, revision: str | None) -> LlmWsaeError:  # an HfHubHTTPError
    """The Hub answered, but not with what was asked for."""
    from huggingface_hub import errors, get_token

    status, said = error.response.status_code, _clean(error.server_message or "")
    if isinstance(error, errors.GatedRepoError):
        return LlmWsaeError(f"{repo_id} is gated: accept its terms on the Hub and log in {_LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo_id} has no revision {revision!r}{_known_revisions(repo_id)}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return LlmWsaeError(f"{repo_id} lost a file while it was read; run the same again")
    if status == 401 and "credentials" in said:
        return LlmWsaeError(f"the Hub does not accept your token; log in again {_LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        if get_token() is None:
            return UsageError(
                f"there is no repository {repo_id} on the Hub that can be seen or written without "
                f"a token; check the name, or log in {_LOGIN}"
            )
        return UsageError(
            f"there is no repository {repo_id} on the Hub, or your token may not see it; check the "
            f"name, or log in as someone who may {_LOGIN}"
        )
    if status == 403:
        return LlmWsaeError(
            f"your token may not do that with {repo_id}; log in with one that may {_LOGIN}"
        )
    if status in (409, 412):
        return LlmWsaeError(
            f"{repo_id} was changed by someone else in the meantime, and nothing was written; run "
            "the same again"
        )
    if status == 429:
        return LlmWsaeError("the Hub refuses more requests for now; run the same again later")
    if status >= 500:
        return LlmWsaeError(
            f"the Hub failed with status {status}, and {repo_id} was left as it was; run the same "
            "again later"
        )
    return LlmWsaeError(
        f"the Hub refused with status {status} about {repo_id}: {said or 'no word'}"
    )


def _holds_the_token(error: BaseException) -> bool:
    """Whether it is about a header that cannot be sent, and may show it; the only one of ours that
    can be so is the token's."""
    from huggingface_hub.utils import httpx

    if isinstance(error, httpx.LocalProtocolError):
        return "header" in str(error).lower()
    return isinstance(error, UnicodeEncodeError)


def _known_revisions(repo_id: str) -> str:
    """A clause with the branches and tags there are, when the Hub tells them."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    try:
        refs = HfApi().list_repo_refs(repo_id)
    except httpx.HTTPError:
        return ""
    return "; " + nearest("", [ref.name for ref in (*refs.branches, *refs.tags)])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _clean(text: str) -> str:
    """A server's words on one line, without anything that looks like a token."""
    return _TOKEN.sub("…", " ".join(text.split()))[:_LONGEST_ANSWER]
