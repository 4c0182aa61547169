"""Reads the records that running model servers leave in the run directory, and says which are alive.

Slurm knows jobs, not servers; LiteLLM knows configured URLs, not what came and went. A record counts while it is
renewed, its walltime is not about to end, its owner is trusted, its host is a node of the cluster, and the server
at its address names the same start (a port can have a new owner before a record is gone).
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from biollm._files import file_time
from biollm._ownership import is_this_host, uids
from biollm.config.paths import biollm_dirs, present_dir

if TYPE_CHECKING:
    from biollm.config import Cluster

STALE_S = 20.0  # a record is renewed every 5 s, or 10 s later by a server that is slow to answer
ENDING_S = 10.0  # a server with less walltime left gets no new requests
PROBE_S = 15.0  # between two questions to the same server
_RETRY_S = 2.0  # the same, after it did not answer
_LOOK_S = 2.0  # how long the first look is waited for
_UNUSED_S = 60.0  # a watch that nobody asks stops reading
_SKEW_S = 60.0  # how long a measured difference of clocks is believed
START, PROOF = "x-biollm-start", "x-biollm-proof"  # headers of a server's answers
_START, _RECORD = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}\.json")
_METRIC = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|(?:kv|gpu)_cache_usage_perc)(?:\{.*\})? (\d[\d.e+-]*)\s*$", re.M
)


@dataclass(frozen=True)
class Endpoint:
    """A server that is alive.

    Attributes:
        start: Id of this start of the server; every answer carries it as `x-biollm-start`.
        job: Slurm's job id.
        submission: Id of the submission; unlike a job's id it is never used again.
        host: The node's name.
        base_url: "http://ADDRESS:PORT/v1".
        key_file: Holds the key of this start; see `read_key`.
        owner: User id of the record's owner.
        left_s: Seconds of walltime left when it was read.
        link: Place in the chain, from 1.
    """

    start: str
    job: str
    submission: str
    model: str
    host: str
    base_url: str
    key_file: Path
    owner: int
    left_s: float
    link: int


class Records:
    """The records of a cluster's run directory; unchanged ones are not read again."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._places = cluster, biollm_dirs(cluster)
        self._owners = uids(cluster.trusted_owners)
        self._known: dict[str, tuple[tuple[int, int], Any, int]] = {}
        self._nodes: tuple[float, dict[str, str]] = (-1.0, {})
        self._skew = (-_SKEW_S, 0.0)

    def read(self) -> tuple[list[Endpoint], dict[str, str]]:
        """Return what is alive by its record, and for every other record why it is not."""
        alive: list[Endpoint] = []
        others: dict[str, str] = {}
        known, self._known = self._known, {}
        entries: list[os.DirEntry[str]] = []
        for place in self._places:
            with suppress(OSError):
                entries += [entry for entry in os.scandir(place / "records") if _RECORD.fullmatch(entry.name)]
        now = self.now() if entries else 0.0
        for entry in entries:
            try:
                seen = entry.stat(follow_symlinks=False)
                mark = (seen.st_mtime_ns, seen.st_ino)
                if (old := known.get(entry.path)) is None or old[0] != mark:
                    old = (mark, *_load(entry.path))
                self._known[entry.path] = old
                found = self._judge(Path(entry.path), old[1], old[2], now - seen.st_mtime)
            except FileNotFoundError:
                continue  # it left just now
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                found = "cannot be read, or is no record"
            if isinstance(found, str):
                others[entry.name[:-5]] = found
            else:
                alive.append(found)
        return alive, others

    def now(self) -> float:
        """Return the time by the file system's clock: nodes' and servers' clocks may differ by minutes."""
        measured, skew = self._skew
        if time.monotonic() - measured >= _SKEW_S:
            skew = file_time(present_dir(self._cluster)) - time.time()
            self._skew = (time.monotonic(), skew)
        return time.time() + skew

    def _judge(self, path: Path, record: Any, owner: int, age: float) -> Endpoint | str:
        """Return the endpoint of a record, or why it does not count."""
        name = path.stem
        left = float(record["left_s"]) - age
        address, host = str(record["address"]), str(record["host"])
        if record["cluster"] != self._cluster.name:
            return f"belongs to the cluster {record['cluster']!r}"
        if owner not in self._owners:
            return f"its owner (user id {owner}) is not trusted"
        if record["start"] != name or not _START.fullmatch(name):
            return "is named otherwise than its file"
        if age > STALE_S:
            return f"was not renewed for {age:.0f} s"
        if left < ENDING_S:
            return "its walltime is about to end"
        if self._node_map().get(host) != address and not is_this_host(address):
            return f"{host} ({address}) is not known as a node of the cluster"
        return Endpoint(
            start=name, job=str(record["job"]), submission=str(record["ticket"]), model=str(record["model"]), host=host,
            base_url=f"http://{address}:{int(record['port'])}/v1", key_file=path.parent.with_name("starts") / name / "key",
            owner=owner, left_s=left, link=int(record["link"]),
        )  # fmt: skip

    def _node_map(self) -> Mapping[str, str]:
        """Return node name -> address, as the controller told `biollm up` or `status` last."""
        paths = [place / f"nodes-{self._cluster.name}.json" for place in self._places]
        try:
            path = next((path for path in paths if path.exists()), paths[0])
            changed = path.stat().st_mtime
            if changed != self._nodes[0]:
                nodes, owner = _load(path)
                self._nodes = (changed, nodes if owner in self._owners else {})
        except (OSError, ValueError):
            return {}
        return self._nodes[1]


