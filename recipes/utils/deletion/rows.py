"""Which rows a deletion request means: by line, by fingerprint or by text, with their copies and near copies."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.utils.console import UserError, find_data_files
from recipes.utils.data import (
    NEAR,
    Chat,
    DataOptions,
    Reading,
    fingerprint,
    fingerprint_text,
    signature,
    stream_chats,
    train_paths,
)
from recipes.utils.files import read_json


class Found(NamedTuple):
    """`rows` are those that were asked for, `copies` the others with a fingerprint of theirs (equal but for case, space
    and punctuation), `near` the (file:line, file:line of a row, share of three-word runs in common) of what is alike;
    `total` is the number of all rows in the run's train and validation files."""

    rows: list[Chat]
    copies: list[Chat]
    near: list[tuple[str, str, float]]
    total: int

    @property
    def fingerprints(self) -> set[int]:
        return {fingerprint(chat) for chat in self.rows}


def find_rows(record: dict, lines: list[str], match: str | None = None) -> Found:
    """The rows of the run of `record` (its run.json) that `lines` name, each a file:line or a fingerprint, or whose
    text holds `match`. Raises `UserError` for a line that names none, or one in several files."""
    chats = list(chats_of(record))
    wanted = {chat.where for chat in chats if match is not None and _holds(chat, match)}
    if match is not None and not wanted:
        raise UserError(f"--match {match!r}: no row of the run holds this text")
    for line in lines:
        hits = {chat.where for chat in chats if line == fingerprint_text(fingerprint(chat))}
        hits = hits or {chat.where for chat in chats if chat.where == line}
        hits = hits or {chat.where for chat in chats if chat.where.endswith(f"/{line}")}
        if not hits:
            form = "" if re.search(r":\d+$|^[0-9a-f]{16}$", line) else "; a row is named by file:line"
            raise UserError(f"{line}: names no row of the run's train and validation files{form}")
        if len({where.rpartition(":")[0] for where in hits}) > 1 and not re.fullmatch("[0-9a-f]{16}", line):
            raise UserError(f"{line}: is in several files: {', '.join(sorted(hits))}; name one of them")
        wanted |= hits
    rows = [chat for chat in chats if chat.where in wanted]
    known = {fingerprint(chat) for chat in rows}
    copies = [chat for chat in chats if chat.where not in wanted and fingerprint(chat) in known]
    gone = wanted | {chat.where for chat in copies}
    return Found(rows, copies, _near(rows, [chat for chat in chats if chat.where not in gone]), len(chats))


def run_files(record: dict) -> list[str]:
    """The train and validation files of the run of `record`."""
    options = DataOptions(**record["data"])
    paths = train_paths(options.train)
    if isinstance(options.validation, (str, list)):
        paths += [options.validation] if isinstance(options.validation, str) else options.validation
    return list(dict.fromkeys(map(str, find_data_files(paths))))


def chats_of(record: dict, files: str | list[str] | None = None) -> Iterator[Chat]:
    """The chats of `files`, of those of the run without them, as the run read them, one at a time."""
    return stream_chats(files or run_files(record), Reading(), record["data"].get("system") == "merge")


def _holds(chat: Chat, text: str) -> bool:
    calls = [json.dumps(message.get("tool_calls"), ensure_ascii=False) for message in chat.messages]
    return any(text in message["content"] for message in chat.messages) or any(text in call for call in calls)


def _near(rows: list[Chat], others: list[Chat]) -> list[tuple[str, str, float]]:
    """Of `others`, what is nearly one of `rows`, by the share of equal MinHash values (Broder 1997)."""
    signed = np.array([signature(chat) for chat in rows], np.uint32)
    found = []
    for chat in others:
        shares = (signed == np.array(signature(chat), np.uint32)).mean(1)
        if shares.max() >= NEAR:
            found.append((chat.where, rows[int(shares.argmax())].where, float(shares.max())))
    return sorted(found, key=lambda pair: -pair[2])


def check_parents(record: dict, found: Found) -> None:
    """Raise `UserError` if the run went on from one that was trained on the rows too: there they are still learnt."""
    parent = record.get("continues") or {}
    if not parent:
        return
    folder = Path(parent["run"])
    folder = folder.parent if folder.name.startswith("checkpoint-") else folder
    if not (folder / "run.json").is_file():
        raise UserError(f"the run goes on from {folder}, which is not there to see whether the rows are learnt in it")
    before = read_json(folder / "run.json")
    known = {fingerprint(chat) for chat in chats_of(before)}
    if held := [chat.where for chat in found.rows if fingerprint(chat) in known]:
        first = f"forget them there first, then train this run anew with --model.adapter of what that gives: {held[0]}"
        raise UserError(f"the run goes on from {folder}, which was trained on {len(held)} of the rows; {first}")
    check_parents(before, found)
