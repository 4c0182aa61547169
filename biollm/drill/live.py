"""Sends one short prompt to every real deployment: which answer, after how long, at what cost.

Each is called alone, without a fallback. The user's limits and cooldowns hold, and the ledger keeps the attempts with
the tag `drill: live`. A deployment whose answer could exceed the spend limit is not called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from biollm._runtime import background, ledger, watch
from biollm.config import Config
from biollm.config.paths import state_dir
from biollm.errors import CompletionError
from biollm.routing.candidates import Candidate, DeploymentPool, explain
from biollm.routing.deployments import Deployment, Requirements
from biollm.routing.pricing import price
from biollm.routing.request import Request
from biollm.routing.waterfall import Waterfall
from biollm.types import BLOCKED, Usage

LIMIT = 0.05  # USD
PROMPT = "Reply with the one word: ok"
PROMPT_TOKENS = 64  # more than any tokenizer makes of it, with a chat template around it
MAX_TOKENS = 512  # models that reason first need room


@dataclass(frozen=True)
class Answer:
    """The result of calling one deployment."""

    deployment: str
    state: Literal["answered", "failed", "not asked"]  # "not asked" where a limit or cooldown forbids it
    ms: float | None = None  # milliseconds of the attempt
    cost_usd: float | None = None  # by LiteLLM's price or your own
    degraded: bool = False
    why: str = ""  # why it failed, or was not called


@dataclass(frozen=True)
class LiveDrill:
    """The result of a live drill."""

    answers: tuple[Answer, ...]
    absent: dict[str, str]  # deployment -> what it lacks to be called at all, one sentence
    spent_usd: float  # at most; a failure counts as the most expensive answer
    limit_usd: float

    @property
    def ok(self) -> bool:
        """Return whether a deployment answered and none failed."""
        states = {answer.state for answer in self.answers}
        return "answered" in states and "failed" not in states


def live_drill(config: Config, limit_usd: float, report: Callable[[str], None]) -> LiveDrill:
    """Call every deployment once, for at most `limit_usd` together; `report` gets first what will be sent."""
    pool = DeploymentPool(config, ledger(config), state_dir(), config.data_policy, watch(config.cluster).alive)
    found = explain(pool, Requirements(policy=config.data_policy))
    present = [each for each in found if each.status in ("ready", *BLOCKED, "refused")]
    absent = {each.deployment.id: each.reason for each in found if each.status in ("keyless", "unfit", "absent")}
    spending = _Spending(config, limit_usd)
    for line in _plan(present, spending):
        report(line)
    answers: list[Answer] = []
    if present:
        waterfall = Waterfall(pool)
        answers = [background().run(_call(waterfall, each, spending)) for each in present]
    return LiveDrill(tuple(answers), absent, spending.spent, limit_usd)


@dataclass
class _Spending:
    config: Config
    limit: float
    spent: float = 0.0

    def most(self, deployment: Deployment) -> float | None:
        """Return what an answer may cost at most; None where its price is unknown."""
        known = price(deployment, self.config)
        thoughts = (0, MAX_TOKENS)  # tokens of reasoning; either kind may be the more expensive
        return known and max(known.usd(Usage(PROMPT_TOKENS, MAX_TOKENS, reasoning_tokens=each)) for each in thoughts)

    def objection(self, candidate: Candidate) -> str:
        """Return why the deployment may not be called, one sentence, or ""."""
        if candidate.status != "ready":
            until = datetime.fromtimestamp(candidate.until, UTC).strftime("unavailable until %Y-%m-%d %H:%M UTC: ")
            return (until if candidate.until else "") + candidate.reason
        most, left = self.most(candidate.deployment), max(0.0, self.limit - self.spent)
        if most is None:
            key = f"costs.per_million_tokens.{candidate.deployment.provider.name}"
            return f"its price is unknown, so it could exceed the limit: set {key}"
        return f"may cost {most:.4f} USD, and {left:.4f} of {self.limit:g} are left" if most > left else ""


def _plan(found: Sequence[Candidate], spending: _Spending) -> Iterator[str]:
    """Yield what will be sent; it may become less."""
    called = [each.deployment for each in found if not spending.objection(each)]
    most = min(spending.limit, sum(spending.most(each) or 0 for each in called))
    yield f"Requests to send: {len(called)}, for at most {most:.4f} USD (the limit is {spending.limit:g})."
    accounts: dict[str, list[Deployment]] = {}
    for each in called:
        accounts.setdefault(f"{each.provider.name}/{each.account.name}", []).append(each)
    for account, group in accounts.items():
        limits = f" of {', '.join(map(str, group[0].limits))}" if group[0].limits else ""
        yield f"  {account}: {len(group)}{limits}{', free' if spending.most(group[0]) == 0 else ''}"


async def _call(waterfall: Waterfall, candidate: Candidate, spending: _Spending) -> Answer:
    deployment = candidate.deployment
    if why := spending.objection(candidate):
        return Answer(deployment.id, "not asked", why=why)
    request = Request(
        messages=[{"role": "user", "content": PROMPT}],
        params={"max_tokens": MAX_TOKENS},
        requirements=Requirements(policy=spending.config.data_policy, deployment=deployment.id),
        fallback=False,
        tags={"drill": "live"},
    )
    try:
        done = await waterfall.complete(request)
    except CompletionError as error:
        attempt = next(iter(error.attempts), None)
        if not attempt or attempt.outcome != "failed":
            return Answer(deployment.id, "not asked", why=attempt.reason if attempt else str(error))
        spending.spent += spending.most(deployment) or 0.0
        return Answer(deployment.id, "failed", attempt.ms, why=attempt.reason)
    spending.spent += done.cost_usd or 0.0
    return Answer(deployment.id, "answered", done.attempts[-1].ms, done.cost_usd, done.degraded)
