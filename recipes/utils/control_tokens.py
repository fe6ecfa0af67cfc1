"""Control tokens typed in text: refused, or encoded as the plain text that they are."""

import re
from typing import NamedTuple

from recipes.utils.dataset import Chat
from recipes.utils.jsonl import BadRow

MARK = "\ufdd0"  # a code point that is no character, so it stands in no text
BRACKETED = re.compile(r"<[^<>\n]{1,64}>|\[[^\[\]\n]{1,64}\]")  # what control tokens look like


class Control(NamedTuple):
    """The tokens that steer the model, which no text of a user may become: all of them, their ids, those without
    brackets; and what encoding.py found out about each form of conversation."""

    tokens: frozenset[str]
    ids: frozenset[int]
    odd: tuple[str, ...]
    forms: dict


def control_tokens(tokenizer) -> Control:
    """The control tokens of a tokenizer."""
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = frozenset({*special.values(), *tokenizer.all_special_tokens})
    odd = tuple(token for token in tokens if not BRACKETED.fullmatch(token))
    return Control(tokens, frozenset(special), odd, {})


def guard_control_tokens(chat: Chat, control: Control, escape: bool):
    """(messages, tools, whether one was escaped): control tokens typed in text are refused, or broken by `MARK`."""
    found = []

    def broken(value):
        if isinstance(value, str):
            typed = [token for token in BRACKETED.findall(value) if token in control.tokens] + [
                token for token in control.odd if token in value
            ]
            found.extend(typed)
            for token in typed:
                value = value.replace(token, token[0] + MARK + token[1:])
            return value
        if isinstance(value, dict):
            return {key: broken(part) for key, part in value.items()}
        return [broken(part) for part in value] if isinstance(value, list) else value

    messages = []
    for number, message in enumerate(chat.messages, start=1):
        messages.append(
            {**broken({key: part for key, part in message.items() if key != "role"}), "role": message["role"]}
        )
        if found and not escape:
            raise BadRow(
                "control token",
                f"turn {number} ({message['role']}): holds the control token {found[0]}, which would "
                "become the real one; --data.control_tokens escape encodes it as plain text",
            )
    return (messages, broken(chat.tools), True) if found else (chat.messages, chat.tools, False)


def encode_escaped(text: str, tokenizer, control: Control) -> list[int]:
    """Token ids of a piece in which only the template's own control tokens count as such."""
    backend = tokenizer.backend_tokenizer
    pattern = "|".join(re.escape(token) for token in sorted(control.tokens, key=len, reverse=True))
    ids = []
    for stretch in re.split(f"({pattern})", text):
        if stretch in control.tokens:
            ids.append(tokenizer.convert_tokens_to_ids(stretch))
        elif stretch:
            backend.encode_special_tokens = True
            ids += backend.encode(stretch.replace(MARK, ""), add_special_tokens=False).ids
            backend.encode_special_tokens = False
    return ids
