"""The command `usage`: what was asked of whom, how long it took, what it cost, what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biollm.cli import output
from biollm.cli.output import Json

if TYPE_CHECKING:
    from biollm.monitoring.usage import Report, Row

_BAR = 40  # columns
_TIMES = ("since", "until", "resets_at", "exhausted_at")
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def usage(
    since: Annotated[str, typer.Option(metavar="WHEN", help="7d, 12h, 30min ago, or a date.")] = "7d",
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Likewise; by default now.")] = None,
    by: Annotated[
        str, typer.Option(metavar="WHAT", help="provider, account, model, day, hour (of UTC) or tag.")
    ] = "provider",
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="Print all metrics as Prometheus text.")] = False,
    prune: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Remove single records older than AGE (90d); the sums of their hours stay."),
    ] = None,
    merge: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Add another host's history.db; repeatable.")
    ] = None,
) -> None:
    """Report requests, latencies, fallbacks, cost, quotas.

    Sends nothing.
    """
    import time

    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.ledger import Ledger, history
    from biollm.monitoring import metrics
    from biollm.monitoring import usage as reports

    ledger, now = Ledger(state_dir()), time.time()
    for file in merge or ():
        print(f"{file}: {history.merge(ledger, file)} records added.")
    if prune is not None:
        print(f"{history.prune(ledger, reports.moment(prune, now))} records removed.")
    if merge or prune is not None:
        return
    config = load_config()
    if prometheus:
        print(metrics.text(config, ledger), end="")
        return
    begin, end = reports.moment(since, now), reports.moment(until, now) if until else now
    report = reports.report(config, ledger, begin, end, by)  # type: ignore[arg-type] # it refuses any other
    if as_json:
        output.as_json(_facts(report))
    elif as_csv:
        _csv(report)
    else:
        _show(report)


def _facts(report: Report) -> dict[str, Any]:
    facts = asdict(report)
    for each in (facts, *facts["quotas"], *facts["budgets"]):
        each.update({name: output.moment(at) for name, at in each.items() if name in _TIMES})
    return facts


def _csv(report: Report) -> None:
    import csv
    import sys

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([report.by, *list(vars(report.total))[1:]])
    for row in report.rows:
        reasons = {"fallbacks": _told(row.fallbacks), "failures": _told(row.failures)}
        writer.writerow((vars(row) | reasons).values())


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{why} {count}" for why, count in counts.items())


def _show(report: Report) -> None:
    span = " to ".join(str(output.moment(at))[:16].replace("T", " ") for at in (report.since, report.until))
    said = "exact" if report.exact else "within 2%"
    print(f"{span} UTC; percentiles are {said}.\n")
    head = (report.by, "requests", "errors", "tokens in", "out", "p50", "p95", "p99", "first token", "fallback", "USD")
    output.table((*head, "avoided"), [_cells(row) for row in (*report.rows, report.total)])
    if report.by in ("day", "hour"):
        _plot(report.rows)
    for what, counts in (("Fallbacks", report.total.fallbacks), ("Failures", report.total.failures)):
        if counts:
            print(f"\n{what}: {_told(counts)}")
    if report.total.unpriced:
        print(f"\nThe price of {report.total.unpriced} attempts is unknown: write costs.per_million_tokens.")
    if report.total.estimated:
        print(f"\nThe tokens of {report.total.estimated} attempts are an estimate: the provider stated none.")
    if report.reference_model and report.total.cost_avoided_usd is None and not report.total.unpriced:
        print(f"\nLiteLLM has no price for costs.reference_model, {report.reference_model}.")
    _quotas(report)
    _local(report)


def _cells(row: Row) -> Sequence[object]:
    from biollm.config.values import short

    times = [_ms(value) for value in (row.p50_ms, row.p95_ms, row.p99_ms, row.ttft_p50_ms)]
    tokens = (short(row.prompt_tokens), short(row.completion_tokens))
    shares = (f"{row.error_rate:.1%}", f"{row.fallback_rate:.1%}")
    cost = f"{'≥ ' if row.unpriced else ''}{row.cost_usd:.2f}" if row.cost_usd is not None else "unknown"
    avoided = _usd(row.cost_avoided_usd)
    return (row.name, row.requests, shares[0], *tokens, *times, shares[1], cost, avoided)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.1f} s"


def _plot(rows: Sequence[Row]) -> None:
    most = max((row.requests for row in rows), default=0) or 1
    print()
    for row in rows:
        eighths = round(8 * _BAR * row.requests / most)
        print(f"{row.name}  {_EIGHTHS[8] * (eighths // 8)}{_EIGHTHS[eighths % 8].strip()} {row.requests}")


def _quotas(report: Report) -> None:
    from biollm.config.values import short

    def at(epoch: float | None) -> str:
        return (output.moment(epoch) or "-")[:16].replace("T", " ")

    rows = [(q.scope, q.limit, short(round(q.used, 2)), short(round(q.left, 2)), at(q.resets_at),
             at(q.exhausted_at)[:10]) for q in report.quotas]  # fmt: skip
    _section(("limit of", "limit", "used", "left", "resets (UTC)", "at this pace used up on"), rows)


def _local(report: Report) -> None:
    rows = [(each.model, f"{each.gpu_hours:.1f}", each.tokens, _usd(each.cost_usd), _usd(each.per_million_usd),
             _usd(each.reference_per_million_usd)) for each in report.local]  # fmt: skip
    reference = f"{report.reference_model or 'reference model'}'s"
    _section(("own GPUs", "GPU hours", "tokens", "USD", "USD per million tokens", reference), rows)


def _usd(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _section(head: Sequence[str], rows: Iterable[Any]) -> None:
    if rows := list(rows):
        print()
        output.table(head, rows)
