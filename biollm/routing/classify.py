"""Recognises what kind of failure an exception of a sender, or an HTTP error, is. Pure.

LiteLLM's classes and status codes are not reliable: a refused connection is an InternalServerError 500, a 401 may be
a BadRequestError. So the chain of causes decides: an httpx.HTTPStatusError in it means that a server answered, else
the innermost class says what broke. The kind of an HTTP error is read from its status, then from the provider's own
fields (`error.code`, `type`, `status`, `reason`), then from anchored phrases; a digit in a message never counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from biollm.routing import litellm_private, reset_times
from biollm.routing.failures import CUT, Failure, Kind

# Class names in an exception's chain -> the kind, and what happened; the first match counts.
# Transport messages are never quoted: they can hold a proxy's password.
_UNREACHED = ("unreachable", "refused")  # kinds before anything is sent; a TLS error can also come after that
_TLS = "the TLS handshake failed"
_NETWORK: tuple[tuple[str, Kind, str], ...] = (
    ("JSONDecodeError", "broken", "the response is not valid JSON"),
    ("ResponseTooLongError", "broken", "the response is too long"),
    ("gaierror|DNSError", "unreachable", "the host name does not resolve"),
    ("CertificateError|CertVerificationError", "unreachable",
     "the TLS certificate is not trusted (a private CA? set SSL_CERT_FILE)"),
    ("SSLError|SSLZero", "unreachable", _TLS),
    ("ConnectTimeout|ConnectionTimeoutError", "unreachable", "no connection in time"),
    ("ConnectionRefusedError", "refused", "the connection was refused"),
    ("ServerDisconnectedError", "hung_up", "the server closed the connection without an answer"),
    ("PayloadError|ProtocolError", "broken", "the connection broke in the middle of the response"),
    ("ConnectionResetError|BrokenPipeError|ConnectionAbortedError", "reset", "the connection was reset"),
    ("ConnectError", "unreachable", "the host cannot be reached"),
)  # fmt: skip


def classify(error: BaseException, now: float, *, shortened: bool = False, translated: bool = True) -> Failure:
    """Return what `error`, raised by LiteLLM, means.

    Args:
        error: The exception.
        now: Epoch seconds, for times that are dates.
        shortened: Whether the caller set a lower timeout than is configured.
        translated: Whether LiteLLM had translated the request and handed it to its HTTP client.
    """
    chain = list(_chain(error))
    names = " ".join(type(link).__name__ for link in chain)
    if not translated and ("ImageFetchError" in names or not any(map(_of_network, chain))):
        return _unsent(names, str(error))
    answer = next((link for link in chain if type(link).__name__.endswith("HTTPStatusError")), None)
    if answer is not None:
        response: Any = getattr(answer, "response")  # noqa: B009 # httpx is not imported for its types
        return answered(names, response.status_code, response.headers, _text(response) or str(error), now)
    if "ProxyError" in names or "ProxyConnection" in names:
        status = next((link.status for link in chain if hasattr(link, "status")), None)  # type: ignore[attr-defined]
        return Failure("proxy", f"the proxy refused{f' (HTTP {status})' if status else ''}", reached=False)
    if litellm_private.STREAM_WAS_CUT in str(error):
        return CUT
    if litellm_private.NOT_JSON in str(error):
        names += " JSONDecodeError"
    for signs, kind, reason in _NETWORK:
        if re.search(signs, names):
            return Failure(kind, reason, reached=kind not in _UNREACHED or reason == _TLS)
    if "Timeout" in names:
        return Failure("timeout", "no answer in time", instead="" if shortened else None)
    if framed := _framed(chain, now):
        return framed
    if {"RequestError", "ReadError", "WriteError", "ClientError"} & set(names.split()):
        return Failure("broken", "the connection broke")
    said = _quote(str(error))
    return Failure(kind, said) if (kind := _by_class(names)) else Failure("broken", f"failed: {said}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_network(link: BaseException) -> bool:
    """Return whether an exception is about a connection, which a token exchange may need before the request."""
    home = type(link).__module__.partition(".")[0]
    return isinstance(link, OSError | TimeoutError) or home in ("httpx", "httpcore", "aiohttp", "openai", "ssl")


def _unsent(names: str, text: str) -> Failure:
    """Return what LiteLLM raised while it translated the request for the provider."""
    if "UnsupportedParamsError" in names or litellm_private.BAD_MESSAGE in text:
        return Failure("unsupported", f"not sent: {_quote(text)}", sent=False)
    if "ImageFetchError" in names:  # LiteLLM fetches it for some providers; others fetch it themselves
        return Failure("modality", f"not sent, an image cannot be fetched: {_quote(text)}", sent=False)
    return Failure("unsent", f"not sent: {_quote(text)}", sent=False)


def _by_class(names: str) -> Kind | None:
    """Return the kind that LiteLLM's own classes name, for want of anything better."""
    return "too_long" if "ContextWindowExceeded" in names else "refusal" if "ContentPolicyViolation" in names else None


