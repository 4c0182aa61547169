"""What a call takes, and the request that it makes: checked before anything is chosen or sent. Without pydantic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from biollm.client import attachments, remote
from biollm.config.paths import environment_tags, refuses_degraded, wanted_sender
from biollm.errors import UsageError, nearest
from biollm.routing.attachments import add_text, size, whole_text
from biollm.routing.deployments import LOWER, UPPER, Requirements
from biollm.routing.normalize import ANSWER_SIZES, PARAMETERS, Reader, Rule, at_least, checked, is_number, text, texts
from biollm.routing.request import Request
from biollm.routing.structured import ResponseSchema
from biollm.types import DATA_POLICIES, DataPolicy, seconds_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from biollm.client.attachments import Attachment
    from biollm.slurm.submissions import Job

Prompt = str | Sequence[Mapping[str, Any]]
# Tools and schemas have more than 3 bytes to a token; a chat template adds tokens of its own.
_BYTES_PER_TOKEN, _PER_MESSAGE, _TEMPLATE = 3, 16, 256
_PARAMETERS = ("temperature", "max_tokens", "tools", "tool_choice")


def _one_of(*choices: str) -> Rule:
    known = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
    return known, lambda given: given in choices


def _or_none(names: str, needs: str, fits: Callable[[Any], bool]) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), (needs, lambda given: given is None or fits(given)))


# What each option must be; `normalize` checks what is inside messages, tools and extra.
RULES: dict[str, Rule] = {
    **_or_none("temperature", *PARAMETERS["temperature"]),
    **_or_none("max_tokens", *PARAMETERS["max_tokens"]),
    **_or_none(
        "timeout deadline wait", "a finite number of seconds above 0", lambda given: is_number(given, math.ulp(0))
    ),
    **_or_none("patience", "a number of seconds, 0 or more", lambda given: is_number(given, 0)),
    **_or_none("system provider model capability", "a string", lambda given: isinstance(given, str)),
    **_or_none("tool_choice", "a string or a mapping", lambda given: isinstance(given, str | Mapping)),
    **_or_none("on_send on_state on_note cache_key", "a function", callable),
    **_or_none(
        "response_model",
        "a pydantic class or a JSON Schema (a mapping)",
        lambda given: isinstance(given, Mapping) or (isinstance(given, type) and hasattr(given, "model_json_schema")),
    ),
    **dict.fromkeys(
        ("fallback", "local_only", "allow_degraded", "start_local", "condense"),
        ("True or False", lambda given: isinstance(given, bool)),
    ),
    **dict.fromkeys(("tags", "extra"), ("a mapping", lambda given: isinstance(given, Mapping))),
    "attachments": (
        "a list of paths, texts, or inputs that were read",
        lambda given: isinstance(given, Sequence) and not isinstance(given, str | bytes),
    ),
    **_or_none("redact", "True, False or None", lambda given: isinstance(given, bool)),
    "redact_names": ("a list of strings", lambda given: isinstance(given, list | tuple)),
    "cache": (
        "True, False, or a time such as 7d",
        lambda given: isinstance(given, bool) or (isinstance(given, str) and seconds_of(given) is not None),
    ),
    "max_retries": at_least(0),
    "data_policy": _one_of(*DATA_POLICIES),
    "on_interrupt": _one_of("raise", "restart", "splice"),
    "sender": _one_of("litellm", "direct"),
}

RATINGS: dict[str, Rule] = {"rating": _one_of("up", "down")}


class _Common(TypedDict, total=False):
    """Options of `get_model_client` and of every call but `response_model`; see `Defaults`."""

    system: str | None
    temperature: float | None
    max_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    extra: Mapping[str, Any]
    timeout: float | None
    deadline: float | None
    fallback: bool
    max_retries: int
    local_only: bool
    data_policy: DataPolicy
    capability: str | None
    allow_degraded: bool
    tags: Mapping[str, str]
    on_interrupt: Literal["raise", "restart", "splice"]
    condense: bool
    redact: bool | None
    redact_names: Sequence[str]
    on_note: Callable[[str], None] | None
    on_send: Callable[[str], None] | None
    start_local: bool
    wait: float | None
    on_state: Callable[[Job], None] | None
    patience: float | None
    cache: bool | str
    cache_key: Callable[[str], str] | None
    sender: Literal["litellm", "direct"]


class Defaults(_Common, total=False):
    """Options of `get_model_client` and of every call; a call's own take precedence.

    Attributes:
        system: The system message.
        temperature, tools, tool_choice: As in OpenAI's API.
        max_tokens: Of the longest answer. A model with room for less is asked for less, though for at least 2,048.
        extra: Further arguments of OpenAI's API (`seed`, `stop`, `top_p`, ...).
        timeout: Seconds per attempt; for a stream to its first content, and between chunks.
        deadline: Seconds for the whole call.
        fallback: False tries only the first eligible deployment, and raises its own error.
        max_retries: Further passes over the waterfall after temporary failures; with `fallback=False`, repeats on the
            same deployment.
        local_only: True keeps the prompt on this machine and the cluster.
        data_policy: "no_training" leaves out providers that train on prompts, "local_only" is `local_only=True`; it
            tightens the configuration's policy and never loosens it.
        response_model: A pydantic class, or a JSON Schema; the answer is in `Completion.parsed`.
        capability: Only models that list it, such as "reasoning".
        allow_degraded: Whether the small embedded model may answer. By default it may if its provider or model is
            named; where `response_model` is given, only this call's own value counts. BIOLLM_NO_DEGRADED=1 forbids it.
        tags: Stored with the usage record, such as {"agent": "ErrorDiagnosisAgent"}.
        on_interrupt: What a stream does that breaks after some text: "raise"; "restart" on the next deployment, which takes
            the text back; "splice" the next one's answer on, after a marked line.
        condense: False sends attachments whole, or fails if they fit no deployment.
        redact: Whether keys, passwords, e-mail addresses, user names and home folders are replaced by placeholders before
            the request leaves, and put back into the answer. None does so for providers that train on prompts, where the
            request has no tools. Models on the cluster or this machine get the text as it is.
        redact_names: Further texts to replace, such as sample names; they turn `redact` on.
        on_note: Called with a sentence on what was done to the attachments, such as how many lines were condensed, and
            on a wait for an earlier deployment (`patience`).
        on_send: Called with a deployment's id just before a request is sent to it.
        start_local: Whether to start a server on the cluster when no deployment can answer; the embedded model is
            then tried only if that fails.
        wait: Seconds to wait for that server; None waits without limit.
        on_state: Called with its job (`biollm.slurm.submissions.Job`) whenever that changes.
        patience: Seconds to wait for an earlier deployment that is free again so soon, before a later one is tried;
            None takes the configuration's.
        cache: True takes a stored answer to the same request, if there is one, and stores a new one; "7d" takes none that is
            older. Of identical requests at one time, one is sent, and the others wait for its answer.
        cache_key: Returns a text without what may differ between requests that share an answer, such as `normalize_log`;
            it turns `cache` on.
        sender: "litellm" sends through LiteLLM's Router; "direct" sends OpenAI's JSON itself where the deployment takes
            that, without LiteLLM's import and overhead. The command line and the gateway use "direct". BIOLLM_SENDER
            overrides it.
    """

    response_model: type[BaseModel] | Mapping[str, Any] | None


class TypedOptions(_Common, total=False):
    """The options of a call with `response_model=` a class: `Options` without it."""

    provider: str | None
    model: str | None
    messages: Sequence[Mapping[str, Any]] | None
    attachments: Sequence[Attachment]


class Options(TypedOptions, Defaults, total=False):
    """What `complete`, `acomplete`, `stream`, `astream` and `complete_many` take beside the prompt.

    Attributes:
        provider, model: Only these deployments may answer; they replace the client's own. The model may be "provider/model".
        messages: OpenAI-shaped messages, instead of the prompt.
        attachments: What the question is about: files or Nextflow work folders (`Path`), texts, texts with a name
            ({"name": ..., "text": ...}). Each deployment gets what fits it: the end, the beginning, and the lines
            around errors. The question is never cut.
    """


def check(options: Options, known: Set[str] = Options.__optional_keys__) -> Options:
    """Return the options, numpy's scalars as Python's.

    Raises:
        UsageError: An option does not exist, or its value does not fit.
    """
    for name in options.keys() - known:
        hint = "" if name in remote.PARAMETERS else nearest(name, known)
        hint = hint or f"Pass a further argument of the API as extra={{{name!r}: ...}}."
        raise UsageError(f"There is no option {name!r}.", hint=hint)
    return cast("Options", {**options, **checked(options, RULES)})


def cache_of(options: Options) -> bool | str:
    """Return whether the cache is used, or for how old an answer at most."""
    return options.get("cache", options.get("cache_key") is not None)


def make_request(
    prompt: Prompt | None, defaults: Options, options: Options, policy: Callable[[Options], DataPolicy]
) -> Request:
    """Return the request of a call; `policy` returns the data policy of its options.

    Raises:
        UsageError: An option or a part of the prompt cannot be sent.
    """
    options = check(options)
    if (given := options.get("messages")) is not None:
        if prompt is not None:
            raise UsageError("A prompt and messages are given.", hint="Pass one of them.")
        prompt = given
    chosen: Options = {**defaults, **options}
    # Naming only a provider drops the client's own model too.
    named = options if options.get("provider") or options.get("model") else defaults
    read, digests = Reader(), tuple(attachments.read(chosen.get("attachments", ())))
    messages = read.messages(prompt, chosen.get("system"))
    if digests and not chosen.get("condense", True):
        read, messages, digests = Reader(), add_text(messages, whole_text(digests)), ()
        messages = read.messages(messages)
    params = read.params(chosen.get("extra", {}), "extra.")
    params |= read.params({key: value for key, value in chosen.items() if key in _PARAMETERS})
    wanted = chosen.get("response_model")
    if isinstance(wanted, Mapping):
        wanted = read.value(wanted, "response_model")
    requirements = Requirements(
        provider=named.get("provider"),
        model=named.get("model"),
        policy=policy(options),
        tools="tools" in params,
        capability=chosen.get("capability"),
        prompt=int(LOWER * read.tokens),
        prompt_most=int(UPPER * read.tokens) + read.rest // _BYTES_PER_TOKEN + _PER_MESSAGE * len(messages) + _TEMPLATE,
        attached=size(digests),
        answer=min((params[name] for name in ANSWER_SIZES & params.keys()), default=None),
        media=frozenset(read.media),
        allow_degraded=False
        if refuses_degraded()
        else options.get("allow_degraded", None if wanted else chosen.get("allow_degraded")),
    )
    return Request(
        messages=messages,
        params=params,
        requirements=requirements,
        timeout=chosen.get("timeout"),
        deadline=chosen.get("deadline"),
        fallback=chosen.get("fallback", True),
        max_retries=chosen.get("max_retries") or 0,
        schema=ResponseSchema(wanted) if wanted is not None else None,
        tags=texts({**environment_tags(), **chosen.get("tags", {})}),
        on_interrupt=chosen.get("on_interrupt", "raise"),
        attachments=digests,
        redact=True if chosen.get("redact") is None and chosen.get("redact_names") else chosen.get("redact"),
        redact_names=tuple(text(str(name)) for name in chosen.get("redact_names", ())),
        on_note=chosen.get("on_note"),
        on_send=chosen.get("on_send"),
        start=chosen.get("start_local", False),
        wait=chosen.get("wait"),
        on_state=chosen.get("on_state"),
        patience=chosen.get("patience"),
        cache=cache_of(chosen),
        cache_key=chosen.get("cache_key"),
        sender=wanted_sender() or chosen.get("sender", "litellm"),
    )
