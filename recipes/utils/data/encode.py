"""Chats to token ids and labels. A label is the token's own id where the model shall learn it, and -100 elsewhere.
Exactly each answer and its end-of-turn token carry loss, and each follows the very prompt that inference sends."""

import re
from functools import cached_property
from itertools import chain, pairwise
from typing import NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer

from recipes.utils.console import UserError
from recipes.utils.data.chats import Chat
from recipes.utils.data.shapes import BadRow
from recipes.utils.data.template import ANSWER, USER, answer_spans, control_tokens, opens_chat, render

MARK = "\ufdd0"  # a code point that is no character, so it stands in no text


class Document(NamedTuple):
    """One training row as text, cut where answers begin and end."""

    pieces: list[tuple[str, bool]]  # (text, carries loss)
    where: str
    escaped: bool  # a typed control token stands in it
    split: bool  # it is one answer of a chat whose answers do not fit in one row


class Encoded(NamedTuple):
    """One training row as the model sees it."""

    input_ids: list[int]
    labels: list[int]
    where: str
    trained: int  # tokens that carry loss
    stops: bool  # each run of them, so each answer, ends with a control token


class Encoder:
    """Renders, tokenises and labels chats by the template of `tokenizer`, of which it holds a copy: make one, keep it.
    No text of a user may become a control token: a typed one is refused, or with `escape` encoded as plain text."""

    def __init__(self, tokenizer, escape: bool = False):
        self.tokenizer, self.escape = tokenizer, escape
        self.control_tokens = control_tokens(tokenizer)
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self.control_tokens)))
        self._typed = re.compile("|".join(map(re.escape, self.control_tokens)))
        # Sentencepiece tokenizers put a blank before the first text; a piece that goes on after another must get none.
        backend = tokenizer.backend_tokenizer.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        self._going_on = Tokenizer.from_str(backend)
        self._forms: dict[tuple, tuple] = {}  # what _spans found out about forms of conversation

    def encode(self, chats: list[Chat], train_on: str = "all") -> list[Encoded]:
        """One row a chat, or one an answer where the template lets only the last answer of a row follow what inference
        sends. Raises a `UserError`, naming file and line, if the template cannot carry a conversation."""
        documents = []
        for chat in chats:
            try:
                documents += self.documents(chat, train_on)
            except BadRow as error:
                raise UserError(f"{chat.where}: {error}") from error
        return self.encode_documents(documents)

    def documents(self, chat: Chat, train_on: str = "all") -> list[Document]:
        """The rows of a chat as text. Raises `BadRow` if the template cannot carry it or a control token is refused."""
        messages, tools, escaped = self._guarded(chat.messages, chat.tools)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [place for place in answers if messages[place].get("weight") != 0 and not opens_chat(messages, place)]
        wanted = wanted[-1:] if train_on == "last" else wanted
        if not wanted:
            raise BadRow("no answer", "the answer opens the chat, so nothing asks for it; put a user message before it")
        try:
            text, spans = self._spans(messages, tools)
            _check_carried(text, messages, tools)
            here, straddled = [], False
            for index in wanted:
                if spans[index] and not straddled:
                    here.append(index)
                    # White space on both sides of an answer's beginning: cut apart here it is two tokens, and in the
                    # prompt of a later answer, where this one is history, it may be one.
                    straddled = text[spans[index][0] - 1 : spans[index][0] + 1].isspace()
            rows = [Document(_cut(text, [spans[index] for index in here]), chat.where, escaped, False)] if here else []
            for index in sorted(set(wanted) - set(here)):
                text, spans = self._spans(messages[: index + 1], tools)
                if not spans[index]:
                    sent = render(self.tokenizer, messages[:index], tools, True)[0][-20:]
                    raise TemplateError(
                        f"answer {len(spans)} does not follow the prompt that inference sends, {sent!r}"
                    )
                rows.append(Document(_cut(text, [spans[index]]), chat.where, escaped, True))
        except TemplateError as error:
            what = f"the chat template cannot carry this conversation: {error.message}"
            if messages[0]["role"] == "system" and "system" in what.casefold():
                what += "; --data.system merge puts it into the user turn"
            raise BadRow("template", what) from error
        return rows

    def encode_documents(self, documents: list[Document]) -> list[Encoded]:
        """Tokenise and label documents in one batch. Each piece is tokenised alone, as inference does (it tokenises
        the prompt and generates the answer), so no token ever straddles the border between the two."""
        plain = [document.pieces for document in documents if not document.escaped]
        first, later = [pieces[0][0] for pieces in plain], [text for pieces in plain for text, _ in pieces[1:]]
        first_ids = iter(self.tokenizer.backend_tokenizer.encode_batch_fast(first, add_special_tokens=False))
        later_ids = iter(self._going_on.encode_batch_fast(later, add_special_tokens=False))
        encoded = []
        for document in documents:
            ids, labels, stops = [], [], True
            for place, (text, learnt) in enumerate(document.pieces):
                tokenised = later_ids if place else first_ids
                piece: list[int] = self._escaped_ids(text, place == 0) if document.escaped else next(tokenised).ids
                ids += piece
                labels += piece if learnt else [-100] * len(piece)
                stops = stops and (not learnt or piece[-1] in self.control_ids)
            encoded.append(Encoded(ids, labels, document.where, len(labels) - labels.count(-100), stops))
        return encoded

    def prompt_ids(self, messages: list[dict], tools=None) -> list[int]:
        """The token ids that inference sends where an answer to `messages` is due, escaped as for training."""
        messages, tools, escaped = self._guarded(messages, tools) if self.escape else (messages, tools, False)
        text = render(self.tokenizer, messages, tools, add_generation_prompt=True)[0]
        plain = self.tokenizer.backend_tokenizer.encode
        return self._escaped_ids(text, first=True) if escaped else plain(text, add_special_tokens=False).ids

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: the template's end-of-turn token first, then the tokenizer's EOS."""
        learnt = [label for label in self.encode([Chat([USER, ANSWER], "")])[0].labels if label != -100]
        return list(dict.fromkeys([learnt[-1], self.tokenizer.eos_token_id]))

    def _guarded(self, messages: list[dict], tools: list[dict] | None) -> tuple[list[dict], list[dict] | None, bool]:
        """(messages, tools, whether one was escaped): control tokens typed in text are refused, or broken by `MARK`."""
        found: list[str] = []

        def broken(value):
            if isinstance(value, str) and self._typed.search(value):
                found.extend(self._typed.findall(value))
                return self._typed.sub(lambda match: match[0][0] + MARK + match[0][1:], value)
            if isinstance(value, dict):
                return {broken(key): broken(part) for key, part in value.items()}
            return [broken(part) for part in value] if isinstance(value, list) else value

        guarded = []
        for number, message in enumerate([{"tools": tools}, *messages]):
            guarded.append({key: part if key == "role" else broken(part) for key, part in message.items()})
            if found and not self.escape:
                place = f"turn {number} ({message['role']})" if number else "tools"
                what = f"{place}: holds the control token {found[0]}, which would become the real one"
                raise BadRow("control token", f"{what}; --data.control_tokens escape encodes it as plain text")
        return (guarded[1:], guarded[0]["tools"], True) if found else (messages, tools, False)

    def _escaped_ids(self, text: str, first: bool) -> list[int]:
        """Token ids of a piece in which the template's own control tokens alone count; `first` if it begins the row."""
        ids = []
        for place, stretch in enumerate(re.split(f"({self._typed.pattern})", text)):
            if stretch in self.control_tokens:
                ids.append(self.tokenizer.convert_tokens_to_ids(stretch))
            elif stretch:
                backend = self.tokenizer.backend_tokenizer if first and place == 0 else self._going_on
                backend.encode_special_tokens = True
                ids += backend.encode(stretch.replace(MARK, ""), add_special_tokens=False).ids
                backend.encode_special_tokens = False
        return ids

    def _spans(self, messages, tools) -> tuple[str, dict]:
        """What `answer_spans` finds, which renders each prompt to decide it, but once for a form of conversation (its
        roles): where a row is the form's fixed text around its own messages, letter by letter, its answers begin and
        end where those of the form did."""
        if tools or any("tool_calls" in message for message in messages):
            return answer_spans(self.tokenizer, messages, tools)
        form = tuple(message["role"] for message in messages)
        if form not in self._forms:
            probes = [{"role": role, "content": f"{MARK}{number}{MARK}"} for number, role in enumerate(form)]
            self._forms[form] = answer_spans(self.tokenizer, probes)
        probe, spans = self._forms[form]
        text, pattern = render(self.tokenizer, messages)[0], f"{MARK}(\\d+){MARK}"
        if text != re.sub(pattern, lambda number: messages[int(number[1])]["content"], probe):
            return answer_spans(self.tokenizer, messages)
        grown = [(m.end(), len(messages[int(m[1])]["content"]) - len(m[0])) for m in re.finditer(pattern, probe)]

        def moved(place: int) -> int:
            return place + sum(by for end, by in grown if end <= place)

        return text, {index: span and (moved(span[0]), moved(span[1])) for index, span in spans.items()}


def _cut(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    borders = [0, *chain.from_iterable(spans), len(text)]  # what lies between them is read and learnt in turn
    return [(text[start:end], place % 2 == 1) for place, (start, end) in enumerate(pairwise(borders))]


def _check_carried(text: str, messages, tools) -> None:
    """Raise where the template lost something without a word: a system message, a tool, what a tool said."""
    for message in messages:
        role, said = message["role"], [message["content"].strip()]
        if role == "tool":  # may be written anew as JSON, so its first words are looked for
            said = re.findall(r"\w{3,}", message["content"])[:1]
        if role in ("system", "tool") and any(part not in text for part in said):
            raise TemplateError(f"it leaves out the {role} message")
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
            raise TemplateError("it has no form for tool calls")
    if tools and tools[0]["function"].get("name", "") not in text:
        raise TemplateError("it has no form for tools")
