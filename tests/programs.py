"""Programs of others that tests and benchmarks run: installed once in the user's cache folder, and ended for certain."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

# The newest whose `proxy` extra can be installed: later ones, to 1.110.2, need packages that the index lacks.
PROXY = "1.108.7"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biollm"


def litellm_proxy() -> Path:
    """Return the `litellm` command of the real proxy, in a virtual environment of its own: 640 MB.

    Raises:
        RuntimeError: It could not be installed.
    """
    return python_packages(f"litellm-proxy-{PROXY}", f"litellm[proxy]=={PROXY}") / "litellm"


def python_packages(name: str, *packages: str) -> Path:
    """Install packages into a virtual environment of the cache folder, once; return the folder of its programs."""
    install = ["bin/uv", "pip", "install", "-q", "-p", "bin/python", *packages]
    python = str(Path(sys.executable).resolve())  # not of this checkout: others share the folder
    steps = ([python, "-m", "venv", "--clear", "."], ["bin/python", "-m", "pip", "install", "-q", "uv"], install)
    return _kept(name, *steps) / "bin"


def node_packages(name: str, *packages: str) -> Path:
    """Install npm packages into a folder of the cache folder, once; return it.

    Raises:
        RuntimeError: They could not be installed.
    """
    if not shutil.which("npm"):
        raise RuntimeError("no npm here")
    return _kept(name, ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", ".", *packages])


def _kept(name: str, *steps: list[str]) -> Path:
    """Return a folder of the cache in which the steps were run, "." being the folder itself."""
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    ready, wanted = folder / ".ready", repr(steps)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != wanted:
            for step in steps:
                done = subprocess.run(step, cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(step)} failed: {done.stderr.strip()[-300:]}")
            ready.write_text(wanted)
    return folder


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """End a process; one that does not listen, by force."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
