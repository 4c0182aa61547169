"""Scores answers: by what was expected, by a command, or by a judge who sees two at a time."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, cast

from biollm.client.ensemble import plain
from biollm.errors import UsageError
from biollm.evals.inputs import Input
from biollm.types import Json

Score = Callable[[Input, str, Any], Awaitable[float | None]]  # of an answer: its text, and its object if it has one
Winner = Literal["first", "second", "tie"]
VERDICT: Json = {
    "title": "verdict",
    "type": "object",
    "properties": {"winner": {"enum": ["1", "2", "tie"]}, "reason": {"type": "string"}},
    "required": ["winner", "reason"],
}
_ASK = "Which of two answers to one question is more correct and useful? Length is no merit; say tie if neither is."
_COMMAND_S = 60.0  # seconds that a command may take


def by_expected(name: str | None) -> Score:
    """Score 1 where the answer has what the input expects, else 0; None where it expects nothing.

    A structured answer must have that value in the field `name`; a text must contain it, or one of a list.
    """

    async def score(given: Input, text: str, parsed: Any) -> float | None:
        expected: Any = given.expected(name)
        if expected in (None, ""):  # a file of results has "" where nothing is expected
            return None
        if isinstance(parsed, dict) and name:
            return float(plain(str(cast("Json", parsed).get(name))) == plain(str(expected)))
        either = cast("list[Any]", expected if isinstance(expected, list) else [expected])  # as in Inspect's datasets
        return float(any(plain(str(each)) in plain(text) for each in either))

    return score


async def unscored(_given: Input, _text: str, _parsed: Any) -> None:
    """Score nothing: a judge compares."""


def by_command(command: str, expect: str | None = None) -> Score:
    """Score with a program: the number that it prints last, else 1 where it exits with 0.

    {answer}, {input} and {expected} (the field `expect` of the input) stand for files with these texts. No shell is started.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--command cannot be read: {error}.", hint="Close every quotation mark.") from None
    if not any("{answer}" in word for word in words):
        raise UsageError("--command has no {answer}.", hint="Write {answer} where the file with the answer belongs.")
    if not shutil.which(words[0]):  # found out before anything is paid for
        raise UsageError(f"--command names {words[0]}, which is not a program here.", hint="Check its path and mode.")

    async def score(given: Input, text: str, parsed: Any) -> float | None:
        with tempfile.TemporaryDirectory(prefix="biollm-") as folder:
            question = given.question if isinstance(given.question, str) else json.dumps(given.question)
            if given.file and not question:
                question = given.file.read_text(errors="replace")
            texts = {"answer": text, "input": question, "expected": str(given.expected(expect) or "")}
            line = words
            for name, content in texts.items():
                (Path(folder) / name).write_text(content, errors="replace")
                line = [word.replace(f"{{{name}}}", f"{folder}/{name}") for word in line]
            try:
                process = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
            except OSError as error:
                raise UsageError(f"--command cannot be run: {error}.") from None
            try:
                out, _ = await asyncio.wait_for(process.communicate(), _COMMAND_S)
            except TimeoutError:
                process.kill()
                return 0.0
        try:
            found = float(out.split()[-1])
        except (IndexError, ValueError):
            found = math.nan
        return found if math.isfinite(found) else float(process.returncode == 0)

    return score


def judge_prompt(question: str, first: str, second: str) -> str:
    """Return what a judge is asked about two answers."""
    return f"{_ASK}\n\n## Question\n{question}\n\n## Answer 1\n{first}\n\n## Answer 2\n{second}"


def verdict(straight: str, swapped: str) -> tuple[Winner, bool]:
    """Return the winner of two verdicts, the second on swapped answers, and whether they contradict each other.

    A judge prefers the first answer; who wins in one order only has not won.
    """
    back = {"1": "2", "2": "1"}.get(swapped, swapped)
    if straight != back:
        return "tie", "tie" not in (straight, back)
    return ("first" if straight == "1" else "second" if straight == "2" else "tie"), False
