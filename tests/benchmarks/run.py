"""Prints every bar of the project beside its peers, and writes RESULTS.md: `make bench`.

Peers: bare httpx, the openai SDK, a bare LiteLLM Router; `llm`, the LiteLLM proxy and Portkey's gateway in environments
of their own.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import commands
import condensing
import evaluation
import gateway
import loopback
import overhead
import programs
import promises
import scenarios
import shared_ledger
import top
import translators
import usage
from setting import KEY, ROUNDS, Bar, environment, waterfall

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
LLM = "llm==0.36"
Figures = dict[str, list[float]]


def peers() -> Path:
    """Return the program `llm`, installed if need be."""
    folder = programs.CACHE / "bench-peers"
    if not (folder / "bin" / "llm").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", LLM], check=True)
    return folder / "bin" / "llm"


def machine() -> str:
    """Return what the figures depend on."""
    cpus = {line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")}  # fmt: skip
    parts = (
        f"litellm {version('litellm')}, openai {version('openai')}, httpx {version('httpx')}, {LLM.replace('==', ' ')}"
    )
    return (
        f"{os.cpu_count()} cores ({', '.join(sorted(cpus)) or platform.machine()}), load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {parts}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}."
    )


def peer_table(figures: Mapping[str, Sequence[float]], base: str, unit: str) -> list[str]:
    """Return a Markdown table of medians, each also as a multiple of `base`."""
    lines = [f"| | median {unit} | beside {base} |", "|---|---|---|"]
    one = statistics.median(figures[base])
    return lines + [
        f"| {name} | {statistics.median(values):.3g} | {statistics.median(values) / one:.2f} x |"
        for name, values in figures.items()
    ]


def request_table(figures: Mapping[str, Sequence[float]]) -> list[str]:
    """Return a Markdown table of milliseconds per request, a column for each concurrency."""
    columns = [f"c={concurrency}" for concurrency in overhead.REQUESTS]
    lines = [f"| | {' | '.join(f'{c}, ms | beside httpx' for c in columns)} |", "|---" * (1 + 2 * len(columns)) + "|"]
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in figures):
        cells: list[str] = []
        for column in columns:
            value, base = (statistics.median(figures[f"{who}, {column}"]) for who in (name, "httpx"))
            cells.append(f"{value:.2f} | {value / base:.1f} x")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def ledger() -> list[str]:
    """Return what bench_ledger.py prints."""
    done = subprocess.run([sys.executable, HERE / "bench_ledger.py"], check=True, capture_output=True, text=True)
    return [f"- {line}" for line in done.stdout.splitlines()]


def report(bars: Sequence[Bar], sections: Mapping[str, Sequence[str]], seconds: float) -> str:
    """Return RESULTS.md."""
    lines = [
        "# Benchmarks", "",
        f"Made by `make bench` in {seconds:.0f} s on {machine()}", "",
        f"Every contestant runs {ROUNDS} times, in turns; figures are medians, and a bar is the median of the ratios "
        "within each turn. The provider is a process on loopback that answers at once.", "",
        "| bar | measured | at most | met | |", "|---|---|---|---|---|",
        *(bar.row() for bar in bars),
    ]  # fmt: skip
    for title, table in sections.items():
        lines += ["", f"## {title}", "", *table]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    began = time.monotonic()
    llm = peers()
    programs.litellm_proxy(), gateway.portkey()  # installed while there is still a way out
    bars: list[Bar] = []
    sections: dict[str, Sequence[str]] = {}
    with tempfile.TemporaryDirectory() as folder, loopback.running() as address:
        scratch = Path(folder)
        os.environ.clear()
        os.environ.update(env := environment(scratch))
        chain = waterfall(scratch / "chain", **dict.fromkeys(("first", "second", "third"), f"{address}/ok/v1"))
        env |= {"BIOLLM_CONFIG_DIR": str(chain), "LLM_USER_PATH": str(_llm_folder(scratch, address))}

        def add(title: str, found: Sequence[Bar], table: Sequence[str] = ()) -> None:
            bars.extend(found)
            for bar in found:
                print(f"{'ok' if bar.met else 'MISSED':6} {bar.row()}", flush=True)
            if table:
                sections[title] = table
                print("\n".join(("", title, *table, "")), flush=True)

        shipped = {name: value for name, value in env.items() if name != "BIOLLM_CONFIG_DIR"}
        found, figures = commands.plain(scratch, shipped, llm)
        add("Commands", found, peer_table(figures, "Typer hello-world --help", "ms"))
        found, figures = commands.answers(env, address, llm, scratch)
        add("One answer by a fresh process", found, peer_table(figures, "a bare Router", "ms"))

        found, table = gateway.beside_proxies(address, scratch, env)
        add("The gateway", found, table)
        found, figures = gateway.beside_llm(env, llm, scratch)
        add("One answer by a running gateway", found, peer_table(figures, "llm", "ms"))
        add("Streams", [*gateway.many_streams(scratch, env), *gateway.streams(scratch, env)])
        add("Translators", translators.measure())

        import litellm  # noqa: F401 # what follows is forked from a process that has it, and has sent nothing

        found, figures = overhead.measure(address, chain, llm, env)
        add("A request", found, request_table(figures))
        found, figures = promises.dead_first(address, scratch)
        add("A dead first rung", found, peer_table(figures, "refused: without the dead rung", "ms"))
        found, table = scenarios.measure(env)
        add("Sixteen failover scenarios", found, table)
        found, figures = promises.many(address, scratch)
        add("500 deployments", found, peer_table(figures, "500 deployments: load", "ms"))
        add("Stored answers", promises.stored(address, scratch))
        add("Evaluation", [*evaluation.comparison(address, scratch), *evaluation.ensemble(address, scratch)])
        add("Quotas", promises.quota(address, scratch))
        add("`biollm top`", top.measure(address, scratch))
        add("Usage", [*usage.million(scratch, env), *usage.writes()])
        add("Condensing", condensing.measure(scratch))
        add("The ledger", [], ledger())
        add("The ledger on Redis", *shared_ledger.measure(address, scratch, env))
    text = report(bars, sections, time.monotonic() - began)
    RESULTS.write_text(text)
    print(f"{sum(bar.met for bar in bars)} of {len(bars)} bars are met; see {RESULTS.relative_to(Path.cwd())}")


def _llm_folder(scratch: Path, address: str) -> Path:
    """Write the configuration of `llm`; JSON is YAML."""
    folder = scratch / "llm"
    folder.mkdir()
    model = {"model_id": "bench", "model_name": "small", "api_base": f"{address}/ok/v1", "api_key_name": "bench"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([model]))
    (folder / "keys.json").write_text(json.dumps({"bench": KEY}))
    return folder


if __name__ == "__main__":
    main()
