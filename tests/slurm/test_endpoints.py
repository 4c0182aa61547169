"""Records in a run directory, read as clients read them; the servers are small, the clocks are the files' own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import until
from provider import Loopback

from biollm._ownership import listener_trusted, uids
from biollm.client import CompletionError, get_model_client
from biollm.config import Cluster, load_config
from biollm.routing.waterfall import _SETTLE_S
from biollm.slurm.endpoints import _FIRST_S, PROOF, Records, Watch, ask, load, proof, read_key
from biollm.slurm.endpoints import START as START_HEADER

START = "0123456789abcdef0123456789abcdef"
METRICS = 'vllm:num_requests_running{model="m"} 2.0\nvllm:num_requests_waiting{model="m"} 1.0\nvllm:other 5\n'


class Server(ThreadingHTTPServer):
    """Answers every GET, naming `start` (or "" for the number of the address); /metrics wants the key."""

    request_queue_size = 200

    def __init__(self, start: str = START, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.start, self.asked, self.pause = start, 0, 0.0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked += 1
        time.sleep(self.server.pause)
        path, _, nonce = self.path.partition("?nonce=")
        known = path == "/health" or self.headers["authorization"] == "Bearer secret"
        self.send_response(200 if known else 401)
        number = int(self.connection.getsockname()[0].rpartition(".")[2])
        start = self.server.start or f"{number:032x}"
        self.send_header(START_HEADER, start)
        if nonce:
            self.send_header(PROOF, proof("secret", nonce, start))
        self.send_header("content-length", str(len(METRICS)))
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "biollm" / "records").mkdir(parents=True)
    (tmp_path / "biollm" / "nodes-lab.json").write_text(json.dumps({"node1": "10.0.0.1"}))
    return Cluster(name="lab", run_dir=tmp_path)


def publish(site: Cluster, port: int = 1, *, age: float = 0, start: str = START, **changes: Any) -> Path:
    """Write a record as the supervisor does, renewed `age` seconds ago; None takes a field out."""
    assert site.run_dir
    record = {"start": start, "cluster": "lab", "job": "7", "submission": "t", "model": "qwen",
              "host": "node1", "address": "127.0.0.1", "port": port, "left_s": 3600, "chain": "",
              "link": 1}  # fmt: skip
    record = {key: value for key, value in (record | changes).items() if value is not None}
    path = site.run_dir / "biollm" / "records" / f"{start}.json"
    path.write_text(json.dumps(record))
    path.chmod(0o600)
    then = time.time() - age
    os.utime(path, (then, then))
    key = path.parents[1] / "starts" / start / "key"
    key.parent.mkdir(parents=True, exist_ok=True)
    key.write_text("secret\n")
    return path


def test_a_live_record_becomes_an_endpoint(cluster: Cluster, server: Server) -> None:
    publish(cluster, server.server_port)
    (endpoint,) = Watch(cluster).refresh()
    assert (endpoint.model, endpoint.job, endpoint.host) == ("qwen", "7", "node1")
    assert endpoint.base_url == f"http://127.0.0.1:{server.server_port}/v1"
    assert endpoint.owner == os.getuid()
    assert 3590 < endpoint.left_s <= 3600
    assert read_key(endpoint) == "secret"
    assert "secret" not in repr(endpoint)


def test_an_empty_key_of_a_server_is_none(cluster: Cluster, server: Server) -> None:
    publish(cluster, server.server_port)
    (endpoint,) = Watch(cluster).refresh()
    endpoint.key_file.write_text("\n")
    with pytest.raises(OSError, match="holds no key"):
        read_key(endpoint)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"age": 25}, "was not renewed for 25 s"),
        ({"left_s": 5}, "its walltime is about to end"),
        ({"left_s": 15, "age": 10}, "its walltime is about to end"),
        ({"cluster": "other"}, "belongs to the cluster 'other'"),
        ({"address": "10.9.9.9"}, "node1 (10.9.9.9) is not known as a node of the cluster"),
        ({"address": "10.0.0.1", "host": "node2"}, "node2 (10.0.0.1) is not known as a node of the cluster"),
        ({"port": None}, "cannot be read, or is no record"),
        ({"left_s": "soon"}, "cannot be read, or is no record"),
    ],
)
def test_a_record_that_does_not_count_says_why(cluster: Cluster, changes: dict[str, Any], why: str) -> None:
    publish(cluster, **changes)
    assert Records(cluster).read() == ([], {START: why})


def test_files_of_the_users_own_in_a_folder_named_records_are_not_read(cluster: Cluster) -> None:
    (path := publish(cluster)).rename(path.with_name("patient-7.json"))
    assert Records(cluster).read() == ([], {})


def test_a_node_of_the_cluster_counts(cluster: Cluster) -> None:
    publish(cluster, address="10.0.0.1")
    alive, _ = Records(cluster).read()
    assert [endpoint.base_url for endpoint in alive] == ["http://10.0.0.1:1/v1"]


@pytest.mark.parametrize("text", ["", '{"job": 1, "start', "[]", "null"])
def test_a_half_written_record_is_left_out(cluster: Cluster, text: str) -> None:
    publish(cluster).write_text(text)
    assert Records(cluster).read() == ([], {START: "cannot be read, or is no record"})


def test_a_record_that_others_may_write_or_that_is_a_link_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    path = publish(cluster)
    path.chmod(0o666)
    assert Records(cluster).read()[0] == []
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert Records(cluster).read()[0] == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(("trusted", "count"), [((), 0), (("nobody",), 1), (("no-such-user",), 0)])
def test_the_owner_must_be_the_user_or_trusted(cluster: Cluster, trusted: tuple[str, ...], count: int) -> None:
    path = publish(cluster)
    os.chown(path, *(next(iter(uids(["nobody"]) - {0})),) * 2)
    assert len(Records(cluster.model_copy(update={"trusted_owners": trusted})).read()[0]) == count


def test_no_run_directory_means_no_servers(tmp_path: Path) -> None:
    assert Watch(Cluster(name="lab", run_dir=tmp_path / "none")).refresh() == ()
    assert not (tmp_path / "none").exists()


def test_a_clock_that_is_wrong_by_minutes_changes_nothing(cluster: Cluster) -> None:
    """Ages are differences of times that one file system wrote: a node's or a client's clock has no say."""
    publish(cluster, at=time.time() - 300)
    assert len(Records(cluster).read()[0]) == 1


def test_another_server_on_the_port_is_not_used(cluster: Cluster, server: Server) -> None:
    publish(cluster, server.server_port)
    server.start = "f" * 32
    assert Watch(cluster).refresh() == ()


def test_a_server_that_is_gone_is_not_used(cluster: Cluster) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        publish(cluster, held.getsockname()[1])
        assert Watch(cluster).refresh() == ()


def test_a_watch_sees_what_comes_and_goes(cluster: Cluster, server: Server) -> None:
    watch = Watch(cluster, interval=0.02)
    assert watch.alive() == ()
    path = publish(cluster, server.server_port)
    wait_for(lambda: len(watch.alive()) == 1)
    path.unlink()
    wait_for(lambda: watch.alive() == ())


def test_a_watch_asks_a_server_once_not_at_each_refresh(cluster: Cluster, server: Server) -> None:
    publish(cluster, server.server_port)
    watch = Watch(cluster)
    for _ in range(5):
        assert len(watch.refresh()) == 1
    assert server.asked == 1


@pytest.mark.slow
def test_a_new_server_that_is_slow_to_answer_counts_by_its_record(cluster: Cluster, server: Server) -> None:
    server.pause = 1.5  # more than a look waits for
    publish(cluster, server.server_port)
    assert len(Watch(cluster).refresh()) == 1


def test_a_look_that_began_earlier_does_not_take_back_what_a_later_one_found(cluster: Cluster, server: Server) -> None:
    watch = Watch(cluster, interval=60)
    publish(cluster, server.server_port)
    server.pause = 0.8  # for the first look alone
    earlier = threading.Thread(target=watch.refresh)
    earlier.start()
    until(lambda: server.asked)
    server.pause = 0
    with Server("f" * 32) as new:
        publish(cluster, new.server_port, start="f" * 32)
        assert len(watch.refresh()) == 2
        earlier.join()
        assert len(watch._alive) == 2
        new.shutdown()


def test_a_watch_works_in_the_child_of_a_fork(cluster: Cluster, server: Server) -> None:
    watch = Watch(cluster, interval=0.02)
    watch.alive()
    if (child := os.fork()) == 0:
        publish(cluster, server.server_port)
        end = time.monotonic() + 10
        while not watch.alive() and time.monotonic() < end:
            time.sleep(0.02)
        os._exit(0 if watch.alive() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_a_file_system_that_does_not_answer_blocks_no_caller(
    net: Loopback, waterfall: Callable[..., Path], state: Path
) -> None:
    (state / "slurm" / "biollm" / "records").mkdir(parents=True)
    os.mkfifo(state / "slurm" / "biollm" / "records" / f"{START}.json")  # to open it waits until somebody writes
    waterfall(first=net.serve())
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: get_model_client().complete("hi", deadline=30), range(2)))
    assert [answer.provider for answer in answers] == ["first", "first"]
    began = time.monotonic()
    assert {get_model_client().complete("hi").provider for _ in range(10)} == {"first"}
    assert time.monotonic() - began < 10, "only the first request waits"


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
def test_a_request_that_only_a_server_can_answer_waits_for_a_slow_file_system(
    net: Loopback, waterfall: Callable[..., Path], state: Path, answers: bool
) -> None:
    """Before it has answered, "no server is up" would be a guess."""
    server = net.serve(text="from the server")
    server.start_id, server.key = START, "secret"
    models = {"mine": {"type": "local", "hf_id": "lab/mine"}}
    waterfall({"models": models}, vllm={"type": "local", "models": ["mine"]})
    site = load_config().cluster.model_copy(update={"run_dir": state / "slurm"})
    (state / "slurm" / "biollm" / "records").mkdir(parents=True)
    os.mkfifo(slow := state / "slurm" / "biollm" / "records" / f"{'f' * 32}.json")
    publish(site, urlsplit(server.url).port or 0, cluster=site.name, model="mine")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(get_model_client().complete, "hi", deadline=30)
        time.sleep(_FIRST_S + 1 if answers else _SETTLE_S + _FIRST_S + 1)
        early, _ = asked.done(), slow.open("w").close()
        if answers:
            assert (early, asked.result().text) == (False, "from the server")
        else:
            with pytest.raises(CompletionError, match="vllm/mine: the run directory does not answer"):
                asked.result()
            wait_for(lambda: get_model_client().complete("hi").text == "from the server")


@pytest.mark.slow
def test_a_watch_says_nothing_when_the_program_ends(cluster: Cluster, tmp_path: Path) -> None:
    with socket.socket() as held:  # nothing answers there, so that it is probed again every 2 s
        held.bind(("127.0.0.1", 0))
        publish(cluster, held.getsockname()[1])
        code = f"""
