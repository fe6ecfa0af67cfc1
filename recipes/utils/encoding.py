"""Chats to token ids and labels. A label is the token's own id where the model shall learn it, and -100 elsewhere.

Exactly each answer and its end-of-turn token carry loss, and each answer that does follows the very prompt that inference
would send for it.
"""

import re
from typing import NamedTuple

from recipes.utils.chat_template import ANSWER, USER, render
from recipes.utils.console import UserError
from recipes.utils.control_tokens import MARK, Control, control_tokens, encode_escaped, guard_control_tokens
from recipes.utils.dataset import Chat
from recipes.utils.jsonl import BadRow

from jinja2 import TemplateError


class Document(NamedTuple):
    """One training row as text, cut where answers begin and end: (text, carries loss). `escaped` if a control token that
    somebody typed stands in it; `split` if it is one answer of a chat whose answers do not fit in one row."""

    pieces: list[tuple[str, bool]]
    where: str
    escaped: bool
    split: bool


class Encoded(NamedTuple):
    """One training row as the model sees it: `trained` tokens carry loss, and `stops` says whether each run of them, so
    each answer, ends with a control token."""

    input_ids: list[int]
    labels: list[int]
    where: str
    trained: int
    stops: bool


def encode_chats(chats: list[Chat], tokenizer, train_on="all", escape=False, control=None) -> list[Encoded]:
    """Render, tokenise and label `chats` with the tokenizer's chat template: one row a chat, or one an answer where the
    template lets only the last answer of a row follow what inference sends. `control` are the tokenizer's
    `control_tokens`, where the caller has them: they hold a copy of the tokenizer.

    Raises:
        UserError: naming file and line, if the template cannot carry a conversation.
    """
    rows, control = [], control or control_tokens(tokenizer)
    for chat in chats:
        try:
            rows += documents(chat, tokenizer, control, train_on, escape)
        except BadRow as error:
            raise UserError(f"{chat.where}: {error}") from error
    return encode_documents(rows, tokenizer, control)


def encode_documents(rows: list[Document], tokenizer, control: Control) -> list[Encoded]:
    """Tokenise and label documents in one batch.

    The pieces are tokenised on their own: that is what inference does (the prompt is tokenised, the answer is generated
    after it), so no token ever straddles the border between the two.
    """
    plain = [row for row in rows if not row.escaped]
    first = [row.pieces[0][0] for row in plain]
    going_on = [text for row in plain for text, _ in row.pieces[1:]]
    first_ids = iter(tokenizer.backend_tokenizer.encode_batch_fast(first, add_special_tokens=False))
    ids = iter(control.going_on.encode_batch_fast(going_on, add_special_tokens=False))
    encoded = []
    for row in rows:
        input_ids, labels, trained, stops = [], [], 0, True
        for place, (text, learnt) in enumerate(row.pieces):
            if row.escaped:
                piece = encode_escaped(text, tokenizer, control, first=place == 0)
            else:
                piece = next(ids if place else first_ids).ids
            input_ids += piece
            labels += piece if learnt else [-100] * len(piece)
            if learnt:
                trained += len(piece)
                stops = stops and piece[-1] in control.ids
        encoded.append(Encoded(input_ids, labels, row.where, trained, stops))
    return encoded


def documents(chat: Chat, tokenizer, control: Control, train_on: str, escape: bool) -> list[Document]:
    """The training rows of one chat, as text; `control` are the tokenizer's `control_tokens`.

    Raises:
        BadRow: if the template cannot carry the chat, or a control token stands in its text and `escape` is off.
    """
    messages, tools, escaped = guard_control_tokens(chat, control, escape)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [index for index in answers if messages[index].get("weight") != 0]
    if train_on == "last":
        wanted = wanted[-1:]
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


