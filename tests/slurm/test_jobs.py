"""Slurm commands and their results; the commands are small scripts that answer as the real ones do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biollm import slurm
from biollm.config import Cluster, Environment, Model
from biollm.errors import SlurmError, UnavailableError, UsageError
from biollm.slurm import commands
from biollm.slurm.script import Options
from biollm.slurm.submissions import Job, Submission

Answer = Callable[[str, str], None]


@pytest.fixture
def site(tmp_path: Path) -> Cluster:
    return Cluster(name="lab", run_dir=tmp_path / "run", gpus_per_node=8, walltime=3600)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").touch()
    (tmp_path / "weights" / "model.safetensors").touch()
    return Model(key="a", path=tmp_path / "weights", gpus_required=2)


@pytest.mark.parametrize(
    ("output", "sentence", "fix"),
    [
        ("Invalid partition name specified", "no such partition", "`sinfo -s`"),
        ("Requested node configuration is not available", "no node with as many GPUs", "gpus_per_node"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "allows less time", "`walltime`"),
        ("Invalid generic resource (gres) specification", "no such GPU", "`gpu_type`"),
        ("Invalid account or account/partition combination specified", "this account", "sacctmgr"),
        ("Invalid qos specification", "this qos", "`qos`"),
        ("Invalid feature specification", "this feature", "`constraint`"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "limit of your", "sacctmgr"),
        ("Unable to contact slurm controller (connect failure)", "does not answer", "scontrol ping"),
        ("Some new sentence", "sbatch failed: Batch job submission failed: Some new sentence", None),
    ],
)  # fmt: skip
def test_a_refusal_becomes_a_sentence_with_a_fix(answer: Answer, output: str, sentence: str, fix: str | None) -> None:
    answer(
        "sbatch", f"echo 'sbatch: error: Batch job submission failed: {output}' >&2; exit 1".replace("user's", "users")
    )
    with pytest.raises(SlurmError, match=sentence.replace("(", r"\(")) as caught:
        commands.submit(Path("job.sh"), [], [])
    assert caught.value.hint is fix or str(fix) in str(caught.value.hint)


def test_a_missing_command_says_where_to_run_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match="There is no sbatch on this machine") as caught:
        commands.submit(Path("job.sh"), [], [])
    assert "login node" in str(caught.value.hint)


@pytest.mark.slow
def test_a_command_that_hangs_is_ended(answer: Answer) -> None:
    answer("squeue", "exec sleep 60")
    with pytest.raises(SlurmError, match="no answer within 1 s"):
        commands.run("squeue", timeout=1)


def test_only_what_is_allowed_reaches_slurm(answer: Answer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    answer("sbatch", "env >&2; echo '12;cluster'; env | grep -q -e planted -e CPUS_PER_TASK && exit 1; exit 0")
    assert commands.submit(Path("job.sh"), ["--submission", "t"], []) == "12"
    call = (tmp_path / "calls.txt").read_text()
    assert call.startswith("sbatch --parsable --export=PATH,HOME")
    assert call.endswith("job.sh --submission t\n")


@pytest.mark.slow
def test_many_waiting_processes_ask_the_controller_once(answer: Answer, tmp_path: Path) -> None:
    answer("squeue", "sleep 2; echo '7|PENDING|Resources|N/A|'")
    ask = f"from pathlib import Path; from biollm.slurm import commands as s; print(s.queue(Path({str(tmp_path)!r}), 'lab'))"
    asking = [subprocess.Popen([sys.executable, "-c", ask], stdout=-1, text=True) for _ in range(8)]
    assert all("PENDING" in process.communicate()[0] for process in asking)
    assert (tmp_path / "calls.txt").read_text().count("squeue") == 1


def aged(folder: Path, seconds: float) -> None:
    """Make the snapshot as old as that."""
    path = next(folder.glob("queue-*.json"))
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_long_queue_is_asked_more_rarely_and_a_change_or_a_submission_wakes_it(
    answer: Answer, tmp_path: Path
) -> None:
    def queue(age: float, since: float = 0.0) -> int:
        aged(tmp_path, age)
        commands.queue(tmp_path, "lab", since)
        return (tmp_path / "calls.txt").read_text().count("squeue")

    answer("squeue", "echo '7|PENDING|Resources|N/A|'")
    commands.queue(tmp_path, "lab")
    assert queue(4) == 1
    assert queue(6) == 2  # unchanged: 7.5 s from now on
    assert queue(6) == 2
    assert [queue(31) for _ in range(5)] == [3, 4, 5, 6, 7]  # rested: 30 s
    assert queue(29) == 7
    assert queue(29, since=time.time()) == 8  # something was submitted since
    answer("squeue", "echo '7|RUNNING|None|N/A|node1'")
    queue(31)
    assert queue(6) == 10  # a change: 5 s again, and for as long as something runs


def test_an_estimated_start_is_in_iso_8601_utc_whatever_the_clusters_time_zone(answer: Answer, tmp_path: Path) -> None:
    start = "TZ=${TZ:-America/Chicago} date -d @1795003200 +%FT%T"
    answer("squeue", f"echo \"7|PENDING|Resources|$({start})|\"; echo '8|PENDING|Priority|N/A|'")
    rows = commands.queue(tmp_path, "lab").rows
    assert (rows["7"].start, rows["8"].start) == ("2026-11-18T12:00:00+00:00", "")


def test_a_look_at_the_queue_by_a_newer_version_is_read(answer: Answer, tmp_path: Path) -> None:
    answer("squeue", "exit 1")
    rows = [["7", "RUNNING", "", "", "node1", "one more column"]]
    saved = {"rows": rows, "error": "", "interval": 5.0, "more": 1}
    (tmp_path / f"queue-lab-{os.getuid()}.json").write_text(json.dumps(saved))
    assert commands.queue(tmp_path, "lab").rows["7"].node == "node1"


def test_an_unreachable_controller_is_an_error_in_the_queue_with_what_was_seen_last(
    answer: Answer, tmp_path: Path
) -> None:
    answer("squeue", "echo '7|RUNNING|None|N/A|node1'")
    commands.queue(tmp_path, "lab")
    answer("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    aged(tmp_path, 10)
    queue = commands.queue(tmp_path, "lab")
    assert queue.rows["7"].state == "RUNNING"
    assert "does not answer" in queue.error


def test_node_addresses_come_from_the_controller(answer: Answer) -> None:
    answer(
        "scontrol", "echo 'NodeName=n1 Arch=x NodeAddr=10.0.0.1 OS=Linux 5 State=IDLE'; echo 'NodeName=n2 State=DOWN'"
    )
    assert commands.nodes() == {"n1": "10.0.0.1", "n2": "n2"}


def test_up_refuses_before_queueing_when_weights_or_environment_are_missing(site: Cluster, model: Model) -> None:
    (model.path / "config.json").unlink()  # type: ignore[operator]
    with pytest.raises(UnavailableError, match="weights of a are not in") as caught:
        slurm.up([model], site)
    assert "correct `path`" in str(caught.value)
    (model.path / "config.json").touch()  # type: ignore[operator]
    bare = site.model_copy(update={"environment": Environment(venv=Path("/no/venv"))})
    with pytest.raises(UnavailableError, match="no vLLM in /no/venv") as caught:
        slurm.up([model], bare)
    assert "pip install 'vllm==0.32.*'" in str(caught.value.hint)


def job(gpus: int, phase: str = "ready") -> Job:
    return Job(Submission("t", "7", ("a",), gpus, 3600, Path("/none")), phase)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "known", "asked", "refused"),
    [
        ({"max_jobs": 2}, [job(1)], {"jobs": 1}, False),
        ({"max_jobs": 2}, [job(1)], {"jobs": 2}, True),
        ({"max_jobs": 1}, [job(1, "failed")], {"jobs": 1}, False),
        ({"max_gpus": 4}, [job(2)], {"gpus": 2}, False),
        ({"max_gpus": 4}, [job(2), job(1, "pending")], {"gpus": 2}, True),
        ({"gpu_hours_per_day": 24}, [job(8)], {"hours": 16}, False),
        ({"gpu_hours_per_day": 24}, [job(8), job(8)], {"hours": 16}, True),
        ({}, [job(800)], {"jobs": 99, "gpus": 999, "hours": 9999}, False),
    ],
)
def test_site_limits(limit: dict[str, int], known: list[Job], asked: dict[str, int], refused: bool) -> None:
    site = Cluster(**limit)
    asked = {"jobs": 0, "gpus": 0, "hours": 0} | asked
    if not refused:
        slurm.check_limits(site, known, **asked)
        return
    with pytest.raises(UsageError, match=next(iter(limit))):
        slurm.check_limits(site, known, **asked)


def test_a_submission_leaves_script_node_files_and_record(
    answer: Answer, site: Cluster, model: Model, tmp_path: Path
) -> None:
    answer("sbatch", "echo 41")
    answer("squeue", "true")
    answer("scontrol", "echo 'NodeName=node1 NodeAddr=10.0.0.1'")
    (job,) = slurm.up([model], site, wait=False)
    run = tmp_path / "run"
    assert (job.submission.job, job.submission.models, job.submission.gpus, job.phase) == ("41", ("a",), 2, "pending")
    assert str(job.submission.log).endswith("biollm-41.log")
    assert sorted(path.name for path in run.iterdir()) == ["biollm", "logs"]
    assert any(path.name.endswith("_auth.py") for path in (run / "biollm" / "lib").iterdir())
    assert (run / "biollm" / "jobs" / f"{job.submission.id}.sh").read_text().startswith("#!/bin/bash")
    assert (run / "biollm" / "nodes-lab.json").read_text() == '{"node1": "10.0.0.1"}'
    assert run.stat().st_mode & 0o777 == 0o700


def test_a_job_is_seen_and_stopped_where_its_supervisor_looks(answer: Answer, site: Cluster, tmp_path: Path) -> None:
    answer("squeue", "echo '41|RUNNING|None|N/A|node1'")
    answer("scancel", "true")
    jobs = tmp_path / "run" / "biollm" / "jobs"
    jobs.mkdir(parents=True)
    kept = {"job": "41", "models": ["a"], "gpus": 1, "walltime": 3600, "log": "x", "chain": "", "link": 1, "links": 1,
            "nodes": 1, "cluster": "lab"}  # fmt: skip
    id = "0123456789ab4cde8f0123456789abcd"
    (jobs / f"{id}.json").write_text(json.dumps(kept))
    assert [(job.submission.id, job.phase) for job in slurm.status(site)] == [(id, "starting")]
    assert [submission.job for submission in slurm.down(site, "a", wait=False)] == ["41"]
    assert (jobs / f"{id}.stop").exists()
    assert "scancel --state=RUNNING --signal=USR1 --batch 41" in (tmp_path / "calls.txt").read_text()


def test_a_handover_is_a_second_job_that_begins_before_the_first_ends_and_counts_twice(
    answer: Answer, site: Cluster, model: Model, tmp_path: Path
) -> None:
    answer("sbatch", f"wc -l <{tmp_path}/calls.txt")
    answer("squeue", "true")
    answer("scontrol", "true")
    model = model.model_copy(update={"start_timeout": 300})
    first, second = slurm.up([model], site, Options(handover=True), wait=False)
    calls = [line for line in (tmp_path / "calls.txt").read_text().splitlines() if line.startswith("sbatch")]
    # of 60 minutes, 2 are to drain and twice 5 to start
    assert f"--dependency=after:{first.submission.job}+48 " in calls[1]
    assert f"--chain {first.submission.chain} --link 2 --links 2" in calls[1]
    assert "--dependency" not in calls[0]
    assert second.submission.chain == first.submission.chain
    full = site.model_copy(update={"max_gpus": 3, "run_dir": tmp_path / "other"})
    with pytest.raises(UsageError, match="max_gpus of this site is 3: 0 are taken, this would take 4 more"):
        slurm.up([model], full, Options(handover=True), wait=False)


def test_whole_nodes_are_not_taken_for_half_a_node_unasked(answer: Answer, site: Cluster, model: Model) -> None:
    whole = site.model_copy(update={"exclusive": True})
    with pytest.raises(UsageError, match="GPUs") as caught:
        slurm.up([model], whole)
    assert "--yes" in str(caught.value.hint)


def test_another_users_node_file_is_not_run(answer: Answer, site: Cluster, model: Model, tmp_path: Path) -> None:
    answer("sbatch", "echo 41")
    answer("squeue", "true")
    answer("scontrol", "true")
    slurm.up([model], site, wait=False)
    next((tmp_path / "run" / "biollm" / "lib").iterdir()).write_text("import evil")
    with pytest.raises(SlurmError, match="is not what this version put there"):
        slurm.up([model], site, wait=False)


def test_a_group_one_is_not_in_cannot_be_shared_with(site: Cluster, model: Model) -> None:
    with pytest.raises(UsageError, match="not in a group named 'no-such-group'"):
        slurm.up([model], site, share="no-such-group")


@pytest.mark.parametrize("slurm_answers", [True, False])
def test_a_printed_script_finds_its_files_or_the_user_is_told_how(
    answer: Answer, waterfall: Callable[..., Path], biollm: Callable[..., Any], tmp_path: Path, slurm_answers: bool
) -> None:
    """`biollm render-slurm M > job.sh; sbatch job.sh` works without `up` before it."""
    answer("scontrol", "echo 'NodeName=node1 NodeAddr=10.0.0.1'" if slurm_answers else "exit 1")
    folder = waterfall(first="http://localhost:1/v1")
    (folder / "cluster.yaml").write_text(f"cluster: {{name: lab, run_dir: {tmp_path / 'run'}}}")
    done = biollm("render-slurm", "qwen-coder-32b")
    supervisor = re.search(r"python3 (\S+)", done.out)
    assert supervisor and Path(supervisor[1]).exists() and (tmp_path / "run" / "logs").is_dir()
    assert ("Repeat this command on a login node before sbatch" in done.err) != slurm_answers
    assert (tmp_path / "run" / "biollm" / "nodes-lab.json").exists() == slurm_answers

    done = biollm("render-slurm", "qwen-coder-32b", "--plain", "--port", "8123")
    (key,) = (tmp_path / "run" / "biollm").glob("plain-*.key")
    assert key.stat().st_mode & 0o777 == 0o600
    assert f"export VLLM_API_KEY=$(cat {key})" in done.out
    assert key.read_text() not in done.out + done.err
    assert done.out.endswith('#     base_url: "http://NODE:8123/v1"\n')


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["qwen-coder-32b", "codellama-34b", "--plain"], "--plain serves one model"),
        (["deepseek-coder-v2", "--plain"], "needs 2 nodes: a plain script runs on one"),
    ],
)
def test_a_plain_script_is_of_one_model_on_one_node(
    waterfall: Callable[..., Path], biollm: Callable[..., Any], arguments: list[str], says: str
) -> None:
    (waterfall(first="http://localhost:1/v1") / "cluster.yaml").write_text("cluster: {gpus_per_node: 4}")
    done = biollm("render-slurm", *arguments)
    assert done.code and says in done.err
