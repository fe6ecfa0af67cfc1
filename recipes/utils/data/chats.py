"""Files to checked chats: JSON lines, a JSON array, Parquet, CSV; errors are told as file:line with the mend."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recipes.utils.console import UserError, find_data_files
from recipes.utils.data.shapes import BadRow, check_characters, conversation, split_thought, system_merged

Think = Literal["keep", "mask", "drop"]
MOST_KEPT, LONGEST_KEPT = 10_000, 500  # bad rows that are listed in bad_rows.jsonl, and characters of each
LONGEST_LINE, LONGEST_ARRAY = 16 << 20, 256 << 20  # bytes; a .gz of a few megabytes may hold gigabytes
MOST_ERRORS = 20  # kinds of bad rows that are told one by one
MOST_PLACES = 3  # of one of them
PACKED = (b"PK", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"ARROW1")  # zip, bzip2, xz, zstd, Arrow: how they begin


@dataclass(frozen=True)
class DataOptions:
    """Which rows to train on, and what to do with those that cannot be used as they are: the section `data`."""

    train: str | list[str | dict[str, Any]] = ""  # required: a path, a glob, or a list of them and {path, share|repeat}
    validation: float | str | list[str] | None = None  # the same, or a share of the train rows, such as 0.05
    test: str | list[str] | None = None  # what evaluate_adapter.py scores; the validation rows when null
    over_length: Literal["drop", "truncate", "error"] = "drop"  # what becomes of rows over training.max_length
    max_over_length: float = 0.1  # the share of rows or tokens that may be lost to it before the run stops
    on_bad_row: Literal["error", "skip"] = "error"  # skip: bad rows are listed in RUN/bad_rows.jsonl
    train_on: Literal["all", "last"] = "all"  # answers of a chat that carry loss
    system: Literal["keep", "merge"] = "keep"  # merge: into the user turn that follows
    think: Think | None = None  # thoughts; by default kept, where any train row has one
    control_tokens: Literal["refuse", "escape"] = "refuse"  # escape: typed ones are encoded as plain text
    exclude: str | None = None  # a file that names rows to leave out: file:line or a fingerprint, one a line
    ledger: bool = True  # keep the loss of each training row at each epoch, in RUN/ledger.jsonl
    samples: int = 3  # validation prompts that are answered at each evaluation, into RUN/samples.jsonl


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
    opened: int = 0  # chats that begin with an answer, which is read and not learnt
    blank: int = 0
    thoughts: int = 0  # rows with an answer that has one
    systems: list[str] = field(default_factory=list)  # the first two system messages that differ; "" is none
    bad: list[dict] = field(default_factory=list)  # the first: {"where", "kind", "error", "line"}, cut where long
    bad_kinds: Counter = field(default_factory=Counter)  # of all of them
    excluded: dict[str, list[str]] = field(default_factory=dict)  # {file:line: the lines of data.exclude that name it}

    def add_bad(self, where: str, error: BadRow, line: str = "") -> None:
        self.bad_kinds[error.kind] += 1
        if len(self.bad) < MOST_KEPT:
            told = {"error": str(error)[: 4 * LONGEST_KEPT], "line": line[:LONGEST_KEPT]}
            self.bad.append({"where": where, "kind": error.kind, **told})

    def raise_if_bad(self) -> None:
        """Raise a `UserError` with the bad rows, those with the same fault told once, and a count by kind, if any."""
        faults: dict[str, list[str]] = {}
        for row in self.bad:
            faults.setdefault(row["error"], []).append(row["where"])
        lines = []
        for error, places in list(faults.items())[:MOST_ERRORS]:
            others = [place.rpartition(":")[2] for place in places[1 : MOST_PLACES + 1]]
            more = f" and {len(places) - 1 - MOST_PLACES:,} more" if len(places) - 1 > MOST_PLACES else ""
            lines.append(f"{places[0]}: {error}" + (f" (also {', '.join(others)}{more})" if others else ""))
        if (total := self.bad_kinds.total()) > 1:
            kinds = self.bad_kinds.most_common()
            more = f"{len(faults) - MOST_ERRORS:,} more; " if len(faults) > MOST_ERRORS else ""
            counted = f"{total:,} bad rows in all: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            skip = "To train without them: --data.on_bad_row skip" if self.shapes else "No row can be used as it is"
            if not self.shapes and len(kinds) == 1 and kinds[0][0] == "not JSON":
                skip += ": one JSON object a line is expected; CSV is known by its suffix, .csv or .tsv"
            lines.append(f"{more}{counted}. {skip}")
        if lines:
            raise UserError("\n".join(lines))


def stream_chats(paths: str | list[str], reading: Reading, merge_system: bool = False) -> Iterator[Chat]:
    """Yield each chat of files (paths, globs, .gz), one in memory at a time; the rest goes to `reading`. `merge_system`
    moves system messages into the user turn that follows, for templates that have no place for them."""
    for path in find_data_files(paths):
        number, blank = 0, reading.blank
        try:
            for number, row in _rows(path):
                if chat := _chat(row, f"{path}:{number}", number == 1, reading, merge_system):
                    yield chat
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read after line {number}: {error}") from error
        if number == reading.blank - blank:
            raise UserError(f"{path}: has no rows; one JSON object a line is expected")


def _lines(file) -> Iterator[bytes]:
    """The lines of a file; of one beyond LONGEST_LINE its beginning, one byte too long, the rest passed over."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 1)


def read_chats(paths: str | list[str], merge_system: bool = False) -> list[Chat]:
    """All chats of files. Raises a `UserError` that lists the bad rows."""
    reading = Reading()
    chats = list(stream_chats(paths, reading, merge_system))
    reading.raise_if_bad()
    return chats


