"""Commands that answer: complete, explain, login, embedded pull."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biollm.cli import output
from biollm.cli.output import Json, Progress
from biollm.cli.slurm import state_line
from biollm.errors import CompletionError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from biollm.client.remote import Line
    from biollm.slurm.submissions import Job
    from biollm.types import Completion, Piece

Provider = Annotated[str | None, typer.Option(metavar="NAME", help="Only this provider may answer.")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Only this model may answer.")]
LocalOnly = Annotated[bool, typer.Option("--local-only", help="Keep the prompt on this machine and the cluster.")]

_SLOW = 2.0  # seconds of a start that a person notices


def complete(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question; - is stdin. Piped input is added to it.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("-f", "--file", metavar="FILE", help="Add a file's text; repeatable; - is stdin."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    provider: Provider = None,
    model: Model = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print as it comes (default on a terminal).")
    ] = None,
    as_json: Json = False,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON Schema; the answer is JSON of that shape.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, metavar="T", help="0 to 2.")] = None,
    max_retries: Annotated[
        int, typer.Option(min=0, metavar="N", help="Further passes when all rungs fail for a passing reason.")
    ] = 0,
    no_fallback: Annotated[bool, typer.Option("--no-fallback", help="Ask only the first that may serve.")] = False,
    local_only: LocalOnly = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Per attempt.")] = None,
    deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help="For the whole call.")] = None,
    start: Annotated[
        bool, typer.Option("--start", help="If nobody else answers, start a local model's server and wait for it.")
    ] = False,
    wait: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="With --start: at most so long, the queue included.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Stored with the usage record; repeatable.")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show every attempt.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Answer a question by the first provider that can."""
    progress = Progress(quiet=quiet)
    text, shape = _prompt(prompt, file or []), _schema(schema) if schema else None
    live = not (shape or as_json) and (sys.stdout.isatty() if stream is None else stream)
    options: dict[str, Any] = {
        "max_retries": max_retries,
        "fallback": not no_fallback,
        "local_only": local_only,
        "timeout": timeout,
        "deadline": deadline,
        "tags": _tags(tag or []),
        "allow_degraded": shape is None,
    }
    said = {"system": system, "max_tokens": max_tokens, "temperature": temperature}
    progress.say("looking for a provider")
    begun, waited = time.monotonic(), 0.0

    def sending(deployment: str) -> None:
        nonlocal waited
        waited = waited or time.monotonic() - begun
        progress.say(f"asking {deployment}")

    def waiting(job: Job) -> None:
        progress.say(state_line(job))

    # A server's start is told of step by step, which a gateway does not do.
    line = None if start else _line(text, provider, model, shape, said, options, live=live)
    try:
        if line:
            progress.say("asking the gateway")
            answer = _stream(line.stream(), progress) if live else line.complete()
        else:
            from biollm.client import Client
            from biollm.client.remote import named

            client, more = Client(provider, model), {"response_model": shape, "start_local": start, "wait": wait}
            told = {} if named() and not start else {"on_send": sending, "on_state": waiting}
            options = {**said, **options, **more, **told}
            pieces = client.stream(text, **options, on_interrupt="restart") if live else iter(())
            answer = _stream(pieces, progress) if live else client.complete(text, **options)
    except CompletionError as error:
        progress.clear()
        if as_json:
            _failed(error)
        raise
    progress.clear()
    _show(answer, as_json=as_json, live=live, structured=schema is not None)
    _report(answer, progress, verbose=verbose)
    if waited > _SLOW and sys.stderr.isatty() and "BIOLLM_GATEWAY" not in os.environ:
        progress.note(f"{waited:.0f} s of that were biollm's start; with `biollm serve --detach` it starts once.")


def _line(
    text: str,
    provider: str | None,
    model: str | None,
    shape: dict[str, Any] | None,
    said: dict[str, Any],
    options: dict[str, Any],
    *,
    live: bool,
) -> Line | None:
    """Return a connection to the running gateway; its answer costs no import beyond the standard library.

    One that BIOLLM_GATEWAY names has a configuration of its own: what the one here says of data is read first.
    """
    from biollm.client.remote import body, named, reach
    from biollm.config.paths import environment_tags, wants_local_only
    from biollm.routing.structured import ResponseSchema

    if named():
        return None
    params = {name: value for name, value in said.items() if name != "system"}
    system = [{"role": "system", "content": said["system"]}] if said["system"] else []
    wanted = {"response_format": ResponseSchema(shape).response_format} if shape else {}
    local = options["local_only"] or wants_local_only()
    ours = {
        **options,
        "provider": provider,
        "data_policy": "local_only" if local else "any",
        "tags": {**environment_tags(), **options["tags"]},
        "on_interrupt": "restart" if live else None,
    }
    return reach(body([*system, {"role": "user", "content": text}], model, {**params, **wanted}, **ours))


