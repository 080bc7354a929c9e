"""A language model behind an OpenAI-compatible endpoint, asked at most once for each answer.

Every answer is appended to a file as soon as it arrives, under the checksum of its question, and is
never asked for again. The key comes from the environment and goes nowhere except into the header of
the requests, and to another machine only encrypted. A reply is read within limited time and size.
"""

import asyncio
import hashlib
import ipaddress
import json
import math
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.utils import httpx

from llm_wsae.artifact.files import check_line, folder_lock, json_line, refusals_to_write
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.explaining.protocol import Question
from llm_wsae.outside import integer, mapping, parse_json, reason
from llm_wsae.terminal import printable

KEY, OPENAI_KEY, OPENAI = "LLM_WSAE_API_KEY", "OPENAI_API_KEY", "api.openai.com"
ANSWERS = "answers.jsonl"
TRIES = 6
LONGEST_WAIT = 120.0  # seconds; an endpoint that asks to wait longer ends the run
_TIMEOUT = 600.0  # seconds for a whole reply; a large model on a small machine is slow
_LARGEST = 1 << 22  # bytes of a reply; an answer has a few thousand
_LIKELIEST = 20  # first tokens of a graded answer; more are refused by OpenAI
_QUOTED = 200  # characters of what an endpoint says
_IN_A_ROW = 3  # failed questions that end the run
_OF_THE_QUESTION = {400, 413, 422}  # its length, or a filter of its words
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # worth another try
_HOPELESS = {  # what no other question would change
    401: f"it refuses the key; set {KEY} (for {OPENAI}, {OPENAI_KEY} does too)",
    402: "it asks for a payment",
    403: f"it refuses access; check the account and {KEY}",
    404: "there is no such model or address; an address usually ends in /v1",
    405: "there is no such address; it usually ends in /v1",
}


@dataclass
class Tally:
    """What was asked in this run."""

    asked: int = 0  # questions that were answered by the endpoint
    known: int = 0  # questions whose answers were in the file already
    failed: int = 0  # questions without an answer, after all tries
    tokens_in: int = 0  # of the endpoint's answers in this run, as it counts them
    tokens_out: int = 0
    why: str = ""  # what the last failed question failed of


