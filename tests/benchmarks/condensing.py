"""What it costs to condense a log of 31 MB, beside Python reading it and counting its lines, and the memory for 1 GB."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import logs
from setting import ROUNDS, Bar

CONTEXT = 128_000


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _counted(path: Path) -> int:
    with path.open() as file:
        return sum(1 for _ in file)


def measure(scratch: Path) -> list[Bar]:
    """Measure three kinds of log: one with a failure, one in which each line looks like one, and one in colour."""
    from biollm.inputs.read import read_input

    bars: list[Bar] = []
    kinds = {
        "a Nextflow log with one failure": logs.nextflow,
        "a coloured log": logs.colour,
        "a log whose every line reports a failure": logs.failures,
    }
    for what, filler in kinds.items():
        path = scratch / "run.log"
        with path.open("wb") as file:
            file.writelines(logs.Log("nextflow_oom.log", "", 31 * logs.MB, filler, 0.5).chunks())
        read_input(path).digest.cut(CONTEXT)
        turns = [
            (_seconds(lambda: read_input(path).digest.cut(CONTEXT)), _seconds(lambda: _counted(path)))
            for _ in range(ROUNDS)
        ]
        times, ratio = [condensed for condensed, _ in turns], [one / other for one, other in turns]
        note = f"{sorted(times)[ROUNDS // 2] * 1000:.0f} ms"
        bars.append(
            Bar(f"condensing 31 MB of {what}, beside counting its lines", sorted(ratio)[ROUNDS // 2], 6, note=note)
        )
    bars.append(Bar("condensing 1 GB: memory", logs.memory("10:00 step 12 of 900 is done\n", 1000), 100, "MB"))
    return bars


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for bar in measure(Path(folder)):
            print(bar.row())
