"""Checks who owns a process or a file, and whether an address may receive a key or a prompt.

On a shared host any user can listen on loopback, and others can read what is sent over plain http://.
"""

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


def objection(url: str, *, local_hosts: Iterable[str], trusted_owners: Sequence[str]) -> str | None:
    """Return why nothing may be sent to a URL, in one sentence, or None.

    Every sender calls this first, except to servers found by their record, which prove their start instead.
    """
    if reason := in_the_clear(url, local_hosts):
        return reason
    if not listener_trusted(url, trusted_owners):
        return f"what listens at {url} belongs to another user (trusted_owners in cluster.yaml)"
    return None


def in_the_clear(url: str, local_hosts: Iterable[str]) -> str | None:
    """Return why neither a key nor a prompt may be sent to a URL, in one sentence, or None."""
    if urlsplit(url).scheme != "http" or is_local(url, local_hosts):
        return None
    host = address(url)[0]
    return f"nothing is sent over plain http:// to {host}: use https://, or name {host} in local_hosts of cluster.yaml"


def is_local(url: str | None, local_hosts: Iterable[str]) -> bool:
    """Return whether `url` is loopback or one of the site's own hosts."""
    host = urlsplit(url).hostname if url else None
    return bool(host) and (is_loopback(host) or host in {each.lower() for each in local_hosts})


def listener_trusted(base_url: str, trusted_owners: Sequence[str]) -> bool:
    """Return False if what listens at a URL of this host is neither this user's, a trusted owner's nor root's."""
    host, port = address(base_url)
    if not is_this_host(host):
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
    """Return the host and the port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_private(path: Path, kind: Callable[[int], bool] = stat.S_ISDIR) -> bool:
    """Return whether the path is of this kind, and only this user can access it."""
    try:
        at = path.lstat()
    except OSError:
        return False
    return kind(at.st_mode) and at.st_uid == os.getuid() and not at.st_mode & 0o077


def is_this_host(address: str) -> bool:
    """Return whether the address is loopback, or this host's own name."""
    return is_loopback(address) or address == socket.gethostname()


def is_loopback(host: str) -> bool:
    """Return whether the host is `localhost` or a loopback address."""
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
