"""The ledger's limits and cooldowns on a Redis server, for users and gateways on several hosts.

LiteLLM counts on Redis too, but per deployment and clock minute, and with a command for each limit. Here each batch is
one call of `redis.lua`: one round trip, one transaction, the server's clock.

The history stays in each user's history.db, and `usage --merge` joins them. No request waits for it; a stream of it
would need more of the server's memory than all counts, and be lost with them. From the history, a server that lost its
data gets back the days and months (`recall`); windows of up to an hour start anew.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from biollm._files import locked
from biollm._ownership import is_private
from biollm.errors import UnavailableError, install_command
from biollm.ledger import quotas
from biollm.ledger.quota_store import Job, Recall
from biollm.ledger.quotas import Block, Cooldown
from biollm.ledger.records import Claim
from biollm.ledger.sqlite import BOUND

if TYPE_CHECKING:
    from biollm.config import Limit
    from biollm.config.schema import LedgerServer

_PREFIX = "biollm:2:"  # the number changes with the layout of the keys, so that no version reads the counts of another
_BATCH = 200  # jobs in one call: other clients wait for it, some 10 us for each
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
_JITTER = 0.1  # seconds by which two measurements of the server's clock may differ


class RedisStore:
    """Counts on a Redis or Valkey server; for any thread.

    Times are this host's outside, and the server's in what is sent. `history`: a file for what identifies this user's
    history.db to the server. `clock`: in tests, one that the server takes for its own.
    """

    advice, remote = "`biollm doctor` checks it.", True

    def __init__(
        self,
        server: LedgerServer,
        history: Path,
        clock: Callable[[], float],
        recall: Recall,
        served: Callable[[], None],
    ) -> None:
        self.name = server.url or ""
        self._server, self._file, self._known = server, history, ""
        self._clock, self._recalled, self._served = clock, recall, served
        self._library = library()
        self._ahead = 0.0  # seconds by which the server's clock is ahead of this host's
        self._opened: tuple[Any, Any] | None = None  # the script, and the writing thread's client

    def write(self, jobs: Sequence[Job]) -> Mapping[str, Cooldown]:  # noqa: D102
        found: Mapping[str, Cooldown] = {}
        waiting = [job for job in jobs if not job.abandoned]
        while waiting:
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            answers, found = self._ask([self._encoded(job) for job in batch], writing=True)
            self._served()
            missing: list[Any] = []
            for job, answer in zip(batch, answers, strict=True):
                if job.operation == "reserve" and "recall" in answer:
                    missing += self._histories(job.arguments[0].scope, answer["recall"])
                    waiting.insert(0, job)
                else:
                    job.answer = self._decoded(job, answer)
            if missing:
                self._ask(missing)
        return found

    def close(self) -> None:  # noqa: D102
        if self._opened:
            self._opened[0].registered_client.close()
            self._opened = None

    def cooldowns(self) -> Mapping[str, Cooldown]:  # noqa: D102
        return self._ask([])[1]

    def used(self, scope: str, limits: Sequence[Limit]) -> list[tuple[float, float | None]]:  # noqa: D102
        (answer,), _ = self._ask([["used", 0, scope, _limits(limits, self._clock() + self._ahead)]])
        return [(used, ends[0] - self._ahead if ends else None) for used, *ends in answer or ()]

    def ratios(self) -> Mapping[str, float]:  # noqa: D102
        (answer,), _ = self._ask([["ratios", 0]])
        return {model: float(ratio) for model, ratio in zip(answer[::2], answer[1::2], strict=True)} if answer else {}

    def origins(self, digests: Sequence[str]) -> Mapping[str, str]:  # noqa: D102
        (answer,), _ = self._ask([["origins", 0, digests]])
        return {digest: model for digest, model in zip(digests, answer or (), strict=False) if model}

    def _ask(self, jobs: Sequence[Any], *, writing: bool = False) -> tuple[Sequence[Any], Mapping[str, Cooldown]]:
        """Return the answers and the cooldowns.

        Raises:
            OSError: The server cannot be used now.
            RuntimeError: The script failed.
        """
        began = self._clock()
        own = {} if self._clock is time.time else {"now": began}
        request = _encode({"jobs": jobs, **own}).encode(errors="replace")
        try:
            script, client = self._opened = self._opened or self._open()
            reply: dict[str, Any] = json.loads(script([_PREFIX], [request], client if writing else None))
        except self._library.RedisError as error:
            self._opened = None  # its password may be another by now
            failed = type(error) is self._library.ResponseError and not re.match("[A-Z]+ ", str(error))
            raise (RuntimeError if failed else OSError)(str(error)) from error
        if abs(ahead := reply["now"] - (began + self._clock()) / 2 - self._ahead) > _JITTER and not own:
            self._ahead += ahead
        least, most = reply["now"] - quotas.MEMORY, reply["now"] + quotas.FARTHEST
        rows = [row for row in reply["cooldowns"] if least < row["ends"] <= most]
        return reply["answers"] or (), {row["name"]: self._cooldown(row) for row in rows}

    def _open(self) -> tuple[Any, Any]:
        opened = connect(self._library, self._server)
        script = opened.register_script((files("biollm.ledger") / "redis.lua").read_text())
        return script, opened.client()  # the latter has a connection of its own: to take one from the pool takes longer

    def _encoded(self, job: Job) -> list[Any]:
        at = self._ahead + (self._clock() if job.operation == "reserve" else job.at)
        arguments = [self._claim(each, at) if isinstance(each, Claim) else each for each in job.arguments]
        return [job.operation, at, *arguments, *([self._history()] if job.operation == "reserve" else ())]

    def _claim(self, claim: Claim, at: float) -> dict[str, Any]:
        return {"scope": claim.scope, "cooling": claim.cooling, "tokens": claim.tokens, "usd": claim.usd,
                "limits": _limits(claim.limits, at)}  # fmt: skip

    def _histories(self, scope: str, periods: Sequence[Mapping[str, str]]) -> list[Any]:
        """Return the operations that add to these days and months what the user's history has of them."""
        found: list[Any] = []
        for period in periods:
            start, ends = (float(period[each]) - self._ahead for each in ("start", "ends"))
            found.append(["recall", 0, scope, period, self._history(), *self._recalled(start, ends, scope)])
        return found

    def _history(self) -> str:
        """Return what identifies this user's history.db."""
        if not self._known:
            try:
                with locked(self._file):
                    self._known = self._file.read_text() or secrets.token_hex(8)
                    self._file.write_text(self._known)
            except OSError:
                self._known = f"{socket.gethostname()}:{self._file}"
        return self._known

    def _decoded(self, job: Job, answer: Any) -> Any:
        if job.operation == "cool":
            return self._cooldown(answer)
        if job.operation != "reserve":
            return None
        claim: Claim = job.arguments[0]
        return [
            quotas.limited(claim, claim.limits[what], until - self._ahead, why) if isinstance(what, int)
            else Block(until - self._ahead, why, what)
            for until, what, why in answer["blocks"] or ()
        ]  # fmt: skip

    def _cooldown(self, row: Mapping[str, Any]) -> Cooldown:
        return Cooldown(row["ends"] - self._ahead, row["reason"], row["kind"], row["stated"], row["times"])


