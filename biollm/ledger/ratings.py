"""Ratings of answers, and the rated prompts and answers themselves where `store_rated` keeps them.

history.db has neither prompts nor answers, and its attempts may be pruned; so this is a file of its own, ratings.db.
A prompt that is not rated is deleted after the configured time.
"""

from __future__ import annotations

import atexit
import json
import logging
import sqlite3
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from biollm.errors import UsageError
from biollm.ledger.sqlite import Database, databases, on_network, read
from biollm.ledger.writer import Writer, file_writer

Rating = Literal["up", "down"]
FILE = "ratings.db"
_log = logging.getLogger("biollm")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rating (request TEXT PRIMARY KEY, at REAL, rating TEXT, correction TEXT);
CREATE TABLE IF NOT EXISTS kept (request TEXT PRIMARY KEY, at REAL, messages TEXT, answer TEXT, model TEXT, tags TEXT,
    local_only INTEGER, until REAL);
CREATE INDEX IF NOT EXISTS kept_until ON kept (until);
CREATE TABLE IF NOT EXISTS shown (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL, request TEXT);
"""
_KEEP = "INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_SHOW = "INSERT OR REPLACE INTO shown VALUES (1, ?, ?)"
_REPLACE = "UPDATE kept SET answer = ? WHERE request = ?"
_RATE = """INSERT INTO rating VALUES (?, ?, ?, ?) ON CONFLICT (request) DO UPDATE SET at = excluded.at,
rating = excluded.rating, correction = coalesce(excluded.correction, iif(excluded.rating = 'down', correction, NULL))"""
_EXPIRE = "DELETE FROM kept WHERE until < ? AND request NOT IN (SELECT request FROM rating)"
_RATED = (
    "SELECT request, kept.at, messages, answer, rating, correction, model, tags, local_only FROM rating JOIN kept"
    " USING (request) ORDER BY kept.at"
)
_FIND = "SELECT request, at FROM attempt WHERE outcome = 'ok' AND substr(request, 1, ?) = ? ORDER BY at DESC LIMIT 2"
_NEWEST = """SELECT at, request FROM attempt WHERE outcome = 'ok' AND tags NOT LIKE '%"compare": %'
AND tags NOT LIKE '%"ensemble": %' ORDER BY at DESC LIMIT 1"""
_SHOWN = "SELECT at, request FROM shown"
_CORRECTED = "SELECT 1 FROM rating WHERE request = ? AND correction IS NOT NULL"
_WAIT = 2.0  # seconds for a file that others write to
_LEAST = 6  # letters of an id that may stand for it


@dataclass(frozen=True)
class RatedAnswer:
    """A rated answer with its prompt.

    Attributes:
        id: Of the request.
        at: When it was asked, in seconds since the epoch.
        messages: OpenAI-shaped, with the excerpts of attachments as they were sent.
        correction: What the answer should have been.
        local_only: Whether the request's data policy was that.
    """

    id: str
    at: float
    messages: list[dict[str, Any]]
    answer: str
    rating: Rating
    correction: str | None
    model: str
    tags: Mapping[str, str]
    local_only: bool


def marks(directory: Path, since: float, until: float) -> dict[str, Rating]:
    """Return request id -> rating of the answers of `since` <= at < `until`, from the folder of the databases."""
    query = "SELECT request, rating FROM rating WHERE at >= ? AND at < ?"
    with _usable(directory):
        return dict(read(directory / FILE, query, (since, until), patience=_WAIT))


@contextmanager
def _usable(directory: Path) -> Generator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        hint = "Make the folder writable, or set BIOLLM_STATE_DIR to another."
        raise UsageError(f"The ratings in {directory} cannot be used: {error}.", hint=hint) from None


class Ratings:
    """The ratings of one state folder. Files are 0600."""

    def __init__(self, directory: Path) -> None:
        directory = databases(directory)
        self._path, self._history = directory / FILE, directory / "history.db"
        self._writer: Writer[tuple[str, tuple[Any, ...]]] = file_writer(self._database(), _write, self._warn)
        self._warned = False
        atexit.register(self.close)
        if self._path.exists():
            # What has expired is deleted, also once nothing is kept any more.
            self._writer.put((_EXPIRE, (time.time(),)))

    def keep(
        self,
        request: str,
        at: float,
        messages: Sequence[Mapping[str, Any]],
        answer: str,
        *,
        model: str,
        tags: Mapping[str, str],
        local_only: bool,
        seconds: float,
    ) -> None:
        """Keep a prompt and its answer for so many seconds, or for good once it is rated."""
        texts = (json.dumps(messages, ensure_ascii=False), answer, model, json.dumps(dict(tags)))
        self._writer.put((_KEEP, (request, at, *texts, int(local_only), at + seconds)))

    def show(self, request: str, answer: str | None = None) -> None:
        """Make an earlier answer the last one; `answer` replaces its text where that is kept."""
        self._writer.put((_SHOW, (time.time(), request)))
        if answer is not None:
            self._writer.put((_REPLACE, (answer, request)))

    def close(self) -> None:
        """Write what waits, in at most 2 s; also done at interpreter exit."""
        self._writer.flush(_WAIT)

    def rate(self, request: str, rating: Rating, correction: str | None = None) -> tuple[str, bool, bool]:
        """Mark an answer; return its full id, and whether its prompt is kept, and whether a correction was removed.

        A correction needs a prompt that is kept.

        Args:
            request: The request's id, its first 6 letters or more, or "last".
            rating: "up" or "down"; it replaces an earlier one.
            correction: What the answer should have been; without it, "down" keeps the earlier one, and "up" removes it.

        Raises:
            UsageError: There is no such answer in the history, or several; or the files cannot be used.
        """
        self.close()
        with _usable(self._path.parent):
            ident, at = self._find(request)
            kept = bool(read(self._path, "SELECT 1 FROM kept WHERE request = ?", (ident,), patience=_WAIT))
            corrected = read(self._path, _CORRECTED, (ident,), patience=_WAIT)
            row = (ident, at, rating, correction if kept else None)
            file = self._database()
            file.write(lambda db: db.execute(_RATE, row) and None)
            file.close()
        return ident, kept, rating == "up" and bool(corrected) and not correction

    def rated(self) -> Iterator[RatedAnswer]:
        """Yield the rated answers whose prompts were kept, oldest first."""
        with _usable(self._path.parent):
            rows = read(self._path, _RATED, patience=_WAIT)
        for ident, at, messages, answer, rating, correction, model, tags, local in rows:
            yield RatedAnswer(
                ident, at, json.loads(messages), answer, rating, correction, model, json.loads(tags), bool(local)
            )

    def _find(self, request: str) -> tuple[str, float]:
        if request == "last":
            newest = [*read(self._history, _NEWEST, patience=_WAIT), *read(self._path, _SHOWN, patience=_WAIT)]
            if not newest:
                raise UsageError("There is no answer yet.", hint="Get one first: biollm complete PROMPT.")
            _, request = max(newest)
        if len(request) < _LEAST:
            raise UsageError(f"{request!r} is too short for an id.", hint=f"Give {_LEAST} letters of it, or `last`.")
        found: list[tuple[str, float]] = read(self._history, _FIND, (len(request), request), patience=_WAIT)
        if len({ident for ident, _ in found}) == 1:
            return found[0]
        hint = "The id of an answer is in --json, and under it with -v; `last` is the newest."
        raise UsageError(f"{'Several answers have' if found else 'No answer has'} the id {request}.", hint=hint)

    def _warn(self, _: object, error: Exception | None) -> None:
        if error and not self._warned:
            self._warned = True
            _log.warning("%s cannot be written (%s): prompts are not kept for rating.", self._path, error)

    def _database(self) -> Database:
        return Database(self._path, _SCHEMA, on_network(self._path.parent), "NORMAL", patience=_WAIT)


def _write(db: sqlite3.Connection, jobs: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
    for sql, values in jobs:
        db.execute(sql, values)
    db.execute(_EXPIRE, (time.time(),))
