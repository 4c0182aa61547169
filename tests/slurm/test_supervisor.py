"""The supervisor, run as a process as Slurm runs it; the server below it is a quick stand-in for vLLM."""

from __future__ import annotations

import ast
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from biollm.slurm.supervisor import supervisor

pytestmark = pytest.mark.slow  # each takes seconds
PACKAGE = Path(supervisor.__file__).parent
FAKE = Path(__file__).parents[1] / "fake_vllm.py"


def flags(**options: object) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Job:
    """Runs of the supervisor below `root`, started with a command line like the rendered one."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run" / "biollm"
        self.log = root / "log"
        self._jobs: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        *fakes: str,
        options: tuple[str, ...] = (),
        through: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        **more: Any,
    ) -> int:
        """Start a job with one stand-in server for each of `fakes`; return its process id.

        Further keywords are options of the supervisor; those of a model go to every model.
        """
        lib = self.run / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / "supervisor.py", lib / "biollm_supervisor_0.py")
        shutil.copy(PACKAGE / "auth_middleware.py", lib / "biollm_supervisor_0_auth.py")
        (self.run / "nodes-lab.json").write_text(json.dumps({"node1": "127.0.0.1"}))
        each = {"gpus": 0, "start_timeout": 60}
        each = {name: more.pop(name, default) for name, default in each.items()}
        words = flags(
            log_dir=self.log, cluster="lab", **{"walltime": 3600, "drain": 60, "heartbeat": 0.2, "grace": 0.2} | more
        )
        for number, fake in enumerate(fakes):
            words += ["--and"] * bool(number) + flags(model=f"m{number}", **each) + ["--", sys.executable, str(FAKE)]
            words += ["serve", "/models/m", "--served-model-name", f"m{number}", "--fake", fake]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "CUDA"))}
        job = subprocess.Popen(
            [*through, sys.executable, str(lib / "biollm_supervisor_0.py"), "--submission", "t", *options, *words],
            stdin=subprocess.DEVNULL, env=clean | {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1"} | (env or {}),
        )  # fmt: skip
        self._jobs.append(job)
        return job.pid

    def end(self, seconds: float = 30) -> int:
        """Wait for the job that was started last; return its exit code."""
        return self._jobs[-1].wait(seconds)

    def records(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in sorted((self.run / "records").glob("*.json")):
            with suppress(FileNotFoundError):  # it ended between the listing and the reading
                found.append(json.loads(path.read_text()))
        return found

    def record(self, model: str = "m0") -> dict[str, Any]:
        """Wait for the model's record."""
        return wait_for(lambda: next((r for r in self.records() if r["model"] == model), None), f"a record of {model}")

    def key(self, record: dict[str, Any]) -> str:
        return (self.run / "starts" / record["start"] / "key").read_text()

    def events(self, model: str = "m0") -> list[dict[str, Any]]:
        path = self.run / "jobs" / "t.events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["model"] in (model, "*")]

    def states(self, model: str = "m0") -> list[str]:
        return [event["state"] for event in self.events(model)]

    def stop(self) -> None:
        for job in self._jobs:
            if job.poll() is None:
                job.kill()
                job.wait()


