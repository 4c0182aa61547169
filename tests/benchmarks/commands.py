"""How long fresh processes take: commands beside a Typer hello-world, and one answer beside a bare Router."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import logs
from setting import KEY, PROMPT, Bar, interleaved, ratio

PYTHON, BIOLLM = sys.executable, str(Path(sys.executable).with_name("biollm"))
HELLO = """
import typer
app = typer.Typer()
@app.command()
def main(name: str = "world") -> None:
    "Say hello."
    typer.echo(f"Hello {name}")
app()
"""
BARE = """
import sys, litellm
entry = {"model_name": "m", "litellm_params": {"model": "openai/small", "api_base": sys.argv[1], "api_key": sys.argv[2]}}
answer = litellm.Router(model_list=[entry]).completion(model="m", messages=[{"role": "user", "content": sys.argv[3]}])
print(answer.choices[0].message.content)
"""
SDK = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2])
answer = client.chat.completions.create(model="small", messages=[{"role": "user", "content": sys.argv[3]}])
print(answer.choices[0].message.content)
"""
HTTPX = """
import sys, httpx
body = {"model": "small", "messages": [{"role": "user", "content": sys.argv[3]}]}
answer = httpx.post(sys.argv[1] + "/chat/completions", json=body, headers={"Authorization": "Bearer " + sys.argv[2]})
print(answer.json()["choices"][0]["message"]["content"])
"""
CLIENT = """
import sys
from biollm.client import get_model_client
print(get_model_client().complete(sys.argv[3]))
"""


def timed(command: Sequence[str], env: Mapping[str, str]) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        took = time.perf_counter() - began
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout, command
        return took * 1000

    run()  # writes byte code, warms the disk cache
    return run


def _python(source: str, *arguments: str) -> list[str]:
    return [PYTHON, "-c", source, *arguments]


def plain(scratch: Path, env: Mapping[str, str], llm: Path) -> tuple[list[Bar], dict[str, list[float]]]:
    """Measure the commands that answer nobody."""
    hello = scratch / "hello.py"
    hello.write_text(HELLO)
    measured = interleaved(
        {
            "python -c pass": timed([PYTHON, "-c", "print()"], env),
            "Typer hello-world --help": timed([PYTHON, str(hello), "--help"], env),
            **{
                f"biollm {words}": timed([BIOLLM, *words.split()], env)
                for words in ("--help", "--version", "config", "explain", "models")
            },
            "llm --help": timed([str(llm), "--help"], env),
        }
    )
    bounds = {"--help": 1.3, "--version": 1.3, "config": 2.5, "explain": 2.5, "models": 2.5}
    typer = measured["Typer hello-world --help"]
    bars = [
        Bar(f"`biollm {words}`, beside a Typer hello-world", ratio(measured[f"biollm {words}"], typer), bound)
        for words, bound in bounds.items()
    ]
    return bars, measured


def answers(env: Mapping[str, str], address: str, llm: Path, scratch: Path) -> tuple[list[Bar], dict[str, list[float]]]:
    """Measure fresh processes that answer once; `env` names the waterfall whose first rung is at `address`."""
    arguments, log = (f"{address}/ok/v1", KEY, PROMPT), scratch / "long.log"
    with log.open("wb") as file:
        file.writelines(logs.Log("nextflow_oom.log", "", 31 * logs.MB, logs.nextflow, 0.5).chunks())
    measured = interleaved(
        {
            "a bare Router": timed(_python(BARE, *arguments), env),
            "biollm complete": timed([BIOLLM, "complete", PROMPT], env),
            "biollm complete, a log of 31 MB": timed([BIOLLM, "complete", PROMPT, "-f", str(log)], env),
            "biollm.client": timed(_python(CLIENT, *arguments), env),
            "httpx": timed(_python(HTTPX, *arguments), env),
            "openai": timed(_python(SDK, *arguments), env),
            "llm": timed([str(llm), "-m", "bench", "--no-stream", PROMPT], env),
        }
    )
    mine = measured["biollm complete"]
    bars = [
        Bar(
            "`biollm complete` with a log of 31 MB, beyond a short prompt",
            (median(measured["biollm complete, a log of 31 MB"]) - median(mine)) / 1000,
            2,
            "s",
        ),
        Bar("`biollm complete` without a gateway, beside llm", ratio(mine, measured["llm"]), 0.7),
        Bar(
            "`biollm complete`, beside the least that a bare Router needs", ratio(mine, measured["a bare Router"]), 1.15
        ),
        Bar(
            "`biollm.client` in a program, beside a bare Router",
            ratio(measured["biollm.client"], measured["a bare Router"]),
            1.15,
        ),
    ]
    return bars, measured
