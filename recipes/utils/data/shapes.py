"""Rows in the forms that people bring, to messages in the one form that chat templates read. What a row says is
honoured, or the row is bad: a field that is ignored is one that cannot change what is learnt."""

import contextlib
import difflib
import hashlib
import json
import re
from typing import Any

from recipes.utils.console import near

TURNS = ("messages", "conversations", "conversation")  # columns that hold a list of turns
EXPECTED = (*TURNS[:2], "prompt", "completion", "instruction", "output")  # the commonest, of which one may be misspelt
COLUMNS: dict[str, tuple[str, str | None, str]] = {  # shape: the columns of its question, its context, its answer
    "prompt-completion": ("prompt", None, "completion"), "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"), "magpie": ("instruction", "input", "response"),
    "openorca": ("question", None, "response"), "question-answer": ("question", "context", "answer"),
    "prompt-response": ("prompt", None, "response"), "query-response": ("query", None, "response"),
    "xlam": ("query", None, "answers"), "input-output": ("input", None, "output"),
    "user-assistant": ("user", None, "assistant"), "flan": ("inputs", None, "targets"),
}  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message")
THOUGHT = ("reasoning_content", "reasoning", "thinking", "thought")
ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {role: role for role in ROLES} | {
    "developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
LOSS = ("weight", "loss", "train", "training", "trainable", "masked")  # of a turn: whether it is learnt
KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "weight", "reasoning_content")  # may be misspelt
READ = {*KEYS, "from", "value", "function_call", *THOUGHT, *LOSS}
CHANGES = re.compile(  # how a field begins that nothing here reads and that could change what is learnt
    "reason|think|thought|(.*_)?cot$|rationale|loss|train|mask|weight|image|video|audio|kto_|chat_template_kw|tools",
    re.IGNORECASE,
)
FOREIGN = {  # a column of rows that are known and cannot be read: what they are, and what to do
    "rejected": "preferences; keep the chosen answer alone, such as `completion` beside `prompt`",
    "non_preferred_output": "preferences; keep the preferred answer alone, as the last of `messages`",
    "conversation_a": "preferences; keep the better conversation alone, as `messages`",
    "message_id": "single messages of a tree (OASST); join each path from the root into `messages`",
    "chat": "Glaive's, turns within one text (USER: ... ASSISTANT: ...); split it at these into `messages`",
    "contents": "Gemini's; rename `contents` to `messages`, and `parts` to `content`",
    "text": "text that is rendered already, in which nobody can tell the answers; give `messages`",
    "data": "UltraChat's first form, texts without roles; give `messages`",
}


