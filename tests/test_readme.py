"""What the README and docs/agents.md say is so: its Python runs, its YAML loads, its commands and flags exist, its numbers are the code's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from provider import Json, Loopback, instance

from biollm.cli import agents
from biollm.cli.app import app
from biollm.config import load_config
from biollm.routing import failures

README = (Path(__file__).parent.parent / "README.md").read_text()
AGENTS = (Path(__file__).parent.parent / "docs" / "agents.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def answer(body: Json) -> Json:
    """Answer with an object of the schema where one is asked for, in words or as response_format."""
    system = str(body["messages"][0]["content"])
    if "JSON Schema" in system:
        import json

        schema = json.loads(system.split("JSON Schema:\n", 1)[1])
        return {"role": "assistant", "content": json.dumps(instance(schema))}
    return {"role": "assistant", "content": "An answer."}


@pytest.mark.parametrize("code", blocks("python"))
def test_its_python_runs(
    code: str, net: Loopback, waterfall: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    waterfall(first=net.serve(answer=answer))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("text", blocks("yaml"))
def test_its_yaml_loads(text: str, tmp_path: Path) -> None:
    kind = next(iter(yaml.safe_load(text)))
    (tmp_path / f"{kind}.yaml").write_text(text)
    assert load_config(tmp_path).warnings == ()


def commands() -> Iterator[list[str]]:
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    inline = re.findall(r"`(biollm [^`]*)`", README + AGENTS)
    of_agents = re.findall(r"^biollm .*", AGENTS, re.MULTILINE)
    for line in [*lines, *inline, *of_agents]:
        for part in re.split(r"\||&&", line.split("#")[0]):
            words = shlex.split(part.partition(" -- ")[0])
            if words and words[0].endswith("biollm") and len(words) > 1:
                yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_its_commands_and_flags_exist(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while (children := getattr(command, "commands", None)) and words:
        if words[0].startswith("-"):
            break
        assert words[0] in children or command.invoke_without_command, f"no command {words[0]!r}"
        command, words = children.get(words[0], command), words[1:]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if re.match(r"-[-a-z]", word)} <= known | {"--help"}


def test_every_agent_of_the_command_line_has_its_command() -> None:
    assert set(re.findall(r"^biollm run (\w+) --", AGENTS, re.MULTILINE)) == set(agents.AGENTS)


def test_every_command_is_named() -> None:
    command: Any = typer.main.get_command(app)
    for name in command.commands:
        assert re.search(rf"\b{name}\b", README), name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("credit", "until the date that is named, else 1 h, then longer"),
        ("key", "the key, until it changes; 10 min, then longer"),
        ("forbidden", "that deployment: 10 min, then longer"),
        ("limited", "else 60 s, then longer"),
        ("overloaded", "that deployment: 15, 20, 30, 60, 120, 300 s"),
        ("late", "nothing the first time, then 15, 30, 60 s"),
        ("refused", "the address: 15 s, then as above"),
        ("unreachable", "the address: 10 min, then longer"),
    ],
)
def test_its_table_of_cooldowns_is_the_code(kind: failures.Kind, words: str) -> None:
    ladder = failures.RULES[kind].ladder
    numbers, unit = re.findall(r"([\d, ]+) (s|min|h)\b", words)[0]
    stated = [float(number) * {"s": 1, "min": 60, "h": 3600}[unit] for number in numbers.split(",")]
    assert stated == list(ladder[ladder[0] == 0 :][: len(stated)])
    assert len(stated) == len(ladder[ladder[0] == 0 :]) or ladder[-1] > ladder[0]
    assert words in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([a-z_/.\-A-Z]+)\)", README))))
def test_its_links_lead_somewhere(path: str) -> None:
    assert (Path(__file__).parent.parent / path).exists()
