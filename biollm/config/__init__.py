"""The configuration: models.yaml, providers.yaml and cluster.yaml, layered, checked and frozen.

The only package that reads the user's YAML. Start at `loader.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from biollm.types import DataPolicy as Policy

if TYPE_CHECKING:
    from biollm.config.loader import Config, describe, json_schema, load_config
    from biollm.config.schema import LITELLM_PROVIDERS, Account, Alerts, Architecture, Cluster, Costs

    # isort: split
    from biollm.config.schema import Environment, Model, Provider, Routing, Scale
    from biollm.config.values import Limit

__all__ = [
    "LITELLM_PROVIDERS", "Account", "Alerts", "Architecture", "Cluster", "Config", "Costs", "Environment", "Limit",
    "Model", "Policy", "Provider", "Routing", "Scale", "describe", "json_schema", "load_config",
]  # fmt: skip
_HOMES = {"Limit": "values"} | dict.fromkeys(("Config", "describe", "json_schema", "load_config"), "loader")


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that `biollm.config.paths` alone does not import pydantic."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"biollm.config.{_HOMES.get(name, 'schema')}"), name)
