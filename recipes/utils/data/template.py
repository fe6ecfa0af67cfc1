"""The tokenizer, and which chat template a model is trained with, and why; what a template renders, and where in it
the answers stand."""

import contextlib
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from recipes.utils.console import UserError, near, say, time_limit
from recipes.utils.files import own_file, read_json

TEMPLATES = Path(__file__).resolve().parents[3] / "configs" / "chat_templates"
HOW_TO = (
    "copy a file of configs/chat_templates, change it to the model's own text, wrap the answer and its end-of-turn "
    "token in {% generation %} ... {% endgeneration %}, and set model.chat_template to its path"
)
USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
SECONDS = 10  # to render one chat, which takes milliseconds
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message: templates differ in the name
SWITCH, NO_THOUGHT = "{{%- if {0} is not defined %}}{{%- set {0} = {1} %}}{{%- endif %}}", "{# without a thought #}"
SWITCHED = r"^(\{%- if \w+ is not defined %\}\{%- set (enable_)?thinking = \w+ %\}\{%- endif %\})+"
MARKS = r"\{%-?\s*(end)?generation\s*-?%\}"


def load_tokenizer(base: Path, chat_template: str = "auto", trust_remote_code: bool = False, adapter=None):
    """The tokenizer that `read_tokenizer` gives, with the chat template that will be trained and saved; says why."""
    tokenizer, reason = read_tokenizer(base, chat_template, trust_remote_code, adapter)
    say(f"chat template: {reason}")
    return tokenizer


def read_tokenizer(base: Path, chat_template="auto", trust_remote_code=False, adapter=None) -> tuple:
    """(the tokenizer in the folder `base` with its chat template, why it is that one). What the folder of an `adapter`
    of that base has of the two goes first, and a line says where they differ. Raises a `UserError` if it cannot be
    loaded or is no fast one, and as `choose_chat_template` does."""

    def load(folder: Path):
        for path in Path(folder).glob("*.model"):  # a vocabulary, which the library copies beside each adapter
            own_file(path)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except Exception as error:  # files that are no tokenizer's fail in any way
            why = (str(error).splitlines() or [repr(error)])[0]
            raise UserError(f"{folder}: its tokenizer cannot be loaded: {why}") from error

    tokenizer = its_base = load(base)
    if adapter and Path(adapter, "tokenizer_config.json").is_file():
        tokenizer = load(Path(adapter))
        if tokenizer.get_vocab() != its_base.get_vocab():
            say(f"tokenizer: the adapter's own, of {len(tokenizer):,} tokens; its base's has {len(its_base):,}")
    if adapter and (own := Path(adapter, "chat_template.jinja")).is_file():
        tokenizer.chat_template = own.read_text(encoding="utf-8")
    tokenizer.chat_template = tokenizer.chat_template or its_base.chat_template
    theirs, ours = (re.sub(MARKS, "", str(each.chat_template)) for each in (its_base, tokenizer))
    if ours != theirs:
        say("chat template: the adapter's own; its base has another one")
    if not tokenizer.is_fast:
        raise UserError(f"{base}: has no fast tokenizer (tokenizer.json)")
    # Sentencepiece's legacy form puts a blank before every text between control tokens, not the first alone.
    backend = tokenizer.backend_tokenizer
    if backend.encode(f"{tokenizer.eos_token}a", add_special_tokens=False).tokens[-1].startswith("▁"):
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        say("tokenizer: the base's legacy form puts a blank after every control token; mended as mistral-common has it")
    model_type = read_json(Path(base) / "config.json").get("model_type")
    tokenizer.chat_template, reason = choose_chat_template(tokenizer, chat_template, model_type)
    return tokenizer, reason