def _prompt(prompt: str | None, files: list[Path]) -> str:
    """Return the files, what was piped in, and last the question, where models heed it best; `-` is stdin."""
    named = prompt == "-" or Path("-") in files
    mode = 0
    with suppress(OSError):  # it may be closed; a terminal, a socket and /dev/null are not read unasked
        mode = os.fstat(0).st_mode
    parts: list[str] = []
    for file in files:
        if file != Path("-"):
            try:
                parts.append(f"--- {file.name} ---\n{file.read_text('utf-8', 'surrogateescape')}")
            except OSError as error:
                raise UsageError(f"{file}: {error.strerror}.") from None
    if named or stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        with open(0, encoding="utf-8", errors="surrogateescape", closefd=False) as piped:
            parts.append(piped.read())
    question = "" if prompt in (None, "-") else prompt
    text = "\n\n".join(part for part in (*parts, question) if part and part.strip())
    if not text.strip():
        raise UsageError(
            "There is nothing to ask.", hint='Write biollm complete "question", add -f FILE, or pipe text in.'
        )
    return text


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
    """Print the answer as it comes; on a terminal as markdown."""
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
    """Print a failure for a program; for people it is on stderr in any case."""
    facts = {"error": str(error).split("\n")[0], "hint": error.hint, "exit_code": error.exit_code}
    output.as_json({**facts, "retry_after": getattr(error, "retry_after", None), "attempts": error.attempts})


def _report(answer: Completion, progress: Progress, *, verbose: bool) -> None:
    """Say on stderr who answered, and on the way of `-v` what happened before."""
    if verbose:
        for attempt in answer.attempts:
            progress.note(f"  {attempt.outcome:9} {attempt.deployment}  {attempt.reason}")
    price = "free" if answer.cost_usd == 0 else f"{answer.cost_usd:.6f} USD" if answer.cost_usd else "price unknown"
    about = "about " if answer.usage.estimated else ""
    tokens = f"{about}{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens"
    progress.note(f"— {answer.deployment}, {answer.latency_ms / 1000:.1f} s, {tokens}, {price}")
    if answer.degraded:
        print(
            "degraded: the small embedded model answered; it is often wrong. `biollm explain` says why.",
            file=sys.stderr,
        )


def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A prompt, to see whether it fits.")] = "",
    provider: Provider = None,
    model: Model = None,
    local_only: LocalOnly = False,
    capability: Annotated[
        str | None, typer.Option(metavar="NAME", help="As if the request needed it, such as reasoning.")
    ] = None,
    tools: Annotated[bool, typer.Option("--tools", help="As if the request had tools.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Say who would answer now and why others would not.

    Sends nothing; only where servers share a rung, it asks them how busy they are.
    """
    from biollm.client import Client

    client = Client(provider, model, local_only=local_only, allow_degraded=True)
    found = client.explain(prompt, capability=capability, tools=[{}] if tools else None, max_tokens=max_tokens)
    if as_json:
        output.as_json([_rung(candidate) for candidate in found])
        return
    ready = [candidate for candidate in found if candidate.status == "ready"]
    first = min(
        ready,
        key=lambda candidate: (candidate.deployment.order, candidate.load.rank if candidate.load else ()),
        default=None,
    )
    rows = [
        (
            "→" if candidate is first else " ",
            candidate.deployment.order,
            candidate.deployment.id,
            candidate.status,
            _reason(candidate),
        )
        for candidate in found
    ]
    output.table(("", "#", "deployment", "standing", "reason"), rows)
    print(f"\n{first.deployment.id} would answer." if first else "\nNobody could answer now.")


def _rung(candidate: Any) -> dict[str, Any]:
    deployment = candidate.deployment
    return {
        "deployment": deployment.id,
        "order": deployment.order,
        "provider": deployment.provider.name,
        "account": deployment.account.name,
        "model": deployment.model,
        "standing": candidate.status,
        "reason": candidate.reason,
        "until": output.moment(candidate.until),
        "cost": candidate.cost and _cost(candidate.cost),
        "load": candidate.load
        and {"own": candidate.load.own, "others": candidate.load.others, "metrics": candidate.load.told},
    }


def _cost(cost: Any) -> dict[str, Any]:
    sent, got = (1e6 * each for each in cost.per_token) if cost.per_token else (None, None)
    million = {"prompt_usd_per_million": sent, "answer_usd_per_million": got}
    return {"prompt_tokens": cost.prompt_tokens, "answer_tokens": cost.answer_tokens, **million, "usd": cost.usd}


def _reason(candidate: Any) -> str:
    import time

    left = candidate.until - time.time()
    reason = f"{candidate.reason} ({left:.0f} s left)" if 0 < left < 86400 else candidate.reason
    return "; ".join(str(each) for each in (reason, candidate.cost, candidate.load) if each)


def login(
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="github_copilot")],
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Account of the provider.")] = None,
) -> None:
    """Log in with a browser, for providers without keys."""
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.providers import copilot

    if provider != "github_copilot":
        raise UsageError(
            f"{provider} needs no login.", hint="Only github_copilot does; other providers take a key (env_key)."
        )
    names = [each.name for each in load_config().provider(provider).accounts]
    chosen = account or (names[0] if len(names) == 1 else "")
    if not chosen:
        raise UsageError(f"{provider} has several accounts.", hint=f"Add --account: {', '.join(names)}.")
    if chosen not in names:
        raise UnknownNameError("account", chosen, names)
    copilot.login(chosen, state_dir(), show=lambda text: print(text, file=sys.stderr))
    print(f"{provider}/{chosen}: logged in.")


def embedded_pull(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model of type embedded. Default: the first.")
    ] = None,
) -> None:
    """Download the weights of the embedded model."""
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.providers import embedded

    models = {key: each for key, each in load_config().models.items() if each.type == "embedded"}
    chosen = model or next(iter(models), "")
    if chosen not in models:
        raise UnknownNameError("embedded model", chosen, models)
    print(embedded.pull(models[chosen], state_dir()))
