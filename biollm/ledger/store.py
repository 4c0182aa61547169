"""The ledger: what all processes of a user share about limits, cooldowns and finished attempts.

LiteLLM counts per deployment, per process and per clock minute, and has no token budget; here limits belong to an
account, hold in any window, and are exact over processes. `quotas.db` decides whether a request may be sent;
`history.db` keeps what happened.
"""

from __future__ import annotations

import atexit
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from biollm.ledger import attempts, quotas
from biollm.ledger.quota_store import OPERATIONS, PRUNE, Job, QuotaStore, SqliteStore, history_of
from biollm.ledger.quotas import Block, Cooldown, next_cooldown
from biollm.ledger.records import Claim, Record, Refused
from biollm.ledger.sqlite import BOUND, Database, Prepare, databases, is_damage, on_network, read, reading
from biollm.ledger.writer import Writer, file_writer
from biollm.types import span

if TYPE_CHECKING:
    import asyncio  # half the time of importing this module, and commands that only read need none of it

    from biollm.config import Limit
    from biollm.config.schema import LedgerServer

_log = logging.getLogger("biollm")
T = TypeVar("T")

_RETRY = 5.0  # seconds until a ledger that failed is used again
_QUEUE = 1.0  # seconds that a caller waits in a queue that moves
_EXIT = 2.0  # seconds that closing waits for a file
_MOST_ORIGINS = 10_000  # in memory
_ANSWER = 1000  # tokens of an answer, before one is known
_RATIOS = (0.7, 1.6)  # least and greatest of a model's tokens beside the estimate
_NEWS = 0.05  # a ratio that changes by less is not written


