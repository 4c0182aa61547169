"""Usage reports: requests, tokens, latencies, fallbacks, cost and limits, from the ledger and Slurm's jobs.

LiteLLM's spend reports need its proxy and Postgres, and include neither a waterfall's fallbacks nor the cost of a
job's GPU hours.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import accumulate
from typing import Literal, get_args

from biollm.config import Config
from biollm.errors import UsageError
from biollm.ledger import Claim, Ledger, history
from biollm.ledger.history import Cell, Key
from biollm.ledger.quotas import period
from biollm.ledger.ratings import marks
from biollm.types import Json, iso, seconds_of, span

By = Literal["provider", "account", "model", "day", "hour", "tag", "key", "rating"]
Cells = Sequence[tuple[Key, Cell]]
Price = tuple[float, float] | None  # USD per token of prompt and of answer
WEEK = 7 * 86400.0  # seconds: a report's default length, and how long Slurm's jobs are remembered
_IN_USE, _SOON = 600.0, 1800.0  # seconds
_GRAIN = {"day": 24, "hour": 1}  # hours
ATTEMPTS = ("provider", "account", "model")  # whose rows count attempts: a request can use several of them


@dataclass(frozen=True, kw_only=True)
class Row:
    """Sums of one group. Latencies of answers, in ms; money in USD; None where there is no value."""

    name: str  # the group's: "gemini", "gemini/default", "2026-11-24", "agent=Reviewer"
    requests: int = 0  # users' requests; of a provider, account or model, the attempts there
    errors: int = 0  # requests without an answer; of a provider, account or model, failed attempts
    error_rate: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    ttft_p50_ms: float | None = None  # to the first token of streams
    # share of the requests that a later candidate than the first answered; `fallbacks`: why -> count
    fallback_rate: float = 0.0
    fallbacks: Mapping[str, int] = field(default_factory=dict[str, int])
    failures: Mapping[str, int] = field(default_factory=dict[str, int])  # why -> count of failed attempts
    # of the attempts whose price is known, at the prices of the time; None if there is none
    cost_usd: float | None = 0.0
    # what their tokens would have cost at `costs.reference_model`, less what they did cost
    cost_avoided_usd: float | None = None
    unpriced: int = 0  # attempts with tokens whose price is unknown
    estimated: int = 0  # attempts whose tokens are an estimate, since the provider reported none
    cached: int = 0  # requests to which a stored answer was given
    saved_tokens: int = 0  # what these would have taken, and cost where the price is known
    saved_usd: float | None = None


@dataclass(frozen=True, kw_only=True)
class Quota:
    """A limit now. Times in epoch seconds."""

    scope: str
    limit: str
    unit: str  # "requests", "tokens" or "usd"
    amount: float
    used: float
    left: float
    resets_at: float | None
    exhausted_at: float | None  # when it is used up at the pace of its period so far, if that is before it resets


@dataclass(frozen=True, kw_only=True)
class Local:
    """The cost of a local model's answers: GPU hours of its jobs, idle ones included, over its tokens; in USD.

    `cost_usd` is None if `costs.gpu_hour_usd` is not set.
    """

    model: str
    gpu_hours: float
    tokens: int
    cost_usd: float | None
    per_million_usd: float | None
    reference_per_million_usd: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Usage from `since` to `until` (epoch seconds)."""

    since: float
    until: float
    by: By
    exact: bool  # whether percentiles are exact; else they are within 2%
    rows: tuple[Row, ...]
    total: Row
    quotas: tuple[Quota, ...] = ()
    budgets: tuple[Quota, ...] = ()  # the quotas that are money
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

    Days and hours are in UTC. A request counts in the row of each of its tags. `exact`: attempts up to which
    percentiles are exact.
    """
    if by not in get_args(By):
        raise UsageError(f"Cannot group usage by {by!r}.", hint=f"Group by {', '.join(get_args(By))}.")
    now = time.time()
    until = now if until is None else until
    since = until - WEEK if since is None else since
    _check_order(since, until)
    cells, kept = history.cells(ledger, since, until, exact, _GRAIN.get(by, 1 << 30))
    price = _price(config.costs.reference_model)
    groups = cells if by != "rating" else history.marked(ledger, since, until, marks(ledger.directory, since, until))
    embedded = {each.name for each in config.providers if each.type == "embedded"}
    rows, total = _rows(cells, groups, by, price, embedded, exact=kept)
    limits = tuple(quotas(config, ledger))
    return Report(
        since=since,
        until=until,
        by=by,
        exact=kept,
        rows=rows,
        total=total,
        quotas=limits,
        budgets=tuple(limit for limit in limits if limit.unit == "usd"),
        local=tuple(_local(config, ledger, cells, (since, until, now), price)),
        reference_model=config.costs.reference_model,
    )


def of_key(config: Config, ledger: Ledger, name: str, claims: Sequence[Claim], since: float, until: float) -> Json:
    """Return what a gateway's key has used, in total and by model, and its limits now; for anyone who has the key."""
    _check_order(since, until)
    cells = [each for each in history.cells(ledger, since, until)[0] if json.loads(each[0].tags).get("key") == name]
    embedded = {each.name for each in config.providers if each.type == "embedded"}
    rows, total = _rows(cells, cells, "model", None, embedded, exact=False)
    limits = [
        {"limit": str(limit), "used": used, "left": max(0.0, limit.amount - used), "resets_at": iso(resets)}
        for claim in claims
        for limit, used, resets in ledger.used(claim.scope, claim.limits)
    ]
    shown = ("name", "requests", "errors", "prompt_tokens", "completion_tokens", "cost_usd")
    facts = [{field: getattr(row, field) for field in shown} for row in (total, *rows)]
    whole = {"since": iso(since), "until": iso(until), "key": name}
    return whole | {"total": facts[0], "models": facts[1:], "limits": limits}


