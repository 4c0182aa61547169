"""Gives reasoning and signatures back to the model that they came from, and to no other.

Agents send back what earlier answers held besides text. The model that gave it answers better with it, or refuses to go
on without; another one refuses it or is misled. LiteLLM sends it to whichever deployment is next.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from biollm._files import locked, write_private
from biollm._runtime import apart
from biollm.config.paths import own_dir
from biollm.ledger import Ledger
from biollm.routing.structured import Message
from biollm.types import Json

_FIELDS = ("reasoning_content", "extra_content")


class Origins:
    """Which model gave what: a keyed digest of it, in the ledger for a day. Made in a thread: it reads the key."""

    def __init__(self, ledger: Ledger, state: Path) -> None:
        self._ledger, self._key = ledger, _key(own_dir(state) / "origins.key")

    def note(self, model: str, message: Json) -> None:
        """Remember that `model` gave what an answer's message holds."""
        if given := [self._digest(holder[name]) for holder, name in _parts({**message, "role": "assistant"})]:
            self._ledger.note_origins(given, model)

    async def returned(self, messages: Sequence[Message], model: str) -> Sequence[Message]:
        """Return the messages as `model` may see them; the same object where they hold nothing of the kind."""
        if not any(_parts(message) for message in messages):
            return messages
        given = [self._digest(holder[name]) for message in messages for holder, name in _parts(message)]
        known = await apart(self._ledger.origins, given)
        return [_kept(message, lambda value: known.get(self._digest(value)) == model) for message in messages]

    def _digest(self, value: Any) -> str:
        text = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)
        return blake2b(text.encode(), key=self._key, digest_size=16).hexdigest()


def _parts(message: Message) -> list[tuple[Json, str]]:
    """Return each field of an answer, or of one of its tool calls, that belongs to its model, with its holder."""
    if message.get("role") != "assistant":
        return []
    return [(holder, name) for holder in (message, *_calls(message)) for name in _FIELDS if holder.get(name)]


def _calls(message: Message) -> Iterable[Json]:
    """Return the tool calls of a message, which a caller may have written in any way."""
    calls = cast("list[Any]", found) if isinstance(found := message.get("tool_calls"), list) else []
    return [cast("Json", call) for call in calls if isinstance(call, dict)]


def _kept(message: Message, is_own: Callable[[Any], bool]) -> Message:
    """Return the message without the fields of another model."""
    foreign = [(id(holder), name) for holder, name in _parts(message) if not is_own(holder[name])]
    if not foreign:
        return message

    def without(holder: Json) -> Json:
        return {name: value for name, value in holder.items() if (id(holder), name) not in foreign}

    calls = {"tool_calls": [without(call) for call in _calls(message)]} if message.get("tool_calls") else {}
    return without(message) | calls


def _key(file: Path) -> bytes:
    """Return this user's key for the digests; one of this process alone where there can be no file."""
    try:
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                write_private(file, secrets.token_hex(32))
            return bytes.fromhex(file.read_text()) or secrets.token_bytes(32)
    except (OSError, ValueError):
        return secrets.token_bytes(32)
