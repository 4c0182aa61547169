"""What goes wrong on a cluster, on a real Slurm; the servers are quick stand-ins, since vLLM is not what breaks here."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback
from slurm_lab import SlurmLab, wait_until

from biollm import slurm
from biollm.client import get_model_client
from biollm.config import Cluster, Model
from biollm.errors import JobFailedError, SlurmError, UsageError
from biollm.slurm.endpoints import Records, Watch, ask, read_key
from biollm.slurm.script import Options
from biollm.slurm.submissions import Job

pytestmark = pytest.mark.real
Make = Callable[..., Model]


def end_of(site: Cluster, job: Job, seconds: float = 40) -> Job:
    """Wait until the job is over; return how it ended."""

    def over() -> Job | None:
        return next((now for now in slurm.status(site) if now.over and now.submission.id == job.submission.id), None)

    wait_until(over, seconds, "the job's end")
    return over() or job


def occupy(lab: SlurmLab) -> None:
    """Fill the cluster."""
    job = lab.run(
        "sbatch", "--parsable", "--exclusive", "--nodes=3", "--time=30", "--output=/dev/null", "--wrap", "sleep 300"
    )
    wait_until(lambda: lab.run("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING", 40, "the whole cluster")


def test_a_server_is_up_found_used_shown_and_taken_down(site: Cluster, model: Make, seen: list[Job]) -> None:
    (job,) = slurm.up([model()], site, on_state=seen.append)
    assert [state.phase for state in seen][-1] == "ready"
    (endpoint,) = Watch(site).alive()
    assert (endpoint.job, endpoint.model, endpoint.host) == (job.submission.job, "m", job.node)
    assert ask(endpoint, "GET", "/v1/models", timeout=10)[0] == 200
    (now,) = slurm.status(site)
    assert now.requests == {endpoint.start: None}  # this one keeps no figures; real ones do in test_serving.py
    assert 500 < (now.left_s or 0) <= 600
    assert any("fake vLLM" in line for line in slurm.logs(site, "m"))
    assert [submission.id for submission in slurm.down(site, "m")] == [job.submission.id]
    assert Watch(site).alive() == ()
    (now,) = slurm.status(site)
    assert (now.phase, now.reason) == ("ended", "down")


def test_no_key_of_the_caller_reaches_the_controller_or_the_job(
    lab: SlurmLab, site: Cluster, model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-in-the-caller")
    (job,) = slurm.up([model()], site)
    key = read_key(job.endpoints[0])
    assert lab.run("scontrol", "write", "batch_script", job.submission.job, "-")
    for path in [*lab.root.rglob("*"), *Path(str(site.run_dir)).rglob("*")]:
        if stat.S_ISREG(path.lstat().st_mode):
            text = path.read_bytes()
            assert b"sk-planted-in-the-caller" not in text, path
            assert key.encode() not in text or path.name == "key", path
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ, arguments = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        assert key.encode() not in environ + arguments
        assert b"sk-planted-in-the-caller" not in environ or b"SLURM_JOB_ID" not in environ


def test_several_models_share_a_job_each_with_its_own_gpus(site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model("a", gpus_required=2), model("b", gpus_required=2)], site)
    ports = {endpoint.base_url for endpoint in job.endpoints}
    assert sorted(endpoint.model for endpoint in job.endpoints) == ["a", "b"]
    assert len(ports) == 2
    devices = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = dict(e.split(b"=", 1) for e in (process / "environ").read_bytes().split(b"\0") if b"=" in e)
        except OSError:
            continue
        if environ.get(b"SLURM_JOB_ID") == job.submission.job.encode() and b"BIOLLM_START" in environ:
            devices.add(environ[b"CUDA_VISIBLE_DEVICES"])
    assert devices == {b"0,1", b"2,3"}


def test_when_one_of_several_models_dies_the_others_stay(site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model("a", "die:4"), model("b")], site)
    wait_until(lambda: [e.model for e in Watch(site).alive()] == ["b"], 20, "the record's end")
    wait_until(lambda: slurm.status(site)[0].reason == "a: the server ended by exit code 5", 5, "the reason")
    (now,) = slurm.status(site)
    assert (now.phase, now.submission.id) == ("ready", job.submission.id)


def test_replicas_get_their_own_ports_and_keys(site: Cluster, model: Make) -> None:
    jobs = slurm.up([model()], site, replicas=2)
    first, second = (job.endpoints[0] for job in jobs)
    assert first.base_url != second.base_url
    assert read_key(first) != read_key(second)


@pytest.mark.parametrize(
    ("fake", "reason", "lines"),
    [
        ("crash", "exit code 3", "ValueError: the weights are broken"),
        ("refuse", "first completion failed", "fake vLLM"),
    ],
)
def test_a_server_that_dies_at_start_ends_up_with_reason_and_log(
    site: Cluster, model: Make, fake: str, reason: str, lines: str
) -> None:
    with pytest.raises(JobFailedError, match=reason) as caught:
        slurm.up([model(fake=fake)], site)
    assert lines in str(caught.value)


def test_a_start_that_takes_too_long(site: Cluster, model: Make) -> None:
    with pytest.raises(JobFailedError, match="not ready within the start timeout of 2 s"):
        slurm.up([model(fake="mute", start_timeout=2)], site)


def test_out_of_memory_of_the_node(site: Cluster, model: Make) -> None:
    small = site.model_copy(update={"memory_gb_per_node": 8, "gpus_per_node": 8})
    with pytest.raises(JobFailedError, match="out of memory of the node"):
        slurm.up([model(fake="eat")], small)


def test_a_cancelled_job(lab: SlurmLab, site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model()], site)
    lab.run("scancel", job.submission.job)
    wait_until(lambda: Watch(site).alive() == (), 3, "the record's end")
    assert end_of(site, job).reason == "CANCELLED"


def test_a_job_cancelled_while_it_waits(lab: SlurmLab, site: Cluster, model: Make, seen: list[Job]) -> None:
    occupy(lab)
    (job,) = slurm.up([model()], site, wait=False)
    threading.Timer(1, lab.run, ("scancel", job.submission.job)).start()
    with pytest.raises(JobFailedError, match="CANCELLED"):
        slurm.wait_for([job.submission], site, on_state=seen.append)


def test_a_full_cluster_says_why_it_waits(lab: SlurmLab, site: Cluster, model: Make, seen: list[Job]) -> None:
    occupy(lab)
    with pytest.raises(
        SlurmError, match=r"Not ready within 8 s: job \d+ is pending \((Resources|Priority)\)"
    ) as caught:
        slurm.up([model()], site, timeout=8, on_state=seen.append)
    assert "biollm status" in str(caught.value.hint)
    assert seen[-1].start.startswith("20")  # Slurm's own estimate


def test_the_end_of_the_walltime(lab: SlurmLab, site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model()], site.model_copy(update={"drain": 1}))
    lab.run("scontrol", "update", f"jobid={job.submission.job}", "EndTime=now+3seconds")
    wait_until(lambda: Watch(site).alive() == (), 60, "the record's end")
    assert "TIMEOUT" in (reason := end_of(site, job, 60).reason) or reason == "walltime"


def test_a_preempted_job(lab: SlurmLab, site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model()], site.model_copy(update={"partition": "preempt"}))
    lab.run("sbatch", "--partition=gpu", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap", "sleep 60")
    wait_until(lambda: Watch(site).alive() == (), 20, "the record's end")
    assert end_of(site, job).reason in ("PREEMPTED", "CANCELLED")


def test_a_requeued_job_comes_back_with_a_new_start(lab: SlurmLab, site: Cluster, model: Make) -> None:
    """Not asked for by the rendered script, but a site's or a user's option may."""
    again = site.model_copy(update={"sbatch_options": ("--requeue",)})
    (job,) = slurm.up([model()], again)
    lab.run("scontrol", "requeue", job.submission.job)
    old = job.endpoints[0].start
    wait_until(lambda: [e.start for e in Watch(site).alive()] not in ([], [old]), 60, "the new start")
    assert [now.phase for now in slurm.status(site)] == ["ready"]


def test_a_node_that_goes_down(lab: SlurmLab, site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model()], site)
    lab.run("scontrol", "update", f"nodename={job.node}", "state=down", "reason=test")
    try:
        assert end_of(site, job).reason.startswith("NODE_FAIL")
    finally:
        lab.run("scontrol", "update", f"nodename={job.node}", "state=resume")
    wait_until(lambda: Watch(site).alive() == (), 30, "the record's end")


def test_a_run_directory_that_cannot_be_written(site: Cluster, model: Make, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError):
        slurm.up([model()], site.model_copy(update={"run_dir": blocked / "run"}))


def test_a_full_disk_keeps_the_server_and_costs_no_record(
    lab: SlurmLab, site: Cluster, model: Make, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        small = site.model_copy(update={"run_dir": disk / "run", "log_dir": tmp_path / "log", "cache_dir": tmp_path})
        slurm.up([model()], small)
        with pytest.raises(OSError), (disk / "fill").open("wb") as file:
            file.write(b"x" * 1_000_000)
        (record,) = (disk / "run" / "biollm" / "records").glob("*.json")
        os.utime(record, (1e9, 1e9))
        assert Records(small).read()[0] == []
        wait_until(lambda: Records(small).read()[0], 15, "the renewal")
        (disk / "fill").unlink()
        slurm.down(small)
    finally:
        lab.cancel_all()
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_site_limits_bind(site: Cluster, model: Make) -> None:
    with pytest.raises(UsageError, match="max_gpus of this site is 8"):
        slurm.up([model()], site.model_copy(update={"max_gpus": 8}), replicas=9)
    assert slurm.status(site) == []


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"partition": "none"}, "no such partition"),
        ({"partition": "short", "walltime": 36000}, "allows less time"),
        ({"gpu_request": "gres", "gpu_type": "a100"}, "no such GPU|no node with as many GPUs"),
        ({"memory_gb_per_node": 99_000_000}, "no node with as many GPUs"),
    ],
)
def test_what_slurm_refuses_is_a_sentence(site: Cluster, model: Make, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SlurmError, match=sentence):
        slurm.up([model()], site.model_copy(update=wrong))
    assert slurm.status(site) == []


def test_two_callers_at_once_start_one_server(site: Cluster, model: Make) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(slurm.ensure(model(), site).start)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(slurm.status(site)) == 1


def test_many_waiting_processes_ask_the_controller_once_in_five_seconds(
    lab: SlurmLab, site: Cluster, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupy(lab)
    (job,) = slurm.up([model()], site, wait=False)
    real = subprocess.run(["which", "squeue"], env=lab.env, capture_output=True, text=True).stdout.strip()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f'#!/bin/sh\ndate +%s.%N >>{tmp_path}/calls\nexec {real} "$@"\n')
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    program = (
        "import pickle, sys; from biollm import slurm; from biollm.errors import SlurmError\n"
        "site = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "try: slurm.wait_for(slurm.find(site, sys.argv[2]), site, timeout=16)\n"
        "except SlurmError as error: print(error)"
    )
    arguments = [sys.executable, "-c", program, pickle.dumps(site).hex(), job.submission.job]
    waiting = [subprocess.Popen(arguments, stdout=-1, text=True) for _ in range(6)]
    said = [process.communicate()[0] for process in waiting]
    assert all("is pending" in text for text in said), said
    calls = [float(line) for line in (tmp_path / "calls").read_text().split()]
    assert 2 <= len(calls) <= 5
    assert min(b - a for a, b in pairwise(calls)) > 4.5


def test_two_clusters_in_one_home(lab: SlurmLab, site: Cluster, model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.up([model()], site)
    with SlurmLab(lab.root.with_name(f"{lab.root.name}-b"), nodes=1, cluster="other") as second:
        monkeypatch.setenv("SLURM_CONF", str(second.conf))
        other = site.model_copy(update={"name": "other"})
        assert slurm.status(other) == []
        slurm.up([model()], other)
        assert len(Watch(other).alive()) == len(Watch(site).alive()) == 1
        assert Watch(other).alive() != Watch(site).alive()
        slurm.down(other)
    assert len(Watch(site).alive()) == 1


def test_a_handover_leaves_no_moment_without_a_server(lab: SlurmLab, site: Cluster, model: Make) -> None:
    quick = model(start_timeout=10)
    slurm.up([quick], site.model_copy(update={"walltime": 120, "drain": 60}), Options(handover=True))
    first, second = slurm.find(site, "m")
    lab.run("scontrol", "update", f"jobid={second.job}", "Dependency=", check=False)  # now, not in minutes
    failed: list[str] = []
    done = threading.Event()

    def load() -> None:
        watch = Watch(site, interval=0.1)
        while not done.is_set():
            answered = False
            for endpoint in watch.alive():
                try:
                    answered = ask(endpoint, "POST", "/v1/completions", {}, timeout=5)[0] == 200
                except OSError:
                    continue
            failed.extend([] if answered else ["nobody answered"])

    loading = threading.Thread(target=load)
    loading.start()
    lab.run("scancel", "--batch", "--signal=USR1", first.job)
    wait_until(lambda: [e.link for e in Watch(site).alive()] == [2], 40, "the handover")
    done.set()
    loading.join()
    assert failed == []


def test_a_record_of_a_killed_job_is_not_used(lab: SlurmLab, site: Cluster, model: Make) -> None:
    (job,) = slurm.up([model()], site)
    record = Path(str(site.run_dir)) / "biollm" / "records" / f"{job.endpoints[0].start}.json"
    text = record.read_text()
    slurm.down(site)
    record.write_text(text)
    record.chmod(0o600)
    assert Records(site).read()[0] != []  # fresh by its time, but
    assert Watch(site).alive() == ()  # nobody answers there


@pytest.mark.parametrize("end", [("scancel",), ("scancel", "--full", "--signal=KILL")])
def test_a_server_that_goes_fails_no_completion_while_a_cloud_rung_is_alive(
    lab: SlurmLab, site: Cluster, model: Make, waterfall: Callable[..., Path], net: Loopback, end: tuple[str, ...]
) -> None:
    local = {"type": "local", "base_url": None, "env_key": None, "models": ["m"]}
    folder = waterfall(vllm=local, cloud=net.serve(text="from the cloud"))
    (folder / "models.yaml").write_text("models:\n  m: {type: local, hf_id: some/model}\n  small: {type: api}\n")
    (folder / "cluster.yaml").write_text(f"cluster:\n  name: lab\n  run_dir: {site.run_dir}\n")
    client = get_model_client()
    assert str(client.complete("hi")) == "from the cloud"
    (job,) = slurm.up([model()], site)
    wait_until(lambda: str(client.complete("hi")) == "hi", 5, "the new server in a running client")
    lab.run(*end, job.submission.job)
    answers = {str(client.complete("hi")) for _ in range(30)}
    assert "from the cloud" in answers
    assert answers <= {"hi", "from the cloud"}


def test_wrong_clocks_do_not_matter(site: Cluster, model: Make) -> None:
    """A node five minutes off: its times are in the record's job alone, ages are the file system's."""
    (job,) = slurm.up([model()], site)
    events = Path(str(site.run_dir)) / "biollm" / "jobs" / f"{job.submission.id}.events"
    shifted = [json.loads(line) | {"at": time.time() + 300} for line in events.read_text().splitlines()]
    events.write_text("".join(json.dumps(event) + "\n" for event in shifted))
    assert [now.phase for now in slurm.status(site)] == ["ready"]
    assert 0 < (slurm.status(site)[0].left_s or 0) <= 600


def test_the_controller_away_while_waiting_and_back(lab: SlurmLab, site: Cluster, model: Make, seen: list[Job]) -> None:
    """Records need no controller: a server that becomes ready meanwhile is found.

    The last test here: a restarted controller of this version keeps whole nodes back.
    """
    (job,) = slurm.up([model()], site, wait=False)
    wait_until(lambda: slurm.find(site, job.submission.job)[0].events, 20, "the start")
    lab.stop_controller()
    try:
        (ready,) = slurm.wait_for([job.submission], site, timeout=30, on_state=seen.append)
        assert ready.phase == "ready"
        with pytest.raises(SlurmError, match="Slurm does not answer"):
            slurm.up([model("other")], site)
    finally:
        lab.start_controller()
    slurm.down(site)
