"""What runs on the compute node: the supervisor of vLLM and its authentication middleware, both standard library only."""

from __future__ import annotations

import hashlib
from pathlib import Path

from biollm.config import Cluster
from biollm.config.paths import biollm_dir


def node_files(cluster: Cluster) -> dict[Path, str]:
    """Return the files that a job reads, path -> text; the supervisor comes first.

    A new version has another name, so that running jobs keep theirs.
    """
    here = Path(__file__).parent
    texts = {"": (here / "supervisor.py").read_text(), "_auth": (here / "auth_middleware.py").read_text()}
    stem = f"biollm_supervisor_{hashlib.sha256(''.join(texts.values()).encode()).hexdigest()[:12]}"
    return {biollm_dir(cluster) / "lib" / f"{stem}{part}.py": text for part, text in texts.items()}
