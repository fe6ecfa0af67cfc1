"""JSONL files to checked chats: four shapes of rows become messages; errors are told as file:line with the mend."""

import contextlib
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from recipes.utils.console import UserError, find_data_files, near

MOST_ERRORS = 20  # bad rows that are told one by one
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
SHAREGPT_ROLES |= {role: role for role in ROLES}
SHAPES = {  # by which keys a row is known, and what else is read of it
    "messages": (["messages"], ["tools"]),
    "sharegpt": (["conversations"], ["system", "tools"]),
    "prompt-completion": (["prompt", "completion"], ["tools"]),
    "alpaca": (["instruction", "output"], ["input", "system"]),
}
MESSAGE_KEYS = ("role", "content", "tool_calls", "weight", "tool_call_id", "name")


@dataclass(frozen=True)
class DataOptions:
    """Which rows to train on, and what to do with those that cannot be used as they are: the section `data`."""

    train: str | list[str] = ""  # required: a path, a list, or a glob of JSONL files
    validation: float | str | list[str] | None = None  # the same, or a share of the train rows, such as 0.05
    test: str | list[str] | None = None  # what evaluate_adapter.py scores; the validation rows when null
    over_length: Literal["drop", "truncate", "error"] = "drop"  # what becomes of rows over training.max_length
    max_over_length: float = 0.1  # the share of rows or tokens that may be lost to it before the run stops
    on_bad_row: Literal["error", "skip"] = "error"  # skip: bad rows are listed in RUN/bad_rows.jsonl
    train_on: Literal["all", "last"] = "all"  # answers of a chat that carry loss
    system: Literal["keep", "merge"] = "keep"  # merge: into the user turn that follows
    control_tokens: Literal["refuse", "escape"] = "refuse"  # escape: typed ones are encoded as plain text
    ledger: bool = True  # keep the loss of each training row at each epoch, in RUN/ledger.jsonl
    samples: int = 3  # validation prompts that are answered at each evaluation, into RUN/samples.jsonl


class BadRow(Exception):
    """What is wrong with one row: `kind` is what rows are counted by, the message says where and how to mend it."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Chat(NamedTuple):
    """A checked conversation that ends with an answer: `messages` of {"role", "content"} and, where they have them,
    "tool_calls" and "weight"; its file:line; `tools`, function schemas; and the row's text in the file."""

    messages: list[dict]
    where: str
    tools: list[dict] | None = None
    line: str = ""


@dataclass
class Reading:
    """What reading found beside the chats, for the run table and the error."""

    shapes: Counter = field(default_factory=Counter)
    ignored_keys: list[str] = field(default_factory=list)
    trimmed: int = 0
    blank: int = 0
    bad: list[dict] = field(default_factory=list)  # {"where", "kind", "error", "line"}

    def add_bad(self, where: str, error: BadRow, line: str = "") -> None:
        self.bad.append({"where": where, "kind": error.kind, "error": str(error), "line": line})

    def raise_if_bad(self) -> None:
        """Raise a `UserError` with the first bad rows and a count by kind, if there are any."""
        lines = [f"{row['where']}: {row['error']}" for row in self.bad[:MOST_ERRORS]]
        if len(self.bad) > 1:
            kinds = Counter(row["kind"] for row in self.bad).most_common()
            more = f"{len(self.bad) - MOST_ERRORS:,} more; " if len(self.bad) > MOST_ERRORS else ""
            counted = f"{len(self.bad):,} bad rows in all: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            lines.append(f"{more}{counted}. To train without them: --data.on_bad_row skip")
        if lines:
            raise UserError("\n".join(lines))


def stream_chats(paths: str | list[str], reading: Reading, merge_system: bool = False) -> Iterator[Chat]:
    """Yield each chat of JSONL files (paths, globs, .gz), one in memory at a time; the rest goes to `reading`.
    `merge_system` moves system messages into the user turn that follows, for templates that have no place for them."""
    for path in find_data_files(paths):
        number, blank = 0, reading.blank
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for number, line in enumerate(file, start=1):  # `str.splitlines` would tear text at U+2028
                    if chat := _chat(line, f"{path}:{number}", number == 1, reading, merge_system):
                        yield chat
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read after line {number}: {error}") from error
        if number == reading.blank - blank:
            raise UserError(f"{path}: has no rows; one JSON object a line is expected")


def read_chats(paths: str | list[str], merge_system: bool = False) -> list[Chat]:
    """All chats of JSONL files. Raises a `UserError` that lists the bad rows."""
    reading = Reading()
    chats = list(stream_chats(paths, reading, merge_system))
    reading.raise_if_bad()
    return chats


