"""Starts model servers as Slurm jobs, waits for them, shows them and stops them.

What Slurm lacks: it knows when a job runs, not when its server answers. The only module that runs Slurm's commands,
through `_scheduler`; what is known of a job is put together in `tickets`.
"""

from __future__ import annotations

import grp
import json
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

from biollm._files import file_time, locked, private_folder, write_private
from biollm._ownership import uids
from biollm.config import Cluster, Model
from biollm.config.paths import biollm_dir, log_dir, present_dir, run_dir
from biollm.errors import SlurmError, UnavailableError, UsageError
from biollm.slurm import commands, weights
from biollm.slurm.commands import Queue
from biollm.slurm.endpoints import Endpoint, Records, Watch, ask, load
from biollm.slurm.script import LaunchScript, Options, header, render, request
from biollm.slurm.submissions import (
    Job,
    Ticket,
    failure,
    find,
    gpu_hours,
    judge,
    read,
    save,
    server_log,
    sweep,
    tail,
    tickets,
)
from biollm.slurm.supervisor import node_files

OnState = Callable[[Job], None]
T = TypeVar("T")


def up(
    models: Sequence[Model],
    cluster: Cluster,
    options: Options | None = None,
    *,
    replicas: int = 1,
    share: str = "",
    whole_nodes: bool = False,
    wait: bool = True,
    timeout: float | None = None,
    on_state: OnState | None = None,
) -> list[Job]:
    """Submit a job that serves `models` (or several, each with all of them), and wait until its servers answer.

    Args:
        models: Each gets its own GPUs and port in the job.
        cluster: The site.
        options: What differs from the site's and the models' settings.
        replicas: How many such jobs.
        share: A group that may use the servers, too.
        whole_nodes: Submit even where GPUs of a whole node would idle.
        wait: Return only when they are ready.
        timeout: Seconds to wait for all of them; the jobs stay when it passes.
        on_state: Called with each job whenever it has changed.

    Raises:
        UnavailableError: Weights or the serving environment are missing.
        DoesNotFitError, ConfigError, UsageError: The script cannot be rendered, or a site limit forbids it.
        SlurmError: Slurm refused; JobFailedError: a job ended before its servers were ready.
    """
    script = _ready_to_submit(models, cluster, options, whole_nodes)
    _check_group(share)
    with _submitting(cluster):
        new = _submit_all(script, models, cluster, options, replicas, share)
    if not wait:
        return [Job(ticket, "pending", "submitted") for ticket in new]
    return wait_for([ticket for ticket in new if ticket.link == 1], cluster, timeout=timeout, on_state=on_state)


def ensure(
    model: Model,
    cluster: Cluster,
    options: Options | None = None,
    *,
    timeout: float | None = None,
    on_state: OnState | None = None,
) -> Endpoint:
    """Return a server of `model` that is alive; start one if none is and none is on its way. Raises as `up` does."""
    return _run(ensuring(model, cluster, options, timeout=timeout, on_state=on_state))


def ensuring(
    model: Model,
    cluster: Cluster,
    options: Options | None = None,
    *,
    timeout: float | None = None,
    on_state: OnState | None = None,
) -> Generator[None, None, Endpoint]:
    """Do what `ensure` does in short steps, between which the caller waits in its own way."""
    script = _ready_to_submit([model], cluster, options, whole_nodes=False)
    with _submitting(cluster):  # of two callers at once, the second finds the first one's ticket
        coming = [job for job in status(cluster) if job.phase in ("pending", "starting", "ready")]
        mine = sorted((job for job in coming if model.key in job.ticket.models), key=lambda job: job.phase != "ready")
        ticket = mine[0].ticket if mine else _submit_all(script, [model], cluster, options, 1, "")[0]
    (job,) = yield from _waiting([ticket], cluster, timeout, on_state)
    for endpoint in job.endpoints:
        if endpoint.model == model.key:
            return endpoint
    raise failure(job)


def wait_for(
    waiting: Sequence[Ticket],
    cluster: Cluster,
    *,
    timeout: float | None = None,
    on_state: OnState | None = None,
) -> list[Job]:
    """Wait until the servers of each ticket answer a completion.

    Raises:
        JobFailedError: A job ended before; with its state, the reason and the last lines of its log.
        SlurmError: `timeout` seconds passed; the jobs stay.
    """
    return _run(_waiting(waiting, cluster, timeout, on_state))


