"""Reads the JSON and the server-sent events that providers send."""

from __future__ import annotations

import json
import re

from biollm.types import Json

# Half of a surrogate pair, as in a text that was cut between the two: what writes it as UTF-8 fails.
_LONE = re.compile(rb"\\\\|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(\\u[dD][89a-fA-F]\w\w)")
_CARRIES = re.compile(rb'"(choices|candidates|delta|content|text)"')


def without_lone_surrogates(data: bytes) -> bytes:
    """Replace escapes of half a surrogate pair by U+FFFD."""
    return _LONE.sub(lambda found: rb"\ufffd" if found[1] else found[0], data) if b"\\u" in data else data


def loads(data: bytes) -> Json:
    """Return the JSON object of a body.

    Raises:
        ValueError: It is none.
    """
    found = json.loads(without_lone_surrogates(data))
    if not isinstance(found, dict):
        raise json.JSONDecodeError("not an object", "", 0)
    return found  # pyright: ignore[reportUnknownVariableType]


def event(line: bytes) -> Json | None:
    """Return the JSON of a stream's line `data: {...}`; None for noise that is no JSON and carries no text.

    Raises:
        ValueError: It is no JSON, and did carry some.
    """
    try:
        return loads(line[5:])
    except ValueError:
        if _CARRIES.search(line):
            raise
        return None
