"""How a job is, from what the queue, the job's own events and the records say: one table, no Slurm."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biollm._scheduler import Queue, Row
from biollm.config import Cluster
from biollm.endpoints import Endpoint
from biollm.errors import UsageError
from biollm.tickets import Ticket, failure, find, gpu_hours, judge, read, save, sweep, tickets

TICKET = Ticket("t", "7", ("a",), 1, 3600, Path("/none"), submitted=100.0)
PAIR = replace(TICKET, models=("a", "b"))


def ran(ticket: Ticket, *states: str, at: float = 120.0) -> Ticket:
    """The ticket with events: "MODEL STATE[ REASON][ @RESTART]", the last written at `at`."""
    return replace(ticket, events=tuple(event(text) for text in states), seen=at)


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
    ("ticket", "seen", "servers", "phase", "reason"),
    [
        (TICKET, queue(at=90), [], "pending", "submitted"),
        (TICKET, queue("PENDING", "Resources"), [], "pending", "Resources"),
        (TICKET, queue("RUNNING"), [], "starting", ""),
        (ran(TICKET, "a starting"), queue("RUNNING"), [], "starting", ""),
        # the job has spoken since the queue was asked
        (ran(TICKET, "a starting", at=140), queue("PENDING", "Resources"), [], "starting", ""),
        (ran(TICKET, "a starting", at=140), queue(at=90), [], "starting", ""),
        (ran(TICKET, "a starting", "a ready"), queue("RUNNING"), [server()], "ready", ""),
        (ran(TICKET, "a starting", "a ready"), queue("PENDING"), [server()], "ready", ""),
        # a record alone is enough: the controller may be away
        (ran(TICKET, "a ready"), queue(error="away"), [server()], "ready", "away"),
        (ran(TICKET, "a starting"), queue(error="away"), [], "starting", "away"),
        (TICKET, queue(error="away"), [], "pending", "away"),
        (ran(TICKET, "a ready", "a draining idle"), queue("RUNNING"), [], "draining", ""),
        (ran(TICKET, "a ready", "a draining idle", "a stopped idle"), queue("RUNNING"), [], "ended", "idle"),
        (ran(TICKET, "a ready", "a stopped down"), queue("COMPLETED"), [], "ended", "down"),
        (TICKET, queue("COMPLETED"), [], "ended", "completed"),
        (ran(TICKET, "* stopped it was stopped before"), queue("COMPLETED"), [], "ended", "it was stopped before"),
        # deaths: what Slurm says first, then what the supervisor knew
        (ran(TICKET, "a starting", DIED), queue("RUNNING"), [], "failed", "a: the server ended by exit code 3"),
        (ran(TICKET, DIED), queue("FAILED", "NonZeroExitCode"), [], "failed", "FAILED; a: the server ended by exit code 3"),
        (ran(TICKET, "a ready"), queue("TIMEOUT", "TimeLimit"), [], "failed", "TIMEOUT (TimeLimit)"),
        (ran(TICKET, "a ready"), queue("NODE_FAIL"), [], "failed", "NODE_FAIL"),
        (TICKET, queue("CANCELLED"), [], "failed", "CANCELLED"),
        # Slurm's TERM is a cancellation, a preemption or the end of the walltime: the queue tells
        (ran(TICKET, "a ready", "a stopped cancelled", at=140), queue("RUNNING"), [], "draining", "cancelled"),
        (ran(TICKET, "a ready", "a stopped cancelled"), queue("COMPLETING"), [], "draining", "cancelled"),
        (ran(TICKET, "a ready", "a stopped cancelled"), queue(), [], "ended", "cancelled"),
        (ran(TICKET, "a ready", "a stopped cancelled"), queue("PREEMPTED"), [], "failed", "PREEMPTED"),
        # requeued: what an earlier run said no longer counts
        (ran(TICKET, "a ready", "a stopped cancelled"), queue("PENDING", "BeginTime"), [], "pending", "BeginTime"),
        (ran(TICKET, "a stopped cancelled", "a starting @1"), queue("RUNNING"), [], "starting", ""),
        # several models
        (ran(PAIR, "a ready", "b starting"), queue("RUNNING"), [server("a")], "starting", ""),
        (ran(PAIR, "a ready", "b ready"), queue("RUNNING"), [server("a"), server("b")], "ready", ""),
        (ran(PAIR, DIED, "b ready"), queue("RUNNING"), [server("b")], "ready", "a: the server ended by exit code 3"),
        (ran(PAIR, DIED, "b stopped down"), queue("RUNNING"), [], "failed", "a: the server ended by exit code 3"),
        # forgotten by Slurm
        (ran(TICKET, "a ready"), queue(), [],
         "unknown", "unknown, last seen ready 30 s ago; Slurm does not know the job any more"),
        (TICKET, queue(), [],
         "unknown", "unknown, last seen submitted 50 s ago; Slurm does not know the job any more"),
    ],
)  # fmt: skip
def test_how_a_job_is(ticket: Ticket, seen: Queue, servers: list[Endpoint], phase: str, reason: str) -> None:
    job = judge(ticket, seen, servers, now=150.0)
    assert (job.phase, job.reason) == (phase, reason)
    assert job.over == (phase in ("ended", "failed", "unknown"))


def test_a_server_of_another_submission_is_not_this_jobs() -> None:
    """Job ids are used again when the controller lost its state; tickets are not."""
    other = replace(server(), ticket="other")
    assert judge(TICKET, queue("RUNNING"), [other], 150).phase == "starting"


def test_a_pending_job_tells_slurms_estimate() -> None:
    job = judge(TICKET, queue("PENDING", "Resources", start="2026-11-23T12:00:00"), [], 150)
    assert job.start == "2026-11-23T12:00:00"


def test_out_of_memory_is_read_from_the_log(tmp_path: Path) -> None:
    """Slurm calls it FAILED by signal 9, like any kill; only the log says more."""
    log = tmp_path / "log"
    log.write_text("slurmstepd: error: Job 7 exceeded memory limit (900 > 800), being killed\n")
    job = judge(replace(TICKET, log=log), queue("FAILED", "JobLaunchFailure"), [], 150)
    assert job.reason.startswith("out of memory of the node")


def test_a_failure_shows_the_servers_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {number}" for number in range(100)) + "\nValueError: broken\n")
    ticket = ran(TICKET, DIED)
    ticket.events[-1]["log"] = str(log)
    error = failure(judge(ticket, queue("RUNNING"), [], 150))
    assert str(error).splitlines()[0] == "Job 7 (a) failed: a: the server ended by exit code 3"
    assert str(error).splitlines()[-1] == "    ValueError: broken"
    assert len(str(error).splitlines()) == 16
    assert error.hint == "biollm logs 7"


def test_gpu_hours_count_what_ran_or_what_may_run() -> None:
    done = judge(ran(replace(TICKET, gpus=4), "a stopped idle", at=110.0 + 1800), queue("COMPLETED"), [], 150)
    assert gpu_hours(done) == 2
    assert gpu_hours(judge(replace(TICKET, gpus=4), queue("RUNNING"), [], 150)) == 4


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "jobs").mkdir()
    return Cluster(name="lab", run_dir=tmp_path)


def test_a_ticket_comes_back_with_its_events(cluster: Cluster, tmp_path: Path) -> None:
    ticket = save(TICKET, cluster)
    assert ticket.submitted > 0
    (tmp_path / "jobs" / "t.events").write_text(json.dumps(event("a ready")) + '\n{"half": ')
    again = read(ticket, cluster)
    assert [e["state"] for e in again.events] == ["ready"]
    assert tickets(cluster) == [again]
    assert (tmp_path / "jobs" / "t.json").stat().st_mode & 0o777 == 0o600


def test_a_ticket_of_a_newer_version_is_found(cluster: Cluster, tmp_path: Path) -> None:
    ticket = save(TICKET, cluster)
    path = tmp_path / "jobs" / "t.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"region": "east"}))
    lines = [event("a warming"), {"at": 9.0, "restart": 0, "note": "of no model"}, 7]
    path.with_suffix(".events").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (again,) = tickets(cluster)
    assert again.job == ticket.job
    assert judge(again, queue("RUNNING"), [], 150).phase == "starting"


def test_two_clusters_in_one_home_do_not_see_each_others_tickets(cluster: Cluster) -> None:
    save(TICKET, cluster)
    assert tickets(cluster.model_copy(update={"name": "other"})) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cluster": "lab"}'])
def test_a_broken_ticket_is_left_out(cluster: Cluster, tmp_path: Path, text: str) -> None:
    (tmp_path / "jobs" / "x.json").write_text(text)
    assert tickets(cluster) == []


def test_a_job_is_found_by_its_id_or_a_model(cluster: Cluster) -> None:
    ticket = save(PAIR, cluster)
    assert find(cluster, "7") == find(cluster, "b") == [ticket]
    with pytest.raises(UsageError, match="'c'") as caught:
        find(cluster, "c")
    assert caught.value.hint == "Known: 7, a, b."


def test_old_files_are_swept_and_young_ones_stay(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("jobs/old.json", "records/old.json", "starts/old/key", "lib/old.py", "jobs/young.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("jobs/old.json", "records/old.json", "starts/old", "lib/old.py"):
        os.utime(tmp_path / name, (1e9, 1e9))
    sweep(cluster)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert [name for name in left if "old" in name or "young" in name] == ["jobs/young.json", "lib/old.py"]


def test_what_runs_or_waits_for_longer_than_a_week_keeps_its_files(cluster: Cluster, tmp_path: Path) -> None:
    files = ("jobs/runs.json", "jobs/runs.events", "jobs/runs-0.master", "starts/aa/key", "jobs/waits.json",
             "jobs/chain.stop", "jobs/ended.json", "jobs/ended.events", "starts/bb/key", "jobs/.hidden")  # fmt: skip
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9, 1e9))
        os.utime(path.parent, (1e9, 1e9))
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "aa.json").write_text(json.dumps({"ticket": "runs"}))  # renewed just now
    waits = judge(replace(TICKET, id="waits", chain="chain"), queue("PENDING", "Resources"), [], 150)
    ended = judge(replace(TICKET, id="ended"), queue("COMPLETED"), [], 150)
    alone = judge(replace(TICKET, id="alone"), queue("PENDING"), [], 150)
    sweep(cluster, [waits, ended, alone])
    assert {name for name in files if not (tmp_path / name).exists()} == {
        "jobs/ended.json", "jobs/ended.events", "starts/bb/key", "jobs/.hidden",
    }  # fmt: skip
