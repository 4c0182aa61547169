"""Writes the `#SBATCH` lines of a job: what it asks of a site, quoted the way Slurm, not a shell, reads them. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from biollm.config import Cluster
from biollm.config.site import log_dir
from biollm.errors import ConfigError, Problem

_PLAIN = re.compile(r"[\w@%+=:,./\[\]*&|()-]*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Request:
    """What a job asks for. None leaves it to Slurm; memory in GB per node, times in seconds.

    Attributes:
        gpus: Per node.
        cpus: Per node.
        walltime: In whole minutes, as Slurm counts it.
        drain: Before the end, when the supervisor is told.
        log: Its own output; Slurm fills in %j, the job's id.
    """

    job_name: str
    nodes: int
    gpus: int
    cpus: int | None
    memory_gb: int | None
    walltime: int
    drain: int
    log: str


def request(cluster: Cluster, job_name: str, nodes: int, gpus: int) -> Request:
    """Return the request of `gpus` on each of `nodes`, with their share of the node's CPUs and memory.

    A partition that hands out whole nodes gives all of both.
    """

    def share(total: int | None) -> int | None:
        if total is None or cluster.exclusive:
            return total
        return max(1, total * max(1, gpus) // cluster.gpus_per_node)

    walltime = math.ceil(cluster.walltime / 60) * 60
    log = f"{str(log_dir(cluster)).replace('%', '%%')}/biollm-%j.log"
    cpus, memory = share(cluster.cpus_per_node), share(cluster.memory_gb_per_node)
    return Request(job_name, nodes, gpus, cpus, memory, walltime, min(cluster.drain, walltime // 4), log)


def header(cluster: Cluster, job: Request) -> Iterator[str]:
    """Yield the options of the job, one a line, without the `#SBATCH` before it.

    Raises:
        ConfigError: A value holds a line break or another control character.
    """
    options: dict[str, object] = {"job-name": job.job_name, "partition": cluster.partition}
    options |= {"account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint}
    options |= {"nodes": job.nodes, "ntasks-per-node": 1}
    if job.gpus and cluster.gpu_request == "gres":
        options["gres"] = ":".join(filter(None, ("gpu", cluster.gpu_type, str(job.gpus))))
    elif job.gpus:
        options["gpus-per-node"] = job.gpus
    days, minutes = divmod(job.walltime // 60, 1440)
    options["cpus-per-task"] = job.cpus
    options["mem"] = "0" if cluster.exclusive else job.memory_gb and f"{job.memory_gb}G"
    options["time"] = (f"{days}-" if days else "") + f"{minutes // 60:02}:{minutes % 60:02}:00"
    # B: to the supervisor alone; with several nodes it runs in a step, and only without B: do steps get it
    options["signal"] = f"{'B:' if job.nodes == 1 else ''}USR1@{job.drain}"
    options |= {"open-mode": "append", "output": job.log}
    yield from (f"--{key}={_quoted(key, value)}" for key, value in options.items() if value is not None)
    yield "--no-requeue"  # a requeued server would find its clients gone elsewhere; `up` starts another
    if cluster.exclusive:
        yield "--exclusive"
    for option in cluster.sbatch_options:
        key, equals, value = option.partition("=")
        yield _quoted("sbatch_options", key) + equals + _quoted("sbatch_options", value)


def _quoted(key: str, value: object) -> str:
    """Quote for sbatch: # begins a comment, a backslash escapes even in quotes, and $ means nothing."""
    text = str(value)
    if _CONTROL.search(text):
        message = f"{text!r} holds a line break or a control character."
        raise ConfigError([Problem("cluster.yaml", 0, f"cluster.{key}", message)])
    return text if _PLAIN.fullmatch(text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
