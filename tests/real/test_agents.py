"""Coding agents that others wrote finish their work through the gateway, whatever the first provider does.

They run as docs/agents.md says. `make agents` runs all of them; `make test` those that most people use, and not the
scenario that takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import agents
import pytest
import yaml
from agents import AGENTS, SCENARIOS, Script
from provider import Loopback

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]  # the first run installs 400 MB each
ALL = os.environ.get("BIOLLM_AGENTS") == "all"
CHOSEN = list(AGENTS) if ALL else ["Codex", "Claude Code", "opencode", "aider"]
CASES = [(agent, scenario) for agent in CHOSEN for scenario in SCENARIOS if ALL or scenario != "slow-call"]


class Ran(NamedTuple):
    code: int
    output: str  # the end of what it printed


@dataclass
class Site:
    """A gateway whose two providers follow a script for each agent and scenario, and the environment of its user."""

    scripts: dict[tuple[str, str], Script]
    env: dict[str, str]

    def run(self, text: str, folder: Path, patience: float = 60) -> Ran:
        """Run commands of docs/agents.md in an agent's folder, and end what they leave behind."""
        env, log = {**self.env, "AGENT_FOLDER": str(folder)}, folder / "output.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                ["sh", "-ec", text], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            try:
                code = child.wait(patience)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                if folder in {script.folder for script in self.scripts.values()}:  # else it starts the gateway
                    agents.end_all(f"AGENT_FOLDER={folder}")
        return Ran(code, log.read_text(errors="replace")[-3000:])


@pytest.fixture(scope="module")
def site(
    installed: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory, net: Loopback
) -> Iterator[Site]:
    programs = [folder for agent in CHOSEN for folder in installed(agents.install, agent)]
    root = tmp_path_factory.mktemp("site")
    scripts = {case: Script(*case, root / "-".join(case)) for case in CASES}
    entries = {}
    for script in scripts.values():
        script.folder.mkdir()
        for priority, choose in enumerate((script.first, script.second), 1):
            server = net.serve(then=choose, answer=script.answer)
            entry = {"type": "api", "priority": priority, "base_url": server.url, "models": [script.model]}
            entries[f"{choose.__name__}-{script.model}"] = {**entry, "env_key": "SCRIPTED_KEY"}
    (root / "home").mkdir()
    (root / "providers.yaml").write_text(yaml.safe_dump({"inherit": False, "providers": entries}))
    with tempfile.TemporaryDirectory() as runtime:  # a short name, for a socket
        path = [str(Path(sys.executable).parent), *map(str, programs), os.environ["PATH"]]
        env = {
            "PATH": os.pathsep.join(path),
            "HOME": str(root / "home"),
            "XDG_RUNTIME_DIR": runtime,
            "BIOLLM_CONFIG_DIR": str(root),
            "BIOLLM_SITE_CONFIG": str(root / "none"),
            "SCRIPTED_KEY": "sk-planted-0123456789",
        }
        site = Site(scripts, env)
        start, _ = agents.snippets("Other programs")
        assert site.run(start, root).code == 0
        yield site
        site.run("biollm serve stop", root)


@pytest.mark.parametrize(("agent", "scenario"), CASES)
def test_the_agent_writes_the_file(site: Site, agent: str, scenario: str) -> None:
    script = site.scripts[agent, scenario]
    ran = site.run(script.command(), script.folder, 300 if scenario == "slow-call" else 60)
    assert ran.code == 0, ran.output
    assert script.written(), ran.output
    asked = list(dict.fromkeys(script.asked))
    assert asked == (["first"] if scenario in ("plain", "two-calls", "slow-call") else ["first", "second"])
