"""What a redraw of `biollm top` costs, beside a ledger of 200,000 attempts to which ten are added every second; the page."""

from __future__ import annotations

import os
import time
from pathlib import Path

from setting import Bar, waterfall

_INTERVAL = 2.0  # seconds between two redraws, the default of `biollm top`


def measure(address: str, scratch: Path) -> list[Bar]:
    """Return the share of a core that redrawing takes, by the CPU time of snapshot and text; and the page's size."""
    from biollm.config import load_config
    from biollm.ledger import Ledger, Record
    from biollm.monitoring import page
    from biollm.monitoring.dashboard import render
    from biollm.monitoring.snapshot import Collector

    folder = waterfall(scratch / "top", **{f"rung{n}": f"{address}/ok/v1" for n in range(12)})
    state = scratch / "top-state"
    ledger, began = Ledger(state), time.time()

    def add(number: int, at: float) -> None:
        candidate = f"rung{number % 12}"
        ledger.finish(
            None,
            "",
            Record(at, f"{number}", f"{candidate}/small", candidate, "default", "small", "ok", ms=900, order=1),
        )

    for number in range(200_000):
        add(number, began - 86000 + number * 0.43)
        if number % 5000 == 0:
            ledger.flush()
    ledger.flush()
    top = Collector(load_config(folder), ledger, state)
    render(top.snapshot(), 80, 24)
    used: list[float] = []
    for redraw in range(20):
        for number in range(20):
            add(200_000 + 20 * redraw + number, time.time())
        ledger.flush()
        before = time.process_time()
        render(top.snapshot(), 80, 24)
        used.append(time.process_time() - before)
    ledger.close()
    share = 100 * sum(used) / len(used) / _INTERVAL
    note = f"{1000 * sum(used) / len(used):.1f} ms of CPU per redraw, 12 rungs, every {_INTERVAL:g} s"
    first = page.html(top.snapshot())
    size, requests = len(first.encode()) / 1000, 1 + first.count("src=") + first.count("@import") + first.count("url(")
    return [
        Bar("`biollm top`: share of a core", share, 5.0, "%", note),
        Bar("the page, first paint", size, 200, "kB"),
        Bar(
            "the page, first paint: requests", requests, 1, "", "a browser's own count is in tests/real/test_browser.py"
        ),
    ]


if __name__ == "__main__":
    import tempfile

    os.environ["BENCH_KEY"] = "sk-bench-0123456789"
    with tempfile.TemporaryDirectory() as folder:
        for bar in measure("http://localhost:1", Path(folder)):
            print(bar.row())
