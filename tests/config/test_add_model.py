"""`models add` writes an entry into the user's models.yaml and leaves the rest of it alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_memory import PUBLISHED

from biollm.config import Cluster, load_config
from biollm.config.edit import add_model
from biollm.errors import UsageError
from biollm.slurm.add_model import add, entry, unregistered
from biollm.slurm.memory import fit
from biollm.slurm.script import render

A3 = Cluster(gpu_memory_gib=79.1)
MINE = """\
# what is mine
models:   # a note
  # the first
  mine: {hf_id: me/mine}   # my own

# a tail
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder of weights, without the weights."""
    folder = tmp_path / "Llama-Test"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED["llama-3.3-70b"]))
    return folder


@pytest.mark.parametrize(
    ("name", "gpus", "limit"),
    [
        ("qwen-coder-32b", 2, None),
        ("deepseek-coder-v2", 8, None),
        ("llama-3.3-70b", 4, None),
        ("minimax-m2", 4, None),
        ("codellama-34b", 1, None),
    ],
)
def test_an_entry_asks_for_the_fewest_gpus_that_hold_the_whole_context(name: str, gpus: int, limit: int | None) -> None:
    model = entry("org/Some-Model", PUBLISHED[name], A3)
    assert (model.key, model.gpus_required, model.vllm_args.get("max_model_len")) == ("some-model", gpus, limit)
    assert fit(model, A3).fits


def test_where_no_number_of_gpus_holds_the_whole_context_it_is_cut() -> None:
    nine_heads = PUBLISHED["llama-3.3-70b"] | {
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
        "num_hidden_layers": 36,
    }
    model = entry("org/nine", nine_heads, A3)  # 9 heads go on one GPU only
    assert model.gpus_required == 1
    assert 0 < model.vllm_args["max_model_len"] < 131072  # pyright: ignore[reportOperatorIssue]
    assert fit(model, A3).fits


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (None, {}),
        ("", {}),
        ("# nothing yet\n", {}),
        (MINE, {"mine": {"hf_id": "me/mine"}}),
        (MINE + "version: 1\n", {"mine": {"hf_id": "me/mine"}}),
        ("models:\n", {}),
        ("models:\n  # only a comment", {}),
        ("models:\n    deep:\n        hf_id: a/b", {"deep": {"hf_id": "a/b"}}),
        ("version: 1\n", {}),
    ],
)
def test_what_stood_in_the_file_stays(
    tmp_path: Path, published: Path, before: str | None, kept: dict[str, Any]
) -> None:
    file = tmp_path / "models.yaml"
    if before is not None:
        file.write_text(before)
    assert add("org/Llama-Test", tmp_path, A3, config=published) == ("llama-test", file)
    after = file.read_text()
    whole = yaml.safe_load(after)
    assert {key: value for key, value in whole["models"].items() if key != "llama-test"} == kept
    assert whole.get("version") == (yaml.safe_load(before or "") or {}).get("version")
    assert [line for line in (before or "").splitlines() if line not in after.splitlines()] == []


def test_what_is_written_is_read_again(tmp_path: Path, published: Path) -> None:
    (tmp_path / "models.yaml").write_text(MINE)
    key, _ = add("org/Llama-Test", tmp_path, A3, config=published / "config.json", name="my-llama")
    model = load_config(tmp_path).models[key]
    assert model.architecture == entry("org/Llama-Test", PUBLISHED["llama-3.3-70b"], A3).architecture
    assert (model.hf_id, model.context_length, model.size_gb) == ("org/Llama-Test", 131072, 141.1)
    assert render([model], A3).gpus == 4


def test_a_link_into_a_folder_of_dotfiles_stays_one(tmp_path: Path, published: Path) -> None:
    (tmp_path / "dotfiles.yaml").write_text(MINE)
    (tmp_path / "models.yaml").symlink_to(tmp_path / "dotfiles.yaml")
    add("org/Llama-Test", tmp_path, A3, config=published)
    assert (tmp_path / "models.yaml").is_symlink()
    assert "llama-test" in (tmp_path / "dotfiles.yaml").read_text()


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("models: {mine: {}}\n", "add it by hand"),
        ("[1, 2]\n", "add it by hand"),
        ("models: 3\n", "add it by hand"),
        ("models:\n  llama-test: {}\n", "has a model named 'llama-test' already"),
        ("models: [\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_appended_to_stays_as_it_is(
    tmp_path: Path, published: Path, before: str, says: str
) -> None:
    (tmp_path / "models.yaml").write_text(before)
    with pytest.raises(UsageError, match=says):
        add("org/Llama-Test", tmp_path, A3, config=published)
    assert (tmp_path / "models.yaml").read_text() == before


@pytest.mark.parametrize(("hf_id", "name"), [("no-slash", None), ("a/b", "not a key"), ("a/b c", None)])
def test_wrong_names_are_refused(tmp_path: Path, published: Path, hf_id: str, name: str | None) -> None:
    with pytest.raises(UsageError, match=r"hf_id|key"):
        add(hf_id, tmp_path, A3, config=published, name=name)
    assert not (tmp_path / "models.yaml").exists()


def test_a_model_that_is_in_no_registry(published: Path) -> None:
    model = unregistered(published / "config.json")
    assert (model.key, model.architecture and model.architecture.layers) == ("Llama-Test", 80)
    assert fit(model, A3, gpus=4).fits


def test_a_model_is_added_where_no_state_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOLLM_STATE_DIR", "/proc/nowhere/state")
    add_model(tmp_path / "models.yaml", "mine", "mine: {hf_id: me/mine}\n")
    assert "mine" in yaml.safe_load((tmp_path / "models.yaml").read_text())["models"]


def test_models_that_are_added_at_once_are_all_added(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: add_model(file, f"m{at}", f"m{at}: {{hf_id: me/m{at}}}\n"), range(8)))
    assert set(yaml.safe_load(file.read_text())["models"]) == {f"m{at}" for at in range(8)}
