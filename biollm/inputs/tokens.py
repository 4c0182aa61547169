"""Estimates the tokens of a text: logs hold about 2.2 bytes per token, prose 4 to 5."""

from __future__ import annotations


def estimate(text: str | bytes) -> int:
    """Return about how many tokens `text` is; more likely too many than too few."""
    data = text.encode(errors="replace") if isinstance(text, str) else text
    return -(-len(data) * 10 // 22)
