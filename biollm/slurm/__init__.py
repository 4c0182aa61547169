"""Model servers as Slurm jobs: does it fit, the launch script, submit, find, stop.

Imports `config`, `ledger` and the foundation. Start at `jobs.py`; `supervisor/` holds what runs on the node.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biollm.slurm.jobs import Job, Options, down, ensure, ensuring, logs, missing, status, up, wait_for

__all__ = ["Job", "Options", "down", "ensure", "ensuring", "logs", "missing", "status", "up", "wait_for"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: a client that only reads endpoints does without the rest."""
    if name in __all__:
        return getattr(import_module("biollm.slurm.jobs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
