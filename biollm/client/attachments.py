"""Reads what a call has attached: files, Nextflow work folders, texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biollm.errors import UsageError
from biollm.routing.normalize import text

if TYPE_CHECKING:
    from biollm.inputs.digest import Digest
    from biollm.inputs.read import Input

    Attachment = Path | str | Mapping[str, str] | Input | Digest


def read(given: Sequence[Attachment]) -> list[Digest]:
    """Return the attachments as digests; empty ones are left out.

    Raises:
        UsageError: One is no attachment, or cannot be read.
    """
    from biollm.inputs.digest import Digest
    from biollm.inputs.read import Input

    found: list[Digest] = []
    for at, each in enumerate(given):
        if isinstance(each, Digest):
            found.append(each)
        elif not (each := each if isinstance(each, Input) else _read(each, f"attachments[{at}]")).empty:
            found.append(each.digest)
    return found


def _read(given: Any, where: str) -> Input:
    from biollm.inputs.digest import scan
    from biollm.inputs.read import Input, read_input

    if isinstance(given, Path):
        return read_input(given)
    name: Any = "text"
    words: Any = given
    if isinstance(given, Mapping):
        name, words = (cast("Mapping[str, Any]", given).get(each) for each in ("name", "text"))
    if not (isinstance(name, str) and isinstance(words, str)):
        needs, kind = 'a Path, a text, or {"name": ..., "text": ...}', type(cast("object", given)).__name__
        raise UsageError(f"{where} is a {kind}; it must be {needs}.")
    if given is words and len(words) < 256 and "\n" not in words and Path(words).is_file():
        raise UsageError(
            f"{where} is the text {words!r}, which is also a file.", hint=f"Pass Path({words!r}) to read it."
        )
    return Input(name, scan([text(words).encode()], name), empty=not words.strip())
