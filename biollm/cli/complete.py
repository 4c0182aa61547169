"""The commands `complete` and `explain`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from biollm.cli import output
from biollm.cli.output import Json, Progress
from biollm.cli.prompt import needs, read
from biollm.cli.slurm import state_line
from biollm.errors import CompletionError, UsageError

if TYPE_CHECKING:
    from biollm.client import Options
    from biollm.routing.candidates import Candidate
    from biollm.routing.pricing import Cost
    from biollm.types import Completion, Piece

Provider = Annotated[str | None, Option(metavar="NAME", help="Use only this provider.")]
Model = Annotated[str | None, Option(metavar="NAME", help="Use only this model.")]
LocalOnly = Annotated[bool, Option("--local-only", help="Keep the prompt on this machine and the cluster.")]
MaxTokens = Annotated[int | None, Option(min=1, metavar="N", help="Maximum completion tokens.")]

_SLOW = 2.0  # seconds of a start that a person notices


def complete(
    prompt: Annotated[
        str | None, Argument(metavar="PROMPT", help="The prompt; - reads stdin. Piped input is put before it.")
    ] = None,
    file: Annotated[
        list[Path] | None, Option("-f", "--file", metavar="FILE", help="Add a file; repeatable; - is stdin.")
    ] = None,
    system: Annotated[str | None, Option(metavar="TEXT", help="System message.")] = None,
    provider: Provider = None,
    model: Model = None,
    stream: Annotated[
        bool | None, Option("--stream/--no-stream", help="Stream the answer (default on a terminal).")
    ] = None,
    as_json: Json = False,
    schema: Annotated[Path | None, Option(metavar="FILE", help="JSON Schema that the answer must follow.")] = None,
    no_condense: Annotated[
        bool, Option("--no-condense", help="Fail if files and piped input do not fit, instead of condensing them.")
    ] = False,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, Option(min=0, max=2, metavar="T", help="Sampling temperature (0-2).")] = None,
    max_retries: Annotated[int, Option(min=0, metavar="N", help="Further passes after temporary failures.")] = 0,
    no_fallback: Annotated[bool, Option("--no-fallback", help="Try only the first deployment.")] = False,
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
    question, found = read(prompt, file or [])
    needs(question, found)
    response_schema = _schema(schema) if schema else None
    live = not (schema or as_json) and (sys.stdout.isatty() if stream is None else stream)
    options: Options = {
        "system": system, "provider": provider, "model": model, "max_tokens": max_tokens, "temperature": temperature,
        "max_retries": max_retries, "fallback": not no_fallback, "local_only": local_only, "timeout": timeout,
        "deadline": deadline, "start_local": start, "wait": wait, "tags": _tags(tag or []),
        "response_model": response_schema, "allow_degraded": schema is None,
        "attachments": found, "condense": not no_condense,
    }  # fmt: skip
    progress = Progress(quiet=quiet)
    try:
        answer = _ask(question, options, progress, live=live)
    except CompletionError as error:
        progress.clear()
        if as_json:
            _failed(error)
        raise
    progress.clear()
    _show(answer, as_json=as_json, live=live, structured=schema is not None)
    _report(answer, progress, verbose=verbose)


def _ask(text: str, options: Options, progress: Progress, *, live: bool) -> Completion:
    """Return the answer; with `live` it has been printed."""
    from biollm.client import Client

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
    if live:
        options["on_interrupt"] = "restart"
        answer = _stream(client.stream(text, **options), progress)
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


def _schema(file: Path) -> dict[str, Any]:
    try:
        schema = json.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{file} is not a JSON Schema: it must be an object.")
    return schema  # pyright: ignore[reportUnknownVariableType]


def _stream(pieces: Iterator[Piece], progress: Progress) -> Completion:
    """Print the answer as it comes, on a terminal as Markdown."""
    from biollm.types import StreamRestarted

    if sys.stdout.isatty():
        return _live(pieces, progress)
    answer: Completion | None = None
    for piece in pieces:
        progress.clear()
        if isinstance(piece, StreamRestarted):
            print("\n")
            progress.note(f"{piece.attempt.deployment} broke off ({piece.attempt.reason}); the answer starts again")
        else:
            print(piece, end="", flush=True)
            answer = piece.completion or answer
    print()
    assert answer is not None  # noqa: S101 # a stream ends with its Completion or raises
    return answer


def _live(pieces: Any, progress: Progress) -> Completion:
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

    text, answer = "", None
    first = next(pieces)
    progress.clear()
    with Live(console=Console(), vertical_overflow="visible", refresh_per_second=8) as screen:
        for piece in chain([first], pieces):
            text = text + str(piece) if hasattr(piece, "completion") else ""
            answer = getattr(piece, "completion", None) or answer
            screen.update(Markdown(text))
    assert answer is not None  # noqa: S101 # a stream ends with its Completion or raises
    return answer


def _show(answer: Completion, *, as_json: bool, live: bool, structured: bool) -> None:
    if as_json:
        facts = {name: value for name, value in vars(answer).items() if name != "raw"}
        output.as_json(facts)
    elif structured:
        output.as_json(answer.parsed)
    elif not live and sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(answer.text))
    elif not live:
        print(answer.text)


def _failed(error: CompletionError) -> None:
    facts = {"error": str(error).split("\n")[0], "hint": error.hint, "exit_code": error.exit_code}
    output.as_json({**facts, "retry_after": getattr(error, "retry_after", None), "attempts": error.attempts})


def _report(answer: Completion, progress: Progress, *, verbose: bool) -> None:
    if verbose:
        for attempt in answer.attempts:
            progress.note(f"  {attempt.outcome:9} {attempt.deployment}  {attempt.reason}")
    price = "free" if answer.cost_usd == 0 else f"{answer.cost_usd:.6f} USD" if answer.cost_usd else "price unknown"
    about = "about " if answer.usage.estimated else ""
    tokens = f"{about}{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens"
    progress.note(f"— {answer.deployment}, {answer.latency_ms / 1000:.1f} s, {tokens}, {price}")
    if progress.hint:
        progress.note(progress.hint)
    if answer.degraded:
        print("degraded: the small embedded model answered; it is often wrong. See `biollm explain`.", file=sys.stderr)


def explain(
    prompt: Annotated[str, Argument(metavar="PROMPT", help="A prompt, to check whether it fits.")] = "",
    provider: Provider = None,
    model: Model = None,
    local_only: LocalOnly = False,
    capability: Annotated[
        str | None, Option(metavar="NAME", help="Assume the request needs this, such as reasoning.")
    ] = None,
    tools: Annotated[bool, Option("--tools", help="Assume the request uses tools.")] = False,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
) -> None:
    """Show which deployment would answer, and why not others.

    Sends no prompt; replicas of a model are asked for their load.
    """
    from biollm.client import Client

    client = Client(provider, model, local_only=local_only, allow_degraded=True, sender="direct")
    found = client.explain(prompt, capability=capability, tools=[{}] if tools else None, max_tokens=max_tokens)
    if as_json:
        output.as_json([_facts(each) for each in found])
        return
    ready = [each for each in found if each.status == "ready"]
    first = min(ready, key=lambda each: (each.deployment.order, each.load.rank if each.load else ()), default=None)
    rows = [
        ("→" if each is first else " ", each.deployment.order, each.deployment.id, each.status, _reason(each))
        for each in found
    ]
    output.table(("", "#", "deployment", "status", "reason"), rows)
    print(f"\n{first.deployment.id} would answer." if first else "\nNo deployment is available.")


def _facts(candidate: Candidate) -> dict[str, Any]:
    deployment, cost, load = candidate.deployment, candidate.cost, candidate.load
    return {
        "deployment": deployment.id,
        "order": deployment.order,
        "provider": deployment.provider.name,
        "account": deployment.account.name,
        "model": deployment.model,
        "standing": candidate.status,
        "reason": candidate.reason,
        "until": output.moment(candidate.until),
        "cost": cost and _cost(cost),
        "load": load and {"own": load.own, "others": load.others, "metrics": load.told},
    }


def _cost(cost: Cost) -> dict[str, Any]:
    sent, received = (1e6 * each for each in cost.per_token) if cost.per_token else (None, None)
    million = {"prompt_usd_per_million": sent, "answer_usd_per_million": received}
    return {"prompt_tokens": cost.prompt_tokens, "answer_tokens": cost.answer_tokens, **million, "usd": cost.usd}


def _reason(candidate: Candidate) -> str:
    left = candidate.until - time.time()
    reason = f"{candidate.reason} ({left:.0f} s left)" if 0 < left < 86400 else candidate.reason
    return "; ".join(str(each) for each in (reason, candidate.cost, candidate.load) if each)
