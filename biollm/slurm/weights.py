"""Downloads a model's weights from Hugging Face before a GPU waits for them, and checks whether they are complete.

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
from biollm.slurm import vllm_flags
from biollm.types import counted

_MARK = ".biollm-pull"  # in the folder from the first byte to the last
_DUPLICATES = ("original/*", "onnx/*", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.ckpt")
_SLACK = 1.02  # of the bytes to come, for the file system's own


def present(model: Model, cluster: Cluster) -> Path | str:
    """Return the folder of the weights, or one sentence: what is missing, and the command that fixes it."""
    folder = weights_dir(model, cluster)
    fix = f"Run `biollm pull {model.key}`." if not model.path else "Put them there, or correct `path`."
    incomplete = f"The weights of {model.key} in {folder} are incomplete"
    if not (folder / "config.json").is_file():
        return f"The weights of {model.key} are not in {folder}. {fix}"
    if (folder / _MARK).exists():
        return f"{incomplete}: a download was interrupted. {fix}"
    shards = {path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(pattern)}
    needed: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            needed |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{incomplete}: {index.name} is broken. {fix}"
    if missing := sorted(needed - shards):
        return f"{incomplete}: {counted(len(missing), 'file')} missing, such as {missing[0]}. {fix}"
    for name, adapter in vllm_flags.adapters(model.vllm_args):
        if not (Path(adapter) / "adapter_model.safetensors").is_file():
            return f"There is no adapter_model.safetensors in {adapter}. Correct `lora` of {name}, or remove {name}."
    return folder if shards else f"There is no weights file in {folder}. {fix}"


def pull(model: Model, cluster: Cluster, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Download the weights of `model`, or what is still missing of them, and return their folder.

    The commit of its revision is fixed for the whole download, and written to `.biollm-commit`. `progress` is called
    with bytes (done, total) at the start and the end; in between huggingface_hub draws its own bars, on a terminal only.
    """
    folder = weights_dir(model, cluster)
    if model.path or not model.hf_id:
        raise UsageError(f"{model.key} has its weights in `path`: {folder}. There is nothing to download.")
    if not sys.stderr.isatty():
        import_module("huggingface_hub.utils").disable_progress_bars()
    # cache_dir gets a note of the revision's commit only, but the default is in $HOME
    files = _snapshot(model.hf_id, folder, folder / ".cache", revision=model.revision, dry_run=True)
    ignored = _ignored([file.filename for file in files])
    files = [file for file in files if not any(fnmatch(file.filename, pattern) for pattern in ignored)]
    if not files:
        raise UnavailableError(f"{model.hf_id} holds no files.")
    _refuse_to_replace(folder, [file.filename for file in files], model)
    total = sum(file.file_size or 0 for file in files)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    _check_space(folder, missing)
    progress(total - missing, total)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
    except OSError as error:
        hint = "Set models_dir in cluster.yaml to a folder that you may write."
        raise UnavailableError(f"{folder} cannot be written: {error.strerror}.", hint=hint) from error
    commit = files[0].commit_hash
    _snapshot(model.hf_id, folder, folder / ".cache", revision=commit, ignore_patterns=ignored)
    (folder / ".biollm-commit").write_text(f"{commit}\n")
    (folder / _MARK).unlink(missing_ok=True)
    progress(total, total)
    return folder


def published_config(hf_id: str, path: Path | None = None) -> dict[str, Any]:
    """Return a model's config.json: `path` (the file, or the folder it is in), or from Hugging Face."""
    if path is None:
        with TemporaryDirectory() as folder:  # not hf_hub_download: it retries for 24 s without an answer
            _snapshot(hf_id, Path(folder), Path(folder), allow_patterns="config.json")
            return published_config(hf_id, Path(folder))
    file = path / "config.json" if path.is_dir() else path
    try:
        published: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(published, dict):
        raise UsageError(f"{file} is not a model's config.json.")
    return published  # pyright: ignore[reportUnknownVariableType]


def _snapshot(hf_id: str, folder: Path, cache: Path, *, revision: str | None = None, **options: Any) -> Any:
    """Download a repository, or list its files with dry_run; raises `UnavailableError` with the reason."""
    hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")  # late: 0.4 s
    failures = (OSError, ValueError, import_module("httpx").HTTPError, errors.DryRunError, errors.XetDownloadError)
    options |= {"endpoint": os.environ.get("HF_ENDPOINT"), "local_dir": folder, "cache_dir": cache}
    try:
        return hub.snapshot_download(hf_id, revision=revision, **options)
    except failures as error:
        chain, page = (error, error.__cause__), f"https://huggingface.co/{hf_id}"
        for kind, message, hint in (
            (errors.GatedRepoError, "is gated.", f"Accept its licence at {page}, then set HF_TOKEN."),
            (errors.RepositoryNotFoundError, "does not exist, or HF_TOKEN has no access to it.", f"See {page}."),
            (errors.RevisionNotFoundError, f"has no revision {revision!r}.", None),
        ):
            if any(isinstance(each, kind) for each in chain):
                raise UnavailableError(f"{hf_id} {message}", hint=hint) from error
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        hint = "Run this where Hugging Face can be reached (HF_HUB_OFFLINE unset); complete files are kept."
        raise UnavailableError(f"{hf_id} could not be downloaded: {lines[0]}", hint=hint) from error


def _refuse_to_replace(folder: Path, coming: list[str], model: Model) -> None:
    """Refuse to replace files that were not downloaded by biollm or huggingface_hub, which keeps metadata of each."""
    notes = folder / ".cache" / "huggingface" / "download"
    others = [name for name in coming if (folder / name).exists() and not (notes / f"{name}.metadata").exists()]
    if others and not ((folder / _MARK).exists() or (folder / ".biollm-commit").exists()):
        raise UnavailableError(
            f"{folder} holds files that biollm did not put there: {len(others)} would be replaced, such as {others[0]}.",
            hint=f"Move the folder away, or name it as `path` of {model.key} in models.yaml.",
        )


def _ignored(names: list[str]) -> list[str]:
    patterns = [*_DUPLICATES]
    if any(name.endswith(".safetensors") for name in names):
        patterns += ["*.bin", "*.pt"]
    if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        patterns.append("consolidated*")
    return patterns


def _check_space(folder: Path, needed: int) -> None:
    """Refuse a download for which there is not enough free space; quotas are unknown."""
    parts = (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete")
    needed -= sum(part.stat().st_size for part in parts)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed * _SLACK:
        raise UnavailableError(
            f"{folder} needs {needed / 1e9:.1f} GB more; {free / 1e9:.1f} GB are free.",
            hint="Free some space, or set models_dir in cluster.yaml to a larger file system.",
        )
