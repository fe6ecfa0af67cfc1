"""JSONL files to checked chats: four row shapes, one list of `messages`, every error as `file:line: what is wrong`."""

import glob
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
SHAPE_KEYS = {
    "messages": {"messages"},
    "sharegpt": {"conversations", "system"},
    "prompt-completion": {"prompt", "completion"},
    "alpaca": {"instruction", "input", "output", "system"},
}
MOST_ERRORS = 20


class Chat(NamedTuple):
    """A checked conversation: `messages` of {"role", "content"}, ending with an answer; `where` is its file:line."""

    messages: list[dict]
    where: str


class BadRow(ValueError):
    """What is wrong with one row."""


def load_chats(data, seed: int) -> tuple[list[Chat], list[Chat], dict]:
    """The train and validation chats that `data` (config.DataOptions) names, and notes for the run table.

    A share for `data.validation` takes that part of the train rows, chosen by `seed`.

    Raises:
        UserError: listing every bad row of the files as file:line (the first 20, then a count).
    """
    notes = {}
    train = read_chats(data.train, notes)
    if isinstance(data.validation, float):
        if not 0 < data.validation < 1:
            raise UserError(f"data.validation: {data.validation} is not a share between 0 and 1, nor a file")
        held_out = max(1, round(len(train) * data.validation))
        if held_out >= len(train):
            raise UserError(f"data.validation: {len(train)} rows are too few to hold out a share; give a file")
        chosen = set(random.Random(seed).sample(range(len(train)), held_out))
        validation = [chat for index, chat in enumerate(train) if index in chosen]
        train = [chat for index, chat in enumerate(train) if index not in chosen]
    else:
        validation = read_chats(data.validation, notes) if data.validation else []
    return train, validation, notes


def read_chats(paths: str | list[str], notes: dict | None = None) -> list[Chat]:
    """Read JSONL files (paths or globs, .gz too) into checked chats, counting shapes and ignored keys in `notes`."""
    chats, errors, shapes, ignored, trimmed = [], [], Counter(), Counter(), 0
    for path in data_files(paths):
        before = len(chats) + len(errors)
        for where, row in _rows(path, errors):
            try:
                shape = _shape(row)
                messages = _check_messages(_to_messages(row, shape))
            except BadRow as error:
                errors.append(f"{where}: {error}")
                continue
            shapes[shape] += 1
            ignored.update(row.keys() - SHAPE_KEYS[shape])
            if messages[-1]["role"] != "assistant":
                trimmed += 1
                while messages[-1]["role"] != "assistant":
                    messages.pop()
            chats.append(Chat(messages, where))
        if len(chats) + len(errors) == before:
            raise UserError(f"{path}: has no rows; one JSON object a line is expected")
    if errors:
        more = [f"... and {len(errors) - MOST_ERRORS} more bad rows"] if len(errors) > MOST_ERRORS else []
        raise UserError("\n".join(errors[:MOST_ERRORS] + more))
    if notes is not None:
        notes["shapes"] = Counter(notes.get("shapes")) + shapes
        notes["ignored keys"] = sorted({*notes.get("ignored keys", []), *ignored})
        notes["unanswered turns trimmed"] = notes.get("unanswered turns trimmed", 0) + trimmed
    return chats


def data_files(paths: str | list[str]) -> list[Path]:
    """The files that a path, a list or a glob names, in order. Raises `UserError` for one that is not there."""
    files = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        matches = sorted(glob.glob(pattern)) if any(mark in pattern for mark in "*?[") else [pattern]
        if not matches:
            raise UserError(f"{pattern}: no file matches")
        for name in matches:
            if not Path(name).is_file():
                hint = " (it is a folder; name the files: *.jsonl)" if Path(name).is_dir() else ""
                raise UserError(f"{name}: no such data file{hint}; paths are relative to where the command runs")
            files.append(Path(name))
    return files


def _rows(path: Path, errors: list[str]):
    """Yield (file:line, object) for each row that is a JSON object; what is not goes to `errors`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                errors.append(f"{where}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
            except json.JSONDecodeError as error:
                hint = " (a JSON array? write one object a line)" if number == 1 and text.lstrip()[0] == "[" else ""
                errors.append(f"{where}: not JSON: {error.msg} (column {error.colno}){hint}")
            else:
                if isinstance(row, dict):
                    yield where, row
                else:
                    errors.append(f"{where}: expected a JSON object, found {type(row).__name__}")


def _shape(row: dict) -> str:
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "prompt" in row or "completion" in row:
        return "prompt-completion"
    if "instruction" in row or "output" in row:
        return "alpaca"
    raise BadRow(
        f"no known shape: found the keys {sorted(row)}; expected `messages`, `conversations`, `prompt` and "
        "`completion`, or `instruction` and `output`"
    )


def _to_messages(row: dict, shape: str) -> list:
    """The row as a list of {"role", "content"}, not checked yet."""
    if shape == "messages":
        return _field(row, "messages", list)
    if shape == "sharegpt":
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return system + [_sharegpt_turn(turn, n) for n, turn in enumerate(_field(row, "conversations", list), start=1)]
    if shape == "prompt-completion":
        prompt, completion = _field(row, "prompt", (str, list)), _field(row, "completion", (str, list))
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt + ([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)
    instruction, output = _field(row, "instruction", str), _field(row, "output", str)
    context = _field(row, "input", str) if row.get("input") else ""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [
        *system,
        {"role": "user", "content": f"{instruction}\n\n{context}" if context.strip() else instruction},
        {"role": "assistant", "content": output},
    ]


def _field(row: dict, name: str, kind):
    if name not in row:
        raise BadRow(f"{name}: missing")
    if not isinstance(row[name], kind):
        kinds = " or ".join(
            {str: "a string", list: "a list"}[k] for k in (kind if isinstance(kind, tuple) else (kind,))
        )
        raise BadRow(f"{name}: expected {kinds}, found {type(row[name]).__name__}")
    return row[name]


def _sharegpt_turn(turn, number: int) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f"conversations: turn {number}: expected an object with `from` and `value`")
    if turn["from"] not in SHAREGPT_ROLES:
        hint = "; tool calls are not supported" if turn["from"] in ("function_call", "observation") else ""
        raise BadRow(f"conversations: turn {number}: unknown role {turn['from']!r} (known: human, gpt, system){hint}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _check_messages(messages: list) -> list[dict]:
    """`messages` reduced to role and content, or a `BadRow` that names the turn."""
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRow(f"turn {number}: expected an object with `role` and `content`")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            hint = "; tool calls are not supported" if role == "tool" or message.get("tool_calls") else ""
            raise BadRow(f"turn {number}: unknown role {role!r} (known: {', '.join(ROLES)}){hint}")
        if message.get("tool_calls"):
            raise BadRow(f"turn {number}: tool_calls are not supported")
        if not isinstance(content, str):
            found = "missing" if content is None else f"expected a string, found {type(content).__name__}"
            raise BadRow(f"turn {number} ({role}): content: {found}")
        if role == "assistant" and not content.strip():
            raise BadRow(f"turn {number}: the answer is empty; it would teach the model to stop at once")
        checked.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise BadRow("no assistant turn, so there is nothing to learn")
    return checked
