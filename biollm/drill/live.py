"""Asks every rung for real, those above it broken in this process: who answers, after how long, at what cost.

One tiny prompt each. The user's limits and resting rungs hold, and what the real ones did stands in the ledger with
the tag `drill: live`. A rung whose answer could pass the limit of money is not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from biollm._runtime import background, watch
from biollm._runtime import ledger as shared_ledger
from biollm.config import Config
from biollm.config.paths import state_dir
from biollm.drill.drill import Played, Theatre
from biollm.errors import CompletionError
from biollm.ledger import Claim, Ledger, Record, Refused
from biollm.ledger.quotas import Cooldown
from biollm.routing import import_waterfall
from biollm.routing.candidates import Candidate, DeploymentPool, explain
from biollm.routing.deployments import Deployment, Requirements
from biollm.routing.pricing import price
from biollm.types import Usage

LIMIT = 0.05  # USD
PROMPT = "Reply with the one word: ok"
PROMPT_TOKENS = 64  # more than any tokenizer makes of it, with a chat template around it
MAX_TOKENS = 512  # models that think first need room to come to the word


@dataclass(frozen=True)
class Answer:
    """What came of asking one rung.

    Attributes:
        state: "not asked" where a limit stood before it; `why` says which.
        ms: Milliseconds until the answer, the broken rungs above included; of a failure, of the attempt alone.
        cost_usd: By LiteLLM's price or your own.
        why: What it failed at, or why it was not asked.
    """

    candidate: str
    state: Literal["answered", "failed", "not asked"]
    ms: float | None = None
    cost_usd: float | None = None
    degraded: bool = False
    why: str = ""


@dataclass(frozen=True)
class LiveDrill:
    """What a live drill found.

    Attributes:
        absent: Rung -> why it has nothing to be asked with, one sentence.
        spent_usd: At most; a failure counts as the dearest answer.
        ok: Whether some rung answered, and none failed.
    """

    answers: tuple[Answer, ...]
    absent: Mapping[str, str]
    spent_usd: float
    limit_usd: float

    @property
    def ok(self) -> bool:
        """Return whether what was asked can be relied on."""
        states = Counter(answer.state for answer in self.answers)
        return bool(states["answered"]) and not states["failed"]


class _Books(Ledger):
    """The user's ledger, but for what is played: that goes to its own folder."""

    def __init__(self, folder: Path, real: Ledger) -> None:
        super().__init__(folder)
        self._real = real
        self.played: set[str] = set()  # scopes, and keys that rest

    async def reserve(self, claim: Claim) -> int | Refused:
        return await (super() if claim.scope in self.played else self._real).reserve(claim)

    def finish(self, reservation: int | None, scope: str, record: Record) -> None:
        if record.outcome == "ok":  # that rungs above it were broken on purpose is no fallback of the user's
            record = replace(record, reason="")
        (super() if scope in self.played else self._real).finish(reservation, scope, record)

    def release(self, reservation: int, scope: str) -> None:
        (super() if scope in self.played else self._real).release(reservation, scope)

    def cool(
        self, key: str, seconds: float | None, reason: str, *, kind: str = "", ladder: Sequence[float] = (0.0,)
    ) -> None:
        (super() if key in self.played else self._real).cool(key, seconds, reason, kind=kind, ladder=ladder)

    def recover(self, keys: Iterable[str]) -> None:
        for key in keys:
            (super() if key in self.played else self._real).recover([key])

    def failing(self, keys: Iterable[str]) -> bool:
        return any((super(_Books, self) if key in self.played else self._real).failing([key]) for key in keys)

    def blocked(self) -> Mapping[str, Cooldown]:
        return {**self._real.blocked(), **super().blocked()}

    def refresh(self) -> None:
        self._real.refresh()


class _Purse:
    """What may still be spent, and what an answer of each rung may cost; USD."""

    def __init__(self, config: Config, limit: float) -> None:
        self._config, self.limit, self.spent = config, limit, 0.0

    def most(self, candidate: Deployment) -> float | None:
        """Return what an answer may cost at most; None where its price is unknown."""
        known = price(candidate, self._config)
        thoughts = (0, MAX_TOKENS)  # whichever is dearer
        return known and max(known.usd(Usage(PROMPT_TOKENS, MAX_TOKENS, reasoning_tokens=each)) for each in thoughts)

    def objection(self, candidate: Deployment) -> str:
        """Return why the rung shall not be asked, one sentence, or ""."""
        most = self.most(candidate)
        if most is None:
            name = candidate.provider.name
            return f"its price is unknown, so it could pass the limit: write costs.per_million_tokens.{name}"
        left = self.limit - self.spent
        return f"may cost {most:.4f} USD, and {max(left, 0):.4f} of {self.limit:g} are left" if most > left else ""