@dataclass(frozen=True)
class Facts:
    """What `biollm doctor` has to know of a server."""

    product: str  # and version: "Redis 7.0.15"
    major: int
    replica: bool
    cluster: bool  # keeps only the keys of its slots
    evicts: str  # the policy by which it forgets keys once its memory is full; "" if it keeps them
    ahead: float  # seconds by which its clock is ahead of this host's
    ms: float  # of an answer, the quickest of five


def examine(server: LedgerServer) -> Facts:
    """Connect to the server and return its facts.

    Raises:
        OSError: It cannot be used.
        UnavailableError: The client's package is missing.
    """
    package = library()
    try:
        with connect(package, server) as client:
            info: dict[str, Any] = client.info()
            looks: list[tuple[float, float]] = []
            for _ in range(5):
                began = time.time()
                seconds, us = client.time()
                took = time.time() - began
                looks.append((took, seconds + us / 1e6 - began - took / 2))
    except package.RedisError as error:
        raise OSError(str(error)) from error
    name = "valkey" if "valkey_version" in info else "redis"
    version = str(info[f"{name}_version"])
    evicts = info["maxmemory_policy"] if info["maxmemory"] and info["maxmemory_policy"] != "noeviction" else ""
    major = int(version.partition(".")[0])
    took, ahead = min(looks)
    replica, cluster = info["role"] != "master", bool(info["cluster_enabled"])
    return Facts(f"{name.title()} {version}", major, replica, cluster, evicts, ahead, took * 1000)


def _limits(limits: Sequence[Limit], at: float) -> Sequence[dict[str, Any]]:
    return [_limit(each, at // 60 * 60) for each in limits]


@lru_cache
def _limit(limit: Limit, at: float) -> dict[str, Any]:
    if limit.rolling:
        return {"kind": limit.kind, "amount": limit.amount, "window": quotas.window(limit)}
    start, ends = (f"{each:.0f}" for each in quotas.period(limit, at))  # they are part of a key's name
    return {"kind": limit.kind, "amount": limit.amount, "start": start, "ends": ends}


def library() -> Any:
    """Return the client's package.

    Raises:
        UnavailableError: It is not installed.
    """
    try:
        return import_module("redis")
    except ModuleNotFoundError:
        message = "The ledger is on Redis, and its client is not installed."
        raise UnavailableError(message, hint=install_command("redis")) from None


def connect(library: Any, server: LedgerServer) -> Any:
    """Return a client, which connects on first use; every answer is waited for 250 ms.

    A connection that the server has closed is opened again: whatever is sent may be sent twice.

    Raises:
        OSError: Its password cannot be read.
    """
    retry = library.retry.Retry(library.backoff.NoBackoff(), 1, (library.ConnectionError,))
    waits = {"socket_timeout": BOUND, "socket_connect_timeout": BOUND, "retry": retry}
    return library.Redis.from_url(server.url, password=_password(server), protocol=2, driver_info=None, **waits)


def _password(server: LedgerServer) -> str | None:
    if server.password_env:
        if password := os.environ.get(server.password_env):
            return password
        raise OSError(f"{server.password_env}, which holds its password, is not set")
    if not (file := server.password_file):
        return None
    if not file.exists():
        raise OSError(f"{file}, which holds its password, does not exist: write it, or correct password_file")
    if not is_private(file, stat.S_ISREG):
        raise OSError(f"{file}, which holds its password, is open to others: chmod 600 {quote(str(file))}")
    return file.read_text().strip()