def test_the_node_files_need_no_newer_python_than_3_9() -> None:
    for name in ("supervisor.py", "auth_middleware.py"):
        ast.parse((PACKAGE / name).read_text(), feature_version=(3, 9))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A folder in which jobs run; ended with the test."""
    job = Job(tmp_path)
    yield job
    job.stop()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.02)
    return found


def ask(
    record: dict[str, Any], path: str, key: str = "", method: str = "GET", body: str = ""
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(record["address"], record["port"], timeout=30)
    connection.request(method, path, body, {"Authorization": f"Bearer {key}"} if key else {})
    return connection.getresponse()


def complete(job: Job, record: dict[str, Any]) -> int:
    return ask(record, "/v1/completions", job.key(record), "POST", json.dumps({"prompt": "x"})).status


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_publishes_a_record_after_a_completion_of_its_own(job: Job) -> None:
    job.start("")
    record = job.record()
    path = job.run / "records" / f"{record['start']}.json"
    assert (record["model"], record["host"], record["address"]) == ("m0", "node1", "127.0.0.1")
    assert (record["job"], record["submission"], record["cluster"]) == ("7", "t", "lab")
    assert 3590 <= record["left_s"] <= 3600
    assert path.stat().st_mode & 0o777 == 0o600
    assert (job.run / "starts" / record["start"] / "key").stat().st_mode & 0o777 == 0o600
    assert ask(record, "/health").headers["x-biollm-start"] == record["start"]
    assert complete(job, record) == 200
    assert job.states() == ["starting", "ready"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file to any group")
def test_a_shared_server_opens_record_and_key_to_the_group_alone(job: Job) -> None:
    job.start("", options=("--share", "nogroup"))
    start = job.record()["start"]
    for path, mode in ((f"records/{start}.json", 0o640), (f"starts/{start}", 0o750), (f"starts/{start}/key", 0o640)):
        assert (job.run / path).stat().st_mode & 0o777 == mode
        assert (job.run / path).group() == "nogroup"


def test_does_not_publish_when_the_first_completion_fails(job: Job) -> None:
    job.start("refuse")
    assert job.end() == 70
    assert job.records() == []
    assert "first completion failed: HTTP 500" in job.events()[-1]["reason"]


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/models", "/metrics", "/docs", "/", "/health/", "/invocations"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_every_route_needs_the_key(protected: tuple[Job, dict[str, Any]], path: str, method: str) -> None:
    job, record = protected
    assert ask(record, path, method=method).status == 401
    assert ask(record, path, key="wrong", method=method).status == 401
    assert ask(record, path, key=job.key(record), method=method).status != 401


def test_a_server_does_not_start_with_an_empty_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    end, lifeline = os.pipe()
    env = {"BIOLLM_START": "0", "BIOLLM_KEY_FILE": str(tmp_path / "key"), "BIOLLM_LIFELINE": str(end)}
    make = [
        sys.executable,
        "-c",
        "from biollm.slurm.supervisor.auth_middleware import AuthMiddleware; AuthMiddleware(None)",
    ]
    ran = subprocess.run(make, env={**os.environ, **env}, capture_output=True, pass_fds=[end, lifeline],
                         start_new_session=True, text=True, timeout=30, check=False)  # fmt: skip
    os.close(end)
    os.close(lifeline)
    assert ran.returncode == 1 and "holds no key" in ran.stderr


def test_health_needs_no_key_and_shows_counts_only_to_clients_with_the_key(
    protected: tuple[Job, dict[str, Any]],
) -> None:
    job, record = protected
    assert ask(record, "/health").status == 200
    assert "x-biollm-in-flight" not in ask(record, "/health").headers
    assert ask(record, "/health", key=job.key(record)).headers["x-biollm-in-flight"] == "0"
    assert ask(record, "/health", method="POST").status == 401


def test_a_server_proves_its_start_for_a_nonce(protected: tuple[Job, dict[str, Any]]) -> None:
    job, record = protected
    for nonce in ("0" * 32, "0123456789abcdef" * 4):
        text = f"{nonce}{record['start']}".encode()
        expected = hmac.new(job.key(record).encode(), text, hashlib.sha256).hexdigest()
        for path in (f"/health?nonce={nonce}", f"/health?a=b&nonce={nonce}&c=d"):
            answer = ask(record, path)
            assert (answer.status, answer.headers["x-biollm-proof"]) == (200, expected)
    for odd in ("", "0" * 31, "0" * 65, "G" * 32, "%30" * 32):
        assert "x-biollm-proof" not in ask(record, f"/health?nonce={odd}").headers
    assert "x-biollm-proof" not in ask(record, f"/v1/models?nonce={'0' * 32}", job.key(record)).headers


def test_a_refusal_names_the_start_too(protected: tuple[Job, dict[str, Any]]) -> None:
    _, record = protected
    assert ask(record, "/v1/models").headers["x-biollm-start"] == record["start"]


def test_the_key_is_in_no_argument_environment_log_event_or_record(
    protected: tuple[Job, dict[str, Any]],
) -> None:
    job, record = protected
    key = job.key(record).encode()
    for file in [*job.log.iterdir(), *(job.run / "jobs").iterdir(), *(job.run / "records").iterdir()]:
        assert key not in file.read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert key not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, dict[str, Any]]]:
    job = Job(tmp_path_factory.mktemp("protected"))
    job.start("")
    yield job, job.record()
    job.stop()


@pytest.mark.parametrize(
    ("fake", "spec", "code", "reason"),
    [
        ("crash", {}, 3, "the server ended by exit code 3"),
        ("mute", {"start_timeout": 1}, 75, "not ready within the start timeout of 1 s"),
        ("", {"gpus": 4}, 78, "the models need 4 GPUs, the job was granted 2"),
    ],
)
def test_a_start_that_fails_says_why(job: Job, fake: str, spec: dict[str, Any], code: int, reason: str) -> None:
    job.start(fake, env={"CUDA_VISIBLE_DEVICES": "2,3"}, **spec)
    assert job.end() == code
    assert job.records() == []
    assert (job.states()[-1], job.events()[-1]["reason"]) == ("failed", reason)


def test_a_later_crash_removes_only_its_own_record(job: Job) -> None:
    job.start("die:1.5", "")
    job.record("m0")
    keeps = job.record("m1")
    wait_for(lambda: [r["model"] for r in job.records()] == ["m1"], "the record's end")
    wait_for(lambda: job.states("m0")[-1] == "failed", "its event")
    assert complete(job, keeps) == 200


def test_an_unwritable_run_directory_is_an_error_not_a_wait(job: Job) -> None:
    job.run.mkdir(parents=True)
    (job.run / "records").write_text("a file where the folder should be")
    job.start("")
    assert job.end() == 78


@pytest.mark.parametrize(
    ("how", "mark", "why"),
    [(signal.SIGUSR1, "", "walltime"), (signal.SIGTERM, "", "cancelled"), (signal.SIGUSR1, "t.stop", "down")],
)
def test_leaves_routing_first_finishes_what_runs_and_exits_0(
    job: Job, how: signal.Signals, mark: str, why: str
) -> None:
    pid = job.start("slow:1")
    record = job.record()
    answers: list[int] = []
    request = threading.Thread(target=lambda: answers.append(complete(job, record)))
    request.start()
    wait_for(lambda: ask(record, "/health", job.key(record)).headers["x-biollm-in-flight"] == "1", "the request")
    if mark:
        (job.run / "jobs" / mark).touch()
    os.kill(pid, how)
    wait_for(lambda: not job.records(), "the record's end", 2)
    assert not answers
    assert job.end() == 0
    request.join()
    assert answers == [200]
    assert job.states() == ["starting", "ready", "draining", "stopped"]
    assert job.events()[-1]["reason"] == why
    assert not list((job.run / "starts").iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_the_supervisor_did_not_write_stays(job: Job, tmp_path: Path, rank: str) -> None:
    mine = [job.run / "starts" / "none" / "mine", job.run / "records" / "none.json", tmp_path / "mine"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"model": "mine"}')
    (job.run / "jobs").mkdir()
    (job.run / "jobs" / "t.events").symlink_to(tmp_path / "mine")
    pid = job.start("", nodes=2, env={"SLURM_PROCID": rank})
    if rank == "0":
        record = job.record()
        mine.append(job.run / "starts" / record["start"] / "core.123")
        mine[-1].touch()
    else:
        time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    job.end()
    assert all(path.exists() for path in mine)
    assert (tmp_path / "mine").read_text() == '{"model": "mine"}'
    assert not list((job.run / "starts").glob("*/key"))


def test_a_server_that_ignores_term_is_killed(job: Job) -> None:
    pid = job.start("stubborn", drain=1)
    record = job.record()
    os.kill(pid, signal.SIGUSR1)
    assert job.end() == 0
    assert not listens(record["port"])


def test_stops_when_idle_but_not_before_the_first_ready(job: Job) -> None:
    job.start("", idle_timeout=1)
    assert job.end() == 0
    assert job.states() == ["starting", "ready", "draining", "stopped"]
    assert job.events()[-1]["reason"] == "idle"


def test_models_of_one_job_stop_only_when_all_are_idle(job: Job) -> None:
    job.start("slow:3", "", idle_timeout=1)
    busy = job.record("m0")
    threading.Thread(target=complete, args=(job, busy)).start()
    assert job.end() == 0
    assert job.events("m0")[-1]["at"] - job.events("m0")[0]["at"] > 6  # its first completion, then the request


def test_a_killed_supervisor_takes_its_server_with_it(job: Job) -> None:
    pid = job.start("")
    record = job.record()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not listens(record["port"]), "the server's end")


def test_leaves_when_its_parent_dies(job: Job) -> None:
    shell = job.start("", through=("sh", "-c", '"$@" & wait', "sh"))
    record = job.record()
    os.kill(shell, signal.SIGKILL)
    wait_for(lambda: job.states()[-1] == "stopped", "the end")
    assert job.events()[-1]["reason"] == "orphaned"
    assert not listens(record["port"])


def test_another_process_on_the_port_never_counts_as_ready(job: Job) -> None:
    """vLLM on a taken port lives on silently, and /health is answered by the other server."""
    job.start("mute")
    port = wait_for(lambda: job.events(), "the start")[0]["port"]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        stranger, _ = other.accept()
        stranger.recv(1000)
        stranger.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        stranger.close()
    wait_for(lambda: job.states() == ["starting", "restarting", "starting"], "the next start")
    assert job.events()[-1]["port"] != port
    assert job.records() == []


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"], ids=["nothing", "503"])
def test_a_process_on_the_port_does_not_get_the_key_while_the_model_loads(job: Job, says: bytes) -> None:
    """A key that leaks before the server listens would be that of the record afterwards."""
    job.start("mute")
    begun = wait_for(lambda: job.events(), "the start")[0]
    heard: list[bytes] = []
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", begun["port"]))
        other.listen()
        for _ in range(3):
            stranger, _ = other.accept()
            heard.append(stranger.recv(10000))
            stranger.sendall(says)
            stranger.close()
    assert job.states() == ["starting"], "it goes on with this key"
    assert all(each.startswith(b"GET /health") for each in heard)
    assert not any(job.key(begun).encode() in each for each in heard)


def test_a_predecessor_stays_until_its_successor_is_published(job: Job) -> None:
    first = job.start("", options=("--chain", "c", "--link", "1", "--links", "2"))
    job.record()
    os.kill(first, signal.SIGUSR1)
    job.start("", options=("--chain", "c", "--link", "2", "--links", "2"))
    wait_for(lambda: len(job.records()) == 2, "the successor's record")
    wait_for(lambda: [r["link"] for r in job.records()] == [2], "the predecessor's end")
    assert ask(job.records()[0], "/health").status == 200


def test_a_stopped_chain_does_not_start_its_next_link(job: Job) -> None:
    (job.run / "jobs").mkdir(parents=True)
    (job.run / "jobs" / "c.stop").touch()
    job.start("", options=("--chain", "c", "--link", "2", "--links", "2"))
    assert job.end() == 0
    assert job.states() == ["stopped"]


def test_an_idle_chain_stops_its_next_link(job: Job) -> None:
    job.start("", options=("--chain", "c", "--link", "1", "--links", "2"), idle_timeout=1)
    assert job.end() == 0
    assert (job.run / "jobs" / "c.stop").exists()


@pytest.mark.parametrize(
    ("gpus", "granted", "pieces"),
    [
        ([1], "2", ["2"]),
        ([1, 1, 2, 4], "0,1,2,3,4,5,6,7", ["0", "1", "2,3", "4,5,6,7"]),
        ([2, 1], "3,5,6", ["3,5", "6"]),
        ([0], None, [None]),
        ([0, 0], "0,1", [None, None]),
        ([1], "GPU-af,MIG-1", ["GPU-af"]),
        ([2], None, ["0,1"]),
    ],
)
def test_each_model_gets_a_slice_of_the_granted_devices(
    gpus: list[int], granted: str | None, pieces: list[str | None]
) -> None:
    assert supervisor.assign_devices(gpus, granted) == pieces


def test_the_walltime_left_counts_down_in_the_record(job: Job) -> None:
    job.start("", walltime=100)
    first = job.record()
    wait_for(lambda: job.records()[0]["left_s"] < first["left_s"], "a renewal")


def test_the_end_given_by_slurm_counts_when_it_is_earlier(job: Job) -> None:
    job.start("", env={"SLURM_JOB_END_TIME": str(int(time.time()) + 600)})
    assert job.record()["left_s"] <= 600
