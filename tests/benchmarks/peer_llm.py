"""The contestant `llm`, run by the Python of its own environment: milliseconds per request, for each line of stdin."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import llm  # pyright: ignore[reportMissingImports]

PROMPT = "Why did this job fail? Exit status 137."


async def main() -> None:
    requests = {int(key): count for key, count in json.loads(sys.argv[1]).items()}
    model = llm.get_async_model("bench")
    for line in sys.stdin:
        waiting = iter(range(requests[int(line)]))

        async def one_after_another(waiting=waiting) -> None:
            for _ in waiting:
                await model.prompt(PROMPT, stream=False).text()

        began = time.perf_counter()
        await asyncio.gather(*(one_after_another() for _ in range(int(line))))
        print((time.perf_counter() - began) * 1000 / requests[int(line)], flush=True)


asyncio.run(main())
