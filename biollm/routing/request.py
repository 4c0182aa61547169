"""One request on its way through the waterfall: its options, what was tried, and the error if nothing answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import getrandbits
from typing import TYPE_CHECKING, Any, Literal

from biollm.errors import (
    AllLimitedError,
    CompletionError,
    ContentPolicyError,
    DeadlineError,
    KeysRefusedError,
    PromptTooLongError,
    RequestRejectedError,
)
from biollm.routing.deployments import Deployment, Requirements, allowance, central
from biollm.routing.failures import CUT_SHORT
from biollm.routing.structured import Message, ResponseSchema
from biollm.types import BLOCKED, Attempt, Outcome, short

if TYPE_CHECKING:
    import asyncio

    from biollm.config import Config
    from biollm.inputs.digest import Digest
    from biollm.inputs.redact import Redaction
    from biollm.routing.answers import Answer
    from biollm.routing.attachments import Fitted
    from biollm.routing.candidates import Candidate
    from biollm.routing.failures import Failure
    from biollm.slurm.submissions import Job

MIN_RETRY_S = 0.5  # before another pass, after a failure that put nothing on cooldown
MAX_RETRY_WAIT_S = 300.0  # there is no other pass if the first deployment frees later than that

_UNFIT = {"too_long", "modality", "unsupported", "malformed"}  # failures that this request has at that model each time
_OUTCOMES: dict[str, Outcome] = {"limited": "limited", "cooling": "cooling", "refused": "refused"}


@dataclass(frozen=True)
class Request:
    """What a caller asked for. Times are in seconds; `timeout` is per attempt, `deadline` for the whole call.

    Attributes:
        params: Further arguments of LiteLLM's `acompletion`: temperature, max_tokens, tools...
        on_send: Called with a deployment's id just before a request goes to it.
        attachments: What the question is about; each deployment gets what fits it.
        redact: Whether to replace what is private by placeholders; None does so where the provider may train on it.
        redact_names: Further texts to replace.
        on_note: Called with a sentence on what was done to the prompt or the attachments, before they are sent, and
            on a wait for an earlier deployment.
        middle: (prefix, suffix) of code to fill in between, instead of messages; without a suffix, a text to continue.
        start: Start a server on the cluster if no deployment answers; then wait `wait` seconds for it.
        on_state: Called with the job of that server whenever it has changed.
        patience: How long to wait for an earlier deployment that is limited; None is the configured time.
        cache: Whether to take and keep a stored answer; "7d" takes none that is older.
        cache_key: Returns a text without what may differ between requests that share an answer.
        sender: "direct" sends without LiteLLM where the deployment speaks OpenAI's dialect.
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
    on_interrupt: Literal["raise", "restart", "splice"] = "raise"
    on_send: Callable[[str], None] | None = None
    attachments: tuple[Digest, ...] = ()
    redact: bool | None = False
    redact_names: tuple[str, ...] = ()
    on_note: Callable[[str], None] | None = None
    middle: tuple[str, str | None] | None = None
    start: bool = False
    wait: float | None = None
    on_state: Callable[[Job], None] | None = None
    patience: float | None = None
    cache: bool | str = False
    cache_key: Callable[[str], str] | None = None
    sender: Literal["litellm", "direct"] = "litellm"
    asked: float = field(default_factory=time.monotonic)

    @asynccontextmanager
    async def in_time(self, attempts: Callable[[], Sequence[Attempt]] = tuple) -> AsyncGenerator[None]:
        """Bound what is inside by the deadline.

        Raises:
            DeadlineError: It passed; with the `attempts` so far.
        """
        import asyncio  # here: a client of a gateway does without

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
class _Pass:
    """What one pass over the waterfall tried, and which deployments it skipped, by id."""

    tried: list[tuple[Deployment, Attempt]] = field(default_factory=list[tuple[Deployment, Attempt]])
    skipped: dict[str, Candidate] = field(default_factory=dict[str, "Candidate"])

    def attempts(self) -> list[Attempt]:
        """Return what was tried, and what was skipped before the deployment that answered, in waterfall order."""
        answered = next((deployment.order for deployment, attempt in self.tried if attempt.outcome == "ok"), None)
        skipped = [
            (each.deployment, Attempt(each.deployment.id, _OUTCOMES.get(each.status, "skipped"), each.reason))
            for each in self.skipped.values()
            if answered is None or each.deployment.order < answered
        ]
        return [attempt for _, attempt in sorted([*self.tried, *skipped], key=lambda each: each[0].order)]