import atexit, time
from pathlib import Path
from biollm.config import Cluster
from biollm.slurm.endpoints import Watch
atexit.register(time.sleep, 3)
Watch(Cluster(name="lab", run_dir=Path({str(tmp_path)!r})), interval=0.01).alive()
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_200_servers_are_asked_for_without_file_access(cluster: Cluster) -> None:
    with Server(start="", host="0.0.0.0") as server:
        nodes = {f"n{number}": f"127.0.1.{number}" for number in range(200)}
        (cluster.run_dir / "biollm" / "nodes-lab.json").write_text(json.dumps(nodes))
        for number in range(200):
            start, host = f"{number:032x}", f"n{number}"
            publish(cluster, server.server_port, start=start, host=host, address=nodes[host], model=f"m{number}")
        watch = Watch(cluster)
        assert watch.settle(60)  # `alive` would wait for 2 s
        assert len(watch.alive()) == 200
        began = time.perf_counter()
        for _ in range(1000):
            watch.alive()
        assert time.perf_counter() - began < 1  # a thousand times at 1 ms each, what a completion may pay
        server.shutdown()


def test_load_reads_the_servers_own_metrics(cluster: Cluster, server: Server) -> None:
    publish(cluster, server.server_port)
    (endpoint,) = Watch(cluster).refresh()
    assert load(endpoint) == (2, 1)


def test_an_answer_of_another_server_is_an_error(cluster: Cluster, server: Server) -> None:
    publish(cluster, server.server_port)
    (endpoint,) = Watch(cluster).refresh()
    server.start = "f" * 32
    with pytest.raises(ConnectionError, match="does not prove to be its server"):
        ask(endpoint, "GET", "/metrics", timeout=5)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can listen as somebody else")
@pytest.mark.parametrize("host", [socket.gethostname(), "localhost", "127.0.0.1", "127.0.0.2", "127.9.9.9", "[::1]"])
def test_a_fixed_url_is_trusted_by_who_listens_there(host: str) -> None:
    os.seteuid(65534)
    try:
        other = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    with other:
        url = f"http://{host}:{other.getsockname()[1]}/v1"
        assert not listener_trusted(url, ())
        assert listener_trusted(url, ("65534",))


def test_other_hosts_and_free_ports_are_not_judged(server: Server) -> None:
    assert listener_trusted(f"http://127.0.0.1:{server.server_port}/v1", ())
    assert listener_trusted("https://models.example.org/v1", ())
    assert listener_trusted("http://localhost:1/v1", ())


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
