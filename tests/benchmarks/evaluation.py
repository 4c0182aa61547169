"""What a comparison costs per request beside `complete_many`, and an ensemble beside its slowest member."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setting import Bar, interleaved, ratio, waterfall

INPUTS = 60
SLOW = {"a": 300, "b": 400, "c": 500}  # ms


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def comparison(address: str, scratch: Path) -> list[Bar]:
    """Ask two arms 60 inputs each, and the same 120 requests by `complete_many`."""
    from biollm import evals
    from biollm.client import Client

    bars: list[Bar] = []
    for path, what in (("ok", "a provider that answers at once"), ("slow-300", "one that takes 300 ms")):
        folder = waterfall(
            scratch / f"compare-{path}",
            **{name: {"base_url": f"{address}/{path}/v1", "models": [f"m{name}"]} for name in "ab"},
        )
        os.environ["BIOLLM_STATE_DIR"] = str(scratch / f"compare-{path}-state")
        client = Client(config_dir=folder, sender="direct")
        inputs, results = scratch / "inputs.jsonl", scratch / "results.jsonl"
        inputs.write_text(
            "".join(json.dumps({"input": f"input {at}", "target": "well"}) + "\n" for at in range(INPUTS))
        )

        def many(client: Client = client) -> None:
            prompts = [f"input {at}" for at in range(INPUTS)]
            for model in ("ma", "mb"):
                client.complete_many(prompts, model=model, fallback=False)

        def compare(client: Client = client, inputs: Path = inputs, results: Path = results) -> None:
            results.unlink(missing_ok=True)
            evals.compare([inputs], ["ma", "mb"], results=results, client=client)

        many()
        runs = {"compare": compare, "complete_many": many}
        found = interleaved({name: (lambda run=run: _seconds(run)) for name, run in runs.items()})
        beside = ratio(found["compare"], found["complete_many"])
        bars.append(Bar(f"compare beside complete_many, {what}", beside, 1.05, "x"))
    return bars


def ensemble(address: str, scratch: Path) -> list[Bar]:
    """Ask an ensemble of three that answer after 300, 400 and 500 ms, and the slowest alone."""
    from biollm.client import Client

    servers = {name: {"base_url": f"{address}/slow-{ms}/v1", "models": [f"m{name}"]} for name, ms in SLOW.items()}
    folder = waterfall(scratch / "ensemble", **servers)
    os.environ["BIOLLM_STATE_DIR"] = str(scratch / "ensemble-state")
    client = Client(config_dir=folder, sender="direct")
    client.ensemble("warm up", method="vote")
    found = interleaved(
        {
            "ensemble": lambda: _seconds(lambda: client.ensemble("Why?", method="vote")),
            "slowest": lambda: _seconds(lambda: client.complete("Why?", model="mc")),
        }
    )
    return [Bar("an ensemble of three beside its slowest member", ratio(found["ensemble"], found["slowest"]), 1.1, "x")]