def prompt_ids(messages: list[dict], tokenizer, tools=None, escape: bool = False, control=None) -> list[int]:
    """The token ids that inference sends for `messages`, which end where an answer is due; with `escape`, those that
    training had for a chat with typed control tokens. `control`: as for `encode_chats`."""
    if escape:
        control = control or control_tokens(tokenizer)
        messages, tools, escape = guard_control_tokens(Chat(messages, "", tools), control, escape)
    text = render(tokenizer, messages, tools, add_generation_prompt=True)[0]
    if escape:
        return encode_escaped(text, tokenizer, control, first=True)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def stop_token_ids(tokenizer) -> list[int]:
    """The ids that end an answer: the template's end-of-turn token first, then the tokenizer's EOS."""
    labels = encode_chats([Chat([USER, ANSWER], "")], tokenizer)[0].labels
    end_of_turn = [label for label in labels if label != -100][-1]
    return list(dict.fromkeys([end_of_turn, tokenizer.eos_token_id]))


def _spans(messages, tools, answers: list[int], tokenizer, control: Control) -> tuple[str, dict]:
    """(text, {index of an answer: its (start, end), or None where it does not follow what inference sends for it})."""
    text, marked = render(tokenizer, messages, tools)
    if len(marked) != len(answers):
        raise TemplateError(f"the template marks {len(marked)} answers of {len(answers)}")
    endings, spans = tuple(control.tokens), {}
    starts = _starts(text, marked, messages, tools, answers, tokenizer, control)
    for index, (start, end), prompt_end in zip(answers, marked, starts, strict=True):
        # A template may mark the newline before an answer or after its end-of-turn token (TRL's Qwen2.5 twin does).
        # What inference sends is not learnt; nor is white space after the special token that ends the turn.
        learnt = text[start:end].rstrip()
        end = start + len(learnt) if learnt.endswith(endings) else end
        spans[index] = None if prompt_end is None or prompt_end >= end else (max(start, prompt_end), end)
    return text, spans


def _starts(text, marked, messages, tools, answers, tokenizer, control: Control) -> list[int | None]:
    """Where the prompt that inference sends for each answer ends in `text`, or None where the text does not begin with it.

    Rendering each prompt is what decides it, and costs as many renderings as there are answers. For a form of conversation
    (its roles) it is done once: where a row is the form's fixed text around its own messages, letter by letter, the prompts
    are too, so its answers end and follow as those of the form did.
    """
    form = tuple(message["role"] for message in messages)
    plain = not tools and not any("tool_calls" in message for message in messages)
    if plain and form not in control.forms:
        probes = [{"role": role, "content": f"{MARK}{number}{MARK}"} for number, role in enumerate(form)]
        probe, probe_marked = render(tokenizer, probes)
        ends = _rendered_starts(probe, probes, None, answers, tokenizer)
        offsets = [None if end is None else end - start for end, (start, _) in zip(ends, probe_marked, strict=True)]
        fixed = re.split(f"{MARK}\\d+{MARK}", probe)
        control.forms[form] = (fixed, re.findall(f"{MARK}(\\d+){MARK}", probe), offsets)
    if plain:
        fixed, order, offsets = control.forms[form]
        words = [messages[int(number)]["content"] for number in order]
        if text == "".join(part for pair in zip(fixed, [*words, ""], strict=True) for part in pair):
            return [
                None if offset is None else start + offset for offset, (start, _) in zip(offsets, marked, strict=True)
            ]
    return _rendered_starts(text, messages, tools, answers, tokenizer)


def _rendered_starts(text, messages, tools, answers, tokenizer) -> list[int | None]:
    prompts = [render(tokenizer, messages[:index], tools, add_generation_prompt=True)[0] for index in answers]
    return [len(prompt) if text.startswith(prompt) else None for prompt in prompts]


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
        # What a tool said may be written anew as JSON, so its first words are looked for.
        said = (
            re.findall(r"\w{3,}", message["content"])[:1] if message["role"] == "tool" else [message["content"].strip()]
        )
        if message["role"] in ("system", "tool") and any(part not in text for part in said):
            raise TemplateError(
                f"it leaves out the {message['role']} message"
                + ("; --data.system merge puts it into the user turn" if message["role"] == "system" else "")
            )
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise TemplateError("it has no form for tool calls")
    if tools and tools[0]["function"].get("name", "") not in text:
        raise TemplateError("it has no form for tools")
