"""Weights are pulled before a GPU waits for them, from a Hub on loopback that breaks on purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import COMMIT, Hub

from biollm.config import Cluster, Model
from biollm.config.paths import weights_dir
from biollm.errors import UnavailableError, UsageError
from biollm.slurm.weights import present, published_config, pull

INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"1" * 300_000,
    "model-00002-of-00002.safetensors": b"2" * 500_000,
    "pytorch_model.bin": b"the same once more",
    "original/consolidated.00.pth": b"and again",
    "consolidated.safetensors": b"and again",
}
KEPT = {name for name in FILES if name.endswith(("json", "of-00002.safetensors"))}
BIG = "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(dict(FILES)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(models_dir=tmp_path / "models")


MODEL = Model(key="mine", hf_id="org/name")


def test_a_pull_brings_the_weights_once(hub: Hub, cluster: Cluster) -> None:
    progress: list[tuple[int, int]] = []
    folder = pull(MODEL, cluster, lambda done, total: progress.append((done, total)))
    assert folder == cluster.models_dir / "org" / "name"  # pyright: ignore[reportOptionalOperand]
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*KEPT, ".biollm-commit"}
    assert all((folder / name).read_bytes() == FILES[name] for name in KEPT)
    assert (folder / ".biollm-commit").read_text() == f"{COMMIT}\n"
    total = sum(len(FILES[name]) for name in KEPT)
    assert progress == [(0, total), (total, total)]
    assert present(MODEL, cluster) == folder


def test_a_second_pull_downloads_nothing(hub: Hub, cluster: Cluster) -> None:
    pull(MODEL, cluster)
    hub.requests.clear()
    pull(MODEL, cluster)
    assert not [request for request in hub.requests if request.startswith("GET /org/name/resolve")]


def test_files_that_the_user_put_there_are_not_replaced(hub: Hub, cluster: Cluster) -> None:
    folder = weights_dir(MODEL, cluster)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    with pytest.raises(
        UnavailableError, match=r"biollm did not put there: .* would be replaced, such as config.json"
    ) as raised:
        pull(MODEL, cluster)
    assert "`path`" in str(raised.value.hint)
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["config.json"]
    with pytest.raises(UnavailableError, match="would be replaced"):
        pull(MODEL, cluster)
    assert (folder / "config.json").read_text() == "mine"
    (folder / "config.json").write_bytes(FILES["config.json"])
    (folder / "config.json").rename(folder / "README.md")
    assert pull(MODEL, cluster) == folder, "nothing would be replaced"


def test_an_interrupted_pull_is_said_and_keeps_the_files_that_are_whole(hub: Hub, cluster: Cluster) -> None:
    hub.broken.add(BIG)
    with pytest.raises(UnavailableError, match=r"org/name could not be downloaded: .*500") as raised:
        pull(MODEL, cluster)
    assert "complete files are kept" in str(raised.value.hint)
    folder = weights_dir(MODEL, cluster)
    whole = {path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size}
    (folder / "config.json").write_bytes(FILES["config.json"])
    assert "a download was interrupted. Run `biollm pull mine`." in str(present(MODEL, cluster))
    hub.broken.clear()
    hub.requests.clear()
    assert present(MODEL, cluster) != pull(MODEL, cluster) == present(MODEL, cluster)
    assert not [name for name in whole for request in hub.requests if request.startswith("GET") and name in request]


@pytest.mark.parametrize("text", ["", '{"weight_map": {"a": "mod', "{}", "[]", '{"weight_map": null}'])
def test_an_index_that_is_cut_off_is_weights_that_are_not_complete(cluster: Cluster, text: str) -> None:
    folder = weights_dir(MODEL, cluster)
    folder.mkdir(parents=True)
    for name in KEPT:
        (folder / name).write_bytes(FILES[name])
    assert present(MODEL, cluster) == folder
    (folder / "model.safetensors.index.json").write_text(text)
    message = str(present(MODEL, cluster))
    assert message.endswith("are incomplete: model.safetensors.index.json is broken. Run `biollm pull mine`.")


@pytest.mark.slow
def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, cluster: Cluster) -> None:
    hub.files[BIG], hub.cut[BIG] = b"3" * 12_000_000, 11_000_000
    folder = pull(MODEL, cluster)
    assert (folder / BIG).read_bytes() == hub.files[BIG]
    assert [request for request in hub.requests if "bytes=" in request and BIG in request]


def test_the_revision_is_pinned(hub: Hub, cluster: Cluster) -> None:
    pull(MODEL, cluster)
    assert hub.requests.count("GET /api/models/org/name/revision/main") == 1  # a push meanwhile changes nothing
    assert {request.split("/")[4] for request in hub.requests if "/resolve/" in request} == {COMMIT}
    pinned = MODEL.model_copy(update={"revision": COMMIT})
    assert pull(pinned, cluster).name == f"name@{COMMIT}"


def test_no_room_is_said_before_anything_is_downloaded(hub: Hub, cluster: Cluster) -> None:
    hub.lies[BIG] = 10**18
    with pytest.raises(UnavailableError, match=r"needs 1000000000\.0 GB more; .* GB are free"):
        pull(MODEL, cluster)
    assert not [request for request in hub.requests if request.startswith("GET /org/name/resolve")]


def test_a_gated_model_wants_a_token(hub: Hub, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_planted0123456789"
    with pytest.raises(UnavailableError, match="org/name is gated") as raised:
        pull(MODEL, cluster)
    assert "set HF_TOKEN" in str(raised.value.hint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    folder = pull(MODEL, cluster)
    assert not [path for path in folder.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"hf_id": "org/other"}, "org/other does not exist"), ({"revision": "v9"}, "org/name has no revision 'v9'")],
)
def test_wrong_names(hub: Hub, cluster: Cluster, changes: dict[str, str], says: str) -> None:
    with pytest.raises(UnavailableError, match=says):
        pull(MODEL.model_copy(update=changes), cluster)


def test_a_hub_that_is_away(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"org/name could not be downloaded: .*[Cc]onnect") as raised:
        pull(MODEL, cluster)
    assert "Run this where Hugging Face can be reached" in str(raised.value.hint)
    with pytest.raises(UnavailableError, match="org/name could not be downloaded"):
        published_config("org/name")


def test_only_models_of_hugging_face_can_be_pulled(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to download"):
        pull(MODEL.model_copy(update={"path": tmp_path}), cluster)
    with pytest.raises(UsageError, match="not a local model"):
        pull(MODEL.model_copy(update={"type": "api"}), cluster)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "are not in"),
        ({"config.json": "{}"}, "no weights file"),
        ({"config.json": "{}", "model.safetensors": "", ".biollm-pull": ""}, "incomplete: a download"),
        (
            {"config.json": "{}", "model.safetensors.index.json": json.dumps(INDEX)},
            "2 files missing, such as model-00001",
        ),
        ({"config.json": "{}", "model.safetensors": ""}, None),
        ({"config.json": "{}", "pytorch_model.bin": ""}, None),
    ],
)
def test_whether_weights_are_present(cluster: Cluster, tmp_path: Path, files: dict[str, str], says: str | None) -> None:
    model = MODEL.model_copy(update={"path": tmp_path / "own"})
    (tmp_path / "own").mkdir()
    for name, text in files.items():
        (tmp_path / "own" / name).write_text(text)
    found = present(model, cluster)
    assert found == tmp_path / "own" if says is None else says in str(found)
    assert says is None or "correct `path`" in str(found)


def test_the_config_alone(hub: Hub, cluster: Cluster, tmp_path: Path) -> None:
    assert published_config("org/name") == {"model_type": "llama"}
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert published_config("", tmp_path) == published_config("", tmp_path / "config.json") == {"a": 1}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"is not a model's config\.json"):
        published_config("", tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        published_config("", tmp_path / "none")
