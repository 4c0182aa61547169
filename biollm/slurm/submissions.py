"""Keeps what is known of each submission, and puts together how it is from queue, events, records and logs.

What Slurm lacks: it forgets a job minutes after its end, and reuses ids when its state is lost. So each submission
leaves `jobs/TICKET.json` in the run directory, and the job appends its changes of state to `jobs/TICKET.events`.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from biollm._files import write_private
from biollm.config import Cluster
from biollm.config.paths import biollm_dir, biollm_dirs
from biollm.errors import JobFailedError, UsageError
from biollm.slurm.commands import Queue, Row
from biollm.slurm.endpoints import Endpoint
from biollm.types import known

Phase = Literal["pending", "starting", "ready", "draining", "ended", "failed", "unknown"]
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_OUT_OF_MEMORY = re.compile(r"exceeded memory limit|oom.?kill|out of memory", re.IGNORECASE)
_KEPT_S = 7 * 86400
_ID = "[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}"  # uuid4().hex
_FORMS = {  # folder -> the names that biollm gives in it
    "jobs": r"\.?({id})\.(?:json|sh)(?:\.\w{{8}})?|({ticket})(?:\.events|\.stop|-\d+\.master)",
    "records": r"({id})\.(?:json|new)",
    "starts": r"({id})",
}


@dataclass(frozen=True)
class Ticket:
    """A submission. Times in seconds; `submitted` by the file system's clock."""

    id: str
    job: str
    models: tuple[str, ...]
    gpus: int
    walltime: int
    log: Path
    chain: str = ""
    link: int = 1
    links: int = 1
    nodes: int = 1
    submitted: float = 0.0
    seen: float = 0.0  # when its last event was written
    folder: Path = Path()  # where its files lie
    events: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Job:
    """A submission and how it is.

    Attributes:
        reason: One sentence or Slurm's own word; why it waits, or ended.
        start: Slurm's estimate of a pending job's start, or "".
        endpoints: Its servers that are alive.
        requests: Start id -> requests (running, waiting); only from `status`.
    """

    ticket: Ticket
    phase: Phase
    reason: str = ""
    start: str = ""
    node: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    requests: dict[str, tuple[int, int] | None] = field(default_factory=dict[str, tuple[int, int] | None])

    @property
    def over(self) -> bool:
        """Has it ended, however?"""
        return self.phase in ("ended", "failed", "unknown")

    @property
    def left_s(self) -> float | None:
        """Seconds of walltime left, once a server is ready."""
        return min((endpoint.left_s for endpoint in self.endpoints), default=None)


def judge(ticket: Ticket, queue: Queue, endpoints: Iterable[Endpoint], now: float) -> Job:
    """Put together how a job is; `now` is by the file system's clock. Pure."""
    row, mine = queue.rows.get(ticket.job), tuple(e for e in endpoints if e.ticket == ticket.id)
    events = [event for event in ticket.events if event["restart"] == ticket.events[-1]["restart"]]
    last = {event["model"]: event for event in events}
    over = [event for event in last.values() if event["state"] in ("stopped", "failed")]
    failed = next((f"{e['model']}: {e['reason']}" for e in events if e["state"] == "failed"), "")
    names = ticket.models if "*" not in last else ("*",)
    newer = bool(events) and ticket.seen > queue.at  # the job has spoken since the queue was asked
    waits = row is not None and row.state in _WAITING and not newer
    if row and row.ended and row.state != "COMPLETED":
        return Job(ticket, "failed", _death(ticket, row, failed))
    said = newer or (row is not None and not row.ended and not waits)
    if said and over and over[-1]["reason"] == "cancelled":  # Slurm's TERM; the queue will tell what it was
        return Job(ticket, "draining", "cancelled")
    if len(over) >= len(names) and over and not waits:
        return Job(ticket, "failed" if failed else "ended", failed or over[-1]["reason"])
    if row and row.ended:
        return Job(ticket, "ended", "completed")
    if mine and len(mine) + len(over) >= len(names):
        leaving = all(e["state"] == "draining" for e in last.values())
        return Job(ticket, "draining" if leaving else "ready", failed or queue.error, node=mine[0].host, endpoints=mine)
    if row and waits:
        return Job(ticket, "pending", queue.error or row.reason, start=row.start)
    if row or newer or (queue.error and events):
        phase = "draining" if any(e["state"] == "draining" for e in last.values()) else "starting"
        return Job(ticket, phase, queue.error or failed, node=row.node if row else "", endpoints=mine)
    if queue.at <= ticket.submitted or queue.error:
        return Job(ticket, "pending", queue.error or "submitted")
    state = ticket.events[-1]["state"] if ticket.events else "submitted"
    ago = now - (ticket.seen or ticket.submitted)
    return Job(ticket, "unknown", f"unknown, last seen {state} {ago:.0f} s ago; Slurm does not know the job any more")


def _death(ticket: Ticket, row: Row, failed: str) -> str:
    """Say why Slurm ended a job, as far as is known."""
    said = row.state if row.reason in ("", row.state, "NonZeroExitCode") else f"{row.state} ({row.reason})"
    if row.state in ("FAILED", "OUT_OF_MEMORY") and _OUT_OF_MEMORY.search("\n".join(tail(ticket.log, 50))):
        said = "out of memory of the node: raise `memory_gb_per_node`, or ask for more GPUs' share"
    return f"{said}; {failed}" if failed else said


