"""The controller of scaled models: what it sees as demand, what it does, and where its decisions can be read."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import until
from prometheus_client.parser import text_string_to_metric_families
from provider import Loopback

from biollm import slurm
from biollm._runtime import ledger
from biollm.client import CompletionError, get_model_client
from biollm.config import load_config
from biollm.errors import ConfigError
from biollm.ledger import Claim, Record
from biollm.monitoring import metrics, usage
from biollm.slurm import scaling
from biollm.slurm.scaling import Delays

Answer = Callable[[str, str], None]
NOW = Delays(demand=0, quiet=0.2, hold=0.2)
OWN = "vllm/own", "vllm", "default", "own"


@pytest.fixture
def answer(answer: Answer) -> Answer:
    """Let each command answer as where no job runs."""
    answer(
        "sbatch",
        "case \"$*\" in *test-only*) echo 'sbatch: Job 9 to start at 2026-01-01T00:00:00 using' >&2;; *) echo 41;; esac",
    )
    answer("squeue", "true")
    answer("scontrol", "true")
    answer("scancel", "true")
    return answer


@pytest.fixture
def site(answer: Answer, tmp_path: Path, waterfall: Callable[..., Path], net: Loopback) -> Callable[..., None]:
    """Configure a scaled local model between two cloud deployments; `scale` and `cluster` may be changed."""

    def configure(scale: dict[str, int] | None = None, first: Any = None, adapters: Any = None, **cluster: Any) -> None:
        for name in ("bin/vllm", "config.json", "model.safetensors"):
            (tmp_path / name).touch()
        own = {"type": "local", "path": str(tmp_path), "gpus_required": 1, "scale": {"max": 2} | (scale or {})}
        place = {
            "name": "lab",
            "run_dir": str(tmp_path / "run"),
            "environment": {"venv": str(tmp_path)},
            "exclusive": False,
        }
        top = {"models": {"own": own, **(adapters or {})}, "cluster": place | {"gpu_type": None} | cluster}
        waterfall(
            top,
            first=first or net.serve(),
            vllm={"type": "local", "models": ["own", *(adapters or ())]},
            last=net.serve(),
        )

    return configure


def demand(*ago: float) -> None:
    """Let requests of so many seconds ago have found no server."""
    for seconds in ago:
        ledger().finish(None, "", Record(time.time() - seconds, f"r{seconds}", *OWN, "skipped", "no server is up"))
    ledger().flush()


def look(delays: Delays | None = None) -> str:
    return scaling.look(load_config(), ledger(), {}, delays or Delays())["own"].line


def calls(tmp_path: Path, command: str) -> list[str]:
    return [line for line in (tmp_path / "calls.txt").read_text().splitlines() if line.startswith(command)]


@pytest.mark.parametrize(
    ("options", "unserved"),
    [
        ({}, 0),  # the first answers
        ({"provider": "last"}, 0),
        ({"provider": "vllm"}, 1),
        ({"model": "own"}, 1),
    ],
)
def test_a_request_that_finds_no_server_of_a_scaled_model_is_demand(
    site: Callable[..., None], options: dict[str, Any], unserved: int
) -> None:
    site()
    began = time.time()
    client = get_model_client(**options)
    for stream in (False, True):
        with suppress(CompletionError):
            list(client.stream("hi")) if stream else client.complete("hi")
    ledger().flush()
    assert [model for model, _ in ledger().unserved(began)] == ["own"] * 2 * unserved
    assert [row.requests for row in usage.report(load_config(), ledger()).rows] == ([] if unserved else [2])


def test_demand_for_an_adapter_is_demand_for_its_base(site: Callable[..., None], tmp_path: Path) -> None:
    site(adapters={"tuned": {"base": "own", "lora": str(tmp_path)}})
    assert list(scaling.scaled(load_config())) == ["own"]
    with pytest.raises(CompletionError, match="no server is up"):
        get_model_client(model="tuned").complete("hi")
    ledger().flush()
    assert [model for model, _ in ledger().unserved(0)] == ["own"]


def test_a_request_that_a_later_deployment_answers_is_demand_once(site: Callable[..., None], net: Loopback) -> None:
    site(first=net.refusing())
    assert get_model_client().complete("hi", max_retries=1).provider == "last"
    ledger().flush()
    assert [model for model, _ in ledger().unserved(0)] == ["own"]
    assert usage.report(load_config(), ledger()).total.requests == 1


def test_demand_starts_one_server_and_the_decisions_are_shown(
    site: Callable[..., None], answer: Answer, biollm: Callable[..., Any], tmp_path: Path
) -> None:
    site()
    answer("squeue", "echo '41|PENDING|Resources|N/A|'")
    demand(20, 1)
    assert biollm("autoscale").out == "own: not scaled: 2 requests found no server in 2 min, for less than 30 s\n"
    demand(45)
    ran = biollm("autoscale", "--json")
    line = "scaled up to 1: 3 requests found no server in 2 min"
    assert (ran.code, ran.json) == (0, [{"model": "own", "change": 1, "line": line}])
    pending = "own: not scaled: 1 job pending or starting (last: "
    assert biollm("autoscale").out == "own: not scaled: 1 job pending or starting\n"
    assert [call for call in calls(tmp_path, "sbatch") if "--test-only" not in call] == calls(tmp_path, "sbatch")[-1:]
    assert pending in biollm("status").out
    assert pending in biollm("top").out
    families = {each.name: each for each in text_string_to_metric_families(metrics.text(load_config(), ledger()))}
    (sample,) = families["biollm_scaling_decision"].samples
    assert sample.labels["decision"].startswith("not scaled: 1 job pending or starting (last: ")
    states = {each.labels["state"]: each.value for each in families["biollm_scaling_servers"].samples}
    assert states == {"ready": 0, "coming": 1}
    (kept,) = (tmp_path / "run" / "biollm").glob("scale-*.json")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_waiting_requests_at_a_server_start_another(site: Callable[..., None], net: Loopback, tmp_path: Path) -> None:
    site()
    server, start = net.serve(), "0123456789ab4cde8f0123456789abcd"
    server.start_id, server.key = start, "the-key-of-the-start"
    server.metrics = "vllm:num_requests_running 8\nvllm:num_requests_waiting 5\n"
    run = tmp_path / "run" / "biollm"
    (run / "starts" / start).mkdir(parents=True)
    (run / "starts" / start / "key").write_text(server.key)
    (run / "records").mkdir()
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    record = {"start": start, "cluster": "lab", "job": "7", "submission": "another's", "model": "own", "host": "here",
              "address": "127.0.0.1", "port": port, "left_s": 3600, "link": 1}  # fmt: skip
    (run / "records" / f"{start}.json").write_text(json.dumps(record))
    (run / "records" / f"{start}.json").chmod(0o600)
    assert look() == "not scaled: 8 running and 5 waiting at 1 server, for less than 30 s"
    assert look(NOW) == "scaled up to 2: 8 running and 5 waiting at 1 server"
    server.metrics = "vllm:num_requests_running 8\nvllm:num_requests_waiting 0\n"
    assert look(NOW) == "enough: 8 running and 0 waiting at 1 server"


def test_the_successor_of_a_server_is_not_another_one(
    site: Callable[..., None], answer: Answer, tmp_path: Path
) -> None:
    site({"min": 1}, handover=True)
    answer("squeue", "echo '41|PENDING|Dependency|N/A|'")
    assert look() == "scaled up to 1: min is 1"
    assert len([call for call in calls(tmp_path, "sbatch") if "--test-only" not in call]) == 2
    look()
    assert scaling.scaled(load_config())["own"].looks[-1].coming == 1
    assert not (tmp_path / "calls.txt").read_text().count("scancel")


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        ({"max_jobs": 0}, "not scaled: max_jobs of this site is 0: 0 are taken, this would take 1 more."),
        ({"max_gpus": 0}, "not scaled: max_gpus of this site is 0: 0 are taken, this would take 1 more."),
        ({"gpu_hours_per_day": 4}, "not scaled: gpu_hours_per_day of this site is 4: 0 are taken, this would take 8 more."),
        ({"environment": {"venv": "/no/venv"}}, "not scaled: There is no vLLM in /no/venv."),
    ],
)  # fmt: skip
def test_no_server_starts_against_a_limit_of_the_site(
    site: Callable[..., None], tmp_path: Path, cluster: dict[str, Any], line: str
) -> None:
    site(**cluster)
    demand(40, 1)
    assert look() == line
    assert all("--test-only" in call for call in calls(tmp_path, "sbatch"))


def test_a_refusal_of_slurm_and_a_controller_that_is_away_are_decisions_too(
    site: Callable[..., None], answer: Answer, biollm: Callable[..., Any], tmp_path: Path
) -> None:
    site()
    demand(40, 1)
    answer("sbatch", "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1")
    assert look().startswith("not scaled: Slurm has no node with as many GPUs")
    answer("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    for path in (tmp_path / "run" / "biollm").glob("queue-*.json"):
        os.utime(path, (1, 1))
    assert look().startswith("not scaled: Slurm does not answer.")
    ran = biollm("autoscale")
    assert (ran.code, ran.out) == (69, "") and ran.err.startswith("biollm: Slurm does not answer.")


def test_a_server_is_stopped_after_quiet_and_none_starts_for_a_while(
    site: Callable[..., None], answer: Answer, tmp_path: Path
) -> None:
    site()
    answer("squeue", "echo '41|PENDING|Resources|N/A|'")
    demand(100, 99)
    assert look(NOW).startswith("scaled up to 1")
    (tmp_path / "state" / "history.db").unlink()
    look(NOW)
    time.sleep(0.3)
    assert look(NOW) == "scaled down to 0: quiet for 1 s"
    assert calls(tmp_path, "scancel --state=PENDING") == ["scancel --state=PENDING 41"]
    answer("squeue", "echo '41|CANCELLED|None|N/A|'")
    for path in (tmp_path / "run" / "biollm").glob("queue-*.json"):
        os.utime(path, (1, 1))
    demand(40, 1)
    assert re.fullmatch(r"not scaled: a server was stopped \d+ s ago, less than 10 min", look())


def test_a_server_that_was_started_by_hand_counts_but_is_not_stopped(
    site: Callable[..., None], answer: Answer, tmp_path: Path
) -> None:
    site()
    answer("squeue", "echo '41|PENDING|Resources|N/A|'")
    config = load_config()
    slurm.up([config.models["own"]], config.cluster, wait=False)
    demand(40, 1)
    assert look() == "not scaled: 1 job pending or starting"
    assert len(calls(tmp_path, "sbatch")) == 1
    (tmp_path / "state" / "history.db").unlink()
    for _ in range(3):
        time.sleep(0.25)
        line = look(NOW)
    assert line == "not scaled: quiet, but its servers were started by hand"
    assert not (tmp_path / "calls.txt").read_text().count("scancel")


def test_a_model_whose_server_has_just_failed_is_not_started_again(
    site: Callable[..., None], answer: Answer, tmp_path: Path
) -> None:
    site({"min": 1})
    answer("squeue", "echo '41|FAILED|NonZeroExitCode|N/A|'")
    assert look() == "scaled up to 1: min is 1"
    assert "--idle-timeout 0" in next((tmp_path / "run" / "biollm" / "jobs").glob("*.sh")).read_text()
    assert look() == "not scaled: job 41 has failed: FAILED"


def test_one_controller_runs_at_a_time_and_a_dead_one_loses_the_lock(
    site: Callable[..., None], biollm: Callable[..., Any]
) -> None:
    site()
    hold = "from biollm.config import load_config; from biollm.slurm.scaling import controlling\n"
    hold += "with controlling(load_config().cluster) as alone: print(alone, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout and other.stdout.readline() == "True\n"
        ran = biollm("autoscale")
        assert (ran.code, ran.out) == (0, "")
        assert "Another controller runs" in ran.err
        other.send_signal(signal.SIGKILL)
    assert biollm("autoscale").out.startswith("own: enough: ")


def test_the_gateway_is_a_controller(
    site: Callable[..., None], gateway: Callable[..., Any], biollm: Callable[..., Any], state: Path
) -> None:
    site()
    demand(45, 1)
    gateway()
    until(lambda: "own: scaled up to 1" in (state / "gateway.log").read_text())
    assert "Another controller runs" in biollm("autoscale").err


def test_a_model_without_a_controller_says_so(
    site: Callable[..., None], biollm: Callable[..., Any], tmp_path: Path
) -> None:
    site()
    assert "own: not scaled: no controller has looked for 10 min; run `biollm serve`" in biollm("status").out
    look()
    (kept,) = (tmp_path / "run" / "biollm").glob("scale-*.json")
    old = json.loads(kept.read_text())
    old["own"]["looks"][-1][0] -= 3 * 3600
    kept.write_text(json.dumps(old))
    assert "own: not scaled: no controller has looked for 10 min" in biollm("status").out
    kept.write_text('{"own": {"looks": [[1]]}, "b')
    assert look().startswith("enough: ")


def test_without_a_scaled_model_there_is_nothing_to_do(
    waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    waterfall(first="http://localhost:1/v1")
    ran = biollm("autoscale")
    assert ran.code == 2
    assert "No model has `scale`." in ran.err and "scale: {min: 0, max: 2}" in ran.err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"type": "local", "path": "/w", "scale": {"min": 3, "max": 2}}, "scale: has a min of 3, above its max of 2."),
        ({"type": "api", "scale": {"max": 2}}, "has `scale`, but only servers of `type: local` are started"),
        ({"type": "local", "scale": {"most": 2}}, "models.own.scale.most"),
        ({"type": "local", "scale": {"max": 0}}, "models.own.scale.max"),
    ],
)
def test_a_wrong_scale_is_refused(waterfall: Callable[..., Path], model: dict[str, Any], says: str) -> None:
    waterfall({"models": {"own": model}}, first="http://localhost:1/v1")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("used", "ago", "ends"),
    [
        (9.9, 60, True),
        (9.9, 1200, False),  # nothing was sent of late
        (1.0, 60, False),
        (10.0, 60, False),  # requests already come here
    ],
)
def test_a_budget_that_ends_soon_is_demand_for_the_model_after_it(
    site: Callable[..., None], net: Loopback, used: float, ago: float, ends: bool
) -> None:
    noon = time.strftime("%H:%M UTC", time.gmtime(time.time() - 12 * 3600))  # the day began 12 h ago
    site(first={"base_url": net.serve().url, "budget": "10 USD/day", "resets": noon})
    config = load_config()
    claim = Claim("first/default", config.provider("first").accounts[0].limits)
    spent = Record(time.time() - ago, "r", "first/small", "first", "default", "small", "ok", cost_usd=used)
    ledger().finish(cast("int", asyncio.run(ledger().reserve(claim))), claim.scope, spent)
    ledger().flush()
    found = usage.ending_budgets(config, ledger())
    assert found == ({"own": "10 USD/day of first/default ends in 7 min"} if ends else {})