def _run(steps: Generator[None, None, T]) -> T:
    """Take the steps one after the other; return what the last one returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        time.sleep(0.2)


def _waiting(
    waiting: Sequence[Ticket], cluster: Cluster, timeout: float | None, on_state: OnState | None
) -> Generator[None, None, list[Job]]:
    deadline = time.monotonic() + timeout if timeout is not None else None
    shown: dict[str, Job] = {}
    ready: dict[str, Job] = {}
    records, queue, asked = Records(cluster), Queue({}), -1.0
    while len(ready) < len(waiting):
        if time.monotonic() - asked >= 1:
            queue = _queue(cluster, max(ticket.submitted for ticket in waiting))
            asked = time.monotonic()
        alive, _ = records.read()
        for ticket in waiting:
            job = judge(read(ticket, cluster), queue, alive, records.now())
            if ticket.id not in ready and on_state and not _alike(job, shown.get(ticket.id)):
                on_state(job)
            shown[ticket.id] = job
            if job.over:
                raise failure(job)
            if job.phase == "ready" and ticket.id not in ready and all(map(_completes, job.endpoints)):
                ready[ticket.id] = job
        if deadline and time.monotonic() > deadline and len(ready) < len(waiting):
            states = ", ".join(f"job {job.ticket.job} is {job.phase} ({job.reason})" for job in shown.values())
            raise SlurmError(f"Not ready within {timeout:g} s: {states}.", hint="They go on: see `biollm status`.")
        yield
    return list(ready.values())


def status(cluster: Cluster) -> list[Job]:
    """Return this user's jobs that are not over, or have been for less than a day, with the requests at each server."""
    every = tickets(cluster)
    if not every:
        return []
    newest = {ticket.job: ticket for ticket in every}  # a controller that lost its state counts from 1 again
    queue = _queue(cluster, max((ticket.submitted for ticket in every), default=0))
    gone = replace(queue, rows={})
    alive, now = Watch(cluster).refresh(), file_time(present_dir(cluster))
    jobs = [judge(ticket, queue if newest[ticket.job] is ticket else gone, alive, now) for ticket in every]
    jobs = [job for job in jobs if not job.over or now - max(job.ticket.submitted, job.ticket.seen) < 86400]
    return [replace(job, requests={e.start: load(e) for e in job.endpoints}) for job in jobs]


def logs(cluster: Cluster, target: str, *, lines: int = 50, follow: bool = False) -> Iterator[str]:
    """Yield the last lines of the log of a job (by id) or of a model's newest server, then what comes, until it is over.

    Raises:
        UsageError: There is no such job or model.
    """
    ticket = find(cluster, target)[-1]
    path = server_log(ticket, target)
    yield from tail(path, lines)
    at = path.stat().st_size if path.exists() else 0
    while follow:
        over = judge(read(ticket, cluster), _queue(cluster), Records(cluster).read()[0], 0).over
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(at)
                yield from (line.rstrip("\n") for line in file)
                at = file.tell()
        if over:
            return
        time.sleep(0.5)


def down(cluster: Cluster, target: str | None = None, *, wait: bool = True) -> list[Ticket]:
    """Stop the jobs of a model, a job by its id, or (None) all: servers leave routing, finish what runs, and stop.

    Raises:
        UsageError: There is no such job or model.
    """
    every = tickets(cluster)
    chosen = every if target is None else find(cluster, target)
    chains = {ticket.chain for ticket in chosen if ticket.chain}
    chosen += [ticket for ticket in every if ticket.chain in chains and ticket not in chosen]
    jobs = [job for job in _judged(chosen, cluster) if not job.over]
    for job in jobs:  # whoever starts meanwhile finds the mark
        (job.ticket.folder / f"{job.ticket.chain or job.ticket.id}.stop").touch(mode=0o600)
    if jobs:
        commands.run("scancel", "--state=PENDING", *(job.ticket.job for job in jobs))
    for flags, spans in (["--batch"], False), ([], True):  # a job on several nodes runs in a step
        if running := [job.ticket.job for job in jobs if (job.ticket.nodes > 1) == spans]:
            commands.run("scancel", "--state=RUNNING", "--signal=USR1", *flags, *running)
    if wait:
        _await_end([job.ticket for job in jobs], cluster)
    return [job.ticket for job in jobs]


