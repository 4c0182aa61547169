"""What the benchmarks share: a waterfall written to a folder, the same deployments for a bare Router, and ratios."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 5
KEY = "sk-bench-0123456789"
PROMPT = "Why did this job fail? Exit status 137."


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars; `figure` is measured, `bound` the most it may be."""

    what: str
    figure: float
    bound: float
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool:
        """Return whether it is."""
        return self.figure <= self.bound

    def row(self) -> str:
        """Return it as a row of a Markdown table."""
        value, bound = (
            f"{number:.2f} x" if self.unit == "x" else f"{number:g} {self.unit}"
            for number in (self.figure if self.unit == "x" else round(self.figure, 1), self.bound)
        )
        return f"| {self.what} | {value} | {bound} | {'yes' if self.met else '**no**'} | {self.note} |"


def waterfall(folder: Path, **rungs: str | Mapping[str, Any]) -> Path:
    """Write a configuration of API providers with these base URLs (or further keys), in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    providers = {
        name: {
            "type": "api",
            "priority": place,
            "models": ["small"],
            "env_key": "BENCH_KEY",
            "token_budget": "1B/month",
        }
        | ({"base_url": candidate} if isinstance(candidate, str) else dict(candidate))
        for place, (name, candidate) in enumerate(rungs.items(), 1)
    }
    (folder / "providers.yaml").write_text(json.dumps({"inherit": False, "providers": providers}))  # JSON is YAML
    return folder


def environment(scratch: Path) -> dict[str, str]:
    """Return an environment in which nothing of the user's is seen and LiteLLM fetches nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BIOLLM_", "PYTHON"))}
    return {
        **{name: value for name, value in kept.items() if "proxy" not in name.lower()},
        "XDG_CONFIG_HOME": str(scratch / "xdg"),
        "BIOLLM_SITE_CONFIG": str(scratch / "site"),
        "BIOLLM_STATE_DIR": str(scratch / "state"),
        "XDG_RUNTIME_DIR": str(scratch / "no-gateway"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "BENCH_KEY": KEY,
    }


def model_list(folder: Path) -> list[dict[str, Any]]:
    """Return the deployments of a configuration as a bare Router takes them."""
    from biollm.config import load_config
    from biollm.routing.deployments import build_deployments
    from biollm.routing.router_config import GROUP, model_list

    found = build_deployments(load_config(folder))
    entries = model_list(found, {deployment.id: {"api_key": KEY} for deployment in found})
    return [entry for entry in entries if entry["model_name"] == GROUP]


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Run each contestant once per round, round after round; return what each measured."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names if number % 2 == 0 else reversed(names):  # nobody always follows the same one
            measured[name].append(contestants[name]())
    return measured


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))
