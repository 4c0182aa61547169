"""Says whose a process or a file is: on a shared host, another user's server must not get a prompt or a key."""

from __future__ import annotations

import ipaddress
import os
import pwd
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit


def listener_trusted(base_url: str, trusted_owners: Sequence[str]) -> bool:
    """Does whatever listens at a loopback URL belong to this user, a trusted owner or root?

    On a shared host anybody can take port 8000 first. Other hosts, and a port where nobody listens, are not
    judged: True.
    """
    host, port = address(base_url)
    if not is_loopback(host):
        return True
    trusted = uids(trusted_owners) | {0}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        if any(r[3] == "0A" and int(r[1].rpartition(":")[2], 16) == port and int(r[7]) not in trusted for r in rows):
            return False
    return True


def address(url: str) -> tuple[str, int]:
    """Return the host and the port that a URL leads to."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_private(path: Path, kind: Callable[[int], bool] = stat.S_ISDIR) -> bool:
    """Is the path of this kind, and for this user alone?"""
    try:
        at = path.lstat()
    except OSError:
        return False
    return kind(at.st_mode) and at.st_uid == os.getuid() and not at.st_mode & 0o077


def is_this_host(address: str) -> bool:
    """Is the address loopback, or this host's own name?"""
    return is_loopback(address) or address == socket.gethostname()


def is_loopback(host: str) -> bool:
    """Does the host name this machine alone? All of 127.0.0.0/8 does."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def uids(trusted_owners: Iterable[str]) -> frozenset[int]:
    """Return the user ids of this user and of the trusted owners (names or numbers; unknown names are left out)."""
    found = {os.getuid()}
    for name in trusted_owners:
        with suppress(KeyError):
            found.add(int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid)
    return frozenset(found)
