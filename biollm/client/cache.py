"""Stores answers for requests that come again, and sends one of several identical requests; for calls that ask for it.

LiteLLM's cache pickles, and holds back no request of another process. Here the processes on all hosts that share the
state folder wait for the one that sends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from biollm._files import file_time
from biollm._runtime import apart, background, called
from biollm.client.cache_key import key_of
from biollm.config.paths import own_dir, state_dir
from biollm.config.schema import Cache as Limits
from biollm.ledger import Record
from biollm.ledger.sqlite import BOUND, Database, databases, on_network, read
from biollm.routing.answers import content, content_text, tool_calls
from biollm.routing.request import Request
from biollm.types import Completion, Fields, Json, Usage, known, seconds_of

Work = Callable[[sqlite3.Connection, float], Any]
_log = logging.getLogger("biollm")

LEASE, RENEW = 8.0, 2.0  # seconds for which a silent leader still leads, and between two signs of life
_LOOK, _SLOWEST = 0.05, 1.0  # seconds between two looks of a waiter, at first and at most
_TRIES = 3  # leaders that may fail before each waiter sends its own request
_WAIT, _RETRY = 1.0, 5.0  # seconds that a request waits for the file, and until one that failed is used again
_SHOWN = 100  # characters of a line of what an answer was made for
SCHEMA = """
CREATE TABLE IF NOT EXISTS answer (key TEXT PRIMARY KEY, at REAL, body TEXT);
CREATE INDEX IF NOT EXISTS answer_at ON answer (at);
CREATE TABLE IF NOT EXISTS flight (key TEXT PRIMARY KEY, leader TEXT, until REAL, failures INTEGER);
"""
_STATE = """SELECT (SELECT body FROM answer WHERE key = ?1 AND at >= ?2), leader, until, failures
FROM (SELECT 1) LEFT JOIN flight ON key = ?1"""
_USED = (
    "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
)
_NEWEST = """SELECT at, json_extract(body, '$.answer.deployment'), json_extract(body, '$.about') FROM answer
WHERE at >= ? ORDER BY at DESC LIMIT ?"""
_OLDEST = "DELETE FROM answer WHERE key = (SELECT key FROM answer ORDER BY at LIMIT 1)"


def may_keep(answer: Completion) -> bool:
    """Return whether each choice ended by itself and calls no tool, and no seam of a broken stream is in the text."""
    choices: list[Json] = answer.raw["choices"]
    whole = all(each.get("finish_reason") == "stop" and not tool_calls(each) for each in choices)
    return whole and not answer.degraded and answer.text == content(choices[0])


def about(request: Request) -> str:
    """Return what a request is about: the first lines of the question and of each attachment."""
    asked = next((each.get("content") for each in reversed(request.messages) if each["role"] == "user"), None)
    texts = [content_text(asked or ""), *(f"{each.name}: {each.head.strip()}" for each in request.attachments)]
    lines = [text.strip().partition("\n")[0] for text in texts]
    return "; ".join(line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…" for line in lines if line)


def of_process() -> Cache:
    """Return this process's cache."""
    return background().once(("cache", state_dir()), Cache)


