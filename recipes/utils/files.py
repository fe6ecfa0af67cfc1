"""Files on the disk: JSON and JSONL, hashes, writes that are whole or absent, folders that one process holds."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from recipes.utils.console import UserError, say

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)  # EBADF: a folder, over NFS
LOCKS = Path("/proc/locks")  # where Linux tells which process holds which


def file_hash(path: Path) -> str:
    """SHA-256 of a file, so that a result can be traced to the very rows it came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises `UserError` if it cannot be read, is damaged or holds no object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


@contextlib.contextmanager
def whole_file(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """Yield a text file that takes the place of `path` once it is on the disk; after an error, `path` is as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors=errors, newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there after an error alone


def write_json(path: Path, content: dict) -> None:
    """Write `content`, indented, whole or not at all; what JSON has no form for is written as its `str`."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: Path, objects: Iterable[dict]) -> None:
    """Write a line for each of `objects`, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def append_jsonl(path: Path, objects: Iterable[dict]) -> None:
    """Add a line for each of `objects` to a JSONL file, in one write."""
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects))


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a run's JSONL file, [] where there is none; a line that a kill has cut off is left out. Lines end
    at a line feed alone: answers may hold other separators, such as U+2028."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def keep_steps(path: Path, last: int) -> None:
    """Begin a run's JSONL file, or after a resume keep its lines up to the step `last`: later steps are done again."""
    write_jsonl(path, [line for line in read_jsonl(path) if line["step"] <= last])


def sync(folder: Path) -> None:
    """Bring the files of `folder`, and their names, to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists, for this process alone. The lock is the kernel's, so that none is left after a kill.
    Raises `UserError` if another process holds it. Where the file system has no locks, a line says so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                locks = LOCKS.read_text() if os.access(LOCKS, os.R_OK) else ""
                found = re.search(rf"FLOCK .* ([1-9]\d*) \S+:{folder.stat().st_ino} ", locks)
                holder = f"process (pid {found[1]})" if found else "process"
                raise UserError(f"{folder}: is in use by another {holder}; wait for it, or end it") from error
            say(f"{folder}: cannot be locked here ({error.strerror}); start no second run in it")
        yield
    finally:
        os.close(handle)
