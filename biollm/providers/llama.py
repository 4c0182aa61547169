"""Serves a GGUF model on a loopback port, by llama.cpp's own server; `embedded` runs this file as a program.

xllamacpp has the server, but no command that starts it. In biollm's own process its threads would be missing after
a fork, and its destructors would hang the child.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import time
from typing import Any

_BATCH = 128  # tokens of a prompt between two checks of whether the client is still connected: about a second
_POLL_S = 0.5  # between two checks of whether the parent process still runs


def serve(path: str, *, n_ctx: int, n_threads: int, key: str) -> Any:
    """Return a running server of a GGUF file that accepts one API key."""
    llama: Any = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = n_ctx, 1
    params.n_batch = params.n_ubatch = _BATCH
    params.cache_ram_mib = 0  # its default keeps up to 8 GiB of old prompts
    params.n_threads_http, params.ui, params.verbosity = 1, False, -1
    params.api_keys = [key]
    # Defaults, which a request may override. Small models ramble, at some 50 tokens/s, and repeat themselves.
    params.n_predict, params.sampling.temp = 512, 0.2
    params.sampling.dry_multiplier, params.sampling.penalty_repeat, params.sampling.penalty_last_n = 0.8, 1.1, 256
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = n_threads
        cpu.priority = llama.ggml_sched_priority.GGML_SCHED_PRIO_LOW  # nice 5
    return llama.Server(params)


def main(path: str, n_ctx: str, n_threads: str, parent: str) -> None:
    """Print the URL and the key, or the error, as JSON; serve while the process `parent` runs."""
    key = secrets.token_hex(16)
    try:
        server = serve(path, n_ctx=int(n_ctx), n_threads=int(n_threads), key=key)
    except Exception as error:
        print(json.dumps({"error": str(error)}))
        return
    print(json.dumps({"url": f"{server.listening_address}/v1", "key": key}), flush=True)
    while os.getppid() == int(parent):
        time.sleep(_POLL_S)
    os._exit(0)  # without waiting for a request in progress


if __name__ == "__main__":
    main(*sys.argv[1:])
