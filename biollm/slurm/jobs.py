"""Starts model servers as Slurm jobs, waits for them, shows them and stops them.

What Slurm lacks: it knows when a job runs, not when its server answers.
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

from biollm._files import file_time, locked, private_folder, write_private, write_readable
from biollm._ownership import uids
from biollm.config import Cluster, Model
from biollm.config.paths import biollm_dir, log_dir, run_dir
from biollm.errors import SlurmError, UnavailableError, UsageError
from biollm.slurm import commands, submissions, vllm_flags, weights
from biollm.slurm.commands import Queue
from biollm.slurm.endpoints import Endpoint, Records, Watch, ask, load
from biollm.slurm.script import JobRequest, LaunchScript, Options, header, node_files, render, request
from biollm.slurm.submissions import Job, Submission, failure, find, gpu_hours, job_of

Timeout = float | None  # seconds to wait; the jobs stay when it passes
OnState = Callable[[Job], None] | None  # called with each job whenever it has changed
T = TypeVar("T")


def up(
    models: Sequence[Model], cluster: Cluster, options: Options | None = None, *, replicas: int = 1, share: str = "",
    whole_nodes: bool = False, wait: bool = True, timeout: Timeout = None, on_state: OnState = None,
) -> list[Job]:  # fmt: skip
    """Submit `replicas` jobs, each with a server of each model, and wait until the servers answer.

    Args:
        share: A group that may use the servers, too.
        whole_nodes: Submit even if GPUs of a whole node would be idle.

    Raises:
        UnavailableError: Weights or the serving environment are missing.
        DoesNotFitError, ConfigError, UsageError: The script cannot be rendered, or a site limit forbids it.
        SlurmError: Slurm refused; JobFailedError: a job ended before its servers were ready.
    """
    options = options or Options()
    script = _ready_to_submit(models, cluster, options, whole_nodes)
    _check_group(share)
    with _submit_lock(cluster):
        new = _submit_all(script, models, cluster, options, replicas, share)
    if not wait:
        return [Job(submission, "pending", "submitted") for submission in new]
    first = [submission for submission in new if submission.link == 1]
    return wait_for(first, cluster, timeout=timeout, on_state=on_state)


def ensure(
    model: Model, cluster: Cluster, options: Options | None = None, *, timeout: Timeout = None, on_state: OnState = None
) -> Endpoint:
    """Return a live server of `model`; start one unless one is live or on its way. Raises as `up` does."""
    return _run(ensuring(model, cluster, options, timeout=timeout, on_state=on_state))


def ensuring(
    model: Model, cluster: Cluster, options: Options | None = None, *, timeout: Timeout = None, on_state: OnState = None
) -> Generator[None, None, Endpoint]:
    """Do what `ensure` does in short steps, between which the caller waits in its own way."""
    options = options or Options()
    script = _ready_to_submit([model], cluster, options, whole_nodes=False)
    with _submit_lock(cluster):  # of two callers at once, the second finds the first one's submission
        active = [job for job in status(cluster) if job.phase in ("pending", "starting", "ready")]
        mine = [job for job in active if model.key in job.submission.models]
        best = min(mine, key=lambda job: job.phase != "ready", default=None)
        new = best.submission if best else _submit_all(script, [model], cluster, options, 1, "")[0]
    (job,) = yield from _waiting([new], cluster, timeout, on_state)
    for endpoint in job.endpoints:
        if endpoint.model == model.key:
            return endpoint
    raise failure(job)


def submit(script: LaunchScript, model: Model, cluster: Cluster) -> Submission:
    """Submit one job of a script that is named as `model`, within the site's limits; raises as `up`."""
    with _submit_lock(cluster):
        return _submit_all(script, [model], cluster, Options(handover=False), 1, "")[0]


def wait_until_over(submission: Submission, cluster: Cluster, on_state: Callable[[Job], None]) -> Job:
    """Wait until a job has ended; raise JobFailedError if it failed."""
    shown = ("", "")
    while not (job := _jobs([submission], cluster)[0]).over:
        if shown != (shown := (job.phase, job.reason)):
            on_state(job)
        time.sleep(0.5)
    if job.phase == "failed":
        raise failure(job)
    return job


def wait_for(
    waiting: Sequence[Submission], cluster: Cluster, *, timeout: Timeout = None, on_state: OnState = None
) -> list[Job]:
    """Wait until the servers of each submission answer a completion.

    Raises:
        JobFailedError: A job ended before; with its state, the reason and the last lines of its log.
        SlurmError: `timeout` seconds passed; the jobs stay.
    """
    return _run(_waiting(waiting, cluster, timeout, on_state))


