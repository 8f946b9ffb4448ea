"""Chat completions from an OpenAI-compatible server: many requests, several at once.

The protocol is that of OpenAI's `POST /chat/completions` (platform.openai.com/docs/api-reference),
which Ollama, vLLM, llama.cpp and the hosted services speak too. Nothing but the address given is
contacted: redirections are refused, and proxies are those of the environment.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Any

import httpx

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, discard
from pipeline.project.settings import EndpointParams
from pipeline.show.markdown import visible
from stages.download.web import retry_after

BACK_OFF_SECONDS = 0.5
"""The pause before the first repetition of a request; it doubles from one to the next."""
RETRY_AFTER_SECONDS = 60
"""The longest pause that a server may ask for."""
CONNECT_SECONDS = 10
LONGEST_REPLY = 1 << 20
"""Bytes of a server's answer."""
_BUSY = (408, 425, 429)


@plain_dataclass(frozen=True, slots=True)
class Reply:
    """What the model said; `cut` if it had more to say when its tokens ran out."""

    text: str
    cut: bool


class NoReplyError(Exception):
    """One request has brought no reply, and why; others may."""


class _PassingError(Exception):
    """A fault that may pass; `seconds` is how long the server asks to be left alone."""

    def __init__(self, fault: str, seconds: float = 0, *, unreachable: bool = False) -> None:
        super().__init__(fault)
        self.seconds = seconds
        self.unreachable = unreachable


def ask_all(
    params: EndpointParams,
    requests: Mapping[str, Mapping[str, Any]],
    take: Callable[[str, Reply | NoReplyError], None],
    log: Log = discard,
) -> int:
    """Send every request, `params.concurrency` at once, and hand over each reply as it comes.

    The requests run on an event loop of this thread, not on threads: so a time limit holds for
    the whole of a request, be it that its answer comes a byte a second, and Ctrl-C ends those under
    way at once.

    Args:
        params: the server.
        requests: by any name, the body of each: `model`, `messages` and so on.
        take: called in this thread with a request's name and its reply, or why there is none.
        log: told of the faults after which a request is repeated.

    Returns:
        How many requests were sent, repetitions included.

    Raises:
        InputError: there is no key, the server refuses it or knows no such model, or there is no
            server; no other request is sent then.
    """
    if not requests:
        return 0
    return asyncio.run(_ask_all(_Endpoint(params, log), requests, take))


async def _ask_all(
    endpoint: _Endpoint,
    requests: Mapping[str, Mapping[str, Any]],
    take: Callable[[str, Reply | NoReplyError], None],
) -> int:
    waiting = iter(requests.items())  # the workers take from it in turn

    async def work() -> None:
        for name, body in waiting:
            try:
                outcome: Reply | NoReplyError = await endpoint.ask(body)
            except NoReplyError as error:
                outcome = error
            take(name, outcome)

    try:
        async with endpoint.client, asyncio.TaskGroup() as workers:
            for _ in range(min(endpoint.params.concurrency, len(requests))):
                workers.create_task(work())
    except ExceptionGroup as errors:  # one line is enough, and the others say the same
        raise errors.exceptions[0] from None
    return endpoint.sent


