"""Derives the state of each submission from Slurm's queue and from its own events, records and logs.

What Slurm lacks: it forgets a job minutes after its end, and reuses ids when its state is lost. So each submission
leaves `jobs/ID.json` in the run directory, and its job appends changes of state to `jobs/ID.events`.
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
from biollm.config.paths import biollm_dir
from biollm.errors import JobFailedError, UsageError
from biollm.slurm.commands import Queue, Row
from biollm.slurm.endpoints import Endpoint
from biollm.types import known

Phase = Literal["pending", "starting", "training", "ready", "draining", "ended", "failed", "unknown"]
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_OUT_OF_MEMORY = re.compile(r"exceeded memory limit|oom.?kill|out of memory", re.IGNORECASE)
_KEPT_S = 7 * 86400
_ID = "[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}"  # uuid4().hex
_NAMES = {  # folder -> the names that biollm gives in it
    "jobs": r"\.?({id})\.(?:json|sh)(?:\.\w{{8}})?|({submission})(?:\.events|\.stop|-\d+\.master)",
    "records": r"({id})\.(?:json|new)",
    "starts": r"({id})",
}


@dataclass(frozen=True)
class Submission:
    """A job as it was submitted, with its events. Times in seconds; `submitted` by the file system's clock."""

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
    folder: Path = Path()  # of its files
    events: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Job:
    """A submission and its state. `requests`, from `status` only, are those running and waiting, by a server's start id."""

    submission: Submission
    phase: Phase
    reason: str = ""  # one sentence or Slurm's own word: why it waits, or ended
    start: str = ""  # Slurm's estimate of a pending job's start
    node: str = ""
    endpoints: tuple[Endpoint, ...] = ()  # alive
    requests: dict[str, tuple[int, int] | None] = field(default_factory=dict[str, tuple[int, int] | None])

    @property
    def over(self) -> bool:
        """Whether it has ended, in any way."""
        return self.phase in ("ended", "failed", "unknown")

    @property
    def left_s(self) -> float | None:
        """Seconds of walltime left, once a server is ready."""
        return min((endpoint.left_s for endpoint in self.endpoints), default=None)


def job_of(submission: Submission, queue: Queue, endpoints: Iterable[Endpoint], now: float) -> Job:
    """Return the job of a submission in its present state; `now` is by the file system's clock. Pure."""
    row, mine = queue.rows.get(submission.job), tuple(e for e in endpoints if e.submission == submission.id)
    events = [event for event in submission.events if event["restart"] == submission.events[-1]["restart"]]
    last = {event["model"]: event for event in events}
    ended = [event for event in last.values() if event["state"] in ("stopped", "failed")]
    failed = next((f"{e['model']}: {e['reason']}" for e in events if e["state"] == "failed"), "")
    servers = 1 if "*" in last else len(submission.models)
    draining = [event["state"] == "draining" for event in last.values()]
    reported = bool(events) and submission.seen > queue.at  # the job has written since the queue was read
    waiting = row is not None and row.state in _WAITING and not reported
    running = reported or (row is not None and not row.ended and not waiting)

    def job(phase: Phase, reason: str, **more: Any) -> Job:
        return Job(submission, phase, reason, **more)

    if row and row.ended and row.state != "COMPLETED":
        return job("failed", _cause_of_death(submission, row, failed))
    if running and ended and ended[-1]["reason"] == "cancelled":  # by Slurm's TERM; the queue will show why
        return job("draining", "cancelled")
    if ended and len(ended) >= servers and not waiting:
        return job("failed" if failed else "ended", failed or ended[-1]["reason"])
    if row and row.ended:
        return job("ended", "completed")
    if mine and len(mine) + len(ended) >= servers:  # a record is enough, even if the controller is away
        phase = "draining" if all(draining) else "ready"
        return job(phase, failed or queue.error, node=mine[0].host, endpoints=mine)
    if row and waiting:
        return job("pending", queue.error or row.reason, start=row.start)
    if row or reported or (queue.error and events):
        node = row.node if row else ""
        training = next((event["reason"] for event in last.values() if event["state"] == "training"), "")
        phase = "draining" if any(draining) else "training" if training else "starting"
        return job(phase, queue.error or failed or training, node=node, endpoints=mine)
    if queue.at <= submission.submitted or queue.error:
        return job("pending", queue.error or "submitted")
    state = submission.events[-1]["state"] if submission.events else "submitted"
    ago = now - (submission.seen or submission.submitted)
    return job("unknown", f"unknown, last seen {state} {ago:.0f} s ago; Slurm does not know the job any more")


def _cause_of_death(submission: Submission, row: Row, failed: str) -> str:
    cause = row.state if row.reason in ("", row.state, "NonZeroExitCode") else f"{row.state} ({row.reason})"
    if row.state in ("FAILED", "OUT_OF_MEMORY") and _OUT_OF_MEMORY.search("\n".join(tail(submission.log, 50))):
        cause = "out of memory of the node: raise `memory_gb_per_node`, or request more GPUs and their share"
    return f"{cause}; {failed}" if failed else cause


