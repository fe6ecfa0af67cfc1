"""A fair baseline: the base as somebody would use it who does not train, with a system message and a few examples."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

from recipes.utils.console import UserError, find_data_files, say
from recipes.utils.data import (
    Chat,
    DataOptions,
    Encoder,
    Reading,
    fingerprint,
    held_out,
    stream_chats,
    train_paths,
    without_excluded,
)
from recipes.utils.evaluation.runs import base_of
from recipes.utils.files import file_hash
from recipes.utils.model import ModelOptions, model_config

BASELINES = {"base": "base", "system": "+ system", "shots": "+ examples", "system_shots": "+ both"}  # their heads
POOL = 20  # train rows looked at for each example
SPARE = 16  # tokens more than the longest expected answer


def read_system(text: str | None) -> str | None:
    """The system message that `--system` gives: the text of that file, if there is one, else the words themselves."""
    if text is None:
        return None
    if "\n" not in text and len(text) < 255 and Path(text).is_file():
        try:
            text = Path(text).read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"--system {text}: is no UTF-8 text: {error}") from error
    elif "\n" not in text and " " not in text and Path(text).suffix in (".txt", ".md"):
        raise UserError(f"--system {text}: there is no such file; paths are relative to where the command runs")
    if not text.strip():
        raise UserError("--system: the message is empty")
    return text


def prompts_of(
    record: dict, encoder: Encoder, chats: list[Chat], shots: int, system: str | None, max_new_tokens: int | None
) -> tuple[dict[str, list[Chat]], dict]:
    """({"system": chats, "shots": chats, "system_shots": chats}, of these what was asked for: the `chats` behind a
    system message, behind examples, behind both; what metrics.json says of it). Says which examples. Raises `UserError`
    where no example can be had, or the template cannot carry them."""
    examples = choose_examples(record, encoder, chats, shots, system, max_new_tokens) if shots else []
    asked: dict[str, tuple] = {"system": ([], system)} if system else {}
    asked |= {"shots": (examples, None)} if shots else {}
    asked |= {"system_shots": (examples, system)} if shots and system else {}
    found = {}
    for name, (shown, message) in asked.items():
        merged = False
        if message:
            merged = not _carried(encoder, prompted(chats[0], shown, message))
            if merged:
                say("system message: put into the first user turn, since the chat template has no place for it")
        found[name] = [prompted(chat, shown, message, merged) for chat in chats]
        encoder.encode(found[name][:1])  # what the template cannot carry is told before anything is loaded
    said = {"examples": [example.where for example in examples], "system": system}
    return found, {name: value for name, value in said.items() if value}


def _carried(encoder: Encoder, chat: Chat) -> bool:
    try:
        return bool(encoder.encode([chat]))
    except UserError:
        return False


def prompted(chat: Chat, examples: list[Chat], system: str | None, merge_system: bool = False) -> Chat:
    """`chat` with `examples` as turns before its own, without loss on them, and `system` in the place of its own system
    message, or with `merge_system` in its first user turn. Tools of the examples stand behind the chat's own."""
    own = chat.messages
    first = [{"role": "system", "content": system}] if system else own[:1] if own[0]["role"] == "system" else []
    turns = [
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn
        for example in examples
        for turn in example.messages
        if turn["role"] != "system"
    ] + [turn for turn in own if turn["role"] != "system"]
    if merge_system and system:
        first, turns = [], [{**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
    tools = {tool["function"]["name"]: tool for one in (*examples[::-1], chat) for tool in one.tools or ()}
    return chat._replace(messages=first + turns, tools=list(tools.values()) or None)


def choose_examples(
    record: dict, encoder: Encoder, chats: list[Chat], count: int, system: str | None, max_new_tokens: int | None
) -> list[Chat]:
    """`count` rows that the run trained on, by its seed: whole, with every answer learnt, none of them among its test
    or validation rows or the `chats` that are scored, and as many as leave room for the longest of these in what the
    base can read. Says their file:line. Raises `UserError` if there is none."""
    options, limit = DataOptions(**record["data"]), record["training"].get("max_length") or 1024  # SFTConfig's
    _tell_changes(record, options)
    kept_out = {fingerprint(chat) for chat in chats}
    held = options.validation
    for paths in (options.test, held if isinstance(held, (str, list)) else None):
        if paths:
            kept_out |= {fingerprint(chat) for chat in stream_chats(paths, Reading(), options.system == "merge")}

    def usable(chat: Chat) -> bool:
        turns = [turn for turn in chat.messages if turn["role"] != "system"]
        return turns[0]["role"] == "user" and all(turn.get("weight") != 0 for turn in turns)

    def drawn(chat: Chat) -> bytes:
        """The same for the same row, wherever it stands: rows that are added later change no other's place."""
        return hashlib.blake2b(f"{record['seed']}{json.dumps(chat.messages)}".encode(), digest_size=8).digest()

    rows = (chat for chat in _train_rows(record) if usable(chat))
    pool = heapq.nsmallest(POOL * count, (row for row in rows if fingerprint(row) not in kept_out), key=drawn)
    context = model_config(base_of(record), ModelOptions(**record["model"])).get_text_config()
    room = getattr(context, "max_position_embeddings", None) or float("inf")
    longest = max(chats, key=lambda chat: sum(len(turn["content"]) for turn in chat.messages))
    found: list[Chat] = []
    for row in pool:
        if len(found) == count:
            break
        try:
            fits = max(len(one.input_ids) for one in encoder.encode([row])) <= limit
            with_it = encoder.encode([prompted(longest, [*found, row], None)])
        except (UserError, ValueError):  # a row that the template cannot carry was not trained on
            continue
        extra = (max_new_tokens or SPARE) + len(system or "")  # a token has a letter, at least
        if fits and max(len(one.input_ids) for one in with_it) + extra <= room:
            found.append(row)
    if not found:
        why = "its train rows are among the scored ones, are too long, or are gone"
        raise UserError(f"--shots {count}: no train row of the run can be an example: {why}")
    less = f" ({count} were asked for; more do not fit in {room:,} tokens, or there are none)" * (len(found) < count)
    say(f"examples: {', '.join(row.where for row in found)}{less}")
    return found


def _train_rows(record: dict) -> Iterator[Chat]:
    """The rows that the run trained on, read again: neither left out by its config, nor held out for validation."""
    options = DataOptions(**record["data"])
    share = options.validation if isinstance(options.validation, float) else None
    every = stream_chats(train_paths(options.train), Reading(), options.system == "merge")
    for chat in without_excluded(every, options.exclude, Reading()):
        if not (share and held_out(chat, share, record["seed"])):
            yield chat


def trained_rows(record: dict, parts: dict[str, list[Chat]], by: str = "") -> tuple[dict[str, int], list[str]]:
    """({part: how many of its rows the run was trained on, but for case, space and punctuation}, a warning for each);
    none where its train files are gone. `by` names the run where there are several."""
    try:
        trained = set(map(fingerprint, _train_rows(record)))
    except UserError:
        return {}, []
    counted = {part: sum(fingerprint(chat) in trained for chat in chats) for part, chats in parts.items()}
    seen = {part: count for part, count in counted.items() if count}
    lines = []
    for part, count in seen.items():
        rows = f"{len(parts[part]):,} {f'{part} ' * (part != 'predictions')}rows"
        lines.append(f"{count:,} of these {rows} were trained on{by}: no figure and no verdict here is of new rows")
    return seen, [f"warning: {line}" for line in lines]


def _tell_changes(record: dict, options: DataOptions) -> None:
    for path in find_data_files(train_paths(options.train)):
        if (digest := record["data_sha256"].get(str(path))) and digest != file_hash(path):
            say(f"warning: {path} was changed since the run: its examples may be rows that the adapter has not seen")
