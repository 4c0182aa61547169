"""From configuration to LiteLLM's Router, and the loop that asks until one deployment answers.

Imports `config`, `ledger`, `providers` and `slurm`. Start at `deployments.py` (priority becomes `order`), `router_config.py`
(deployments become LiteLLM's `model_list`, rate limits `rpm`) and `waterfall.py`; `failures.py` says what each failure means.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING

from biollm.routing import litellm_private

if TYPE_CHECKING:
    from biollm.routing.litellm_router import LiteLLMRouter

_importing = threading.Lock()


def import_router() -> type[LiteLLMRouter]:
    """Import LiteLLM with its fetch of the price map switched off, and leave the environment as it was."""
    name = "LITELLM_LOCAL_MODEL_COST_MAP"
    with _importing:
        before, collects = os.environ.get(name), gc.isenabled()
        os.environ[name] = before or "True"
        gc.disable()  # an import makes much and drops little: to look for garbage takes a sixth of its time
        try:
            from biollm.routing.litellm_router import LiteLLMRouter
        finally:
            if before is None:
                del os.environ[name]
            if collects:
                gc.enable()
    if os.environ.get(litellm_private.OWN_HANDLER):  # a program of biollm's own
        litellm_private.defer_tokenizer()
    return LiteLLMRouter
