"""Condenses a text to what fits a context: the end, the beginning, and the lines around errors."""

from __future__ import annotations

from pathlib import Path

from biollm.inputs.digest import Digest, Excerpt, scan
from biollm.inputs.read import read_input

__all__ = ["Digest", "Excerpt", "condense", "scan"]

DEFAULT_TOKENS = 8_000


def condense(source: str | bytes | Path, tokens: int = DEFAULT_TOKENS) -> str:
    """Return `source`, a text or the path of a file or Nextflow work folder, condensed to about `tokens`.

    What fits stays as it is, but for escape sequences and carriage returns. No model is asked.

    Raises:
        UsageError: The path cannot be read, or is not text.
    """
    if isinstance(source, Path):
        return read_input(source).digest.cut(tokens).text
    data = source.encode(errors="replace") if isinstance(source, str) else source
    return scan([data], "text").cut(tokens).text
