"""What every error has in common, and the command that adds what is not installed."""

from __future__ import annotations

import json
import pickle
import shlex
import traceback
from pathlib import Path
from typing import Any

import pytest

from biollm.errors import BiollmError, UsageError, install_command


def test_a_traceback_shows_the_hint_here_and_through_a_gateway() -> None:
    error = UsageError("x is wrong.", hint="Do y.")
    given = error.to_json()
    assert "__notes__" not in given
    for each in (error, BiollmError.from_json(given), pickle.loads(pickle.dumps(error))):
        assert traceback.format_exception(each)[-2:] == ["biollm.errors.UsageError: x is wrong.\n", "Do y.\n"]


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"url": "file:///src/my%20biollm", "dir_info": {"editable": True}}, ["-e", "/src/my biollm[serve]"]),
        ({"url": "file:///src/biollm", "dir_info": {}}, ["/src/biollm[serve]"]),
        ({"url": "file:///tmp/biollm-1.whl", "archive_info": {}}, ["biollm[serve] @ file:///tmp/biollm-1.whl"]),
        (
            {"url": "https://forge.test/biollm", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            ["biollm[serve] @ git+https://forge.test/biollm@ab12"],
        ),
        (None, ["biollm[serve]"]),
    ],
)
def test_an_extra_is_added_from_where_biollm_came(
    origin: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "biollm-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: biollm\nVersion: 0.1.0\n")
    if origin:
        (installed / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    assert shlex.split(install_command("serve")) == ["pip", "install", *words]
