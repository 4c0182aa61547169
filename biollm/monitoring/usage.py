"""Reports what was asked of whom: requests, tokens, latencies, fallbacks, money, quotas.

LiteLLM's spend reports need its proxy and Postgres, and know neither a waterfall's fallbacks nor what the GPU hours
of a job cost. All is taken from the ledger and Slurm's jobs; nothing is sent.
"""

from __future__ import annotations

import json
import re
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import accumulate, chain
from typing import Literal, get_args

from biollm.config import Config
from biollm.errors import UsageError
from biollm.ledger import Ledger, history
from biollm.ledger.history import Cell, Key
from biollm.ledger.quotas import period

By = Literal["provider", "account", "model", "day", "hour", "tag"]
Tally = tuple[Counter[float], Counter[float]]
Cells = Sequence[tuple[Key, Cell]]
WEEK = 7 * 86400.0  # seconds: the report's usual length, and how long Slurm's jobs are remembered
_GRAIN = {"day": 24, "hour": 1}  # hours
_ATTEMPTS = ("provider", "account", "model")  # whose rows count attempts: a request can ask several of them


@dataclass(frozen=True)
class Row:
    """Sums of one group. Latencies in ms, of answers only; money in USD; None where there is nothing to tell.

    Attributes:
        name: The group's: "gemini", "gemini/default", "2026-11-24", "agent=Reviewer".
        requests: Users' requests; of a provider, account or model, how often it was asked.
        errors: Requests that nobody answered; of a provider, account or model, attempts that failed.
        ttft_p50_ms: To the first token of streams.
        fallback_rate: Share of the requests that a later rung than the first answered; `fallbacks`: why -> how many.
        failures: Why -> how many attempts failed.
        cost_usd: Of the attempts whose price is known; None where none is. Prices are those of the time.
        cost_avoided_usd: What their tokens would have cost at `costs.reference_model`, less what they did cost.
        unpriced: How many attempts used tokens whose price is unknown.
        estimated: Of how many the tokens are an estimate, since the provider stated none.
    """

    name: str
    requests: int = 0
    errors: int = 0
    error_rate: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    ttft_p50_ms: float | None = None
    fallback_rate: float = 0.0
    fallbacks: Mapping[str, int] = field(default_factory=dict[str, int])
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    cost_usd: float | None = 0.0
    cost_avoided_usd: float | None = None
    unpriced: int = 0
    estimated: int = 0


@dataclass(frozen=True)
class Quota:
    """A limit now. Times in epoch seconds.

    Attributes:
        unit: "requests", "tokens" or "usd".
        exhausted_at: When it is used up at the pace of its period so far, if that is before it resets.
    """

    scope: str
    limit: str
    unit: str
    amount: float
    used: float
    left: float
    resets_at: float | None
    exhausted_at: float | None


@dataclass(frozen=True)
class Local:
    """What a local model's answers cost: GPU hours of its jobs, idle ones included, over its tokens; money in USD.

    `cost_usd` is None where `costs.gpu_hour_usd` is not set.
    """

    model: str
    gpu_hours: float
    tokens: int
    cost_usd: float | None
    per_million_usd: float | None
    reference_per_million_usd: float | None


@dataclass(frozen=True)
class Report:
    """Usage from `since` to `until` (epoch seconds).

    Attributes:
        exact: Whether percentiles are exact; else they are within 2%.
        budgets: The quotas that are money.
    """

    since: float
    until: float
    by: By
    exact: bool
    rows: tuple[Row, ...]
    total: Row
    quotas: tuple[Quota, ...] = ()
    budgets: tuple[Quota, ...] = ()
    local: tuple[Local, ...] = ()
    reference_model: str | None = None


