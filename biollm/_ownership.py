"""Says whose a process or a file is, and whether an address may be sent a key or a prompt.

On a shared host anybody can listen on loopback, and what travels over plain http:// can be read on the way.
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


def objection(url: str, *, key: bool, local_hosts: Iterable[str], trusted_owners: Sequence[str]) -> str | None:
    """Return why nothing may be sent to an address, one sentence, or None.

    Every sender asks this first, but for servers found by their record, which prove their start instead.

    Args:
        url: Where the request goes.
        key: Whether a key goes with it.
        local_hosts, trusted_owners: As in cluster.yaml.
    """
    if key and (reason := in_the_clear(url, local_hosts)):
        return reason
    if not listener_trusted(url, trusted_owners):
        return f"what listens at {url} belongs to another user (trusted_owners in cluster.yaml)"
    return None


def in_the_clear(url: str, local_hosts: Iterable[str]) -> str | None:
    """Return why no key may be sent to an address, one sentence, or None: others could read it on the way."""
    if urlsplit(url).scheme != "http" or is_local(url, local_hosts):
        return None
    host = address(url)[0]
    return f"no key is sent over plain http:// to {host}: use https://, or name {host} in local_hosts of cluster.yaml"


def is_local(url: str | None, local_hosts: Iterable[str]) -> bool:
    """Return whether `url` is loopback or a host that the site calls its own."""
    host = urlsplit(url).hostname if url else None
    return bool(host) and (is_loopback(host) or host in {each.lower() for each in local_hosts})


def listener_trusted(base_url: str, trusted_owners: Sequence[str]) -> bool:
    """Does whatever listens at a URL of this host belong to this user, a trusted owner or root?

    On a shared host anybody can take port 8000 first. Other hosts, and a port where nobody listens, are not
    judged: True.
    """
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
