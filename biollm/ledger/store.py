"""What all processes of a user remember together: who sent how much, who is cooling, and how attempts ended.

LiteLLM counts per deployment, per process and per clock minute, and has no token budget; here limits belong
to an account, hold in any window, and are exact over processes. `quotas.db` answers "may I send?";
`history.db` keeps what happened: table `attempt`, one column per field of Record, indexed by `at`.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import secrets
import sqlite3
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biollm.ledger import quotas
from biollm.ledger.quotas import Cooldown, next_cooldown
from biollm.ledger.records import Claim, Record, Refused
from biollm.ledger.sqlite import BOUND, Database, Prepare, Writer, on_network, read, reading

if TYPE_CHECKING:
    import asyncio  # half the time of importing this module, and commands that only read need none of it

    from biollm.config import Limit

_log = logging.getLogger("biollm")

_RETRY = 5.0  # seconds until a ledger that failed is asked again
_PRUNE = 60.0  # seconds between removals of what no window can see any more
_QUEUE = 1.0  # seconds that a queue which moves is waited in
_EXIT = 2.0  # seconds that closing waits for a file
_ANSWER = 1000  # tokens of an answer, before one is known


_COLUMNS = ", ".join(f'"{column.name}"' for column in fields(Record))
_HISTORY = f"""
CREATE TABLE IF NOT EXISTS attempt (id INTEGER PRIMARY KEY, {_COLUMNS});
CREATE INDEX IF NOT EXISTS attempt_at ON attempt (at);
"""
_ADD = f"INSERT INTO attempt ({_COLUMNS}) VALUES ({', '.join('?' * len(fields(Record)))})"  # noqa: S608
_PAGE = f"SELECT id, {_COLUMNS} FROM attempt WHERE (at, id) > (?, ?) AND at < ? ORDER BY at, id LIMIT 5000"  # noqa: S608

# What the tables of earlier versions lack.
_ADDED = {
    "attempt": ("estimated",),
    "rollup": ("unpriced", "unpriced_prompt", "unpriced_completion", "estimated"),
}

_LAST = "SELECT deployment, completion_tokens FROM attempt WHERE outcome = 'ok' ORDER BY at DESC LIMIT 1000"
_PAST = (
    "SELECT count(*), total(prompt_tokens + completion_tokens), total(cost_usd) FROM attempt WHERE at >= ? AND at < ?"
    " AND ? IN (provider || '/' || account, provider || '/' || account || ':' || model)"
)

_Write = Callable[[sqlite3.Connection], object]


@dataclass(eq=False)
class _Ask:
    claim: Claim
    id: int
    future: asyncio.Future[int | Refused | None]
    answer: int | Refused | None = None


class _Process:
    """What belongs to one process and must not survive a fork; `memory` stands in for quotas.db."""

    def __init__(self, counts: Writer[_Ask | _Write], history: Writer[Record]) -> None:
        self.quotas, self.history = counts, history
        self.lock = threading.Lock()
        self.memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.memory.executescript(quotas.SCHEMA)
        self.pruned = -math.inf


class Ledger:
    """The ledger in one folder; for any mixture of threads, event loops, processes and forks.

    Nothing is opened before first use. While a file cannot be used, limits hold within this process, up to
    10,000 finished attempts wait in memory, and one warning of the logger "biollm" says so.

    Args:
        directory: Made (0700) if missing. With the setgid bit it is a group's, and files are 0660.
        clock: Seconds since the epoch.
        network: Whether the folder is on a network file system; None to find out.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time, network: bool | None = None) -> None:
        self._directory, self._clock, self._network = directory, clock, network
        self._quotas, self._history = directory / "quotas.db", directory / "history.db"
        # A parent's stays in here after a fork: closing its files in the child would harm the parent.
        self._processes: dict[int, _Process] = {}
        self._blocked: dict[str, Cooldown] = {}
        self._filed: dict[str, Cooldown] = {}  # what the file said of cooldowns when it was last read
        self._wal: Path | None = None
        self._alone_since: float | None = None
        self._pruned = self._served = -math.inf
        self._answers: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=50))
        self._warned = threading.Lock()  # held once the one warning is out
        atexit.register(self.close)

    async def reserve(self, claim: Claim) -> int | Refused:
        """Count one request against every limit of `need`, or say why not and until when.

        Exact over all processes. Limits of tokens and USD are passed by no more than the requests under way use
        beyond what was reserved for them; a request larger than a whole limit is let through when nothing else counts. Answers from this process's own count after 250 ms in which nobody was served.
        A cancelled caller may leave its request counted.
        """
        process = self._process()
        since = self._alone_since
        if since is None or abs(self._clock() - since) >= _RETRY:
            from asyncio import get_running_loop

            loop = get_running_loop()
            ask = _Ask(claim, secrets.randbits(62), loop.create_future())
            process.quotas.put(ask, urgent=True)
            timer = loop.call_later(BOUND, self._give_up, ask.future, began := time.monotonic(), began)
            try:
                answer = await ask.future
            finally:
                timer.cancel()
            if answer is not None:
                return answer
        return self._reserve_alone(process, claim)

    def finish(self, reservation: int | None, scope: str, record: Record) -> None:
        """Hand in a finished attempt: its tokens and cost count at once, and it is on disk 50 ms later."""
        process = self._process()
        if record.outcome == "ok":
            self._answers[record.deployment].append(record.completion_tokens)
        if reservation is not None:
            used = (record.prompt_tokens + record.completion_tokens, record.cost_usd or 0.0)
            done = partial(quotas.finish, scope=scope, reservation=reservation, at=record.at, used=used)
            if self._alone_since is not None:
                with process.lock:
                    done(process.memory)
            process.quotas.put(done)
        process.history.put(record)

    def typical(self, deployment: str) -> int:
        """Return the tokens that nine of ten of a deployment's last answers did not pass; 1,000 before the first."""
        answers = sorted(self._answers.get(deployment, ()))
        return answers[int(0.9 * len(answers))] if answers else _ANSWER

    def release(self, reservation: int, scope: str) -> None:
        """Take back a reservation whose request was not sent."""
        process = self._process()
        undo = partial(quotas.release, scope=scope, reservation=reservation, at=self._clock())
        if self._alone_since is not None:
            with process.lock:
                undo(process.memory)
        process.quotas.put(undo)

    def cool(
        self, key: str, seconds: float | None, reason: str, *, kind: str = "", ladder: Sequence[float] = (0.0,)
    ) -> None:
        """Put `key` on cooldown in every process. Of two cooldowns the longer holds.

        Args:
            key: An account, an endpoint, a deployment or an API key.
            seconds: As the provider said; None takes the step of `ladder` that the failures in a row have reached.
            reason: One sentence.
            kind: The failure's kind; only failures of one kind make a row.
            ladder: Seconds of the first, second, ... cooldown.
        """
        now = self._clock()
        self._blocked[key] = next_cooldown(self._blocked.get(key), now, reason, kind, seconds, ladder)

        def write(db: sqlite3.Connection) -> None:
            self._blocked[key] = self._filed[key] = quotas.cool(db, key, now, reason, kind, seconds, ladder)

        self._process().quotas.put(write)

    def recover(self, keys: Iterable[str]) -> None:
        """End the cooldowns of `keys` whose length was an estimate: something has just been answered there."""
        now = self._clock()
        for key in keys:
            if (found := self._blocked.get(key)) and (found.until <= now or not found.stated):
                self._blocked.pop(key, None)
                known = (key, found.until, now)  # what fails meanwhile rests anew
                self._process().quotas.put(lambda db, known=known: db.execute(quotas.RECOVER, known))

    def failing(self, keys: Iterable[str]) -> bool:
        """Return whether any of `keys` was on cooldown since its last success."""
        return any(key in self._blocked for key in keys)

    def blocked(self) -> Mapping[str, Cooldown]:
        """Return what blocks by this process's last view, by cooldown key or "scope:..."."""
        now = self._clock()
        return {key: block for key, block in self._blocked.copy().items() if block.until > now}

    def refresh(self) -> None:
        """Read who is cooling from the file, and forget limits found full; blocks up to 250 ms.

        The first time, the length of the last answers is read too.
        """
        if not self._answers:
            for deployment, tokens in reversed(self._read(self._history, _LAST, ())):
                self._answers[deployment].append(tokens)
        for key in [key for key in self._blocked.copy() if key.startswith("scope:")]:
            self._blocked.pop(key, None)
        self._adopt(self._read(self._quotas, quotas.COOLDOWNS, (self._clock() - quotas.MEMORY,)))

    def used(self, scope: str, limits: Sequence[Limit]) -> list[tuple[Limit, float, float | None]]:
        """Return (limit, used, resets at): its period's end, or when a window's oldest request leaves."""
        now, query = self._clock(), partial(self._read, self._quotas)
        return [(limit, *quotas.used_of(query, scope, limit, now)) for limit in limits]

    def history(self, since: float | None = None, until: float | None = None) -> Iterator[Record]:
        """Yield the attempts of `since` <= at < `until`, oldest first. No lock is held between them."""
        last, number = -math.inf if since is None else since, -1
        end = math.inf if until is None else until
        while rows := self._read(self._history, _PAGE, (last, number, end), prepare=fill_in):
            for row in rows:
                facts = {"degraded": bool(row[-3]), "estimated": bool(row[-2]), "tags": json.loads(row[-1])}
                yield Record(*row[1:-3], **facts)
            number, last = rows[-1][:2]

    @contextmanager
    def look(self) -> Generator[sqlite3.Connection | None]:
        """Open history.db for several queries that see one state of it; None while nothing is in it."""
        if not self._read(self._history, "SELECT 1 FROM attempt LIMIT 1", ()):
            yield None
            return
        with reading(self._history, _EXIT) as db:
            fill_in(db)
            db.execute("BEGIN")
            yield db

    def change(self, work: Callable[[sqlite3.Connection], None], schema: str) -> None:
        """Run `work` in one transaction on history.db, in which `schema` is made too; raises sqlite3.Error."""
        network = on_network(self._directory) if self._network is None else self._network
        file = Database(
            self._history, _HISTORY + schema, network=network, synchronous="NORMAL", patience=_EXIT, migrate=_migrate
        )
        file.write(work)
        file.close()

    def flush(self) -> None:
        """Wait, at most 2 s, until everything handed in has been written or has failed."""
        if process := self._processes.get(os.getpid()):
            process.quotas.flush(_EXIT)
            process.history.flush(_EXIT)

    def close(self) -> None:
        """Write what waits and close the files, in at most 2 s each; also done at interpreter exit."""
        if process := self._processes.pop(os.getpid(), None):
            process.quotas.close(_EXIT)
            process.history.close(_EXIT)
            with process.lock:
                process.memory.close()

    def _process(self) -> _Process:
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, self._start())

    def _start(self) -> _Process:
        network = on_network(self._directory) if self._network is None else self._network
        self._wal = None if network else Path(f"{self._quotas}-wal")
        open_ = partial(Database, network=network)
        # A rollback journal waits for the disk at every commit. Callers wait for quotas.db, so it does not there,
        # and a power cut may cost it; what it held of days and months is then taken from history.db.
        lazily = "OFF" if network else "NORMAL"
        counts = open_(self._quotas, quotas.SCHEMA, synchronous=lazily, patience=BOUND - 0.05)
        history = open_(self._history, _HISTORY, synchronous="NORMAL", patience=_EXIT, migrate=_migrate)
        return _Process(
            Writer(counts, self._write_quotas, self._settle_quotas),
            Writer(history, _write_history, lambda _, error: self._warn(error)),
        )

    def _write_quotas(self, db: sqlite3.Connection, jobs: Sequence[_Ask | _Write]) -> None:
        now = self._clock()
        if abs(now - self._pruned) > _PRUNE:
            quotas.prune(db, now)
            self._pruned = now
        self._adopt(db.execute(quotas.COOLDOWNS, (now - quotas.MEMORY,)).fetchall())
        for job in jobs:
            self._served = time.monotonic()
            if not isinstance(job, _Ask):
                job(db)
            elif not job.future.done():
                self._recall(db, job.claim, now)
                job.answer = self._decide(db, job.claim, job.id, now)

    def _recall(self, db: sqlite3.Connection, claim: Claim, now: float) -> None:
        """Begin a day or month with what history knows of it: its limit is new, or quotas.db was lost."""
        for period in quotas.periods(claim, now):
            key, past = (claim.scope, *period), [(0, 0, 0)]
            if not db.execute("SELECT 1 FROM total WHERE scope = ? AND start = ? AND until = ?", key).fetchone():
                with suppress(sqlite3.Error):  # others wait: at midnight there is nothing to know anyway
                    past = read(self._history, _PAST, (*period, claim.scope), patience=0.05) or past
                db.execute(quotas.BEGIN, (*key, *past[0]))

    def _settle_quotas(self, jobs: Sequence[_Ask | _Write], error: Exception | None) -> None:
        self._alone_since = self._clock() if error else None
        self._warn(error)
        loops: dict[asyncio.AbstractEventLoop, list[_Ask]] = {}
        for job in jobs:
            if isinstance(job, _Ask):
                job.answer = None if error else job.answer
                loops.setdefault(job.future.get_loop(), []).append(job)
        for loop, asks in loops.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(_resolve, asks)

    def _reserve_alone(self, process: _Process, claim: Claim) -> int | Refused:
        now = self._clock()
        with process.lock:
            if abs(now - process.pruned) > _PRUNE:
                quotas.prune(process.memory, now)
                process.pruned = now
            answer = self._decide(process.memory, claim, secrets.randbits(62), now)
        if isinstance(answer, int):
            process.quotas.put(partial(quotas.grant, claim=claim, reservation=answer, at=now))
        return answer

    def _decide(self, db: sqlite3.Connection, claim: Claim, reservation: int, now: float) -> int | Refused:
        keys = (*claim.cooling, f"scope:{claim.scope}")  # a limit found full stays full until it frees
        found = [(self._blocked[key], key) for key in keys if key in self._blocked]
        refusals = [(block.until, block.reason, key) for block, key in found if block.until > now]
        partly: set[str] = set()  # full for this request, or while others are under way; another may pass
        for limit in claim.limits:
            if full := quotas.full(db, claim, limit, now):
                until, shut = full
                reason = f"{limit} {'used' if shut else 'used or reserved'} by {claim.scope}"
                refusals.append((until, reason, keys[-1]))
                partly |= set() if shut else {reason}
        if not refusals:
            quotas.grant(db, claim, reservation, now)
            return reservation
        until, reason, key = max(refusals)
        if key == f"scope:{claim.scope}" and reason not in partly:
            self._blocked[key] = Cooldown(until, reason, stated=True)
        return Refused(until, f"{reason}, frees in {_span(until - now)}", key)

    def _adopt(self, rows: Sequence[Any]) -> None:
        """Take over what other processes changed in the file; what this one has just written is newer."""
        found = {key: Cooldown(*row) for key, *row in rows}
        for key in self._filed.keys() - found.keys():
            if self._blocked.get(key) == self._filed[key]:
                self._blocked.pop(key, None)
        self._blocked.update({key: each for key, each in found.items() if each != self._filed.get(key)})
        self._filed = found

    def _give_up(self, future: asyncio.Future[int | Refused | None], asked: float, looked: float) -> None:
        if future.done():
            return
        now = time.monotonic()
        stood = now - looked > 1.2 * BOUND  # it is this process that stood still: a blocked loop, a long collection
        if asked > now - _QUEUE and (stood or self._moving()):
            future.get_loop().call_later(BOUND, self._give_up, future, asked, now)
            return
        self._alone_since = self._clock()
        self._warn(TimeoutError(f"no answer within {BOUND * 1000:.0f} ms"))
        future.set_result(None)

    def _moving(self) -> bool:
        """Return whether others are being served: a busy machine, not a fault. Only a local disk may be asked."""
        if time.monotonic() - self._served < BOUND:  # here, in a long batch beside a busy event loop
            return True
        with suppress(OSError):
            return bool(self._wal) and time.time() - self._wal.stat().st_mtime < BOUND
        return False

    def _read(self, path: Path, sql: str, arguments: Sequence[object], prepare: Prepare | None = None) -> list[Any]:
        try:
            return read(path, sql, arguments, prepare=prepare)
        except (sqlite3.Error, OSError) as error:
            self._warn(error)
            return []

    def _warn(self, error: Exception | None) -> None:
        if error and self._warned.acquire(blocking=False):
            _log.warning(
                "The ledger in %s cannot be used (%s): until it can, limits hold within this process, and "
                "records wait in memory. Make the folder writable, or set BIOLLM_STATE_DIR to another.",
                self._directory,
                error,
            )


