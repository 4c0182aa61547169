"""Model servers as Slurm jobs: does it fit, the launch script, submit, find, stop. Start at `jobs.py`.

The launch script, with its `#SBATCH` lines, is `slurm_templates/vllm.sh.j2`; `script.py` renders it. `supervisor/` holds
what runs on the node.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biollm.slurm.jobs import Job, Options, check_limits, down, ensure, ensuring, find, logs

    # isort: split
    from biollm.slurm.jobs import missing, plain_key_file, prepare, status, try_one_gpu, up, wait_for

__all__ = ["Job", "Options", "check_limits", "down", "ensure", "ensuring", "find", "logs", "missing", "plain_key_file",
           "prepare", "status", "try_one_gpu", "up", "wait_for"]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import `jobs` on first use: a client that only reads endpoints does without it."""
    if name in __all__:
        return getattr(import_module("biollm.slurm.jobs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
