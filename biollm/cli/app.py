"""The command line: a command parses, calls one function and prints. Errors become exit codes here alone."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from biollm import __version__
from biollm.cli import complete, config, drill, monitoring, serve, slurm
from biollm.errors import BiollmError
from biollm.routing import litellm_private

_EPILOG = (
    "Exit codes: 0 ok, 2 usage, 69 nobody can answer, 75 all limited (retry later), 77 keys refused or missing, "
    "78 configuration, 130 interrupted."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: no boxes, and rich is not imported
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"biollm {__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction] # Typer calls it
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """One call that always gets an answer: free APIs, subscribed APIs, your own GPUs, this machine."""


_COMMANDS = (
    complete.complete, complete.explain, complete.login, config.providers, config.health, config.config, config.init, slurm.render_slurm,
    slurm.fit, slurm.pull, slurm.up, slurm.status, slurm.logs, slurm.down, slurm.doctor, monitoring.top,
    monitoring.usage, drill.drill, monitoring.alerts,
)  # fmt: skip
_EMBEDDED = typer.Typer(
    name="embedded", no_args_is_help=True, help="The small model that runs in biollm's own process."
)
_MODELS = typer.Typer(name="models", invoke_without_command=True, help="The models of the configuration.")
_SERVE = typer.Typer(name="serve", invoke_without_command=True, help=serve.serve.__doc__)

for command in _COMMANDS:  # Typer names each as its function, with a dash for an underscore
    app.command()(command)
_EMBEDDED.command("pull")(complete.embedded_pull)
_MODELS.callback()(config.models_list)
_MODELS.command("add")(slurm.models_add)
_SERVE.callback()(serve.serve)
for command in (serve.status, serve.stop):
    _SERVE.command()(command)
for group in (_EMBEDDED, _MODELS, _SERVE):
    app.add_typer(group)


def main() -> None:
    """Run the command line and exit; what went wrong is one sentence on stderr."""
    litellm_private.use_own_handler()
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader left; nothing more to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except SystemExit as end:  # Typer has said what is wrong with the command line
        if end.code == 130:
            typer.echo("biollm: interrupted", err=True)
        return int(end.code or 0)
    except BiollmError as error:
        typer.echo(f"biollm: {error}", err=True)
        if error.hint:
            typer.echo(error.hint, err=True)
        return error.exit_code
    except OSError as error:
        typer.echo(f"biollm: {error.filename or ''}: {error.strerror or error}", err=True)
        return 1
    return 0
