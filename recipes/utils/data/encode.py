"""Chats to token ids and labels. A label is the token's own id where the model shall learn it, and -100 elsewhere.
Exactly each answer and its end-of-turn token carry loss, and each follows the very prompt that inference sends."""

import contextlib
import re
from functools import cached_property
from typing import NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer

from recipes.utils.console import UserError
from recipes.utils.data.chats import Chat
from recipes.utils.data.shapes import BadRow, split_thought
from recipes.utils.data.template import ANSWER, USER, answer_spans, control_tokens, opens_chat, read_thoughts, render

HERMES = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "clock", "description": "What time it is.", "parameters": SCHEMA}}
CALLED = {"id": "call00000", "type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo"}}}
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
    No text of a user may become a control token: a typed one is refused, or with `escape` encoded as plain text.
    `think` is what becomes of thoughts: "keep", "mask" (read, not learnt) or "drop"; by default as the template asks.
    `template` is the tokenizer's, switched accordingly: the one to save. An answer without a thought is learnt after
    the prompt that asks for none, so that no empty thought is learnt."""

    def __init__(self, tokenizer, escape: bool = False, think: str | None = None):
        self.tokenizer, self.escape, self.thoughts = tokenizer, escape, read_thoughts(tokenizer)
        switched_off = tokenizer.chat_template == self.thoughts.off != self.thoughts.on
        self.think = think or ("drop" if switched_off else "keep")
        self.template = self.thoughts.off if self.think == "drop" else self.thoughts.on
        self.control_tokens = control_tokens(tokenizer)
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self.control_tokens)))
        self._typed = re.compile("|".join(map(re.escape, control_tokens(tokenizer, marks=True))))
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
        messages, tools, escaped = self._guarded(self._read(chat.messages), chat.tools)
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
                together = spans[index] and self._mode(messages[: index + 1]) == self._mode(messages)
                if together and not straddled and (cut := self._learnt(text, spans[index], messages[index])):
                    here.append((index, cut))
                    # White space on both sides of an answer's beginning: cut apart here it is two tokens, and in the
                    # prompt of a later answer, where this one is history, it may be one.
                    straddled = text[cut[0] - 1 : cut[0] + 1].isspace()
            rows = [Document(_cut(text, [cut for _, cut in here]), chat.where, escaped, False)] if here else []
            for index in sorted(set(wanted) - {index for index, _ in here}):
                text, spans = self._spans(messages[: index + 1], tools)
                if not spans[index]:
                    sent = self._prompt(messages[:index], tools, self._mode(messages[: index + 1]))[-20:]
                    what = f"answer {len(spans)} does not follow the prompt that inference sends, {sent!r}"
                    raise TemplateError(what)
                if not (cut := self._learnt(text, spans[index], messages[index])):
                    raise TemplateError("it leaves out a thought; --data.think drop leaves out all of them")
                rows.append(Document(_cut(text, [cut]), chat.where, escaped, True))
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

    def prompt_ids(self, messages: list[dict], tools=None, answer: dict | None = None) -> list[int]:
        """The token ids that inference sends where an answer to `messages` is due, escaped as for training; asking for
        a thought as the template has it by default, or where the `answer` is known, if that has one."""
        template = self._mode(self._read([answer])) if answer else self.template
        messages = self._read(messages)
        messages, tools, escaped = self._guarded(messages, tools) if self.escape else (messages, tools, False)
        text = self._prompt(messages, tools, template)
        plain = self.tokenizer.backend_tokenizer.encode
        return self._escaped_ids(text, first=True) if escaped else plain(text, add_special_tokens=False).ids

    def asks_thought(self, answer: dict) -> bool | None:
        """Whether inference asks for a thought where this `answer` is due; None if the template knows no difference."""
        same = self.thoughts.on == self.thoughts.off
        return None if same else self._mode(self._read([answer])) == self.thoughts.on

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: the template's end-of-turn token first, then what ends a call, where that is
        another one (gpt-oss, GLM), and the tokenizer's EOS."""
        rows = self.encode([Chat([USER, ANSWER], "")])
        with contextlib.suppress(UserError):  # a template without a form for calls
            rows += self.encode([Chat([USER, {**ANSWER, "content": "", "tool_calls": [CALLED]}], "", [TOOL])])
        last = [next(label for label in reversed(row.labels) if label != -100) for row in rows]
        return list(dict.fromkeys([*last, self.tokenizer.eos_token_id]))

    def prompts(self, chat: Chat) -> list[tuple[list[dict], str | None]]:
        """(messages, template) of the prompt of each answer, as inference renders them; None for the saved template."""
        messages = self._read(chat.messages)
        asked = [n for n, turn in enumerate(messages) if turn["role"] == "assistant" and not opens_chat(messages, n)]
        modes = [self._mode(messages[: place + 1]) for place in asked]
        shown = [self.thoughts.shown(messages[:place]) for place in asked]
        return list(zip(shown, [None if mode == self.template else mode for mode in modes], strict=True))

    def _read(self, messages: list[dict]) -> list[dict]:
        """The messages with thoughts apart from answers, where the template has a place for them, or without; and
        results of tools without the tags that the template writes itself. Raises `BadRow` if it has no place."""
        found, apart = [], self.thoughts.place or self.think == "drop"
        for number, message in enumerate(messages, start=1):
            if message["role"] == "assistant":
                if "reasoning_content" in message and not apart:
                    mend = "write it into the content as <think>...</think>, or --data.think drop"
                    raise BadRow("thought", f"turn {number}: the chat template has no place for its thought; {mend}")
                if apart and ("reasoning_content" in message or "</think>" in message["content"]):
                    thought, answer = split_thought(message)
                    message = {**message, "content": answer} | ({"reasoning_content": thought} if thought else {})
                    if self.think == "drop":
                        message.pop("reasoning_content", None)
                    if not answer.strip() and "tool_calls" not in message:
                        raise BadRow("empty answer", f"turn {number}: the answer is a thought alone; remove the row")
            elif message["role"] == "tool" and "<tool_response>" in message["content"]:
                parts = HERMES.findall(message["content"])
                if "<tool_response>" in self.template and not HERMES.sub("", message["content"]):
                    found += [{**message, "content": part} for part in parts]
                    continue
            found.append(message)
        return found

    def _mode(self, messages: list[dict]) -> str:
        """The template for the last of `messages`, an answer: with its thinking on, or off where it has no thought."""
        return self.thoughts.on if "reasoning_content" in messages[-1] else self.thoughts.off

    def _prompt(self, messages: list[dict], tools, template: str) -> str:
        return render(self.tokenizer, self.thoughts.shown(messages), tools, True, template)[0]

    def _learnt(self, text: str, span: tuple[int, int], message: dict) -> tuple[int, int, int] | None:
        """(start of an answer in the text, start of what is learnt of it, end); None if its thought is not there."""
        start, end = span
        thought = message.get("reasoning_content") or ("</think>" if "</think>" in message["content"] else "")
        if (place := text.find(thought, start, end)) < 0:
            return None
        if not thought or self.think != "mask":
            return start, start, end
        place += len(thought) if thought != "</think>" else 0
        closed = re.compile(r"\s*</think>\s*").match(text, place)
        begins = closed.end() if closed else text.find(message["content"] or MARK, place, end)
        if begins < 0:
            raise TemplateError("where a thought ends cannot be told; --data.think keep learns it")
        return start, begins, end

    def _guarded(self, messages: list[dict], tools: list[dict] | None) -> tuple[list[dict], list[dict] | None, bool]:
        """(messages, tools, whether one was escaped): control tokens typed in text are refused, or broken by `MARK`."""
        found: list[str] = []

        def broken(value):
            if isinstance(value, str) and self._typed.search(value):
                found.extend(self._typed.findall(value))
                gap = dict.fromkeys(self.control_tokens, MARK)
                return self._typed.sub(lambda mark: mark[0][0] + gap.get(mark[0], MARK * 2) + mark[0][1:], value)
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
        for stretch in re.split(f"({self._typed.pattern})", text):
            if self._typed.fullmatch(stretch):
                ids.append(self.tokenizer.convert_tokens_to_ids(stretch))
                continue
            for part in stretch.split(MARK * 2):  # a mark that is no special token is read in two, or it would be real
                backend = self.tokenizer.backend_tokenizer if first and not ids else self._going_on
                backend.encode_special_tokens = True
                ids += backend.encode(part.replace(MARK, ""), add_special_tokens=False).ids
                backend.encode_special_tokens = False
        return ids

    def _spans(self, messages, tools) -> tuple[str, dict]:
        """What `answer_spans` finds, which renders each prompt to decide it, but once for a form of conversation (its
        roles, and which have thoughts): where a row is the form's fixed text around its own texts, letter by letter,
        its answers begin and end where those of the form did."""
        template, shown = self._mode(messages), self.thoughts.shown(messages)
        if tools or any("tool_calls" in message for message in messages):
            return answer_spans(self.tokenizer, shown, tools, template)
        texts = {f"{number}{key[0]}": message[key] for number, message in enumerate(messages)
                 for key in ("content", "reasoning_content") if key in message}  # fmt: skip
        form = tuple(message["role"] for message in messages), tuple(texts)
        if form not in self._forms:
            probes = [{"role": message["role"]} | {
                key: f"{MARK}{number}{key[0]}{MARK}" for key in ("content", "reasoning_content") if key in message
            } for number, message in enumerate(messages)]  # fmt: skip
            self._forms[form] = answer_spans(self.tokenizer, self.thoughts.shown(probes), None, template)
        probe, spans = self._forms[form]
        text, pattern = render(self.tokenizer, shown, template=template)[0], f"{MARK}(\\d+[cr]){MARK}"
        if text != re.sub(pattern, lambda mark: texts[mark[1]], probe):
            return answer_spans(self.tokenizer, shown, None, template)
        grown = [(mark.end(), len(texts[mark[1]]) - len(mark[0])) for mark in re.finditer(pattern, probe)]

        def moved(place: int) -> int:
            return place + sum(by for end, by in grown if end <= place)

        return text, {index: span and (moved(span[0]), moved(span[1])) for index, span in spans.items()}


def _cut(text: str, spans: list[tuple[int, int, int]]) -> list[tuple[str, bool]]:
    pieces, read = list[tuple[str, bool]](), 0
    for start, learnt, end in spans:
        thought = [(text[start:learnt], False)] * (learnt > start)
        pieces += [(text[read:start], False), *thought, (text[learnt:end], True)]
        read = end
    return [*pieces, (text[read:], False)]


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