def held_out(chat: Chat, share: float, seed: int) -> bool:
    """True if `chat` belongs to the validation share: decided by its own text, so that a file is never held in memory,
    rows that are added later move no other row, and copies of a row stand on one side."""
    digest = hashlib.blake2b(f"{seed}{json.dumps(chat.messages, sort_keys=True)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _chat(line: bytes, where: str, first: bool, reading: Reading, merge_system: bool) -> Chat | None:
    """The chat of a line; None for a blank or a bad one, which `reading` takes."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
        if text.strip():
            messages, tools = _conversation(_parsed(text), reading, merge_system)
            return Chat(messages, where, tools, text)
        reading.blank += 1
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        reading.add_bad(where, BadRow("not UTF-8", what), repr(line))
    except BadRow as error:
        reading.add_bad(where, error, text)
    return None


def _parsed(text: str) -> dict:
    try:
        row = json.loads(text, object_pairs_hook=_object)
        if not isinstance(row, dict):
            found = f"expected a JSON object, found {type(row).__name__}"
            raise BadRow("not an object", f"{found}; write one object a line")
        if "\\u" in text:  # only such text can hold what no tokenizer takes
            _check_characters(row)
        return row
    except json.JSONDecodeError as error:
        mend = "write one object a line, not an array" if text.lstrip()[0] == "[" else "mend this line, or remove it"
        raise BadRow("not JSON", f"not JSON: {error.msg} (column {error.colno}); {mend}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BadRow("not JSON", f"not JSON that can be read: {error}; remove the line") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise BadRow("duplicate key", f"{twice}: the key stands twice in one object; keep one")
    return found


def _check_characters(value, path: str = "") -> None:
    """Raise a `BadRow` where a text within `value` holds what no tokenizer takes."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_characters(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, part in enumerate(value, start=1):
            _check_characters(part, f"{path}[{number}]")
    elif isinstance(value, str) and "\0" in value:
        raise BadRow("NUL", f"{path}: holds a NUL character; remove it")
    elif isinstance(value, str) and (lone := re.search("[\ud800-\udfff]", value)):
        half = f"holds half a character (\\u{ord(lone.group()):x}); the text was cut inside an emoji or the like"
        raise BadRow("lone surrogate", f"{path}: {half}: write it whole, or remove it")


def _conversation(row: dict, reading: Reading, merge_system: bool) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) of a row; its shape and the keys that are ignored are counted in `reading`."""
    shape = _shape(row)
    messages = [_message(turn, f"turn {number}") for number, turn in enumerate(_turns(row, shape), start=1)]
    messages = _merge_system(messages) if merge_system else messages
    if any(message["role"] == "system" for message in messages[1:]):
        raise BadRow("system not first", "a system message is not the first one; move it there, or --data.system merge")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if all(messages[place].get("weight") == 0 for place in answers):
        found, mend = ("every answer has weight 0", "remove the row") if answers else ("no assistant turn", "add one")
        raise BadRow("no answer", f"{found}, so there is nothing to learn; {mend}")
    reading.shapes[shape] += 1
    ignored = row.keys() - {*SHAPES[shape][0], *SHAPES[shape][1]}
    for turn in row["messages"] if shape == "messages" else ():
        ignored.update(f"messages.{key}" for key in turn.keys() - set(MESSAGE_KEYS))
    reading.ignored_keys = sorted(ignored.union(reading.ignored_keys))
    reading.trimmed += messages[-1]["role"] != "assistant"
    return messages[: answers[-1] + 1], _tools(row.get("tools"))


def _shape(row: dict) -> str:
    for shape, (keys, _) in SHAPES.items():
        if any(key in row for key in keys):
            return shape
    known = [name for keys, others in SHAPES.values() for name in keys + others]
    slips = (f"did you write `{key}` for {meant}?" for key in row if (meant := near(key, known)))
    shapes = "expected `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
    raise BadRow("missing field", f"no known shape: found the keys {sorted(row)}; {next(slips, shapes)}")


def _turns(row: dict, shape: str) -> list:
    """The row as a list of {"role", "content"}, not checked yet."""
    if shape == "messages":
        return _field(row, "messages", list)
    if shape == "prompt-completion":
        prompt, completion = _field(row, "prompt", str, list), _field(row, "completion", str, list)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt + ([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if shape == "sharegpt":
        return system + [_sharegpt_turn(turn, n) for n, turn in enumerate(_field(row, "conversations", list), start=1)]
    instruction, output = _field(row, "instruction", str), _field(row, "output", str)
    context = _field(row, "input", str) if row.get("input") else ""
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _field(row: dict, name: str, *kinds: type):
    if name not in row:
        raise BadRow("missing field", f"{name}: {_missing(name, row)}")
    if not isinstance(row[name], kinds):
        expected = " or ".join("a string" if kind is str else "a list" for kind in kinds)
        raise BadRow("wrong type", f"{name}: expected {expected}, found {type(row[name]).__name__}; write it as such")
    return row[name]


def _sharegpt_turn(turn, number: int) -> dict:
    place = f"conversations: turn {number}"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow("wrong type", f"{place}: expected an object with `from` and `value`; write both")
    _check_role(turn["from"], tuple(SHAREGPT_ROLES), place)  # what stands there may have no hash
    message = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
    if turn["from"] == "function_call":
        calls = _json(turn["value"], f"turn {number}: function_call")
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message | ({"weight": turn["weight"]} if "weight" in turn else {})


def _message(message, turn: str) -> dict:
    """The message reduced to what a template reads, or a `BadRow` that names the turn."""
    if not isinstance(message, dict):
        raise BadRow("wrong type", f"{turn}: expected an object with `role` and `content`; write both")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    _check_role(role, ROLES, turn)
    if calls and role == "assistant":
        content = content or ""
    if content is None:
        raise BadRow("missing field", f"{turn} ({role}): content: {_missing('content', message)}")
    if not isinstance(content, str):
        found = f"expected a string, found {type(content).__name__}; join its parts into one"
        raise BadRow("wrong type", f"{turn} ({role}): content: {found}")
    if role == "assistant" and not content.strip() and not calls:
        teaches = "the answer is empty; it would teach the model to stop at once"
        raise BadRow("empty answer", f"{turn}: {teaches}: fill it in, or remove the row")
    for key in message.keys() - set(MESSAGE_KEYS):
        if meant := difflib.get_close_matches(key, MESSAGE_KEYS, n=1, cutoff=0.8):
            raise BadRow("misspelt key", f"{turn}: unknown key `{key}`; did you mean `{meant[0]}`?")
    if role == "tool" and "\\u" in content:  # a template may decode such text, and show what it hides
        with contextlib.suppress(BadRow):
            content = json.dumps(_json(content, "content"), ensure_ascii=False)
    checked = {"role": role, "content": content}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise BadRow("wrong type", f"{turn}: tool_calls: expected a list, in an assistant turn; move it there")
        checked["tool_calls"] = [_tool_call(call, turn) for call in calls]
    if "weight" in message:
        if message["weight"] not in (0, 1) or isinstance(message["weight"], bool):
            raise BadRow("wrong type", f"{turn}: weight: expected 0 (no loss on this turn) or 1; write one of them")
        checked["weight"] = message["weight"]
    if role == "tool" and isinstance(message.get("tool_call_id"), str):
        checked["tool_call_id"] = _call_id(message["tool_call_id"])
    return checked


def _tool_call(call, turn: str) -> dict:
    """{"type": "function", "function": {"name", "arguments": dict}}, with "id" where the row has one."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong type", f"{turn}: tool_calls: expected objects with `name` and `arguments`; write both")
    place, arguments = f"{turn}: arguments of {function['name']}", function.get("arguments", {})
    arguments = _json(arguments, place) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise BadRow("wrong type", f'{place}: expected an object; write {{"name": value}}')
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": _call_id(call["id"]), **checked} if isinstance(call.get("id"), str) else checked