class _Endpoint:
    """The server, and what is known of it so far.

    Attributes:
        params: where it is and how it is asked.
        client: holds the connections; to be entered before the first request.
        sent: requests that went out.
    """

    def __init__(self, params: EndpointParams, log: Log) -> None:
        self.params = params
        self.sent = 0
        self._log = log
        self._address = params.url.rstrip("/") + "/chat/completions"
        self._key = _read_key(params.key_env)
        self._heard = False  # whether the server has answered at all
        try:
            self.client = httpx.AsyncClient(
                headers={
                    "User-Agent": "gpt-pipeline",
                    "Accept-Encoding": "identity",
                    **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                },
                timeout=httpx.Timeout(params.timeout, connect=min(CONNECT_SECONDS, params.timeout)),
            )
        except (ImportError, ValueError, httpx.InvalidURL):
            raise InputError(
                "the proxy that the environment names (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) is of "
                "no kind that can be used; correct it, or set NO_PROXY"
            ) from None

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """The reply to one request, which is repeated after faults that may pass."""
        times = self.params.retries + 1
        for attempt in range(times):
            try:
                return await self._attempt(body)
            except _PassingError as error:
                fault = error
            if attempt + 1 < times:
                pause = max(BACK_OFF_SECONDS * 2**attempt, fault.seconds)
                self._log(Message(f"{self._address}: {fault}; trying again in {pause:.3g} seconds"))
                await asyncio.sleep(pause)
        if fault.unreachable and not self._heard:
            raise InputError(f"{self._address}: {fault}; start the server there, or correct url")
        raise NoReplyError(f"{fault} ({times} times)" if times > 1 else str(fault))

    async def _attempt(self, body: Mapping[str, Any]) -> Reply:
        self.sent += 1
        try:
            async with (
                asyncio.timeout(self.params.timeout),
                self.client.stream("POST", self._address, json=body) as response,
            ):
                self._heard = True
                content = await _bounded(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = visible(str(error)) or "no answer in time"
            raise _PassingError(f"no connection ({reason})", unreachable=True) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _PassingError(f"no answer within {self.params.timeout:g} seconds") from None
        except httpx.HTTPError as error:
            raise _PassingError(f"the connection failed ({type(error).__name__})") from None
        self._check(response, content, body)
        return self._reply(content)

    def _check(self, response: httpx.Response, content: bytes, body: Mapping[str, Any]) -> None:
        """Raise what a status other than 200 means."""
        status = response.status_code
        # The servers' own words for a refused key may quote it, and say nothing more.
        if status in (401, 403):
            name = self.params.key_env
            why = (
                f"the key in the environment variable {name} is refused; set it"
                if name
                else "it wants a key; name the environment variable that holds it in key_env"
            )
            raise InputError(f"{self._address}: HTTP {status}: {why}")
        said = self._without_key(_server_message(content))
        fault = f"HTTP {status}" + (f": {visible(said)}" if said else "")
        if status == 404:
            raise InputError(
                f"{self._address}: {fault}; correct model ({body.get('model')}) or url"
            )
        if response.is_redirect:
            target = visible(self._without_key(response.headers.get("Location", "")))
            raise InputError(
                f"{self._address}: {fault}: leads to {target or 'another address'}, and nothing "
                "but url is contacted; correct url"
            )
        if status in _BUSY or status >= 500:
            raise _PassingError(fault, retry_after(response.headers, RETRY_AFTER_SECONDS))
        if status != 200:
            raise NoReplyError(fault)

    def _reply(self, content: bytes) -> Reply:
        try:
            choice = json.loads(content)["choices"][0]
            text = choice["message"]["content"]
            cut = choice.get("finish_reason") == "length"
            if text is None:  # all of its tokens went into reasoning, say
                text = ""
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair fits no file
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise NoReplyError(
                "the server's answer is no JSON with a text at choices[0].message.content"
            ) from None
        return Reply(self._without_key(text), cut)

    def _without_key(self, text: str) -> str:
        """What a server sends back ends in files and on terminals."""
        return text.replace(self._key, "[key]") if self._key else text


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        wrong = "is empty" if not key else "holds blanks or other than ASCII characters"
        raise InputError(
            f"key_env: the environment variable {variable} {wrong}; put the key there alone"
        )
    return key


async def _bounded(response: httpx.Response) -> bytes:
    content = bytearray()
    async for block in response.aiter_bytes():
        content += block
        if len(content) > LONGEST_REPLY:
            raise NoReplyError(f"the server's answer is longer than {LONGEST_REPLY:,} bytes")
    return bytes(content)


def _server_message(content: bytes) -> str:
    """What a server says of an error: `{"error": {"message": …}}`, or `{"error": …}`."""
    try:
        error = json.loads(content)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""
    return message if isinstance(message, str) else ""
