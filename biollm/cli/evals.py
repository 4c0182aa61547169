"""The commands `compare` and `rate`: how good answers are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from biollm.cli import output
from biollm.cli.complete import LocalOnly, MaxTokens, System, json_schema
from biollm.cli.output import Json, Progress
from biollm.errors import BiollmError, CompletionError, UsageError

_BAR = 20  # columns


def compare(
    inputs: Annotated[list[Path], Argument(metavar="INPUTS", help="Log files, folders of them, JSONL files.")],
    a: Annotated[
        str,
        Option(
            "--a", callback=output.filled, metavar="MODEL", help="Model, provider/model, ensemble:3 or ensemble:x,y,z."
        ),
    ],
    b: Annotated[str, Option("--b", callback=output.filled, metavar="MODEL", help="What it is compared with.")],
    c: Annotated[str | None, Option("--c", callback=output.filled, metavar="MODEL", help="A third arm.")] = None,
    d: Annotated[str | None, Option("--d", callback=output.filled, metavar="MODEL", help="A fourth arm.")] = None,
    prompt: Annotated[str | None, Option(metavar="TEXT", help="Asked about each input.")] = None,
    system: System = None,
    schema: Annotated[Path | None, Option(metavar="FILE", help="JSON Schema that answers must follow.")] = None,
    expect: Annotated[
        str | None, Option(callback=output.filled, metavar="FIELD", help="Field of the input with the right answer.")
    ] = None,
    command: Annotated[
        str | None,
        Option(
            callback=output.filled, metavar="TEXT", help="Program that scores an answer: 'check {answer}' (a file)."
        ),
    ] = None,
    judge: Annotated[
        str | None, Option(callback=output.filled, metavar="MODEL", help="Model that chooses between two answers.")
    ] = None,
    results: Annotated[
        Path, Option("-o", "--output", metavar="FILE", help="JSONL of answers; an interrupted run resumes from it.")
    ] = Path("biollm-compare.jsonl"),
    limit: Annotated[int | None, Option(min=1, metavar="N", help="Use the first N inputs only.")] = None,
    spend_limit: Annotated[float | None, Option(min=0, metavar="USD", help="Stop when this much is spent.")] = None,
    wait: Annotated[float, Option(min=0, metavar="SECONDS", help="Longest wait for an arm at a limit.")] = 600,
    concurrency: Annotated[int, Option(min=1, metavar="N", help="Requests in flight at once.")] = 8,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, Option(min=0, max=2, metavar="T", help="Sampling temperature (0-2).")] = None,
    local_only: LocalOnly = False,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write one HTML page with every answer.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the answers of several models.

    Exits 1 if the spend limit stopped it, 69 if an arm has no answer.
    """
    from biollm import evals
    from biollm.evals.report import HEAD, lines, rows

    if html:
        _check_page(html, (*inputs, results))
    given = {"max_tokens": max_tokens, "temperature": temperature, "local_only": local_only or None}
    progress = Progress(quiet=not sys.stderr.isatty())
    try:
        found = evals.compare(
            inputs,
            [arm for arm in (a, b, c, d) if arm],
            results=results,
            limit=limit,
            progress=_bar(progress),
            prompt=prompt,
            system=system,
            schema=json_schema(schema) if schema else None,
            expect=expect,
            command=command,
            judge=judge,
            wait=wait,
            spend_limit=spend_limit,
            concurrency=concurrency,
            options={name: value for name, value in given.items() if value is not None},
        )
    except KeyboardInterrupt:
        print(f"The answers so far are in {results}; run the same command to go on.", file=sys.stderr)
        raise
    finally:
        progress.clear()
    if html:
        from biollm._files import write_private

        write_private(html, found.html())
    if as_json:
        output.as_json(found)
    else:
        output.table(HEAD, [*rows(found)])
        print()
        for line in lines(found):
            output.paragraph(line)
    if found.stopped:
        raise Exit(BiollmError.exit_code)
    if not all(arm.answers for arm in found.arms):
        raise Exit(CompletionError.exit_code)  # an arm that never answers compares nothing


def _check_page(html: Path, taken: Sequence[Path]) -> None:
    """Raise a UsageError before anything is paid for, if the page would replace something else or cannot be written."""
    from biollm.evals.report import is_page

    if {html.resolve(), html.resolve().parent} & {each.resolve() for each in taken}:
        raise UsageError(f"--html {html} is among the inputs or results.", hint="Name a file elsewhere.")
    if html.is_dir() or not html.parent.is_dir():
        raise UsageError(f"--html {html} is not a file in a folder that exists.")
    if html.is_file() and not is_page(html):
        raise UsageError(f"--html {html} exists, and is no page of `biollm compare`.", hint="Name another file.")


def _bar(progress: Progress) -> Callable[[int, int, float], None]:
    began = 0.0

    def show(done: int, count: int, usd: float) -> None:
        nonlocal began
        if done == 1:  # of the answers, and then of a judge's verdicts
            began = time.monotonic()
        left = (time.monotonic() - began) / done * (count - done)
        bar = ("#" * (_BAR * done // count)).ljust(_BAR, "-")
        progress.say(f"[{bar}] {done} of {count}, about {left:.0f} s left, {usd:.6f} USD")

    return show


def rate(
    answer: Annotated[str, Argument(metavar="ID", help="The answer's id (--json, -v), or last.")],
    rating: Annotated[str, Argument(metavar="up|down", help="Whether it was right.")],
    correction: Annotated[
        Path | None, Option(metavar="FILE", help="A file with what the answer should have been.")
    ] = None,
) -> None:
    """Mark an answer as right or wrong."""
    from biollm.config.paths import state_dir
    from biollm.ledger.ratings import Ratings

    if rating not in ("up", "down"):
        raise UsageError(f"The rating is {rating!r}; it must be up or down.")
    try:
        text = correction.read_text() if correction else None
    except OSError as error:
        raise UsageError(f"{correction}: {error.strerror}.") from None
    except UnicodeError:
        raise UsageError(f"{correction} is not UTF-8 text.") from None
    if text is not None and (rating == "up" or not text.strip()):
        why = "goes with `down`" if rating == "up" else f"is empty: {correction}"
        raise UsageError(f"A correction {why}.", hint="Write what the answer should have been into the file.")
    ident, kept, removed = Ratings(state_dir()).rate(answer, rating, text)
    print(f"{ident}: rated {rating}." + " Its correction is removed." * removed)
    if not kept:
        lost = " The correction is not kept either." if text else ""
        where = "see store_rated and store_rated_local of providers.yaml"
        print(f"Its prompt was not kept, so it cannot be used for fine-tuning: {where}.{lost}")
