"""Debian's packages for the tests with real parts, installed on first use where they run as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def install(*packages: str) -> None:
    """Install packages; their services are not started. Does nothing where this is not root on Debian.

    Raises:
        subprocess.CalledProcessError: They cannot be installed.
    """
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    quiet = ("apt-get", "-qq")
    try:
        subprocess.run((*quiet, "update"), env=env, stdout=2, check=True)
        subprocess.run((*quiet, "install", "-y", "--no-install-recommends", *packages), env=env, stdout=2, check=True)
    finally:
        if made:
            policy.unlink()
