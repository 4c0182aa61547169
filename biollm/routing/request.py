"""One request on its way down the waterfall: what was tried, what it cost, and how it ends if nobody answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from biollm.errors import (
    AllLimitedError,
    CompletionError,
    ContentPolicyError,
    DeadlineError,
    KeysRefusedError,
    RequestRejectedError,
)
from biollm.routing.candidates import Candidate
from biollm.routing.deployments import Deployment, Requirements
from biollm.routing.failures import Failure
from biollm.routing.structured import Message, ResponseSchema
from biollm.types import Attempt, Outcome

if TYPE_CHECKING:
    from biollm.slurm.submissions import Job

# Seconds. A pass over the waterfall is repeated no sooner than this after a failure that cools nothing, and not at
# all when the soonest rung frees later than a person would wait.
BREATH, PATIENCE = 0.5, 300.0

_OUTCOMES: dict[str, Outcome] = {"limited": "limited", "refused": "limited"}


@dataclass(frozen=True)
class Request:
    """What a caller asked for. Times are in seconds; `timeout` is per attempt, `deadline` for the whole call.

    Attributes:
        params: Further arguments of LiteLLM's `acompletion`: temperature, max_tokens, tools...
        on_send: Called with a deployment's id just before a request goes to it.
        middle: (prefix, suffix) of code to fill in between, instead of messages; without a suffix, a text to continue.
        start: Start a server on the cluster when nobody else answers; then wait `wait` seconds for it.
        on_state: Called with the job that is waited for whenever it has changed.
        asked: When the call began, by the monotonic clock.
    """

    messages: list[Message]
    params: Mapping[str, Any]
    requirements: Requirements
    timeout: float | None = None
    deadline: float | None = None
    fallback: bool = True
    max_retries: int = 0
    schema: ResponseSchema | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    on_interrupt: Literal["raise", "restart"] = "raise"
    on_send: Callable[[str], None] | None = None
    middle: tuple[str, str | None] | None = None
    start: bool = False
    wait: float | None = None
    on_state: Callable[[Job], None] | None = None
    patience: float | None = None
    asked: float = field(default_factory=time.monotonic)

    @asynccontextmanager
    async def in_time(self, attempts: Callable[[], Sequence[Attempt]] = tuple) -> AsyncGenerator[None]:
        """Bound what is inside by the deadline.

        Raises:
            DeadlineError: It passed; with the `attempts` so far.
        """
        until = None if self.deadline is None else self.asked + self.deadline
        scope = asyncio.timeout_at(until)  # an event loop's clock is the monotonic one
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineError(f"No answer within the deadline of {self.deadline:g} s.", tuple(attempts())) from None


@dataclass
class Run:
    """The memory of one request.

    Attributes:
        tried: Ids of deployments that failed in this pass.
        frees: Epoch seconds at which something that stood in the way for a passing reason frees, this pass.
        pinned: With `fallback=False`, the only deployment that may be asked.
        failures: What each failed attempt meant, with the deployment that was asked.
        over: The failure after which no other deployment is asked.
        repeat: The deployment that is asked once more at once.
        repeated: Ids of those that were.
        caps: Deployment id -> the most tokens of answer that its account can pay for.
        spare: An answer that was cut for want of room, which is given if no deployment has a longer one.
        waiting_since: When patience for an earlier deployment began, on the monotonic clock.
    """

    request: Request
    id: str = field(default_factory=lambda: uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    tried: set[str] = field(default_factory=set[str])
    frees: list[float] = field(default_factory=list[float])
    passes: int = 0
    pinned: str | None = None
    failures: list[tuple[Deployment, Failure]] = field(default_factory=list[tuple[Deployment, Failure]])
    over: Failure | None = None
    repeat: Deployment | None = None
    repeated: set[str] = field(default_factory=set[str])
    caps: dict[str, int] = field(default_factory=dict[str, int])
    spare: InFlight | None = None
    waiting_since: float | None = None
    _attempts: list[tuple[int, int, Attempt]] = field(default_factory=list[tuple[int, int, Attempt]])
    _passed: dict[tuple[int, str], Candidate] = field(default_factory=dict[tuple[int, str], Candidate])

    @property
    def ms(self) -> float:
        """Return the milliseconds since the request began."""
        return (time.perf_counter() - self.started) * 1000

    @property
    def waited(self) -> float:
        """Return the seconds since patience for an earlier deployment began."""
        return 0.0 if self.waiting_since is None else time.monotonic() - self.waiting_since

    def patient(self) -> None:
        """Note that patience has begun."""
        self.waiting_since = self.waiting_since or time.monotonic()

    def pass_over(self, candidate: Candidate) -> None:
        """Note a deployment that is not asked in this pass."""
        ident = candidate.deployment.id
        if (self.passes, ident) not in self._passed:
            self._passed[self.passes, ident] = candidate
            if candidate.status == "limited":
                self.frees.append(candidate.until)

    def note(self, deployment: Deployment, attempt: Attempt) -> None:
        """Note an attempt that was made."""
        self._attempts.append((self.passes, deployment.order, attempt))

    def attempts(self) -> tuple[Attempt, ...]:
        """Return what was tried and what was passed over before the last rung that was asked, in order."""
        answered = next((order for _, order, attempt in reversed(self._attempts) if attempt.outcome == "ok"), None)
        every = list(self._attempts)
        for (number, ident), candidate in self._passed.items():
            order = candidate.deployment.order
            if answered is None or order < answered or number < self.passes:
                every.append(
                    (number, order, Attempt(ident, _OUTCOMES.get(candidate.status, "skipped"), candidate.reason))
                )
        return tuple(attempt for _, _, attempt in sorted(every, key=lambda entry: entry[:2]))

    def passed_first(self) -> str:
        """Return why the first rung gave no answer, "limited: 15/min used by ..."; empty where it did."""
        first = next(iter(self.attempts()), None)
        return f"{first.outcome}: {first.reason}" if first and first.outcome != "ok" else ""

    def next_pass(self) -> float | None:
        """Return the seconds to wait before another pass over the waterfall, or None when there shall be none."""
        if self.passes >= self.request.max_retries or self.over or self.spare or not self.frees:
            return None
        wait = max(0.0, min(self.frees) - time.time())
        if wait > PATIENCE:
            return None
        self.passes += 1
        self.tried.clear()
        self.frees.clear()
        return wait

    def failure(self) -> CompletionError:
        """Return the error that says why nobody answered."""
        attempts = self.attempts()
        told = _told(attempts)
        if self.over:
            return self._ended(self.over, attempts)
        kinds = {failure.kind for _, failure in self.failures}
        blame = {deployment.provider.litellm_provider for deployment, each in self.failures if each.kind == "malformed"}
        hint = "Providers of different dialects say that the request itself is wrong." if len(blame) > 1 else None
        if kinds and all(failure.rule.fault for _, failure in self.failures):
            return RequestRejectedError(f"The request was rejected.\n{told}", attempts, hint=hint)
        standings = {candidate.status for (number, _), candidate in self._passed.items() if number == self.passes}
        keyless = kinds <= {"key"} and "limited" not in standings
        if keyless and (kinds or standings & {"keyless", "refused"}):
            where = "`biollm providers` shows which keys are missing; `biollm health` tries them."
            return KeysRefusedError(f"No provider has a key that works.\n{told}", attempts, hint=where)
        if kinds <= {"limited"} and (kinds or "limited" in standings) and self.frees:
            wait = max(0.0, min(self.frees) - time.time())
            return AllLimitedError(f"Every provider is at a limit or resting.\n{told}", attempts, retry_after=wait)
        if not attempts:
            return CompletionError(
                "No provider is configured that could answer.", hint="`biollm config` shows what is."
            )
        return CompletionError(f"Nobody could answer.\n{told}", attempts, hint=hint)

    def _ended(self, failure: Failure, attempts: Sequence[Attempt]) -> CompletionError:
        """Return the error of a failure after which no other deployment is asked."""
        said = f"{self.failures[-1][0].id}: {failure.reason}"
        if failure.kind == "refusal":
            hint = "`on_refusal: next` under `routing:` in providers.yaml, or of a provider, asks the next one."
            return ContentPolicyError(f"Refused by content policy. {said}", attempts, hint=hint)
        if failure.kind == "used_up":
            return RequestRejectedError(f"No text came. {said}", attempts, hint="Raise max_tokens.")
        return RequestRejectedError(f"The request is not valid. {said}", attempts)


def _told(attempts: Sequence[Attempt]) -> str:
    """Return a line per account and reason: its models often fail for the same one."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for attempt in attempts:
        who, _, model = attempt.deployment.partition("/")
        groups.setdefault((who, attempt.reason), {})[model] = None
    names = {
        key: f"/{next(iter(models))}" if len(models) == 1 else f" ({len(models)} models)"
        for key, models in groups.items()
    }
    return "\n".join(f"  {who}{names[who, reason]}: {reason}" for who, reason in groups)


@dataclass(eq=False)
class InFlight:
    """One attempt that LiteLLM was asked for. Times are epoch seconds and milliseconds.

    Attributes:
        broken: What the caller's `on_send` raised; nothing was sent then.
        head: A stream's chunks up to its first content.
        alone: No other deployment of its order could have been asked.
    """

    deployment: Deployment
    reservation: int | None
    at: float
    started: float
    response: Any = None
    ttft_ms: float | None = None
    broken: Exception | None = None
    head: list[Any] = field(default_factory=list[Any])
    alone: bool = True

    @property
    def ms(self) -> float:
        """Return the milliseconds since it was sent."""
        return (time.perf_counter() - self.started) * 1000
