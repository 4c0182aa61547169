"""Programs of others that tests and benchmarks run: installed once in the user's cache folder, and ended for certain."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

# The newest whose `proxy` extra can be installed: later ones, to 1.110.2, need packages that the index lacks.
PROXY = "1.108.7"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biollm"


def litellm_proxy() -> Path:
    """Return the `litellm` command of the real proxy, in a virtual environment of its own.

    Made on first use: 640 MB, 10 s where the packages are near.

    Raises:
        RuntimeError: It could not be installed.
    """
    wanted, env = f"litellm[proxy]=={PROXY}", CACHE / f"litellm-proxy-{PROXY}"
    env.parent.mkdir(parents=True, exist_ok=True)
    ready, programs = env / ".ready", env / "bin"
    with env.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            steps: list[list[str | Path]] = [
                [sys.executable, "-m", "venv", "--clear", env],
                [programs / "pip", "install", "-q", "uv"],
                [programs / "uv", "pip", "install", "-q", "-p", programs / "python", wanted],
            ]
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{wanted} could not be installed: {done.stderr.strip()[-300:]}")
            ready.touch()
    return programs / "litellm"


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """End a process; one that does not listen, by force."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
