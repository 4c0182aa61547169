"""The typed client: one call that always gets an answer.

from biollm.client import get_model_client
print(get_model_client().complete("Why did this job fail? ..."))

Imports `routing` and what is below it. Start at `client.py`; `remote.py` asks a running gateway instead.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from biollm.errors import (
    AllLimitedError,
    BiollmError,
    CompletionError,
    ConfigError,
    ContentPolicyError,
    DeadlineError,
    InterruptedStreamError,
    KeysRefusedError,
    PromptTooLongError,
    RequestRejectedError,
    UnknownNameError,
    UsageError,
)
from biollm.types import Attempt, Completion, StreamChunk, StreamRestarted, Usage

if TYPE_CHECKING:
    from biollm.client.client import Client, Defaults, ModelRouter, Options, get_model_client
    from biollm.inputs.condense import condense
    from biollm.inputs.normalize_log import normalize_log
    from biollm.routing.health import check_all_providers

__all__ = [
    "AllLimitedError",
    "Attempt",
    "BiollmError",
    "Client",
    "Completion",
    "CompletionError",
    "ConfigError",
    "ContentPolicyError",
    "DeadlineError",
    "Defaults",
    "InterruptedStreamError",
    "KeysRefusedError",
    "ModelRouter",
    "Options",
    "PromptTooLongError",
    "RequestRejectedError",
    "StreamChunk",
    "StreamRestarted",
    "UnknownNameError",
    "Usage",
    "UsageError",
    "check_all_providers",
    "condense",
    "get_model_client",
    "normalize_log",
]

_HOMES = {
    "check_all_providers": "biollm.routing.health",
    "condense": "biollm.inputs.condense",
    "normalize_log": "biollm.inputs.normalize_log",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `biollm.client.remote` does without the configuration."""
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "biollm.client.client")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