def missing(models: Sequence[Model], cluster: Cluster) -> Iterator[UnavailableError]:
    """Yield what is not there yet of weights and serving environment, each with the command that mends it."""
    for model in models:
        found = weights.present(model, cluster)
        if isinstance(found, str):
            yield UnavailableError(found)
    venv, image = cluster.environment.venv, cluster.environment.container or ""
    if venv and not (venv / "bin" / "vllm").exists():
        mend = f"python3 -m venv {venv} && {venv}/bin/pip install vllm"
        yield UnavailableError(f"There is no vLLM in {venv}.", hint=mend)
    if image.startswith("/") and not Path(image).exists():
        mend = f"{cluster.environment.container_command} pull {image} docker://vllm/vllm-openai:latest"
        yield UnavailableError(f"There is no container image {image}.", hint=mend)


def _check_group(share: str) -> None:
    groups: set[str] = set()
    for number in os.getgroups():
        with suppress(KeyError):
            groups.add(grp.getgrgid(number).gr_name)
    if share and share not in groups:
        hint = f"Yours are: {', '.join(sorted(groups))}."
        raise UsageError(f"You are not in a group named {share!r}.", hint=hint)


def try_one_gpu(cluster: Cluster) -> None:
    """Ask Slurm whether it would take a job of one GPU; raises `SlurmError` with its reason and the mend."""
    options = header(cluster, request(cluster, "biollm-doctor", nodes=1, gpus=1))
    with NamedTemporaryFile("w", suffix=".sh") as script:
        script.write("".join(["#!/bin/bash\n", *(f"#SBATCH {option}\n" for option in options), "true\n"]))
        script.flush()
        commands.run("sbatch", "--test-only", script.name)


def _ready_to_submit(
    models: Sequence[Model], cluster: Cluster, options: Options | None, whole_nodes: bool
) -> LaunchScript:
    script = render(models, cluster, options)
    if script.idle_gpus and not whole_nodes:
        raise UsageError(script.warnings[-1], hint="--yes submits it all the same.")
    for problem in missing(models, cluster):
        raise problem
    return script


def _submit_all(
    script: LaunchScript, models: Sequence[Model], cluster: Cluster, options: Options | None, replicas: int, share: str
) -> list[Ticket]:
    handover = cluster.handover if options is None or options.handover is None else options.handover
    links, asked = cluster.max_chain if handover else 1, script.request
    count = replicas * links
    hours = count * script.gpus * asked.walltime / 3600
    known = status(cluster)
    check_limits(cluster, known, jobs=count, gpus=replicas * script.gpus * min(links, 2), hours=hours)
    prepare(cluster)
    sweep(cluster, known)
    if share:
        _share(cluster, share)
    lead = (asked.drain or 0) + 2 * _start_time(models, cluster, asked.walltime)
    minutes = int(asked.walltime - lead) // 60
    new: list[Ticket] = []
    for _ in range(replicas):
        chain = uuid.uuid4().hex if links > 1 else ""
        for link in range(1, links + 1):
            ticket = Ticket(uuid.uuid4().hex, "", tuple(model.key for model in models), script.gpus,
                            asked.walltime, Path(), chain, link, links, asked.nodes)  # fmt: skip
            later = f"+{minutes}" if minutes > 0 else ""  # Slurm refuses +0
            after = [f"--dependency=after:{new[-1].job}{later}"] if link > 1 else []
            try:
                new.append(_submit(script, cluster, ticket, after, share))
            except SlurmError:
                if new:  # all or none
                    commands.run("scancel", *(ticket.job for ticket in new))
                raise
    return new


def check_limits(cluster: Cluster, known: Sequence[Job], *, jobs: int, gpus: int, hours: float) -> None:
    """Hold a start against the site's limits: max_jobs, max_gpus and gpu_hours_per_day.

    Args:
        cluster: The site.
        known: The jobs of the last day.
        jobs: Jobs to come.
        gpus: GPUs that they hold at a time.
        hours: GPU hours of their whole walltimes.

    Raises:
        UsageError: One would be exceeded; names it.
    """
    active = [job.ticket for job in known if not job.over]
    for name, limit, have, more in (
        ("max_jobs", cluster.max_jobs, len(active), jobs),
        ("max_gpus", cluster.max_gpus, sum(ticket.gpus for ticket in active), gpus),
        ("gpu_hours_per_day", cluster.gpu_hours_per_day, sum(map(gpu_hours, known)), hours),
    ):
        if limit is not None and have + more > limit:
            raise UsageError(
                f"{name} of this site is {limit:g}: {have:g} are taken, this would take {more:g} more.",
                hint="`biollm status` shows what runs, `biollm down` stops it. A handover holds its GPUs twice.",
            )


