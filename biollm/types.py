"""The values that a completion returns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, get_args

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    Parsed = TypeVarWithDefault("Parsed", covariant=True, default=Any)
else:
    Parsed = TypeVar("Parsed", covariant=True)

Kind = TypeVar("Kind")
Json = dict[str, Any]
ChunkKind = Literal["text", "reasoning", "tool_call", "usage"]
BLOCKED = ("limited", "cooling")  # what a deployment is until a time
Outcome = Literal["ok", "skipped", "limited", "cooling", "refused", "failed", "cancelled", "cached"]
DataPolicy = Literal["any", "no_training", "local_only"]
DATA_POLICIES: tuple[DataPolicy, ...] = get_args(DataPolicy)  # from loose to strict


def known(kind: type[Kind], facts: Mapping[str, Any]) -> Kind:
    """Make a dataclass of fields that another version may have written, without those it does not have."""
    return kind(**{each.name: facts[each.name] for each in fields(kind) if each.name in facts})  # type: ignore[arg-type]


def part(given: Json, name: str) -> Json:
    """Return an object inside a JSON object; {} where it is null or missing."""
    return given.get(name) or {}


def short(amount: float, digits: int = 3) -> str:
    """Return a number as people write it: 12, 1.5k, 30M."""
    size, letter = next(((n, s) for n, s in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if amount >= n), (1, ""))
    return f"{amount / size:.{digits}g}{letter}"


def iso(epoch: float | None) -> str | None:
    """Return epoch seconds as ISO 8601 in UTC; None for None and 0."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="seconds") if epoch else None


def counted(count: int, noun: str) -> str:
    """Return 1 input, 1,200 inputs."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def span(seconds: float) -> str:
    """Return seconds as people write them: 45 s, 12 min, 3 h, 2 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{math.ceil(seconds)} s"


def seconds_of(written: str) -> float | None:
    """Return the seconds of a time as people write it, such as 7d, 12h, 30min or 90s; None of anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)", written.strip())
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[found[2]] if found else None


class Fields(Json):
    """A JSON object whose fields are attributes as well: `raw.choices[0].message.content`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return _with_attributes(self[name])
        except KeyError:
            raise AttributeError(name) from None


def _with_attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return Fields(cast("Json", value))
    return [_with_attributes(each) for each in cast("list[Any]", value)] if isinstance(value, list) else value


@dataclass(frozen=True)
class Attempt:
    """One deployment's part in a request.

    Attributes:
        deployment: Its id, "provider/model" or "provider.account/model".
        outcome: "ok"; "skipped" (may not serve: key missing, capability, policy), "limited" (at a
            limit), "cooling" (on cooldown after a failure), "refused" (its key was), all with nothing sent; "failed" (sent, no answer); "cancelled" (by the caller).
        reason: One sentence; empty when ok. Never holds a key or a prompt.
        status: The HTTP status, if one came.
        ms: Milliseconds from sending to the end of the attempt.
    """

    deployment: str
    outcome: Outcome
    reason: str = ""
    status: int | None = None
    ms: float = 0.0


@dataclass(frozen=True)
class Usage:
    """Tokens of one completion.

    Attributes:
        prompt_tokens: Includes those read from and written to the provider's cache.
        completion_tokens: Includes the reasoning.
        estimated: Whether the provider reported none, and these were estimated from the length of the text.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        """Return prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class _Printed:
    """What an f-string formats as its text, width and alignment included."""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True)
class Completion(_Printed, Generic[Parsed]):
    """An answer, which deployment gave it, and what was tried before.

    It prints and formats as its text. For anything else that a string does (`in`, `len`, `+`, `.split()`), take
    `completion.text`: an answer that only calls tools has an empty text, and must not be false, or equal to another.

    `Completion[Diagnosis]` is the type of an answer to `response_model=Diagnosis`.

    Attributes:
        text: The answer; also `str(completion)`.
        provider: Name in providers.yaml.
        account: The account's name ("default" where a provider has only one).
        model: Name in models.yaml, or of the provider's `models`.
        deployment: The deployment's id.
        usage: Tokens as the provider counted them, else an estimate.
        cost_usd: In USD, by `costs.per_million_tokens`, else LiteLLM's map; None when the price is unknown.
        latency_ms: Milliseconds of the whole call, failed attempts included.
        attempts: Every deployment that was tried or skipped, in order.
        degraded: True when the embedded model answered.
        cached: True when it is a stored answer: `cost_usd` is 0 then, and `usage` that of the original.
        parsed: The object of `response_model`; plain data where that is a JSON Schema, None without one.
        tool_calls: OpenAI-shaped tool calls.
        finish_reason: The provider's own.
        notes: What was done to the attachments before they were sent, and which similar request a stored answer was made
            for; a sentence each.
        id: The request's id in the usage records, which `Client.rate` takes.
        reasoning: What the model thought before its answer, where the provider sends that.
        raw: OpenAI's JSON with every field that the provider sent: a dict whose fields are attributes as well.
    """

    text: str
    provider: str
    account: str
    model: str
    deployment: str
    usage: Usage = Usage()
    cost_usd: float | None = None
    latency_ms: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    degraded: bool = False
    cached: bool = False
    parsed: Parsed = None  # pyright: ignore[reportAssignmentType] # without a response_model
    tool_calls: tuple[dict[str, Any], ...] = ()
    finish_reason: str = ""
    reasoning: str = ""
    notes: tuple[str, ...] = ()
    id: str = ""
    raw: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StreamChunk(_Printed):
    """A piece of a streamed answer; it prints and formats as its text, which only the kind "text" has.

    Attributes:
        kind: "text", "reasoning", "tool_call" (one whole call) or "usage" (the end: tokens, and the completion).
        chunk: OpenAI's `chat.completion.chunk`, with every field that the provider sent.
        completion: The whole answer; with the last piece only.
        degraded: Whether the embedded model gives it.
    """

    text: str = ""
    completion: Completion | None = None
    kind: ChunkKind = "text"
    chunk: Json = field(default_factory=dict[str, Any], repr=False)
    degraded: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StreamRestarted(_Printed):
    """The stream broke and restarts on the next deployment: discard the text so far. `str()` is ""."""

    attempt: Attempt

    def __str__(self) -> str:
        return ""


Piece = StreamChunk | StreamRestarted
