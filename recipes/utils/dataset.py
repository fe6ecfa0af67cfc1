"""Rows to checked chats: every shape becomes one list of `messages`, every bad row is told as file:line with the mend."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from recipes.utils.console import UserError
from recipes.utils.jsonl import BadRow, data_files, read_lines
from recipes.utils.row_shapes import MESSAGE_KEYS, SHAPES, check_message, check_tools, row_shape, turns_of

MOST_ERRORS = 20


class Chat(NamedTuple):
    """A checked conversation that ends with an answer: `messages` of {"role", "content"} and, where they are there,
    "tool_calls" and "weight"; `where` is its file:line; `tools` are function schemas, or None."""

    messages: list[dict]
    where: str
    tools: list[dict] | None = None
    line: str = ""  # the row as it stands in the file


@dataclass
class Report:
    """What reading found beside the chats, for the run table and the error."""

    shapes: Counter = field(default_factory=Counter)
    ignored_keys: Counter = field(default_factory=Counter)
    trimmed: int = 0
    blank: int = 0
    bad: list[dict] = field(default_factory=list)  # {"where", "kind", "error", "line"}

    def add_bad(self, where: str, error: BadRow, line: str = "") -> None:
        self.bad.append({"where": where, "kind": error.kind, "error": str(error), "line": line})

    def raise_if_bad(self) -> None:
        """Raise a `UserError` with the first bad rows and a count by kind."""
        if not self.bad:
            return
        lines = [f"{row['where']}: {row['error']}" for row in self.bad[:MOST_ERRORS]]
        if len(self.bad) > 1:
            kinds = ", ".join(
                f"{count:,} {kind}" for kind, count in Counter(row["kind"] for row in self.bad).most_common()
            )
            more = f"{len(self.bad) - MOST_ERRORS:,} more; " if len(self.bad) > MOST_ERRORS else ""
            lines.append(
                f"{more}{len(self.bad):,} bad rows in all: {kinds}. To train without them: --data.on_bad_row skip"
            )
        raise UserError("\n".join(lines))


def stream_chats(paths: str | list[str], report: Report, merge_system: bool = False):
    """Yield each chat of JSONL files (paths, globs, .gz), one in memory at a time; the rest goes to `report`.

    `merge_system` moves system messages into the user turn that follows, for templates that have no place for them.
    """
    for path in data_files(paths):
        rows = 0
        for where, row, line in read_lines(path):
            if row is None:
                report.blank += 1
                continue
            rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                yield _chat(row, where, report, merge_system)._replace(line=line)
            except BadRow as error:
                report.add_bad(where, error, line)
        if not rows:
            raise UserError(f"{path}: has no rows; one JSON object a line is expected")


def read_chats(paths: str | list[str], merge_system: bool = False) -> list[Chat]:
    """All chats of JSONL files; raises a `UserError` that lists the bad rows."""
    report = Report()
    chats = list(stream_chats(paths, report, merge_system))
    report.raise_if_bad()
    return chats


def held_out(chat: Chat, share: float, seed: int) -> bool:
    """True if `chat` belongs to the validation share: decided by its own text, so that a file is never held in memory,
    rows that are added later move no other row, and copies of a row stand on one side."""
    digest = hashlib.blake2b(f"{seed}{json.dumps(chat.messages, sort_keys=True)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _chat(row: dict, where: str, report: Report, merge_system: bool) -> Chat:
    shape = row_shape(row)
    messages = [check_message(turn, number) for number, turn in enumerate(turns_of(row, shape), start=1)]
    if merge_system:
        messages = _merge_system(messages)
    if any(message["role"] == "system" for message in messages[1:]):
        raise BadRow("system not first", "a system message is not the first one; move it there, or --data.system merge")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no answer", "no assistant turn, so there is nothing to learn; add one")
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise BadRow("no answer", "every answer has weight 0, so there is nothing to learn; remove the row")
    report.shapes[shape] += 1
    report.ignored_keys.update(row.keys() - set(SHAPES[shape]))
    if shape == "messages":
        report.ignored_keys.update(
            f"messages.{key}" for turn in row["messages"] for key in turn.keys() - set(MESSAGE_KEYS)
        )
    if messages[-1]["role"] != "assistant":
        report.trimmed += 1
        while messages[-1]["role"] != "assistant":
            messages.pop()
    return Chat(messages, where, check_tools(row.get("tools")))


def _merge_system(messages: list[dict]) -> list[dict]:
    merged, waiting = [], []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif waiting and message["role"] == "user":
            merged.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            merged.append(message)
    if waiting:
        raise BadRow("system not first", "a system message at the end has no user turn to be merged into; remove it")
    return merged
