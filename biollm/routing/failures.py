"""The failure table: what each kind of failure means, and how a failure is recognised.

A failure's kind decides what is put on cooldown, for how long, and whether the next deployment is asked. A kind is
read from the HTTP status, then the provider's own fields (`error.code`, `type`, `status`, `reason`), then anchored
phrases; a digit in a message never counts. LiteLLM's classes and status codes are not to be trusted (a refused
connection is an InternalServerError 500, a 401 may be a BadRequestError); the chain of causes is: an
httpx.HTTPStatusError in it means that a server answered, else the innermost class says what broke. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from biollm.routing import litellm_private, reset_times

Rests = Literal["", "account", "key", "endpoint", "deployment"]
Kind = Literal[
    "credit", "affordable", "key", "forbidden", "limited", "too_long", "modality", "unsupported", "not_served",
    "refusal", "malformed", "used_up", "overloaded", "broken", "blocked", "hung_up", "reset", "timeout", "late",
    "empty", "schema", "refused", "unreachable", "proxy", "stranger", "unsent",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What one kind of failure leads to.

    Attributes:
        rests: What is put on cooldown; "" is nothing: only this request passes over the deployment.
        ladder: Seconds of the first, second, ... cooldown in a row where the provider names no time; a success
            starts it again.
        widens: What rests too once a second deployment of it fails alike meanwhile.
        next: Whether the next deployment is asked.
        fault: Whether the provider blames the request itself.
        passing: Whether a later try may succeed.
        again: Whether the same deployment is asked once more at once, where it is not known to fail.
    """

    rests: Rests = ""
    ladder: tuple[float, ...] = ()
    widens: Rests = ""
    next: bool = True
    fault: bool = False
    passing: bool = True
    again: bool = False