class Endpoint:
    """A language model to ask, from several threads at once; use it as a context manager. Raises as
    ``check_endpoint`` does, and LlmWsaeError if another run holds the folder."""

    def __init__(
        self,
        address: str,
        explainer: str,
        out: Path,
        answer_tokens: int = 500,
        schema: bool = True,
        *,
        timeout: float = _TIMEOUT,
        wait: Callable[[float], object] | None = None,
    ):
        self.tally = Tally()
        address, self._key = check_endpoint(address)
        self._url = f"{address}/chat/completions"
        # OpenAI's newer models refuse the older name, which all other servers know
        openai = urlsplit(address).hostname == OPENAI
        self._limit = "max_completion_tokens" if openai else "max_tokens"
        self._body = {"model": explainer, "temperature": 0, self._limit: answer_tokens}
        self._schema, self._timeout = schema, timeout
        self._path = Path(out) / ANSWERS
        self._stopped, self._lock, self._in_a_row = threading.Event(), threading.Lock(), 0
        self._wait = wait or self._stopped.wait
        self._headers = {"accept-encoding": "identity"}  # unpacked, a reply may be of any size
        if self._key:
            self._headers["authorization"] = f"Bearer {self._key}"
        self._tls = httpx.create_ssl_context()  # once: certificates take long to read
        self._known: dict[str, str] = {}  # answers by question

    def __enter__(self) -> "Endpoint":
        with ExitStack() as held, refusals_to_write(self._path):
            held.enter_context(folder_lock(self._path.parent, "answers"))
            self._file = held.enter_context(open(self._path, "a+b"))
            self._file.seek(0)
            data = self._file.read()
            if data and not data.endswith(b"\n"):  # a kill cut off the last line
                self._file.write(b"\n")
            self._held = held.pop_all()
        for line in data.split(b"\n"):
            with suppress(ValueError, RecursionError):  # damaged or cut off: it is asked again
                entry = check_line(line.decode("utf-8"))
                self._known[entry["question"]] = entry["answer"]
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def stop(self) -> None:
        """Let the questions of all threads end soon, without an answer."""
        self._stopped.set()

    def ask(self, question: Question, about: str) -> str | None:
        """The answer; None if there is none after all tries. ``about`` is noted beside it.

        Raises LlmWsaeError where no other question would fare better, or several in a row failed.
        """
        messages = [
            {"role": "system", "content": question.system},
            {"role": "user", "content": question.user},
        ]
        body = {**self._body, "messages": messages}
        if question.graded:
            body |= {self._limit: 1, "logprobs": True, "top_logprobs": _LIKELIEST}
        elif self._schema:
            # not "strict", for which each service has its own idea of what a schema may say
            form = {"name": "answer", "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        asked = json.dumps([self._url, body], sort_keys=True).encode()
        digest = hashlib.sha256(asked).hexdigest()
        with self._lock:
            if digest in self._known:
                self.tally.known += 1
                return self._known[digest]
        answer, why, status = self._answer(body)
        with self._lock:
            if answer is not None:
                return self._keep(
                    {"question": digest, "about": about, **answer, "messages": messages}
                )
            if not self._stopped.is_set():
                self._failed(why, status)
            return None

    def _answer(self, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str, int]:
        """The endpoint's reply, or None and why there is none; and the last status, or 0."""
        why, status = "the run was stopped", 0
        for attempt in range(TRIES):
            if self._stopped.is_set():
                break
            pause = 2.0**attempt
            try:
                status, text, asked_pause = asyncio.run(self._reply(body))
            except (TimeoutError, httpx.TimeoutException):
                why = "it did not answer in time"
            except (httpx.HTTPError, ValueError, LookupError, RuntimeError, OSError) as error:
                failed = isinstance(error, httpx.TransportError)
                what = "it cannot be reached" if failed else "its reply cannot be read"
                why = f"{what} ({self._safe(reason(error))})"
                if isinstance(error, httpx.ConnectError) and not self.tally.asked:
                    raise LlmWsaeError(f"{self._url} was not asked anything: {why}") from error
            else:
                if status == 200 and (found := _content(text, "logprobs" in body)):
                    return found, "", status
                why = self._refusal(status, text)
                if status != 200 and status not in _PASSING:
                    break
                pause = max(pause, self._seconds(asked_pause) if status != 200 else 0.0)
            if attempt + 1 < TRIES:
                self._wait(pause)
        return None, why, status

    async def _reply(self, body: dict[str, Any]) -> tuple[int, str, str]:
        """Status, text and Retry-After of a reply, complete in time and not too large."""
        trust_env = not _is_here(self._url)  # a proxy is another machine
        client = httpx.AsyncClient(verify=self._tls, timeout=self._timeout, trust_env=trust_env)
        data = bytearray()
        async with (
            asyncio.timeout(self._timeout),  # httpx limits only the wait for the next bytes
            client,
            client.stream("POST", self._url, json=body, headers=self._headers) as reply,
        ):
            async for part in reply.aiter_raw():
                data += part
                if len(data) > _LARGEST:
                    raise ValueError(f"it has more than {_LARGEST:,} bytes")
        text = data.decode("utf-8", "replace")
        return reply.status_code, text, reply.headers.get("retry-after", "")

    def _refusal(self, status: int, text: str) -> str:
        """What a reply without an answer says."""
        if status == 200:
            return f"its reply is not one of chat/completions: {self._safe(text)}"
        if status in _HOPELESS:
            raise LlmWsaeError(f"{self._url} answered with {status}: {_HOPELESS[status]}")
        form = self._schema and status in (400, 422)
        hint = "; --schema False does without response_format" if form else ""
        return f"it answered with {status}: {self._safe(text)}{hint}"

    def _seconds(self, retry_after: str) -> float:
        """How long a reply asks to wait; 0 for a date, which model servers do not send."""
        try:
            seconds = max(0.0, float(retry_after or 0))
        except ValueError:
            return 0.0
        if seconds > LONGEST_WAIT:
            raise LlmWsaeError(
                f"{self._url} asks to wait {seconds:.6g} seconds; run the same command again then: "
                "what was answered is kept"
            )
        return seconds

    def _safe(self, text: str) -> str:
        """Foreign text, printable, on one line, short and without the key."""
        line = " ".join(self._without_key(text).split())
        return printable(line if len(line) <= _QUOTED else f"{line[:_QUOTED]}…")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text

    def _failed(self, why: str, status: int) -> None:
        self.tally.failed += 1
        self.tally.why = why
        if status in _OF_THE_QUESTION and self.tally.asked + self.tally.known:
            return  # it answers others: those that it always refuses must not end every further run
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            raise LlmWsaeError(
                f"{self._url} failed {self._in_a_row} questions in a row: {why}; run the same "
                "command again to resume, what was answered is kept"
            )

    def _keep(self, line: dict[str, Any]) -> str:
        answer = line["answer"].encode(errors="replace").decode()  # half a character
        line["answer"] = answer = self._without_key(answer)
        with refusals_to_write(self._path):
            self._file.write(json_line(line).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self._known[line["question"]] = answer
        self._in_a_row = 0
        self.tally.asked += 1
        self.tally.tokens_in += line["tokens_in"]
        self.tally.tokens_out += line["tokens_out"]
        return answer


def check_endpoint(address: str) -> tuple[str, str]:
    """The address without what is added to it, and the key for it, empty if there is none; OpenAI's
    goes to OpenAI alone. Raises UsageError if the address is not one of http(s) or holds more, or
    if the key cannot be one or would be sent to another machine in clear."""
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(httpx.URL(address).host)
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        raise UsageError(
            f"{shown(address)} is not the address of an endpoint; it looks like "
            f"https://{OPENAI}/v1 or http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "the endpoint's address must not hold a password, a query or a fragment; a key "
            f"belongs into {KEY}"
        )
    name, key = KEY, os.environ.get(KEY, "").strip()
    if not key and parts.hostname == OPENAI:
        name, key = OPENAI_KEY, os.environ.get(OPENAI_KEY, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise UsageError(f"{name} does not hold a key: it has spaces or special characters in it")
    if key and parts.scheme == "http" and not _is_here(address):
        raise UsageError(
            f"{name} would be sent to {shown(address)} unencrypted; use https, reach that machine "
            f"through a tunnel to 127.0.0.1, or unset {name} if the endpoint needs no key"
        )
    return address.rstrip("/").removesuffix("/chat/completions"), key


def _is_here(address: str) -> bool:
    """Whether an address leads to this machine."""
    host = httpx.URL(address).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _content(text: str, graded: bool) -> dict[str, Any] | None:
    """Text and token counts of a completion; None if it is none. ``graded``: instead of its text
    the probability of yes. Raises LlmWsaeError if it has none, since no other would."""
    try:
        value = parse_json(text, "reply")
        choice = value["choices"][0]
        content, logprobs = choice["message"]["content"], choice.get("logprobs")
        usage = mapping(value.get("usage"))
    except (LlmWsaeError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(content, str | None):
        return None
    if graded and not logprobs:
        raise LlmWsaeError(
            "the endpoint returns no log-probabilities, which the score graded is made of; leave "
            "it out of --scores"
        )
    if graded:
        content = _share_of_yes(logprobs)
    spent = [integer(usage.get(name)) or 0 for name in ("prompt_tokens", "completion_tokens")]
    return {"answer": content or "", "tokens_in": max(0, spent[0]), "tokens_out": max(0, spent[1])}


def _share_of_yes(logprobs: Any) -> str:
    """The probability of yes beside that of no, of an answer's first token; empty if neither is
    among the likeliest."""
    sums = {"yes": 0.0, "no": 0.0}
    try:
        for one in logprobs["content"][0]["top_logprobs"]:
            word = one["token"].strip().lower()
            if word in sums:
                sums[word] += math.exp(min(one["logprob"], 0.0))
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""
    together = sum(sums.values())
    return f"{sums['yes'] / together:.6g}" if together > 0 else ""
