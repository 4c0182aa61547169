"""The commands `cache show` and `cache clear`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from typer import Option

from biollm.cli import output
from biollm.cli.output import Json
from biollm.errors import UsageError
from biollm.types import counted, iso, span


def show(
    limit: Annotated[int, Option("-n", "--limit", min=0, metavar="N", help="How many of the newest to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Show the size and limits of the cache, and the newest answers."""
    import time

    from biollm.client.cache import Cache
    from biollm.config import load_config

    limits, cache = load_config().cache, Cache()
    with _reported(cache.path):
        count, size, newest = cache.contents(time.time() - limits.ttl, limit)
    for each in newest:
        each["made_at"] = iso(each["made_at"])
    if as_json:
        facts = {"file": str(cache.path), "bytes": size, "max_mb": limits.max_mb, "ttl_s": limits.ttl}
        output.as_json({**facts, "answers": count, "newest": newest})
        return
    path = output.short_path(str(cache.path))
    print(
        f"{counted(count, 'answer')} of the last {span(limits.ttl)}, {size / 1e6:.1f} of {limits.max_mb:g} MB: {path}"
    )
    if newest:
        print()
        rows = [(each["made_at"][:16].replace("T", " "), each["deployment"], each["about"]) for each in newest]
        output.table(("made (UTC)", "deployment", "for"), rows)


def clear() -> None:
    """Delete every stored answer."""
    from biollm.client.cache import Cache

    cache = Cache()
    with _reported(cache.path):
        count = cache.clear()
    print(f"{counted(count, 'answer')} deleted.")


@contextmanager
def _reported(path: Path) -> Generator[None]:
    import sqlite3  # here: no other command needs it to start

    try:
        yield
    except sqlite3.Error as error:
        raise UsageError(
            f"{path} cannot be used: {error}.", hint="Try again, or delete it while nothing runs."
        ) from None