def report(
    config: Config,
    ledger: Ledger,
    since: float | None = None,
    until: float | None = None,
    by: By = "provider",
    *,
    exact: int = history.EXACT,
) -> Report:
    """Report the attempts of `since` <= at < `until` (epoch seconds; by default the last week).

    Args:
        config: Names limits, prices and the cluster.
        ledger: What was sent.
        since: From when.
        until: To when.
        by: What a row is about. Days and hours are UTC's. A request counts in the row of each of its tags.
        exact: Attempts up to which percentiles are exact.

    Raises:
        UsageError: `by` is something else.
    """
    if by not in get_args(By):
        raise UsageError(f"There is no usage by {by!r}.", hint=f"By: {', '.join(get_args(By))}.")
    now = time.time()
    until = now if until is None else until
    since = until - WEEK if since is None else since
    cells, kept = history.cells(ledger, since, until, exact, _GRAIN.get(by, 1 << 30))
    price = _price(config.costs.reference_model)
    groups: defaultdict[str, list[tuple[Key, Cell]]] = defaultdict(list)
    for key, cell in cells:
        for name in _names(key, by):
            groups[name].append((key, cell))
    tallies = {name: _tally(group) for name, group in groups.items()}
    rows = [_row(name, group, tallies[name], price, kept, attempts=by in _ATTEMPTS) for name, group in groups.items()]
    whole = _tally(cells) if by == "tag" else _together(tallies.values())  # a request may have several tags
    limits = tuple(quotas(config, ledger))
    known = max(since, now - WEEK)  # Slurm's jobs are remembered for a week; their tokens are then that week's
    hours = _gpu_hours(config, known, min(until, now))
    recent = history.cells(ledger, known, until, 0)[0] if hours and since < known else cells
    return Report(
        since,
        until,
        by,
        kept,
        tuple(sorted(rows, key=(lambda row: row.name) if by in ("day", "hour") else (lambda row: -row.requests))),
        _row("total", cells, whole, price, kept, attempts=False),
        limits,
        tuple(limit for limit in limits if limit.unit == "usd"),
        tuple(_local(config, recent, hours, price)),
        config.costs.reference_model,
    )


