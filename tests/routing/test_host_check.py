"""The check that a host is reachable, beside the request to it."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

from provider import Loopback

from biollm.client import get_model_client
from biollm.routing.host_check import Reach


def test_a_check_that_is_cancelled_at_any_moment_closes_its_connection(
    net: Loopback, waterfall: Callable[..., Path]
) -> None:
    server = net.serve()
    waterfall(first=server)
    [candidate] = get_model_client().explain()

    async def check(steps: int) -> None:
        async with asyncio.timeout(None) as scope:
            task = Reach(3.0).watch(candidate.deployment, scope)
            assert task
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.01)
        gc.collect()  # which would find one that was forgotten, close it and warn

    async def main() -> None:
        for steps in range(20):
            await check(steps)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(main())
    assert server.connections
    assert not [str(each.message) for each in found if "StreamWriter" in str(each.message)]
