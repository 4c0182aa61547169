"""The command `alerts`: evaluates the rules of `alerts:` once, for cron."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from biollm.cli import output
from biollm.cli.output import Json


def alerts(
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only new alerts, on stderr.")] = False,
) -> None:
    """Evaluate alert rules and notify on changes.

    For cron: each alert is reported once. Exits 1 while one is active. Sends nothing to a provider.
    """
    from biollm._runtime import ledger
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.monitoring.alerts import check
    from biollm.monitoring.snapshot import Collector

    config = load_config()
    snapshot = Collector.of_process(config).snapshot()
    found = check(config, ledger(), snapshot, state_dir(), lambda line: print(line, file=sys.stderr))
    if as_json:
        output.as_json([each.facts for each in found])
    elif not quiet and not config.alerts.active:
        print("No alert rules configured: add some under `alerts:` in providers.yaml.")
    elif not quiet:
        print("\n".join(f"since {output.moment(each.since)}  {each}" for each in found) or "No active alerts.")
    if found:
        raise typer.Exit(1)
