"""Translates OpenAI's JSON into a client's options, and completions and errors into OpenAI's JSON. Pure.

LiteLLM's proxy takes any LiteLLM argument from a request's body, even an address to send the key to; here a field
that OpenAI does not know goes into the provider's body and nowhere else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import partial
from random import getrandbits
from typing import TYPE_CHECKING, Any, cast

from biollm import errors
from biollm.client.ensemble import EnsembleCompletion
from biollm.client.options import RULES
from biollm.config.paths import tags_of
from biollm.inputs.normalize_log import normalize_log
from biollm.routing.candidates import address
from biollm.routing.deployments import models_of
from biollm.routing.normalize import PARAMETERS, Rule, checked
from biollm.routing.router_config import GROUP, LOCAL_GROUP
from biollm.routing.structured import ResponseSchema
from biollm.types import BLOCKED, DATA_POLICIES, Attempt, Completion, Json, part

if TYPE_CHECKING:
    from biollm.client import Options
    from biollm.config import Config
    from biollm.routing.candidates import Candidate

Types = Mapping[str, type | tuple[type, ...]]
RESTARTS = "x-biollm-restarts"
_INTERRUPTED = ("", "raise", "restart", "splice")
_NUMBER, _TEXTS, _ENSEMBLE = (int, float), (str, list), (int, list, dict)
# The fields of a body: those read here, those that become options, and those passed on to the provider.
_READ: Types = {
    "biollm": dict, "echo": object, "messages": list, "metadata": dict, "model": str, "prompt": _TEXTS, "store": object,
    "stream": bool, "stream_options": dict, "suffix": str,
}  # fmt: skip
_OPTIONS: Types = {
    "max_completion_tokens": int, "max_tokens": int, "temperature": _NUMBER, "tool_choice": (str, dict), "tools": list,
}  # fmt: skip
_PASSED: Types = {
    "frequency_penalty": _NUMBER, "function_call": object, "functions": object, "logit_bias": object,
    "logprobs": object, "modalities": object, "n": int, "parallel_tool_calls": object, "prediction": object,
    "presence_penalty": _NUMBER, "reasoning_effort": object, "response_format": dict, "seed": int,
    "service_tier": object, "stop": _TEXTS, "top_logprobs": object, "top_p": _NUMBER, "user": object,
    "verbosity": object,
}  # fmt: skip
_BODY: Types = {**_READ, **_OPTIONS, **_PASSED}
_EXTENSION: Types = {
    "allow_degraded": bool, "attachments": list, "cache": object, "cache_similar": object, "capability": str, "condense": bool, "data_policy": str, "deadline": _NUMBER, "ensemble": _ENSEMBLE, "fallback": bool,
    "local_only": bool, "max_retries": int, "on_interrupt": str, "patience": _NUMBER, "provider": str,
    "redact": bool, "redact_names": list, "start_local": bool, "tags": dict, "timeout": _NUMBER, "wait": _NUMBER,
}  # fmt: skip
_SIMILAR: Rule = (
    "true, false, or a list of names",
    lambda given: (
        isinstance(given, bool) or (isinstance(given, list) and {*map(type, cast("list[Any]", given))} <= {str})
    ),
)
_MEMBERS: Types = {"judge": str, "members": (int, list), "method": str, "quorum": int}
# Error class -> status, OpenAI's type and code; the first that fits.
_REFUSALS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (errors.UnknownNameError, 404, "invalid_request_error", "model_not_found"),
    (errors.UsageError, 400, "invalid_request_error", "invalid_request"),
    (errors.ContentPolicyError, 400, "invalid_request_error", "content_policy_violation"),
    (errors.PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.RequestRejectedError, 400, "invalid_request_error", "request_rejected"),
    (errors.AllLimitedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.KeysRefusedError, 502, "server_error", "keys_refused"),
    (errors.DeadlineError, 504, "server_error", "deadline_exceeded"),
    (errors.InterruptedStreamError, 503, "server_error", "stream_interrupted"),
    (errors.BiollmError, 503, "server_error", "no_answer"),
)
_TYPES: dict[type | tuple[type, ...], str] = {
    bool: "true or false", dict: "an object", int: "a whole number", list: "a list", str: "a string", _NUMBER: "a number",
    (int, list): "a number or a list of models", _ENSEMBLE: "a number, a list of models or an object", _TEXTS: "a string or a list", (str, dict): "a string or an object",
}  # fmt: skip
_RETRIED = (429, 503, 504)  # of these, another try may help


class Delivery(Enum):
    """How an answer reaches the caller.

    WHOLE is sent once it is complete, in the form of a stream where that was asked for. LIVE is sent as it comes.
    BUFFERED comes from the provider as a stream, which may restart unseen, and is sent at its end.
    """

    WHOLE, LIVE, BUFFERED = range(3)


@dataclass(frozen=True)
class Asked:
    """A request as the client takes it.

    Attributes:
        prompt: The messages, or a text to continue: the code before the gap where `suffix` is given.
        suffix: The code after the gap to fill in.
        stream: Whether the caller reads server-sent events.
        usage: Whether a stream ends with a chunk of its tokens.
        ensemble: The arguments of `Client.ensemble`; None asks one deployment.
    """

    prompt: Any
    options: Options
    delivery: Delivery = Delivery.WHOLE
    suffix: str | None = None
    stream: bool = False
    usage: bool = False
    ensemble: Json | None = None


def read(given: Json, headers: Mapping[str, str], config: Config, tags: Mapping[str, str], *, chat: bool) -> Asked:
    """Return what the body of a chat completion, or else of a completion, asks for.

    Raises:
        UsageError: A field has the wrong type, is misspelt, or is not supported.
    """
    body = _checked(given, _BODY, "")
    for name in body.keys() - _BODY.keys() - {"models"}:  # OpenRouter's
        _check_spelling(name)
    ours = _checked(body.get("biollm", {}), _EXTENSION, "biollm.", closed=True)
    checked(body, PARAMETERS)
    checked(ours, {**RULES, "cache_similar": _SIMILAR}, "biollm.")
    if similar := ours.pop("cache_similar", False):
        ours["cache_key"] = partial(normalize_log, names=[] if similar is True else similar)
    if texts := ours.get("attachments"):  # a text is a text here: no caller learns which files this host has
        ours["attachments"] = [{"name": "text", "text": each} if isinstance(each, str) else each for each in texts]
    ensemble = _ensemble(ours.pop("ensemble", None), chat=chat)
    stream, prompt, schema = body.get("stream", False), _prompt(body, chat=chat), _schema(body)
    options: Json = {**address(config, body.get("model", GROUP)), **ours, "extra": _extra(body, schema)}
    options |= {name: body[name] for name in ("temperature", "tools", "tool_choice") if name in body}
    if (tokens := body.get("max_completion_tokens", body.get("max_tokens"))) is not None:
        options["max_tokens"] = tokens
    if schema is not None:
        options["response_model"] = schema
    policies = (("biollm.data_policy", ours.get("data_policy")), ("x-biollm-policy", headers.get("x-biollm-policy")))
    options["data_policy"] = max((_one_of(DATA_POLICIES, *each) for each in policies), key=DATA_POLICIES.index)
    by_header = tags_of(headers.get("x-biollm-tags", ""), "x-biollm-tags")
    options["tags"] = {**body.get("metadata", {}), **by_header, **ours.get("tags", {}), **tags}
    if (patience := headers.get("x-biollm-patience")) is not None:
        with suppress(ValueError):
            patience = float(patience)
        checked({"x-biollm-patience": patience}, {"x-biollm-patience": RULES["patience"]})
        options["patience"] = patience
    whole = not stream or schema is not None or bool(body.get("logprobs")) or not chat or ensemble is not None
    splice = bool(body.get("tools")) and "response_format" not in body
    delivery, options["on_interrupt"] = _delivery(headers, ours, whole=whole, splice=splice)
    return Asked(
        prompt=prompt,
        options=cast("Options", options),
        delivery=delivery,
        suffix=body.get("suffix"),
        stream=stream,
        usage=bool(body.get("stream_options", {}).get("include_usage")),
        ensemble=ensemble,
    )


def _ensemble(given: Any, *, chat: bool) -> Json | None:
    """Return the arguments of an ensemble: a number of members, a list of them, or an object."""
    if given is None:
        return None
    if not chat:
        raise errors.UsageError("An ensemble answers chats only.", hint="Use /v1/chat/completions.")
    if isinstance(given, dict):
        return {"members": 3} | _checked(cast("Json", given), _MEMBERS, "biollm.ensemble.", closed=True)
    return {"members": given}


def models(config: Config, candidates: Iterable[Candidate]) -> list[Json]:
    """Return OpenAI's list of models: the two groups, and every model with its providers.

    Each states the largest context of its deployments; a group, of those that could answer now.
    """
    owners: dict[str, list[str]] = {GROUP: [GROUP], LOCAL_GROUP: [GROUP]}
    for provider in config.providers:
        for name in models_of(config, provider):
            owners.setdefault(name, []).append(provider.name)
    contexts = dict.fromkeys(owners, 0)
    for each in candidates:
        groups = [GROUP, LOCAL_GROUP][: 1 + each.deployment.local] if each.status in ("ready", *BLOCKED) else ()
        for name in (each.deployment.model, *groups):
            contexts[name] = max(contexts[name], each.deployment.context_length or 0)
    return [_model(name, by, contexts[name]) for name, by in owners.items()]


def _model(name: str, owners: Iterable[str], context: int) -> Json:
    length = {"context_length": context, "max_model_len": context} if context else {}
    return {"id": name, "object": "model", "created": 0, "owned_by": ",".join(owners), **length}


def answer(completion: Completion, *, chat: bool = True) -> Json:
    """Return the JSON of a whole answer."""
    return {
        "id": _ident(chat),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": f"{completion.provider}/{completion.model}",
        "choices": [_choice(completion, each, chat) for each in completion.raw["choices"]],
        "usage": _usage(completion),
        "biollm": story(completion),
    }


def story(completion: Completion) -> Json:
    """Return what OpenAI's JSON has no field for."""
    names = (
        "id",
        "provider",
        "account",
        "model",
        "deployment",
        "cost_usd",
        "latency_ms",
        "degraded",
        "cached",
        "notes",
    )
    more = completion.panel() if isinstance(completion, EnsembleCompletion) else {}
    return {**{name: getattr(completion, name) for name in names}, **more, "attempts": _attempts(completion.attempts)}


