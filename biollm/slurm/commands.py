"""Runs Slurm's commands, and shares one snapshot of the queue among all processes of a user.

Each command costs the controller a connection, and hangs for a minute when it is away. So all have a time limit, and
one process reads the queue for all, every 5 to 30 s. sbatch would copy the caller's environment, with its keys, into the
controller's state, so they get an allowlist.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path

from biollm._files import file_time, locked, write_private
from biollm.errors import SlurmError

POLL_S, SLOW_POLL_S = 5.0, 30.0  # between two reads of the queue: at first, and at most while all jobs wait
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF")
_ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
)  # fmt: skip
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}")
_PING = "`scontrol ping` shows whether Slurm is up."
_FIXES = (
    ("Unable to contact slurm controller|Connection refused|Socket timed out|Zero Bytes", "does not answer.", _PING),
    ("Invalid partition", "has no such partition.", "`sinfo -s` lists them; set `partition` or --partition."),
    ("Invalid account", "does not know this account here.", "`sacctmgr show assoc user=$USER` lists yours; set `account`."),
    ("Invalid qos", "does not know this qos here.", "`sacctmgr show qos` lists them; set `qos`."),
    ("Invalid feature", "has no node with this feature.", "`sinfo -o '%P %f'` lists them; set `constraint`."),
    ("time limit is invalid", "allows less time in this partition.",
     "`sinfo -o '%P %l'` shows how much; set `walltime` or --time."),
    ("generic resource", "has no such GPU.", "`sinfo -o '%P %G'` lists them; set `gpu_type` and `gpu_request`."),
    ("node configuration", "has no node with as many GPUs, CPUs or as much memory.",
     "`sinfo -o '%P %G %c %m'` lists them; set `gpus_per_node`, `gpu_type`, `cpus_per_node`, `memory_gb_per_node`."),
    ("configuration source", "is not configured on this machine.", "Run this on a login node, or set SLURM_CONF."),
    ("policy", "refuses it by a limit of your account or qos.", "`sacctmgr show assoc user=$USER` shows them."),
    ("option", "does not know one of the options.", "Look at `sbatch_options` in cluster.yaml."),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A job in the queue. `start`, of a pending job Slurm's estimate, is ISO 8601 in UTC, or ""."""

    job: str
    state: str
    reason: str
    start: str
    node: str

    @property
    def ended(self) -> bool:
        """Whether a job never leaves this state."""
        return self.state in _ENDED


@dataclass(frozen=True)
class Queue:
    """The user's jobs at the time `at` (by the file system's clock), or the `error` with the rows last seen."""

    rows: dict[str, Row]
    at: float = 0.0
    error: str = ""
    interval: float = POLL_S


def run(*command: str, timeout: float = 20, **more: str) -> str:
    """Return what one of Slurm's commands prints; `more` are further variables of its environment.

    Raises SlurmError if it refuses, does not answer within `timeout` seconds, or is not installed here.
    """
    return _run(command, timeout, more).stdout.strip()


def _run(command: Sequence[str], timeout: float, more: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    env = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"SLURM_TIME_FORMAT": "standard", **more}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        message = f"There is no {command[0]} on this machine."
        raise SlurmError(message, hint="Run this on a login node of the cluster.") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} had no answer within {timeout:.0f} s.", hint=_PING) from error
    if done.returncode == 0:
        return done
    output = " ".join(line.split("error: ")[-1] for line in done.stderr.strip().splitlines()[-3:])
    for pattern, sentence, hint in _FIXES:
        if re.search(pattern, output, re.IGNORECASE):
            raise SlurmError(f"Slurm {sentence} Its message: {output}", hint=hint)
    raise SlurmError(f"{command[0]} failed: {output or f'exit code {done.returncode}'}")


def submit(script: Path, arguments: list[str], options: list[str]) -> str:
    """Submit a script with arguments of its own; return the job's id."""
    export = f"--export={','.join(name for name in _KEPT if name in os.environ)}"
    return run("sbatch", "--parsable", export, *options, str(script), *arguments).split(";")[0]


def starts_in(script: Path) -> float:
    """Return in how many seconds Slurm would start this script, by its estimate; 0 if it has none. Raises as `run`."""
    found = _TIME.search(_run(("sbatch", "--test-only", str(script)), 20, {"TZ": "UTC"}).stderr)
    return max(0.0, datetime.fromisoformat(f"{found[0]}Z").timestamp() - time.time()) if found else 0.0


def nodes() -> dict[str, str]:
    """Return the address of each node, as the controller knows it; names need not resolve."""
    lines = run("scontrol", "-o", "show", "node").splitlines()
    found = (dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines)
    return {node["NodeName"]: node.get("NodeAddr", node["NodeName"]) for node in found if "NodeName" in node}


def queue(folder: Path, cluster: str, since: float = 0.0) -> Queue:
    """Return this user's jobs from the snapshot in `folder`, which is read again when it is too old.

    A snapshot from before the time `since`, a submission's, is too old after 5 s.
    """
    path = folder / f"queue-{cluster}-{os.getuid()}.json"
    with locked(path.with_suffix(".lock")):
        old = _load(path)
        if not 0 <= file_time(folder) - old.at < (POLL_S if old.at < since else old.interval):
            new = _next(old)
            saved = {"rows": [astuple(row) for row in new.rows.values()]}
            write_private(path, json.dumps(saved | {"error": new.error, "interval": new.interval}))
    return _load(path)


def _next(old: Queue) -> Queue:
    slower = min(SLOW_POLL_S, old.interval * 1.5)
    try:
        text = run("squeue", "-h", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T|%r|%S|%N", TZ="UTC")
    except SlurmError as error:
        return Queue(old.rows, error=str(error), interval=slower)
    rows: dict[str, Row] = {}
    for line in text.splitlines():
        words = ["" if word in ("N/A", "None") else word for word in line.split("|")]
        if len(words) == 5:
            words[3] += "+00:00" if _TIME.fullmatch(words[3]) else ""
            rows[words[0]] = Row(*words)
    all_wait = all(row.state == "PENDING" or row.ended for row in rows.values())
    states, before = ({row.job: row.state for row in each.values()} for each in (rows, old.rows))
    return Queue(rows, interval=slower if states == before and all_wait and not old.error else POLL_S)


def _load(path: Path) -> Queue:
    try:
        at, found = path.stat().st_mtime, json.loads(path.read_text())
        return Queue({row[0]: Row(*row[:5]) for row in found["rows"]}, at, found["error"], found["interval"])
    except (OSError, ValueError, KeyError, TypeError):
        return Queue({})
