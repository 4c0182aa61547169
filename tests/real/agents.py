"""The coding agents that are run against the gateway: how they are installed, and what a provider answers them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import programs
from behaviours import HTTP_503, OK, Behaviour, limited
from provider import Json, Request

NODE = "24.21.0"
AGENTS = {  # the name in docs/agents.md -> its package, at the version that is run
    "Codex": "@openai/codex@0.171.0",
    "Claude Code": "@anthropic-ai/claude-code@2.1.332",
    "opencode": "opencode-ai@1.18.33",
    "Qwen Code": "@qwen-code/qwen-code@0.24.4",
    "aider": "aider-chat==0.86.2",
    "pi": "@mariozechner/pi-coding-agent@0.73.1",
    "Continue": "@continuedev/cli@1.5.47",
    "cline": "cline@3.0.65",
    "mini-swe-agent": "mini-swe-agent==2.4.6",
    "llm": "llm==0.36",
}
SCENARIOS = ("plain", "unavailable", "break-in-text", "break-in-call", "two-calls", "limited", "slow-call")
DOCS = (Path(__file__).parents[2] / "docs" / "agents.md").read_text()
_THOUGHT, _TEXT = "A file is to be written, so I write it.", "I write the file with one call of a tool."
_LISTING = "\n\n{}\n```\nhello\n```\n"  # aider calls no tools
LIMITED_S = 6.0  # for how long both providers are limited
_STREAM = Behaviour(fragments=4)
_CONTENT = ("content", "contents", "new_text", "file_text")
_END = {"name": "bash", "arguments": '{"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}'}
_SHELL = {"cmd", "command"}


def snippets(heading: str) -> list[str]:
    """Return the blocks of commands under a heading of docs/agents.md."""
    section = re.split(rf"^##+ {re.escape(heading)}$", DOCS, flags=re.MULTILINE)[1]
    return re.findall(r"```sh\n(.*?)```", re.split(r"^##+ ", section, flags=re.MULTILINE)[0], re.DOTALL)


def install(agent: str) -> list[Path]:
    """Install an agent once; return the folders of its programs.

    Raises:
        RuntimeError: It could not be installed.
    """
    package = AGENTS[agent]
    name = re.sub("[@=]+[0-9.]+$", "", package).rpartition("/")[2]
    if "==" in package:
        return [programs.python_packages(f"agents/{name}", package)]
    both = {"node": f"node@{NODE}", name: package}
    return [programs.node_packages(f"agents/{each}", what) / "node_modules" / ".bin" for each, what in both.items()]


@dataclass
class Script:
    """What the two providers of one agent in one scenario answer: first the calls of a tool, then "done"."""

    agent: str
    scenario: str
    folder: Path  # where the agent works
    asked: list[str] = field(default_factory=list[str])  # which of the two got the first request, each time
    limited_until: float = 0

    @property
    def model(self) -> str:
        """Return the name of the model that only these two providers have."""
        return f"{self.agent}-{self.scenario}".lower().replace(" ", "-")

    @property
    def files(self) -> list[str]:
        """Return the files that the agent is told to write."""
        return ["hello.txt", "world.txt"] if self.scenario == "two-calls" else ["hello.txt"]

    def answer(self, body: Json) -> Json:
        """Return the assistant's next message."""
        if not self._starts(body):
            last = [{"id": "call_9", "type": "function", "function": _END}] if self.agent == "mini-swe-agent" else []
            return {"role": "assistant", "content": "Done.", "tool_calls": last}
        if self.agent == "aider":
            return {"role": "assistant", "content": _TEXT + "".join(map(_LISTING.format, self.files))}
        functions = [_call(body["tools"], self.folder / name) for name in self.files]
        calls = [{"id": f"call_{at}", "type": "function", "function": each} for at, each in enumerate(functions)]
        alone = self.scenario in ("break-in-call", "slow-call")
        texts = {"content": None if alone else _TEXT, "reasoning_content": "" if alone else _THOUGHT}
        return {"role": "assistant", **texts, "tool_calls": calls}

    def first(self, request: Request) -> Behaviour:
        """Choose how the first provider answers."""
        return self._choose(request, "first")

    def second(self, request: Request) -> Behaviour:
        """Choose how the second provider answers."""
        return self._choose(request, "second")

    def _choose(self, request: Request, who: str) -> Behaviour:
        if not self._starts(request.body):
            return OK
        self.asked.append(who)
        if self.scenario == "limited":
            self.limited_until = self.limited_until or time.monotonic() + LIMITED_S
            return limited("3") if time.monotonic() < self.limited_until else _STREAM
        if who == "first" and self.scenario == "unavailable":
            return HTTP_503
        words = 0 if self.agent == "aider" else len(_THOUGHT.split(" "))  # of thought, before the text
        cuts = {"break-in-call": 4, "break-in-text": words + 5}  # the headers, the role, and two fragments or words
        if who == "first" and self.scenario in cuts:
            return replace(_STREAM, cut=cuts[self.scenario] if request.body.get("stream") else 2)
        return replace(_STREAM, fragments=30, every=5) if self.scenario == "slow-call" else _STREAM

    def _starts(self, body: Json) -> bool:
        """Return whether it is the agent's first request for this task; some also ask for a title, without tools."""
        if self.agent == "aider":
            return True
        return bool(body.get("tools")) and all(message["role"] != "tool" for message in body["messages"])

    def command(self) -> str:
        """Return the commands of docs/agents.md that run the agent, with this model."""
        (text,) = snippets(self.agent)
        if "biollm run" in text:
            return re.sub(r"(biollm run \w+)", rf"\1 --model {self.model}", text)
        _, setup = snippets("Other programs")
        return f"{setup}BIOLLM_MODEL={self.model}\n{text}"

    def written(self) -> bool:
        """Return whether the agent wrote what it was told to."""
        files = [self.folder / name for name in self.files]
        return all(file.exists() and file.read_text().strip() == "hello" for file in files)


def _call(tools: list[Json], path: Path) -> Json:
    """Return a call that writes hello into a file, with the tool for files or the shell that the agent offers."""
    functions = {
        each["function"]["name"]: each["function"].get("parameters", {}).get("properties", {}) for each in tools
    }
    for tool, names in functions.items():
        content = next((name for name in names if name in _CONTENT), None)
        where = next((name for name in names if "path" in name.lower()), None)
        if content and where:
            return {"name": tool, "arguments": json.dumps({where: str(path), content: "hello\n"})}
    for tool, names in functions.items():
        for name in _SHELL & set(names):
            return {"name": tool, "arguments": json.dumps({name: f"echo hello > {shlex.quote(str(path))}"})}
    raise AssertionError(f"no tool that writes: {list(functions)}")


def end_all(mark: str) -> None:
    """End the processes with this NAME=VALUE in their environment: one agent leaves a daemon behind."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
