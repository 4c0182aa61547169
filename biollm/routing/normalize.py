"""Converts a caller's request to plain JSON before anything is reserved for it, or rejects it. Pure.

LiteLLM notices what cannot be sent only after it has chosen a deployment, with a different exception for each
provider, which then looks like the provider's failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import PurePath
from reprlib import repr as brief
from typing import Any, cast

from biollm.errors import UsageError, nearest
from biollm.inputs.tokens import estimate

Message = dict[str, Any]
Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether one is
ANSWER_SIZES = {"max_tokens", "max_completion_tokens"}  # OpenAI's two names for the same limit
_MEDIA = {"image_url": "images", "input_audio": "audio", "file": "files", "video_url": "videos"}
_MEDIUM = 3000  # bytes that an image or another medium counts as: about 1,000 tokens
_URL = re.compile(r"https?://\S|gs://\S|data:[\w.+-]+/[\w.+-]+(;[\w.+=-]+)*;base64,\S", re.IGNORECASE)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # a chat template may have others
_SEPARATE = {"messages", "model", "prompt", "stream"}  # set by the call itself


def text(given: str) -> str:
    """Replace each lone surrogate, which stands for a byte that is not UTF-8, by U+FFFD."""
    if given.isascii():
        return given
    try:
        given.encode()
    except UnicodeEncodeError:
        return given.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return given


def texts(given: Mapping[Any, Any]) -> dict[str, str]:
    """Return keys and values as strings without lone surrogates."""
    return {text(str(key)): text(str(value)) for key, value in given.items()}


def is_number(given: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Return whether a value is a finite number in a range that includes its ends."""
    return (
        isinstance(given, int | float) and not isinstance(given, bool) and least <= given <= most and given < math.inf
    )


def at_least(least: int) -> Rule:
    """Return the rule of a whole number."""
    return f"a whole number of at least {least}", lambda given: is_number(given, least) and given == int(given)


PARAMETERS: dict[str, Rule] = {
    "temperature": ("a number from 0 to 2", lambda given: is_number(given, 0, 2)),
    **dict.fromkeys(sorted(ANSWER_SIZES), at_least(1)),
}