# Seconds. An outage that ends is noticed within 20 s in its first minute, and costs little when it lasts.
_OUTAGE = (15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_HOURS = (600.0, 3600.0, 6 * 3600.0, 24 * 3600.0)
RULES: dict[Kind, Rule] = {
    "credit": Rule("account", (3600.0, 4 * 3600.0, 24 * 3600.0), passing=False),
    "affordable": Rule(),  # asked once more with fewer tokens, see Waterfall
    "key": Rule("key", _HOURS, passing=False),
    "forbidden": Rule("deployment", _HOURS, passing=False),
    "limited": Rule("account", (60.0, 60.0, 120.0, 300.0, 600.0)),
    "too_long": Rule(passing=False),
    "modality": Rule(passing=False),
    "unsupported": Rule(passing=False),
    "not_served": Rule("deployment", _HOURS, passing=False),
    "refusal": Rule(passing=False),  # whether the next is asked is up to `on_refusal`
    "malformed": Rule(passing=False, fault=True),
    "used_up": Rule(next=False, passing=False, fault=True),
    "overloaded": Rule("deployment", _OUTAGE, widens="endpoint", again=True),
    "broken": Rule("deployment", _OUTAGE, widens="endpoint"),
    "blocked": Rule("endpoint", _OUTAGE),  # a CDN's page, not the provider's answer
    "hung_up": Rule("endpoint", (0.0, *_OUTAGE), again=True),  # a kept connection may have ended at that moment
    "reset": Rule("endpoint", _OUTAGE, again=True),
    "timeout": Rule("deployment", _OUTAGE, widens="endpoint"),
    "late": Rule("deployment", (0.0, 15.0, 30.0, 60.0)),
    "empty": Rule(),
    "schema": Rule(passing=False),
    "refused": Rule("endpoint", _OUTAGE),
    "unreachable": Rule("endpoint", (600.0, 1800.0, 3600.0)),
    "proxy": Rule("endpoint", _OUTAGE),
    "stranger": Rule("endpoint", _OUTAGE),
    "unsent": Rule(next=False, passing=False, fault=True),
}


@dataclass(frozen=True)
class Failure:
    """What an attempt's failure means.

    Attributes:
        kind: Its row in RULES.
        reason: One sentence; may quote the provider, so redact keys before showing it.
        status: The HTTP status, or None when no answer came.
        wait: Seconds that the provider says to wait; None where it says nothing.
        instead: What is put on cooldown where it is not what the rule says.
        afford: Tokens of answer that the account's credit still buys.
        sent: Whether the provider was sent anything.
    """

    kind: Kind
    reason: str
    status: int | None = None
    wait: float | None = None
    instead: Rests | None = None
    afford: int | None = None
    sent: bool = True

    @property
    def rule(self) -> Rule:
        """Return what this kind of failure leads to."""
        return RULES[self.kind]

    @property
    def rests(self) -> Rests:
        """Return what is put on cooldown."""
        return self.rule.rests if self.instead is None else self.instead


EMPTY = Failure("empty", "answered with empty content and no tool call")
NO_CHOICES = Failure("empty", "answered with no choices")
CUT = Failure("broken", "the stream ended before the provider said it was done")
BROKE_OFF = Failure("broken", "the provider ended the answer with an error")
FILTERED = Failure("refusal", "its content filter held the answer back")
CUT_SHORT = Failure("too_long", "its answer ended where it had no room for more, and others have more")
USED_UP = Failure("used_up", "max_tokens was used up before any text came")


def timed_out(seconds: float, *, shortened: bool, what: str = "answer", first: bool = False) -> Failure:
    """Return the verdict on an attempt that took longer than `seconds`.

    Args:
        seconds: What it was given.
        shortened: The caller gave it less than is configured, which says nothing of the provider.
        what: What did not come.
        first: It is a stream that had sent no content yet: late, which is not broken.
    """
    reason = f"no {what} within {seconds:g} s"
    return Failure("late" if first else "timeout", reason, instead="" if shortened else None)


def unreachable(seconds: float) -> Failure:
    """Return the verdict on a host to which no connection came about in `seconds`."""
    return Failure("unreachable", f"no connection within {seconds:g} s (a firewall?)")


def classify(error: BaseException, now: float, *, shortened: bool = False, handed: bool = True) -> Failure:
    """Return what `error`, raised by LiteLLM, means.

    Args:
        error: The exception.
        now: Epoch seconds, for times that are dates.
        shortened: Whether the caller set a timeout shorter than the configured one.
        handed: Whether LiteLLM had handed a request to its HTTP client.
    """
    chain = list(_chain(error))
    names = " ".join(type(link).__name__ for link in chain)
    if not handed and ("ImageFetchError" in names or not any(map(_of_network, chain))):
        return _unsent(names, str(error))
    answer = next((link for link in chain if type(link).__name__.endswith("HTTPStatusError")), None)
    if answer is not None:
        response: Any = getattr(answer, "response")  # noqa: B009 # httpx is not imported for its types
        return answered(names, response.status_code, response.headers, _text(response) or str(error), now)
    if "ProxyError" in names or "ProxyConnection" in names:
        status = next((link.status for link in chain if hasattr(link, "status")), None)  # type: ignore[attr-defined]
        return Failure("proxy", f"the proxy refused{f' (HTTP {status})' if status else ''}")
    if litellm_private.STREAM_WAS_CUT in str(error):
        return CUT
    if litellm_private.NOT_JSON in str(error):
        names += " JSONDecodeError"
    for signs, kind, reason in _NETWORK:
        if any(sign in names for sign in signs):
            return Failure(kind, reason)
    if "Timeout" in names:
        return Failure("timeout", "no answer in time", instead="" if shortened else None)
    if framed := _framed(chain, now):
        return framed
    if {"RequestError", "ReadError", "WriteError", "ClientError"} & set(names.split()):
        return Failure("broken", "the connection broke")
    if "ContextWindowExceeded" in names:
        return Failure("too_long", _clip(_message(str(error))))
    if "ContentPolicyViolation" in names:
        return Failure("refusal", _clip(_message(str(error))))
    return Failure("broken", f"failed: {_clip(_message(str(error)))}")


def _framed(chain: Sequence[BaseException], now: float) -> Failure | None:
    """Judge an error inside an answer of status 200, or in its stream, by what LiteLLM kept of it.

    None where it says no more than that the answer broke.
    """
    for link in reversed(chain):
        body: Any = getattr(link, "body", None)
        code: Any = getattr(link, "status_code", None)
        if isinstance(body, dict):
            code = getattr(link, "code", None)
        elif code is None or type(link).__module__ == "litellm.exceptions":  # LiteLLM's own status is a guess
            continue
        else:
            body = {"code": code, "message": getattr(link, "message", str(link))}
        status = int(code) if re.fullmatch(r"[45]\d\d", str(code)) else 400
        found = answered("", status, {}, str(link), now, body)
        if found.kind in _FRAMED:
            return replace(found, status=None, reason=f"failed: {found.reason.partition(': ')[2]}")
        return None
    return None


def _of_network(link: BaseException) -> bool:
    """Return whether an exception tells of a connection, which a token exchange may need before the request."""
    home = type(link).__module__.partition(".")[0]
    return isinstance(link, OSError | TimeoutError) or home in ("httpx", "httpcore", "aiohttp", "openai", "ssl")


def _unsent(names: str, text: str) -> Failure:
    """Judge what LiteLLM raised while it put the request into the provider's dialect."""
    if "UnsupportedParamsError" in names or litellm_private.BAD_MESSAGE in text:
        return Failure("unsupported", f"not sent: {_clip(_message(text))}", sent=False)
    if "ImageFetchError" in names:  # LiteLLM fetches it for some dialects; others leave it to the provider
        return Failure("modality", f"not sent, an image cannot be fetched: {_clip(_message(text))}", sent=False)
    return Failure("unsent", f"not sent: {_clip(_message(text))}", sent=False)


# Class names in an exception's chain -> the kind, and what happened; the first match counts.
# Transport texts are never quoted: they can hold a proxy's password.
_NETWORK: tuple[tuple[tuple[str, ...], Kind, str], ...] = (
    (("JSONDecodeError",), "broken", "answered with something that is not JSON"),
    (("gaierror", "DNSError"), "unreachable", "the host's name does not resolve"),
    (
        ("CertificateError", "CertVerificationError"),
        "unreachable",
        "its certificate is not trusted (a private CA? set SSL_CERT_FILE)",
    ),
    (("SSLError", "SSLZero"), "unreachable", "no TLS connection came about"),
    (("ConnectTimeout", "ConnectionTimeoutError"), "unreachable", "no connection came about in time"),
    (("ConnectionRefusedError",), "refused", "the connection was refused"),
    (("ServerDisconnectedError",), "hung_up", "the server hung up without an answer"),
    (("PayloadError", "ProtocolError"), "broken", "the connection broke in the middle of the answer"),
    (("ConnectionResetError", "BrokenPipeError", "ConnectionAbortedError"), "reset", "the connection was reset"),
    (("ConnectError",), "unreachable", "the host cannot be reached"),
)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _text(response: Any) -> str:
    """Return an answer's body, or "" where it cannot be read any more."""
    try:
        return response.text
    except Exception:  # a stream that was not read (httpx.ResponseNotRead)
        return ""


def answered(names: str, status: int, headers: Mapping[str, str], text: str, now: float, body: Any = None) -> Failure:
    """Judge an HTTP error.

    Args:
        names: LiteLLM's classes for it, used only where nothing else tells.
        status: The HTTP status.
        headers: Of the answer.
        text: Its body, or LiteLLM's words that quote it.
        now: Epoch seconds.
        body: Its JSON, where the text does not hold it.
    """
    text = text[:_JSON]
    html = "<html" in text.lower() and "{" not in text[: text.find("<")]
    if body is None and not html:
        body = reset_times.parse(text)
    said = _message(text, body)
    fields = list(reset_times.walk(body))
    codes = frozenset(value.lower() for key, value in fields if key in _CODE_FIELDS and isinstance(value, str))
    wait, date = reset_times.stated(headers, body, said, now), reset_times.date_in(said, now)
    reason = f"HTTP {status}: {_clip(said)}"
    kind = _kind(status, codes, said.lower(), html=html, frees=wait is not None and date is None)
    if kind == "malformed" and "ContextWindowExceeded" in names:
        kind = "too_long"
    if kind == "malformed" and "ContentPolicyViolation" in names:
        kind = "refusal"
    if kind == "proxy":
        return Failure(kind, "the proxy refused (HTTP 407)")
    if kind == "credit":
        return Failure(kind, reason, status, wait=date or wait)
    if kind == "affordable":
        found = _AFFORD.search(said)
        return Failure(kind, reason, status, afford=int(found[1].replace(",", "")) if found else None)
    if kind == "limited":
        model = "permodel" in "".join(codes)  # Gemini's quotaId names whose limit it is
        return Failure(kind, reason, status, wait=wait, instead="deployment" if model else None)
    if kind in ("overloaded", "broken"):
        return Failure(kind, reason, status, wait=wait)
    return Failure(kind, reason, status)


_JSON, _WORDS = 65536, 4000  # characters of an answer that are parsed, and searched for phrases
_CODE_FIELDS = ("code", "type", "status", "reason", "quotaId")
_TEXT_FIELDS = ("message", "msg", "error", "detail")
_AFFORD = re.compile(r"can only afford (\d[\d,]{0,15})")
# The provider's own codes, in lower case -> kind. They count whatever the status, below 500.
_CODES: dict[str, Kind] = {
    **dict.fromkeys(
        ("insufficient_quota", "insufficient_credits", "insufficient_balance", "billing_hard_limit_reached",
         "billing_not_active", "billing_error", "payment_required", "usage_limit_reached", "credit_exhausted"),
        "credit",
    ),
    **dict.fromkeys(
        ("invalid_api_key", "api_key_invalid", "api_key_expired", "invalid_authentication", "authentication_error",
         "account_deactivated", "unauthenticated", "token_expired", "api_key_service_blocked",
         "organization_restricted"), "key",
    ),
    **dict.fromkeys(
        ("context_length_exceeded", "string_above_max_length", "model_max_prompt_tokens_exceeded", "request_too_large"),
        "too_long",
    ),
    **dict.fromkeys(
        ("content_policy_violation", "content_filter", "responsibleaipolicyviolation", "content_policy",
         "moderation_blocked", "prohibited_content", "data_inspection_failed"), "refusal",
    ),
    **dict.fromkeys(
        ("model_not_found", "model_not_available", "deploymentnotfound", "model_decommissioned", "model_not_supported",
         "unsupported_model", "invalid_model", "unsupported_country_region_territory", "model_terms_required"), "not_served",
    ),
    **dict.fromkeys(
        ("unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden",
         "unsupported_api_for_model"), "unsupported",
    ),
    **dict.fromkeys(("overloaded_error", "engine_overloaded", "capacity_exceeded", "slow_down"), "overloaded"),
    **dict.fromkeys(("invalid_image_format", "invalid_image", "invalid_image_url", "invalid_base64_image"), "malformed"),
}  # fmt: skip
# Phrases of messages without such a code, in lower case; tried in the order of _SAYS. A provider quotes the caller's
# words and names, so a phrase that rests something, or ends the request, is anchored and searched in _own words only.
_CREDIT = re.compile(
    r"insufficient (credits?|funds|balance|quota)|out of credits?\b|credit balance is too low|no credits? (left|remain)"
    r"|usage limits?\b.{0,40}\b(reached|exceeded)|(reached|exceeded) your .{0,40}\busage limits?|billing (hard )?limit"
    r"|exceeded your current quota|check your plan and billing|payment (is )?required"
)
_DEPLETED = re.compile(r"credits? (is|are|have been) (depleted|exhausted|used up)")
_KEY = re.compile(
    r"api[ _-]?key (is )?(not valid|invalid|expired|revoked)|(invalid|incorrect|expired|missing) api[ _-]?key"
    r"|api[ _-]?key was reported as leaked|security token\b.{0,40}\b(is expired|is invalid)"
    r"|\b(organization|account) has been (disabled|restricted|suspended|deactivated)"
)
_REFUSAL = re.compile(
    r"\b(flagged|rejected|filtered|blocked|refused|not allowed|violat\w+)\b[^.]{0,60}"
    r"\b(safety|content|usage|moderation) ((management|filtering) )?(system|filter|polic|guideline)"
    r"|content (management|filtering) policy|requires moderation\b"
    r"|\b(input|prompt|request|message|content) (was|has been) flagged|^content exists risk"  # the last: DeepSeek
)
_MODALITY = re.compile(
    r"not (a )?multimodal|at most 0 (image|audio|video)|no endpoints found that support (input )?(image|audio|video|file|pdf)"
    r"|\b(model|endpoint)\b.{0,80}\b(not|n't|cannot) (support|accept)(ed|s)?\b.{0,20}\b(image|multimodal|vision|audio|video|pdf)"
    r"|\b(image|audio|video)\w*( \w+){0,2} (is|are) (not (supported|enabled)|only supported) (by|for|in|with)\b"
    r".{0,20}\b(model|endpoint)|^(image|audio|video) inputs? (is|are) not supported|(unknown variant|unsupported content type) \W?"
    r"(image_url|input_audio|video_url)"
)
_NOT_SERVED = re.compile(
    r"(location|country|region|territory)\b.{0,20}\bnot (supported|available)|not available in your"
    # The model's name may stand between, and nothing else: a tool may be "not found" too.
    r"|\bmodels?( id| name)?\b[ :/]+(\S{1,100} +)?((is |was |does )?(not (found|available|exist)|no longer available)"
    r"|(is|was|has been) (decommissioned|deprecated|retired|shut down|no longer supported))|\binvalid model( id| name)?(:|$)"
    r"|not a valid model (id|name)|model identifier is invalid|on-demand throughput isn|unknown model(:|$)"
    r"|no endpoints found for"
)
_UNSUPPORTED = re.compile(
    r"unexpected message role|(invalid|unknown|unsupported) (message )?role|roles must alternate|extra inputs are not"
    r"|unsupported (parameter|value|argument|field)|(unknown|unrecognized|unexpected) (parameter|argument|request argument"
    r"|field|name)|role not supported|not (supported|enabled) (with|by|for|in)\b|(not|n't|no endpoints found that)"
    r" support\b.{0,40}\b(tool|function|parameter|response_format|json|schema|prefill|system|stream|logprobs|reasoning"
    r"|chat completions)|requires --|must end with a user message|last message must|expected last role"
    r"|invalid schema for response_format|cannot both be specified"
)
_TOO_LONG = re.compile(
    r"(maximum|exceed\w*)\b.{0,40}\bcontext (length|window|size|limit)|context (length|window|size) (is |was )?exceeded"
    r"|(prompt|input) is too long|too many (input |prompt )?tokens|reduce the length|request too large"
    r"|token count.{0,40}exceeds|maximum (input|prompt) (length|tokens)|longer than the maximum model length"
    r"|max_(new_)?tokens\W{1,3}(must be <=|is too large)|maximum allowed number of output tokens"
)
_SAYS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (_CREDIT, "credit"), (_DEPLETED, "credit"), (_KEY, "key"), (_REFUSAL, "refusal"), (_MODALITY, "modality"),
    (_NOT_SERVED, "not_served"), (_UNSUPPORTED, "unsupported"), (_TOO_LONG, "too_long"),
)  # fmt: skip
_FIRST: tuple[Kind, ...] = (
    "credit", "key", "refusal", "too_long", "malformed", "not_served", "unsupported", "overloaded",
)  # fmt: skip
_FRAMED: tuple[Kind, ...] = (
    "credit", "affordable", "key", "forbidden", "limited", "too_long", "modality", "unsupported", "not_served", "refusal",
)  # fmt: skip
_STATUS: dict[int, Kind] = {
    401: "key", 402: "credit", 403: "forbidden", 404: "not_served", 407: "proxy", 408: "timeout", 409: "overloaded",
    413: "too_long", 423: "overloaded", 425: "overloaded", 429: "limited", 451: "not_served", 498: "overloaded",
}  # fmt: skip


