"""The command `complete`."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument, Option

from biollm.cli import answers, output
from biollm.cli.output import Json, Progress
from biollm.cli.prompt import needs, read
from biollm.cli.slurm import state_line
from biollm.errors import BiollmError, UsageError

if TYPE_CHECKING:
    from biollm.client import Options
    from biollm.inputs.digest import Digest
    from biollm.types import Completion

Provider = Annotated[str | None, Option(metavar="NAME", help="Use only this provider.")]
Model = Annotated[str | None, Option(metavar="NAME", help="Use only this model; also PROVIDER/MODEL.")]
LocalOnly = Annotated[bool, Option("--local-only", help="Keep the prompt on this machine and the cluster.")]
MaxTokens = Annotated[int | None, Option(min=1, metavar="N", help="Maximum completion tokens.")]
File = Annotated[list[Path] | None, Option("-f", "--file", metavar="FILE", help="Add a file; repeatable; - is stdin.")]
System = Annotated[str | None, Option(metavar="TEXT", help="System message.")]
NoDegraded = Annotated[
    bool, Option("--no-degraded", help="Fail if only the small embedded model can answer (BIOLLM_NO_DEGRADED=1).")
]
NoCondense = Annotated[
    bool, Option("--no-condense", help="Fail if files and piped input do not fit, instead of condensing them.")
]

_SLOW = 2.0  # seconds of a start that a person notices


def complete(
    prompt: Annotated[
        str | None, Argument(metavar="PROMPT", help="The prompt; - reads stdin. Piped input is put before it.")
    ] = None,
    file: File = None,
    system: System = None,
    provider: Provider = None,
    model: Model = None,
    stream: Annotated[
        bool | None, Option("--stream/--no-stream", help="Stream the answer (default on a terminal).")
    ] = None,
    as_json: Json = False,
    schema: Annotated[Path | None, Option(metavar="FILE", help="JSON Schema that the answer must follow.")] = None,
    no_condense: NoCondense = False,
    redact: Annotated[
        bool | None,
        Option(
            "--redact/--no-redact",
            help="Replace keys, user names and the like by placeholders (default: for providers that train on prompts).",
        ),
    ] = None,
    redact_name: Annotated[
        list[str] | None,
        Option(metavar="NAME", callback=output.filled, help="Replace this name, too, such as a sample's; repeatable."),
    ] = None,
    cache: Annotated[
        bool | None,
        Option("--cache/--no-cache", help="Give the stored answer to the same request, or store a new one."),
    ] = None,
    cache_similar: Annotated[
        bool, Option("--cache-similar", help="Like --cache, also for the same failure of another run.")
    ] = False,
    cache_name: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            callback=output.filled,
            help="With --cache-similar: a name that differs, such as a sample's; repeatable.",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, Option(min=0, max=2, metavar="T", help="Sampling temperature (0-2).")] = None,
    max_retries: Annotated[int, Option(min=0, metavar="N", help="Further passes after temporary failures.")] = 0,
    no_fallback: Annotated[bool, Option("--no-fallback", help="Try only the first deployment.")] = False,
    no_degraded: NoDegraded = False,
    ensemble: Annotated[
        str | None,
        Option(metavar="N|MODELS", help="Ask N deployments, or these models (a,b,c), at once and combine the answers."),
    ] = None,
    local_only: LocalOnly = False,
    timeout: Annotated[float | None, Option(metavar="SECONDS", help="Timeout per attempt.")] = None,
    deadline: Annotated[float | None, Option(metavar="SECONDS", help="Timeout for the whole call.")] = None,
    start: Annotated[
        bool, Option("--start", help="If nothing else answers, start a model server on the cluster.")
    ] = False,
    wait: Annotated[float | None, Option(metavar="SECONDS", help="With --start: longest wait, queue included.")] = None,
    tag: Annotated[
        list[str] | None, Option(metavar="KEY=VALUE", help="Store a tag with the usage record; repeatable.")
    ] = None,
    verbose: Annotated[bool, Option("-v", "--verbose", help="List every attempt.")] = False,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Print nothing but the answer.")] = False,
) -> None:
    """Answer a prompt with the first available model."""
    if cache_similar and cache is False:
        raise UsageError("--cache-similar uses the cache, and --no-cache does not.", hint="Give one of them.")
    if wait is not None and not start:
        print("--wait has no effect without --start.", file=sys.stderr)
    if cache_name and not cache_similar:
        print("--cache-name has no effect without --cache-similar.", file=sys.stderr)
    if (cache or cache_similar) and ensemble:
        print("The cache is not used with --ensemble.", file=sys.stderr)
    from biollm.inputs.normalize_log import normalize_log

    question, found = read(prompt, file or [])
    needs(question, found)
    response_schema = json_schema(schema) if schema else None
    live = not (schema or as_json or ensemble) and (sys.stdout.isatty() if stream is None else stream)
    options: Options = {
        "system": system, "provider": provider, "model": model, "max_tokens": max_tokens, "temperature": temperature,
        "max_retries": max_retries, "fallback": not no_fallback, "local_only": local_only, "timeout": timeout,
        "deadline": deadline, "start_local": start, "wait": wait, "tags": _tags(tag or []),
        "response_model": response_schema, "allow_degraded": schema is None and not no_degraded,
        "condense": not no_condense, "redact": redact, "redact_names": redact_name or [],
        "cache": cache or cache_similar,
        "cache_key": partial(normalize_log, names=cache_name or []) if cache_similar else None,
    }  # fmt: skip
    progress = Progress(quiet=quiet)
    try:
        answer = _ask(question, found, options, progress, live=live, members=_members(ensemble))
    except BiollmError as error:
        progress.clear()
        if as_json:
            answers.show_failure(error)
        raise
    progress.clear()
    if as_json:
        answers.show_json(answer)
    elif schema:
        output.as_json(answer.parsed)
    elif not live:
        answers.show(answer, found)
    answers.report(answer, progress, verbose=verbose)


def _members(given: str | None) -> int | list[str] | None:
    """Return how many members an ensemble has, or which; None asks one deployment."""
    if given is None:
        return None
    return int(given) if given.isdecimal() else [name.strip() for name in given.split(",")]


def _ask(
    text: str,
    found: list[Digest],
    options: Options,
    progress: Progress,
    *,
    live: bool,
    members: int | list[str] | None,
) -> Completion:
    """Return the answer; with `live` it has been printed."""
    from biollm.client import Client

    options["attachments"] = found
    progress.say("looking for a provider")
    begun, started = time.monotonic(), 0.0

    def sending(deployment: str) -> None:
        nonlocal started
        started = started or time.monotonic() - begun
        progress.say(f"asking {deployment}")

    client = Client(sender="direct")
    if client.uses_gateway() and not options.get("start_local"):  # a gateway does not report a server's start
        progress.say("asking the gateway")
    else:
        options = {**options, "on_send": sending, "on_state": lambda job: progress.say(state_line(job))}
        options["on_note"] = progress.note
    if members is not None:
        answer = client.ensemble(text, members=members, **options)
        progress.note(f"ensemble: {answer.reason}")
    elif live:
        options["on_interrupt"] = "restart"
        answer = answers.stream(client.stream(text, **options), found, progress)
    else:
        answer = client.complete(text, **options)
    if "on_note" not in options:
        for note in answer.notes:
            progress.note(note)
    if started > _SLOW and sys.stderr.isatty() and "BIOLLM_GATEWAY" not in os.environ:
        progress.hint = f"Starting biollm took {started:.0f} s; `biollm serve --detach` keeps it running."
    return answer


def _tags(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--tag {pair!r} is not key=value.")
    return dict(pair.split("=", 1) for pair in pairs)


def json_schema(file: Path) -> dict[str, Any]:
    """Return the JSON Schema in a file; raise UsageError if there is none."""
    from biollm.routing.structured import ResponseSchema

    try:
        schema: Any = json.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{file} is not a JSON Schema: it must be an object.")
    ResponseSchema(cast("dict[str, Any]", schema)).check(str(file))
    return cast("dict[str, Any]", schema)