def checked(given: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> dict[str, Any]:
    """Return the values that have a rule, numpy's scalars as Python's.

    Raises:
        UsageError: One breaks its rule.
    """
    found: dict[str, Any] = {}
    for name, (needs, fits) in rules.items():
        if name in given:
            found[name] = value = _scalar(given[name])
            if not fits(value):
                shown = f"{value:g}" if isinstance(value, float) else brief(value)
                raise UsageError(f"{prefix}{name} is {shown}; it must be {needs}.")
    return found


class Reader:
    """One pass over a request.

    Attributes:
        tokens: Estimated tokens of the text in the messages.
        rest: Bytes, in UTF-8, of all other strings in the request.
        media: What the messages contain besides text: "images", "audio", "files", "videos".
    """

    def __init__(self) -> None:
        self.tokens = self.rest = 0
        self.media: set[str] = set()

    def value(self, given: Any, path: str) -> Any:
        """Return `given` as plain JSON: strings without lone surrogates, numpy's scalars as numbers.

        Raises:
            UsageError: JSON has no such value; the message names its path.
        """
        try:
            return self._value(given, path)
        except RecursionError:
            raise UsageError(f"{path} contains itself or is nested too deeply.") from None

    def messages(self, prompt: Any, system: Any = None) -> list[Message]:
        """Return a prompt, a string or messages, as messages.

        Raises:
            UsageError: It is neither, or a message cannot be sent.
        """
        given: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
            message = f"The prompt is {_kind(prompt)}; it must be a string or a list of messages."
            hint = "Pass a list of messages: [message]." if isinstance(given, Mapping) else _how_to_read(prompt)
            raise UsageError(message, hint=hint)
        if system is not None and not isinstance(system, str):
            raise UsageError(f"system is {_kind(system)}; it must be a string.")
        found = [self._message(each, f"messages[{at}]") for at, each in enumerate(cast("Iterable[Any]", given))]
        if not found:
            raise UsageError("There are no messages.")
        return [self._message({"role": "system", "content": system}, "system"), *found] if system else found

    def params(self, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return further arguments of OpenAI's API, without those that are None.

        Raises:
            UsageError: One of them cannot be sent.
        """
        found = {text(name): self.value(value, prefix + name) for name, value in given.items() if value is not None}
        for name in sorted(_SEPARATE & found.keys()):
            raise UsageError(f"{prefix}{name} cannot be set here: the call itself sets it.")
        checked(found, PARAMETERS, prefix)
        found |= {name: int(found[name]) for name in ANSWER_SIZES & found.keys()}
        tools: Any = found.get("tools", [])
        if not isinstance(tools, list):
            raise UsageError(f"{prefix}tools is {_kind(given['tools'])}; it must be a list.")
        for at, tool in enumerate(cast("list[Any]", tools)):
            if not isinstance(tool, dict):
                raise UsageError(f"{prefix}tools[{at}] is {_kind(tool)}; it must be an object.")
        if tools == []:  # providers refuse an empty list
            found.pop("tools", None)
        return found

    def _message(self, given: Any, path: str) -> Message:
        given = _dumped(given)
        if not isinstance(given, Mapping):
            raise UsageError(f"{path} is {_kind(given)}; it must be an object with a role and content.")
        message = dict(cast("Mapping[str, Any]", given))
        if not (isinstance(role := message.get("role"), str) and role):
            problem = "has no role" if role in (None, "") else f"has a role that is {_kind(role)}"
            raise UsageError(f'{path} {problem}; it must be a string such as "user".')
        if role not in _ROLES and (hint := nearest(role.lower(), _ROLES, repr)):
            raise UsageError(f"{path}.role is {brief(role)}.", hint=hint)
        content: Any = message.pop("content", None)
        made: Message = {"role": role, **({"content": None} if "content" in given else {})}
        made |= self.value(message, path)
        if isinstance(content, list | tuple):
            parts = cast("Iterable[Any]", content)
            made["content"] = [self._part(part, f"{path}.content[{at}]") for at, part in enumerate(parts)]
        elif isinstance(content, str):
            made["content"] = self._text(content)
        elif content is not None:
            message = f"{path}.content is {_kind(content)}; it must be a string or a list of parts."
            raise UsageError(message, hint=_how_to_read(content))
        return made

    def _part(self, given: Any, path: str) -> Any:
        given = _dumped(given)
        if not isinstance(given, Mapping) or not isinstance(kind := cast("Message", given).get("type"), str):
            problem = "has no type" if isinstance(given, Mapping) else f"is {_kind(given)}"
            raise UsageError(f'{path} {problem}; it must be an object such as {{"type": "text", "text": "..."}}.')
        part = cast("Message", given)
        if kind == "text":
            if not isinstance(words := part.get("text") or "", str):
                raise UsageError(f"{path}.text is {_kind(words)}; it must be a string.")
            rest = self.value({name: value for name, value in part.items() if name != "text"}, path)
            return {**rest, "text": self._text(words)}
        rest = self.rest + _MEDIUM  # an image's base64 costs tokens by pixels, which are not known here
        made = self.value(part, path)
        if kind not in _MEDIA:
            return made
        self.rest = rest
        self.media.add(_MEDIA[kind])
        if kind == "image_url":
            image: Any = made.get("image_url")
            url: Any = cast("Message", image).get("url") if isinstance(image, dict) else image
            if not (isinstance(url, str) and _URL.match(url)):
                raise UsageError(f"{path}.image_url is neither an http(s) URL nor a base64 data URL.")
        return made

    def _text(self, given: str) -> str:
        given = text(given)
        self.tokens += estimate(given)
        return given

    def _value(self, given: Any, path: str) -> Any:
        if isinstance(given, str):
            given = text(given)
            self.rest += len(given) if given.isascii() else len(given.encode())
            return given
        if given is None or isinstance(given, bool):
            return given
        if isinstance(given, int | float):
            with suppress(OverflowError):
                if math.isfinite(given):
                    return given
            what = given if isinstance(given, float) else "too large"
            raise UsageError(f"{path} is {what}, which is not a JSON number.")
        if isinstance(given, Mapping):
            pairs = cast("Mapping[Any, Any]", given).items()
            return {
                key if type(key) is str and key.isascii() else self._key(key, path): self._value(value, f"{path}.{key}")
                for key, value in pairs
            }
        if isinstance(given, list | tuple):
            return [self._value(value, f"{path}[{at}]") for at, value in enumerate(cast("Iterable[Any]", given))]
        if (dumped := _dumped(given)) is not given:
            return self._value(dumped, path)
        for name in ("item", "__index__", "__float__"):  # numpy's scalars, and other libraries', without an import
            number: Any = None
            with suppress(Exception):
                number = getattr(given, name)()
            if isinstance(number, int | float | str):
                return self._value(number, path)
        raise UsageError(f"{path} is {_kind(given)}, which is not JSON.")

    def _key(self, given: Any, path: str) -> str:
        if isinstance(given, str):
            return text(given)
        if isinstance(key := self._value(given, path), int | float) and not isinstance(key, bool):
            return str(key)
        raise UsageError(f"{path} has a key that is {_kind(given)}; it must be a string.")


def _dumped(given: Any) -> Any:
    """Return the fields of a pydantic object, such as a response's message; anything else as it is."""
    return given.model_dump() if hasattr(given, "model_dump") and not isinstance(given, type) else given


def _scalar(given: Any) -> Any:
    """Return a scalar of numpy's as one of Python's; anything else as it is."""
    found: object = given
    if not isinstance(found, str | Mapping | list | tuple):  # which may be long
        with suppress(UsageError):
            found = Reader().value(given, "")
    return found if isinstance(found, int | float) else given


def _how_to_read(given: object) -> str | None:
    if isinstance(given, PurePath):
        return "Pass its text, path.read_text(), or the file beside a question: attachments=[path]."
    return "Pass text: data.decode()." if isinstance(given, bytes) else None


def _kind(given: object) -> str:
    if given is None:
        return "missing"
    name = type(given).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
