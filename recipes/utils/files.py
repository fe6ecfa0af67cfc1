"""Files on the disk: JSON and JSONL, hashes, writes that are whole or absent, folders that one process holds."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from recipes.utils.console import UserError, say

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)  # EBADF: a folder, over NFS
LOCKS = Path("/proc/locks")  # where Linux tells which process holds which


def file_hash(path: Path) -> str:
    """SHA-256 of a file, so that a result can be traced to the very rows it came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, kinds: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """The object in a JSON file, whose values are of the `kinds` that its reader needs: {"model.revision": str | None}.
    Raises `UserError` if it cannot be read, is damaged or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    for key, kind in kinds.items():
        value: Any = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) not in getattr(kind, "__args__", (kind,)):  # exactly: a bool is no int here
            found = "missing" if value is None else f"{json.dumps(value)[:40]}"
            raise UserError(f"{path}: `{key}` is {found}, not {getattr(kind, '__name__', kind)}")
    return content


def record_of(folder: Path, kinds: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """The run.json in a run's folder, {} where there is none. Raises as `read_json` does."""
    path = Path(folder) / "run.json"
    return read_json(path, kinds) if path.is_file() else {}


def is_within(name: object) -> bool:
    """True for a path that leads nowhere out of its folder, the only kind that an index or a manifest gives."""
    return isinstance(name, str) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts


def own_file(path: Path) -> Path:
    """`path`, to be copied. Raises `UserError` for a link out of its folder, but to the own blobs of a hub snapshot."""
    real, folder = path.resolve(), path.parent.resolve()
    own_blob = real.parent.name == "blobs" and real.parents[1:2] == folder.parents[1:2]
    if real.parent != folder and not own_blob:
        raise UserError(f"{path}: is a link out of its folder, so it is not copied; put the file itself there")
    return path


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
    """The objects of a run's JSONL file, [] where there is none; a line that a kill has torn is left out. Lines end at
    a line feed alone: answers may hold other separators, such as U+2028."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return [item for item in found if isinstance(item, dict)]


def keep_steps(path: Path, last: int, again: Callable[[dict], bool] = lambda line: False) -> None:
    """Begin a run's JSONL file, or keep its lines up to the step `last`, but for those that are written `again`."""
    steps = ((line, line.get("step")) for line in read_jsonl(path))
    write_jsonl(path, (line for line, step in steps if isinstance(step, int) and step <= last and not again(line)))


def replace_folder(new: Path, folder: Path) -> None:
    """Give the folder `new` the name `folder` once it is on the disk; what bears the name goes after."""
    sync(new)
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(folder)
        raise
    sync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def adapter_sha256(folder: Path) -> str | None:
    """The SHA-256 of the adapter's weights in `folder`, None where there are none."""
    path = Path(folder) / "adapter_model.safetensors"
    return file_hash(path) if path.is_file() else None


def evaluation_of(run_folder: Path) -> Path | None:
    """RUN/evaluation, if it is there and of the adapter that RUN holds, if any; a line says where it is of another."""
    folder = Path(run_folder) / "evaluation"
    if not (folder / "metrics.json").is_file():
        return None
    of = read_json(folder / "metrics.json", {"of": dict | None, "report": dict | None}).get("of") or {}
    now = adapter_sha256(run_folder)
    if now is None or of.get("adapter_sha256") in (None, now):  # None: an older version wrote it
        return folder
    say(f"{folder}: is of another adapter than the one in {run_folder}, so it is not shown; evaluate again")
    return None


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