class Cache:
    """The answers in one folder, by default the state folder of this user alone.

    Where its file cannot be used, requests are sent as without it, and one warning is issued.
    """

    def __init__(self, folder: Path | None = None, *, network: bool | None = None) -> None:
        folder = databases(folder or own_dir(state_dir()))
        self.path, network = folder / "cache.db", on_network(folder) if network is None else network
        synchronous = "OFF" if network else "NORMAL"  # what a power failure costs is asked for again
        self._file = Database(self.path, SCHEMA, network, synchronous, patience=BOUND, shrinks=True)
        self._lock, self._failed_at, self._warned = threading.Lock(), -_RETRY, False

    async def join(self, request: Request, identity: Callable[[], str], limits: Limits) -> Flight:
        """Return the stored answer, or else the right to send: once no identical request is under way.

        Args:
            request: What is asked.
            identity: Returns what else an answer depends on; called in a thread.
            limits: Of the cache.
        """
        flight, found = await apart(self._begin, request, identity, limits)
        try:
            return await self._wait(flight, request, found)
        except BaseException:  # the caller leaves, or its deadline has passed
            await flight.leave()
            raise

    async def _wait(self, flight: Flight, request: Request, found: Sequence[Any]) -> Flight:
        pause, lease, changed = 0.0, None, 0.0
        while True:
            body, *now = found
            if now != lease:
                lease, changed = now, time.monotonic()
            if not body and not (pause and now[0] and time.monotonic() < changed + LEASE):
                body, waits = await self.write(partial(_join, flight)) or (None, False)
                if not (body or waits):
                    return flight
            if body:
                flight.take(body)
                return flight
            if not pause and request.on_note:
                called(request.on_note, "waiting for the answer to the same request, which is under way")
            pause = min(1.5 * pause or _LOOK, _SLOWEST)
            await asyncio.sleep(pause)
            found = await apart(self._look, flight)

    def _begin(self, request: Request, identity: Callable[[], str], limits: Limits) -> tuple[Flight, Sequence[Any]]:
        flight = Flight(self, request, identity(), limits)
        return flight, self._look(flight)

    def _look(self, flight: Flight) -> Sequence[Any]:
        """Return the stored answer, and the leader and its lease; each may be None."""
        with suppress(sqlite3.Error, OSError):  # writing repairs the file, or reports it
            for row in read(self.path, _STATE, (flight.key, time.time() - flight.ttl)):
                return row
        return None, None

    async def write(self, work: Work) -> Any:
        """Return what `work` does in a transaction, given the file server's time; None where the file cannot be used."""
        if time.monotonic() < self._failed_at + _RETRY:
            return None
        try:
            async with asyncio.timeout(_WAIT):
                return await apart(self._transact, work)
        except (sqlite3.Error, OSError) as error:  # a TimeoutError is an OSError
            self._failed_at = time.monotonic()
            if not self._warned:
                self._warned = True
                text = "The cache %s cannot be used (%s): requests are sent as without it. Make its folder writable."
                _log.warning(text, self.path, str(error) or "it is locked")
        return None

    def contents(self, since: float, limit: int) -> tuple[int, int, list[Json]]:
        """Return the number of answers since then, the bytes of the file, and the newest answers; raises sqlite3.Error."""
        (count,) = (read(self.path, "SELECT count(*) FROM answer WHERE at >= ?", (since,)) or [(0,)])[0]
        names = ("made_at", "deployment", "about")
        rows: list[Json] = [dict(zip(names, row, strict=True)) for row in read(self.path, _NEWEST, (since, limit))]
        return count, self.path.stat().st_size if self.path.exists() else 0, rows

    def clear(self) -> int:
        """Delete every answer and return their number; raises sqlite3.Error."""
        if not self.path.exists():
            return 0
        count: int = self._transact(lambda db, _: db.execute("DELETE FROM answer").rowcount)
        self._file.close()
        return count

    def _transact(self, work: Work) -> Any:
        found: list[Any] = []
        with self._lock:
            self._file.write(lambda db: found.append(work(db, file_time(self.path.parent))))
        return found[-1]


