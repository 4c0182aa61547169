"""Turns what people write in YAML (`15/min`, `8:00:00`, `1/5`, `~/weights`) into checked values.

Pydantic checks numbers and patterns; it lacks rate limits, Slurm's time spans, and errors that never print a key.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator, Field, WithJsonSchema

from biollm.errors import UsageError
from biollm.types import short

Kind = Literal["requests", "tokens", "usd"]
Unit = Literal["s", "min", "hour", "day", "month"]


@dataclass(frozen=True)
class Limit:
    """So many requests, tokens or US dollars in a period."""

    kind: Kind
    amount: float
    unit: Unit
    resets: str | None = None  # "00:00 America/Los_Angeles": when the day or month begins; None is midnight UTC

    @property
    def rolling(self) -> bool:
        """Return whether it holds in every window of its length, not in a day or month of the calendar."""
        return self.unit in ("s", "min", "hour")

    @property
    def seconds(self) -> int:
        """Return the length of its window in seconds; of a month, 30 days."""
        return _SECONDS[self.unit]

    def __str__(self) -> str:
        if self.kind == "tokens":
            return f"{short(self.amount, 6)} tokens/{self.unit}"
        return f"{self.amount:.15g}{' USD' if self.kind == 'usd' else ''}/{self.unit}"


_SECONDS: dict[Unit, int] = {"s": 1, "min": 60, "hour": 3600, "day": 86400, "month": 30 * 86400}
_NAMES: dict[Unit, str] = {
    "s": "s sec second", "min": "m min minute", "hour": "h hr hour", "day": "d day", "month": "mo month"
}  # fmt: skip
_UNITS: dict[str, Unit] = {
    name + plural: unit for unit, names in _NAMES.items() for name in names.split() for plural in ("", "s")
}
_LIMIT = re.compile(
    r"\$?\s*([\d_,]*\.?\d+)\s*([kmb]?)\s*(tokens?|req(?:uest)?s?|usd|dollars?)?\s*(?:/|\bper\b)\s*([a-z]+)", re.I
)
_KINDS: dict[str, Kind] = {"tok": "tokens", "req": "requests", "usd": "usd", "dol": "usd"}
_EXAMPLES = {"requests": "15/min", "tokens": "120k/min or 30M/month", "usd": "10 USD/month"}
_SPAN = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_NUMBER_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z%]*)", re.I)
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_KEY = re.compile(r"(?:sk-|pk-|rk-|gsk_|gh[opsu]_|github_pat_|hf_|xai-|AIza|nvapi-|r8_|pplx-)[\w-]{12,}")
_RANDOM = re.compile(r"(?=\w*\d)(?=\w*[a-z])(?=\w*[A-Z])\w{20,}|[0-9a-fA-F-]{24,}")
_REDIS_OPTIONS = {"db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
ROUTE = "/chat/completions"  # of a request's URL; a base URL ends before it
_TOKENS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}  # as vLLM reads them
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def masked(text: str) -> str:
    """Return a text with what looks like a key cut to its first four characters."""
    return _KEY.sub(lambda key: f"{key[0][:4]}…", text)


def shown(value: object) -> str:
    """Return a value as an error may print it: quoted, short, and no key in it."""
    text = masked(str(value))
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


def as_list(value: object) -> list[Any]:
    """Return a list or tuple as a list, anything else as the one item of a list."""
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else [value]


def _limit(kind: Kind, item: object) -> Limit:
    if isinstance(item, Limit):
        return item
    if found := _LIMIT.fullmatch(str(item).strip()):
        number, letter, noun, per = found.groups("")
        amount = float(re.sub("[_,]", "", number)) * _THOUSANDS[letter.lower()]
        unit = _UNITS.get(per.lower())
        if unit and amount > 0 and _KINDS.get(noun.lower()[:3], kind) == kind:
            return Limit(kind, amount, unit)
    raise ValueError(f"{shown(item)} is not a valid limit; use e.g. {_EXAMPLES[kind]}.")


def _limits(kind: Kind) -> tuple[BeforeValidator, WithJsonSchema]:
    text = {"type": "string", "examples": [_EXAMPLES[kind]]}
    parse = BeforeValidator(lambda value: tuple(_limit(kind, item) for item in as_list(value)))
    return parse, WithJsonSchema({"anyOf": [text, {"type": "array", "items": text}]})


def _duration(value: object) -> int:
    text = str(value).strip()
    if found := _SPAN.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    found = _NUMBER_UNIT.fullmatch(text)
    unit = _UNITS.get(found[2].lower() or "s") if found else None
    if not found or not unit or unit == "month":
        raise ValueError(f"{shown(value)} is not a valid time span; use e.g. 8:00:00, 30 min or 900 (seconds).")
    return round(float(found[1]) * _SECONDS[unit])


def walltime(value: object) -> int:
    """Return the seconds of a walltime: 8:00:00, 480 min. A string of digits is an error, as its unit is unknown."""
    if isinstance(value, str) and value.strip().isdigit():
        raise ValueError(f"{value} could be minutes or seconds. Write it like 8:00:00 or 480 min.")
    return _duration(value)


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        path = Path(os.path.expandvars(value)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{shown(value)}: {error}") from None
    if not path.is_absolute() and not value.startswith("$"):
        raise ValueError(f"{shown(value)} must be an absolute path; it may begin with ~ or $VARIABLE.")
    return path


def _expanded(value: object) -> object:
    text = os.path.expandvars(value) if isinstance(value, str) else value
    return str(Path.home()) + text[1:] if isinstance(text, str) and text.startswith("~/") else text


def _env_key(value: object) -> object:
    text = str(value)
    if _KEY.search(text) or _RANDOM.fullmatch(text):
        raise ValueError(
            f"{text[:4]}… ({len(text)} characters) looks like a key itself. Write the name of the environment variable"
            " that holds it, and get a new key: this one has been in a file."
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII):
        raise ValueError(f"{text[:4]!r}… is not the name of an environment variable.")
    return value


def _url(value: object) -> object:
    text = str(value)
    if "@" in text:
        raise ValueError("contains a user name or a password. Keys belong in env_key or key_file.")
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and not url.query and not url.fragment
    except ValueError:
        good = False
    if not good or re.search(r"\s", text):
        raise ValueError(f"{shown(text)} is not a base URL. Write it like https://host/v1, scheme included.")
    return text.rstrip("/").removesuffix(ROUTE)


def _redis_url(value: object) -> object:
    secret = good = False
    with suppress(ValueError):
        url = urlsplit(str(value))
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        secret = url.password is not None or "password" in query
        place = {"redis": url.hostname, "rediss": url.hostname, "unix": url.path}.get(url.scheme)
        good = bool(place) and url.port != 0 and query.keys() <= _REDIS_OPTIONS and not re.search(r"\s", str(value))
    if secret:
        raise ValueError("contains a password. Write it into a password_file, or name a password_env.")
    if not good:
        example = "redis://host:6379/0, rediss://host:6380/0?ssl_ca_certs=FILE or unix:///path?db=0"
        raise ValueError(f"is not the address of a Redis server. Write it like {example}.")
    return value


def _resets(value: object) -> str:
    from zoneinfo import ZoneInfo

    found = re.fullmatch(r"((?:[01]\d|2[0-3]):[0-5]\d)\s+(\S+)", text := str(value).strip())
    try:
        ZoneInfo(found[2] if found else "")
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{shown(text)} is not a time and a zone. Write it like 00:00 America/Los_Angeles.") from None
    return text


def _share(value: object) -> object:
    text = str(value).strip()
    if fraction := re.fullmatch(r"(\d+)\s*/\s*([1-9]\d*)", text):
        return int(fraction[1]) / int(fraction[2])
    found = _NUMBER_UNIT.fullmatch(text)
    return float(found[1]) / 100 if found and found[2] == "%" else value


def flag_name(written: str) -> str:
    """Return the one spelling of a flag of vLLM: --max-model-len is max_model_len."""
    return written.lstrip("-").replace("-", "_")


def _flags(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {flag_name(key): item for key, item in cast("dict[str, object]", value).items()}


def _typed(value: object) -> object:
    """Read the strings of vllm_args as YAML means them: truth values, numbers, JSON, or themselves."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_typed(item) for item in as_list(cast("object", value))]
    if not isinstance(value, str) or value.lower() in _TRUTH:
        return _TRUTH[value.lower()] if isinstance(value, str) else value
    try:
        return json.loads(value)
    except ValueError:
        return value


