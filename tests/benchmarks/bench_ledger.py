"""Prints what the ledger costs a completion, alone and with 16 processes at once, in both journal modes.

python tests/benchmarks/bench_ledger.py [FOLDER]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from biollm.config import Limit
from biollm.ledger import Claim, Ledger, Record

LIMITS = (Limit("requests", 1e6, "min"), Limit("tokens", 1e9, "month"))
NEEDS = [Claim(f"bench/{number}", LIMITS, (f"account:bench/{number}", "endpoint:bench")) for number in range(10)]


def record(at: float) -> Record:
    return Record(at, "r", "bench/m", "bench", "default", "m", "ok", ms=1.0, prompt_tokens=100, completion_tokens=9)


async def work(ledger: Ledger, count: int, pause: float) -> tuple[list[float], list[float]]:
    """Return the milliseconds waited in reserve, and those of reserve and finish together."""
    waits, costs = [], []
    for number in range(count):
        claim = NEEDS[number % len(NEEDS)]
        began = time.perf_counter()
        reservation = await ledger.reserve(claim)
        reserved = time.perf_counter()
        assert isinstance(reservation, int)
        ledger.finish(reservation, claim.scope, record(time.time()))
        costs.append((time.perf_counter() - began) * 1000)
        waits.append((reserved - began) * 1000)
        await asyncio.sleep(pause)
    return waits, costs


def child(folder: Path, how: dict[str, Any], count: int, pause: float, start: Barrier, out: Any) -> None:
    ledger = Ledger(folder, **how)
    ledger.refresh()
    start.wait()
    waits, _ = asyncio.run(work(ledger, count, pause))
    ledger.close()
    out.put(waits)


def figures(milliseconds: list[float]) -> str:
    ordered = sorted(milliseconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {p50:.2f} p99 {p99:.2f} max {ordered[-1]:.1f} ms"


def alone(folder: Path, how: dict[str, Any]) -> tuple[list[float], list[float]]:
    ledger = Ledger(folder, **how)
    asyncio.run(work(ledger, 20, 0))
    found = asyncio.run(work(ledger, 1000, 0.002))
    ledger.close()
    return found


def together(
    folder: Path, how: dict[str, Any], pause: float, processes: int = 16, count: int = 100
) -> tuple[list[float], int, int]:
    """Return the milliseconds waited, how many attempts both files kept, and how many there were."""
    spawn = multiprocessing.get_context("spawn")
    start, out = spawn.Barrier(processes), spawn.Queue()
    children = [spawn.Process(target=child, args=(folder, how, count, pause, start, out)) for _ in range(processes)]
    for one in children:
        one.start()
    results = [out.get() for _ in children]
    for one in children:
        one.join()
    waits = [wait for found in results for wait in found]
    used = sum(Ledger(folder, **how).used(claim.scope, claim.limits)[0][1] for claim in NEEDS)
    kept = sum(1 for _ in Ledger(folder).history())
    return waits, min(int(used), kept), processes * count


def main() -> None:
    within = sys.argv[1] if len(sys.argv) > 1 else None
    for name, how in (("WAL", {"network": False}), ("rollback journal", {"network": True})):
        with tempfile.TemporaryDirectory(dir=within) as folder:
            waits, costs = alone(Path(folder), how)
            print(f"{name}, one process: reserve {figures(waits)}; reserve + finish {figures(costs)}")
        for pause in (0.0, 0.01):
            with tempfile.TemporaryDirectory(dir=within) as folder:
                waits, kept, made = together(Path(folder), how, pause)
                apart = f"{name}, 16 processes, {pause * 1000:.0f} ms apart"
                print(f"{apart}: wait {figures(waits)}; {kept} of {made} attempts kept")


if __name__ == "__main__":
    main()