def live_drill(config: Config, limit_usd: float, say: Callable[[str], None]) -> LiveDrill:
    """Let each rung answer one tiny prompt, those above it broken.

    Args:
        config: The configuration.
        limit_usd: What all of it may cost at most.
        say: Told, before the first request, what will be sent to whom.
    """
    real = DeploymentPool(config, shared_ledger(), state_dir(), config.data_policy, watch(config.cluster).alive)
    status = explain(real, Requirements(policy=config.data_policy))
    rungs = [candidate.deployment for candidate in status if candidate.status in ("ready", "limited", "refused")]
    absent = {candidate.deployment.id: candidate.reason for candidate in status if candidate.deployment not in rungs}
    resting = {
        candidate.deployment.id: _rests(candidate) for candidate in status if candidate.status in ("limited", "refused")
    }
    purse = _Purse(config, limit_usd)
    for sentence in _plan(rungs, resting, purse):
        say(sentence)
    with TemporaryDirectory(prefix="biollm-drill-") as folder:
        answers = background().run(_ask_all(real, rungs, resting, purse, Path(folder))) if rungs else []
    return LiveDrill(tuple(answers), absent, purse.spent, limit_usd)


def _rests(candidate: Candidate) -> str:
    until = (
        datetime.fromtimestamp(candidate.until, UTC).strftime("rests until %Y-%m-%d %H:%M UTC: ")
        if candidate.until
        else ""
    )
    return until + candidate.reason


def _plan(rungs: Sequence[Deployment], resting: Mapping[str, str], purse: _Purse) -> Iterator[str]:
    """Yield what will be sent to whom; it may become less."""
    asked = [candidate for candidate in rungs if candidate.id not in resting and not purse.objection(candidate)]
    most = min(purse.limit, sum(purse.most(candidate) or 0 for candidate in asked))
    yield f"Requests to be sent: {len(asked)}, for at most {most:.4f} USD (the limit is {purse.limit:g})."
    for scope, count in Counter(f"{candidate.provider.name}/{candidate.account.name}" for candidate in asked).items():
        first = next(candidate for candidate in asked if f"{candidate.provider.name}/{candidate.account.name}" == scope)
        limits = f" of {', '.join(map(str, first.limits))}" if first.limits else ""
        yield f"  {scope}: {count}{limits}{', free' if purse.most(first) == 0 else ''}"


async def _ask_all(
    real: DeploymentPool, rungs: Sequence[Deployment], resting: Mapping[str, str], purse: _Purse, folder: Path
) -> list[Answer]:
    theatre, answers = Theatre(real, rungs), list[Answer]()
    async with theatre.opened(Ledger(folder / "first")):
        theatre.breaks((candidate, "http_503") for candidate in rungs)
        for at, candidate in enumerate(rungs):
            if why := resting.get(candidate.id) or purse.objection(candidate):
                answers.append(Answer(candidate.id, "not asked", why=why))
                continue
            books = _Books(folder / str(at), real.ledger)
            played = Played(real, theatre.stages, books, rungs[:at], candidate)
            for ident, claim in played.needs.items():
                books.played |= {claim.scope, *claim.cooling} if ident != candidate.id else set()
            answers.append(await _ask(played, theatre, candidate, purse))
            books.close()
    return answers


async def _ask(played: Played, theatre: Theatre, candidate: Deployment, purse: _Purse) -> Answer:
    request = replace(
        theatre.request,
        messages=[{"role": "user", "content": PROMPT}],
        params={"max_tokens": MAX_TOKENS},
        tags={"drill": "live"},
    )
    try:
        done = await import_waterfall()(played).complete(request)
    except CompletionError as error:
        mine = next((attempt for attempt in error.attempts if attempt.deployment == candidate.id), None)
        if mine is None or mine.outcome != "failed":
            return Answer(candidate.id, "not asked", why=mine.reason if mine else str(error))
        purse.spent += purse.most(candidate) or 0.0
        return Answer(candidate.id, "failed", mine.ms, why=mine.reason)
    purse.spent += done.cost_usd or 0.0
    return Answer(candidate.id, "answered", done.latency_ms, done.cost_usd, done.degraded)
