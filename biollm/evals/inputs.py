"""Reads the inputs of a comparison: files, folders and JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import yaml

from biollm.errors import UsageError, nearest
from biollm.routing.normalize import Rule, checked

SETTINGS = "compare.yaml"  # of a folder
_KEYS: dict[str, Rule] = {
    **dict.fromkeys(("prompt", "system", "expect"), ("a text", lambda given: isinstance(given, str))),
    "schema": ("a mapping", lambda given: isinstance(given, dict)),
}
_TARGETS = ("target", "expected")  # Inspect's name, and ours
_FORM = 'Write {"input": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'


@dataclass(frozen=True)
class Input:
    """One input, which every arm gets.

    Attributes:
        id: Where it is from: a file's name, or FILE:LINE.
        cluster: Inputs with the same one may depend on each other: the file that they are about.
        question: A text or messages; "" where only the settings' prompt is asked.
        file: What it is about, if that is a file.
        record: What the JSONL line has, with the expected answer.
    """

    id: str
    cluster: str
    question: str | Sequence[Mapping[str, Any]] = ""
    file: Path | None = None
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def prompt(self, before: str) -> Any:
        """Return the question, after the prompt of all inputs."""
        if isinstance(self.question, str):
            return "\n\n".join(part for part in (before, self.question) if part)
        return [*([{"role": "user", "content": before}] if before else ()), *self.question]

    @cached_property
    def digest(self) -> str:
        """Return a hash of what an arm is asked."""
        content = self.file.read_bytes() if self.file else b""
        return sha256(json.dumps(self.question, sort_keys=True).encode() + b"\0" + content).hexdigest()

    def expected(self, name: str | None) -> Any:
        """Return the expected answer: of the field `name`, else of "target" or "expected"; None without one."""
        return next((self.record[each] for each in ([name] if name else _TARGETS) if each in self.record), None)


def read(paths: Sequence[Path], results: Path | None = None) -> tuple[list[Input], dict[str, Any]]:
    """Return the inputs, and the settings of a folder's compare.yaml: prompt, system, schema, expect.

    A JSONL line has `messages`, `input` or `prompt`, and a `file` that it is about. A folder's inputs are the lines of
    its JSONL files, or its other files; `results`, which the run writes, is none. A file that is named twice is read once.

    Raises:
        UsageError: A file cannot be read, or has no input; it names the line.
    """
    named: list[Path] = []
    settings: dict[str, Any] = {}
    own = results and results.resolve()
    for path in paths:
        if path.is_dir():
            settings |= _settings(path)
            files = sorted(
                each for each in path.iterdir() if each.is_file() and each.name[0] != "." and each.resolve() != own
            )
            lines = [each for each in files if each.suffix == ".jsonl"]
            named += [file for file in lines or files if file.name != SETTINGS]
        else:
            named.append(path)
    once: dict[Path, Path] = {}
    for path in named:
        once.setdefault(path.resolve(), path)
    found = [each for path in once.values() for each in _of_file(path)]
    if not found:
        raise UsageError("There are no inputs.", hint="Name log files, a folder of them, or JSONL files.")
    return list(_apart(found)), settings


def _apart(found: Sequence[Input]) -> Iterator[Input]:
    """Yield the inputs with ids that differ: a second "a.log" is "a.log#2"."""
    seen = set[str]()
    for each in found:
        names = chain([each.id], (f"{each.id}#{number}" for number in count(2)))
        ident = next(name for name in names if name not in seen)
        seen.add(ident)
        yield replace(each, id=ident)


def _of_file(path: Path) -> Iterator[Input]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    if path.suffix != ".jsonl":
        yield Input(path.name, str(path), file=path)
        return
    for number, line in numbered_lines(path):
        if line.strip():
            yield _of_line(path, number, line)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a JSONL file; raise UsageError if it is not text."""
    try:
        text = path.read_text()
    except UnicodeError:
        raise UsageError(f"{path} is not UTF-8 text.", hint="Convert it: iconv -f latin1 -t utf-8.") from None
    lines = text.removesuffix("\n").split("\n") if text else ()  # JSON may hold the other characters that end lines
    yield from enumerate(lines, 1)


def _of_line(path: Path, number: int, line: str) -> Input:
    where = f"{path.name}:{number}"
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where} is not a JSON object.")
    record = cast("dict[str, Any]", record)
    question = next((record[name] for name in ("messages", "input", "prompt") if record.get(name)), "")
    if not isinstance(question, str) and not _are_messages(question):
        raise UsageError(f"{where}: the input is no text and no list of messages.", hint=_FORM)
    file = path.parent / str(record["file"]) if record.get("file") else None
    asked, right = question, dict[str, Any]()
    if record.get("messages") and not isinstance(question, str) and question[-1]["role"] == "assistant":
        *asked, last = question  # training data
        right = {_TARGETS[0]: last.get("content")}
    if not (file or (asked.strip() if isinstance(asked, str) else asked)):
        raise UsageError(f"{where} has no input.", hint="Write messages, input, prompt or file.")
    if file and not file.is_file():
        raise UsageError(f"{where}: {file}: no such file.")
    ident = str(record.get("id") or record.get("file") or where)
    return Input(ident, str(record.get("cluster") or file or where), asked, file, {**right, **record})


def _are_messages(given: Any) -> bool:
    return isinstance(given, list) and all(
        isinstance(each, dict) and "role" in each for each in cast("list[Any]", given)
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        given = cast("dict[str, Any]", dict(yaml.safe_load(path.read_text()) or {}))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a YAML mapping: {error}") from None
    for name in given.keys() - _KEYS:
        hint = nearest(name, _KEYS) or f"Known: {', '.join(_KEYS)}."
        raise UsageError(f"{path}: there is no key {name!r}.", hint=hint)
    return checked(given, _KEYS, f"{path}: ")