def token_count(value: object) -> int | None:
    """Return the tokens of 16384, "16k" (16000) or "16K" (16384); None stays None, "auto" and -1 become 0."""
    if value in (None, "auto", -1, "-1"):
        return None if value is None else 0
    found = re.fullmatch(r"(\d+(?:\.\d+(?=[kmg]))?)([kmgKMG]?)", str(value))
    if not found or not float(found[1]):
        raise UsageError(f"{value!r} is not a number of tokens.", hint="Write 16384, 16k (16000) or 16K (16384).")
    return int(float(found[1]) * _TOKENS[found[2]])


def _no_key(value: object) -> object:
    if _KEY.search(str(value)):
        raise ValueError("looks like a key; everybody can read it in the launch script.")
    return value


Requests = Annotated[tuple[Limit, ...], *_limits("requests")]
Tokens = Annotated[tuple[Limit, ...], *_limits("tokens")]
Dollars = Annotated[tuple[Limit, ...], *_limits("usd")]
Duration = Annotated[int, Field(ge=0), BeforeValidator(_duration), WithJsonSchema({"type": ["string", "number"]})]
Walltime = Annotated[
    int, Field(ge=60), BeforeValidator(walltime), WithJsonSchema({"type": "string", "examples": ["8:00:00"]})
]
_SHARE_SCHEMA = WithJsonSchema({"type": ["string", "number"], "examples": ["1/5"]})
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_share), _SHARE_SCHEMA]
SingleLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
Expanded = Annotated[SingleLine, BeforeValidator(_expanded)]
FullPath = Annotated[Path, BeforeValidator(_path)]
EnvKey = Annotated[str, BeforeValidator(_env_key)] | None
Url = Annotated[str, BeforeValidator(_url)] | None
RedisUrl = Annotated[str, BeforeValidator(_redis_url)] | None
Resets = Annotated[str, BeforeValidator(_resets)] | None
Flags = Annotated[dict[str, Annotated[object, BeforeValidator(_typed)]], BeforeValidator(_flags)]
EnvValue = Annotated[str | None, BeforeValidator(_no_key)]
Capability = Annotated[str, BeforeValidator(lambda value: str(value).strip().lower().replace("_", "-"))]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9](?:\.?[\w:/@+-])*$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0)]
Price = Annotated[float, Field(ge=0)]
