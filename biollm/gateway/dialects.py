"""The dialects that the gateway speaks: how a route writes requests, answers, streams and errors. Pure.

LiteLLM's proxy passes on the status of whatever failed. Coding agents repeat a 5xx up to 30 times in as many seconds;
the agents of the translated dialects get a status that they wait after, or one that ends their attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from biollm.gateway import messages_api, openai_api, responses_api
from biollm.types import Json

_RETRY_AFTER_S = "15"
# No working key: only the user can help. No answer, or none in time: another time, perhaps.
_STATUSES = {502: 400, 503: 429, 504: 429}


class Events(Protocol):
    """The server-sent events of one streamed answer, made from the chunks of a chat completion."""

    def feed(self, chunk: Json) -> Iterator[str]:
        """Yield the events of a chunk."""
        ...

    def end(self) -> Iterator[str]:
        """Yield what follows the last chunk."""
        ...

    def fail(self, status: int, error: Json, retry_after: float) -> Iterator[str]:
        """Yield the event of an error that ends the stream; `retry_after` is in seconds."""
        ...


@dataclass(frozen=True)
class _Functions:
    """What a dialect's module has; see `messages_api`."""

    request: Callable[[Json], Json]
    answer: Callable[[Json, Json], Json]
    events: Callable[[Json], Events]
    problem: Callable[[int, Json], Json]
    ping: str
    statuses: Mapping[int, int] = field(default_factory=lambda: _STATUSES)
    too_long_in_stream: bool = False


class _ChatEvents:
    """The events of a chat completion as it is."""

    def __init__(self, _: Json) -> None:
        pass

    def feed(self, chunk: Json) -> Iterator[str]:
        yield openai_api.event(chunk)

    def end(self) -> Iterator[str]:
        yield openai_api.DONE

    def fail(self, status: int, error: Json, retry_after: float) -> Iterator[str]:
        yield openai_api.event(error)


_CHAT = _Functions(lambda body: body, lambda chat, _: chat, _ChatEvents, lambda _, error: error, responses_api.PING, {})
_MESSAGES = _Functions(
    messages_api.request, messages_api.answer, messages_api.Events, messages_api.problem, messages_api.PING
)
_RESPONSES = _Functions(
    responses_api.request,
    responses_api.answer,
    responses_api.Events,
    lambda _, error: error,
    responses_api.PING,
    too_long_in_stream=True,
)
_ROUTES = {"/v1/messages": _MESSAGES, "/v1/messages/count_tokens": _MESSAGES, "/v1/responses": _RESPONSES}


class Dialect:
    """A request in the dialect of its route.

    Args:
        path: That of the request's URL.
        body: The request's JSON.
    """

    def __init__(self, path: str, body: Json | None = None) -> None:
        self._functions, self._body = _ROUTES.get(path, _CHAT), body or {}
        self.ping = self._functions.ping

    def request(self) -> Json:
        """Return the request as one for a chat completion, or for a completion on that route.

        Raises:
            UsageError: It has a fault, or asks for what cannot be had here.
        """
        return self._functions.request(self._body)

    def answer(self, chat: Json) -> Json:
        """Return a whole chat completion in this dialect."""
        return self._functions.answer(chat, self._body)

    def events(self) -> Events:
        """Return what makes the events of the answer."""
        return self._functions.events(self._body)

    def refusal(self, error: Exception, status: int | None = None) -> tuple[int, Json | str, dict[str, str]]:
        """Return the status, body and headers of an error: JSON, or the text of a stream.

        Codex makes its conversation shorter only where a stream states that it is too long.
        """
        usual, body, headers = openai_api.refusal(error)
        status = self._functions.statuses.get(status or usual, status or usual)
        if status == 429:
            headers = {"retry-after": _RETRY_AFTER_S, **headers}
            headers.pop("x-should-retry", None)
        too_long = body["error"]["code"] == "context_length_exceeded"
        if too_long and self._functions.too_long_in_stream and self._body.get("stream"):
            return 200, "".join(self.events().fail(status, body, 0)), headers
        return status, self.problem(status, body), headers

    def problem(self, status: int, error: Json) -> Json:
        """Return OpenAI's body of an error in this dialect."""
        return self._functions.problem(status, error)


def failure(events: Events, error: Exception) -> Iterator[str]:
    """Yield the event of an error that ends a stream."""
    status, body, headers = openai_api.refusal(error, streamed=True)
    return events.fail(status, body, float(headers.get("retry-after", _RETRY_AFTER_S)))