def embedding_rows(tokenizer) -> int | None:
    """How many tokens the model beside the tokenizer has embeddings for; None where none lies beside it."""
    path = Path(tokenizer.name_or_path) / "config.json"
    config = read_json(path) if path.is_file() else {}
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def choose_chat_template(tokenizer, setting: str, model_type: str | None) -> tuple[str, str]:
    """(a template whose answers can be told from the rest, which and why). Raises `UserError`, with the reason, if
    `setting` is unusable or `auto` finds none."""
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if setting != "auto":
        return _named_template(setting, tokenizer), f"{setting}, as asked for"
    if own is None:
        if model_type not in ("mistral", "qwen2"):
            names = f"chatml, one of TRL's ({', '.join(_shipped_by_trl())}) or a .jinja file"
            raise UserError(f"the model has no chat template; name one to learn: --model.chat_template {names}")
        return _named_template(model_type, tokenizer), f"{model_type}, since this base model has none of its own"
    why: str | None = ""
    for template, reason in _candidates(tokenizer, own):
        try:
            _prove(tokenizer, template)
            return template, reason
        except UndefinedError as error:
            why = f"it does not take messages as plain text ({error.message})"
        except TemplateError as error:
            why = error.message
    raise UserError(f"model.chat_template: the model's own cannot be trained: {why}; {HOW_TO}")


def _candidates(tokenizer, own: str) -> Iterator[tuple[str, str]]:
    """(template, which and why) of what may stand for the model's `own`, the best first."""
    if marks_answers(own):
        yield own, "the model's own, which marks the answers"
    reason = "the model's own; an answer is what it renders after the prompt that inference sends"
    own_alone = plain_template(own), reason
    if read_thoughts(tokenizer, own).place:  # TRL's twins keep the earlier thoughts, which a model's own leaves out
        yield own_alone
    # TRL's come before ours: without an image, Qwen2.5-VL's text is Qwen2's.
    for file in _shipped_by_trl().values():
        twin = file.with_stem(f"{file.stem}_training")
        if twin.is_file() and own == file.read_text(encoding="utf-8"):
            yield twin.read_text(encoding="utf-8"), "TRL's training twin of the model's own"
    for name in ("qwen2", "mistral", "chatml"):
        template = _named_template(name, tokenizer)
        if _same_text(tokenizer, own, template, name):
            yield template, f"{name}: the text of the model's own, with answers marked"
    yield own_alone


def _prove(tokenizer, template: str) -> None:
    """Raise a `TemplateError` with the reason unless, in chats of one and of two turns, each answer follows the very
    prompt that inference sends, is all there, and ends with a control token."""
    thoughts = read_thoughts(tokenizer, template)
    template = thoughts.off
    for turns in (2, 4):
        messages = [USER, ANSWER, {**USER, "content": "How?"}, {**ANSWER, "content": "So."}][:turns]
        messages = thoughts.shown(messages)
        text, spans = answer_spans(tokenizer, messages, template=template)
        prompt = render(tokenizer, messages[:-1], None, True, template)[0]
        if lost := [message["role"] for message in messages if message["content"] not in text]:
            raise TemplateError(f"it leaves out the {lost[0]} message (does it want content as a list of parts?)")
        if (span := spans[turns - 1]) is None:
            raise TemplateError(f"an answer does not follow the prompt that inference sends, ...{prompt[-30:]!r}")
        learnt = text[slice(*span)]
        if not learnt.endswith(control_tokens(tokenizer)):
            raise TemplateError(f"its answers end with {learnt[-20:]!r}, which is no control token: none would stop")
        head = learnt.partition(messages[-1]["content"])[0]
        if head.strip() and not marks_answers(template):
            raise TemplateError(f"it has no generation prompt: inference would not send {head!r} before an answer")


def marks_answers(template: str) -> bool:
    """True if the template holds loss marks."""
    return re.search(MARKS, template) is not None