class Watch:
    """The servers that are alive, kept in memory and refreshed in the background: asking costs no file access."""

    def __init__(self, cluster: Cluster, interval: float = 0.5) -> None:
        self._records, self._interval = Records(cluster), interval
        self._alive: tuple[Endpoint, ...] = ()
        self._probed: dict[str, tuple[float, bool]] = {}  # start -> when, and whether it answered
        self._thread: threading.Thread | None = None
        self._looked, self._due = threading.Event(), 0.0
        self._asked = self._took = 0.0

    def alive(self) -> tuple[Endpoint, ...]:
        """Return the servers alive at most an interval ago; waits for the first look, and for one after a minute unasked.

        A file system that does not answer is waited for 2 s; then it is what was known before.
        """
        self.latest()
        self._looked.wait(max(0.0, self._due - time.monotonic()))
        return self._alive

    def latest(self) -> tuple[Endpoint, ...]:
        """Return the servers that are known to be alive, without waiting, and see to it that somebody looks."""
        self._asked = time.monotonic()
        if self._thread is None or not self._thread.is_alive():  # also in the child of a fork
            self._looked, self._due = threading.Event(), self._asked + _LOOK_S
            self._thread = threading.Thread(
                target=self._run, args=(self._looked,), name="biollm-endpoints", daemon=True
            )
            self._thread.start()
        return self._alive

    @property
    def awake(self) -> bool:
        """Return whether `alive` would not wait."""
        seen = self._looked.is_set() or time.monotonic() >= self._due
        return seen and self._thread is not None and self._thread.is_alive()

    def refresh(self) -> tuple[Endpoint, ...]:
        """Read the records, and ask the servers that are new or were not asked for a while."""
        began = time.monotonic()
        found, _ = self._records.read()
        now = time.monotonic()
        self._took = now - began
        probed = self._probed = {e.start: self._probed[e.start] for e in found if e.start in self._probed}
        due = [e for e in found if (p := probed.get(e.start)) is None or now - p[0] > (PROBE_S if p[1] else _RETRY_S)]
        for endpoint, named in _probe(due):
            # One that is only slow counts as before, a new one by its record: it proves its start before it is asked.
            answered = probed.get(endpoint.start, (0.0, True))[1] if named is None else named == endpoint.start
            probed[endpoint.start] = (now, answered)
        self._alive = tuple(e for e in found if probed.get(e.start, (0.0, False))[1])
        return self._alive

    def _run(self, looked: threading.Event) -> None:
        while time.monotonic() - self._asked < _UNUSED_S:
            try:
                self.refresh()
            except RuntimeError:  # the interpreter is ending, and starts no more threads
                return
            looked.set()
            time.sleep(max(self._interval, 20 * self._took))  # a slow file system is read more rarely


def read_key(endpoint: Endpoint) -> str:
    """Return the key of an endpoint.

    Raises:
        OSError: It is gone, empty, not readable for this user, or not the record's owner's.
    """
    with endpoint.key_file.open() as file:
        if os.fstat(file.fileno()).st_uid != endpoint.owner:
            raise PermissionError(f"{endpoint.key_file} does not belong to the owner of its record.")
        if not (key := file.read().strip()):
            raise PermissionError(f"{endpoint.key_file} holds no key.")
        return key