@dataclass
class Run:
    """The state of one request.

    Attributes:
        tried: Ids of deployments that are not tried again in this pass.
        frees: Epoch seconds at which something that blocks for a transient reason frees, this pass.
        pinned: With `fallback=False`, the id of the only deployment that may be tried.
        failures: Each failure, with the deployment that was tried.
        over: The failure after which no other deployment is tried.
        repeat: The deployment to try once more at once.
        repeated: Ids of those that were.
        fits: Deployment id -> the messages with its excerpt of the attachments.
        redactions: Deployment id -> the placeholders in what it was sent; one for all.
        noted: What `on_note` was called with.
        shrunk: Deployment id -> the share of the room for attachments that is used after it found them too long.
        caps: Deployment id -> the most tokens of answer that its account can pay for.
        spare: An answer that was cut at an output limit, to be returned if no deployment has a longer one.
        waiting_since: When the wait for an earlier deployment began, by the monotonic clock.
        unserved: Whether it is recorded that a scaled model had no server for it.
    """

    request: Request
    id: str = field(default_factory=lambda: f"{getrandbits(128):032x}")
    started: float = field(default_factory=time.perf_counter)
    tried: set[str] = field(default_factory=set[str])
    frees: list[float] = field(default_factory=list[float])
    pinned: str | None = None
    failures: list[tuple[Deployment, Failure]] = field(default_factory=list[tuple[Deployment, "Failure"]])
    over: Failure | None = None
    repeat: Deployment | None = None
    repeated: set[str] = field(default_factory=set[str])
    fits: dict[str, Fitted] = field(default_factory=dict[str, "Fitted"])
    redactions: dict[str, Redaction] = field(default_factory=dict[str, "Redaction"])
    noted: set[str] = field(default_factory=set[str])
    shrunk: dict[str, float] = field(default_factory=dict[str, float])
    caps: dict[str, int] = field(default_factory=dict[str, int])
    spare: InFlight | None = None
    waiting_since: float | None = None
    unserved: bool = False
    _passes: list[_Pass] = field(default_factory=lambda: [_Pass()])

    @property
    def ms(self) -> float:
        """Return the milliseconds since the request began."""
        return (time.perf_counter() - self.started) * 1000

    @property
    def repeats(self) -> bool:
        """Return whether this is a further pass."""
        return len(self._passes) > 1

    def start_waiting(self) -> None:
        """Note that the wait for an earlier deployment has begun."""
        self.waiting_since = self.waiting_since or time.monotonic()

    def patience(self, deployment: Deployment, config: Config) -> float:
        """Return the seconds that this request may still wait for `deployment`."""
        own = (self.request.patience, deployment.provider.patience, config.routing.patience)
        waited = 0.0 if self.waiting_since is None else time.monotonic() - self.waiting_since
        return next((each for each in own if each is not None), 0.0) - waited

    def answer_size(self, deployment: Deployment) -> int | None:
        """Return the tokens of answer to request: what the deployment has room for and its account can pay."""
        sizes = (allowance(deployment, self.request.requirements), self.caps.get(deployment.id))
        return min((size for size in sizes if size), default=None)

    def restored(self, deployment: Deployment, value: Any) -> Any:
        """Return a JSON value of the deployment's answer with what the placeholders stand for."""
        redaction = self.redactions.get(deployment.id)
        return redaction.restored(value) if redaction else value

    def notes(self, deployment: Deployment) -> tuple[str, ...]:
        """Return what was done to the prompt and the attachments for a deployment, a sentence each."""
        fitted, redaction = self.fits.get(deployment.id), self.redactions.get(deployment.id)
        redacted = redaction.note() if redaction else ""
        return (*(fitted.notes if fitted else ()), *([redacted] if redacted else []))

    def redacts(self, deployment: Deployment) -> bool:
        """Return whether the deployment is sent placeholders for what is private."""
        if deployment.provider.type != "api" or self.request.middle:
            return False
        wanted = self.request.redact
        return (deployment.trains and not self.request.requirements.tools) if wanted is None else wanted

    def skip(self, candidate: Candidate) -> None:
        """Note a deployment that is not tried in this pass."""
        skipped = self._passes[-1].skipped
        if candidate.deployment.id not in skipped:
            skipped[candidate.deployment.id] = candidate
            if candidate.status in BLOCKED:
                self.frees.append(candidate.until)

    def note(self, deployment: Deployment, attempt: Attempt) -> None:
        """Note an attempt that was made."""
        self._passes[-1].tried.append((deployment, attempt))

    def attempts(self) -> tuple[Attempt, ...]:
        """Return what was tried and skipped so far, in order."""
        return tuple(attempt for each in self._passes for attempt in each.attempts())

    def first_reason(self) -> str:
        """Return why the first deployment gave no answer, "limited: 15/min used by ..."; empty if it did."""
        first = next(iter(self.attempts()), None)
        return f"{first.outcome}: {first.reason}" if first and first.outcome != "ok" else ""

    def next_pass(self) -> float | None:
        """Return the seconds to wait before another pass over the waterfall, or None if there is none."""
        if len(self._passes) > self.request.max_retries or self.over or self.spare or not self.frees:
            return None
        wait = max(0.0, min(self.frees) - time.time())
        if wait > MAX_RETRY_WAIT_S:
            return None
        self._passes.append(_Pass())
        self.tried.clear()
        self.frees.clear()
        return wait

    def failure(self) -> CompletionError:
        """Return the error of a request that got no answer."""
        attempts = self.attempts()
        if self.over:
            return self._final(self.over, attempts)
        reasons = _reasons(attempts)
        kinds = {failure.kind for _, failure in self.failures}
        skipped = {candidate.status for candidate in self._passes[-1].skipped.values()}
        never = kinds <= _UNFIT and skipped.isdisjoint(BLOCKED) and not self.request.start  # a server may take more
        if never and (long := self._too_long()):
            need = central(self.request.requirements)
            longest = max((each.context_length or 0 for each in long), default=0)
            known = f"; the longest context that could answer is {short(longest)}" if longest else ""
            hint = "Shorten the prompt, pass files as attachments (-f), or add a model with a larger context."
            message = f"The prompt is too long: about {short(need)} tokens{known}.\n{reasons}"
            return PromptTooLongError(message, attempts, hint=hint)
        blaming = {each.provider.litellm_provider for each, failure in self.failures if failure.kind == "malformed"}
        hint = "Providers with different APIs say that the request itself is invalid." if len(blaming) > 1 else None
        if kinds and all(failure.rule.blames_request for _, failure in self.failures):
            return RequestRejectedError(f"The request was rejected.\n{reasons}", attempts, hint=hint)
        if never and skipped <= {"unfit"} and attempts:
            return RequestRejectedError(f"No deployment can serve this request.\n{reasons}", attempts, hint=hint)
        if kinds <= {"key"} and skipped.isdisjoint(BLOCKED) and (kinds or skipped & {"keyless", "refused"}):
            if kinds or "refused" in skipped:
                hint = "`biollm providers` shows which keys are missing; `biollm health` tries them."
                return KeysRefusedError(f"No provider has a working key.\n{reasons}", attempts, hint=hint)
            hint = "Set one of these keys; `biollm providers` then shows that it is found."
            return KeysRefusedError(f"No provider has a key.\n{reasons}", attempts, hint=hint)
        if kinds <= {"limited", *_UNFIT} and not (kinds | skipped).isdisjoint(BLOCKED) and self.frees:
            wait = max(0.0, min(self.frees) - time.time())
            message = f"All deployments are at a limit or cooling down.\n{reasons}"
            return AllLimitedError(message, attempts, retry_after=wait)
        if not attempts:
            return CompletionError("No deployment is configured.", hint="`biollm config` shows the configuration.")
        what = "All deployments failed." if kinds else "No deployment is available."
        return CompletionError(f"{what}\n{reasons}", attempts, hint=hint)

    def _too_long(self) -> list[Deployment]:
        """Return the deployments that refused the request for the length of its prompt, or were skipped for it."""
        refused = [each for each, failure in self.failures if failure.kind == "too_long" and failure is not CUT_SHORT]
        skipped = self._passes[-1].skipped.values()
        return refused + [each.deployment for each in skipped if each.too_long]

    def _final(self, failure: Failure, attempts: Sequence[Attempt]) -> CompletionError:
        """Return the error of a failure after which no other deployment is tried."""
        reason = f"{self.failures[-1][0].id}: {failure.reason}"
        if failure.kind == "refusal":
            hint = "Set `on_refusal: next`, for a provider or under `routing:` in providers.yaml, to try the next one."
            return ContentPolicyError(f"Refused by content policy. {reason}", attempts, hint=hint)
        if failure.kind == "used_up":
            return RequestRejectedError(f"The answer has no text. {reason}", attempts, hint="Raise max_tokens.")
        return RequestRejectedError(f"The request is invalid. {reason}", attempts)