def render(tokenizer, messages: list[dict], tools=None, add_generation_prompt=False, template: str | None = None):
    """(text, [(start, end) in it of each span marked as the model's]); a `TemplateError` if it cannot be carried."""
    template = template or tokenizer.chat_template
    with bounded():
        texts, spans = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks_answers(template), **tokenizer.special_tokens_map,
        )  # fmt: skip
    return texts[0], (spans[0] if spans else [])


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Whatever a template raises, or a rendering without an end, as a `TemplateError`."""
    try:
        with time_limit(SECONDS, TemplateError(f"it takes longer than {SECONDS} seconds")):
            yield
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def answer_spans(tokenizer, messages: list[dict], tools=None, template: str | None = None) -> tuple[str, dict]:
    """(text, {index of an answer: its (start, end) in the text}) of a conversation: from the end of the prompt that
    inference sends up to and with the token that ends the turn; None where the answer does not follow that prompt, is
    written otherwise than where it comes last, or opens the conversation. By the template's marks, or where it has none
    by what it renders up to each answer. Raises a `TemplateError` if it cannot carry the conversation, or an answer's
    end is not to be found."""
    text, marked = render(tokenizer, messages, tools, template=template)
    unmarked = not marks_answers(template or tokenizer.chat_template)
    after = _after_answer(tokenizer, template) if unmarked else ("", "")
    spans, control, marks = dict[int, tuple[int, int] | None](), control_tokens(tokenizer), iter(marked)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not unmarked and len(marked) != len(answers):
        raise TemplateError(f"the template marks {len(marked)} answers of {len(answers)}")
    for number, index in enumerate(answers, start=1):
        (start, end), spans[index], message = (0, 0) if unmarked else next(marks), None, messages[index]
        if opens_chat(messages, index):
            continue
        prompt = render(tokenizer, messages[:index], tools, True, template)[0]
        if unmarked:
            whole = render(tokenizer, messages[: index + 1], tools, False, template)[0]
            if not whole.endswith("".join(after)):
                raise TemplateError(f"answer {number} ends otherwise than a plain one does")
            end = len(whole) - len(after[1])
            kept = "".join(whole[len(prompt) : end].split())
            if whole.startswith(prompt) and "".join(message["content"].split()) not in kept:
                raise TemplateError(f"it leaves out a part of answer {number}")
            end = end if text.startswith(whole[:end]) else 0
        # A template may mark the newline before an answer or after its end-of-turn token (TRL's Qwen2.5 twin does).
        # What inference sends is not learnt; nor is white space after the special token that ends the turn.
        learnt = text[start:end].rstrip()
        end = start + len(learnt) if learnt.endswith(control) else end
        if marked and number < len(answers):  # gpt-oss ends an answer within a chat by what does not stop the model
            alone, (*_, its_own) = render(tokenizer, messages[: index + 1], tools, template=template)
            end = end if alone[slice(*its_own)].rstrip() == learnt else 0
        if text.startswith(prompt) and len(prompt) < end:
            spans[index] = max(start, len(prompt)), end
    return text, spans


class Thoughts(NamedTuple):
    """How a template treats the thoughts of answers, which stand in the message's `reasoning_content`."""

    place: str | None  # where it reads them: in "fields" of the message, "inline" in its content, or nowhere
    on: str  # the template for an answer with a thought, which is switched on where the template has a switch
    off: str  # for one without: where it writes an empty one, that is part of the prompt
    opens: bool  # a prompt ends within the thought

    def shown(self, messages: list[dict]) -> list[dict]:
        """The messages as the template reads them, thoughts where it does; earlier ones are its own to leave out."""
        last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=0)
        found = []
        for place, message in enumerate(messages):
            thought = message.get("reasoning_content")
            if self.place == "fields" and thought:
                message = {**message, **dict.fromkeys(THOUGHT_FIELDS, thought)}
            elif self.place == "inline" and message["role"] == "assistant":
                message = {key: value for key, value in message.items() if key != "reasoning_content"}
                # R1 and its kin, whose prompts open a thought, lose the earlier ones; TRL's twin of R1 writes them.
                here = place > last if self.opens else True
                if here and (thought or (self.opens and place == len(messages) - 1)):
                    message["content"] = f"<think>\n{thought or ''}\n</think>\n\n{message['content']}"
            found.append(message)
        return found