def held_out(chat: Chat, share: float, seed: int) -> bool:
    """True if `chat` belongs to the validation share: decided by its own text, so that a file is never held in memory,
    rows that are added later move no other row, and copies of a row stand on one side."""
    digest = hashlib.blake2b(f"{seed}{json.dumps(chat.messages, sort_keys=True)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _rows(path: Path) -> Iterator[tuple[int, bytes | dict]]:
    """(number, row) of each row of a file: its line, of a JSON array or Parquet its place, which counts from 1; the row
    as the bytes of a JSON object, or where a table holds it as its columns."""
    with open(path, "rb") as opened:
        start = opened.peek(8)[:8]
        if start.startswith(PACKED):
            raise UserError(f"{path}: is packed, and not by gzip; unpack it, or save it as JSON lines, CSV or Parquet")
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8")
        if start[:4] == b"PAR1":
            from datasets import load_dataset

            yield from enumerate(load_dataset("parquet", data_files=str(path), split="train", streaming=True), start=1)
            return
        file: Any = gzip.GzipFile(fileobj=opened) if path.suffix == ".gz" or start[:2] == b"\x1f\x8b" else opened
        if (suffix := Path(path.name.removesuffix(".gz")).suffix) in (".csv", ".tsv"):
            csv.field_size_limit(2**31 - 1)
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            table, line = csv.DictReader(text, delimiter="," if suffix == ".csv" else "\t", strict=True), 2
            for row in table:  # not by pandas, to which the answers "NA" and "1.0" are something else
                yield line, row
                line = table.line_num + 1
        elif re.match(rb"\s*(\[|\{\s*[\r\n]\s*[\"}])", file.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf")):
            if len(content := file.read(LONGEST_ARRAY + 1)) > LONGEST_ARRAY:
                raise UserError(f"{path}: is an array of over {LONGEST_ARRAY >> 20} MB; write one object a line")
            yield from enumerate(_objects(content.decode("utf-8-sig")), start=1)
        else:
            yield from enumerate(_lines(file), start=1)  # `str.splitlines` would tear text at U+2028


def _objects(text: str) -> Iterator[bytes]:
    """Each object of a JSON array, or of objects that stand on several lines."""
    place, skipped = 0, re.compile(r"\s*\[?[\s,]*" if text.lstrip()[0] == "[" else r"[\s,]*")
    while (place := skipped.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
        try:
            end = json.JSONDecoder().raw_decode(text, place)[1]
        except (ValueError, RecursionError):
            end = len(text)  # where the next one begins cannot be told; what is wrong is told of this one
        yield text[place:end].encode()
        place, skipped = end, re.compile(r"[\s,]*")


def _chat(row: bytes | dict, where: str, first: bool, reading: Reading, merge_system: bool) -> Chat | None:
    """The chat of a row; None for a blank or a bad one, which `reading` takes."""
    text = ""
    try:
        if isinstance(row, bytes):
            if len(row) > LONGEST_LINE and not row.endswith(b"\n"):
                raise BadRow("too long", f"the line is longer than {LONGEST_LINE >> 20} MB; put one row on each line")
            text = row.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
            if not text.strip():
                reading.blank += 1
                return None
            messages, tools = _checked(_parsed(text), reading, merge_system)
        else:
            text = json.dumps(row, ensure_ascii=False, default=str)
            if None in row:
                raise BadRow("wrong type", "more cells than the first line names; put one that holds commas in quotes")
            check_characters(row)
            messages, tools = _checked(row, reading, merge_system)
        return Chat(messages, where, tools, text)
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        reading.add_bad(where, BadRow("not UTF-8", what), repr(row[:LONGEST_KEPT]))
    except BadRow as error:
        text = text or row[: 4 * LONGEST_KEPT].decode(errors="replace")  # type: ignore[index]
        reading.add_bad(where, error, text.rstrip("\r\n"))
    return None


def _parsed(text: str) -> dict:
    try:
        row = json.loads(text, object_pairs_hook=_object)
        if not isinstance(row, dict):
            found = f"expected a JSON object, found {type(row).__name__}"
            raise BadRow("not an object", f"{found}; write one object a line")
        if "\\u" in text:  # only such text can hold what no tokenizer takes
            check_characters(row)
        return row
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} of it"
        raise BadRow("not JSON", f"not JSON: {error.msg} ({place}); mend this line, or remove it") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BadRow("not JSON", f"not JSON that can be read: {error}; remove the line") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise BadRow("duplicate key", f"{twice}: the key stands twice in one object; keep one")
    return found


def _checked(row: dict, reading: Reading, merge_system: bool) -> tuple[list[dict], list[dict] | None]:
    """(messages up to the last answer, tools) of a row; what is counted goes to `reading`."""
    shape, messages, tools, unread = conversation(row)
    system = messages[0]["content"] if messages[:1] and messages[0]["role"] == "system" else ""
    messages = system_merged(messages) if merge_system else messages
    if any(message["role"] == "system" for message in messages[1:]):
        raise BadRow("system not first", "a system message is not the first one; move it there, or --data.system merge")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if all(messages[place].get("weight") == 0 for place in answers):
        found, mend = ("every answer has weight 0", "remove the row") if answers else ("no assistant turn", "add one")
        raise BadRow("no answer", f"{found}, so there is nothing to learn; {mend}")
    reading.shapes[shape] += 1
    if len(reading.systems) < 2 and system not in reading.systems:
        reading.systems.append(system)
    reading.thoughts += any(split_thought(messages[place])[0] for place in answers)
    if not unread.issubset(reading.ignored_keys):
        reading.ignored_keys = sorted(unread.union(reading.ignored_keys))
    reading.trimmed += messages[-1]["role"] != "assistant"
    return messages[: answers[-1] + 1], tools
