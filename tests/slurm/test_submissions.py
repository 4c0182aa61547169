"""How a job is, from what the queue, the job's own events and the records say: one table, no Slurm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biollm.config import Cluster
from biollm.errors import UsageError
from biollm.slurm.commands import Queue, Row
from biollm.slurm.endpoints import Endpoint
from biollm.slurm.submissions import Submission, failure, find, gpu_hours, job_of, reload, save, submissions, sweep

SUBMISSION = Submission("t", "7", ("a",), 1, 3600, Path("/none"), submitted=100.0)
A, B, C = "0123456789ab4cde8f0123456789abcd", "f" * 12 + "4abc9" + "0" * 15, "a" * 12 + "4000b" + "1" * 15
PAIR = replace(SUBMISSION, models=("a", "b"))


def ran(submission: Submission, *states: str, at: float = 120.0) -> Submission:
    """The submission with events: "MODEL STATE[ REASON][ @RESTART]", the last written at `at`."""
    return replace(submission, events=tuple(event(text) for text in states), seen=at)


def event(text: str) -> dict[str, Any]:
    text, _, restart = text.partition(" @")
    model, state, *reason = text.split(" ", 2)
    return {"model": model, "state": state, "reason": "".join(reason), "restart": int(restart or 0), "at": 110.0}


def queue(state: str = "", reason: str = "", at: float = 130.0, error: str = "", start: str = "") -> Queue:
    """The queue at `at`, with the job in `state` or without it."""
    return Queue({"7": Row("7", state, reason, start, "node1")} if state else {}, at, error)


def server(model: str = "a") -> Endpoint:
    return Endpoint("0" * 32, "7", "t", model, "node1", "http://n/v1", Path("/k"), 0, 60, 1)


DIED = "a failed the server ended by exit code 3"


@pytest.mark.parametrize(
    ("submission", "seen", "servers", "phase", "reason"),
    [
        (SUBMISSION, queue(at=90), [], "pending", "submitted"),
        (SUBMISSION, queue("PENDING", "Resources"), [], "pending", "Resources"),
        (SUBMISSION, queue("RUNNING"), [], "starting", ""),
        (ran(SUBMISSION, "a starting"), queue("RUNNING"), [], "starting", ""),
        # the job has spoken since the queue was asked
        (ran(SUBMISSION, "a starting", at=140), queue("PENDING", "Resources"), [], "starting", ""),
        (ran(SUBMISSION, "a starting", at=140), queue(at=90), [], "starting", ""),
        (ran(SUBMISSION, "a starting", "a ready"), queue("RUNNING"), [server()], "ready", ""),
        (ran(SUBMISSION, "a starting", "a ready"), queue("PENDING"), [server()], "ready", ""),
        # a record alone is enough: the controller may be away
        (ran(SUBMISSION, "a ready"), queue(error="away"), [server()], "ready", "away"),
        (ran(SUBMISSION, "a starting"), queue(error="away"), [], "starting", "away"),
        (SUBMISSION, queue(error="away"), [], "pending", "away"),
        (ran(SUBMISSION, "a ready", "a draining idle"), queue("RUNNING"), [], "draining", ""),
        (ran(SUBMISSION, "a ready", "a draining idle", "a stopped idle"), queue("RUNNING"), [], "ended", "idle"),
        (ran(SUBMISSION, "a ready", "a stopped down"), queue("COMPLETED"), [], "ended", "down"),
        (SUBMISSION, queue("COMPLETED"), [], "ended", "completed"),
        (ran(SUBMISSION, "* stopped it was stopped before"), queue("COMPLETED"), [], "ended", "it was stopped before"),
        # deaths: what Slurm says first, then what the supervisor knew
        (ran(SUBMISSION, "a starting", DIED), queue("RUNNING"), [], "failed", "a: the server ended by exit code 3"),
        (ran(SUBMISSION, DIED), queue("FAILED", "NonZeroExitCode"), [], "failed", "FAILED; a: the server ended by exit code 3"),
        (ran(SUBMISSION, "a ready"), queue("TIMEOUT", "TimeLimit"), [], "failed", "TIMEOUT (TimeLimit)"),
        (ran(SUBMISSION, "a ready"), queue("NODE_FAIL"), [], "failed", "NODE_FAIL"),
        (SUBMISSION, queue("CANCELLED"), [], "failed", "CANCELLED"),
        # Slurm's TERM is a cancellation, a preemption or the end of the walltime: the queue tells
        (ran(SUBMISSION, "a ready", "a stopped cancelled", at=140), queue("RUNNING"), [], "draining", "cancelled"),
        (ran(SUBMISSION, "a ready", "a stopped cancelled"), queue("COMPLETING"), [], "draining", "cancelled"),
        (ran(SUBMISSION, "a ready", "a stopped cancelled"), queue(), [], "ended", "cancelled"),
        (ran(SUBMISSION, "a ready", "a stopped cancelled"), queue("PREEMPTED"), [], "failed", "PREEMPTED"),
        # requeued: what an earlier run said no longer counts
        (ran(SUBMISSION, "a ready", "a stopped cancelled"), queue("PENDING", "BeginTime"), [], "pending", "BeginTime"),
        (ran(SUBMISSION, "a stopped cancelled", "a starting @1"), queue("RUNNING"), [], "starting", ""),
        # several models
        (ran(PAIR, "a ready", "b starting"), queue("RUNNING"), [server("a")], "starting", ""),
        (ran(PAIR, "a ready", "b ready"), queue("RUNNING"), [server("a"), server("b")], "ready", ""),
        (ran(PAIR, DIED, "b ready"), queue("RUNNING"), [server("b")], "ready", "a: the server ended by exit code 3"),
        (ran(PAIR, DIED, "b stopped down"), queue("RUNNING"), [], "failed", "a: the server ended by exit code 3"),
        # forgotten by Slurm
        (ran(SUBMISSION, "a ready"), queue(), [],
         "unknown", "unknown, last seen ready 30 s ago; Slurm does not know the job any more"),
        (SUBMISSION, queue(), [],
         "unknown", "unknown, last seen submitted 50 s ago; Slurm does not know the job any more"),
    ],
)  # fmt: skip
def test_how_a_job_is(submission: Submission, seen: Queue, servers: list[Endpoint], phase: str, reason: str) -> None:
    job = job_of(submission, seen, servers, now=150.0)
    assert (job.phase, job.reason) == (phase, reason)
    assert job.over == (phase in ("ended", "failed", "unknown"))


def test_a_server_of_another_submission_is_not_this_jobs() -> None:
    """Job ids are used again when the controller lost its state; submissions are not."""
    other = replace(server(), submission="other")
    assert job_of(SUBMISSION, queue("RUNNING"), [other], 150).phase == "starting"


def test_a_pending_job_tells_slurms_estimate() -> None:
    job = job_of(SUBMISSION, queue("PENDING", "Resources", start="2026-11-23T12:00:00"), [], 150)
    assert job.start == "2026-11-23T12:00:00"


def test_out_of_memory_is_read_from_the_log(tmp_path: Path) -> None:
    """Slurm calls it FAILED by signal 9, like any kill; only the log says more."""
    log = tmp_path / "log"
    log.write_text("slurmstepd: error: Job 7 exceeded memory limit (900 > 800), being killed\n")
    job = job_of(replace(SUBMISSION, log=log), queue("FAILED", "JobLaunchFailure"), [], 150)
    assert job.reason.startswith("out of memory of the node")


def test_a_failure_shows_the_servers_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {number}" for number in range(100)) + "\nValueError: broken\n")
    submission = ran(SUBMISSION, DIED)
    submission.events[-1]["log"] = str(log)
    error = failure(job_of(submission, queue("RUNNING"), [], 150))
    assert str(error).splitlines()[0] == "Job 7 (a) failed: a: the server ended by exit code 3"
    assert str(error).splitlines()[-1] == "    ValueError: broken"
    assert len(str(error).splitlines()) == 16
    assert error.hint == "biollm logs 7"


def test_gpu_hours_count_what_ran_or_what_may_run() -> None:
    done = job_of(ran(replace(SUBMISSION, gpus=4), "a stopped idle", at=110.0 + 1800), queue("COMPLETED"), [], 150)
    assert gpu_hours(done) == 2
    assert gpu_hours(job_of(replace(SUBMISSION, gpus=4), queue("RUNNING"), [], 150)) == 4


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "biollm" / "jobs").mkdir(parents=True)
    return Cluster(name="lab", run_dir=tmp_path)


def test_a_submission_comes_back_with_its_events(cluster: Cluster, tmp_path: Path) -> None:
    submission = save(SUBMISSION, cluster)
    assert submission.submitted > 0
    (tmp_path / "biollm" / "jobs" / "t.events").write_text(json.dumps(event("a ready")) + '\n{"half": ')
    again = reload(submission, cluster)
    assert [e["state"] for e in again.events] == ["ready"]
    assert submissions(cluster) == [again]
    assert (tmp_path / "biollm" / "jobs" / "t.json").stat().st_mode & 0o777 == 0o600


def test_a_submission_of_a_newer_version_is_found(cluster: Cluster, tmp_path: Path) -> None:
    submission = save(SUBMISSION, cluster)
    path = tmp_path / "biollm" / "jobs" / "t.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"region": "east"}))
    lines = [event("a warming"), {"at": 9.0, "restart": 0, "note": "of no model"}, 7]
    path.with_suffix(".events").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (again,) = submissions(cluster)
    assert again.job == submission.job
    assert job_of(again, queue("RUNNING"), [], 150).phase == "starting"


def test_two_clusters_in_one_home_do_not_see_each_others_submissions(cluster: Cluster) -> None:
    save(SUBMISSION, cluster)
    assert submissions(cluster.model_copy(update={"name": "other"})) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cluster": "lab"}'])
def test_a_broken_submission_is_left_out(cluster: Cluster, tmp_path: Path, text: str) -> None:
    (tmp_path / "biollm" / "jobs" / "x.json").write_text(text)
    assert submissions(cluster) == []


def test_a_job_is_found_by_its_id_or_a_model(cluster: Cluster) -> None:
    submission = save(PAIR, cluster)
    assert find(cluster, "7") == find(cluster, "b") == [submission]
    with pytest.raises(UsageError, match="'c'") as caught:
        find(cluster, "c")
    assert caught.value.hint == "Known: 7, a, b."


# --- What is removed ---------------------------------------------------------------------------------------------

MD5 = "d41d8cd98f00b204e9800998ecf8427e"
OURS = [
    f"jobs/{A}.json", f"jobs/{A}.sh", f"jobs/{A}.events", f"jobs/{A}.stop", f"jobs/{A}-0.master", f"jobs/{A}-12.master",
    f"jobs/.{A}.json.ab12_x9z", f"records/{A}.json", f"records/{A}.new", f"starts/{A}/key",
]  # fmt: skip
BY_HAND = ["jobs/lab-7.events", "jobs/lab-7-0.master", "jobs/lab-7.stop"]  # of a script that the user submitted
LOOK_ALIKES = [
    f"reads/{A}.json", f"star_index/{A}", f"stats/{A}.json", f"jobsets/{A}.json", "jobs/run.sh", "jobs/.hidden",
    "jobs/t.json", f"jobs/{MD5}.json", f"jobs/{A}.txt", f"jobs/{A}.json.bak", f"jobs/x{A}.json", f"jobs/{A}-x.master",
    f"jobs/{A.upper()}.json", "jobs/other-7.events", "jobs/lab-7.sh", f"jobs/{A}/{A}.json", f"records/{A}.jsonl",
    f"records/{A}", "records/7.json", f"starts/{C}/key", f"starts/{C}/data", "starts/none/key", f"starts/{B}",
    "lib/biollm_supervisor_0.py", f"logs/{A}.json", f"models/{A}.json", f"{A}.json", "nodes-lab.json",
]  # fmt: skip


def put(folder: Path, names: Iterable[str]) -> None:
    """Make files that are older than a week."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_old_files_of_ours_are_swept_and_no_look_alike(tmp_path: Path) -> None:
    folder, young = tmp_path / "run" / "biollm", ["jobs/" + B + ".json", f"starts/{B[::-1]}/key"]
    put(folder, [*OURS, *LOOK_ALIKES])
    for name in young:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    sweep(Cluster(name="lab", run_dir=tmp_path / "run"))
    assert files(folder) == {*LOOK_ALIKES, *young}


