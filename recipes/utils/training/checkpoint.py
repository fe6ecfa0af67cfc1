"""Checkpoints that are complete or absent: written under another name, listed with checksums, synced, then renamed.
A kill at any moment leaves either the whole checkpoint or none under its name; what a disk does to one later is found
by its manifest.json before training goes on from it."""

import contextlib
import hashlib
import json
import shutil
from datetime import datetime, timezone
from pathlib import Path

from recipes.utils.console import UserError, say
from recipes.utils.files import file_hash, is_within, read_json, replace_folder, write_json

MANIFEST = "manifest.json"
NEEDED = {"weights": "*model*.safetensors", "optimizer state": "optimizer*", "scheduler": "scheduler.pt",
          "random state": "rng_state*.pth", "trainer state": "trainer_state.json"}  # fmt: skip


def step_of(checkpoint: Path) -> int:
    """The step that a folder's name ends with, -1 without one."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def publish(staged: Path, checkpoint: Path, content: dict) -> None:
    """Give the folder `staged`, with its manifest, the name `checkpoint` once it is on the disk. What bears the name
    (damaged, or of steps that are done again) goes after. `content` is for the manifest: "processes" that each keep a
    random state, whether an "evaluation_due" was put off, and what the "run" is made of."""
    files = {str(path.relative_to(staged)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
             for path in sorted(staged.rglob("*")) if path.is_file()}  # fmt: skip
    written = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    manifest = {"step": step_of(checkpoint), "written": written, **content, "files": files}
    write_json(staged / MANIFEST, manifest | {"sha256": _digest(manifest)})
    for name in files:  # safetensors writes for its own user alone
        (staged / name).chmod((staged / MANIFEST).stat().st_mode)
    replace_folder(staged, checkpoint)


def read_manifest(checkpoint: Path) -> dict:
    """What `publish` wrote. Raises FileNotFoundError, or `UserError` if it is damaged."""
    path = Path(checkpoint) / MANIFEST
    path.stat()
    manifest = read_json(path, {"files": dict, "processes": int | None, "run": dict | None})
    if manifest.pop("sha256", None) != _digest(manifest):
        raise UserError(f"{path}: is damaged (its checksum differs)")
    return manifest


def fault(checkpoint: Path) -> str | None:
    """Why training cannot go on from `checkpoint`; None if it is complete and every file is as it was written."""
    try:
        files = (manifest := read_manifest(checkpoint))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items() if is_within(name)}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its writing was cut off, or these recipes did not write it"
    except (UserError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for what, pattern in NEEDED.items():
        if not any(Path(name).match(pattern) for name in expected):
            return f"it holds no {what}"
    if sum(name.startswith("rng_state") for name in files) < (manifest.get("processes") or 1):
        return "it holds no random state of some processes"
    for name, (size, digest) in expected.items():
        try:
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if file_hash(checkpoint / name) != digest:
                return f"{name} is not what was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint in `folder` of the highest step, if there is one; says which, and why no later one."""
    for left in folder.glob(".old-checkpoint-*"):
        with contextlib.suppress(OSError):  # its successor stands, and it is left for `clear` to delete
            left.rename(left.with_name(left.name.removeprefix(".old-")))
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        why = fault(checkpoint)
        say(f"resume: {checkpoint} is passed over: {why}" if why else f"resume: going on from {checkpoint}")
        if why is None:
            return checkpoint
    say(f"resume: there is no complete checkpoint in {folder}; the run begins at its first step")
    return None


def clear(folder: Path, step: int) -> None:
    """Remove what a killed process has left in `folder`, and set aside the checkpoints beyond `step`, damaged or of a
    course that was given up: they would pass for the newest ones."""
    for left in folder.glob(".*.tmp"):
        left.unlink()
    for left in (folder / ".saving", folder / ".adapter", *folder.glob(".old-checkpoint-*")):
        shutil.rmtree(left, ignore_errors=True)
    for later in [path for path in folder.glob("checkpoint-*") if step_of(path) > step]:
        unused = later.with_name(f"unused-{later.name}")
        shutil.rmtree(unused, ignore_errors=True)
        later.rename(unused)
        say(f"resume: {later} is kept as {unused.name}")


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
