"""Chats to token ids and labels. A label is the token's own id where the model shall learn it, and -100 elsewhere.

Exactly each answer and its end-of-turn token carry loss, and each answer that does follows the very prompt that inference
would send for it.
"""

import re
from typing import NamedTuple

from recipes.utils.chat_template import ANSWER, USER, render
from recipes.utils.console import UserError
from recipes.utils.dataset import Chat
from recipes.utils.jsonl import BadRow

from jinja2 import TemplateError

MARK = "\ufdd0"  # a code point that is no character, so it stands in no text
BRACKETED = re.compile(r"<[^<>\n]{1,64}>|\[[^\[\]\n]{1,64}\]")  # what control tokens look like


class Document(NamedTuple):
    """One training row as text, cut where answers begin and end: (text, carries loss). `escaped` if a control token that
    somebody typed stands in it; `split` if it is one answer of a chat whose answers do not fit in one row."""

    pieces: list[tuple[str, bool]]
    where: str
    escaped: bool
    split: bool


class Encoded(NamedTuple):
    """One training row as the model sees it."""

    input_ids: list[int]
    labels: list[int]
    where: str


def encode_chats(chats: list[Chat], tokenizer, train_on: str = "all", escape: bool = False) -> list[Encoded]:
    """Render, tokenise and label `chats` with the tokenizer's chat template: one row a chat, or one an answer where the
    template lets only the last answer of a row follow what inference sends.

    Raises:
        UserError: naming file and line, if the template cannot carry a conversation.
    """
    rows, control = [], control_tokens(tokenizer)
    for chat in chats:
        try:
            rows += documents(chat, tokenizer, control, train_on, escape)
        except BadRow as error:
            raise UserError(f"{chat.where}: {error}") from error
    return encode_documents(rows, tokenizer)


def encode_documents(rows: list[Document], tokenizer) -> list[Encoded]:
    """Tokenise and label documents in one batch.

    The pieces are tokenised on their own: that is what inference does (the prompt is tokenised, the answer is generated
    after it), so no token ever straddles the border between the two.
    """
    plain = [text for row in rows if not row.escaped for text, _ in row.pieces]
    ids = iter(tokenizer.backend_tokenizer.encode_batch_fast(plain, add_special_tokens=False))
    encoded = []
    for row in rows:
        input_ids, labels = [], []
        for text, learnt in row.pieces:
            piece = _encode_escaped(text, tokenizer) if row.escaped else next(ids).ids
            input_ids += piece
            labels += piece if learnt else [-100] * len(piece)
        encoded.append(Encoded(input_ids, labels, row.where))
    return encoded


def documents(chat: Chat, tokenizer, control: frozenset[str], train_on: str, escape: bool) -> list[Document]:
    """The training rows of one chat, as text; `control` are the tokenizer's `control_tokens`.

    Raises:
        BadRow: if the template cannot carry the chat, or a control token stands in its text and `escape` is off.
    """
    messages, tools, escaped = _control_tokens(chat, control, escape)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [index for index in answers if messages[index].get("weight") != 0]
    if train_on == "last":
        wanted = [index for index in wanted if index == answers[-1]]
    try:
        text, spans = _spans(messages, tools, answers, tokenizer, control)
        _check_carried(text, messages, tools)
        here, straddled = [], False
        for index in wanted:
            if spans[index] and not straddled:
                here.append(index)
                straddled = _straddles(text, spans[index][0])
        rows = [Document(_cut(text, [spans[index] for index in here]), chat.where, escaped, False)] if here else []
        for index in sorted(set(wanted) - set(here)):
            upto = messages[: index + 1]
            text, spans = _spans(upto, tools, [place for place in answers if place <= index], tokenizer, control)
            if not spans[index]:
                raise TemplateError(
                    f"answer {answers.index(index) + 1} does not follow the prompt that inference sends"
                )
            rows.append(Document(_cut(text, [spans[index]]), chat.where, escaped, True))
    except TemplateError as error:
        raise BadRow("template", f"the chat template cannot carry this conversation: {error.message}") from error
    return rows


