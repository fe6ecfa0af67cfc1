"""Prepared rows on the disk, found again by content: an edit is noticed, an unchanged file costs only its reading."""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from pathlib import Path

import recipes.utils
from recipes.utils.console import UserError, say

import datasets

UNUSED = 30 * 24 * 3600  # seconds


def cached(key: str, write) -> tuple[datasets.Dataset, dict]:
    """(rows, memory-mapped; counts) of the entry `key`. Where there is none, or a damaged one, `write(path)` makes the
    Arrow file and returns the counts; one process of a machine does, and the others wait for it."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora-recipes" / key
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        # A barrier would give up after its timeout; where the one process fails, the launcher ends this one.
        while not (kept := _kept(folder)):
            time.sleep(0.2)
        return kept
    if kept := _kept(folder):
        return kept
    if folder.exists() and not _kept(folder):
        say(f"rows are prepared again: those in {folder} are damaged")
        shutil.rmtree(folder, ignore_errors=True)
    temporary = folder.with_name(f"{key}.{platform.node()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        counts = write(temporary / "rows.arrow")
        (temporary / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was faster; its rows are the same
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder.parent)
    if not (kept := _kept(folder)):
        raise UserError(f"{folder}: these prepared rows are damaged and cannot be replaced; remove the folder")
    return kept


def _kept(folder: Path) -> tuple[datasets.Dataset, dict] | None:
    """(rows, counts) of a cache entry; None if there is none, or a damaged one."""
    try:
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        return None
    with contextlib.suppress(OSError):  # in a cache that one may only read
        os.utime(folder)  # used today
    return rows, counts


def _prune(cache: Path) -> None:
    """Remove entries that nobody used for a month: each edit of a file or a setting leaves one. Runs that have them open
    keep them."""
    for entry in cache.iterdir():
        with contextlib.suppress(OSError):  # another process removes it, too
            if time.time() - entry.stat().st_mtime > UNUSED:
                shutil.rmtree(entry)


def content_key(files: dict[str, str], tokenizer, settings: list) -> str:
    """A digest of all that prepared rows depend on: `files` ({path: digest}), template, tokenizer, `settings` and this code."""
    digest = hashlib.sha256(repr([datasets.__version__, *settings]).encode())
    for module in sorted(Path(recipes.utils.__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    if "strftime_now" in tokenizer.chat_template:
        digest.update(str(datetime.date.today()).encode())  # such a template writes the date
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr([tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())]).encode())
    digest.update(repr(files).encode())
    return digest.hexdigest()[:32]