def _framed(chain: Sequence[BaseException], now: float) -> Failure | None:
    """Return an error inside a response of status 200, or its stream, by what LiteLLM kept of it; None if too vague."""
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
        if found.kind in ("proxy", "overloaded", "blocked", "timeout", "malformed"):
            return None
        return replace(found, status=None, reason=f"failed: {found.reason.partition(': ')[2]}")
    return None


def _text(response: Any) -> str:
    try:
        return response.text
    except Exception:  # a stream that was not read (httpx.ResponseNotRead)
        return ""


def answered(names: str, status: int, headers: Mapping[str, str], text: str, now: float, body: Any = None) -> Failure:
    """Return what an HTTP error means.

    Args:
        names: LiteLLM's classes for it, used only if nothing else tells.
        status: The HTTP status.
        headers: Of the response.
        text: Its body, or LiteLLM's message that quotes it.
        now: Epoch seconds.
        body: Its JSON, if it is not in the text.
    """
    if status == 407:
        return Failure("proxy", "the proxy refused (HTTP 407)")
    text = text[:_MAX_JSON]
    html = "<html" in text.lower() and "{" not in text[: text.find("<")]
    if body is None and not html:
        body = reset_times.parse(text)
    fields = list(reset_times.walk(body))
    said = _message(text, fields)
    codes = frozenset(value.lower() for key, value in fields if key in _CODE_FIELDS and isinstance(value, str))
    wait, date = reset_times.stated(headers, fields, said, now), reset_times.date_in(said, now)
    kind = _kind(status, codes, said.lower(), html=html, frees=wait is not None and date is None)
    if kind == "malformed":
        kind = _by_class(names) or kind
    afford = _AFFORD.search(said) if kind == "affordable" else None
    per_model = kind == "limited" and "permodel" in "".join(codes)  # Gemini's quotaId
    return Failure(
        kind,
        f"HTTP {status}: {said[:_MAX_QUOTE]}",
        status,
        wait=date or wait if kind == "credit" else wait if kind in ("limited", "overloaded") else None,
        instead="deployment" if per_model else None,
        afford=int(afford[1].replace(",", "")) if afford else None,
    )


