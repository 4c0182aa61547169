"""Adds an entry to a YAML file of the user's, leaving every comment there in place.

PyYAML drops comments; libraries that keep them reformat what they touch.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from textwrap import indent as indented
from typing import Any, cast

import yaml

from biollm._files import locked, write_for_user
from biollm.config.paths import own_dir, state_dir
from biollm.errors import UsageError


def add_model(file: Path, key: str, text: str) -> None:
    """Add `text`, the YAML of one entry, to the models of `file`, which is created where there is none.

    Raises:
        UsageError: The file has such a model, or is not written line by line.
    """
    file = file.resolve()  # a link into a folder of dotfiles stays one
    with ExitStack() as stack:
        with suppress(OSError):  # without a state folder, two commands at once are not kept apart
            stack.enter_context(locked(own_dir(state_dir()) / "models.lock"))
        _add(file, key, text)


def _add(file: Path, key: str, text: str) -> None:
    old = file.read_text() if file.exists() else ""
    try:
        root: Any = cast("Any", yaml).compose(old, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    sections: dict[str, Any] = {}
    entries: list[Any] = []
    if root is not None and root.id == "mapping":
        sections = {key.value: (key, value) for key, value in root.value}
    section, node = sections.get("models", (None, None))
    if node is not None and node.id == "mapping" and not node.flow_style:
        entries = node.value
    elif (root is not None and not sections) or (node is not None and node.value != ""):
        raise UsageError(f"{file} is not written as `models:` and entries below it, line by line: add it by hand.")
    if key in [key.value for key, _ in entries]:
        raise UsageError(f"{file} has a model named {key!r} already.", hint="Give it another name.")
    indent = entries[0][0].start_mark.column if entries else 2
    lines = [line if line.endswith("\n") else f"{line}\n" for line in old.splitlines(keepends=True)]
    starts = [key.start_mark.line for key, _ in sections.values()]
    after = len(lines) if section is None else section.start_mark.line  # the next section begins below it
    at = min([line for line in starts if line > after], default=len(lines))
    new = [] if section else ["models:\n"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_for_user(file, "".join([*lines[:at], *new, indented(text, " " * indent), *lines[at:]]))
