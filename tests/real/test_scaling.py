"""One whole cycle of scaling: real Slurm, real vLLM, a waterfall whose only deployment has no server at first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from slurm_lab import SlurmLab, wait_until
from test_serving import CPU

from biollm import slurm
from biollm._runtime import ledger
from biollm.client import get_model_client
from biollm.config import load_config
from biollm.errors import CompletionError
from biollm.slurm import scaling
from biollm.slurm.scaling import Decision, Delays

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
SHORT = Delays(demand=2, quiet=6, hold=4)


@pytest.fixture
def configured(lab: SlurmLab, vllm_env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    # one request at a time, so that a second one waits
    args = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 1}
    smollm = {
        "type": "local",
        "path": str(vllm_env / "share" / "smollm2-135m"),
        "start_timeout": 400,
        "vllm_args": args,
    }
    smollm |= {"context_length": 1024, "scale": {"min": 0, "max": 2, "target_waiting": 1}}
    cluster = {"name": "lab", "partition": "gpu", "run_dir": str(tmp_path / "run"), "exclusive": False, "drain": 60}
    cluster |= {"environment": {"venv": str(vllm_env), "env": CPU}, "walltime": "1:00:00", "gpu_type": None}
    cluster |= {"cpus_per_node": None, "memory_gb_per_node": None}
    files = {
        "models": {"inherit": False, "models": {"smollm": smollm}},
        "providers": {"inherit": False, "providers": {"vllm": {"type": "local", "priority": 5, "models": ["smollm"]}}},
        "cluster": {"cluster": cluster},
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(folder))


def looking_until(done: Callable[[Decision], bool], seconds: float) -> list[str]:
    """Look every second until a decision is as wanted; return the different lines."""
    lines: list[str] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        decision = scaling.look(load_config(), ledger(), {}, SHORT)["smollm"]
        if decision.line not in lines[-1:]:
            print(decision.line)
            lines.append(decision.line)
        if done(decision):
            return lines
        time.sleep(1)
    pytest.fail(f"the last decisions were {lines[-5:]}")


def test_demand_start_serve_second_replica_drain_and_stop(configured: None, lab: SlurmLab) -> None:
    cluster = load_config().cluster
    client = get_model_client()

    def phases() -> list[str]:
        return sorted(job.phase for job in slurm.status(cluster) if not job.over)

    try:
        for _ in range(3):  # demand
            with pytest.raises(CompletionError, match="no server is up"):
                client.complete("Say hello.")
            time.sleep(1.1)
        ledger().flush()
        assert looking_until(lambda decision: decision.change == 1, 10)[-1] == "scaled up to 1: 3 requests found no server in 2 min"  # fmt: skip
        (first,) = slurm.status(cluster)
        assert (
            scaling.look(load_config(), ledger(), {}, SHORT)["smollm"].line == "not scaled: 1 job pending or starting"
        )
        slurm.wait_for([first.submission], cluster)
        # The client's last look at the servers may be some seconds old.
        wait_until(lambda: any(each.status == "ready" for each in client.explain()), 60, "the server")
        assert client.complete("Say hello.", max_tokens=8, timeout=120).deployment.startswith("vllm/smollm#")

        answers: list[str] = []
        failed: list[str] = []
        over = threading.Event()

        def load() -> None:
            while not over.is_set():
                try:
                    answers.append(client.complete("Once upon a time", max_tokens=100, timeout=120).deployment)
                except CompletionError as error:
                    failed.append(str(error))

        loading = [threading.Thread(target=load) for _ in range(5)]
        for thread in loading:
            thread.start()
        try:
            (*_, line) = looking_until(lambda decision: decision.change == 1, 60)
            assert line.startswith("scaled up to 2: 1 running and ")
            wait_until(lambda: phases() == ["ready", "ready"], 300, "the second replica")
            wait_until(lambda: len(set(answers)) == 2, 120, "answers of both")
            assert scaling.look(load_config(), ledger(), {}, SHORT)["smollm"].change == 0  # the most is 2
        finally:
            over.set()
            for thread in loading:
                thread.join()
        looking_until(lambda decision: decision.change == -1, 60)
        wait_until(lambda: phases() == ["ready"], 90, "the drain of one")
        (*_, line) = looking_until(lambda decision: decision.change == -1, 60)
        assert line == "scaled down to 0: quiet for 6 s"
        wait_until(lambda: phases() == [], 90, "the stop of the last")
        assert failed == []
        assert {job.reason for job in slurm.status(cluster)} == {"down"}
    finally:
        lab.cancel_all()
