"""The commands `usage`, `top` and `alerts`. They send nothing to a provider."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from biollm.cli import output
from biollm.cli.output import Json
from biollm.errors import UsageError
from biollm.types import counted, iso, short

if TYPE_CHECKING:
    from biollm.monitoring.snapshot import Snapshot
    from biollm.monitoring.usage import Report, Row

_BAR = 40  # columns
_WIDE, _ROOMY = 100, ("p95", "first token", "avoided")  # columns of a terminal, and what a narrower one leaves out
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_TIMES = ("since", "until", "resets_at", "exhausted_at")


def usage(
    since: Annotated[str, Option(metavar="WHEN", help="Start: 7d, 12h or 30min ago, or a date.")] = "7d",
    until: Annotated[str | None, Option(metavar="WHEN", help="End; now by default.")] = None,
    by: Annotated[
        str, Option(metavar="WHAT", help="Group by provider, account, model, day, hour (UTC), tag, key or rating.")
    ] = "provider",
    as_json: Json = False,
    as_csv: Annotated[bool, Option("--csv", help="Print the rows as CSV.")] = False,
    prometheus: Annotated[bool, Option("--prometheus", help="Print all metrics as Prometheus text.")] = False,
    prune: Annotated[
        str | None, Option(metavar="AGE", help="Remove records older than AGE (90d); hourly sums stay.")
    ] = None,
    merge: Annotated[
        list[Path] | None, Option(metavar="FILE", help="Add another host's history.db; repeatable.")
    ] = None,
) -> None:
    """Report requests, latencies, fallbacks, cost and limits."""
    import time

    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.ledger import Ledger, history
    from biollm.monitoring import metrics
    from biollm.monitoring import usage as reports

    if as_json + as_csv + prometheus > 1:
        raise UsageError("--json, --csv and --prometheus exclude each other.", hint="Choose one.")
    output.warn_unwritable(state_dir())
    records, now = Ledger(state_dir()), time.time()
    for file in merge or ():
        print(f"{file}: {counted(history.merge(records, file), 'record')} added.")
    if prune is not None:
        print(f"{counted(history.prune(records, reports.moment(prune, now)), 'record')} removed.")
    if merge or prune is not None:
        return
    config = load_config()
    ledger = Ledger(state_dir(), server=config.ledger)
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
    from dataclasses import asdict

    facts = asdict(report)
    for each in (facts, *facts["quotas"], *facts["budgets"]):
        each.update({name: iso(at) for name, at in each.items() if name in _TIMES})
    return facts


def _csv(report: Report) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([report.by, *list(vars(report.total))[1:]])
    for row in report.rows:
        reasons = {"fallbacks": _counts(row.fallbacks), "failures": _counts(row.failures)}
        writer.writerow((vars(row) | reasons).values())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{why} {count}" for why, count in counts.items())


def _show(report: Report) -> None:
    from biollm.monitoring.usage import ATTEMPTS

    total, precision = report.total, "exact" if report.exact else "within 2%"
    print(f"{_minute(report.since)} to {_minute(report.until)} UTC; percentiles are {precision}.\n")
    column, last = "requests", total
    if report.by in ATTEMPTS:
        column, last = "attempts", _sum(report)
    head = (report.by, column, "errors", "tokens in", "out", "p50", "p95", "p99", "first token", "fallback", "USD")
    rows = [(*head, "avoided"), *(_cells(row) for row in (*report.rows, last))]
    if output.width() < _WIDE:
        rows = [[cell for name, cell in zip(rows[0], row, strict=True) if name not in _ROOMY] for row in rows]
    output.table([str(cell) for cell in rows[0]], rows[1:])
    if report.by in ("day", "hour"):
        _plot(report.rows)
    for said in (
        last is not total and f"Requests: {total.requests}, of which {total.errors} had no answer.",
        total.fallbacks and f"Fallbacks: {_counts(total.fallbacks)}",
        total.failures and f"Failures: {_counts(total.failures)}",
        total.unpriced and f"The price of {counted(total.unpriced, 'attempt')} is unknown: set costs.per_million_tokens.",
        total.estimated and f"The tokens of {counted(total.estimated, 'attempt')} are estimates: the provider reported none.",
        total.cached and f"Stored answers: {total.cached}, which saved {short(total.saved_tokens)} tokens"
        f"{'' if total.saved_usd is None else f' and {total.saved_usd:.2f} USD'}.",
        report.reference_model and total.cost_avoided_usd is None and not total.unpriced
        and f"LiteLLM has no price for costs.reference_model, {report.reference_model}.",
    ):  # fmt: skip
        if said:
            print(f"\n{said}")
    _section(
        ("account", "limit", "used", "left", "resets (UTC)", "projected exhaustion"),
        [(q.scope, q.limit, short(round(q.used, 2)), short(round(q.left, 2)), _minute(q.resets_at),
          _minute(q.exhausted_at)[:10]) for q in report.quotas if q.used],
    )  # fmt: skip
    if unused := sum(not q.used for q in report.quotas):
        print(f"\nUnused limits: {unused} (`biollm providers` and --json list them).")
    _section(
        ("own GPUs", "GPU hours", "tokens", "USD", "USD per million tokens", report.reference_model or "reference model"),
        [(each.model, f"{each.gpu_hours:.1f}", each.tokens, _usd(each.cost_usd), _usd(each.per_million_usd),
          _usd(each.reference_per_million_usd)) for each in report.local],
    )  # fmt: skip


def _sum(report: Report) -> Row:
    """Return the total of rows that count attempts: a request can have several."""
    from dataclasses import replace

    total, attempts = report.total, sum(row.requests for row in report.rows)
    errors, fallbacks = sum(row.errors for row in report.rows), sum(report.total.fallbacks.values())
    shares = {"error_rate": errors / attempts, "fallback_rate": fallbacks / attempts} if attempts else {}
    return replace(total, requests=attempts, errors=errors, **shares)


def _cells(row: Row) -> Sequence[object]:
    from biollm.monitoring.dashboard import seconds

    times = [
        "-" if value is None else seconds(value) for value in (row.p50_ms, row.p95_ms, row.p99_ms, row.ttft_p50_ms)
    ]
    tokens = (short(row.prompt_tokens), short(row.completion_tokens))
    cost = f"{'≥ ' if row.unpriced else ''}{row.cost_usd:.2f}" if row.cost_usd is not None else "unknown"
    errors, fallback = f"{row.error_rate:.1%}", f"{row.fallback_rate:.1%}"
    return (row.name, row.requests, errors, *tokens, *times, fallback, cost, _usd(row.cost_avoided_usd))


def _minute(epoch: float | None) -> str:
    return (iso(epoch) or "-")[:16].replace("T", " ")


def _usd(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _plot(rows: Sequence[Row]) -> None:
    most = max((row.requests for row in rows), default=0) or 1
    print()
    for row in rows:
        eighths = round(8 * _BAR * row.requests / most)
        print(f"{row.name}  {_EIGHTHS[8] * (eighths // 8)}{_EIGHTHS[eighths % 8].strip()} {row.requests}")


def _section(head: Sequence[str], rows: Sequence[Iterable[Any]]) -> None:
    if rows:
        print()
        output.table(head, [tuple(row) for row in rows])


def top(
    once: Annotated[bool, Option("--once", help="Print once and exit (default when piped).")] = False,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a web page instead.")] = None,
    interval: Annotated[float, Option(min=0.2, metavar="SECONDS", help="Refresh interval.")] = 2.0,
) -> None:
    """Show deployments, limits, jobs and the last half hour, live.

    `q` quits.
    """
    from functools import partial

    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.monitoring.alerts import firing
    from biollm.monitoring.dashboard import render
    from biollm.monitoring.snapshot import Collector

    output.warn_unwritable(state_dir())
    config = load_config()
    collector = Collector.of_process(config, partial(firing, config))
    if html:
        from biollm._files import write_for_user
        from biollm.monitoring import page

        write_for_user(html, page.html(collector.snapshot()))
        return
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore # a terminal without UTF-8 shows "?" for a bar
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(render(collector.snapshot(), shutil.get_terminal_size((200, 24)).columns))
    else:
        _live(collector.snapshot, interval)


def _live(take: Callable[[], Snapshot], interval: float) -> None:
    """Draw until `q`, Ctrl-C or SIGTERM, and restore the terminal."""
    import select
    import signal
    import termios
    import tty

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from biollm.monitoring.dashboard import render

    console, keys = Console(highlight=False), sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        tty.setcbreak(keys)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                text = render(take(), console.width, console.height, color=not console.no_color)
                live.update(Text.from_ansi(text, no_wrap=True), refresh=True)
                if select.select([keys], [], [], interval)[0] and os.read(keys, 64)[:1] in (b"q", b"Q", b""):
                    return
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)


def alerts(
    as_json: Json = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print only new alerts, on stderr.")] = False,
) -> None:
    """Evaluate alert rules and notify on changes.

    For cron: each alert is reported once. Exits 1 while one is active.
    """
    from biollm._runtime import ledger
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.monitoring.alerts import check
    from biollm.monitoring.snapshot import Collector

    config = load_config()
    snapshot = Collector.of_process(config).snapshot()
    found = check(config, ledger(config), snapshot, state_dir(), lambda line: print(line, file=sys.stderr))
    if as_json:
        output.as_json([each.facts for each in found])
    elif not quiet and not config.alerts.active:
        print("No alert rules configured: add some under `alerts:` in providers.yaml.")
    elif not quiet:
        print("\n".join(f"since {iso(each.since)}  {each}" for each in found) or "No active alerts.")
    if found:
        raise typer.Exit(1)
