"""The commands `rate` and `compare`: how good answers are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from biollm.errors import UsageError


def rate(
    answer: Annotated[str, Argument(metavar="ID", help="The answer's id (--json, -v), or last.")],
    rating: Annotated[str, Argument(metavar="up|down", help="Whether it was right.")],
    correction: Annotated[
        Path | None, Option(metavar="FILE", help="A file with what the answer should have been.")
    ] = None,
) -> None:
    """Mark an answer as right or wrong, for `usage --by rating` and `tune export`."""
    from biollm.config.paths import state_dir
    from biollm.ledger.ratings import Ratings

    if rating not in ("up", "down"):
        raise UsageError(f"The rating is {rating!r}; it must be up or down.")
    try:
        text = correction.read_text() if correction else None
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{correction} cannot be read: {error}.") from None
    ident, kept = Ratings(state_dir()).rate(answer, rating, text)
    print(f"{ident}: rated {rating}.")
    if not kept:
        lost = " The correction is not kept either." if text else ""
        print(
            f"Its prompt was not kept, so it cannot be used for fine-tuning: set store_rated in providers.yaml.{lost}"
        )