_MAX_JSON, _MAX_MESSAGE, _MAX_QUOTE = 65536, 4000, 200  # characters that are parsed, searched for phrases, and shown
_CODE_FIELDS = ("code", "type", "status", "reason", "quotaId")
_TEXT_FIELDS = ("message", "msg", "error", "detail")
_AFFORD = re.compile(r"can only afford (\d[\d,]{0,15})")
# The providers' own codes, in lower case. They count at any status below 500; the first kind that matches wins.
_CODES: dict[Kind, str] = {
    "credit": "insufficient_quota insufficient_credits insufficient_balance billing_hard_limit_reached "
              "billing_not_active billing_error payment_required usage_limit_reached credit_exhausted",
    "key": "invalid_api_key api_key_invalid api_key_expired invalid_authentication authentication_error "
           "account_deactivated unauthenticated token_expired api_key_service_blocked organization_restricted",
    "refusal": "content_policy_violation content_filter responsibleaipolicyviolation content_policy "
               "moderation_blocked prohibited_content data_inspection_failed",
    "too_long": "context_length_exceeded string_above_max_length model_max_prompt_tokens_exceeded request_too_large",
    "malformed": "invalid_image_format invalid_image invalid_image_url invalid_base64_image",
    "not_served": "model_not_found model_not_available deploymentnotfound model_decommissioned model_not_supported "
                  "unsupported_model invalid_model unsupported_country_region_territory model_terms_required",
    "unsupported": "unsupported_parameter unsupported_value unknown_parameter extra_forbidden "
                   "unsupported_api_for_model",
    "overloaded": "overloaded_error engine_overloaded capacity_exceeded slow_down",
}  # fmt: skip
# Phrases of messages without such a code, in lower case. A provider quotes the caller's words and names, so a phrase
# that cools something down, or ends the request, is anchored and searched in the provider's own words (`_own`) only.
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
_PHRASES: dict[Kind, re.Pattern[str]] = {
    "credit": re.compile(f"{_CREDIT.pattern}|{_DEPLETED.pattern}"), "key": _KEY, "refusal": _REFUSAL,
    "modality": _MODALITY, "not_served": _NOT_SERVED, "unsupported": _UNSUPPORTED, "too_long": _TOO_LONG,
}  # fmt: skip
_STATUS: dict[int, Kind] = {
    403: "forbidden", 404: "not_served", 408: "timeout", 409: "overloaded", 413: "too_long", 423: "overloaded",
    425: "overloaded", 451: "not_served", 498: "overloaded",
}  # fmt: skip
_ECHO = re.compile(r"""['"]input['"]\s*:|input_value=""")  # pydantic's repr of what the caller sent
# What is in quotes, except the names of content types, which are the API's. An apostrophe inside a word is no quote.
_QUOTED = re.compile(r"""(?<!\w)(['"`])(?!image_url|input_audio|video_url).*?(\1(?!\w)|$)""")


def _kind(status: int, codes: frozenset[str], said: str, *, html: bool, frees: bool) -> Kind:
    """Return the kind of an HTTP error.

    Args:
        status: The HTTP status.
        codes: The provider's own codes, in lower case.
        said: Its message, in lower case.
        html: Whether the body is a page.
        frees: Whether it gives a time to wait that is not a date.
    """
    if status >= 500:
        return "overloaded"
    if status < 400 or (html and status in (400, 403, 429)):  # a login page, a CDN's challenge
        return "blocked"
    said = _ECHO.split(said, maxsplit=1)[0]
    own = _own(said)
    named: list[Kind] = [kind for kind, known in _CODES.items() if codes & set(known.split())]
    if status == 429:
        # Gemini's message about a minute reads like an empty account; but it gives a time to wait.
        worded = _CREDIT.search(own) and not frees and "resource_exhausted" not in codes
        if "credit" in named or worded or _DEPLETED.search(own):
            return "credit"
        return "too_long" if "request too large" in own else "limited"
    if status == 402:
        return "affordable" if _AFFORD.search(said) else "credit"
    if status == 401:
        return "credit" if "credit" in named else "key"
    phrased: list[Kind] = [
        kind for kind, words in _PHRASES.items() if words.search(said if kind in ("unsupported", "too_long") else own)
    ]
    # OpenRouter says it with 404, others with a code of their own for any parameter or model.
    if "modality" in phrased and "refusal" not in phrased and {"unsupported", "not_served"}.issuperset(named):
        return "modality"
    if named:
        return named[0]
    if status in _STATUS and not (status in (403, 404) and phrased):
        return _STATUS[status]
    return phrased[0] if phrased else "malformed"


def _own(said: str) -> str:
    """Return the start of a message without what it quotes: those words are the caller's."""
    return _QUOTED.sub("", said[:1000])[:300]


def _message(text: str, fields: Iterable[tuple[str, Any]] = ()) -> str:
    """Return what the provider said on one line, without JSON or LiteLLM's prefixes."""
    found = [value for key, value in fields if key in _TEXT_FIELDS and isinstance(value, str)]
    if found:
        text = ". ".join(dict.fromkeys(found[:3]))
    elif quoted := re.search(r'"(?:message|msg)":\s*"((?:[^"\\]|\\.)*)"', text):
        text = quoted[1].replace('\\"', '"')
    else:
        text = re.sub(r"^(litellm\.)?(\w+(Error|Exception): )*(\w*[eE]xception - )?", "", text[:_MAX_MESSAGE])
        text = re.sub(r"<[^<>]*>", " ", text)
    text = re.sub(r"Bearer \S+|//[^/@\s]+@", "***", text[:_MAX_MESSAGE])
    return " ".join(text.split())


def _quote(text: str) -> str:
    return _message(text)[:_MAX_QUOTE]