def _start_time(models: Sequence[Model], cluster: Cluster, walltime: float) -> float:
    """Seconds that these models took to start the last time; a guess where they never did."""
    times = {e["model"]: float(e["took_s"]) for t in tickets(cluster) for e in t.events if e.get("took_s")}
    return max(times.get(model.key, min(model.start_timeout, walltime / 8)) for model in models)


def prepare(cluster: Cluster, *, plain: bool = False) -> None:
    """Write what a job reads: its folders, the supervisor's files or a plain script's key, the nodes' addresses.

    Raises:
        SlurmError: A file of the supervisor is not what this version writes, or Slurm does not answer.
        OSError: The run directory cannot be written.
    """
    folder = _own_dir(cluster)
    private_folder(log_dir(cluster))
    for path, text in node_files(cluster).items():
        if not path.exists():
            write_private(path, text)
            path.chmod(0o644)
        if path.stat().st_uid not in uids(cluster.trusted_owners) or path.read_text() != text:
            raise SlurmError(f"{path} is not what this version put there.", hint="Remove it, or use your own run_dir.")
    if plain and not (key := plain_key_file(cluster)).exists():
        write_private(key, secrets.token_urlsafe(32))
    nodes = folder / f"nodes-{cluster.name}.json"
    write_private(nodes, json.dumps(commands.nodes()))
    nodes.chmod(0o644)


def plain_key_file(cluster: Cluster) -> Path:
    """Return where this user's key for servers of plain scripts lies."""
    return biollm_dir(cluster) / f"plain-{os.getuid()}.key"


def _share(cluster: Cluster, group: str) -> None:
    """Open what a client reads to a group."""
    folder = biollm_dir(cluster)
    for path in (run_dir(cluster), folder, folder / "records", folder / "starts"):
        shutil.chown(path, group=group)
        path.chmod(path.stat().st_mode & 0o7777 | 0o050)


def _submit(script: LaunchScript, cluster: Cluster, ticket: Ticket, options: list[str], share: str) -> Ticket:
    path = biollm_dir(cluster) / "jobs" / f"{ticket.id}.sh"
    write_private(path, script.text)
    arguments = ["--submission", ticket.id, *(["--share", share] if share else [])]
    if ticket.chain:
        arguments += ["--chain", ticket.chain, "--link", str(ticket.link), "--links", str(ticket.links)]
    job = commands.submit(path, arguments, options)
    log = Path(script.request.log.replace("%%", "%").replace("%j", job))
    return save(replace(ticket, job=job, log=log), cluster)


def _submitting(cluster: Cluster) -> AbstractContextManager[None]:
    return locked(_own_dir(cluster) / f"submit-{os.getuid()}.lock")


def _own_dir(cluster: Cluster) -> Path:
    """Make biollm's own folder and return it: open to whom the run directory is, as a lab's common folder stays common."""
    folder, own = private_folder(run_dir(cluster)), biollm_dir(cluster)
    mode = folder.stat().st_mode & 0o7777
    for path in (own, *(own / name for name in ("records", "starts", "jobs", "lib"))):
        with suppress(FileExistsError):
            path.mkdir()
            path.chmod(mode)
    return own


def _queue(cluster: Cluster, since: float = 0.0) -> Queue:
    return commands.queue(present_dir(cluster), cluster.name, since)


def _judged(chosen: Sequence[Ticket], cluster: Cluster) -> list[Job]:
    queue, alive, now = _queue(cluster), Records(cluster).read()[0], file_time(present_dir(cluster))
    return [judge(read(ticket, cluster), queue, alive, now) for ticket in chosen]


def _alike(job: Job, shown: Job | None) -> bool:
    return shown is not None and (job.phase, job.reason, job.start) == (shown.phase, shown.reason, shown.start)


def _completes(endpoint: Endpoint) -> bool:
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 1}
    with suppress(OSError):
        return ask(endpoint, "POST", "/v1/completions", body, timeout=60)[0] == 200
    return False


def _await_end(stopping: Sequence[Ticket], cluster: Cluster) -> None:
    """Wait until the jobs are over; cancel those that do not drain in time."""
    deadline = time.monotonic() + cluster.drain + 30
    while waiting := [job.ticket for job in _judged(stopping, cluster) if not job.over]:
        if time.monotonic() > deadline:
            commands.run("scancel", *(ticket.job for ticket in waiting))
            return
        time.sleep(0.5)
