"""The command `drill`: breaks every rung in every way and prints who answered; or lets the real ones answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from biollm.cli import output
from biollm.cli.output import Json
from biollm.errors import UsageError

if TYPE_CHECKING:
    from biollm.config import Config
    from biollm.drill.drill import Cell


def drill(
    live: Annotated[
        bool, typer.Option("--live", help="Let each real rung answer a tiny prompt, those above it broken.")
    ] = False,
    spend_limit: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="With --live: what it may cost.  [default: 0.05]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Break every rung in every way, in this process.

    Without --live nothing is sent to a provider and no quota is spent; with it, your limits hold, and rungs without
    a known price are not asked. Exit 1 when a rung that should have answered did not.
    """
    from biollm.config import load_config
    from biollm.drill import drill as drills

    if spend_limit is not None and not live:
        raise UsageError("--spend-limit goes with --live; otherwise nothing is spent.")
    config = load_config()
    if live:
        raise typer.Exit(not _live(config, spend_limit, as_json))
    found = drills.drill(config)
    if as_json:
        output.as_json({"ok": found.ok, **vars(found)})
    else:
        if found.cells:
            rows = [
                (c.candidate, c.fault, _verdict(c), c.answered or "nobody", f"{c.ms:.0f} ms", str(c.asked),
                 c.next or "nobody", c.seen)
                for c in found.cells
            ]  # fmt: skip
            output.table(
                ("broken", "how", "failover", "answered", "after", "asked", "next call", "the user sees"), rows
            )
            print()
        for sentence in (
            *found.odd,
            *(f"{candidate} would not answer: {reason}" for candidate, reason in found.absent.items()),
        ):
            print(sentence)
        alone = sum(c.ok and not c.expected for c in found.cells)
        caught, failed = sum(c.ok and bool(c.expected) for c in found.cells), sum(not c.ok for c in found.cells)
        if found.cells:
            print(f"{caught} breaks were caught, {failed} were not; {alone} leave no rung to catch them.")
    raise typer.Exit(not found.ok)


def _verdict(cell: Cell) -> str:
    from biollm.drill import drill as drills

    if cell.answered != cell.expected:
        return f"FAILED: not {cell.expected or 'nobody'}"
    if not cell.recovered:
        return "FAILED: it does not answer again after its rest"
    if cell.asked > drills.TRIES:
        return f"FAILED: asked more than {drills.TRIES} times"
    if not cell.ok:
        return "FAILED: the next call has no answer"
    return "ok" if cell.expected else "none: no rung is left"


def _live(config: Config, limit: float | None, as_json: bool) -> bool:
    """Drill the real rungs, print what came of it, and return whether it is good."""
    from biollm.drill import live as drills

    def say(sentence: str) -> None:
        typer.echo(sentence, err=True)

    found = drills.live_drill(config, drills.LIMIT if limit is None else limit, say)
    if as_json:
        output.as_json({"ok": found.ok, **vars(found)})
        return found.ok
    if found.answers:
        rows = [
            (
                a.candidate,
                a.state if a.state != "failed" else "FAILED",
                "-" if a.ms is None else f"{a.ms:.0f} ms",
                "-" if a.cost_usd is None else f"{a.cost_usd:.6f}",
                a.why or ("a degraded answer" if a.degraded else "an answer"),
            )
            for a in found.answers
        ]
        output.table(("rung", "state", "after", "USD", "the user sees"), rows)
        print(f"\nSpent at most {found.spent_usd:.6f} of {found.limit_usd:g} USD.")
    for candidate, reason in found.absent.items():
        print(f"{candidate} would not answer: {reason}")
    return found.ok