def _call_id(name: str) -> str:
    """Nine letters or digits, which is what Mistral's form takes; another id becomes such a one, the same each time."""
    fits = re.fullmatch("[a-zA-Z0-9]{9}", name)
    return name if fits else hashlib.blake2b(name.encode(), digest_size=5).hexdigest()[:9]


def _tools(tools) -> list[dict] | None:
    """Function schemas in the form that templates expect, from a list or its JSON text."""
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("wrong type", "tools: expected a list of function schemas, or its JSON text; write [] for none")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()] or None


def _json(text, place: str):
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"{place}: not JSON: {getattr(error, 'msg', error)}; write it as JSON, with double quotes"
        raise BadRow("tool call not JSON", message) from error
    _check_characters(value, place)
    return value


def _check_role(role, known: tuple[str, ...], place: str) -> None:
    if role not in known:
        meant = near(str(role).lower(), known)
        mend = f"did you mean {meant!r}?" if meant else f"known: {', '.join(known)}"
        raise BadRow("unknown role", f"{place}: unknown role {role!r}; {mend}")


def _missing(name: str, row: dict) -> str:
    return "missing; " + (f"did you write `{slip}` for it?" if (slip := near(name, row)) else "add it")


def _merge_system(messages: list[dict]) -> list[dict]:
    merged, waiting = [], []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if waiting and message["role"] == "user":
            message, waiting = {**message, "content": "\n\n".join([*waiting, message["content"]])}, []
        merged.append(message)
    if waiting:
        raise BadRow("system not first", "a system message at the end has no user turn to be merged into; remove it")
    return merged