class Availability:
    """Whether the store can be used. After a failure, limits hold within this process, and it is tried again in 5 s.

    A caller gives up after 250 ms in which no request of any process was served. A busy machine is not a failure:
    while the queue moves, or this process itself did not run, it waits up to 1 s.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.failed_at: float | None = None  # None while it works
        self.served_at = -math.inf  # monotonic: the last request of this process
        self.wal: Path | None = None  # on a local disk: its time shows that some process is being served

    def usable(self) -> bool:
        """Return whether it should be used now."""
        return self.failed_at is None or abs(self._clock() - self.failed_at) >= _RETRY

    def settle(self, error: Exception | None) -> None:
        """Note how a use ended."""
        self.failed_at = self._clock() if error else None

    def serve(self) -> None:
        """Note that a request of this process is being served."""
        self.served_at = time.monotonic()

    def may_wait(self, began: float, looked: float) -> bool:
        """Return whether a caller that began to wait at `began`, and last looked at `looked`, should wait longer."""
        now = time.monotonic()
        if began <= now - _QUEUE:
            return False
        stalled = now - looked > 1.2 * BOUND  # this process did not run: a blocked loop, a long collection
        if stalled or now - self.served_at < BOUND:
            return True
        with suppress(OSError):
            return bool(self.wal) and time.time() - self.wal.stat().st_mtime < BOUND
        return False


class _Process:
    """What belongs to one process and must not survive a fork; `memory` stands in for the store while it fails."""

    def __init__(self, store: QuotaStore, counts: Writer[Job], history: Writer[Record]) -> None:
        self.store, self.quotas, self.history = store, counts, history
        self.lock = threading.Lock()
        self.memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.memory.executescript(quotas.SCHEMA)
        self.pruned = -math.inf


class Ledger:
    """The ledger in one folder; for any mixture of threads, event loops, processes and forks.

    The folder is created (0700) on first use; with the setgid bit it is a group's, and files are 0660. While a file
    cannot be used, limits hold within this process, up to 10,000 finished attempts wait in memory, and one warning of
    the logger "biollm" is issued. See `sqlite.databases` for where the files lie. `network`: whether it is on a network file system; None to find out. `server`: where
    limits and cooldowns are counted instead of in the folder, if it has a URL.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        network: bool | None = None,
        server: LedgerServer | None = None,
    ) -> None:
        self.directory = directory = databases(directory)
        self._clock, self._network, self._server = clock, network, server
        self._quotas, self._history = directory / "quotas.db", directory / "history.db"
        self._processes: dict[int, _Process] = {}  # by process id; closing a parent's files after a fork would harm it
        self._blocked: dict[str, Cooldown] = {}
        self._filed: dict[str, Cooldown] = {}  # the cooldowns that the file held when it was last read
        self._availability = Availability(clock)
        self._pruned = -math.inf
        self._answers: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=50))
        self._ratios: dict[str, float] = {}
        self._origins: dict[str, str] = {}  # those of this process, also before they are written
        self.finished: Callable[[Record], None] | None = None  # called with each attempt that is finished
        self._warned = threading.Lock()  # held once the warning is issued
        if server and server.url:
            from biollm.ledger.redis import library

            library()  # where it is missing, the caller is told
        atexit.register(self.close)

    async def reserve(self, claim: Claim) -> int | Refused:
        """Count one request against every limit of `claim` and return the reservation, or why and until when not.

        Exact over all processes. Limits of tokens and USD are exceeded by no more than the requests in flight use
        beyond their reservations; a request larger than a whole limit passes when nothing else counts. After 250 ms
        without an answer this process's own count decides. A caller that is cancelled leaves nothing counted.
        """
        process, reservation = self._process(), secrets.randbits(53)  # which Lua's numbers hold
        if self._availability.usable():
            from asyncio import get_running_loop

            loop = get_running_loop()
            future: asyncio.Future[int | Refused | None] = loop.create_future()
            process.quotas.put(Job("reserve", self._clock(), (claim, reservation), future=future), urgent=True)
            began = time.monotonic()
            timer = loop.call_later(BOUND, self._give_up, future, began, began)
            try:
                answer = await future
            except BaseException:  # where the caller is cancelled after it was answered; else `_resolve` takes it back
                if not (future.cancel() or future.cancelled()) and isinstance(granted := future.result(), int):
                    self.release(granted, claim.scope)
                raise
            finally:
                timer.cancel()
            if answer is not None:
                return answer
        return self._reserve_alone(process, claim, reservation)

    def finish(self, reservation: int | None, scope: str, record: Record) -> None:
        """Hand in a finished attempt: its tokens and cost count at once, and it is on disk 50 ms later."""
        if record.outcome == "ok":
            self._answers[record.deployment].append(record.completion_tokens)
        if reservation is not None:
            used = (record.prompt_tokens + record.completion_tokens, record.cost_usd or 0.0)
            self._count(Job("finish", record.at, (scope, reservation, used)))
        if self.finished and record.outcome != "cached":  # then nothing was used
            self.finished(record)
        self._process().history.put(record)

    def charge(self, claim: Claim, record: Record) -> None:
        """Count what an attempt used against another claim's limits, too."""
        reservation = secrets.randbits(53)
        used = (record.prompt_tokens + record.completion_tokens, record.cost_usd or 0.0)
        self._count(Job("grant", record.at, (claim, reservation)))
        self._count(Job("finish", record.at, (claim.scope, reservation, used)))

    def release(self, reservation: int, scope: str) -> None:
        """Take back a reservation whose request was not sent."""
        self._count(Job("release", self._clock(), (scope, reservation)))

    def typical(self, deployment: str) -> int:
        """Return the tokens that 90% of a deployment's last answers did not exceed; 1,000 before the first."""
        answers = sorted(self._answers.get(deployment, ()))
        return answers[int(0.9 * len(answers))] if answers else _ANSWER

    def token_ratio(self, model: str) -> float:
        """Return how many tokens this model counts where one was estimated; 1 while that is unknown."""
        return self._ratios.get(model, 1.0)

    def learn_tokens(self, model: str, estimated: int, stated: int) -> None:
        """Note the tokens of a prompt as they were estimated without a ratio, and as the provider stated them."""
        known = self._ratios.get(model)
        ratio = min(max(stated / estimated, _RATIOS[0]), _RATIOS[1])
        ratio = ratio if known is None else known + (ratio - known) / 4
        if known is None or abs(ratio - known) > _NEWS * known:
            self._ratios[model] = ratio
            self._put("learn", self._clock(), model, ratio)

    def cool(
        self, key: str, seconds: float | None, reason: str, *, kind: str = "", ladder: Sequence[float] = (0.0,)
    ) -> None:
        """Put an account, endpoint, deployment or API key on cooldown in every process; of two the longer holds.

        `seconds` is what the provider stated; None takes the step of `ladder` (seconds of the first, second, ...
        cooldown) for the number of consecutive failures of this `kind`.
        """
        now = self._clock()
        self._blocked[key] = next_cooldown(self._blocked.get(key), now, reason, kind, seconds, ladder)
        self._put("cool", now, key, reason, kind, seconds, ladder)

    def recover(self, keys: Iterable[str]) -> None:
        """End the cooldowns of `keys` whose length was an estimate: a request has just been answered there."""
        now = self._clock()
        for key in keys:
            if (found := self._blocked.get(key)) and (found.until <= now or not found.stated):
                self._blocked.pop(key, None)
                self._put("recover", now, key, found.until - now)  # a failure in the meantime begins a new cooldown

    def failing(self, keys: Iterable[str]) -> bool:
        """Return whether any of `keys` was on cooldown since its last success."""
        return any(key in self._blocked for key in keys)

    def blocked(self) -> Mapping[str, Cooldown]:
        """Return what blocks in this process's last view, by cooldown key or "scope:..."."""
        now = self._clock()
        return {key: block for key, block in self._blocked.copy().items() if block.until > now}

    def refresh(self) -> None:
        """Read cooldowns, and at first the length of the last answers; forget limits found full. Up to 250 ms."""
        if not self._answers:
            for deployment, tokens in reversed(self._read(self._history, attempts.LAST_ANSWERS, ())):
                self._answers[deployment].append(tokens)
            self._ratios.update(self._ask(lambda store: store.ratios()) or {})
        for key in [key for key in self._blocked.copy() if key.startswith("scope:")]:
            self._blocked.pop(key, None)
        before = self._filed
        if (found := self._ask(lambda store: store.cooldowns())) is not None and self._filed is before:
            self._adopt(found)  # else another thread has adopted what may be newer

    def used(self, scope: str, limits: Sequence[Limit]) -> list[tuple[Limit, float, float | None]]:
        """Return (limit, used, resets at): the end of its period, or when a window's oldest request leaves it."""
        found = self._ask(lambda store: store.used(scope, limits)) or [(0.0, None)] * len(limits)
        return [(limit, *used) for limit, used in zip(limits, found, strict=True)]

    def note_origins(self, digests: Sequence[str], model: str) -> None:
        """Remember for a day that `model` gave what has these digests."""
        if len(self._origins) > _MOST_ORIGINS:
            self._origins.clear()
        self._origins.update(dict.fromkeys(digests, model))
        self._put("note", self._clock(), digests, model)

    def origins(self, digests: Sequence[str]) -> dict[str, str]:
        """Return the model that gave what has each digest, of the last 900, where it is known; may take 250 ms."""
        known = {digest: model for digest in digests if (model := self._origins.get(digest))}
        if asked := [digest for digest in digests if digest not in known]:
            found = self._ask(lambda store: store.origins(asked)) or {}
            self._origins.update(found)
            known |= found
        return known

    def history(self, since: float | None = None, until: float | None = None) -> Iterator[Record]:
        """Yield the attempts of `since` <= at < `until`, oldest first. No lock is held between them."""
        last, number = -math.inf if since is None else since, -1
        end = math.inf if until is None else until
        while rows := self._read(self._history, attempts.PAGE, (last, number, end), prepare=attempts.fill_in):
            yield from (attempts.record(row[1:]) for row in rows)
            number, last = rows[-1][:2]

    def unserved(self, since: float) -> list[tuple[str, float]]:
        """Return (model, at) of each request since then for which a scaled model had no server, oldest first."""
        return self._read(self._history, attempts.UNSERVED, (since,))

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection | None]:
        """Open history.db for several queries on one state of it; None before its first attempt."""
        if not self._read(self._history, "SELECT 1 FROM sqlite_master WHERE name = 'attempt'", ()):
            yield None
            return
        with reading(self._history, _EXIT) as db:
            attempts.fill_in(db)
            db.execute("BEGIN")
            yield db

    def change(self, work: Callable[[sqlite3.Connection], None], schema: str = "") -> None:
        """Create `schema` in history.db and run `work` there in one transaction; raises sqlite3.Error."""
        file = self._open_history(schema)
        file.write(work)
        file.close()

    def flush(self) -> None:
        """Wait, at most 2 s, until everything handed in has been written or has failed."""
        if process := self._processes.get(os.getpid()):
            process.quotas.flush(_EXIT)
            process.history.flush(_EXIT)

    def close(self) -> None:
        """Write what waits and close the files, in at most 2 s each; also done at interpreter exit."""
        if process := self._processes.get(os.getpid()):
            process.quotas.flush(_EXIT / 2)  # which releases what cancelled callers reserved
            self._processes.pop(os.getpid(), None)
            process.quotas.close(_EXIT / 2)
            process.history.close(_EXIT)
            with process.lock:
                process.memory.close()

    def _process(self) -> _Process:
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, self._start())

    def _start(self) -> _Process:
        store = self._open_store()
        counts = Writer("biollm quotas", self._write_quotas(store), self._settle_quotas, store.close)
        history = file_writer(self._open_history(), attempts.add, lambda _, error: self._warn(error))
        return _Process(store, counts, history)

    def _open_store(self) -> QuotaStore:
        recall, served = history_of(self._history), self._availability.serve
        if self._server and self._server.url:
            from biollm.ledger.redis import RedisStore

            return RedisStore(self._server, self.directory / "ledger.id", self._clock, recall, served)
        network = self._on_network()
        self._availability.wal = None if network else Path(f"{self._quotas}-wal")
        return SqliteStore(self._quotas, self._clock, network, recall, served)

    def _open_history(self, schema: str = "") -> Database:
        schema = attempts.SCHEMA + schema
        return Database(self._history, schema, self._on_network(), "NORMAL", patience=_EXIT, migrate=attempts.migrate)

    def _on_network(self) -> bool:
        return on_network(self.directory) if self._network is None else self._network

    def _put(self, operation: str, at: float, *arguments: object) -> None:
        self._process().quotas.put(Job(operation, at, arguments))

    def _count(self, job: Job) -> None:
        process = self._process()
        if self._availability.failed_at is not None:
            with process.lock:
                OPERATIONS[job.operation](process.memory, job.at, *job.arguments)
        process.quotas.put(job)

    def _write_quotas(self, store: QuotaStore) -> Callable[[Sequence[Job]], None]:
        def write(jobs: Sequence[Job]) -> None:
            self._adopt(store.write(jobs))
            for job in jobs:
                if job.operation == "cool":
                    self._blocked[job.arguments[0]] = self._filed[job.arguments[0]] = job.answer

        return write

    def _settle_quotas(self, jobs: Sequence[Job], error: Exception | None) -> None:
        self._availability.settle(error)
        self._warn(error, self._process().store)
        loops: defaultdict[asyncio.AbstractEventLoop, list[Job]] = defaultdict(list)
        for job in jobs:
            if job.future:
                claim, reservation = job.arguments
                job.answer = None if error or job.answer is None else self._refused(claim, job.answer) or reservation
                if job.future.cancelled():
                    self._resolve([job])  # here, as its loop may have ended
                else:
                    loops[job.future.get_loop()].append(job)
        for loop, waiting in loops.items():
            with suppress(RuntimeError):  # the loop is closed: no caller waits there
                loop.call_soon_threadsafe(self._resolve, waiting)

    def _resolve(self, waiting: Sequence[Job]) -> None:
        for job in waiting:
            if job.future and not job.abandoned:
                job.future.set_result(job.answer)
            elif job.future and job.future.cancelled() and isinstance(job.answer, int):
                self.release(job.answer, job.arguments[0].scope)

    def _give_up(self, future: asyncio.Future[int | Refused | None], began: float, looked: float) -> None:
        if future.done():
            return
        if self._availability.may_wait(began, looked):
            future.get_loop().call_later(BOUND, self._give_up, future, began, time.monotonic())
            return
        error = TimeoutError(f"no answer within {BOUND * 1000:.0f} ms")
        self._availability.settle(error)
        self._warn(error, self._process().store)
        future.set_result(None)

    def _reserve_alone(self, process: _Process, claim: Claim, reservation: int) -> int | Refused:
        now = self._clock()
        known = [(key, self._blocked.get(key)) for key in (*claim.cooling, claim.limited_by)]
        blocks = [Block(each.until, each.reason, key, shut=True) for key, each in known if each and each.until > now]
        with process.lock:
            if abs(now - process.pruned) > PRUNE:
                quotas.prune(process.memory, now)
                process.pruned = now
            blocks += quotas.reserve(process.memory, now, claim, reservation) if not blocks else ()
        if refused := self._refused(claim, blocks):
            return refused
        process.quotas.put(Job("grant", now, (claim, reservation)))
        return reservation

    def _refused(self, claim: Claim, blocks: Sequence[Block]) -> Refused | None:
        """Return the refusal by the block that ends last; a limit without any room stays full until it frees."""
        if not blocks:
            return None
        until, reason, key, shut = max(blocks)
        if key == claim.limited_by and shut:
            self._blocked[key] = Cooldown(until, reason, stated=True)
        return Refused(until, f"{reason}, frees in {span(until - self._clock())}", key)

    def _adopt(self, found: Mapping[str, Cooldown]) -> None:
        """Take over what other processes changed in the store; what this process has just written is newer."""
        filed, self._filed = self._filed, dict(found)  # at once: several threads come here
        for key in filed.keys() - found.keys():
            if self._blocked.get(key) == filed[key]:
                self._blocked.pop(key, None)
        self._blocked.update({key: each for key, each in found.items() if each != filed.get(key)})

    def _ask(self, question: Callable[[QuotaStore], T]) -> T | None:
        """Return the store's answer, or None while it cannot be read."""
        store = self._process().store
        if store.remote and not self._availability.usable():
            return None
        try:
            return question(store)
        except (sqlite3.Error, OSError, RuntimeError) as error:
            if store.remote:  # every other question would wait as long
                self._availability.settle(error)
            self._warn(error, store)
            return None

    def _read(self, path: Path, sql: str, arguments: Sequence[object], prepare: Prepare | None = None) -> list[Any]:
        try:
            return read(path, sql, arguments, prepare=prepare)
        except (sqlite3.Error, OSError) as error:
            self._warn(error)
            return []

    def _warn(self, error: Exception | None, store: QuotaStore | None = None) -> None:
        if error and self._warned.acquire(blocking=False):
            name, advice = (store.name, store.advice) if store else (self.directory, SqliteStore.advice)
            if is_damage(error):
                advice = "The next request sets the damaged file aside."
            text = "The ledger %s cannot be used (%s): limits hold within this process and records wait in memory until it can. %s"
            _log.warning(text, name, error, advice)