def prompt_ids(messages: list[dict], tokenizer, tools=None) -> list[int]:
    """The token ids that inference sends for `messages`, which end where an answer is due."""
    text = render(tokenizer, messages, tools, add_generation_prompt=True)[0]
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def stop_token_ids(tokenizer) -> list[int]:
    """The ids that end an answer: the template's end-of-turn token first, then the tokenizer's EOS."""
    labels = encode_chats([Chat([USER, ANSWER], "")], tokenizer)[0].labels
    end_of_turn = [label for label in labels if label != -100][-1]
    return list(dict.fromkeys([end_of_turn, tokenizer.eos_token_id]))


def control_tokens(tokenizer) -> frozenset[str]:
    """The tokens that steer the model: special ones, which no text of a user may become."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset({*special, *tokenizer.all_special_tokens})


def _spans(messages, tools, answers: list[int], tokenizer, control: frozenset[str]) -> tuple[str, dict]:
    """(text, {index of an answer: its (start, end), or None where it does not follow what inference sends for it})."""
    text, marked = render(tokenizer, messages, tools)
    if len(marked) != len(answers):
        raise TemplateError(f"the template marks {len(marked)} answers of {len(answers)}")
    endings, spans = tuple(control), {}
    for index, (start, end) in zip(answers, marked, strict=True):
        prompt = render(tokenizer, messages[:index], tools, add_generation_prompt=True)[0]
        # A template may mark the newline before an answer or after its end-of-turn token (TRL's Qwen2.5 twin does).
        # What inference sends is not learnt; nor is white space after the special token that ends the turn.
        learnt = text[start:end].rstrip()
        end = start + len(learnt) if learnt.endswith(endings) else end
        start = max(start, len(prompt))
        spans[index] = (start, end) if text.startswith(prompt) and start < end else None
    return text, spans


def _straddles(text: str, start: int) -> bool:
    """True if white space stands on both sides of an answer's beginning: cut apart here it is two tokens, and in the
    prompt of a later answer, where this one is history, it may be one."""
    return text[start - 1].isspace() and text[start].isspace()


def _cut(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [*pieces, (text[position:], False)]


def _check_carried(text: str, messages, tools) -> None:
    """Raise where the template lost something without a word: a system message, a tool, what a tool said."""
    for message in messages:
        if message["role"] in ("system", "tool") and message["content"].strip() not in text:
            raise TemplateError(
                f"it leaves out the {message['role']} message"
                + ("; --data.system merge puts it into the user turn" if message["role"] == "system" else "")
            )
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise TemplateError("it has no form for tool calls")
    if tools and tools[0]["function"].get("name", "") not in text:
        raise TemplateError("it has no form for tools")


def _control_tokens(chat: Chat, control: frozenset[str], escape: bool):
    """(messages, tools, whether one was escaped): control tokens typed in text are refused, or broken by `MARK`."""
    found = []
    odd = [token for token in control if not BRACKETED.fullmatch(token)]

    def broken(value):
        if isinstance(value, str):
            typed = [token for token in BRACKETED.findall(value) if token in control] + [
                token for token in odd if token in value
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


def _encode_escaped(text: str, tokenizer) -> list[int]:
    """Token ids of a piece in which only the template's own control tokens count as such."""
    control, backend = control_tokens(tokenizer), tokenizer.backend_tokenizer
    pattern = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True))
    ids = []
    for stretch in re.split(f"({pattern})", text):
        if stretch in control:
            ids.append(tokenizer.convert_tokens_to_ids(stretch))
        elif stretch:
            backend.encode_special_tokens = True
            ids += backend.encode(stretch.replace(MARK, ""), add_special_tokens=False).ids
            backend.encode_special_tokens = False
    return ids
