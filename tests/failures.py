"""What real providers say when they refuse, shortened, and what each answer must lead to.

The bodies and headers were collected from public reports of users. Times are relative to `NOW`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from behaviours import Behaviour

NOW = datetime(2026, 11, 23, 20, 0, tzinfo=UTC).timestamp()  # noon in Los Angeles
DAY = 86400.0


@dataclass(frozen=True)
class Case:
    """One answer.

    Attributes:
        number: Its place in the collection; a letter is a variant of our own.
        kind: The row of the failure table.
        rests: What is put on cooldown.
        wait: Seconds that the provider names, seen at NOW; None where it names none.
        next: Whether the next deployment is asked.
    """

    number: str
    status: int
    body: Any
    kind: str
    rests: str = ""
    wait: float | None = None
    next: bool = True
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def behaviour(self) -> Behaviour:
        """Return the answer for the loopback provider."""
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        kind = "text/html" if text.startswith("<") else "application/json"
        return Behaviour(self.status, self.headers, body=text, content_type=kind)


def openai(message: str, code: Any = None, type_: str = "invalid_request_error", **more: Any) -> Any:
    """Return an error as OpenAI writes it."""
    return {"error": {"message": message, "type": type_, "code": code, **more}}


def gemini(status: int, message: str, name: str, *details: Any) -> Any:
    """Return an error as Google writes it."""
    return {"error": {"code": status, "message": message, "status": name, "details": list(details)}}


def anthropic(type_: str, message: str) -> Any:
    """Return an error as Anthropic writes it."""
    return {"type": "error", "error": {"type": type_, "message": message}}


def quota(period: str) -> Any:
    """Return Google's name of a limit."""
    ident = f"GenerateRequestsPer{period}PerProjectPerModel-FreeTier"
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": ident}]}


def retry(delay: str) -> Any:
    """Return Google's delay."""
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


