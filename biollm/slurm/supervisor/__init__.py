"""What runs on the compute node: the supervisor of vLLM and its authentication middleware.

The two files are standard library only and are copied to the shared file system; `node_files` names the copies.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from biollm.config import Cluster
from biollm.config.paths import biollm_dir


def node_files(cluster: Cluster) -> dict[Path, str]:
    """Return what must lie in biollm_dir before a job starts, path -> text; the supervisor comes first.

    A new version has another name, so that running jobs keep theirs.
    """
    stem, texts = _node_source()
    return {biollm_dir(cluster) / "lib" / f"{stem}{part}.py": text for part, text in texts.items()}


@cache
def _node_source() -> tuple[str, dict[str, str]]:
    here = Path(__file__).parent
    texts = {"": (here / "supervisor.py").read_text(), "_auth": (here / "auth_middleware.py").read_text()}
    return f"biollm_supervisor_{hashlib.sha256(''.join(texts.values()).encode()).hexdigest()[:12]}", texts
