"""A made-up afternoon of a group, at a clock that stands still: what `top` and the page are shown with."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

from biollm.config import load_config
from biollm.ledger import Claim, Ledger, Record
from biollm.monitoring.snapshot import Collector
from biollm.routing.candidates import DeploymentPool
from biollm.slurm.endpoints import Endpoint
from biollm.slurm.submissions import Job, Submission

NOW = 4102488040.0  # noon of 2100-01-01: a cooldown then is still to come
RUNGS = {
    "lightning": {"models": ["gpt-oss-20b"], "base_url": "http://localhost:1/v1", "rate_limit": "15/min"},
    "gemini": {"models": ["gemini-3.8-flash"], "rate_limit": ["10/min", "250/day"], "limits_per": "model"},
    "github_copilot": {"models": ["gpt-4o"], "base_url": "http://localhost:3/v1", "rate_limit": "30/min"},
    "openai": {"models": ["gpt-5.6-luna"], "rate_limit": "500/min", "budget": "10 USD/month", "env_key": "NOT_SET"},
    "vllm": {"type": "local", "models": ["qwen-coder-32b", "llama-3.3-70b"]},
    "embedded": {"type": "embedded", "models": ["smollm2-135m"]},
}


def group(waterfall: Callable[..., Path], tmp_path: Path) -> Collector:
    """Lightning is used up, Gemini rests after a failure, Copilot and a server of their own answer."""
    waterfall(
        {
            "models": {
                "qwen-coder-32b": {"type": "local", "hf_id": "lab/q"},
                "llama-3.3-70b": {"type": "local", "hf_id": "lab/l"},
                "smollm2-135m": {"type": "embedded", "gguf": "/nowhere/smollm2.gguf"},
            }
        },
        **RUNGS,
    )
    config, at = load_config(), [NOW - 20.0]
    ledger = Ledger(tmp_path / "group", clock=lambda: at[0], network=False)
    key = tmp_path / "key"
    key.write_text("sk-planted-server-0123456789")
    server = Endpoint("a" * 32, "4711", "t1", "qwen-coder-32b", "gpu01", "http://gpu01:8000/v1", key, key.stat().st_uid,
                      18000.0, 1)  # fmt: skip
    rungs = DeploymentPool(config, ledger, tmp_path, "any", lambda: [server])
    rungs.refresh()
    used = {"lightning": 15, "gemini": 4, "github_copilot": 11}
    for deployment in rungs.deployments:
        for _ in range(used.get(deployment.provider.name, 0)):
            asyncio.run(_reserve(ledger, Claim(deployment.scope, deployment.limits)))
    at[0] = NOW
    ledger.cool("account:gemini/default:gemini-3.8-flash", 42, "HTTP 503: the model is overloaded")
    for record in history([deployment.id for deployment in rungs.deployments]):
        ledger.finish(None, "", record)
    ledger.flush()
    submission = Submission("t1", "4711", ("qwen-coder-32b",), 2, 28800, tmp_path / "log")
    jobs = [
        Job(submission, "ready", node="gpu01", endpoints=(server,)),
        Job(Submission("t2", "4712", ("llama-3.3-70b",), 4, 28800, tmp_path / "log"), "pending", "Resources"),
    ]
    alerts = ["budget: openai spent 81% of 10 USD/month"]
    return Collector(config, ledger, tmp_path / "group", discover=lambda: [server], jobs=lambda: jobs, alerts=lambda: alerts,
               clock=lambda: NOW)  # fmt: skip


async def _reserve(ledger: Ledger, claim: Claim) -> None:
    assert isinstance(await ledger.reserve(claim), int)


def history(ids: list[str]) -> list[Record]:
    """Half an hour of requests in a wave; every fourth falls from the first rung to the third, the last ones all do."""
    made: list[Record] = []
    for minute in range(30):
        for number in range(round(9 + 7 * math.sin(minute / 4))):
            at, request = NOW - 60 * (29 - minute) + 2 * number - 36, f"{minute}-{number}"
            falls = number % 4 == 3 or minute > 26
            made.append(
                record(at, request, ids[0], 1, "failed" if falls else "ok", 300 if falls else 700 + 20 * minute)
            )
            if falls:
                made.append(record(at + 1, request, ids[2], 3, "ok", 900 + 10 * minute))
    made.append(record(NOW - 75, "g", ids[1], 2, "failed", 400, "HTTP 503: the model is overloaded"))
    made.append(record(NOW - 70, "g", ids[4], 5, "ok", 1200))
    return made


def record(at: float, request: str, deployment: str, order: int, outcome: str, ms: float, reason: str = "") -> Record:
    provider, _, model = deployment.partition("/")
    return Record(at, request, deployment, provider, "default", model, outcome, reason, ms=ms, order=order)