class Flight:
    """One request beside those identical to it: it takes the stored `answer`, or sends, for all of them where it `leads`."""

    def __init__(self, cache: Cache, request: Request, configuration: str, limits: Limits) -> None:
        self._cache, self._request, self._limits, self.id = cache, request, limits, token_hex(8)
        self.key = key_of(request, configuration, request.cache_key)
        self._exact = key_of(request, configuration, None) if request.cache_key else self.key
        wanted = seconds_of(request.cache) if isinstance(request.cache, str) else None
        self.ttl = limits.ttl if wanted is None else min(wanted, limits.ttl)
        self.answer: Completion | None = None
        self.saved_usd: float | None = None
        self.leads = self.left = self._kept = False
        self._failures = 0

    def take(self, body: str) -> None:
        """Take a stored answer, unless it is not readable or does not match the request's response model."""
        request = self._request
        try:
            stored = json.loads(body)
            facts: Json = stored["answer"]
            if stored["exact"] != self._exact:
                at = time.strftime("%Y-%m-%d %H:%M", time.gmtime(stored["at"]))
                facts["notes"].append(f"This answer was made at {at} UTC for a similar request: {stored['about']}")
            ours = {
                "usage": known(Usage, facts["usage"]), "raw": Fields(facts["raw"]), "notes": tuple(facts["notes"]),
                "parsed": request.schema and request.schema.parse(facts["text"]), "cost_usd": 0.0, "cached": True,
                "attempts": (), "tool_calls": (), "latency_ms": (time.monotonic() - request.asked) * 1000,
            }  # fmt: skip
            self.answer, self.saved_usd = known(Completion, facts | ours), facts["cost_usd"]
        except (ValueError, KeyError, TypeError):
            pass

    def record(self) -> Record:
        """Return the record of a stored answer that was taken: its tokens and cost are what was saved."""
        given, request = self.answer, self._request
        assert given  # noqa: S101
        return Record(
            time.time(), token_hex(16), given.deployment, given.provider, given.account, given.model, "cached",
            ms=given.latency_ms, prompt_tokens=given.usage.prompt_tokens, cost_usd=self.saved_usd,
            completion_tokens=given.usage.completion_tokens, estimated=given.usage.estimated, tags=request.tags,
        )  # fmt: skip

    async def keep(self, answer: Completion) -> None:
        """Store an answer, if it is whole."""
        self._kept, self._failures = may_keep(answer), _TRIES  # for others, one that is not kept is none
        if self._kept:
            facts = {**asdict(replace(answer, parsed=None, raw=None, attempts=())), "raw": answer.raw}
            body = {"answer": facts, "about": about(self._request), "exact": self._exact, "at": time.time()}
            await self._cache.write(partial(_keep, self, json.dumps(body), self._limits.ttl, self._limits.max_mb * 1e6))

    async def leave(self) -> None:
        """Let another lead, also where a thread is just about to make this one the leader."""
        self.left = True
        if self.leads:
            await self._cache.write(partial(_lead, self, "", 0))

    async def __aenter__(self) -> Flight:
        self._renewing = asyncio.ensure_future(self._renew())
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._renewing.cancel()
        if self.leads and not self._kept:
            await self._cache.write(partial(_lead, self, "", self._failures or isinstance(error, Exception)))

    async def _renew(self) -> None:
        while self.leads:
            await asyncio.sleep(RENEW)
            await self._cache.write(partial(_lead, self, self.id, 0))


def _join(flight: Flight, db: sqlite3.Connection, now: float) -> tuple[str | None, bool]:
    """Return the answer, and whether to wait for one; with neither, the request is to be sent."""
    body, leader, until, failures = db.execute(_STATE, (flight.key, now - flight.ttl)).fetchone()
    under_way = (until or 0) > now
    if not body and not (under_way and (leader or failures >= _TRIES)):
        flight.leads = True
        if not flight.left:  # looked at after `leads` is set, as `leave` does the other way round
            row = (flight.key, flight.id, now + LEASE, failures if under_way else 0)
            db.execute("INSERT OR REPLACE INTO flight VALUES (?, ?, ?, ?)", row)
    return body, under_way and bool(leader)


def _lead(flight: Flight, leader: str, failures: int, db: sqlite3.Connection, now: float) -> None:
    """Extend the lease, or leave it to the next one, where the leader is ""."""
    change = "UPDATE flight SET leader = ?, until = ?, failures = failures + ? WHERE key = ? AND leader = ?"
    db.execute(change, (leader, now + LEASE, failures, flight.key, flight.id))


def _keep(flight: Flight, body: str, ttl: float, size: float, db: sqlite3.Connection, now: float) -> None:
    db.execute("INSERT OR REPLACE INTO answer VALUES (?, ?, ?)", (flight.key, now, body))
    db.execute("DELETE FROM flight WHERE (key = ? AND leader = ?) OR until < ?", (flight.key, flight.id, now - LEASE))
    db.execute("DELETE FROM answer WHERE at < ?", (now - ttl,))
    while db.execute(_USED).fetchone()[0] > size and db.execute(_OLDEST).rowcount:
        pass