class BadRow(Exception):
    """What is wrong with one row: `kind` is what rows are counted by, the message says where and how to mend it."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def conversation(row: dict) -> tuple[str, list[dict], list[dict] | None, set[str]]:
    """(shape, messages, tools, names of the fields that are ignored) of a row. Raises `BadRow`."""
    shape, columns = _shape(row)
    tools = _tools(row.get("tools") or row.get("functions"))
    if columns[0] not in TURNS:
        turns = _turns(row, shape)
    elif isinstance(turns := row[columns[0]], str) and turns.lstrip()[:1] == "[":  # as a CSV has it
        turns = _json(turns, columns[0])
    else:
        turns = _typed(row, columns[0], list)
    messages, unread = list[dict](), set[str]()
    for number, turn in enumerate(turns, start=1):
        plain = type(turn) is dict and len(turn) == 2 and turn.get("role") in ("user", "system", "assistant")
        if plain and type(turn.get("content")) is str and turn["content"].strip():  # as most are
            messages.append(turn)
        else:
            found, others = _message(turn, f"turn {number}", tools)
            messages += found
            unread |= others
    if len(row) > 1:
        messages = _system(row, messages)
        beside = ("history", *(THOUGHT if isinstance(row[columns[2]], str) else ())) if shape in COLUMNS else ()
        unread |= _unread(row, {*columns, *SYSTEM, "tools", "functions", *beside}, "")
    if tools and messages and messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]:
        tools = None  # written there by the author, as Hermes has it: the template would write them again
    return shape, messages, tools, unread


def _shape(row: dict) -> tuple[str, tuple]:
    """(shape, the columns that it is read from). Raises `BadRow` if the row has none that is known."""
    for name in TURNS:
        if (turns := row.get(name)) is not None:
            first, last = (turns[0], turns[-1]) if isinstance(turns, list) and turns else ({}, {})
            if row.get("rejected") is None or (isinstance(last, dict) and last.get("role") == "assistant"):
                return "sharegpt" if isinstance(first, dict) and "from" in first else "messages", (name,)
    for name, what in FOREIGN.items():
        here = name in row and not (name == "chat" and isinstance(row[name], list))
        if here and (row.get("rejected") is not None or not _in_columns(row)):
            raise BadRow("other format", f"these rows are {what}")
    if found := _in_columns(row):
        return found, COLUMNS[found]
    for name in TURNS:
        if name in row:
            _typed(row, name, list)
    for columns in COLUMNS.values():
        if columns[0] in row or columns[2] in row:
            _typed(row, columns[0], str, list), _typed(row, columns[2], str, list)
    slips = (f"did you write `{key}` for {meant}?" for key in row if (meant := near(key, EXPECTED)))
    shapes = "expected `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
    raise BadRow("missing field", f"no known shape: found the keys {sorted(map(str, row))}; {next(slips, shapes)}")


def _in_columns(row: dict) -> str | None:
    given = {name for name, value in row.items() if value is not None}
    return next((shape for shape, (asked, _, said) in COLUMNS.items() if {asked, said} <= given), None)


def _turns(row: dict, shape: str) -> list:
    """The turns of a row whose question and answer are columns; those of a prompt carry no loss."""
    asked, beside, said = COLUMNS[shape]
    question, answer = _typed(row, asked, str, list), _typed(row, said, str, list)
    if beside and row.get(beside):
        texts = _typed(row, asked, str), _typed(row, beside, str)
        question = "\n\n".join(text for text in texts if text.strip())
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    else:  # what the model said there is what it is asked about
        question = [{**turn, "weight": 0} if type(turn) is dict and not _loss_of(turn) else turn for turn in question]
        last = question[-1] if question and type(question[-1]) is dict else {}
        if SPEAKERS.get(str(last.get("role", last.get("from")))) == "assistant":
            raise BadRow("prompt answered", f"{asked}: ends with an answer; end it with a question, or give `messages`")
    if shape == "xlam":
        answer = [{"from": "function_call", "value": answer if isinstance(answer, str) else json.dumps(answer)}]
    if isinstance(answer, str):
        thought = {name: row[name] for name in THOUGHT if isinstance(row.get(name), str)}
        answer = [{"role": "assistant", "content": answer, **thought}]
    rounds = row.get("history") or []  # Alpaca's earlier ones: LLaMA-Factory, where they come from, learns them too
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise BadRow("wrong type", "history: expected a list of [question, answer]; write it as such")
    earlier = [{"role": role, "content": text} for pair in rounds for role, text in zip(ROLES[1:3], pair, strict=True)]
    return [*earlier, *question, *answer]


def _system(row: dict, messages: list[dict]) -> list[dict]:
    """The messages, with the system message that stands beside them in the row before them."""
    for name in SYSTEM:
        if row.get(name):
            text = _parts(row[name], name)["content"]
            own = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
            if own is not None and own.strip() != text.strip():
                raise BadRow("two systems", f"{name}: the turns begin with another system message; keep one of them")
            if own is None and text.strip():
                messages = [{"role": "system", "content": text}, *messages]
    return messages


def _unread(row: dict, known: set, place: str) -> set[str]:
    """The names of `row` that nothing reads. Raises `BadRow` for one that could change what is learnt."""
    unread = {name for name in row.keys() - known if row[name] is not None}
    for name in unread:
        value = row[name]
        if name == "label" and value is False and not place:
            raise BadRow("other format", "label: this answer is one not to be learnt (KTO); remove the row")
        if name == "chat_template_kwargs" and isinstance(value, dict):  # whether it thinks is seen in its answers
            value = [part for key, part in value.items() if part and key != "enable_thinking"]
        if value not in (1, "", [], {}) and CHANGES.match(str(name)):
            what = "may change what is learnt, and is not known here; remove it, or write what it means in a known form"
            raise BadRow("unknown field", f"{place}{name}: {what}")
    return set(map(str, unread))


def _message(turn, place: str, tools) -> tuple[list[dict], set[str]]:
    """(its messages, names that are ignored) of a turn: one, or more where a user's turn holds results of tools."""
    if not isinstance(turn, dict):
        raise BadRow("wrong type", f"{place}: expected an object with `role` and `content`; write both")
    given = {name: value for name, value in turn.items() if value is not None}
    speaker = given.get("role", given.get("from"))
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        meant = near(str(speaker).lower(), SPEAKERS)
        mend = f"did you mean {meant!r}?" if meant else f"known: {', '.join(ROLES)}"
        raise BadRow("unknown role", f"{place}: unknown role {speaker!r}; {mend}")
    name = "value" if "value" in given or ("from" in given and "content" not in given) else "content"
    said = f"{place} ({role}): {name}"
    parts: dict[str, Any] = _parts(given[name], said) if name in given else {}
    calls = given.get("tool_calls") or parts.get("tool_calls") or []
    calls = _json(calls, f"{place}: tool_calls") if isinstance(calls, str) else calls
    if speaker in ("function_call", "tool_call"):
        calls = _json(parts.get("content"), f"{place}: {speaker}")
        calls, parts = calls if isinstance(calls, list) else [calls], {"content": ""}
    if isinstance(call := given.get("function_call"), dict) and call.get("name"):  # OpenAI's older form
        calls = [*calls, call]
    thought = next((given[key] for key in THOUGHT if given.get(key)), parts.get("thought"))
    content = parts.get("content", "" if calls else None)
    if content is None:
        raise BadRow("missing field", f"{said}: {_missing(name, turn)}")
    if role == "assistant" and not content.strip() and not calls:
        teaches = "the answer is empty; it would teach the model to stop at once"
        raise BadRow("empty answer", f"{place}: {teaches}: fill it in, or remove the row")
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise BadRow("wrong type", f"{place}: tool_calls: expected a list, in an assistant turn; move it there")
    if thought and (role != "assistant" or not isinstance(thought, str)):
        raise BadRow("wrong type", f"{place}: a thought is a string, in an assistant turn; move it there")
    for key in given.keys() - READ:
        if close := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
            raise BadRow("misspelt key", f"{place}: unknown key `{key}`; did you mean `{close[0]}`?")
    unread = _unread(given, READ, f"{place}: ")
    if role == "tool" and "\\u" in content:  # a template may decode such text, and show what it hides
        with contextlib.suppress(BadRow):
            content = json.dumps(_json(content, "content"), ensure_ascii=False)
    message = {"role": role, "content": content}
    if thought and thought.strip():
        message["reasoning_content"] = thought.strip()
    if calls:
        message["tool_calls"] = [_tool_call(call, place, tools) for call in calls]
    if (weight := _weight(given, role, place)) is not None and role == "assistant":
        message["weight"] = weight
    if role == "tool":
        message |= {"name": given["name"]} if isinstance(given.get("name"), str) else {}
        message |= {"tool_call_id": _call_id(key)} if isinstance(key := given.get("tool_call_id"), str) else {}
    results = parts.get("results", [])
    return results + ([message] if content or not results else []), {f"messages.{key}" for key in unread}


