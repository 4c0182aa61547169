"""What the README and docs/ say is so: Python runs, YAML loads, commands and flags exist, links lead somewhere, numbers are the code's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from provider import Json, Loopback, instance

from biollm.cli import agents
from biollm.cli.app import app
from biollm.config import load_config
from biollm.inputs.normalize_log import RULES, normalize_log
from biollm.routing import failures

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, AGENTS, FAILURES = (PAGES[name] for name in ("README.md", "docs/agents.md", "docs/failures.md"))
MARKDOWN = MarkdownIt("commonmark").enable("table")


def blocks(language: str) -> list[Any]:
    """Return each block of a language, with the page it is on."""
    found = [
        (name, token.content)
        for name, text in PAGES.items()
        for token in MARKDOWN.parse(text)
        if token.info == language
    ]
    return [pytest.param(code, id=f"{name}-{number}") for number, (name, code) in enumerate(found)]


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
    code: str,
    net: Loopback,
    waterfall: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    waterfall(first=net.serve(answer=answer))
    exec(compile(code, "docs", "exec", dont_inherit=True), {"__name__": "readme"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("text", blocks("yaml"))
def test_its_yaml_loads(text: str, tmp_path: Path) -> None:
    kind = next(iter(yaml.safe_load(text)))
    (tmp_path / f"{kind}.yaml").write_text(text)
    assert load_config(tmp_path).warnings == ()


def commands() -> Iterator[list[str]]:
    lines = [line[2:] for block in blocks("console") for line in block.values[0].splitlines() if line.startswith("$ ")]
    inline = re.findall(r"`(biollm [^`]*)`", "\n".join(PAGES.values()))
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
    assert words in FAILURES


def test_its_table_of_substitutions_is_the_code() -> None:
    table = PAGES["docs/cache.md"].partition("| what |")[2]
    rows = re.findall(r"^\| ([^`|]+) \| (`+)(.+?)\2 \| (`+)(.+?)\4 \|$", table, re.MULTILINE)
    assert [what for what, *_ in rows] == [what for what, _, _ in RULES]
    for what, _, before, _, after in rows:
        assert normalize_log(before.replace("ESC", "\x1b")) == after, what


def anchors(text: str) -> set[str]:
    """Return the anchors that a forge makes of the headings."""
    tokens = MARKDOWN.parse(text)
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    inline = [token for token in MARKDOWN.parse(text) if token.type == "inline"]
    return [
        str(each.attrs[name])
        for token in inline
        for each in token.children or ()
        for name in ("href", "src")
        if name in each.attrs
    ]


@pytest.mark.parametrize("name", PAGES)
def test_its_links_lead_somewhere(name: str) -> None:
    for link in links(PAGES[name]):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", PAGES)
def test_what_is_rendered_is_what_is_written(name: str) -> None:
    """A fence that is never closed swallows the headings and links below it."""
    outside = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    tokens = MARKDOWN.parse(PAGES[name])
    assert PAGES[name].count("\n```") % 2 == 0
    assert sum(token.type == "heading_open" for token in tokens) == len(re.findall(r"^#+ ", outside, re.MULTILINE))
    assert len(links(PAGES[name])) == len(re.findall(r"\]\(", re.sub(r"`[^`]*`", "``", outside)))
    assert [token.content for token in tokens if token.type == "heading_open" and token.tag == "h1"] == [""]


def test_every_page_is_linked_from_the_readme_which_stays_short() -> None:
    assert {name for name in PAGES if name != "README.md"} <= set(links(README))
    assert README.count("\n") <= 200


def test_its_recording_is_made_anew(
    net: Loopback, waterfall: Callable[..., Path], biollm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the seconds differ from run to run."""
    command, *shown = next(each.values[0] for each in blocks("console") if "asking" in each.values[0]).splitlines()
    text = next(line for line in shown if not line.startswith(("·", "—")))
    rungs = {
        "lab": {"base_url": net.refusing(), "models": ["qwen-coder-32b"]},
        "cloud": {"base_url": net.serve(text=text).url, "models": ["gpt-oss-120b"]},
    }
    waterfall(**rungs)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".nextflow.log").write_text((ROOT / "examples" / "nextflow_oom.log").read_text())
    ran = biollm(*shlex.split(command)[2:])
    assert ran.out == f"{text}\n"
    seconds = partial(re.sub, r"\d+\.\d s", "0.0 s")
    assert [seconds(line) for line in ran.err.splitlines()] == [seconds(line) for line in shown if line != text]