def refusal(error: Exception, *, streamed: bool = False) -> tuple[int, Json, dict[str, str]]:
    """Return the status, body and headers of an error response; the body alone is the last event of a stream."""
    if not isinstance(error, errors.BiollmError):  # its text might hold anything
        return 500, problem("Internal error; see the gateway's log.", "server_error", "internal_error"), {}
    status, kind, code = next(row[1:] for row in _REFUSALS if isinstance(error, row[0]))
    # Agents that retry a broken stream look for these words.
    prefix = "Connection error: " if streamed and status in _RETRIED else ""
    body = problem(f"{prefix}{error}\n{error.hint or ''}".strip(), kind, code)
    body["error"]["biollm"] = error.to_json()
    headers: dict[str, str] = {}
    if isinstance(error, errors.CompletionError):
        headers = {"x-biollm-attempts": brief(error.attempts)}
    if isinstance(error, errors.AllLimitedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif status >= 500:
        headers["x-should-retry"] = "false"  # OpenAI's clients would go down the waterfall again, twice
    return status, body, headers


def problem(message: str, kind: str, code: str) -> Json:
    """Return an error's body as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def brief(attempts: Iterable[Attempt]) -> str:
    """Return attempts in the form of a header."""
    return ", ".join(f"{each.deployment}={each.outcome}" for each in attempts)[:2000].rstrip(", ")


DONE = "data: [DONE]\n\n"


def event(data: Json) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class Chunks:
    """The chunks of one streamed answer."""

    def __init__(self, model: str, *, chat: bool = True) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._ours: Json = {"id": _ident(chat), "object": kind, "created": int(time.time()), "model": model}
        self._chat, self._first = chat, chat

    def name(self, model: str) -> None:
        """Set the model that the next chunks name."""
        self._ours["model"] = model

    def piece(self, chunk: Json) -> Json:
        """Return a provider's chunk as one of this answer."""
        choice: Json = {"index": 0, **chunk["choices"][0]}
        if self._first:
            choice["delta"] = {"role": "assistant", **choice["delta"]}
            self._first = False
        return {**chunk, **self._ours, "choices": [choice]}

    def whole(self, completion: Completion) -> Iterator[Json]:
        """Yield the chunks of an answer that comes at once, without its end."""
        choice = _choice(completion, completion.raw["choices"][0], self._chat)
        if not self._chat:
            yield {**self._ours, "choices": [{**choice, "finish_reason": None}]}
            return
        message: Json = choice.pop("message")
        calls: Sequence[Json] = message.pop("tool_calls", None) or ()
        if any(value for name, value in message.items() if name != "role"):
            yield self.piece({"choices": [{**choice, "delta": message, "finish_reason": None}]})
        for index, call in enumerate(calls):
            delta = {"tool_calls": [{"index": index, **call}]}
            yield self.piece({"choices": [{"delta": delta, "finish_reason": None}]})

    def restarted(self, attempt: Attempt) -> Json:
        """Return the chunk that takes back the text so far."""
        self._first = self._chat
        return {**self._ours, "choices": [], "biollm": {"restarted": {"attempt": _attempts([attempt])[0]}}}

    def end(self, completion: Completion, *, usage: bool) -> Iterator[Json]:
        """Yield the chunks that follow: the reason of the end, and the tokens if asked for."""
        last: Json = {"delta": {}} if self._chat else {"text": ""}
        finish = completion.finish_reason or ("tool_calls" if completion.tool_calls else "stop")
        choices = [{"index": 0, **last, "finish_reason": finish}]
        ours = {"biollm": story(completion)}
        yield {**self._ours, "choices": choices, **({} if usage else ours)}
        if usage:
            yield {**self._ours, "choices": [], "usage": _usage(completion), **ours}


def parsed(given: bytes) -> Json:
    """Return the JSON of a body.

    Raises:
        UsageError: It is none, or no object.
    """
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise errors.UsageError(f"The body is not JSON. {_syntax(error, given)}") from None
    if not isinstance(found, dict):
        raise errors.UsageError("The body must be a JSON object.")
    return cast("Json", found)


def _syntax(error: Exception, given: bytes) -> str:
    """Return what is wrong with a body; a parser's message may quote none of it."""
    if not given.strip():
        return "It is empty."
    if isinstance(error, json.JSONDecodeError):
        return f"Line {error.lineno}, column {error.colno}: {error.msg}."
    return "It is not UTF-8." if isinstance(error, UnicodeError) else "It is nested too deeply."


def _check_spelling(name: str) -> None:
    """Refuse a field that is all but one of OpenAI's; others are extensions, such as vLLM's min_tokens."""
    if near := get_close_matches(_squashed(name), _SQUASHED, n=1, cutoff=0.88):
        raise errors.UsageError(f"There is no field {name!r}.", hint=f"Did you mean {_SQUASHED[near[0]]}?")


def _squashed(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_SQUASHED = {_squashed(name): name for name in _BODY}


def _checked(given: Json, types: Types, prefix: str, *, closed: bool = False) -> Json:
    """Return the fields that are not null; each must have its type, and be known where the set is closed."""
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        kind = types.get(name, object)
        if closed and name not in types:
            hint = errors.nearest(name, types) or f"Known: {', '.join(types)}."
            raise errors.UsageError(f"There is no option {prefix}{name}.", hint=hint)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            needs = f"it must be {_TYPES[kind]}"
            raise errors.UsageError(f"{prefix}{name} has the wrong type: {type(value).__name__}; {needs}.")
    return found


def _one_of(choices: Sequence[str], what: str, given: str | None) -> str:
    """Return the value of `what`, by default the first choice."""
    if (given := given or choices[0]) not in choices:
        raise errors.UsageError(f"{what} is {given!r}; it must be one of {', '.join(filter(None, choices))}.")
    return given


def _delivery(headers: Mapping[str, str], ours: Json, *, whole: bool, splice: bool) -> tuple[Delivery, str]:
    """Return how the answer reaches the caller, and what a stream does that breaks after some text.

    An agent is harmed less by a preamble that comes twice than by a stream that ends, so `splice` is its default.
    """
    unseen = _one_of(_INTERRUPTED, "x-biollm-on-interrupt", headers.get("x-biollm-on-interrupt"))
    asked = _one_of(_INTERRUPTED, "biollm.on_interrupt", ours.get("on_interrupt"))
    if whole:
        return Delivery.WHOLE, "raise"
    # OpenAI's clients would append what follows a restart to what came before; ours sends RESTARTS and drops that.
    if unseen == "restart" or (asked == "restart" and headers.get(RESTARTS) != "taken"):
        return Delivery.BUFFERED, "restart"
    return Delivery.LIVE, unseen or asked or ("splice" if splice else "raise")


def _prompt(body: Json, *, chat: bool) -> Any:
    """Return the messages, or the text to continue."""
    prompt: Any = body.get("messages" if chat else "prompt", [])
    if chat and prompt and not all(isinstance(each, dict) and "role" in each for each in prompt):
        raise errors.UsageError("messages must be a list of objects with a role, at least one.")
    if not chat and isinstance(prompt, list):
        prompt = cast("list[Any]", prompt)[0] if len(cast("list[Any]", prompt)) == 1 else None
    if not (prompt if chat else isinstance(prompt, str)):
        hint = "Send at least one message to /v1/chat/completions, or one text as prompt to /v1/completions."
        raise errors.UsageError(f"There {'are no messages' if chat else 'is no single prompt'}.", hint=hint)
    if body.get("stream") and body.get("n", 1) != 1:
        raise errors.UsageError("A stream has one choice; n must be 1.")
    return prompt


def _schema(body: Json) -> Json | None:
    """Return the schema that the answer must follow, checked before anything is paid for."""
    wanted = body.get("response_format", {})
    if wanted.get("type") != "json_schema":
        return None
    spec: Any = wanted.get("json_schema")
    schema: Any = cast("Json", spec).get("schema") if isinstance(spec, dict) else None
    if not isinstance(schema, dict):
        raise errors.UsageError("response_format.json_schema.schema must be a JSON Schema.")
    ResponseSchema(cast("Json", schema)).check("response_format.json_schema.schema")
    if body.get("tools") or body.get("n", 1) != 1:  # the provider alone is asked to keep to it
        return None
    return {"title": cast("Json", spec).get("name", "answer"), **cast("Json", schema)}


def _extra(body: Json, schema: Json | None) -> Json:
    """Return what is passed on: OpenAI's own fields as arguments, the rest inside the body."""
    extra: Json = {name: value for name, value in body.items() if name in _PASSED}
    if schema is not None or body.get("response_format", {}).get("type") == "text":
        extra.pop("response_format", None)
    if rest := {name: value for name, value in body.items() if name not in _BODY}:
        extra["extra_body"] = rest
    return extra


def _choice(completion: Completion, choice: Json, chat: bool) -> Json:
    """Return one choice; of a parsed answer, the JSON without the text around it."""
    choice = {"index": 0, "logprobs": None, **choice, "finish_reason": _finish(choice)}
    if not chat:
        return choice
    message = {"content": None, **choice["message"]}
    if completion.parsed is not None:
        message["content"] = json.dumps(completion.parsed)
    return {**choice, "message": message}


def _finish(choice: Json) -> str:
    calls = part(choice, "message").get("tool_calls")
    return choice.get("finish_reason") or ("tool_calls" if calls else "stop")


def _usage(completion: Completion) -> Json:
    used, stated = completion.usage, part(completion.raw or {}, "usage")
    sent = {"cached_tokens": used.cached_tokens, "cache_write_tokens": used.cache_write_tokens}
    facts: Json = {
        **stated,
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {**part(stated, "prompt_tokens_details"), **sent},
        "completion_tokens_details": {
            **part(stated, "completion_tokens_details"),
            "reasoning_tokens": used.reasoning_tokens,
        },
    }
    return {**facts, "estimated": True} if used.estimated else facts


def _attempts(attempts: Iterable[Attempt]) -> Sequence[Json]:
    return [dict(vars(each)) for each in attempts]


def _ident(chat: bool) -> str:
    return f"{'chatcmpl' if chat else 'cmpl'}-{getrandbits(128):032x}"
