"""The command `drill`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from biollm.cli import output
from biollm.cli.output import Json
from biollm.errors import UsageError

if TYPE_CHECKING:
    from biollm.drill.drill import Cell, Drill
    from biollm.drill.live import LiveDrill


def drill(
    live: Annotated[bool, Option("--live", help="Send one short prompt to each real deployment instead.")] = False,
    spend_limit: Annotated[
        float | None, Option(min=0, metavar="USD", help="Most that --live may cost.  [default: 0.05]")
    ] = None,
    every: Annotated[bool, Option("--all", help="List every failover, not only those that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Break each deployment and show which one answers instead.

    Without --live, nothing is sent to a provider. With --live, your limits and cooldowns hold, and deployments of
    unknown price are skipped. Exits 1 if a failover or a live call fails.
    """
    from biollm.config import load_config
    from biollm.drill import drill as drills
    from biollm.drill import live as lives

    if spend_limit is not None and not live:
        raise UsageError("--spend-limit needs --live: without it nothing is spent.")
    config = load_config()
    if live:
        limit = lives.LIMIT if spend_limit is None else spend_limit
        found = lives.live_drill(config, limit, lambda line: typer.echo(line, err=True))
    else:
        found = drills.drill(config)
    if as_json:
        output.as_json({"ok": found.ok, **asdict(found, dict_factory=_named)})
    else:
        _print_live(found) if isinstance(found, lives.LiveDrill) else _print(found, every=every)
        for name, reason in found.absent.items():
            output.paragraph(f"{name} is not available: {reason}")
    raise typer.Exit(not found.ok)


def _named(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    old = {"deployment": "rung", "deployments": "rungs"}  # the names of --json
    return {old.get(name, name): value for name, value in fields}


def _print(found: Drill, *, every: bool) -> None:
    from biollm.drill import drill as drills

    if found.cells:
        failed, alone = sum(not c.ok for c in found.cells), sum(c.ok and not c.expected for c in found.cells)
        good = len(found.cells) - failed - alone
        output.paragraph(f"{good} failovers succeeded, {failed} failed; {alone} had no fallback left.")
        output.paragraph(
            f"Silent servers had {drills.TIMEOUT:g} s here; your own timeouts are longer (`biollm config`)."
        )
        if not every and good + alone:
            print("--all lists every failover.")
    for sentence in found.odd:
        output.paragraph(sentence)
    rows = [
        (c.deployment, c.fault, _result(c), c.answered or "-", f"{c.ms:.0f} ms", c.asked, c.next or "-", c.seen)
        for c in found.cells
        if every or not c.ok
    ]
    if rows:
        print()
        output.table(("broken", "fault", "failover", "answered", "after", "asked", "next call", "the user sees"), rows)
        print()


def _result(cell: Cell) -> str:
    from biollm.drill import drill as drills

    if cell.answered != cell.expected:
        return f"FAILED: not {cell.expected or 'an error'}"
    if not cell.recovered:
        return "FAILED: does not answer again after its cooldown"
    if cell.asked > drills.TRIES:
        return f"FAILED: asked more than {drills.TRIES} times"
    if not cell.ok:
        return "FAILED: the next call has no answer"
    return "ok" if cell.expected else "no fallback left"


def _print_live(found: LiveDrill) -> None:
    rows: list[tuple[str, ...]] = []
    for a in found.answers:
        state = "FAILED" if a.state == "failed" else a.state
        ms, usd = "-" if a.ms is None else f"{a.ms:.0f} ms", "-" if a.cost_usd is None else f"{a.cost_usd:.6f}"
        rows.append((a.deployment, state, ms, usd, a.why or ("a degraded answer" if a.degraded else "an answer")))
    if rows:
        output.table(("deployment", "state", "after", "USD", "the user sees"), rows)
        print(f"\nSpent at most {found.spent_usd:.6f} of {found.limit_usd:g} USD.")
