"""Gets a model's weights from Hugging Face before a GPU waits for them, and says whether they are there.

`huggingface_hub` downloads, resumes and verifies. What it lacks: free space is not checked first, a folder does
not tell a finished download from an interrupted one, and PyTorch's copies of the same weights come along.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from biollm.config import Cluster, Model
from biollm.config.paths import weights_dir
from biollm.errors import UnavailableError, UsageError

_MARK = ".biollm-pull"  # lies in the folder from the first byte to the last
_DUPLICATES = ("original/*", "onnx/*", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.ckpt")
_SLACK = 1.02  # of the bytes to come, for the file system's own


def present(model: Model, cluster: Cluster) -> Path | str:
    """Return the folder of the weights, or one sentence: what is missing and which command gets it.

    Raises:
        UsageError: It is no local model.
    """
    folder = weights_dir(model, cluster)
    mend = f"`biollm pull {model.key}` gets them." if not model.path else "Put them there, or correct `path`."
    if not (folder / "config.json").is_file():
        return f"The weights of {model.key} are not in {folder}. {mend}"
    if (folder / _MARK).exists():
        return f"The weights of {model.key} in {folder} are not complete: a download was interrupted. {mend}"
    shards = {path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(pattern)}
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            wanted |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):  # such as one that was cut off
            return f"The weights of {model.key} in {folder} are not complete: {index.name} is broken. {mend}"
    if missing := sorted(wanted - shards):
        return f"The weights of {model.key} in {folder} lack {len(missing)} files, {missing[0]} for one. {mend}"
    return folder if shards else f"There is no weights file in {folder}. {mend}"


def pull(model: Model, cluster: Cluster, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Download the weights of `model`, or what is still missing of them, and return their folder.

    The commit that its revision means now holds for the whole download, and is written to `.biollm-commit`.
    Gated models need HF_TOKEN.

    Args:
        model: With an hf_id.
        cluster: Gives models_dir.
        progress: Called with bytes (done, in all) at the start and the end; in between huggingface_hub draws its
            own bars, on a terminal only.

    Raises:
        UsageError: It is no local model of Hugging Face.
        UnavailableError: Not enough space, no access, or Hugging Face does not answer.
    """
    folder = weights_dir(model, cluster)
    if model.path or not model.hf_id:
        raise UsageError(f"{model.key} has its weights in `path`: {folder}. There is nothing to pull.")
    hub = _hub()
    if not sys.stderr.isatty():
        import_module("huggingface_hub.utils").disable_progress_bars()
    # cache_dir gets a note of the revision's commit only, but the default is in $HOME
    place: dict[str, Any] = {
        "endpoint": os.environ.get("HF_ENDPOINT"),
        "local_dir": folder,
        "cache_dir": folder / ".cache",
    }
    try:
        files = hub.snapshot_download(model.hf_id, revision=model.revision, dry_run=True, **place)
        ignored = _ignored([file.filename for file in files])
        wanted = [file for file in files if not any(fnmatch(file.filename, pattern) for pattern in ignored)]
        if not wanted:
            raise UnavailableError(f"{model.hf_id} holds no files.")
        _keep_the_users(folder, [file.filename for file in wanted], model)
        total = sum(file.file_size or 0 for file in wanted)
        missing = sum(file.file_size or 0 for file in wanted if file.will_download)
        _check_space(folder, missing)
        progress(total - missing, total)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
        commit = wanted[0].commit_hash
        hub.snapshot_download(model.hf_id, revision=commit, ignore_patterns=ignored, **place)
        (folder / ".biollm-commit").write_text(f"{commit}\n")
        (folder / _MARK).unlink(missing_ok=True)
    except _failures() as error:
        raise _explained(error, model.hf_id, model.revision) from error
    progress(total, total)
    return folder


def _keep_the_users(folder: Path, coming: list[str], model: Model) -> None:
    """Refuse to replace files that neither biollm nor huggingface_hub, which notes what it fetched, has put there."""
    notes = folder / ".cache" / "huggingface" / "download"
    lost = [name for name in coming if (folder / name).exists() and not (notes / f"{name}.metadata").exists()]
    if lost and not ((folder / _MARK).exists() or (folder / ".biollm-commit").exists()):
        raise UnavailableError(
            f"{folder} holds files that biollm did not put there: {len(lost)} would be replaced, {lost[0]} for one.",
            hint=f"Move the folder away, or name it as `path` of {model.key} in models.yaml.",
        )


def published_config(hf_id: str, path: Path | None = None) -> dict[str, Any]:
    """Return a model's config.json: `path` (the file, or the folder it is in), or from Hugging Face.

    Raises:
        UsageError: The file is missing, or no JSON object.
        UnavailableError: Hugging Face does not give it.
    """
    if path is None:
        with TemporaryDirectory() as folder:
            place = {"endpoint": os.environ.get("HF_ENDPOINT"), "local_dir": folder, "cache_dir": folder}
            try:  # not hf_hub_download: it retries for 24 s where nothing answers
                _hub().snapshot_download(hf_id, allow_patterns="config.json", **place)
            except _failures() as error:
                raise _explained(error, hf_id, None) from error
            return published_config(hf_id, Path(folder))
    file = path / "config.json" if path.is_dir() else path
    try:
        published: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(published, dict):
        raise UsageError(f"{file} is no config.json of a model.")
    return published  # pyright: ignore[reportUnknownVariableType]


def _ignored(names: list[str]) -> list[str]:
    """Return patterns of the files that hold the same weights once more."""
    again = [*_DUPLICATES]
    if any(name.endswith(".safetensors") for name in names):
        again += ["*.bin", "*.pt"]
    if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        again.append("consolidated*")
    return again


def _check_space(folder: Path, needed: int) -> None:
    """Refuse a download for which there is no room; a quota is not seen."""
    parts = (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete")
    needed -= sum(part.stat().st_size for part in parts)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(there).free) < needed * _SLACK:
        raise UnavailableError(
            f"{folder} needs {needed / 1e9:.1f} GB more; {free / 1e9:.1f} GB are free.",
            hint="Make room, or set models_dir in cluster.yaml to a larger file system.",
        )


def _explained(error: Exception, hf_id: str, revision: str | None) -> UnavailableError:
    errors, chain = _hub().errors, (error, error.__cause__)
    where = f"https://huggingface.co/{hf_id}"
    if any(isinstance(each, errors.GatedRepoError) for each in chain):
        return UnavailableError(f"{hf_id} is gated.", hint=f"Accept its licence at {where}, then set HF_TOKEN.")
    if any(isinstance(each, errors.RepositoryNotFoundError) for each in chain):
        return UnavailableError(f"{hf_id} does not exist, or HF_TOKEN may not see it.", hint=f"Look at {where}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return UnavailableError(f"{hf_id} has no revision {revision!r}.")
    said = str(error.__cause__ or error).splitlines() or [type(error).__name__]
    hint = "Pull where Hugging Face can be reached (HF_HUB_OFFLINE unset); files that are whole are not fetched again."
    return UnavailableError(f"{hf_id} could not be pulled: {said[0]}", hint=hint)


def _failures() -> tuple[type[Exception], ...]:
    return (
        OSError,
        ValueError,
        import_module("httpx").HTTPError,
        _hub().errors.DryRunError,
        _hub().errors.XetDownloadError,
    )


def _hub() -> Any:
    """Import huggingface_hub late (0.4 s); its signatures are partly untyped."""
    import_module("huggingface_hub.errors")
    return import_module("huggingface_hub")
