"""The command `serve`: runs the gateway, says whether it runs, and ends it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from biollm.cli import output
from biollm.cli.output import Json


def serve(
    context: typer.Context,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="N", help="Listen on TCP too; needs a key. 0: a free one.")
    ] = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="With --port: where.")] = "127.0.0.1",
    detach: Annotated[bool, typer.Option("--detach", help="In the background, until idle for 2 h.")] = False,
    idle_timeout: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="End after so long without a request.")
    ] = None,
) -> None:
    """Run the gateway: OpenAI's interface over the waterfall.

    It listens on a Unix socket that only you can open; `biollm complete` and Python find it there.
    """
    if context.invoked_subcommand:
        return
    from biollm.gateway import server

    if not detach:
        server.serve(host=host, port=port, idle=idle_timeout, say=lambda line: typer.echo(line, err=True))
        return
    idle = server.IDLE if idle_timeout is None else idle_timeout
    tcp = [] if port is None else ["--port", str(port), "--host", host]
    _, log = server.detach([*tcp, "--idle-timeout", str(idle)])
    typer.echo(log.read_text(errors="replace").strip())
    typer.echo(f"ends after {idle / 3600:g} h without a request; its log is {log}")


def status(as_json: Json = False) -> None:
    """Say whether the gateway runs; exit 1 if not."""
    from biollm.client.remote import identity
    from biollm.gateway import server

    told = server.running()
    if told is None:
        output.as_json({"running": False}) if as_json else typer.echo("No gateway runs.")
        raise typer.Exit(1)
    mine: dict[str, Any] = told.get("identity") or {}
    same = mine == identity()
    facts = {
        "pid": told["pid"],
        "started": output.moment(told.get("started")),
        "socket": told["socket"],
        "url": told.get("url"),
    }
    if as_json:
        output.as_json({"running": True, **facts, "same_configuration": same, **mine})
        return
    for name, value in facts.items():
        if value:
            typer.echo(f"{name:8} {value}")
    if not same:
        typer.echo("Its configuration is not the one read here now: `biollm serve stop`, and start it again.")


def stop() -> None:
    """End the gateway once its answers under way are finished."""
    from biollm.gateway import server

    if server.running() is None:
        typer.echo("No gateway runs.")
    elif server.stop(60):
        typer.echo("Stopped.")
    else:
        typer.echo("It takes no more requests, and ends when those under way are answered.")
