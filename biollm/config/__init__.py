"""The configuration: models.yaml, providers.yaml and cluster.yaml, layered, checked and frozen.

The only room that reads the user's YAML. It imports `errors` and the foundation; start at `loader.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biollm.config.loader import Config, describe, json_schema, load_config
    from biollm.config.schema import (
        LITELLM_PROVIDERS,
        Account,
        Alerts,
        Architecture,
        Cluster,
        Costs,
        Environment,
        Model,
        Policy,
        Provider,
        Routing,
    )
    from biollm.config.values import Limit

__all__ = [
    "LITELLM_PROVIDERS",
    "Account",
    "Alerts",
    "Architecture",
    "Cluster",
    "Config",
    "Costs",
    "Environment",
    "Limit",
    "Model",
    "Policy",
    "Provider",
    "Routing",
    "describe",
    "json_schema",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: whoever needs only a path (`biollm.config.paths`) does without pydantic."""
    if name in __all__:
        return getattr(import_module("biollm.config.loader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