def save(submission: Submission, cluster: Cluster) -> Submission:
    """Write a submission; return it as it is on disk."""
    names = ("job", "models", "gpus", "walltime", "chain", "link", "links", "nodes")
    kept = {name: getattr(submission, name) for name in names}
    submission = replace(submission, folder=biollm_dir(cluster) / "jobs")
    text = json.dumps(kept | {"log": str(submission.log), "cluster": cluster.name})
    write_private(submission.folder / f"{submission.id}.json", text)
    return reload(submission, cluster)


def reload(submission: Submission, cluster: Cluster) -> Submission:
    """Return the submission with the events written since; unchanged if its file is gone."""
    return _load(submission.folder / f"{submission.id}.json", cluster) or submission


def _load(path: Path, cluster: Cluster) -> Submission | None:
    """Return a submission with its events; None if it is not this user's and cluster's, or cannot be read."""
    try:
        written, kept = path.stat(), json.loads(path.read_text())
        if kept["cluster"] != cluster.name or written.st_uid != os.getuid():
            return None
        typed = {"id": path.stem, "models": tuple(kept["models"]), "log": Path(kept["log"])}
        submission = known(Submission, kept | typed | {"submitted": written.st_mtime, "folder": path.parent})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    events = path.with_suffix(".events")
    with suppress(OSError):
        lines, seen = events.read_text().splitlines(), events.stat().st_mtime
        return replace(submission, seen=seen, events=tuple(_events(lines)))
    return submission


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError, AttributeError):  # half a line, from a full disk
            event = json.loads(line)
            if event.keys() >= {"model", "state", "reason", "restart"}:
                yield event


def submissions(cluster: Cluster) -> list[Submission]:
    """Return this user's submissions, oldest first."""
    found = (_load(path, cluster) for path in (biollm_dir(cluster) / "jobs").glob("*.json"))
    return sorted(filter(None, found), key=lambda each: each.submitted)


def find(cluster: Cluster, target: str) -> list[Submission]:
    """Return the submissions with a job's id or a model's name, oldest first; raise UsageError if there is none."""
    every = submissions(cluster)
    if found := [each for each in every if target == each.job or target in each.models]:
        return found
    names = sorted({name for each in every for name in (each.job, *each.models)})
    raise UsageError(f"There is no job or model {target!r} here.", hint=f"Known: {', '.join(names) or 'none'}.")


def sweep(cluster: Cluster, jobs: Iterable[Job] = ()) -> None:
    """Remove files with names of biollm's exact form after a week, except those of running `jobs` and live servers."""
    place = biollm_dir(cluster)
    kept = {name for job in jobs if not job.over for name in (job.submission.id, job.submission.chain) if name}
    for record in (place / "records").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # those of another cluster's jobs, too
            if time.time() - record.stat().st_mtime < _KEPT_S:
                kept |= {record.stem, json.loads(record.read_text())["submission"]}
    submission = rf"{_ID}|{re.escape(cluster.name)}-\d+"  # the latter: of a script submitted by hand
    for folder, form in _NAMES.items():
        pattern = re.compile(form.format(submission=submission, id=_ID))
        for path in () if (place / folder).is_symlink() else (place / folder).glob("*"):
            with suppress(OSError):
                name, found = pattern.fullmatch(path.name), path.lstat()
                old = time.time() - found.st_mtime > _KEPT_S
                if not name or name[name.lastindex or 0] in kept or not old or found.st_uid != os.getuid():
                    continue
                if folder != "starts" and stat.S_ISREG(found.st_mode):
                    path.unlink()
                elif folder == "starts" and stat.S_ISDIR(found.st_mode) and {*path.glob("*")} <= {path / "key"}:
                    (path / "key").unlink(missing_ok=True)
                    path.rmdir()


def gpu_hours(job: Job) -> float:
    """Return the GPU hours that a job took, or will at most."""
    submission = job.submission
    ran = submission.seen - float(submission.events[0]["at"]) if submission.events else 0.0
    return submission.gpus * (max(0.0, ran) if job.over else submission.walltime) / 3600


def failure(job: Job) -> JobFailedError:
    """Return the error of a job that ended: state, reason, last lines of its log."""
    submission = job.submission
    logs = [event["log"] for event in submission.events if event["state"] == "failed" and event.get("log")]
    lines = tail(Path(logs[-1]) if logs else submission.log, 15)
    message = f"Job {submission.job} ({', '.join(submission.models)}) {job.phase}: {job.reason}"
    return JobFailedError("\n    ".join([message, *lines]).rstrip(), hint=f"biollm logs {submission.job}")


def server_log(submission: Submission, target: str) -> Path:
    """Return the log of the model's server; the job's while there is none, or when it has several servers."""
    logs = {e["model"]: e["log"] for e in submission.events if e.get("log")}
    name = target if target in logs else submission.models[0] if len(submission.models) == 1 else ""
    return Path(logs[name]) if name in logs else submission.log


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a file; none if it is missing."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines))
        return file.read().decode(errors="replace").splitlines()[-lines:]
    return []
