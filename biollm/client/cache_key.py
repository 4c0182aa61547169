"""The key of a stored answer: two requests that could have different answers have different keys. Pure.

LiteLLM's hashes a list of parameters that lacks some, and takes the model group for the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from biollm.config import Config
from biollm.errors import UsageError
from biollm.inputs.digest import Digest
from biollm.routing.request import Request
from biollm.types import Json

Change = Callable[[str], str]
VERSION = 1


def identity(config: Config) -> str:
    """Return what decides which models may answer: with others, a request that names none could have another answer."""
    listed = {"name", "type", "base_url", "models", "model_ids", "litellm_provider", "trains_on_prompts", "json_schema"}
    providers = [each.model_dump(include=listed, mode="json") for each in config.providers]
    models = [{**vars(each), "capabilities": sorted(each.capabilities or ())} for each in config.models.values()]
    return json.dumps([providers, models, config.routing.policy], sort_keys=True, default=str)


def key_of(request: Request, configuration: str, change: Change | None) -> str:
    """Return the digest of all that an answer may depend on, as the caller gave it: attachments before any cut.

    Left out are limits of time and effort, and tags but for a gateway's key: its holders share no answers.
    """
    needs = request.requirements

    def edit(text: str) -> str:
        if not isinstance(edited := change(text) if change else text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError("cache_key must return a string.")
        return edited

    parts = {
        "version": VERSION, "configuration": configuration, "similar": change is not None,
        "messages": [_edited(message, edit) for message in request.messages], "middle": request.middle,
        "attachments": [_attached(each, edit, exact=not change) for each in request.attachments], "params": request.params,
        "schema": request.schema and request.schema.json_schema,
        "provider": needs.provider, "model": needs.model, "capability": needs.capability, "policy": needs.policy,
        "fallback": request.fallback, "redact": request.redact,
        "redact_names": [edit(name) for name in request.redact_names], "gateway_key": request.tags.get("key"),
    }  # fmt: skip
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _edited(message: Json, edit: Change) -> Json:
    given = message.get("content") or ""
    if isinstance(given, str):
        return {**message, "content": edit(given)}
    return {**message, "content": [{**each, "text": edit(each["text"])} if "text" in each else each for each in given]}


def _attached(digest: Digest, edit: Change, *, exact: bool) -> list[Any]:
    """Return what any cut of an attachment is made of."""
    found = () if digest.complete else digest.found  # else all follows from its text
    texts = [digest.name, digest.head, digest.tail, *(text for each in found for text in each.texts)]
    return [*map(edit, texts), *([digest.lines, *(each.start for each in found)] if exact else [])]
