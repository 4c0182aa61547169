"""The command line. A command parses its options, calls one function and prints; errors become exit codes here."""

from __future__ import annotations

import math
import os
import re
import sys
from typing import Annotated, Any

import typer
from typer import Option

from biollm import __version__
from biollm.cli import (
    cache,
    complete,
    config,
    drill,
    evals,
    explain,
    keys,
    monitoring,
    output,
    run,
    serve,
    setup,
    slurm,
    tune,
)
from biollm.errors import BiollmError, UsageError
from biollm.routing import litellm_private

_EPILOG = (
    "Exit codes: 0 success, 1 other errors, 2 usage error, 65 prompt too long, 69 no answer, 75 rate limited (retry later), 77 no valid key, "
    "78 invalid configuration, 130 interrupted."
)

_HINTS = (  # what Typer's message of a wrong command line lacks
    ("unexpected extra argument", "Put quotes around a text of several words."),
    (r"No such option: (\S+ |-\w$)", 'Put -- before a text that begins with a dash: biollm complete -- "-x ...".'),
    ("is not a valid int", "It must be a whole number."),
    ("is not a valid float", "It must be a number."),
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
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Prompt language models with automatic fallback: free APIs, subscriptions, your Slurm GPUs, this machine."""


_COMMANDS = (
    complete.complete, explain.explain, setup.login, config.providers, config.health, config.config, config.init, slurm.render_slurm,
    slurm.fit, slurm.pull, slurm.up, slurm.status, slurm.logs, slurm.down, slurm.doctor, slurm.autoscale, monitoring.top,
    monitoring.usage, evals.compare, evals.rate, drill.drill, monitoring.alerts, run.run,
)  # fmt: skip
_EMBEDDED = typer.Typer(name="embedded", no_args_is_help=True, help="Manage the small model that runs on this machine.")
_CACHE = typer.Typer(name="cache", no_args_is_help=True, help="Show or clear the stored answers (complete --cache).")
_MODELS = typer.Typer(name="models", invoke_without_command=True, help="List models, or add one to the configuration.")
_SERVE = typer.Typer(name="serve", invoke_without_command=True, help=serve.serve.__doc__)

for command in _COMMANDS:  # Typer names each as its function, with a dash for an underscore
    app.command()(command)
_CACHE.command("show")(cache.show)
_CACHE.command("clear")(cache.clear)
_EMBEDDED.command("pull")(setup.embedded_pull)
_MODELS.callback()(config.models_list)
_MODELS.command("add")(slurm.models_add)
_SERVE.callback()(serve.serve)
for command in (serve.status, serve.stop):
    _SERVE.command()(command)
for group in (_CACHE, _EMBEDDED, _MODELS, _SERVE, tune.app, keys.app):
    app.add_typer(group)


def main() -> None:
    """Run the command line and exit; errors are one sentence on stderr."""
    litellm_private.use_own_handler()
    if not output.open_streams():
        print("biollm: stdout is closed: there is nowhere to print to.", file=sys.stderr)
        sys.exit(1)
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):  # the reader has left
                code = _failed(error, "stdout")
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run() -> int:
    try:
        _checked(typer.main.get_command(app))()
    except SystemExit as end:  # Typer has said what is wrong with the command line
        if end.code == 130:
            typer.echo("biollm: interrupted", err=True)
        message = str(getattr(end.__context__, "message", ""))  # of the error that ended it
        for hint in (hint for pattern, hint in _HINTS if re.search(pattern, message)):
            typer.echo(hint, err=True)
        return int(end.code or 0)
    except BiollmError as error:
        typer.echo(f"biollm: {error}", err=True)
        if error.hint:
            typer.echo(error.hint, err=True)
        return error.exit_code
    except OSError as error:
        return _failed(error, str(error.filename or ("" if _takes_more(1) else "stdout")))
    return 0


def _checked(command: Any) -> Any:
    """Return a command of click's whose options take finite numbers only: Typer takes nan for any range."""
    for parameter in command.params:
        parameter.type.name = parameter.type.name.removesuffix(" range")  # in "'hot' is not a valid float"
        if "float" in parameter.type.name:
            parameter.callback = _finite
    for each in getattr(command, "commands", {}).values():
        _checked(each)
    return command


def _finite(_: object, parameter: Any, given: float | None) -> float | None:
    if given is not None and not math.isfinite(given):
        unit = " of seconds" if parameter.metavar == "SECONDS" else ""
        raise UsageError(f"{parameter.opts[0]} is {given:g}; it must be a finite number{unit}.")
    return given


def _failed(error: OSError, what: str) -> int:
    typer.echo(f"biollm: {what}{': ' if what else ''}{error.strerror or error}", err=True)
    return 1


def _takes_more(descriptor: int) -> bool:
    try:
        os.write(descriptor, b"\n")
    except OSError:
        return False
    return True
