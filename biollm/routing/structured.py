"""Requests an answer that matches a JSON Schema, and reads it back.

LiteLLM passes `response_format` on to providers that take one and can check the answer
(`enable_json_schema_validation`). It does not put the schema into the prompt for the others, nor ask again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from biollm.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

Message = dict[str, Any]


@dataclass(frozen=True)
class ResponseSchema:
    """What an answer must match: a pydantic class, or a JSON Schema as a mapping."""

    wanted: type[BaseModel] | Mapping[str, Any]

    def check(self, name: str = "response_model") -> None:
        """Check that it is a JSON Schema, or has one, before an answer is paid for.

        Raises:
            UsageError: It is not.
        """
        if isinstance(self.wanted, Mapping):
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for  # pyright: ignore[reportUnknownVariableType] # partly typed

            try:
                cast("Any", validator_for(self.json_schema)).check_schema(self.json_schema)
            except SchemaError as error:
                raise UsageError(f"{name} is no JSON Schema: {error.message}") from None
            return
        try:
            json.dumps(self.json_schema, allow_nan=False)
        except Exception as error:  # pydantic's, of a field without a schema
            raise UsageError(f"response_model has no JSON Schema: {error}") from None

    @property
    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return dict(self.wanted) if isinstance(self.wanted, Mapping) else self.wanted.model_json_schema()

    @property
    def response_format(self) -> dict[str, Any]:
        """Return it as OpenAI's `response_format`."""
        schema = self.json_schema
        name = re.sub(r"\W", "_", str(schema.get("title") or "answer"))[:64]
        return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}

    def in_prompt(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with the schema in the system message, for deployments that take none."""
        asked = f"Answer with one JSON object only, valid against this JSON Schema:\n{json.dumps(self.json_schema)}"
        if messages and messages[0]["role"] in ("system", "developer"):  # chat templates take one, first
            old: Any = messages[0]["content"]
            new: Any = [*old, {"type": "text", "text": asked}] if isinstance(old, list) else f"{old}\n\n{asked}"
            return [{**messages[0], "content": new}, *messages[1:]]
        return [{"role": "system", "content": asked}, *messages]

    def parse(self, text: str) -> Any:
        """Return the answer as the pydantic class, or as plain data where a JSON Schema was given.

        Raises:
            ValueError: The text holds no JSON, or it does not match; the message says where.
        """
        found = re.search(r"\{.*\}|\[.*\]", text, re.DOTALL)  # tolerates a fence or a sentence around it
        raw = found[0] if found else text
        if not isinstance(self.wanted, Mapping):
            return self.wanted.model_validate_json(raw)
        import jsonschema

        value = json.loads(raw)
        try:
            jsonschema.validate(value, self.json_schema)
        except jsonschema.ValidationError as error:
            raise ValueError(error.message) from None
        return value


def repair(messages: Sequence[Message], answer: str, problem: str) -> list[Message]:
    """Return the conversation that requests a correction of the answer."""
    ask = f"That is not valid: {problem}\nAnswer again with the corrected JSON object only."
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": ask}]
