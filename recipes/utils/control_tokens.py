"""Control tokens typed in text: refused, or encoded as the plain text that they are."""

import re
from typing import NamedTuple

from recipes.utils.dataset import Chat
from recipes.utils.jsonl import BadRow

from tokenizers import Tokenizer

MARK = "\ufdd0"  # a code point that is no character, so it stands in no text


class Control(NamedTuple):
    """The tokens that steer the model, which no text of a user may become: all of them, their ids, a pattern that finds
    them; a tokenizer for text that goes on after other text; and what encoding.py found out about forms of conversation."""

    tokens: frozenset[str]
    ids: frozenset[int]
    pattern: re.Pattern
    going_on: Tokenizer
    forms: dict


def control_tokens(tokenizer) -> Control:
    """The control tokens of a tokenizer."""
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = frozenset({*special.values(), *tokenizer.all_special_tokens})
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    # Sentencepiece tokenizers put a blank before the first text; a piece that goes on after another must get none.
    backend = tokenizer.backend_tokenizer.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    return Control(tokens, frozenset(special), pattern, Tokenizer.from_str(backend), {})


def guard_control_tokens(chat: Chat, control: Control, escape: bool):
    """(messages, tools, whether one was escaped): control tokens typed in text are refused, or broken by `MARK`."""
    found = []

    def broken(value):
        if isinstance(value, str):
            found.extend(control.pattern.findall(value))
            return control.pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], value)
        if isinstance(value, dict):
            return {broken(key): broken(part) for key, part in value.items()}
        return [broken(part) for part in value] if isinstance(value, list) else value

    tools = broken(chat.tools)
    _refuse(found, "tools", escape)
    messages = []
    for number, message in enumerate(chat.messages, start=1):
        messages.append(
            {**broken({key: part for key, part in message.items() if key != "role"}), "role": message["role"]}
        )
        _refuse(found, f"turn {number} ({message['role']})", escape)
    return (messages, tools, True) if found else (chat.messages, chat.tools, False)


def _refuse(found: list[str], place: str, escape: bool) -> None:
    if found and not escape:
        raise BadRow(
            "control token",
            f"{place}: holds the control token {found[0]}, which would become the real one; "
            "--data.control_tokens escape encodes it as plain text",
        )


def encode_escaped(text: str, tokenizer, control: Control, first: bool) -> list[int]:
    """Token ids of a piece in which only the template's own control tokens count as such; `first` if it begins the row."""
    ids = []
    for place, stretch in enumerate(re.split(f"({control.pattern.pattern})", text)):
        if stretch in control.tokens:
            ids.append(tokenizer.convert_tokens_to_ids(stretch))
        elif stretch:
            backend = tokenizer.backend_tokenizer if first and place == 0 else control.going_on
            backend.encode_special_tokens = True
            ids += backend.encode(stretch.replace(MARK, ""), add_special_tokens=False).ids
            backend.encode_special_tokens = False
    return ids
