"""Files are whole or absent, readable by whoever may read the folder, and a folder is held by one process."""

import contextlib
import errno
import hashlib
import os
import subprocess
import sys

import pytest

from recipes.utils import files
from recipes.utils.console import UserError
from recipes.utils.files import (
    append_jsonl,
    file_hash,
    keep_steps,
    locked,
    own_file,
    read_json,
    read_jsonl,
    replace_folder,
    whole_file,
    write_json,
    write_jsonl,
)  # fmt: skip

ROWS = [{"step": 1, "text": "a\u2028b\x85c"}, {"step": 2, "text": "ü 🙂"}, {"step": 3, "text": ""}]


def test_a_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (3 << 20))
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"x" * (3 << 20)).hexdigest()


def test_json_is_written_whole_and_read_again(tmp_path):
    write_json(tmp_path / "a.json", {"b": "ü", "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"b": "ü", "path": str(tmp_path)}
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"[1]", "holds no JSON object"),
        (b"\xff{}", "is no JSON"),
        (None, "cannot be read"),
        (b'{"a": ' + b"[" * 100_000, "is no JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is no JSON"),
    ],
)
def test_json_that_is_none_is_a_user_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.json: {message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("value", "fits"),
    [(1, True), (None, True), (True, False), ("1", False), ([1], False), ({}, False), (1.0, False)],
)
def test_a_value_of_another_type_is_an_error_of_the_file(tmp_path, value, fits):
    write_json(tmp_path / "a.json", {"part": {"number": value}})
    with (
        contextlib.nullcontext() if fits else pytest.raises(UserError, match=r"a\.json: `part\.number` is .*, not int")
    ):
        assert read_json(tmp_path / "a.json", {"part.number": int | None}) == {"part": {"number": value}}


def test_what_is_copied_is_no_link_out_of_its_folder(tmp_path):
    hub = tmp_path / "models--a--b"
    snapshot, own, other = hub / "snapshots" / "0", hub / "blobs" / "1", tmp_path / "models--c--d" / "blobs" / "2"
    for folder in (snapshot, own.parent, other.parent):
        folder.mkdir(parents=True)
    for path in (own, other, tmp_path / "private", snapshot / "plain"):
        path.write_text("text")
    for name, target in (
        ("own", "../../blobs/1"),
        ("beside", "plain"),
        ("other", other),
        ("out", tmp_path / "private"),
    ):
        (snapshot / name).symlink_to(target)
    for name in ("plain", "beside", "own"):
        assert own_file(snapshot / name).read_text() == "text"
    for name in ("other", "out"):
        with pytest.raises(UserError, match=f"{name}: is a link out of its folder"):
            own_file(snapshot / name)


def test_a_folder_takes_the_place_of_another_or_all_stays_as_it_was(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    (tmp_path / ".old-final").mkdir()  # left by a kill
    (tmp_path / "old").rename(tmp_path / "final")
    rename = type(tmp_path).rename

    def refuse(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "rename", refuse)
        with pytest.raises(OSError, match="Input/output"):
            replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "text").read_text() == "old"
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["final"]


def test_after_an_error_a_file_is_as_it_was_and_nothing_lies_beside_it(tmp_path):
    write_json(tmp_path / "a.json", {"old": True})
    loop = {}
    loop["loop"] = loop
    for write in (write_json, lambda path, content: write_jsonl(path, [{"fine": 1}, content])):
        with pytest.raises(ValueError, match="Circular"):
            write(tmp_path / "a.json", loop)
    with contextlib.suppress(ZeroDivisionError), whole_file(tmp_path / "a.json") as file:
        file.write("half")
        raise ZeroDivisionError
    assert read_json(tmp_path / "a.json") == {"old": True}
    assert os.listdir(tmp_path) == ["a.json"]


def test_lines_are_written_appended_and_read_whatever_separators_they_hold(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    write_jsonl(path, ROWS[:1])
    append_jsonl(path, ROWS[1:])
    assert read_jsonl(path) == ROWS
    path.write_bytes(path.read_bytes()[:-3])
    assert read_jsonl(path) == ROWS[:2]


def test_a_resume_keeps_the_steps_that_are_not_done_again(tmp_path):
    path = tmp_path / "a.jsonl"
    keep_steps(path, 0)
    assert path.read_text() == ""
    write_jsonl(path, ROWS)
    with open(path, "ab") as file:
        file.write(b'null\n{"step": null}\n3\n{"step": 2, "te' + "ü".encode()[:1])
    keep_steps(path, 2)
    assert read_jsonl(path) == ROWS[:2]
    keep_steps(path, 2, lambda line: line["step"] == 2)
    assert read_jsonl(path) == ROWS[:1]


HOLD = """
import sys
from pathlib import Path
from recipes.utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_and_free_after_a_kill(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is in use by another process") as error, locked(tmp_path):
        pass
    assert len(str(error.value).splitlines()) == 1
    other.kill()
    other.communicate()
    for _ in range(2):
        with locked(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


def test_the_holder_is_named_where_the_kernel_tells(tmp_path, monkeypatch):
    inode = tmp_path.stat().st_ino
    locks = tmp_path / "locks"
    locks.write_text(
        f"1: FLOCK  ADVISORY  WRITE 41 08:01:{inode}1 0 EOF\n2: FLOCK  ADVISORY  WRITE 42 08:01:{inode} 0 EOF\n"
    )
    monkeypatch.setattr(files, "LOCKS", locks)
    with locked(tmp_path):
        with pytest.raises(UserError, match=r"is in use by another process \(pid 42\);"), locked(tmp_path):
            pass
        locks.unlink()
        with pytest.raises(UserError, match="is in use by another process;"), locked(tmp_path):
            pass


def test_where_a_file_system_has_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "cannot be locked here (No locks available); start no second run in it" in capsys.readouterr().out