def challenge() -> tuple[str, str]:
    """Return a nonce, and the path at which the server of a start proves, with its key, that it is that."""
    nonce = secrets.token_hex(16)
    return nonce, f"/health?nonce={nonce}"


def proof(key: str, nonce: str, start: str) -> str:
    """Return what only a server with the key of the start can answer to a nonce."""
    return hmac.new(key.encode(), f"{nonce}{start}".encode(), "sha256").hexdigest()


def unproven(base_url: str, model: str) -> str:
    """Return what is said of a server that does not prove its start, one sentence."""
    restart = f"biollm down {model} && biollm up {model}"
    return f"what listens at {base_url} does not prove to be its server: another program, or one of an older biollm ({restart})"


def ask(endpoint: Endpoint, method: str, path: str, body: Any = None, *, timeout: float) -> tuple[int, str]:
    """Return status and text of one request to the server itself, with its key and past any proxy.

    Args:
        endpoint: The server.
        method: "GET" or "POST".
        path: From the root, such as "/v1/completions".
        body: Sent as JSON.
        timeout: Seconds.

    Raises:
        OSError: It did not answer, or another server did, which was not sent the key.
    """
    status, start, text = _request(endpoint, method, path, body, timeout, read_key(endpoint))
    if start != endpoint.start:
        raise ConnectionError(f"Another server answers at {endpoint.base_url}.")
    return status, text


@dataclass(frozen=True)
class Figures:
    """What vLLM says of its load: requests that run and that wait, and the share of the key-value cache in use."""

    running: int
    waiting: int
    cache: float


def load(endpoint: Endpoint) -> tuple[int, int] | None:
    """Return how many requests run and wait on a server, or None when it does not say."""
    try:
        said = figures(ask(endpoint, "GET", "/metrics", timeout=3)[1])
    except OSError:
        return None
    return said and (said.running, said.waiting)


def figures(text: str) -> Figures | None:
    """Return the figures in a text of vLLM's /metrics, of all its engines; None where they are not there."""
    found: dict[str, list[float]] = {}
    for name, value in _METRIC.findall(text):
        found.setdefault(name, []).append(float(value))
    if "num_requests_running" not in found:
        return None
    running, waiting = sum(found["num_requests_running"]), sum(found.get("num_requests_waiting", []))
    used = found.get("kv_cache_usage_perc") or found.get("gpu_cache_usage_perc") or [0.0]  # the latter before v0.10
    return Figures(int(running), int(waiting), max(used))


def _load(path: str | Path) -> tuple[Any, int]:
    """Return the JSON of a file and its owner; a link, or a file that others may write, is an error."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode) or seen.st_mode & 0o022:
            raise ValueError("others may write it")
        return json.load(file), seen.st_uid


def _probe(endpoints: Sequence[Endpoint]) -> Iterable[tuple[Endpoint, str | None]]:
    """Yield for each server the start that it names: "" for none or no connection, None for no answer in time."""
    if not endpoints:
        return
    from concurrent.futures import ThreadPoolExecutor

    def ask_health(endpoint: Endpoint) -> str | None:
        try:
            return _request(endpoint, "GET", "/health", None, 1.0, None)[1]
        except TimeoutError:
            return None
        except OSError:
            return ""

    with ThreadPoolExecutor(min(64, len(endpoints))) as pool:
        yield from zip(endpoints, pool.map(ask_health, endpoints), strict=True)


def _request(
    endpoint: Endpoint, method: str, path: str, body: Any, timeout: float, key: str | None
) -> tuple[int, str, str]:
    """Return (status, start id, text) of one request; with a key, the server proves its start on the connection first."""
    import http.client

    url = urlsplit(endpoint.base_url)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=timeout)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        if key:
            nonce, where = challenge()
            connection.request("GET", where)
            answer = connection.getresponse()
            answer.read()
            said = answer.headers.get(PROOF) or ""
            if not hmac.compare_digest(said.encode(), proof(key, nonce, endpoint.start).encode()):
                raise ConnectionError(unproven(endpoint.base_url, endpoint.model))
            connection.auto_open = 0  # a new connection could lead to another server
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get(START) or "", answer.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{endpoint.base_url} does not speak HTTP: {error!r}") from error
    finally:
        connection.close()
