"""What biollm uses of LiteLLM although LiteLLM does not document it, in one place, each with its reason.

A release may drop any of these without notice; tests/routing/test_litellm_private.py tests each by its name. LiteLLM
takes seconds to import, so nothing here imports it before it is needed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# An environment variable: speak OpenAI's dialect with LiteLLM's own HTTP handler instead of OpenAI's SDK. It saves
# 1 ms of CPU per request and 0.1 s at the first.
OWN_HANDLER = "EXPERIMENTAL_OPENAI_BASE_LLM_HTTP_HANDLER"

# The file of the package with `litellm.model_cost`, for commands that need prices and no completion.
PRICES = "model_prices_and_context_window_backup.json"

# The loggers through which LiteLLM reports our calls; what they log could hold a key.
LOGGERS = ("LiteLLM", "LiteLLM Router")

# Messages of exceptions that have no class, code or cause to tell them apart.
STREAM_WAS_CUT = "Stream ended before a finish_reason was received"  # no dialect but OpenAI's checks that
NOT_JSON = "Empty or invalid response"  # HTML that OpenAI's SDK let pass
BAD_MESSAGE = "Invalid Message passed in"  # a message that Gemini's dialect cannot express

# LiteLLM looks for the reason when an answer costs nothing, for 1 ms. This price keeps it from pricing at all.
_ANY_PRICE = sys.float_info.min


def use_own_handler() -> None:
    """Let LiteLLM do without OpenAI's SDK; before its first request, and only in programs that are biollm's own."""
    os.environ.setdefault(OWN_HANDLER, "True")


def defer_tokenizer() -> None:
    """Load LiteLLM's tokenizer when something counts tokens, and not with the first request; LiteLLM is imported.

    LiteLLM passes the tokenizer on with every request, mostly unused: 37 MB in a gateway. It has no switch for that.
    """
    vars(sys.modules["litellm.main"]).setdefault("encoding", _Tokenizer())


class _Tokenizer:
    def __getattr__(self, name: str) -> Any:
        from litellm.rust_bridge.tokenizer import get_encoding

        return getattr(get_encoding("cl100k_base"), name)


def skip_success_events() -> None:
    """Mark the calls of this context as internal ones: LiteLLM builds no success event for them.

    No callback would see the event, for `no-log` is set, yet building it takes 1 ms of CPU per request.
    """
    from litellm._internal_context import is_internal_call

    is_internal_call.set(True)


def skip_pricing(response: Any) -> None:
    """Give an answer a price before LiteLLM computes one; biollm computes it where there is something to pay."""
    response._hidden_params["response_cost"] = _ANY_PRICE


def provider_headers(response: Any) -> dict[str, str]:
    """Return the provider's HTTP headers, with LiteLLM's prefix `llm_provider-`."""
    return response._hidden_params.get("additional_headers", {})


def chunks(stream: Any) -> Any:
    """Return the list of the chunks that a stream has kept, as the provider sent them; None of another response.

    Iterating yields a final "stop" whether or not the provider sent a finish_reason. The list is LiteLLM's own: a
    shorter one frees memory, and LiteLLM builds the whole answer from it.
    """
    return getattr(stream, "chunks", None)