def _run(steps: Generator[None, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        time.sleep(0.2)


def _waiting(
    waiting: Sequence[Submission], cluster: Cluster, timeout: Timeout, on_state: OnState
) -> Generator[None, None, list[Job]]:
    deadline = time.monotonic() + timeout if timeout is not None else None
    jobs: dict[str, Job] = {}
    ready: dict[str, Job] = {}
    records, queue, polled = Records(cluster), Queue({}), -1.0
    while len(ready) < len(waiting):
        if time.monotonic() - polled >= 1:
            queue = commands.queue(biollm_dir(cluster), cluster.name, max(each.submitted for each in waiting))
            polled = time.monotonic()
        alive, _ = records.read()
        for submission in waiting:
            job = job_of(submissions.reload(submission, cluster), queue, alive, records.now())
            old, jobs[submission.id] = jobs.get(submission.id), job
            same = old and (old.phase, old.reason, old.start) == (job.phase, job.reason, job.start)
            if on_state and not same and submission.id not in ready:
                on_state(job)
            if job.over:
                raise failure(job)
            if job.phase == "ready" and submission.id not in ready and all(map(_completes, job.endpoints)):
                ready[submission.id] = job
        if deadline and time.monotonic() > deadline and len(ready) < len(waiting):
            states = ", ".join(f"job {job.submission.job} is {job.phase} ({job.reason})" for job in jobs.values())
            raise SlurmError(f"Not ready within {timeout:g} s: {states}.", hint="They continue: see `biollm status`.")
        yield
    return list(ready.values())


def status(cluster: Cluster) -> list[Job]:
    """Return this user's jobs that are not over, or ended less than a day ago, with the requests at each server."""
    every = submissions.submissions(cluster)
    if not every:
        return []
    newest = {each.job: each for each in every}  # a controller that lost its state counts from 1 again
    queue = commands.queue(biollm_dir(cluster), cluster.name, max(each.submitted for each in every))
    without = replace(queue, rows={})
    alive, now = Watch(cluster).refresh(), file_time(biollm_dir(cluster))
    jobs = [job_of(each, queue if newest[each.job] is each else without, alive, now) for each in every]
    recent = [job for job in jobs if not job.over or now - max(job.submission.submitted, job.submission.seen) < 86400]
    return [replace(job, requests={e.start: load(e) for e in job.endpoints}) for job in recent]


def logs(cluster: Cluster, target: str, *, lines: int = 50, follow: bool = False) -> Iterator[str]:
    """Yield the last lines of the log of a job (by id) or of a model's newest server; then new ones, until it is over."""
    submission = find(cluster, target)[-1]
    path = submissions.server_log(submission, target)
    yield from submissions.tail(path, lines)
    at = path.stat().st_size if path.exists() else 0
    while follow:
        (job,) = _jobs([submission], cluster)
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(at)
                yield from (line.rstrip("\n") for line in file)
                at = file.tell()
        if job.over:
            return
        time.sleep(0.5)


def down(cluster: Cluster, target: str | None = None, *, wait: bool = True) -> list[Submission]:
    """Stop the jobs of a model, a job by its id, or (None) all: servers leave routing, drain, and stop."""
    every = submissions.submissions(cluster)
    chosen = every if target is None else find(cluster, target)
    chains = {each.chain for each in chosen if each.chain}
    chosen += [each for each in every if each.chain in chains and each not in chosen]
    stopping = [job.submission for job in _jobs(chosen, cluster) if not job.over]
    for each in stopping:  # one that starts meanwhile finds the mark
        (each.folder / f"{each.chain or each.id}.stop").touch(mode=0o600)
    if stopping:
        commands.run("scancel", "--state=PENDING", *(each.job for each in stopping))
    for flags, spans in (["--batch"], False), ([], True):  # a job on several nodes runs in a step
        if running := [each.job for each in stopping if (each.nodes > 1) == spans]:
            commands.run("scancel", "--state=RUNNING", "--signal=USR1", *flags, *running)
    if wait:
        _await_end(stopping, cluster)
    return stopping


def missing(models: Sequence[Model], cluster: Cluster) -> Iterator[UnavailableError]:
    """Yield what is missing of weights and serving environment, each with the command that fixes it."""
    for model in models:
        found = weights.present(model, cluster)
        if isinstance(found, str):
            yield UnavailableError(found)
    venv, image = cluster.environment.venv, cluster.environment.container or ""
    if venv and not (venv / "bin" / "vllm").exists():
        fix = f"python3 -m venv {venv} && {venv}/bin/pip install '{vllm_flags.requirement()}'"
        yield UnavailableError(f"There is no vLLM in {venv}.", hint=fix)
    if image.startswith("/") and not Path(image).exists():
        fix = f"{cluster.environment.container_command} pull {image} docker://vllm/vllm-openai:latest"
        yield UnavailableError(f"There is no container image {image}.", hint=fix)


def try_one_gpu(cluster: Cluster) -> None:
    """Check that Slurm would take a job of one GPU; raises `SlurmError` with its reason and a fix."""
    _starts_in(cluster, request(cluster, "biollm-doctor", nodes=1, gpus=1))


def answers_in(model: Model, cluster: Cluster) -> float:
    """Return in how many seconds a server submitted now would answer: Slurm's estimate, and its last time to start.

    Raises SlurmError where Slurm would refuse the job, or as `up` where its script cannot be rendered.
    """
    job = render([model], cluster).request
    return _starts_in(cluster, job) + _start_time([model], cluster, job.walltime)


def _starts_in(cluster: Cluster, job: JobRequest) -> float:
    options = header(cluster, job)
    with NamedTemporaryFile("w", suffix=".sh") as script:
        script.write("".join(["#!/bin/bash\n", *(f"#SBATCH {option}\n" for option in options), "true\n"]))
        script.flush()
        return commands.starts_in(Path(script.name))


def prepare(cluster: Cluster, *, plain: bool = False) -> None:
    """Write what a job reads: its folders, the supervisor's files or a plain script's key, the nodes' addresses."""
    folder = make_biollm_dir(cluster)
    private_folder(log_dir(cluster))
    for path, text in node_files(cluster).items():
        if not path.exists():
            write_readable(path, text)
        if path.stat().st_uid not in uids(cluster.trusted_owners) or path.read_text() != text:
            raise SlurmError(f"{path} is not what this version put there.", hint="Remove it, or use your own run_dir.")
    if plain and not (key := plain_key_file(cluster)).exists():
        write_private(key, secrets.token_urlsafe(32))
    write_readable(folder / f"nodes-{cluster.name}.json", json.dumps(commands.nodes()))


def plain_key_file(cluster: Cluster) -> Path:
    """Return the path of this user's key for servers of plain scripts."""
    return biollm_dir(cluster) / f"plain-{os.getuid()}.key"


def _check_group(share: str) -> None:
    groups: set[str] = set()
    for number in os.getgroups():
        with suppress(KeyError):
            groups.add(grp.getgrgid(number).gr_name)
    if share and share not in groups:
        raise UsageError(f"You are not in a group named {share!r}.", hint=f"Yours are: {', '.join(sorted(groups))}.")


def _ready_to_submit(models: Sequence[Model], cluster: Cluster, options: Options, whole_nodes: bool) -> LaunchScript:
    script = render(models, cluster, options)
    if script.idle_gpus and not whole_nodes:
        raise UsageError(script.warnings[-1], hint="--yes submits it anyway.")
    for problem in missing(models, cluster):
        raise problem
    return script


def _submit_all(
    script: LaunchScript, models: Sequence[Model], cluster: Cluster, options: Options, replicas: int, share: str
) -> list[Submission]:
    handover = cluster.handover if options.handover is None else options.handover
    links, walltime = cluster.max_chain if handover else 1, script.request.walltime
    count, known = replicas * links, status(cluster)
    gpus, hours = replicas * script.gpus * min(links, 2), count * script.gpus * walltime / 3600
    check_limits(cluster, known, jobs=count, gpus=gpus, hours=hours)
    prepare(cluster)
    submissions.sweep(cluster, known)
    if share:
        _share_with(share, cluster)
    lead = (script.request.drain or 0) + 2 * _start_time(models, cluster, walltime)
    delay = int(walltime - lead) // 60  # minutes from the start of one link to that of the next
    new: list[Submission] = []
    for _ in range(replicas):
        chain = uuid.uuid4().hex if links > 1 else ""
        for link in range(1, links + 1):
            submission = Submission(
                id=uuid.uuid4().hex, job="", models=tuple(model.key for model in models), gpus=script.gpus,
                walltime=walltime, log=Path(), chain=chain, link=link, links=links, nodes=script.request.nodes,
            )  # fmt: skip
            later = f"+{delay}" if delay > 0 else ""  # Slurm refuses +0
            after = [f"--dependency=after:{new[-1].job}{later}"] if link > 1 else []
            try:
                new.append(_submit(script, cluster, submission, after, share))
            except SlurmError:
                if new:  # all or none
                    commands.run("scancel", *(each.job for each in new))
                raise
    return new


def _submit(
    script: LaunchScript, cluster: Cluster, submission: Submission, options: list[str], share: str
) -> Submission:
    path = biollm_dir(cluster) / "jobs" / f"{submission.id}.sh"
    write_private(path, script.text)
    arguments = ["--submission", submission.id, *(["--share", share] if share else [])]
    if submission.chain:
        arguments += ["--chain", submission.chain, "--link", str(submission.link), "--links", str(submission.links)]
    job = commands.submit(path, arguments, options)
    log = Path(script.request.log.replace("%%", "%").replace("%j", job))
    return submissions.save(replace(submission, job=job, log=log), cluster)


def check_limits(cluster: Cluster, known: Sequence[Job], *, jobs: int, gpus: int, hours: float) -> None:
    """Raise UsageError if new jobs would exceed max_jobs, max_gpus or gpu_hours_per_day of the site.

    Args:
        known: The jobs of the last day.
        gpus: That the new jobs hold at a time.
        hours: GPU hours of their whole walltimes.
    """
    active = [job.submission for job in known if not job.over]
    for name, limit, have, more in (
        ("max_jobs", cluster.max_jobs, len(active), jobs),
        ("max_gpus", cluster.max_gpus, sum(each.gpus for each in active), gpus),
        ("gpu_hours_per_day", cluster.gpu_hours_per_day, sum(map(gpu_hours, known)), hours),
    ):
        if limit is not None and have + more > limit:
            raise UsageError(
                f"{name} of this site is {limit:g}: {have:g} are taken, this would take {more:g} more.",
                hint="`biollm status` shows what runs, `biollm down` stops it. A handover holds its GPUs twice.",
            )


def _start_time(models: Sequence[Model], cluster: Cluster, walltime: float) -> float:
    """Return the seconds that these models took to start the last time; a guess if they never did."""
    known = submissions.submissions(cluster)
    times = {event["model"]: float(event["took_s"]) for each in known for event in each.events if event.get("took_s")}
    return max(times.get(model.key, min(model.start_timeout, walltime / 8)) for model in models)


def _share_with(group: str, cluster: Cluster) -> None:
    folder = biollm_dir(cluster)
    for path in (run_dir(cluster), folder, folder / "records", folder / "starts"):
        shutil.chown(path, group=group)
        path.chmod(path.stat().st_mode & 0o7777 | 0o050)


def _submit_lock(cluster: Cluster) -> AbstractContextManager[bool]:
    return locked(make_biollm_dir(cluster) / f"submit-{os.getuid()}.lock")


def make_biollm_dir(cluster: Cluster) -> Path:
    """Make biollm's own folder, with the mode of the run directory: a lab's common folder stays common. Return it."""
    folder, own = private_folder(run_dir(cluster)), biollm_dir(cluster)
    mode = folder.stat().st_mode & 0o7777
    for path in (own, *(own / name for name in ("records", "starts", "jobs", "lib"))):
        with suppress(FileExistsError):
            path.mkdir()
            path.chmod(mode)
    return own


def _jobs(chosen: Sequence[Submission], cluster: Cluster) -> list[Job]:
    queue = commands.queue(folder := biollm_dir(cluster), cluster.name)
    alive, now = Records(cluster).read()[0], file_time(folder)
    return [job_of(submissions.reload(each, cluster), queue, alive, now) for each in chosen]


def _completes(endpoint: Endpoint) -> bool:
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 1}
    with suppress(OSError):
        return ask(endpoint, "POST", "/v1/completions", body, timeout=60)[0] == 200
    return False


def _await_end(stopping: Sequence[Submission], cluster: Cluster) -> None:
    """Wait until the jobs are over; cancel those that do not drain in time."""
    deadline = time.monotonic() + cluster.drain + 30
    while waiting := [job.submission for job in _jobs(stopping, cluster) if not job.over]:
        if time.monotonic() > deadline:
            commands.run("scancel", *(each.job for each in waiting))
            return
        time.sleep(0.5)