def _reasons(attempts: Sequence[Attempt]) -> str:
    """Return a line per account and reason: its models often fail for the same one."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for attempt in attempts:
        account, _, model = attempt.deployment.partition("/")
        groups.setdefault((account, attempt.reason), {})[model] = None
    return "\n".join(
        f"  {account}/{next(iter(models))}: {reason}"
        if len(models) == 1
        else f"  {account} ({len(models)} models): {reason}"
        for (account, reason), models in groups.items()
    )


@dataclass(eq=False)
class InFlight:
    """One call of a sender and what came of it. Times are epoch seconds and milliseconds.

    Attributes:
        deployment: The one that was chosen; until then, the first of `choice`.
        choice: What the sender may choose from.
        alone: Whether no other deployment of its order was available.
        limit: Seconds that the call may take, or a stream between two chunks.
        shortened: Whether the caller set a lower limit than is configured.
        scope: The timeout of the call.
        connecting: Whether the host accepts a connection, checked beside the call.
        callback_error: What the caller's `on_send` raised; nothing was sent then.
    """

    deployment: Deployment
    choice: Sequence[Deployment]
    alone: bool
    limit: float
    shortened: bool
    scope: asyncio.Timeout
    stream: bool = False
    reservation: int | None = None
    at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    connecting: asyncio.Task[bool] | None = None
    answer: Answer | None = None
    ttft_ms: float | None = None
    callback_error: Exception | None = None

    @property
    def ms(self) -> float:
        """Return the milliseconds since it was sent."""
        return (time.perf_counter() - self.started) * 1000
