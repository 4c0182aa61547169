"""The command `drill`: breaks every rung in every way and prints who answered."""

from __future__ import annotations

import typer

from biollm.cli._options import Json


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(drill)


def drill(as_json: Json = False) -> None:
    """Break every rung in every way, in this process.

    Nothing is sent to a provider and no quota is spent. Exit 1 when a rung that should have answered did not.
    """
    from biollm import drill as drills
    from biollm.cli import _print
    from biollm.config import load_config

    found = drills.drill(load_config())
    if as_json:
        _print.as_json({"ok": found.ok, "rungs": found.rungs, "absent": found.absent, "cells": found.cells})
    else:
        rows = [(c.rung, c.fault, "ok" if c.ok else f"FAILED: not {c.expected or 'nobody'}", c.answered or "nobody",
                 f"{c.ms:.0f} ms", c.seen) for c in found.cells]  # fmt: skip
        if rows:
            _print.table(("broken", "how", "failover", "answered", "after", "the user sees"), rows)
        for rung, reason in found.absent.items():
            print(f"{rung} would not answer: {reason}")
    raise typer.Exit(not found.ok)
