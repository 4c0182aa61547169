"""How each coding agent is told where the gateway is: variables, options and files, for its process alone.

A table, as every agent wants the address, the key and the context length in another way. The key is in variables only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KEY = "BIOLLM_AGENT_KEY"


@dataclass(frozen=True)
class Link:
    """What an agent needs to know of the gateway."""

    url: str  # the gateway's address, without /v1
    key: str = field(repr=False)
    model: str
    context: int  # tokens of prompt and answer together
    folder: Path  # a private folder for the agent's configuration


@dataclass(frozen=True)
class Setup:
    """How one agent gets it: variables (None: removed), options before the user's own, and JSON files."""

    env: Mapping[str, str | None]
    options: Sequence[str] = ()
    files: Mapping[Path, Any] = field(default_factory=dict[Path, Any])


def _codex(link: Link) -> Setup:
    provider: dict[str, Any] = {
        "name": "biollm",
        "base_url": f"{link.url}/v1",
        "env_key": _KEY,
        "wire_api": "responses",
        "stream_max_retries": 20,  # each after the time that the gateway states, while all are limited
    }
    values = {"model": link.model, "model_provider": "biollm", "model_context_window": link.context}
    values |= {f"model_providers.biollm.{name}": value for name, value in provider.items()}
    return Setup({_KEY: link.key}, [f"-c{name}={json.dumps(value)}" for name, value in values.items()])


def _claude(link: Link) -> Setup:
    models = ("MODEL", "DEFAULT_FABLE_MODEL", "DEFAULT_HAIKU_MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL")
    return Setup(
        {
            "ANTHROPIC_BASE_URL": link.url,
            "ANTHROPIC_AUTH_TOKEN": link.key,
            "ANTHROPIC_API_KEY": None,
            **{f"ANTHROPIC_{name}": link.model for name in models},
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(link.context),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    )


def _opencode(link: Link) -> Setup:
    model = {"name": link.model, "limit": {"context": link.context, "output": link.context // 4}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{link.url}/v1", "apiKey": f"{{env:{_KEY}}}"},
        "models": {link.model: model},
    }
    name = f"biollm/{link.model}"
    content = {"provider": {"biollm": provider}, "model": name, "small_model": name}
    return Setup({_KEY: link.key, "OPENCODE_CONFIG_CONTENT": json.dumps(content)})


def _qwen(link: Link) -> Setup:
    file = link.folder / "qwen.json"
    env = {"OPENAI_BASE_URL": f"{link.url}/v1", "OPENAI_API_KEY": link.key, "OPENAI_MODEL": link.model}
    settings = {"model": {"generationConfig": {"contextWindowSize": link.context}}}
    return Setup(
        {**env, "QWEN_CODE_SYSTEM_DEFAULTS_PATH": str(file)},
        ["--auth-type", "openai", "--model", link.model],
        {file: settings},
    )


def _aider(link: Link) -> Setup:
    file, name = link.folder / "aider.json", f"openai/{link.model}"
    facts = {"litellm_provider": "openai", "mode": "chat", "max_input_tokens": link.context}
    return Setup(
        {
            "AIDER_OPENAI_API_BASE": f"{link.url}/v1",
            "AIDER_OPENAI_API_KEY": link.key,
            "AIDER_MODEL": name,
            "AIDER_MODEL_METADATA_FILE": str(file),
            "AIDER_SHOW_MODEL_WARNINGS": "false",
        },
        files={file: {name: facts}},
    )


AGENTS: Mapping[str, tuple[Callable[[Link], Setup], str]] = {  # each with the command that installs it
    "codex": (_codex, "npm install -g @openai/codex"),
    "claude": (_claude, "npm install -g @anthropic-ai/claude-code"),
    "opencode": (_opencode, "npm install -g opencode-ai"),
    "qwen": (_qwen, "npm install -g @qwen-code/qwen-code"),
    "aider": (_aider, "pipx install aider-chat"),
}
