"""Reads a YAML file into strings, lists and mappings, and keeps the line of each key.

PyYAML's loaders lose the lines, accept duplicate keys, and read `no`, `010` and `8:00:00` by the rules of YAML 1.1.
Here every scalar stays a string (or None, for null); the schema decides what it means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from biollm.errors import Problem

KeyPath = tuple[str | int, ...]
_MAX_DEPTH = 30
_NULLS = {"", "~", "null", "Null", "NULL"}
_PLAIN_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_TOO_DEEP = "is nested too deeply."
_HINTS = {
    "mapping values are not allowed": "A string that contains `: ` needs quotes.",
    "could not find expected ':'": "Is a colon missing in the line above?",
    "did not find expected key": "Is it indented like its neighbours, and is every bracket and quote closed?",
    "another document": "A file holds one document: remove the `---`.",
    "undefined alias": "Define the anchor (&name) above the line that uses it (*name).",
}


class _InvalidError(Exception):
    """Carries line, message and hint; never leaves this module."""


@dataclass
class Document:
    """A file: its content as strings (None for null), the line of each key, from 1, and what was found in it."""

    file: str
    value: dict[str, Any] = field(default_factory=dict[str, Any])
    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])
    problems: list[Problem] = field(default_factory=list[Problem])
    warnings: list[Problem] = field(default_factory=list[Problem])

    def line(self, path: KeyPath) -> int:
        """Return the line of `path`, or of the nearest key above it: keys from an alias or `<<` have none."""
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 0)

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """Return a problem at the line of `path`."""
        return Problem(self.file, self.line(path), dotted(path), message, hint)


def dotted(path: KeyPath) -> str:
    """Return a key path as people write it: `providers.gemini.models[1]`."""
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in path))


def read(path: Path) -> Document:
    """Read one YAML file. Its errors are in `problems`; nothing is raised."""
    document, invalid = Document(str(path)), None
    try:
        root = _compose(path.read_bytes().decode("utf-8-sig"))
        document.value = _Builder(document).value(root, ())
        if not isinstance(document.value, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _InvalidError(1, "must be a mapping (such as `providers:`), not a list or a string.")  # noqa: TRY301
    except OSError as error:
        invalid = 0, f"cannot be read: {error.strerror}."
    except UnicodeDecodeError as error:
        invalid = error.object[: error.start].count(b"\n") + 1, "is not UTF-8.", "Save the file as UTF-8."
    except _InvalidError as error:
        invalid = error.args
    if invalid:
        document.value = {}
        document.problems.append(Problem(document.file, invalid[0], "", *invalid[1:]))
    return document


def _compose(text: str) -> yaml.Node:
    try:
        root = cast("Any", yaml).compose(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except RecursionError:  # in the loader that is written in Python
        raise _InvalidError(1, _TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        mark, message = error.problem_mark or error.context_mark, error.problem or str(error.context)
        line = mark.line + 1 if mark else 0
        hint = next((hint for part, hint in _HINTS.items() if part in message), None)
        if "\t" in "".join(text.splitlines()[line - 1 : line]):
            hint = "Tabs are not allowed: YAML is indented with spaces."
        message = _TOO_DEEP if "nesting depth" in message else f"is not valid YAML: {message}."
        raise _InvalidError(line, message, hint) from None
    except yaml.reader.ReaderError as error:
        line = text.encode()[: error.position].count(b"\n") + 1
        raise _InvalidError(line, f"contains a character that YAML does not allow: {error.reason}.") from None
    if root is None:
        raise _InvalidError(1, "is empty.", "Delete it, or write `providers:` or `models:` in it.")
    return root


class _Builder:
    """Turns nodes into values. A node that several aliases name becomes one value."""

    def __init__(self, document: Document) -> None:
        self.document, self.built = document, dict[yaml.Node, Any]()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        if node in self.built:
            if self.built[node] is node:
                raise _InvalidError(line, "contains an alias of itself.")
            return self.built[node]
        if node.tag not in _PLAIN_TAGS:
            raise _InvalidError(line, f"uses the tag {node.tag}, which has no meaning here.", "Remove it.")
        if len(path) > _MAX_DEPTH:
            raise _InvalidError(line, _TOO_DEEP)
        self.document.lines.setdefault(path, line)
        self.built[node] = node  # until it is finished
        if isinstance(node, yaml.MappingNode):
            self.built[node] = self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            self.built[node] = [self.value(item, (*path, place)) for place, item in enumerate(node.value)]
        else:
            self.built[node] = None if _is_plain(node) and node.value in _NULLS else node.value
        return self.built[node]

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, part in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _InvalidError(key.start_mark.line + 1, "has a list or a mapping as a key.")
            here = (*path, key.value)
            first, self.document.lines[here] = self.document.lines.get(here), key.start_mark.line + 1
            if key.value in own:
                twice = f"duplicate key (first defined on line {first})."
                self.document.problems.append(self.document.problem(here, twice))
            value = self.value(part, here)
            if key.value == "<<" and _is_plain(key):
                for each in reversed(cast("list[Any]", value) if isinstance(value, list) else [value]):
                    merged |= each if isinstance(each, dict) else {}
            else:
                own[key.value] = value
        return merged | own


def _is_plain(scalar: Any) -> bool:
    return not scalar.style  # no quotes, no | or >