def read_thoughts(tokenizer, template: str | None = None) -> Thoughts:
    """What the template, by default the tokenizer's, makes of thoughts, found by what it renders. Where it has no
    switch and writes an empty thought, `off` is the template with the empty thought added to its prompt."""
    base = re.sub(SWITCHED, "", template or tokenizer.chat_template).partition(NO_THOUGHT)[0]
    names = [name for name in ("enable_thinking", "thinking") if re.search(rf"(?<![.\w'\"]){name}(?![\w'\"])", base)]

    def text(template: str, *messages: dict, prompt: bool = False) -> str:
        with contextlib.suppress(TemplateError):
            return render(tokenizer, list(messages), None, prompt, template)[0]
        return ""

    on, off = ("".join(SWITCH.format(name, value) for name in names) + base for value in ("true", "false"))
    on = base if text(on, USER, prompt=True) == text(base, USER, prompt=True) else on
    opens = text(on, USER, prompt=True).rstrip().endswith("<think>")  # as the prompts of R1's kin do
    thoughtful = {**ANSWER, "reasoning_content": "Hm, hm."}
    places = ("fields", "inline") if "</think>" in base else ("fields",)
    ways = (Thoughts(place, on, off, opens) for place in places)
    written = (way for way in ways if "Hm, hm." in text(on, *way.shown([USER, thoughtful])))
    found = next(written, Thoughts(None, base, base, opens))
    prompt, whole = text(off, USER, prompt=True), text(off, *found.shown([USER, ANSWER]))
    gap = whole[len(prompt) :].partition(ANSWER["content"])[0] if whole.startswith(prompt) else ""
    if "</think>" in gap:
        off = f"{off}{NO_THOUGHT}{{% if add_generation_prompt %}}{{{{ {json.dumps(gap)} }}}}{{% endif %}}"
    same = text(off, USER, prompt=True) == text(base, USER, prompt=True)
    return found._replace(off=base if same else off) if found.place else found


def opens_chat(messages: list[dict], index: int) -> bool:
    """True of an answer that nobody has asked for: no message but a system message stands before it."""
    return all(message["role"] == "system" for message in messages[:index])


def _after_answer(tokenizer, template: str | None) -> tuple[str, str]:
    """What an unmarked template writes after an answer that ends a chat: (up to and with the control token that ends
    the turn, the rest). Raises a `TemplateError` if there is no such token."""
    text = render(tokenizer, [USER, ANSWER], template=template)[0]
    _, found, after = text.rpartition(ANSWER["content"])
    if not found:
        raise TemplateError("it leaves out the answer (does it want content as a list of parts?)")
    ends = re.search("|".join(map(re.escape, control_tokens(tokenizer))), after)
    if not ends:
        why = f"an answer is followed by {after!r}, in which this tokenizer has no control token"
        raise TemplateError(f"{why}, so that the model would never learn to stop")
    return after[: ends.end()], after[ends.end() :]


def control_tokens(tokenizer, marks: bool = False) -> tuple[str, ...]:
    """The texts of the special tokens, longer ones first: one may begin with another. With `marks` also of added tokens
    that are not special and that the template writes around turns, which a tokenizer parses out of any text all the
    same (R1-Distill's `<｜User｜>`); not those of thoughts."""
    added = tokenizer.added_tokens_decoder.values()
    found, text = {*(token.content for token in added if token.special), *tokenizer.all_special_tokens}, ""
    others = {token.content for token in added} - found - {"<think>", "</think>"} if marks else set()
    for messages in ([USER, ANSWER, USER], [SYSTEM, USER]) if others else ():
        with contextlib.suppress(TemplateError):  # a template without system messages
            text += render(tokenizer, messages, None, True)[0]
    return tuple(sorted(found | {token for token in others if token in text}, key=len, reverse=True))