OPENROUTER_RESET = {
    "headers": {
        "X-RateLimit-Limit": "50",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": str(int((NOW + 7200) * 1000)),
    }
}
QUOTA = "You exceeded your current quota, please check your plan and billing details."
LIMITED = openai("Rate limit reached.", "rate_limit_exceeded", "requests")
CASES = [
    Case("1", 402, openai("Insufficient credits. Add more using https://openrouter.ai/settings/credits", 402), "credit", "account"),
    Case("2", 400, anthropic("invalid_request_error", "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."),
         "credit", "account", wait=7 * DAY + 4 * 3600),
    Case("3", 429, openai(QUOTA, "insufficient_quota", "insufficient_quota"), "credit", "account"),
    Case("3b", 400, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API."), "credit", "account"),
    Case("4", 413, openai("Request too large for model `x` on tokens per minute (TPM): Limit 8000, Requested 34026, please reduce your message size and try again.", "rate_limit_exceeded", "tokens"),
         "too_long"),
    Case("5", 429, openai("Rate limit reached for model `x` on tokens per day (TPD): Limit 100000, Used 99800, Requested 900. Please try again in 7m12.5s.", "rate_limit_exceeded", "tokens"),
         "limited", "account", wait=432.5),
    Case("6", 429, LIMITED, "limited", "account", wait=1.5, headers=(("retry-after-ms", "1500"),)),
    Case("7", 429, LIMITED, "limited", "account", wait=360,
         headers=(("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "6m0s"))),
    Case("7b", 429, LIMITED, "limited", "account",
         headers=(("x-ratelimit-remaining-requests", "3"), ("x-ratelimit-reset-requests", "6m0s"))),
    Case("8", 429, openai("Rate limit exceeded: free-models-per-day", 429, metadata=OPENROUTER_RESET), "limited", "account", wait=7200),
    Case("9", 429, gemini(429, f"{QUOTA} Please retry in 38.9s.", "RESOURCE_EXHAUSTED", quota("Minute"), retry("38.9s")),
         "limited", "deployment", wait=38.9),
    Case("10", 429, gemini(429, f"{QUOTA} Please retry in 36s.", "RESOURCE_EXHAUSTED", quota("Day"), retry("36s")),
         "limited", "deployment", wait=12 * 3600),
    Case("11", 429, gemini(429, f"{QUOTA} Please retry in 41.8s.", "RESOURCE_EXHAUSTED"), "limited", "account", wait=41.8),
    Case("12", 400, gemini(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT", {"reason": "API_KEY_INVALID"}), "key", "key"),
    Case("13", 400, gemini(400, "User location is not supported for the API use.", "FAILED_PRECONDITION"), "not_served", "deployment"),
    Case("14", 403, openai("Project `p` does not have access to model `m`", "model_not_found"), "not_served", "deployment"),
    Case("14b", 403, "<!DOCTYPE html><html><title>Just a moment...</title></html>", "blocked", "endpoint"),
    Case("14c", 403, openai("This account may not use this model.", "forbidden"), "forbidden", "deployment"),
    Case("15", 404, openai("No endpoints found that support image input", 404), "modality"),
    Case("16", 400, openai("The model is not multimodal. Please remove image inputs."), "modality"),
    Case("16b", 400, openai("At most 0 image(s) may be provided in one prompt."), "modality"),
    Case("17", 404, openai("The model `m` does not exist", "model_not_found"), "not_served", "deployment"),
    Case("18", 400, openai("Unexpected message role.", 400), "unsupported"),
    Case("19", 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "parallel_tool_calls"], "msg": "Extra inputs are not permitted"}]}, "unsupported"),
    Case("20", 400, openai("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "unsupported_parameter"), "unsupported"),
    Case("20b", 404, openai("No endpoints found that support tool use.", 404), "unsupported"),
    Case("20c", 400, openai('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', 400), "unsupported"),
    Case("20d", 400, openai("Conversation roles must alternate user/assistant/user/assistant/...", 400), "unsupported"),
    Case("21", 400, openai("This model's maximum context length is 8192 tokens. However, you requested 8192 output tokens and your prompt contains at least 12 input tokens", 400), "too_long"),
    Case("22", 400, openai("Too long.", "context_length_exceeded"), "too_long"),
    Case("23", 400, openai("Your request was rejected as a result of our safety system.", "content_policy_violation"), "refusal", next=False),
    Case("23b", 400, openai("The response was filtered.", "content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}), "refusal", next=False),
    Case("26", 529, anthropic("overloaded_error", "Overloaded"), "overloaded", "deployment"),
    Case("27", 498, openai("Flex tier capacity exceeded.", "capacity_exceeded"), "overloaded", "deployment"),
    Case("27b", 409, openai("Conflict."), "overloaded", "deployment"),
    Case("27c", 425, openai("Too early."), "overloaded", "deployment"),
    Case("27d", 451, openai("Unavailable for legal reasons."), "not_served", "deployment"),
    Case("29", 429, anthropic("rate_limit_error", "This request would exceed your rate limit."), "limited", "account", wait=7200,
         headers=(("anthropic-ratelimit-requests-remaining", "0"), ("anthropic-ratelimit-requests-reset", "2026-11-23T22:00:00Z"))),
    Case("30", 429, LIMITED, "limited", "account", wait=1.2,
         headers=(("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "1.2s"))),
    Case("31a", 429, LIMITED, "limited", "account", wait=1, headers=(("Retry-After", "0"),)),
    Case("31b", 429, LIMITED, "limited", "account", wait=1, headers=(("Retry-After", "-5"),)),
    Case("31c", 429, LIMITED, "limited", "account", wait=31 * DAY, headers=(("Retry-After", "1e9"),)),
    Case("31d", 429, LIMITED, "limited", "account", wait=1, headers=(("Retry-After", "Mon, 23 Nov 2026 19:00:00 GMT"),)),
    Case("31e", 429, LIMITED, "limited", "account", headers=(("Retry-After", "soon"),)),
    Case("31f", 429, LIMITED, "limited", "account", headers=(("Retry-After", "nan"),)),
    Case("32", 402, openai("This request requires more credits, or fewer max_tokens. You requested up to 32000 tokens, but can only afford 1234.", 402), "affordable"),
    Case("33", 400, openai("Invalid value for 'temperature': 402 is above 2.", "invalid_value"), "malformed"),
    Case("34", 503, openai("Overloaded."), "overloaded", "deployment", wait=4, headers=(("Retry-After", "4"),)),
    Case("35", 408, openai("Request timed out."), "timeout", "deployment"),
]  # fmt: skip


# The same kinds in other words, and what only looks like one of them: the caller's own words, quoted or echoed.
TPM = "Request too large for gpt-5 in organization org-x on tokens per min (TPM): Limit 30000, Requested 45000."
RAW = json.dumps(
    {"error": {"message": "This model's maximum context length is 8192 tokens", "code": "context_length_exceeded"}}
)
ECHO = [
    {
        "type": "missing",
        "loc": ["body", "messages"],
        "msg": "Field required",
        "input": {"metadata": {"status": "insufficient_quota"}},
    }
]
MODEL = "models/gemma-3-27b-it"
WORDINGS = [
    # Of a content policy, or of something by that name
    Case("moderation", 400, openai("Your input image may contain content that is not allowed by our safety system.", "moderation_blocked"), "refusal"),
    Case("moderation-words", 400, openai("Your input image may contain content that is not allowed by our safety system."), "refusal"),
    Case("flagged", 400, openai("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", "invalid_prompt"), "refusal"),
    Case("output-blocked", 400, anthropic("invalid_request_error", "Output blocked by content filtering policy"), "refusal"),
    Case("azure", 400, openai("The response was filtered due to the prompt triggering Azure OpenAI's content management policy."), "refusal"),
    Case("openrouter", 403, openai('openai/gpt-4o requires moderation on OpenAI. Your input was flagged for "harassment".', 403), "refusal"),
    Case("deepseek", 400, openai("Content Exists Risk"), "refusal"),
    Case("tool-name", 400, openai("Tool 'moderation_check' in tool_choice was not found in the tools"), "malformed"),
    Case("call-id", 400, openai("The following tool_call_ids did not have response messages: call_moderation_1"), "malformed"),
    Case("parameter-name", 400, openai("Invalid parameter 'content_filter': must be a boolean", "invalid_value"), "malformed"),
    Case("key-name", 400, {"message": "Malformed input request: #/messages/0: extraneous key [moderation] is not permitted"}, "malformed"),
    Case("model-name", 400, {"message": "[{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required', 'input': {'model': 'content-filter-7b'}}]"}, "malformed"),
    Case("content-field", 400, openai("Request rejected: messages[0].content must be a string"), "malformed"),
    Case("see-policies-403", 403, openai("Access to model gpt-5 denied. See our usage policies for details."), "forbidden", "deployment"),
    Case("see-policies-404", 404, openai("Not found. See our usage policies."), "not_served", "deployment"),
    # Of the account and the key
    Case("echoed-repr", 400, {"message": "[{'type': 'string_type', 'loc': ('body', 'x'), 'msg': 'Input should be a valid string', 'input': ['my credit balance is too low']}]"}, "malformed"),
    Case("echoed-json", 422, {"detail": ECHO}, "malformed"),
    Case("quoted", 400, openai("Invalid 'messages[0].name': 'usage limits exceeded'. Expected pattern ^[^\\s]+$", "invalid_value"), "malformed"),
    Case("far-behind", 400, openai("Bad text: " + "word " * 80 + "my credit balance is too low"), "malformed"),
    Case("depleted", 429, gemini(429, "Your prepayment credits are depleted. Please go to AI Studio.", "RESOURCE_EXHAUSTED"), "credit", "account"),
    Case("leaked", 403, gemini(403, "Your API key was reported as leaked. Please use another API key.", "PERMISSION_DENIED"), "key", "key"),
    Case("aws-token", 403, {"message": "The security token included in the request is expired"}, "key", "key"),
    Case("disabled", 400, anthropic("invalid_request_error", "This organization has been disabled."), "key", "key"),
    # Of the model
    Case("tool-not-found", 400, openai("tool_choice 'get_model' not found"), "malformed"),
    Case("model-info", 400, openai("tool_choice: model_info function 'get_model' not found in tools"), "malformed"),
    Case("no-longer", 400, openai("This model no longer takes the deprecated parameter functions."), "malformed"),
    Case("retired", 400, openai("The model `llama3-70b-8192` has been decommissioned and is no longer supported."), "not_served", "deployment"),
    Case("invalid-model", 400, {"message": "Invalid model: mistral-foo", "type": "invalid_model", "code": "1500"}, "not_served", "deployment"),
    Case("model-parameter", 400, openai("Unknown model parameter: foo"), "malformed"),
    Case("invalid-id", 400, openai("foo/bar is not a valid model ID", 400), "not_served", "deployment"),
    Case("model-not-exist", 400, openai("Model Not Exist"), "not_served", "deployment"),
    Case("bedrock-id", 400, {"message": "The provided model identifier is invalid."}, "not_served", "deployment"),
    Case("dotted-name", 400, openai("The model gpt-5.9 does not exist."), "not_served", "deployment"),
    # Of images and other media
    Case("bad-image", 400, anthropic("invalid_request_error", "messages.3.content: Could not process image"), "malformed"),
    Case("image-format", 400, openai("You uploaded an unsupported image. Please use one of: ['png', 'jpeg'].", "invalid_image_format"), "malformed"),
    Case("image-tool", 400, openai("Duplicate function name 'image_resize'; only unique names are supported"), "malformed"),
    Case("variant", 400, openai("Failed to deserialize: messages[1]: unknown variant `image_url`, expected `text` at line 1"), "modality"),
    Case("content-type", 400, "bad request: unsupported content type image_url", "modality"),
    Case("no-image-url", 400, openai("Model gpt-35-turbo does not support image_url content."), "modality"),
    Case("not-enabled", 400, gemini(400, f"Image input modality is not enabled for {MODEL}", "INVALID_ARGUMENT"), "modality"),
    Case("input-audio", 404, openai("No endpoints found that support input audio", 404), "modality"),
    Case("mmproj", 400, openai("image input is not supported - hint: you may need to provide the mmproj"), "modality"),
    Case("multimodal", 400, openai("This model does not support multimodal inputs"), "modality"),
    # Of roles and parameters
    Case("system", 400, openai("System role not supported", 400), "unsupported"),
    Case("last-role", 400, {"message": "Expected last role User or Tool for serving but got assistant", "code": "3230"}, "unsupported"),
    Case("no-chat", 400, openai("The model `whisper-large-v3` does not support chat completions"), "unsupported"),
    Case("for-model", 400, openai("Function tools with reasoning_effort are not supported for gpt-5.5."), "unsupported"),
    Case("no-functions", 400, gemini(400, f"Function calling is not enabled for {MODEL}", "INVALID_ARGUMENT"), "unsupported"),
    Case("both", 400, anthropic("invalid_request_error", "`temperature` and `top_p` cannot both be specified for this model."), "unsupported"),
    # Of the length
    Case("tpm", 429, openai(TPM, "rate_limit_exceeded", "tokens"), "too_long"),
    Case("tgi", 422, openai("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193."), "too_long"),
    Case("decoder", 400, openai("The decoder prompt (length 9000) is longer than the maximum model length of 8192."), "too_long"),
    Case("max-tokens", 400, openai("max_tokens is too large: 100000. This model supports at most 16384 completion tokens.", "invalid_value"), "too_long"),
    Case("llama.cpp", 400, openai("the request exceeds the available context size, try increasing it"), "too_long"),
    Case("context-limit", 400, anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000"), "too_long"),
    Case("raw", 400, openai("Provider returned error", 400, metadata={"raw": RAW}), "too_long"),
    Case("beta-header", 400, openai("The requested context window beta header is not known"), "malformed"),
    Case("num-ctx", 400, openai("Requested context size parameter `num_ctx` must be a positive integer"), "malformed"),
    # Pages instead of answers
    Case("login-page", 400, "<html><h1>Sign in</h1><script>f = () => {}</script></html>", "blocked", "endpoint"),
    Case("redirect", 302, "<html>Moved</html>", "blocked", "endpoint"),
    # How long to wait
    Case("until-date", 429, anthropic("rate_limit_error", "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."),
         "credit", "account", wait=7 * DAY + 4 * 3600, headers=(("retry-after", "5"),)),
    Case("codex", 429, openai("The usage limit has been reached", None, "usage_limit_reached", resets_in_seconds=1234), "credit", "account", wait=1234),
    Case("please-wait", 429, openai("Please wait 20 seconds and try again."), "limited", "account", wait=20),
    Case("try-again-at", 429, openai("Limit reached. Try again at 2026-11-24T00:00:00+02:00."), "limited", "account", wait=2 * 3600),
    Case("months", 429, openai("Try again in 3 months"), "limited", "account"),
    Case("ietf", 429, LIMITED, "limited", "account", wait=30, headers=(("RateLimit", '"burst";r=7;t=90, "default";r=0;t=30'),)),
    Case("ietf-old", 429, LIMITED, "limited", "account", wait=30, headers=(("RateLimit", "limit=100, remaining=0, reset=30"),)),
    Case("zero", 429, LIMITED, "limited", "account", wait=8,
         headers=(("retry-after", "0"), ("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "8s"))),
]  # fmt: skip
