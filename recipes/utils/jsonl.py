"""JSONL files as a stream of objects, each with its file and line, read strictly: what is wrong is told, not guessed."""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

from recipes.utils.console import UserError


class BadRow(ValueError):
    """What is wrong with one row: `kind` is what rows are counted by, the message says where and how to mend it."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def data_files(paths: str | list[str]) -> list[Path]:
    """The files that a path, a list or a glob names, in order. Raises `UserError` for one that is not there."""
    files = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        is_glob = any(mark in pattern for mark in "*?[") and not Path(pattern).exists()
        matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        if not matches:
            raise UserError(f"{pattern}: no file matches")
        for name in matches:
            if not Path(name).is_file():
                hint = " (it is a folder; name the files: *.jsonl)" if Path(name).is_dir() else ""
                raise UserError(f"{name}: no such data file{hint}; paths are relative to where the command runs")
            if not os.access(name, os.R_OK):
                raise UserError(f"{name}: cannot be read: permission denied")
            files.append(Path(name))
    return files


def file_hash(path: Path) -> str:
    """SHA-256 of a file, so that a result can be traced to the very rows it came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}") from error


def append_lines(path: Path, objects: list[dict]) -> None:
    """Add a line for each of `objects` to a JSONL file, in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects))


def keep_steps(path: Path, last: int) -> None:
    """Begin a run's JSONL file, or after a resume keep its lines up to the step `last`: later steps are done again. A line
    that a kill has cut off goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= last:
                kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


def read_lines(path: Path):
    """Yield (file:line, object or `BadRow`, the line's text) for each line that is not blank; (file:line, None, "") for
    one that is. One line is held at a time."""
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        lines = iter(file)
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be read after line {number}: {error}") from error
            number += 1
            where, text = f"{path}:{number}", ""
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                yield where, _parse(text, number) if text.strip() else None, text
            except UnicodeDecodeError as error:
                mend = "save the file as UTF-8"
                yield where, BadRow("not UTF-8", f"not UTF-8 at byte {error.start + 1}; {mend}"), repr(line)
            except BadRow as error:
                yield where, error, text


def _parse(text: str, number: int) -> dict:
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; write one object a line, not an array" if number == 1 and text.lstrip()[0] == "[" else ""
        hint = hint or "; mend this line, or remove it"
        raise BadRow("not JSON", f"not JSON: {error.msg} (column {error.colno}){hint}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BadRow("not JSON", f"not JSON that can be read: {error}; remove the line") from error
    if not isinstance(row, dict):
        raise BadRow("not an object", f"expected a JSON object, found {type(row).__name__}; write one object a line")
    # Only such text can hold what no tokenizer takes, so other rows are spared the search.
    if "\\u" in text or "\0" in text:
        check_characters(row)
    return row


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow("duplicate key", f"{twice}: the key stands twice in one object; keep one")
    return found


def check_characters(value, path: str = "") -> None:
    """Raise a `BadRow` where a text within `value` holds what no tokenizer takes."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_characters(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, part in enumerate(value, start=1):
            check_characters(part, f"{path}[{number}]")
    elif isinstance(value, str):
        if "\0" in value:
            raise BadRow("NUL", f"{path}: holds a NUL character; remove it")
        if lone := re.search("[\ud800-\udfff]", value):
            raise BadRow(
                "lone surrogate",
                f"{path}: holds half a character (\\u{ord(lone.group()):x}); the text was cut "
                "inside an emoji or the like: write it whole, or remove it",
            )