def moment(written: str, now: float) -> float:
    """Return epoch seconds of "7d", "12h", "30min" ago, or of an ISO date or time (UTC unless it says otherwise).

    Raises:
        UsageError: It is none of these.
    """
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d|w)", written.strip()):
        return now - float(ago[1]) * {"min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[ago[2]]
    try:
        at = datetime.fromisoformat(written)
    except ValueError as error:
        raise UsageError(f"{written!r} is no time.", hint="Write 7d, 12h, 30min, 2w or 2026-11-24.") from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _names(key: Key, by: By) -> Sequence[str]:
    if by == "tag":
        return [f"{name}={value}" for name, value in json.loads(key.tags).items()] or ["(none)"]
    if by in ("day", "hour"):
        at = datetime.fromtimestamp(key.hour * 3600, UTC)
        return (at.strftime("%Y-%m-%d" if by == "day" else "%Y-%m-%d %H:00"),)
    return (f"{key.provider}/{key.account}" if by == "account" else key.provider if by == "provider" else key.model,)


def _tally(group: Cells) -> Tally:
    """Count the latencies and the times to the first token of a group: the dearest step."""
    return (
        Counter(chain.from_iterable(cell.ms for _, cell in group)),
        Counter(chain.from_iterable(cell.ttft for _, cell in group)),
    )


def _together(tallies: Iterable[Tally]) -> Tally:
    ms, ttft = Counter[float](), Counter[float]()
    for each in tallies:
        ms.update(each[0])
        ttft.update(each[1])
    return ms, ttft


def _row(
    name: str,
    group: Cells,
    tally: Tally,
    price: tuple[float, float] | None,
    exact: bool,
    *,
    attempts: bool,
) -> Row:
    by_outcome, fallbacks, failures = Counter[str](), Counter[str](), Counter[str]()
    began = prompt = completion = unpriced = estimated = 0
    cost, priced = 0.0, (0, 0)  # of the tokens whose price is known
    for key, cell in group:
        cost, unpriced, estimated = cost + cell.cost, unpriced + cell.unpriced, estimated + cell.estimated
        sent, got = cell.prompt - cell.unpriced_prompt, cell.completion - cell.unpriced_completion
        priced = priced[0] + sent, priced[1] + got
        by_outcome[key.outcome] += cell.attempts
        if key.why and key.outcome in ("ok", "failed"):
            (fallbacks if key.outcome == "ok" else failures)[key.why] += cell.attempts
        began, prompt, completion = began + cell.requests, prompt + cell.prompt, completion + cell.completion
    requests = by_outcome.total() if attempts else began
    errors = by_outcome["failed"] if attempts else max(0, began - by_outcome["ok"] - by_outcome["cancelled"])
    p50, p95, p99 = quantiles(tally[0], (0.5, 0.95, 0.99), exact=exact)
    (ttft,) = quantiles(tally[1], (0.5,), exact=exact)
    return Row(
        name,
        requests,
        errors,
        errors / requests if requests else 0.0,
        prompt,
        completion,
        p50,
        p95,
        p99,
        ttft,
        min(1.0, fallbacks.total() / requests) if requests else 0.0,
        dict(fallbacks.most_common()),
        dict(failures.most_common()),
        cost if any(priced) or not unpriced else None,
        priced[0] * price[0] + priced[1] * price[1] - cost if price and (any(priced) or not unpriced) else None,
        unpriced,
        estimated,
    )


def quantiles(counts: Mapping[float, int], shares: Sequence[float], *, exact: bool) -> list[float | None]:
    """Return quantiles of counted latencies (of buckets, unless `exact`), interpolated as numpy does by default."""
    values = sorted(counts)
    upto = list(accumulate(counts[value] for value in values))
    if not upto:
        return [None] * len(shares)

    def at(rank: int) -> float:
        value = values[bisect_right(upto, min(rank, upto[-1] - 1))]
        return value if exact else history.middle(value)

    places = [share * (upto[-1] - 1) for share in shares]
    return [at(int(place)) + (at(int(place) + 1) - at(int(place))) * (place % 1) for place in places]


def quotas(config: Config, ledger: Ledger) -> Iterator[Quota]:
    """Yield every limit of the deployments that the data policy allows, as it stands now."""
    from biollm.routing import deployments

    now, seen = time.time(), set[str]()
    for deployment in deployments.build_deployments(config):
        if deployment.scope in seen:
            continue
        seen.add(deployment.scope)
        for limit, used, resets in ledger.used(deployment.scope, deployment.limits):
            left, exhausted = max(0.0, limit.amount - used), None
            if not limit.rolling and used:
                start, end = period(limit, now)
                exhausted = now + left * max(now - start, 1.0) / used
                exhausted = exhausted if exhausted < end else None
            yield Quota(deployment.scope, str(limit), limit.kind, limit.amount, used, left, resets, exhausted)


@cache
def _price(model: str | None) -> tuple[float, float] | None:
    """Return the USD per token of prompt and of answer; None where no model is named, or LiteLLM has no price."""
    from biollm.routing.pricing import per_token, price_map

    return per_token(price_map().get(model, {})) if model else None


def _local(
    config: Config,
    cells: Cells,
    hours: Mapping[str, float],
    price: tuple[float, float] | None,
) -> Iterable[Local]:
    """Yield the local models that had jobs or gave answers; jobs of several models are split evenly."""
    local = {provider.name for provider in config.providers if provider.type == "local"}
    tokens: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for key, cell in cells:
        if key.provider in local:
            tokens[key.model] += Counter(prompt=cell.prompt, completion=cell.completion)
    for model in sorted({*hours, *tokens}):
        sent, got = tokens[model]["prompt"], tokens[model]["completion"]
        hour, count = config.costs.gpu_hour_usd, sent + got
        cost = None if hour is None else hours.get(model, 0.0) * hour
        reference = (sent * price[0] + got * price[1]) / count * 1e6 if price and count else None
        paid = cost / count * 1e6 if cost is not None and count and model in hours else None
        yield Local(model, hours.get(model, 0.0), count, cost, paid, reference)


def _gpu_hours(config: Config, since: float, until: float) -> dict[str, float]:
    """Return model -> GPU hours of this user's jobs, from their first sign of life to their last, or to now."""
    from biollm.config.paths import present_dir
    from biollm.slurm import commands
    from biollm.slurm.submissions import job_of, submissions

    hours: dict[str, float] = {}
    known = [submission for submission in submissions(config.cluster) if submission.events]
    if not known:
        return hours
    queue = commands.queue(present_dir(config.cluster), config.cluster.name)
    for submission in known:
        end = submission.seen if job_of(submission, queue, (), until).over else until
        seconds = min(end, until) - max(float(submission.events[0]["at"]), since)
        for model in submission.models if seconds > 0 else ():  # else it was over before, or began later
            hours[model] = hours.get(model, 0.0) + submission.gpus * seconds / 3600 / len(submission.models)
    return hours