def save(ticket: Ticket, cluster: Cluster) -> Ticket:
    """Write a ticket; return it as it is on disk."""
    kept = {"job": ticket.job, "models": ticket.models, "gpus": ticket.gpus, "walltime": ticket.walltime,
            "log": str(ticket.log), "chain": ticket.chain, "link": ticket.link, "links": ticket.links,
            "nodes": ticket.nodes, "cluster": cluster.name}  # fmt: skip
    ticket = replace(ticket, folder=biollm_dir(cluster) / "jobs")
    write_private(ticket.folder / f"{ticket.id}.json", json.dumps(kept))
    return read(ticket, cluster)


def read(ticket: Ticket, cluster: Cluster) -> Ticket:
    """Return the ticket with the events written since; as it was, where it is gone."""
    return _load(ticket.folder / f"{ticket.id}.json", cluster) or ticket


def _load(path: Path, cluster: Cluster) -> Ticket | None:
    """Return a ticket with its events; None when it is not this user's and cluster's, or unreadable."""
    try:
        seen, kept = path.stat(), json.loads(path.read_text())
        if kept["cluster"] != cluster.name or seen.st_uid != os.getuid():
            return None
        ours = {"id": path.stem, "models": tuple(kept["models"]), "log": Path(kept["log"])}
        ticket = known(Ticket, kept | ours | {"submitted": seen.st_mtime, "folder": path.parent})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    events = path.with_suffix(".events")
    with suppress(OSError):
        lines, written = events.read_text().splitlines(), events.stat().st_mtime
        return replace(ticket, seen=written, events=tuple(_events(lines)))
    return ticket


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError, AttributeError):  # half a line, from a full disk
            event = json.loads(line)
            if event.keys() >= {"model", "state", "reason", "restart"}:
                yield event


def tickets(cluster: Cluster) -> list[Ticket]:
    """Return this user's tickets, oldest first."""
    own, before = biollm_dirs(cluster)
    paths = list((own / "jobs").glob("*.json"))
    paths += [path for path in (before / "jobs").glob("*.json") if re.fullmatch(_ID, path.stem)]  # others are not ours
    return sorted(filter(None, (_load(path, cluster) for path in paths)), key=lambda ticket: ticket.submitted)


def find(cluster: Cluster, target: str) -> list[Ticket]:
    """Return the tickets of a job's id or of a model's name, oldest first.

    Raises:
        UsageError: There is none.
    """
    every = tickets(cluster)
    if found := [ticket for ticket in every if target == ticket.job or target in ticket.models]:
        return found
    known = sorted({name for ticket in every for name in (ticket.job, *ticket.models)})
    raise UsageError(f"No job here is {target!r} or serves it.", hint=f"Known: {', '.join(known) or 'none'}.")


def sweep(cluster: Cluster, jobs: Iterable[Job] = ()) -> None:
    """Remove this user's files of a week ago, but for those of `jobs` that go on, and of servers that run.

    The run directory may be the user's for other things, too. So only names of the exact form that biollm gives
    count, in folders of the exact names; and where version 0.1 kept them, only if it left its node files there.
    """
    own, before = biollm_dirs(cluster)
    kept = {name for job in jobs if not job.over for name in (job.ticket.id, job.ticket.chain) if name}
    for record in (path for place in (own, before) for path in (place / "records").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # another cluster's too, whose jobs nobody here knows
            if re.fullmatch(_ID, record.stem) and time.time() - record.stat().st_mtime < _KEPT_S:
                kept |= {record.stem, json.loads(record.read_text())["ticket"]}
    _sweep(own, rf"{_ID}|{re.escape(cluster.name)}-\d+", kept)  # the latter: of a script submitted by hand
    if any((before / "lib").glob("biollm_node_*.py")):
        _sweep(before, _ID, kept)


def _sweep(place: Path, ticket: str, kept: set[str]) -> None:
    for folder, form in _FORMS.items():
        names = [] if (place / folder).is_symlink() else _listed(place / folder)
        for path in (place / folder / name for name in names):
            with suppress(OSError):
                named, seen = re.fullmatch(form.format(ticket=ticket, id=_ID), path.name), path.lstat()
                old = time.time() - seen.st_mtime > _KEPT_S
                if not named or named[named.lastindex or 0] in kept or not old or seen.st_uid != os.getuid():
                    continue
                if folder != "starts" and stat.S_ISREG(seen.st_mode):
                    path.unlink()
                elif folder == "starts" and stat.S_ISDIR(seen.st_mode) and not {*_listed(path)} - {"key"}:
                    (path / "key").unlink(missing_ok=True)
                    path.rmdir()


def _listed(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def gpu_hours(job: Job) -> float:
    """Return the GPU hours that a job took, or will at most."""
    ticket = job.ticket
    ran = ticket.seen - float(ticket.events[0]["at"]) if ticket.events else 0.0
    return ticket.gpus * (max(0.0, ran) if job.over else ticket.walltime) / 3600


def failure(job: Job) -> JobFailedError:
    """Return the error of a job that ended: state, reason, last lines."""
    ticket = job.ticket
    event = next((e for e in reversed(ticket.events) if e["state"] == "failed" and e.get("log")), None)
    lines = tail(Path(event["log"]), 15) if event else tail(ticket.log, 15)
    text = "\n".join(f"    {line}" for line in lines)
    message = f"Job {ticket.job} ({', '.join(ticket.models)}) {job.phase}: {job.reason}"
    return JobFailedError(f"{message}\n{text}".rstrip(), hint=f"biollm logs {ticket.job}")


def server_log(ticket: Ticket, target: str) -> Path:
    """Return the log of the model's server; of the job while it has none, or when it has several."""
    logs = {e["model"]: e["log"] for e in ticket.events if e.get("log")}
    name = target if target in logs else ticket.models[0] if len(ticket.models) == 1 else ""
    return Path(logs[name]) if name in logs else ticket.log


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a file; none where it is missing."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines))
        return file.read().decode(errors="replace").splitlines()[-lines:]
    return []