def test_what_a_script_submitted_by_hand_left_is_swept_in_our_folder_alone(tmp_path: Path) -> None:
    put(tmp_path / "run" / "biollm", BY_HAND)
    put(tmp_path / "run", [*BY_HAND, *OURS])
    sweep(Cluster(name="lab", run_dir=tmp_path / "run"))
    assert files(tmp_path / "run") == {*BY_HAND, *OURS}


def test_no_link_is_followed_or_removed(tmp_path: Path) -> None:
    mine, ours = tmp_path / "mine", tmp_path / "run" / "biollm"
    put(mine, [f"{A}.json", f"{B}/key"])
    put(ours, [f"jobs/{A}.json"])
    (ours / "jobs" / f"{B}.json").symlink_to(mine / f"{A}.json")
    (ours / "starts").mkdir()
    (ours / "starts" / B).symlink_to(mine / B)
    (ours / "records").symlink_to(mine)
    put(ours, [])
    sweep(Cluster(name="lab", run_dir=tmp_path / "run"))
    assert files(mine) == {f"{A}.json", f"{B}/key"}
    assert files(ours) >= {f"jobs/{B}.json", "records", f"starts/{B}"}
    assert not (ours / "jobs" / f"{A}.json").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_another_users_files_stay(tmp_path: Path) -> None:
    put(tmp_path / "biollm", [f"jobs/{A}.json"])
    os.chown(tmp_path / "biollm" / "jobs" / f"{A}.json", 65534, -1)
    sweep(Cluster(name="lab", run_dir=tmp_path))
    assert files(tmp_path) == {f"biollm/jobs/{A}.json"}


def test_what_runs_or_waits_for_longer_than_a_week_keeps_its_files(tmp_path: Path) -> None:
    runs, waits, ended, chain, one, two = (f"{n}" * 12 + "4000a" + "1" * 15 for n in range(6))
    names = [f"jobs/{runs}.json", f"jobs/{runs}.events", f"jobs/{runs}-0.master", f"starts/{one}/key", f"jobs/{waits}.json",
             f"jobs/{chain}.stop", f"jobs/{ended}.json", f"jobs/{ended}.events", f"starts/{two}/key"]  # fmt: skip
    put(tmp_path / "biollm", names)
    (tmp_path / "biollm" / "records").mkdir()
    record = tmp_path / "biollm" / "records" / f"{one}.json"
    record.write_text(json.dumps({"submission": runs}))  # renewed just now
    jobs = [
        job_of(replace(SUBMISSION, id=waits, chain=chain), queue("PENDING", "Resources"), [], 150),
        job_of(replace(SUBMISSION, id=ended), queue("COMPLETED"), [], 150),
    ]
    sweep(Cluster(name="lab", run_dir=tmp_path), jobs)
    assert set(names) - files(tmp_path / "biollm") == {*names[-3:]}
