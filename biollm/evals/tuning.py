"""Makes training data of rated answers: scrubbed, without repeats, split by run into train and held-out.

TRL reads chat JSONL as it is. What it lacks: logs hold names and keys, a pipeline fails a hundred times in one way, and
a score on examples like those trained on says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from biollm._files import write_private
from biollm.config import Cluster, Model
from biollm.config.paths import weights_dir
from biollm.errors import UsageError
from biollm.evals.inputs import numbered_lines
from biollm.inputs.normalize_log import normalize_log
from biollm.inputs.redact import Redaction
from biollm.ledger.ratings import RatedAnswer
from biollm.types import Json

_HELD_OUT = 0.2  # of the runs
_FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_SYSTEM = r"/(?:usr|s?bin|lib\w*|etc|opt|proc|sys|dev)/"  # whose folders are the same everywhere
_FOLDERS = re.compile(rf"(?:<home-\d+>|(?<![\w/:.>])(?!{_SYSTEM})(?=/))(?:/[\w.+@%~-]+)*/(?=[\w.+@%~-])")


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the right answer. Examples of one `run` stay together."""

    messages: list[Json]
    run: str = ""


def read(file: Path) -> Iterator[Example]:
    """Yield the examples of a JSONL file; raise UsageError at a line that is none."""
    for number, line in numbered_lines(file):
        try:
            found: Any = json.loads(line)
            messages: list[Json] = [{key: each[key] for key in ("role", "content")} for each in found["messages"]]
            texts = all(isinstance(value, str) for each in messages for value in each.values())  # TRL's text alone
            ends_well = texts and messages[1:] and messages[-1]["role"] == "assistant"
        except (ValueError, KeyError, TypeError):
            found, messages, ends_well = {}, [], False
        if not ends_well:
            raise UsageError(
                f"{file}:{number} must be a conversation that ends with an answer.", hint=f"Write {_FORM}."
            )
        yield Example(messages, str(found.get("run", "")))


def of_ratings(answers: Iterable[RatedAnswer]) -> Iterator[Example]:
    """Yield the corrections, and the answers that were rated up; their tag `run` names the run."""
    for each in answers:
        right = each.correction or (each.answer if each.rating == "up" else "")
        if right and all(isinstance(message.get("content"), str) for message in each.messages):  # TRL's text alone
            yield Example([*each.messages, {"role": "assistant", "content": right}], each.tags.get("run", ""))


def prepared(examples: Iterable[Example], names: Sequence[str] = (), secrets: Iterable[str] = ()) -> list[Example]:
    """Return the examples without keys, user names, folders and `names`; of several with one failure, the last."""
    kept, secrets = dict[str, Example](), tuple(secrets)
    for example in examples:
        hidden = Redaction(names, secrets).hidden(example.messages)
        messages = [{**each, "content": _FOLDERS.sub("<path>/", each["content"])} for each in hidden]
        question = "\n".join(normalize_log(each["content"], names) for each in messages[:-1])
        kept[question] = Example(messages, example.run or question)
    return list(kept.values())


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Return (train, held-out), chosen by a hash of the run: a run stays on its side when others are added."""
    places = {each.run: int(sha256(each.run.encode()).hexdigest(), 16) / 2**256 for each in examples}
    most = max(_HELD_OUT, min(places.values(), default=0))  # at least one run
    return [e for e in examples if places[e.run] > most], [e for e in examples if places[e.run] <= most]


def places(file: Path, source: Path | None, *, force: bool = False) -> tuple[Path, Path]:
    """Return where the training data and the held-out data go; raise UsageError where that is no file to write.

    Files that exist are replaced only with `force`.
    """
    if not file.name or file.is_dir():
        raise UsageError(f"{file} is a folder.", hint="Name a file: -o train.jsonl.")
    if not file.parent.is_dir():
        raise UsageError(f"{file} cannot be written: there is no folder {file.parent}.", hint="Make it: mkdir -p.")
    found = file, file.with_suffix(".held-out.jsonl")
    for path in found:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file.", hint="Name another one with -o.")
        if source and path.exists() and path.samefile(source):
            raise UsageError(f"{path} would be replaced by what is made of it.", hint="Name another file with -o.")
        if path.exists() and not force:
            raise UsageError(f"{path} exists.", hint="Name another file with -o, or replace it with --force.")
    return found


def write(train: Sequence[Example], held_out: Sequence[Example], file: Path, beside: Path) -> None:
    """Write chat JSONL for TRL and, beside it, what `biollm compare` reads: questions with expected answers."""
    rows = [{"messages": each.messages[:-1], "expected": each.messages[-1]["content"]} for each in held_out]
    for path, lines in ((file, [{"messages": each.messages} for each in train]), (beside, rows)):
        write_private(path.resolve(), "".join(json.dumps(line) + "\n" for line in lines))


def entry(name: str, model: Model, cluster: Cluster, adapter: Path) -> str:
    """Return the entry of models.yaml for a trained adapter; raise UsageError if there is none, or of another model."""
    try:
        trained = json.loads((adapter / "adapter_config.json").read_text())
        rank, base = trained["r"], trained.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError):
        hint = f"Train it: biollm tune up {model.key} FILE."
        raise UsageError(f"There is no adapter in {adapter}.", hint=hint) from None
    folders = {weights_dir(model, cluster).name, Path(model.hf_id or "").name}  # they may have been moved since
    if base and Path(base).name not in folders:
        raise UsageError(f"The adapter in {adapter} is of {base}, not of {model.key}.", hint="Name the model it is of.")
    own = {"base": model.key, "lora": str(adapter)} | ({"lora_rank": rank} if rank != 16 else {})
    return yaml.safe_dump({"models": {name: own}}, sort_keys=False)
