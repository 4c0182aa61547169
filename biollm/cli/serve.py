"""The command `serve`: starts the gateway, shows its status, and stops it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Option

from biollm.cli import output
from biollm.cli.output import Json
from biollm.errors import UsageError
from biollm.types import iso


def serve(
    context: typer.Context,
    port: Annotated[
        int | None,
        Option(min=0, max=65535, metavar="N", help="Also listen on this TCP port, with a key. 0: any free port."),
    ] = None,
    host: Annotated[
        str | None, Option(metavar="NAME", help="Address to bind (with --port). Default: 127.0.0.1.")
    ] = None,
    name: Annotated[
        list[str] | None, Option(metavar="NAME", help="Host name of a balancer or proxy in front of it; repeatable.")
    ] = None,
    detach: Annotated[bool, Option("--detach", help="Run in the background; exit after 2 idle hours.")] = False,
    workers: Annotated[
        int, Option(min=1, max=64, metavar="N", help="Processes that share the sockets and the limits.")
    ] = 1,
    idle_timeout: Annotated[
        float | None, Option(min=1, metavar="SECONDS", help="Exit after this long without a request.")
    ] = None,
    drain: Annotated[
        float, Option(min=0, metavar="SECONDS", help="After SIGTERM, answer for this long; /health says 503 meanwhile.")
    ] = 0,
) -> None:
    """Run an OpenAI-compatible gateway.

    It listens on a Unix socket that only you can open; `biollm complete` and `biollm.client` use it when it runs.
    """
    if context.invoked_subcommand:
        return
    from biollm.gateway import server

    if host and port is None:
        raise UsageError("--host needs --port.", hint="Add --port N; 0 is any free one.")
    host = host or "127.0.0.1"
    if not detach:
        server.serve(
            host=host,
            port=port,
            idle=idle_timeout,
            workers=workers,
            drain=drain,
            names=name or (),
            say=lambda line: typer.echo(line, err=True),
        )
        return
    idle = server.IDLE if idle_timeout is None else idle_timeout
    names = [word for each in name or () for word in ("--name", each)]
    tcp = [] if port is None else ["--port", str(port), "--host", host]
    _, log = server.detach(
        [*tcp, "--idle-timeout", str(idle), "--workers", str(workers), "--drain", str(drain), *names]
    )
    typer.echo(log.read_text(errors="replace").strip() or "The gateway is running, but its log cannot be written.")
    typer.echo(f"exits after {idle / 3600:g} h without a request; log: {log}")


def status(as_json: Json = False) -> None:
    """Show gateway status; exit 1 if it is not running."""
    from biollm.client.remote import identity
    from biollm.gateway import server

    told = server.running()
    if told is None:
        output.as_json({"running": False}) if as_json else typer.echo("Gateway is not running.")
        raise typer.Exit(1)
    mine: dict[str, Any] = told.get("identity") or {}
    same = mine == identity()
    started = iso(told.get("started"))
    facts = {"pid": told["pid"], "started": started, "socket": told["socket"], "url": told.get("url")}
    facts["keys"] = told.get("keys")
    if as_json:
        files = [each[0] for each in mine.get("files", ())]
        output.as_json({"running": True, **facts, "same_configuration": same, **mine, "files": files})
        return
    facts["url"] = told.get("url") and f"{told['url']}/v1"
    for name, value in facts.items():
        if value:
            typer.echo(f"{name:8} {value}")
    if not same:
        restart = "Restart it: `biollm serve stop`, then `biollm serve --detach`."
        typer.echo(f"The configuration has changed since it started. {restart}")


def stop() -> None:
    """Stop the gateway once in-flight requests finish."""
    from biollm.gateway import server

    if server.running() is None:
        typer.echo("Gateway is not running.")
    elif server.stop(60):
        typer.echo("Stopped.")
    else:
        typer.echo("Draining: it will exit when in-flight requests finish.")