def _kind(status: int, codes: frozenset[str], said: str, *, html: bool, frees: bool) -> Kind:
    """Return the kind of an HTTP error; see the module's docstring for what counts.

    Args:
        status: The HTTP status.
        codes: The provider's own codes, in lower case.
        said: Its message, in lower case.
        html: Whether the body is a page.
        frees: Whether it names a time, but no date, after which to come again.
    """
    if status == 407:
        return "proxy"
    if status >= 500:
        return "overloaded"
    if status < 400 or (html and status in (400, 403, 429)):  # a login page, a CDN's challenge
        return "blocked"
    said = _ECHO.split(said, maxsplit=1)[0]
    own = _own(said)
    named: set[Kind] = {_CODES[code] for code in codes if code in _CODES}
    if status == 429:
        # Gemini words its minute like an empty account; what names a time frees by itself.
        worded = _CREDIT.search(own) and not frees and "resource_exhausted" not in codes
        if "credit" in named or worded or _DEPLETED.search(own):
            return "credit"
        return "too_long" if "request too large" in own else "limited"
    if status == 402:
        return "affordable" if _AFFORD.search(said) else "credit"
    if status == 401:
        return "credit" if "credit" in named else "key"
    phrased: list[Kind] = [
        kind for phrase, kind in _SAYS if phrase.search(said if kind in ("unsupported", "too_long") else own)
    ]
    # OpenRouter says it with 404, others with a code of their own for any parameter or model.
    if "modality" in phrased and "refusal" not in phrased and named <= {"unsupported", "not_served"}:
        return "modality"
    if named:
        return next(kind for kind in _FIRST if kind in named)
    usual = _STATUS.get(status)
    if usual and not (status in (403, 404) and phrased):
        return usual
    return phrased[0] if phrased else "malformed"


