"""The job that trains an adapter: its memory, its script, and what the script does at the walltime."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran

from biollm.config import Cluster, Environment, Model, load_config
from biollm.errors import DoesNotFitError, UnavailableError, UsageError
from biollm.slurm import training
from biollm.slurm.commands import Queue, Row
from biollm.slurm.memory import GIB
from biollm.slurm.script import Options
from biollm.slurm.submissions import Submission, job_of
from biollm.slurm.training import Training

Biollm = Callable[..., Ran]
QWEN, LLAMA, MINIMAX = (load_config().models[name] for name in ("qwen-coder-32b", "llama-3.3-70b", "minimax-m2"))
MINE = Model(key="mine", path=Path("/weights/mine"))


@pytest.fixture
def site(tmp_path: Path) -> Cluster:
    return Cluster(name="lab", run_dir=tmp_path / "run")


def plan(folder: Path, **changes: Any) -> Training:
    return Training(**{"name": "tuned", "data": folder / "train.jsonl", "output": folder / "out"} | changes)


def test_the_memory_of_a_training() -> None:
    gpus, parts = training.memory(QWEN, Cluster(), 16, 2048, None)
    assert gpus == 1
    adapter = 16 * 64 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 27648))
    expected = {
        "weights": 2 * 32_763_876_352, "adapter": 16 * adapter, "activations": (2 * 64 + 34) * 2048 * 5120,
        "logits": 10 * 2048 * 152064, "runtime": 3 * GIB,
    }  # fmt: skip
    assert parts == pytest.approx({name: size / GIB for name, size in expected.items()})


@pytest.mark.parametrize(
    ("model", "length", "gpus", "count"), [(QWEN, 8192, None, 2), (LLAMA, 2048, None, 2), (QWEN, 512, 4, 4)]
)
def test_more_gpus_share_what_they_can(model: Model, length: int, gpus: int | None, count: int) -> None:
    found, parts = training.memory(model, Cluster(), 16, length, gpus)
    assert found == count
    assert model.architecture
    assert parts["weights"] == pytest.approx(2 * model.architecture.parameters / count / GIB)
    assert sum(parts.values()) <= Cluster().gpu_memory_gib


@pytest.mark.parametrize(
    ("model", "length", "gpus", "message"),
    [
        (MINE, 2048, None, "The size of mine is unknown: it has no `architecture:` in models.yaml"),
        (MINIMAX, 2048, None, "is published with quantized weights"),
        (LLAMA, 2048, 1, "needs 1.* GiB per GPU on 1 GPU of 79.1 GiB"),
        (QWEN, 100_000, None, "GiB per GPU on 8 GPUs of"),
        (QWEN, 2048, 9, "A node has 8 GPUs, not 9"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: Model, length: int, gpus: int | None, message: str) -> None:
    with pytest.raises(DoesNotFitError, match=message):
        training.memory(model, Cluster(), 16, length, gpus)


def test_the_job_is_requeued_and_has_what_the_training_needs(site: Cluster, tmp_path: Path) -> None:
    made = training.render(LLAMA, site, plan(tmp_path, name="it's", rank=32), Options(walltime=7200))
    lines = made.text.splitlines()
    for line in ("--requeue", "--gpus-per-node=2", "--time=02:00:00", "--signal=B:USR1@120", "--open-mode=append"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --no-requeue" not in lines
    assert """    --name 'it'"'"'s' \\""" in lines
    assert "    --rank 32 \\" in lines
    assert made.gpus == 2
    subprocess.run(["bash", "-n"], input=made.text, text=True, check=True)


# What stands for the training: it waits for the signal, and ends with the code that the test wants.
PROGRAM = """#!/bin/bash
echo $$ >"$DIR/pid"
trap 'exit "$CODE"' USR1
[ -n "$WAITS" ] || exit "$CODE"
for _ in {1..300}; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("code", "signals", "status", "requeued"),
    [
        (0, 0, 0, False),
        (1, 0, 1, False),
        (137, 0, 137, False),
        (75, 1, 0, True),  # the walltime
        (0, 1, 0, False),  # `biollm down`
    ],
)
def test_only_a_training_that_the_walltime_ended_is_requeued(
    site: Cluster, tmp_path: Path, code: int, signals: int, status: int, requeued: bool
) -> None:
    for name, text in (("python3", PROGRAM), ("scontrol", '#!/bin/bash\necho "$@" >"$DIR/requeued"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    file = tmp_path / "job.sh"
    file.write_text(training.render(MINE, site, plan(tmp_path), Options()).text)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DIR": str(tmp_path), "CODE": str(code), "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", file], env=env | {"WAITS": "1" * signals})
    while not (tmp_path / "pid").exists() and job.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    for _ in range(signals):
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == status
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_training_is_a_phase_of_its_own() -> None:
    def event(state: str, reason: str, restart: int) -> dict[str, Any]:
        return {"model": "tuned", "state": state, "reason": reason, "restart": restart}

    events = [event("training", "step 3 of 9, loss 1.2", 0)]
    submission = Submission("s", "7", ("tuned",), 1, 600, Path("log"), seen=5.0, events=tuple(events))
    running = Queue({"7": Row("7", "RUNNING", "None", "", "n1")}, at=1.0)
    job = job_of(submission, running, (), 6.0)
    assert (job.phase, job.reason, job.over) == ("training", "step 3 of 9, loss 1.2", False)
    events += [event("draining", "saved", 0), event("training", "resuming", 1), event("stopped", "trained", 1)]
    job = job_of(Submission(**vars(submission) | {"events": tuple(events)}), running, (), 6.0)
    assert (job.phase, job.reason) == ("ended", "trained")


def test_what_is_missing_is_found_before_anything_is_submitted(site: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    venv = site.model_copy(update={"environment": Environment(venv=tmp_path / "venv")})
    with pytest.raises(UnavailableError, match="lacks TRL or PEFT") as caught:
        training.train(MINE, venv, plan(tmp_path), Options(), print)
    assert "pip install 'trl>=" in str(caught.value.hint)
    with pytest.raises(UnavailableError, match="The weights of mine are not in /weights/mine"):
        training.train(MINE, site, plan(tmp_path), Options(), print)
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    with pytest.raises(UsageError, match="is trained already"):
        training.train(MINE, site, plan(tmp_path), Options(), print)


def test_the_commands_fit_and_render(biollm: Biollm, tmp_path: Path) -> None:
    ran = biollm("tune", "fit", "qwen-coder-32b")
    assert (ran.code, ran.out.splitlines()[1].split()) == (0, ["weights", "61.0"])
    assert json.loads(biollm("tune", "fit", "llama-3.3-70b", "--json").out)["gpus"] == 2
    assert biollm("tune", "fit", "llama-3.3-70b", "--gpus", "1").code == 78
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "memory"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": chat}))
    options = ("--rank", "8", "--length", "512", "--epochs", "5", "--learning-rate", "0.001")
    ran = biollm("tune", "render", "qwen-coder-32b", tmp_path / "train.jsonl", *options)
    assert ran.code == 0
    words = shlex.split(ran.out.partition('"$@"')[2].partition("&")[0].replace("\\\n", ""))
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert all(values[name] == value for name, value in zip(options[::2], ("8", "512", "5.0", "0.001"), strict=True))
    assert values["--batch"] == "8"
    assert "  --name qwen-coder-32b-tuned \\\n" in ran.out
    assert ran.out.rstrip().endswith('exit "$code"')
    for name in ("llama-3.3-70b", "two\nlines"):
        ran = biollm("tune", "render", "qwen-coder-32b", tmp_path / "train.jsonl", "--name", name)
        assert (ran.code, "cannot be the name of an adapter of qwen-coder-32b" in ran.err) == (2, True)
    for text, message in (("", "has no examples"), ("{}\n", "train.jsonl:1 must be a conversation")):
        (tmp_path / "train.jsonl").write_text(text)
        ran = biollm("tune", "render", "qwen-coder-32b", tmp_path / "train.jsonl")
        assert (ran.code, message in ran.err) == (2, True)