def split_thought(message: dict) -> tuple[str, str]:
    """(thought, answer) of an assistant's message; the thought is "" where it has none, or an empty one."""
    content = message["content"]
    if "reasoning_content" in message or "</think>" not in content:
        return message.get("reasoning_content", ""), content
    before, _, after = content.partition("</think>")
    said, _, thought = before.partition("<think>") if "<think>" in before else ("", "", before)
    return ("", content) if said.strip() else (thought.strip(), after.lstrip())


def _loss_of(turn: dict) -> dict:
    return {name: turn[name] for name in LOSS if turn.get(name) is not None}


def _weight(turn: dict, role: str, place: str) -> int | None:
    """1 or 0, as the turn says whether it is learnt; None if it does not say."""
    found = set()
    for name, value in _loss_of(turn).items():
        if value not in (0, 1) or (name == "weight" and isinstance(value, bool)):
            raise BadRow("wrong type", f"{place}: {name}: expected 0 (no loss on this turn) or 1; write one of them")
        found.add(int(value) ^ (name == "masked"))
        if role != "assistant" and name != "weight" and found == {1}:
            raise BadRow("loss elsewhere", f"{place} ({role}): {name}: only answers are learnt; remove it")
    if len(found) > 1:
        raise BadRow("wrong type", f"{place}: {', '.join(_loss_of(turn))} say different things; keep one of them")
    return found.pop() if found else None