def _check_order(since: float, until: float) -> None:
    if since > until:
        start, end = (f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" for at in (since, until))
        raise UsageError(f"The start, {start}, is after the end, {end}.", hint="Give an earlier start or a later end.")


def moment(written: str, now: float) -> float:
    """Return epoch seconds of "7d", "12h", "30min" ago, or of an ISO date or time (UTC without a time zone)."""
    if (ago := seconds_of(written)) is not None:
        return now - ago
    try:
        at = datetime.fromisoformat(written)
    except ValueError as error:
        raise UsageError(f"{written!r} is not a time.", hint="Write 7d, 12h, 30min, 2w or 2026-11-24.") from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _rows(
    cells: Cells, grouped: Cells, by: By, price: Price, embedded: Set[str], *, exact: bool
) -> tuple[tuple[Row, ...], Row]:
    groups: defaultdict[str, list[tuple[Key, Cell]]] = defaultdict(list)
    for key, cell in grouped:
        for name in _names(key, by):
            groups[name].append((key, cell))
    counted = {name: _latencies(group, exact) for name, group in groups.items()}
    if by in ("tag", "rating") or not counted:  # a request may have several tags, and not all are rated
        whole = _latencies(cells, exact)
    else:
        whole = [sum(counts, Counter[float]()) for counts in zip(*counted.values(), strict=True)]
    rows = [
        _row(name, group, counted[name], price, embedded, attempts=by in ATTEMPTS) for name, group in groups.items()
    ]
    rows.sort(key=(lambda row: row.name) if by in ("day", "hour") else (lambda row: -row.requests))
    return tuple(rows), _row("total", cells, whole, price, embedded, attempts=False)


def _latencies(group: Cells, exact: bool) -> Sequence[Counter[float]]:
    """Return how often each latency occurs, of answers and to the first token: the most expensive step."""
    return [history.latencies((getattr(cell, name) for _, cell in group), exact) for name in ("ms", "ttft")]


def _names(key: Key, by: By) -> Sequence[str]:
    if by == "tag":
        return [f"{name}={value}" for name, value in json.loads(key.tags).items()] or ["(none)"]
    if by == "rating":
        return (key.tags,)
    if by == "key":
        return (json.loads(key.tags).get("key", "(none)"),)
    if by in ("day", "hour"):
        at = datetime.fromtimestamp(key.hour * 3600, UTC)
        return (at.strftime("%Y-%m-%d" if by == "day" else "%Y-%m-%d %H:00"),)
    return (f"{key.provider}/{key.account}" if by == "account" else getattr(key, by),)


def _row(
    name: str,
    group: Cells,
    latencies: Sequence[Counter[float]],
    price: Price,
    embedded: Set[str],
    *,
    attempts: bool,
) -> Row:
    outcomes, fallbacks, failures = Counter[str](), Counter[str](), Counter[str]()
    cached, group = split(group)
    for key, cell in group:
        outcomes[key.outcome] += cell.attempts
        if key.why and key.outcome in ("ok", "failed"):
            (fallbacks if key.outcome == "ok" else failures)[key.why] += cell.attempts
    total, saved = (history.total(cell for _, cell in cells) for cells in (group, cached))
    degraded = history.total(cell for key, cell in group if key.provider in embedded)  # which avoids no cost
    requests = outcomes.total() if attempts else total.requests + saved.requests
    unanswered = max(0, total.requests - outcomes["ok"] - outcomes["cancelled"])
    errors = outcomes["failed"] if attempts else unanswered
    p50, p95, p99 = quantiles(latencies[0], (0.5, 0.95, 0.99))
    sent, got = total.prompt - total.unpriced_prompt, total.completion - total.unpriced_completion
    known = bool(sent or got or not total.unpriced)
    replaced = (sent - degraded.prompt, got - degraded.completion)
    return Row(
        name=name,
        requests=requests,
        errors=errors,
        error_rate=errors / requests if requests else 0.0,
        prompt_tokens=total.prompt,
        completion_tokens=total.completion,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        ttft_p50_ms=quantiles(latencies[1], (0.5,))[0],
        fallback_rate=min(1.0, fallbacks.total() / requests) if requests else 0.0,
        fallbacks=dict(fallbacks.most_common()),
        failures=dict(failures.most_common()),
        cost_usd=total.cost if known else None,
        cost_avoided_usd=replaced[0] * price[0] + replaced[1] * price[1] - total.cost if price and known else None,
        unpriced=total.unpriced,
        estimated=total.estimated,
        cached=saved.attempts,
        saved_tokens=saved.prompt + saved.completion,
        saved_usd=saved.cost if saved.unpriced < saved.attempts else None,
    )


def split(cells: Cells) -> tuple[Cells, Cells]:
    """Return the cells of requests to which a stored answer was given, whose tokens and cost are what that saved; and the rest."""
    cached = [each for each in cells if each[0].outcome == "cached"]
    return cached, [each for each in cells if each[0].outcome != "cached"]


def quantiles(counts: Mapping[float, int], shares: Sequence[float]) -> list[float | None]:
    """Return quantiles of counted latencies, interpolated as numpy does by default."""
    values = sorted(counts)
    upto = list(accumulate(counts[value] for value in values))
    if not upto:
        return [None] * len(shares)

    def at(rank: int) -> float:
        return values[bisect_right(upto, min(rank, upto[-1] - 1))]

    places = [share * (upto[-1] - 1) for share in shares]
    return [at(int(place)) + (at(int(place) + 1) - at(int(place))) * (place % 1) for place in places]


def quotas(config: Config, ledger: Ledger) -> Iterator[Quota]:
    """Yield every limit of the deployments that the data policy allows, as it stands now."""
    from biollm.routing import deployments

    now = time.time()
    scopes = {each.scope: each.limits for each in deployments.build_deployments(config)}
    for scope, limits in scopes.items():
        for limit, used, resets in ledger.used(scope, limits):
            left, exhausted = max(0.0, limit.amount - used), None
            if not limit.rolling and used:
                start, end = period(limit, now)
                exhausted = now + left * max(now - start, 1.0) / used
                exhausted = exhausted if exhausted < end else None
            yield Quota(
                scope=scope, limit=str(limit), unit=limit.kind, amount=limit.amount, used=used, left=left,
                resets_at=resets, exhausted_at=exhausted,
            )  # fmt: skip


def ending_budgets(config: Config, ledger: Ledger) -> dict[str, str]:
    """Return, for each scaled model, the budget in use before it in the waterfall that ends soon, and so before its day.

    A server that is started for a budget which ends later would idle.
    """
    from biollm.routing import deployments

    now, found, ending = time.time(), deployments.build_deployments(config), dict[str, str]()
    used = {f"{key.provider}/{key.account}" for key, _ in history.cells(ledger, now - _IN_USE, now)[0]}
    for quota in quotas(config, ledger):
        soon = quota.left and quota.exhausted_at and quota.exhausted_at < now + _SOON
        if soon and quota.scope.partition(":")[0] in used:
            order = min(each.order for each in found if each.scope == quota.scope)
            later = (config.server_of(each.model) for each in found if each.order > order)
            if model := next((each for each in later if each and each.scale), None):
                ending[model.key] = f"{quota.limit} of {quota.scope} ends in {span((quota.exhausted_at or now) - now)}"
    return ending


@cache
def _price(model: str | None) -> Price:
    """Return LiteLLM's price; None if no model is given, or it has none."""
    from biollm.routing.pricing import per_token, price_map

    return per_token(price_map().get(model, {})) if model else None


def _local(
    config: Config, ledger: Ledger, cells: Cells, span: tuple[float, float, float], price: Price
) -> Iterator[Local]:
    """Yield the local models that had jobs or answered in `span` (since, until, now).

    Slurm's jobs are remembered for a week; if there are any, the tokens are of that week too.
    """
    since, until, now = span
    known = max(since, now - WEEK)
    hours = gpu_hours(config, known, min(until, now))
    if hours and since < known:
        cells = history.cells(ledger, known, until, 0)[0]
    local = {provider.name for provider in config.providers if provider.type == "local"}
    tokens: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for key, cell in split(cells)[1]:
        if key.provider in local:
            tokens[key.model] += Counter(prompt=cell.prompt, completion=cell.completion)
    hour = config.costs.gpu_hour_usd
    for model in sorted({*hours, *tokens}):
        sent, got = tokens[model]["prompt"], tokens[model]["completion"]
        count, cost = sent + got, None if hour is None else hours.get(model, 0.0) * hour
        yield Local(
            model=model,
            gpu_hours=hours.get(model, 0.0),
            tokens=count,
            cost_usd=cost,
            per_million_usd=cost / count * 1e6 if cost is not None and count and model in hours else None,
            reference_per_million_usd=(sent * price[0] + got * price[1]) / count * 1e6 if price and count else None,
        )


def gpu_hours(config: Config, since: float, until: float) -> dict[str, float]:
    """Return model -> GPU hours of this user's jobs, from first to last event, split evenly over a job's models."""
    from biollm.config.paths import biollm_dir
    from biollm.slurm import commands
    from biollm.slurm.submissions import job_of, submissions

    hours: dict[str, float] = {}
    known = [submission for submission in submissions(config.cluster) if submission.events]
    if not known:
        return hours
    queue = commands.queue(biollm_dir(config.cluster), config.cluster.name)
    for submission in known:
        end = submission.seen if job_of(submission, queue, (), until).over else until
        seconds = min(end, until) - max(float(submission.events[0]["at"]), since)
        for model in submission.models if seconds > 0 else ():  # else it ended before, or began later
            hours[model] = hours.get(model, 0.0) + submission.gpus * seconds / 3600 / len(submission.models)
    return hours
