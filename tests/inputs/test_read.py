"""Files, pipes and work folders are read once; what is not text is refused by its kind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from biollm.errors import UsageError
from biollm.inputs.read import Input, _Source, read_input

TEXT = "".join(f"line {n}\n" for n in range(3000)) + "Killed\n"


def whole(read: Input) -> str:
    cut = read.digest.cut(1_000_000)
    assert cut.whole
    return cut.text


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text(TEXT)
    read = read_input(tmp_path / "x.log")
    assert (read.name, read.notes, read.empty, whole(read)) == ("x.log", (), False, TEXT)


def test_a_pipe_is_read_by_its_descriptor_which_stays_open() -> None:
    out, into = os.pipe()
    os.write(into, b"Killed\n")
    os.close(into)
    read = read_input(out)
    assert (read.name, whole(read)) == (f"file descriptor {out}", "Killed\n")
    os.close(out)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_compressed_text_is_unpacked(pack: object, tmp_path: Path) -> None:
    (tmp_path / "x.log.z").write_bytes(pack(TEXT.encode()))  # type: ignore[operator]
    read = read_input(tmp_path / "x.log.z")
    assert (read.notes, whole(read)) == ((), TEXT)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_what_is_left_of_compressed_text_is_used(pack: object, tmp_path: Path) -> None:
    noise = "".join(f"{n * 7919 % 99991}\n" for n in range(200_000))
    (tmp_path / "x.log.z").write_bytes(pack(noise.encode())[:-1000])  # type: ignore[operator]
    read = read_input(tmp_path / "x.log.z")
    assert read.digest.lines > 50_000 or pack is lzma.compress
    assert "was read only in part" in read.notes[0]


def test_trailing_garbage_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(TEXT.encode()) + b"garbage")
    read = read_input(tmp_path / "x.gz")
    assert whole(read) == TEXT
    assert "damaged" in read.notes[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_read_with_and_without_a_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(TEXT.encode(encoding))
    read = read_input(tmp_path / "x.log")
    assert (read.notes, whole(read)) == (("x.log was read as UTF-16.",), TEXT)


def test_latin_1_is_read_beside_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes("größer\n".encode("latin-1") + "größer\n".encode())
    read = read_input(tmp_path / "x.log")
    assert read.notes == ("x.log is not all UTF-8; the rest was read as Latin-1.",)
    assert whole(read) == "größer\ngrößer\n"


def test_a_mark_of_utf_8_and_leading_nuls_go(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(b"\xef\xbb\xbfKilled\n")
    assert whole(read_input(tmp_path / "x.log")) == "Killed\n"
    (tmp_path / "y.log").write_bytes(bytes(100_000) + b"Killed\n")
    assert whole(read_input(tmp_path / "y.log")) == "Killed\n"


NOISE = bytes(range(256)) * 20
TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as _tar:
    _tar.addfile(tarfile.TarInfo("x"))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(b"BAM\1" + NOISE), "BAM"),
        (gzip.compress(NOISE), "gzip of binary data"),
        (gzip.compress(TAR.getvalue()), "gzip of tar"),
        (lzma.compress(b"\x89HDF" + NOISE), "xz of HDF5"),
        (b"CRAM\3\0" + NOISE, "CRAM"),
        (b"%PDF-1.7\n% all text so far\n", "PDF"),
        (b"PK\3\4" + NOISE, "ZIP"),
        (b"\x89PNG\r\n\x1a\n" + NOISE, "PNG image"),
        (b"\x28\xb5\x2f\xfd" + NOISE, "Zstandard"),
        (NOISE, "binary data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip holds the time
)
def test_what_is_not_text_is_refused_by_its_kind(data: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(UsageError, match=rf"(?m)^x\.bin is not text \({kind}\)\.$"):
        read_input(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "text", ["CRAM files were read\n", "GIF8 BZh CDF\n", "\x1b[31mred\x1b[0m\r\n", "日本語\n", "a\b\bb\n", "x"]
)
def test_text_that_looks_like_a_kind_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    assert not read_input(tmp_path / "x").empty


def test_an_empty_file_is_noted_and_the_null_device_is_not(tmp_path: Path) -> None:
    (tmp_path / "x.log").touch()
    read = read_input(tmp_path / "x.log")
    assert (read.empty, read.notes) == (True, ("x.log is empty.",))
    read = read_input(Path("/dev/null"))
    assert (read.empty, read.notes) == (True, ())


def test_what_cannot_be_read_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.log").touch()
    with pytest.raises(UsageError, match=r"(?m)/run\.lgo: No such file or directory\.$") as caught:
        read_input(tmp_path / "run.lgo")
    assert caught.value.hint == "Did you mean run.log?"
    with pytest.raises(UsageError, match=r"(?m): Is a directory\.$") as caught:
        read_input(tmp_path)
    assert caught.value.hint == f"Did you mean {tmp_path}/run.log?"
    closed = os.open(tmp_path, os.O_RDONLY)
    os.close(closed)
    with pytest.raises(UsageError, match=rf"^file descriptor {closed}: Bad file descriptor"):
        read_input(closed)
    with pytest.raises(UsageError, match="xxx: File name too long"):
        read_input(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_file_of_another_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.log").touch(mode=0)
    with pytest.raises(UsageError, match=r"x\.log: Permission denied"):
        read_input(tmp_path / "x.log")


def work(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / (".exitcode" if name == "exitcode" else f".command.{name}")).write_text(text)
    return folder


def test_a_work_folder_is_read_under_nextflows_headings(tmp_path: Path) -> None:
    folder = work(tmp_path / "work/ab/12cd34e77aa1", sh="STAR x", err="Killed\n", out="", run="#", exitcode="137\n")
    for path in (folder, tmp_path / "work/ab/12cd34", tmp_path / "work/ab/12cd34..."):
        read = read_input(path)
        assert (read.name, read.notes) == ("ab/12cd34", ())
        assert whole(read) == ("Command executed:\nSTAR x\n\nCommand error:\nKilled\n\n\nCommand exit status: 137\n")


def test_a_work_folder_of_a_task_that_was_killed_has_no_exit_status(tmp_path: Path) -> None:
    folder = work(tmp_path / "ab/12cd34e77aa1", sh="STAR x")
    (folder / ".command.out").write_bytes(gzip.compress(NOISE))
    read = read_input(folder)
    assert "Command exit status: none: the task is running, or was killed" in whole(read)
    assert read.notes == (".command.out is not text (gzip of binary data).",)


def test_a_log_that_grows_while_it_is_read_ends_where_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(TEXT)
    source = _Source(log)
    chunks = source.chunks()
    first = next(chunks)
    with log.open("a") as more:
        more.write("later\n" * 1000)
    log.unlink()
    assert (first + b"".join(chunks)).decode() == TEXT


def test_nothing_of_it_is_kept_open(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(TEXT.encode()))
    before = sorted(Path("/proc/self/fd").iterdir())
    read_input(tmp_path / "x.gz")
    assert sorted(Path("/proc/self/fd").iterdir()) == before