def _parts(content, place: str) -> dict[str, Any]:
    """{"content"} of a text, or of a list of parts: texts joined, and where it has them "thought", "tool_calls" and
    "results", messages of tools, in the forms of OpenAI, Anthropic and Mistral."""
    if isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise BadRow("wrong type", f"{place}: expected a string, found {type(content).__name__}; write it as such")
    texts, found = list[str](), dict[str, list]()
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = part.get("type", "text")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str | list):
            found.setdefault("thought", []).append(_parts(part.get(kind, part.get("text")), place)["content"])
        elif kind == "tool_use":
            call = {"name": part.get("name"), "arguments": part.get("input", {}), "id": part.get("id")}
            found.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result" and not texts:
            result = {"role": "tool", "content": _parts(part.get("content", ""), place)["content"]}
            if isinstance(part.get("tool_use_id"), str):
                result["tool_call_id"] = _call_id(part["tool_use_id"])
            found.setdefault("results", []).append(result)
        else:
            raise BadRow("wrong type", f"{place}: holds a part that is no text ({kind}); only text is learnt")
    thought = {"thought": "\n".join(found.pop("thought"))} if "thought" in found else {}
    return {"content": "".join(texts), **found, **thought}


def _tool_call(call, turn: str, tools: list[dict] | None) -> dict:
    """{"type": "function", "function": {"name", "arguments": dict}}, with "id" where the row has one."""
    function = call.get("function") or call if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong type", f"{turn}: tool_calls: expected objects with `name` and `arguments`; write both")
    place, arguments = f"{turn}: arguments of {function['name']}", function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):  # no export reaches into a text: its nulls are the author's
        arguments = _json(arguments, place)
    elif isinstance(arguments, dict):
        schemas = {tool["function"].get("name"): tool["function"].get("parameters") or {} for tool in tools or ()}
        arguments = _unpadded(arguments, schemas.get(function["name"]), place)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRow("wrong type", f'{place}: expected an object; write {{"name": value}}')
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": _call_id(call["id"]), **checked} if isinstance(call.get("id"), str) else checked


def _call_id(name: str) -> str:
    """Nine letters or digits, which is what Mistral's form takes; another id becomes such a one, the same each time."""
    fits = re.fullmatch("[a-zA-Z0-9]{9}", name)
    return name if fits else hashlib.blake2b(name.encode(), digest_size=5).hexdigest()[:9]


