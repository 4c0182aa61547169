"""Replays a day of requests against `scale:` without a clock or a cluster, and prints what it costs.

    python examples/autoscale_day.py [MAX]

The decisions are biollm's own (`biollm.slurm.scaling`); arrivals, Slurm's queue and the servers are simulated.
Write your own day into DAY: requests in each hour from 0 to 23 h. MAX is the `max` of `scale` (default 3).
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from biollm.config import Scale
from biollm.slurm.scaling import UNSERVED_S, Delays, decide, measured

DAY = (2, 0, 0, 0, 0, 3, 6, 60, 400, 1300, 1700, 900, 500, 900, 1600, 1800, 1000, 500, 200, 100, 60, 400, 40, 6)


@dataclass
class Site:
    """The simulated cluster; times in seconds."""

    slots: int = 8  # requests that a server runs at once
    service: float = 24.0  # mean time of a request
    queue: float = 300.0  # mean wait of a job
    load: float = 120.0  # from a job's start to its server's first answer
    walltime: float = 8 * 3600.0
    drain: float = 120.0  # before the walltime's end
    every: float = 10.0  # between two looks
    cloud_usd: float = 0.01  # a request that no server takes


@dataclass
class Server:
    begins: float  # of its job, after the wait in the queue
    ready: float
    ends: float  # its walltime
    draining: bool = False
    busy: list[float] = field(default_factory=list)  # the end of each running request
    queue: deque[tuple[float, float]] = field(default_factory=deque)  # (arrival, seconds)

    @property
    def requests(self) -> int:
        return len(self.busy) + len(self.queue)


@dataclass
class Day:
    """What a day came to; `changes` are (time, 1 or -1)."""

    gpu_hours: float = 0.0
    cloud: int = 0
    waits: list[float] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)
    most: int = 0  # servers and jobs at a time, without those that drain

    @property
    def waiting(self) -> float:
        return sum(self.waits) / max(1, len(self.waits))


def replay(day: Sequence[int], scale: Scale | None, site: Site, chance: Random) -> Day:
    """Replay the hours of a day; without a `scale`, on one server that runs all the time."""
    until = len(day) * 3600.0
    arrivals = deque(sorted((hour + chance.random()) * 3600 for hour, count in enumerate(day) for _ in range(count)))
    servers = [] if scale else [Server(0.0, 0.0, 2 * until)]
    looks, unserved, delays, now, stopped, out = [], deque(), Delays(), 0.0, -1e9, Day()
    while now < until:
        now += site.every
        while arrivals and arrivals[0] <= now:
            at = arrivals.popleft()
            work(servers, at, site, out)
            if is_up := [each for each in servers if up(each, at, site)]:
                min(is_up, key=lambda each: each.requests).queue.append((at, chance.expovariate(1 / site.service)))
            else:
                unserved.append(at)
                out.cloud += 1
        work(servers, now, site, out)
        if not scale:
            continue
        while unserved and unserved[0] < now - UNSERVED_S:
            unserved.popleft()
        counts = [(len(each.busy), len(each.queue)) for each in servers if up(each, now, site)]
        coming = sum(each.ready > now and not each.draining for each in servers)
        looks.append(measured(now, counts, coming, unserved, looks))
        if looks[0].at < now - 2 * delays.quiet:
            looks.pop(0)
        decision = decide(scale, looks, delays, stopped=stopped, starts_in=site.queue + site.load)
        if decision.change > 0:
            begins = now + (chance.expovariate(1 / site.queue) if site.queue else 0.0)
            servers.append(Server(begins, begins + site.load, begins + site.walltime))
        elif decision.change < 0:
            stopped, known = now, [each for each in servers if not each.draining]
            min(known, key=lambda each: (each.ready <= now, each.requests)).draining = True
        if decision.change:
            out.changes.append((now, decision.change))
        out.most = max(out.most, looks[-1].ready + looks[-1].coming + decision.change)
    for each in servers:
        out.gpu_hours += max(0.0, now - each.begins) / 3600
    return out


def up(server: Server, now: float, site: Site) -> bool:
    return server.ready <= now < server.ends - site.drain and not server.draining


def work(servers: list[Server], now: float, site: Site, out: Day) -> None:
    """Let the servers work until `now`; one that drains ends when it is empty."""
    for server in list(servers):
        while server.busy and server.busy[0] <= now:
            start(server, heapq.heappop(server.busy), out)
        while server.queue and len(server.busy) < site.slots:
            start(server, 0.0, out)
        if now >= server.ends or (server.draining and not server.requests):
            out.gpu_hours += max(0.0, min(now, server.ends) - server.begins) / 3600
            out.cloud += len(server.queue)
            servers.remove(server)


def start(server: Server, freed: float, out: Day) -> None:
    if server.queue:
        arrived, seconds = server.queue.popleft()
        out.waits.append(max(0.0, freed - arrived))
        heapq.heappush(server.busy, max(freed, arrived) + seconds)


def main() -> None:
    site, scale = Site(), Scale(max=int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    fixed, scaled = (replay(DAY, each, site, Random(1)) for each in (None, scale))  # noqa: S311 # no secret
    print(f"{sum(DAY)} requests of {site.service:g} s, {site.slots} at once on a server of one GPU")
    print(f"a job waits {site.queue / 60:g} min in the queue, its server loads for {site.load / 60:g} min (means)\n")
    print(f"{'':18}  GPU-hours  mean wait  to the cloud")
    for name, out in ("one fixed server", fixed), (f"scale, max {scale.max}", scaled):
        print(
            f"{name:18}  {out.gpu_hours:9.1f}  {out.waiting:7.1f} s  {out.cloud:4} for {out.cloud * site.cloud_usd:.2f} USD"
        )
    count = 0
    for at, change in scaled.changes:
        count += change
        print(f"{int(at // 3600):02}:{int(at % 3600 // 60):02}  {'up' if change > 0 else 'down'}")


if __name__ == "__main__":
    main()
