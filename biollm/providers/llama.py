"""A GGUF model in this process, answering as a provider of LiteLLM's; imported only where LiteLLM is.

xllamacpp brings llama.cpp's own server, LiteLLM the CustomLLM seam. What both lack is written here: one thread
that loads and answers, so that no event loop waits; cancelling; time limits; living through a fork.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import importlib
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from litellm import ModelResponse, Usage, exceptions
from litellm.llms.base_llm.base_utils import map_developer_role_to_system_role
from litellm.llms.custom_llm import CustomLLM

PROVIDER = "biollm_embedded"
# Unless the request says otherwise. Small models ramble, at some 50 tokens/s, and repeat themselves for ever.
_DEFAULTS = {"max_tokens": 512, "temperature": 0.2}
_AGAINST_LOOPS = {"dry_multiplier": 0.8, "repeat_penalty": 1.1, "repeat_last_n": 256}  # JSON does repeat
_BATCH = 128  # tokens of a prompt that are read, in about a second, before the next look at a cancellation
_SENT = (
    *("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty"),
    *("max_tokens", "stop", "seed", "response_format"),
)


class EmbeddedLLM(CustomLLM):
    """Answers with the model that `api_base` names: "file:///path/to/x.gguf?n_ctx=8192&n_threads=1"."""

    def __init__(self) -> None:
        super().__init__()
        self._server: Any = None
        self._address = ""
        self._forked = False
        self._thread = ThreadPoolExecutor(1, "biollm-embedded")
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._unload)

    async def acompletion(self, *args: Any, **call: Any) -> ModelResponse:
        """Return the whole answer; LiteLLM calls this with its keywords."""
        pieces = [piece async for piece in self._pieces(call, whole=True)]
        return ModelResponse(
            model=call["model"],
            choices=[
                {
                    "message": {"role": "assistant", "content": "".join(piece["text"] for piece in pieces)},
                    "finish_reason": pieces[-1]["finish_reason"],
                }
            ],
            usage=Usage(**pieces[-1]["usage"]),
        )

    async def astreaming(self, *args: Any, **call: Any) -> AsyncGenerator[Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield LiteLLM's GenericStreamingChunks, usage with the last; its own type says coroutine by mistake."""
        async with aclosing(self._pieces(call, whole=False)) as pieces:
            async for piece in pieces:
                yield piece

    async def _pieces(self, call: dict[str, Any], *, whole: bool) -> AsyncGenerator[dict[str, Any], None]:
        """Yield text as it comes, then why it ended and what it used; leaving early stops the thread's work.

        The call's timeout bounds the `whole` answer, or else the wait for each piece of text.
        """
        loop, model = asyncio.get_running_loop(), call["model"]
        inbox: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        left = threading.Event()

        def put(item: dict[str, Any] | Exception | None) -> bool:
            if not left.is_set():
                loop.call_soon_threadsafe(inbox.put_nowait, item)
            return left.is_set()  # True makes llama.cpp stop

        seconds: float = getattr(call["timeout"], "read", call["timeout"]) or float("inf")
        deadline = loop.time() + seconds
        job = self._thread.submit(self._answer, call["api_base"], _request(call), put)
        finish, usage = "", dict[str, Any]()
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    item = await inbox.get()
                if item is None:
                    break
                if isinstance(item, Exception) or "error" in item:
                    raise _failure(item, model)
                usage = item.get("usage") or usage
                for choice in item["choices"]:
                    finish = choice["finish_reason"] or finish
                    if text := choice["delta"].get("content"):
                        yield _piece(text)
                        deadline = deadline if whole else loop.time() + seconds
        except TimeoutError:
            raise exceptions.Timeout(f"no answer within {seconds:g} s", model, PROVIDER) from None
        finally:
            left.set()
            job.cancel()
        if not finish:
            raise exceptions.APIConnectionError("the embedded model ended early", PROVIDER, model)
        yield _piece("", finish, usage)

    def _answer(self, address: str, request: dict[str, Any], put: Callable[[Any], bool]) -> None:
        """Answer one request, in the thread."""
        try:
            self._load(address)
            self._server.handle_chat_completions(request, put)
            put(None)
        except Exception as error:
            put(error)

    def _load(self, address: str) -> None:
        if address == self._address:
            return
        self._unload()
        file = urlsplit(address)
        options = {name: int(values[0]) for name, values in parse_qs(file.query).items()}
        try:
            self._server = _serve(unquote(file.path), **options)
        except Exception as error:
            message = f"{unquote(file.path)} cannot be loaded: {error}"
            raise exceptions.ServiceUnavailableError(message, PROVIDER, address) from error
        self._address = address

    def _unload(self) -> None:
        if self._server is not None and self._forked:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._server))
        self._server, self._address = None, ""

    def _forget(self) -> None:
        """Start afresh in a forked child.

        llama.cpp's threads are gone there, and whatever frees it waits for them for ever: so nothing is freed,
        and the child's exit, after Python's own end, leaves out the destructors of C++.
        """
        if self._address:
            self._forked = True
            libc = ctypes.CDLL(None)
            if hasattr(libc, "on_exit"):
                libc.on_exit(libc._exit, None)
        self._unload()
        self._thread = ThreadPoolExecutor(1, "biollm-embedded")


def _serve(path: str, *, n_ctx: int, n_threads: int) -> Any:
    """Return a server of llama.cpp; the port it opens on loopback takes only a key that nobody has."""
    llama: Any = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = n_ctx, 1
    params.n_batch = params.n_ubatch = _BATCH
    params.cache_ram_mib = 0  # else it keeps up to 8 GiB of old prompts
    params.n_threads_http, params.ui, params.verbosity = 1, False, -1
    params.api_keys = [secrets.token_hex(16)]
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = n_threads
        cpu.priority = llama.ggml_sched_priority.GGML_SCHED_PRIO_LOW  # nice 5
    return llama.Server(params)


def _request(call: dict[str, Any]) -> dict[str, Any]:
    given = call["optional_params"]
    if given.get("tools") or given.get("functions"):
        raise exceptions.UnsupportedParamsError("the embedded model takes no tools", PROVIDER, call["model"])
    sent = {name: given[name] for name in _SENT if given.get(name) is not None}
    penalties = {} if "response_format" in sent else _AGAINST_LOOPS
    stream = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    if longest := given.get("max_completion_tokens"):
        sent["max_tokens"] = longest
    messages = map_developer_role_to_system_role(call["messages"])
    return {**_DEFAULTS, **penalties, **sent, **stream, "messages": messages}


def _piece(text: str, finish: str = "", usage: dict[str, Any] | None = None) -> dict[str, Any]:
    counts = (
        {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")} if usage else None
    )
    return {
        "text": text,
        "is_finished": bool(finish),
        "finish_reason": finish,
        "usage": counts,
        "index": 0,
        "tool_use": None,
    }


def _failure(found: dict[str, Any] | Exception, model: str) -> Exception:
    """Return LiteLLM's exception for what llama.cpp sent, or raised when it read the request."""
    if isinstance(found, exceptions.ServiceUnavailableError):
        return found
    error = {"message": str(found), "code": 400} if isinstance(found, Exception) else found["error"]
    message = f"the embedded model: {error['message']}"
    if error.get("type") == "exceed_context_size_error":
        return exceptions.ContextWindowExceededError(message, model, PROVIDER)
    if error["code"] == 400:
        return exceptions.BadRequestError(message, model, PROVIDER)
    return exceptions.APIConnectionError(message, PROVIDER, model)