def _tools(tools) -> list[dict] | None:
    """Function schemas in the form that templates expect, from a list, its JSON text, or texts in a list."""
    # An export pads no text: the nulls of one are the author's.
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else _schema(tools)
    if isinstance(tools, list):
        tools = [_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("wrong type", "tools: expected a list of function schemas, or its JSON text; write [] for none")
    found = []
    for tool in tools or ():
        function = tool.get("function") or {key: value for key, value in tool.items() if key != "type"}
        if "input_schema" in function:  # Anthropic's name for it
            function["parameters"] = function.pop("input_schema")
        found.append({"type": "function", "function": function})
    return found or None


def _schema(value):
    """A schema without the nulls with which an export pads it: all but those that it allows itself."""
    if isinstance(value, list):
        return [_schema(part) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _schema(part) for key, part in value.items() if part is not None or key in ("default", "const")}
    kept = {key: part for key, part in kept.items() if part is not None or _allows_null(value)}
    return {key: part for key, part in kept.items() if part != {} or value[key] == {}}  # of padding alone


def _allows_null(schema) -> bool:
    """Whether a JSON schema says that null is allowed."""
    if not isinstance(schema, dict):
        return False
    kinds, ways = schema.get("type"), [one for way in ("anyOf", "oneOf", "allOf") for one in schema.get(way) or ()]
    allowed = "null" in (kinds if isinstance(kinds, list) else [kinds]) or None in (schema.get("enum") or ())
    return allowed or schema.get("nullable") is True or any(map(_allows_null, ways))


def _unpadded(value, schema: dict | None, place: str):
    """Arguments of a call without the nulls with which an export pads them: where the schema allows null, it is meant;
    where there is none, nobody can tell."""
    if isinstance(value, list):
        return [_unpadded(part, (schema or {}).get("items") if schema is not None else None, place) for part in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for name, part in value.items():
        of = schema if schema is None else (schema.get("properties") or schema).get(name)
        of = of if isinstance(of, dict) or schema is None else {}
        if part is None and schema is None:
            meant = "and no schema in `tools` says whether it is meant; leave it out, or give the schema"
            raise BadRow("null argument", f"{place}: {name} is null, {meant}")
        if part is not None or _allows_null(of):
            found[name] = _unpadded(part, of, place)
    return found


def _json(text, place: str):
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"{place}: not JSON: {getattr(error, 'msg', error)}; write it as JSON, with double quotes"
        raise BadRow("tool call not JSON", message) from error
    check_characters(value, place)
    return value


def check_characters(value, path: str = "") -> None:
    """Raise a `BadRow` where a text within `value` holds what no tokenizer takes."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_characters(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, part in enumerate(value, start=1):
            check_characters(part, f"{path}[{number}]")
    elif isinstance(value, str) and "\0" in value:
        raise BadRow("NUL", f"{path}: holds a NUL character; remove it")
    elif isinstance(value, str) and (lone := re.search("[\ud800-\udfff]", value)):
        half = f"holds half a character (\\u{ord(lone.group()):x}); the text was cut inside an emoji or the like"
        raise BadRow("lone surrogate", f"{path}: {half}: write it whole, or remove it")


def _typed(row: dict, name: str, *kinds: type):
    if row.get(name) is None:
        raise BadRow("missing field", f"{name}: {_missing(name, row)}")
    if not isinstance(row[name], kinds):
        expected = " or ".join("a string" if kind is str else "a list" for kind in kinds)
        raise BadRow("wrong type", f"{name}: expected {expected}, found {type(row[name]).__name__}; write it as such")
    return row[name]


def _missing(name: str, row: dict) -> str:
    if name in row:
        return "is null; fill it in, or remove the row"
    return "missing; " + (f"did you write `{slip}` for it?" if (slip := near(name, row)) else "add it")


def system_merged(messages: list[dict]) -> list[dict]:
    """The messages, with each system message moved into the user turn that follows."""
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
