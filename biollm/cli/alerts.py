"""The command `alerts`: evaluates the rules of `alerts:` once, for cron."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from biollm.cli import output
from biollm.cli.output import Json


def alerts(
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is new, on stderr.")] = False,
) -> None:
    """Tell what has begun to go wrong, and what has ended.

    Made for cron: each alert is told once. Exit 1 while one fires. Asks no provider.
    """
    from biollm._runtime import ledger
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.monitoring import alerts as rules
    from biollm.monitoring.snapshot import Top

    config = load_config()
    shot = Top.of_process(config).snapshot()
    found = rules.check(config, ledger(), shot, state_dir(), lambda line: print(line, file=sys.stderr))
    if as_json:
        output.as_json([each.facts for each in found])
    elif not quiet and not config.alerts.active:
        print("There are no rules: write some under `alerts:` in providers.yaml.")
    elif not quiet:
        print("\n".join(f"since {output.moment(each.since)}  {each}" for each in found) or "Nothing fires.")
    if found:
        raise typer.Exit(1)
