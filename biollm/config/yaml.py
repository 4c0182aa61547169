"""Reads a YAML file into texts, lists and mappings, and knows the line of each key.

PyYAML loads safely; it lacks the lines, takes a key given twice, and reads `no`, `010` and `8:00:00` by the rules
of YAML 1.1. Here every scalar stays the text it is, and whoever wants a number or a truth value says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from biollm.errors import Problem

KeyPath = tuple[str | int, ...]
_MAX_DEPTH = 30
_NULLS = {"", "~", "null", "Null", "NULL"}
_PLAIN_TAGS = {None, "!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_HINTS = {
    "mapping values are not allowed": "A text that holds `: ` needs quotes around it.",
    "could not find expected ':'": "Is a colon missing in the line above?",
    "did not find expected key": "Is it indented like its neighbours, and is every bracket and quote closed?",
    "another document": "One file holds one document: take the `---` out.",
}


class _Broken(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, line: int, message: str, hint: str | None = None) -> None:
        self.problem = (line, message, hint)


@dataclass
class Document:
    """A file: its content as texts (None for null), the line of each key, from 1, and what is wrong with it."""

    file: str
    value: dict[str, Any] = field(default_factory=dict[str, Any])
    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])
    problems: list[Problem] = field(default_factory=list[Problem])

    def line(self, path: KeyPath) -> int:
        """Return the line of `path`, or of the nearest key above it: what an alias or `<<` brings has none."""
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 0)

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """Return a problem at the line of `path`."""
        return Problem(self.file, self.line(path), dotted(path), message, hint)


def dotted(path: KeyPath) -> str:
    """Return a key path as people write it: `providers.gemini.models[1]`."""
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in path))


def read(path: Path) -> Document:
    """Read one YAML file. Whatever is wrong with it is in `problems`; nothing is raised."""
    document = Document(str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
        value = _Builder(document, text).document()
        if not isinstance(value, dict):
            raise _Broken(1, "must be a mapping (`providers:`, say), not a list or a text.")  # noqa: TRY301
        document.value = value
    except OSError as error:
        document.problems.append(Problem(str(path), 0, "", f"cannot be read: {error.strerror}."))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        document.problems.append(Problem(str(path), line, "", "is not UTF-8.", "Save the file as UTF-8."))
    except _Broken as error:
        line, message, hint = error.problem
        document.problems.append(Problem(str(path), line, "", message, hint))
    return document


class _Builder:
    """Turns the parser's events into values, without recursion in C, so that no file can crash the process."""

    def __init__(self, document: Document, text: str) -> None:
        self.out, self.text, self.anchors = document, text, dict[str, Any]()
        self.events = self._events()

    def _events(self) -> Iterator[Any]:
        try:
            yield from cast("Any", yaml).parse(self.text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 0
            message = error.problem or str(error.context)
            if "nesting depth" in message:  # PyYAML's own bound, from 6.0.4 on
                raise _Broken(line, "is nested too deeply.") from None
            hint = next((hint for part, hint in _HINTS.items() if part in message), None)
            if "\t" in "".join(self.text.splitlines()[line - 1 : line]):
                hint = "A tab stands there: YAML is indented with spaces."
            raise _Broken(line, f"is not valid YAML: {message}.", hint) from None
        except yaml.reader.ReaderError as error:
            line = self.text.encode()[: error.position].count(b"\n") + 1
            raise _Broken(line, f"holds a character that YAML does not allow: {error.reason}.") from None

    def document(self) -> Any:
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise _Broken(1, "is empty.", "Delete it, or write `providers:` or `models:` in it.")
        value = self.value(next(self.events), ())
        next(self.events)
        if not isinstance(after := next(self.events), yaml.StreamEndEvent):
            raise _Broken(after.start_mark.line + 1, "holds a second document.", _HINTS["another document"])
        return value

    def value(self, event: Any, path: KeyPath) -> Any:
        line: int = event.start_mark.line + 1
        self.out.lines.setdefault(path, line)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise _Broken(line, f"uses *{event.anchor}, which no &{event.anchor} above it defines.")
            return self.anchors[event.anchor]
        if event.tag not in _PLAIN_TAGS:
            raise _Broken(line, f"uses the tag {event.tag}; tags have no meaning here.", "Take it out.")
        if len(path) > _MAX_DEPTH:
            raise _Broken(line, "is nested too deeply.")
        if isinstance(event, yaml.ScalarEvent):
            value: Any = None if event.implicit[0] and event.value in _NULLS else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(item, (*path, len(value))))
        else:
            value = self.mapping(path)
        if event.anchor:
            self.anchors[event.anchor] = value
        return value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line: int = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise _Broken(line, "has a list or a mapping where a key should stand.")
            key: str = event.value
            if key in own:
                first = self.out.lines[*path, key]
                self.out.problems.append(
                    Problem(self.out.file, line, dotted((*path, key)), f"stands twice; first in line {first}.")
                )
            self.out.lines[*path, key] = line
            value = self.value(next(self.events), (*path, key))
            if key == "<<" and event.implicit[0]:
                for part in reversed(value if isinstance(value, list) else [value]):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
                    merged |= part if isinstance(part, dict) else {}
            else:
                own[key] = value
        return merged | own
