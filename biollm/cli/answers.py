"""Prints answers: text as it comes or whole, JSON, and the line under an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from biollm.cli import output
from biollm.cli.output import Progress
from biollm.errors import BiollmError
from biollm.routing.deployments import EMBEDDED_EXCERPT

if TYPE_CHECKING:
    from biollm.inputs.digest import Digest
    from biollm.types import Completion, Piece


def stream(pieces: Iterator[Piece], found: Sequence[Digest], progress: Progress) -> Completion:
    """Print the answer as it comes, on a terminal as Markdown."""
    from biollm.types import StreamRestarted

    if sys.stdout.isatty():
        return _live(pieces, found, progress)
    answer, marked = None, False
    for piece in pieces:
        progress.clear()
        if getattr(piece, "degraded", False) and not marked:
            marked = True
            print(degraded_mark(found))
        if isinstance(piece, StreamRestarted):
            print("\n")
            progress.note(f"{piece.attempt.deployment} broke off ({piece.attempt.reason}); the answer starts again")
        else:
            print(piece, end="", flush=True)
            answer = piece.completion or answer
    print()
    assert answer is not None  # noqa: S101 # a stream ends with its Completion or raises
    return answer


def _live(pieces: Any, found: Sequence[Digest], progress: Progress) -> Completion:
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

    text, answer = "", None
    first = next(pieces)
    progress.clear()
    if getattr(first, "degraded", False):
        print(degraded_mark(found))
    with Live(console=Console(), vertical_overflow="visible", refresh_per_second=8) as screen:
        for piece in chain([first], pieces):
            text = text + str(piece) if hasattr(piece, "completion") else ""
            answer = getattr(piece, "completion", None) or answer
            screen.update(Markdown(text))
    assert answer is not None  # noqa: S101 # a stream ends with its Completion or raises
    return answer


def show(answer: Completion, found: Sequence[Digest]) -> None:
    """Print a whole answer, on a terminal as Markdown."""
    if answer.degraded:
        print(degraded_mark(found))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(answer.text))
    else:
        print(answer.text)


def show_json(answer: Completion) -> None:
    """Print every fact of an answer as JSON."""
    panel: dict[str, Any] = getattr(answer, "panel", dict)()  # of an ensemble
    output.as_json({**{name: value for name, value in vars(answer).items() if name != "raw"}, **panel})


def degraded_mark(found: Sequence[Digest]) -> str:
    """Return what precedes the text of the embedded model: that it is no diagnosis, and what the logs themselves say."""
    lines = ["[degraded: small local model, no diagnosis]"]
    for each in found:
        excerpt = each.cut(EMBEDDED_EXCERPT // len(found)).text.strip("\n")
        lines += ["", f"What {each.name} says:", *(f"  {line}".rstrip() for line in excerpt.split("\n"))]
    return "\n".join([*lines, "", "What the model says:"] if found else lines)


def took(answer: Completion) -> str:
    """Return who answered in how many seconds, and what the attempts before took, "a 0.5 s without an answer, then b 2.1 s"."""
    if answer.cached:
        return f"stored answer of {answer.deployment}, {answer.latency_ms / 1000:.1f} s"
    failed = [each for each in answer.attempts if each.outcome == "failed"]
    if not failed:
        return f"{answer.deployment}, {answer.latency_ms / 1000:.1f} s"
    own = next((each.ms for each in answer.attempts if each.outcome == "ok"), answer.latency_ms)
    before = ", ".join(f"{each.deployment} {each.ms / 1000:.1f} s without an answer" for each in failed)
    return f"{before}, then {answer.deployment} {own / 1000:.1f} s"


def failures(answer: Completion) -> dict[str, str]:
    """Return why each account that is set up did not answer, the last reason of each."""
    tried = ("failed", "refused", "cooling", "limited")
    return {each.deployment.split("/")[0]: each.reason for each in answer.attempts if each.outcome in tried}


def show_failure(error: BiollmError) -> None:
    """Print a failure as JSON."""
    facts = {"error": str(error).split("\n")[0], "hint": error.hint, "exit_code": error.exit_code}
    output.as_json(
        {**facts, "retry_after": getattr(error, "retry_after", None), "attempts": getattr(error, "attempts", ())}
    )


def report(answer: Completion, progress: Progress, *, verbose: bool) -> None:
    """Print the line under an answer."""
    if verbose:
        for attempt in answer.attempts:
            seconds = f"{attempt.ms / 1000:.1f} s  " if attempt.ms else ""
            progress.note(f"  {attempt.outcome:9} {attempt.deployment}  {seconds}{attempt.reason}")
        progress.note(f"  id {answer.id}")
    price = "free" if answer.cost_usd == 0 else f"{answer.cost_usd:.6f} USD" if answer.cost_usd else "price unknown"
    about = "about " if answer.usage.estimated else ""
    tokens = f"{about}{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens"
    progress.note(f"— {took(answer)}, {tokens}, {price}")
    if progress.hint:
        progress.note(progress.hint)
    if answer.degraded:
        for account, reason in failures(answer).items():
            progress.note(f"{account}: {reason}")
        print("degraded: the small embedded model answered; it is often wrong. See `biollm explain`.", file=sys.stderr)