def fill_in(db: sqlite3.Connection) -> None:
    """Let an earlier version's history.db be read as if it had every column; nothing is written."""
    for table, lacking in _lacking(db):
        nothing = ", ".join(f"0 AS {column}" for column in lacking)
        db.execute(f"CREATE TEMP VIEW {table} AS SELECT *, {nothing} FROM main.{table}")  # noqa: S608


def _migrate(db: sqlite3.Connection) -> None:
    """Give an earlier version's history.db the columns that it lacks."""
    for table, lacking in _lacking(db):
        for column in lacking:
            db.execute(f"ALTER TABLE main.{table} ADD COLUMN {column} DEFAULT 0")
        if table == "rollup":  # it took an unknown price for 0; what has not been pruned is summed up again
            db.execute("DELETE FROM rollup WHERE (SELECT pruned FROM rolled) = 0")
            db.execute("UPDATE rolled SET last = 0 WHERE pruned = 0")


def _lacking(db: sqlite3.Connection) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for table, columns in _ADDED.items():
        known = {row[1] for row in db.execute(f"PRAGMA main.table_info({table})")}
        if known and (lacking := [column for column in columns if column not in known]):
            found.append((table, lacking))
    return found


def _resolve(asks: Sequence[_Ask]) -> None:
    for ask in asks:
        if not ask.future.done():
            ask.future.set_result(ask.answer)


def _write_history(db: sqlite3.Connection, records: Sequence[Record]) -> None:
    rows = [[getattr(record, column.name) for column in fields(Record)] for record in records]
    db.executemany(_ADD, [[*row[:-1], json.dumps(dict(row[-1]))] for row in rows])


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{math.ceil(seconds)} s"