_ECHO = re.compile(r"""['"]input['"]\s*:|input_value=""")  # pydantic's repr of what the caller sent
# What stands in quotes; but the names of content types are the API's. An apostrophe inside a word is no quote.
_QUOTED = re.compile(r"""(?<!\w)(['"`])(?!image_url|input_audio|video_url).*?(\1(?!\w)|$)""")


def _own(said: str) -> str:
    """Return the start of a message without what is quoted in it: those words are the caller's."""
    return _QUOTED.sub("", said[:1000])[:300]


def _message(text: str, body: Any = None) -> str:
    """Return what the provider said on one line, without JSON or LiteLLM's prefixes."""
    told = [value for key, value in reset_times.walk(body) if key in _TEXT_FIELDS and isinstance(value, str)]
    if told:
        text = ". ".join(dict.fromkeys(told[:3]))
    elif quoted := re.search(r'"(?:message|msg)":\s*"((?:[^"\\]|\\.)*)"', text):
        text = quoted[1].replace('\\"', '"')
    else:
        text = re.sub(r"^(litellm\.)?(\w+(Error|Exception): )*(\w*[eE]xception - )?", "", text[:_WORDS])
        text = re.sub(r"<[^<>]*>", " ", text)
    text = re.sub(r"Bearer \S+|//[^/@\s]+@", "***", text[:_WORDS])
    return " ".join(text.split())


def _clip(text: str) -> str:
    return text[:200]
