"""One row to messages: four shapes of JSON, tool calls too, and what is wrong with a row by turn and field."""

import contextlib
import difflib
import hashlib
import json
import re

from recipes.utils.jsonl import BadRow, check_characters

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
SHAPES = {  # the keys of each shape; the first ones must be there
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "prompt-completion": ("prompt", "completion", "tools"),
    "alpaca": ("instruction", "output", "input", "system"),
}
MESSAGE_KEYS = ("role", "content", "tool_calls", "weight", "tool_call_id", "name")
_KEYS = [name for names in SHAPES.values() for name in names]


def row_shape(row: dict) -> str:
    """Which of `SHAPES` the row has."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "prompt" in row or "completion" in row:
        return "prompt-completion"
    if "instruction" in row or "output" in row:
        return "alpaca"
    near = [f"`{key}` for {close[0]}" for key in row if (close := difflib.get_close_matches(key, _KEYS, n=1))]
    mend = (
        f"did you write {near[0]}?"
        if near
        else ("expected `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`")
    )
    raise BadRow("missing field", f"no known shape: found the keys {sorted(row)}; {mend}")


def turns_of(row: dict, shape: str) -> list:
    """The row as a list of {"role", "content"}, not checked yet."""
    if shape == "messages":
        return _field(row, "messages", list)
    system = (
        [{"role": "system", "content": row["system"]}] if shape in ("sharegpt", "alpaca") and row.get("system") else []
    )
    if shape == "sharegpt":
        return system + [_sharegpt_turn(turn, n) for n, turn in enumerate(_field(row, "conversations", list), start=1)]
    if shape == "prompt-completion":
        prompt, completion = _field(row, "prompt", (str, list)), _field(row, "completion", (str, list))
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt + ([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)
    instruction, output = _field(row, "instruction", str), _field(row, "output", str)
    context = _field(row, "input", str) if row.get("input") else ""
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _field(row: dict, name: str, kind):
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        raise BadRow(
            "missing field", f"{name}: missing" + (f"; did you write `{near[0]}` for it?" if near else "; add it")
        )
    if not isinstance(row[name], kind):
        kinds = " or ".join(
            {str: "a string", list: "a list"}[k] for k in (kind if isinstance(kind, tuple) else (kind,))
        )
        raise BadRow("wrong type", f"{name}: expected {kinds}, found {type(row[name]).__name__}; write it as such")
    return row[name]


def _sharegpt_turn(turn, number: int) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(
            "wrong type", f"conversations: turn {number}: expected an object with `from` and `value`; write both"
        )
    role = turn["from"] if isinstance(turn["from"], str) else repr(turn["from"])
    if role not in SHAREGPT_ROLES:
        raise BadRow(
            "unknown role", f"conversations: turn {number}: unknown role {role!r}; {_nearest(role, SHAREGPT_ROLES)}"
        )
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    if role == "function_call":
        calls = _json(turn["value"], f"turn {number}: function_call")
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": calls if isinstance(calls, list) else [calls],
            **weight,
        }
    return {"role": SHAREGPT_ROLES[role], "content": turn["value"], **weight}


def check_message(message, number: int) -> dict:
    """The message reduced to what a template reads, or a `BadRow` that names the turn."""
    if not isinstance(message, dict):
        raise BadRow("wrong type", f"turn {number}: expected an object with `role` and `content`; write both")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise BadRow("unknown role", f"turn {number}: unknown role {role!r}; {_nearest(str(role), ROLES)}")
    if calls and role == "assistant":
        content = content or ""
    if not isinstance(content, str):
        near = difflib.get_close_matches("content", message, n=1)
        found = "missing" + (f"; did you write `{near[0]}` for it?" if near else "; add it")
        found = (
            found if content is None else f"expected a string, found {type(content).__name__}; join its parts into one"
        )
        raise BadRow("missing field" if content is None else "wrong type", f"turn {number} ({role}): content: {found}")
    if role == "assistant" and not content.strip() and not calls:
        raise BadRow(
            "empty answer",
            f"turn {number}: the answer is empty; it would teach the model to stop at once: fill "
            "it in, or remove the row",
        )
    for key in message.keys() - set(MESSAGE_KEYS):
        if near := difflib.get_close_matches(key, MESSAGE_KEYS, n=1, cutoff=0.8):
            raise BadRow("misspelt key", f"turn {number}: unknown key `{key}`; did you mean `{near[0]}`?")
    if role == "tool" and "\\u" in content:  # a template may decode such text, and show what it hides
        with contextlib.suppress(BadRow):
            content = json.dumps(_json(content, "content"), ensure_ascii=False)
    checked = {"role": role, "content": content}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise BadRow(
                "wrong type", f"turn {number}: tool_calls: expected a list, in an assistant turn; move it there"
            )
        checked["tool_calls"] = [_tool_call(call, number) for call in calls]
    if "weight" in message:
        if message["weight"] not in (0, 1) or isinstance(message["weight"], bool):
            raise BadRow(
                "wrong type", f"turn {number}: weight: expected 0 (no loss on this turn) or 1; write one of them"
            )
        checked["weight"] = message["weight"]
    if role == "tool" and isinstance(message.get("tool_call_id"), str):
        checked["tool_call_id"] = _call_id(message["tool_call_id"])
    return checked


def _tool_call(call, number: int) -> dict:
    """{"type": "function", "function": {"name", "arguments": dict}}, with "id" where the row has one."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(
            "wrong type", f"turn {number}: tool_calls: expected objects with `name` and `arguments`; write both"
        )
    arguments = function.get("arguments", {})
    arguments = (
        _json(arguments, f"turn {number}: arguments of {function['name']}") if isinstance(arguments, str) else arguments
    )
    if not isinstance(arguments, dict):
        raise BadRow(
            "wrong type", f'turn {number}: arguments of {function["name"]}: expected an object; write {{"name": value}}'
        )
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": _call_id(call["id"]), **checked} if isinstance(call.get("id"), str) else checked


def _call_id(name: str) -> str:
    """Nine letters or digits, which is what Mistral's form takes; another id becomes such a one, the same each time."""
    if re.fullmatch("[a-zA-Z0-9]{9}", name):
        return name
    return hashlib.blake2b(name.encode(), digest_size=5).hexdigest()[:9]


def check_tools(tools) -> list[dict] | None:
    """Function schemas in the form that templates expect, from a list or its JSON text."""
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong type", "tools: expected a list of function schemas, or its JSON text; write [] for none")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _json(text, what: str):
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as error:
        message = f"{what}: not JSON: {getattr(error, 'msg', error)}; write it as JSON, with double quotes"
        raise BadRow("tool call not JSON", message) from error
    check_characters(value, what)
    return value


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