def plain_template(template: str) -> str:
    """`template` without its loss marks, which only transformers and TRL read; it renders the same text to the letter:
    a mark trims the blanks around it as its dashes say, and an `if` that is always true trims the same ones."""
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def _shipped_by_trl() -> dict[str, Path]:
    """{name: file} of the templates of models in TRL, but for their training twins."""
    files = Path(find_spec("trl").origin).with_name("chat_templates").glob("*.jinja")  # type: ignore
    return {file.stem: file for file in sorted(files) if not file.stem.endswith("_training")}


def shipped_template(name: str) -> str:
    """The text of this project's template `name`."""
    template = (TEMPLATES / f"{name.removesuffix('_tekken')}.jinja").read_text(encoding="utf-8")
    # Tekken's is a vocabulary of bytes, where a blank is a blank: mistral-common puts none.
    return template.replace("set blank = ' '", "set blank = ''") if name.endswith("_tekken") else template


def _named_template(name: str, tokenizer) -> str:
    """The text of a .jinja file, of this project's template `name`, or of TRL's (its training twin, where that one can
    be proven); `mistral` is v1, v3 or v3 for Tekken by the tokenizer."""
    if name == "mistral":  # 7B v0.3 has [INST] as one control token, v0.1 and v0.2 spell it out; model_type is the same
        name = "mistral_v3" if "[INST]" in tokenizer.get_vocab() else "mistral_v1"
        name += "_tekken" * (name == "mistral_v3" and "▁" not in tokenizer.get_vocab())
    shipped, path = _shipped_by_trl(), TEMPLATES / f"{name.removesuffix('_tekken')}.jinja"
    if name.endswith(".jinja"):
        path = Path(name)
    elif name in shipped and not path.is_file():
        path, twin = shipped[name], shipped[name].with_stem(f"{name}_training")
        with contextlib.suppress(UserError):
            return _named_template(str(twin), tokenizer)
    if not path.is_file():
        ours = ["auto", "mistral", *sorted(file.stem for file in TEMPLATES.glob("*.jinja")), "mistral_v3_tekken"]
        meant = f"did you mean {near(name, [*ours, *shipped])!r}? " if near(name, [*ours, *shipped]) else ""
        known = f"{meant}known: {', '.join(ours)}, or the path of a .jinja file; of TRL: {', '.join(shipped)}"
        raise UserError(f"model.chat_template: no {name!r}; {known}")
    try:
        template = shipped_template(name) if path.parent == TEMPLATES else path.read_text(encoding="utf-8")
        _compile_jinja_template(template)
        if path.parent != TEMPLATES:
            _prove(tokenizer, template)
    except TemplateSyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not a Jinja template: {error.message}") from error
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {name} does not suit this model: {error}; {HOW_TO}") from error
    return template


def _same_text(tokenizer, own: str, ours: str, name: str) -> bool:
    """True if both templates render the same text wherever the model's own carries the conversation.
    Mistral's published templates for sentencepiece differ among themselves in spaces; mistral-common's spaces are the
    reference there. A system message is compared in the prompt only: Hugging Face's v0.3 template loses it from a
    finished chat. ChatML is told where the model's own knows no generation prompt, which inference must send."""
    spaces_matter = name != "mistral" or "set blank = ''" in ours

    def text(template: str, messages: list[dict], prompt: bool) -> str | None:
        with contextlib.suppress(TemplateError):
            found = render(tokenizer, messages, None, prompt, template)[0]
            return found if spaces_matter else "".join(found.split())
        return None

    prompts, turn = ([USER], [USER, ANSWER, USER], [SYSTEM, USER]), [USER, ANSWER]
    if name == "chatml" and text(own, [USER], True) != text(own, [USER], False):
        return False
    probes = [*((messages, name != "chatml") for messages in prompts), (turn, False), (turn + turn, False)]
    return text(own, turn, False) is not None and all(
        text(own, *probe) in (None, text(ours, *probe)) for probe in probes
    )
