"""Messages to token ids and labels: which chat template, why, and which tokens carry loss.

A label is the token's own id where the model shall learn it, and -100 elsewhere. Exactly each answer and its
end-of-turn token carry loss.
"""

from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError
from recipes.utils.dataset import Chat

from datasets import Dataset
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "chat_templates"
HOW_TO = (
    "copy a file of configs/chat_templates, change it to the model's own text, wrap the answer and its end-of-turn "
    "token in {% generation %} ... {% endgeneration %}, and set model.chat_template to its path"
)
BATCH = 1000

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


class Encoded(NamedTuple):
    """One chat as the model sees it: `labels` are -100 outside answers; `masked_answers` counts the answers that
    carry no loss because in this row they do not follow the prompt that inference would send."""

    input_ids: list[int]
    labels: list[int]
    masked_answers: int


def choose_chat_template(tokenizer, setting: str, model_type: str) -> tuple[str, str]:
    """(a template with loss marks, one line that says which one and why).

    Raises:
        UserError: if the template asked for cannot be used, or `auto` finds none that renders the model's own text.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if setting != "auto":
        return _named_template(setting, tokenizer), f"{setting}, as asked for"
    if own is None:
        family = "mistral" if model_type == "mistral" else "qwen2"
        if model_type not in ("mistral", "qwen2"):
            raise UserError(f"model.chat_template: the model has none, and none is known for {model_type}: {HOW_TO}")
        return _named_template(family, tokenizer), f"{family}, since this base model has none of its own"
    if has_generation_markers(own):
        return own, "the model's own, which marks the answers"
    try:
        twin = get_training_chat_template(tokenizer)
        return twin, "TRL's training twin of the model's own"
    except (ValueError, TemplateError):
        pass
    for name in ("qwen2", "mistral"):
        template = _named_template(name, tokenizer)
        if _same_text(tokenizer, own, template, spaces_matter=name == "qwen2"):
            return template, f"{name}: the text of the model's own, with answers marked"
    raise UserError(
        f"model.chat_template: the model's own template does not mark the answers, and no known one "
        f"renders the same text: {HOW_TO}"
    )


def encode_chats(chats: list[Chat], tokenizer) -> list[Encoded]:
    """Render, tokenise and label `chats` with the tokenizer's chat template.

    The text is cut where answers begin and end, and the pieces are tokenised on their own: that is what inference
    does (the prompt is tokenised, the answer is generated after it), so no token ever straddles the border.

    Raises:
        UserError: naming file and line, if the template cannot carry a conversation.
    """
    special_tokens = tuple({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})
    encoded = []
    for start in range(0, len(chats), BATCH):
        pieces = [_pieces(chat, tokenizer, special_tokens) for chat in chats[start : start + BATCH]]
        texts = [text for row, _ in pieces for text, _ in row]
        ids = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for row, masked_answers in pieces:
            input_ids, labels = [], []
            for _, learnt in row:
                piece = next(ids).ids
                input_ids += piece
                labels += piece if learnt else [-100] * len(piece)
            encoded.append(Encoded(input_ids, labels, masked_answers))
    return encoded


def tokenize_chats(chats: list[Chat], tokenizer, max_length: int, over_length: str) -> tuple[Dataset, dict]:
    """`chats` as a dataset of `input_ids` and `labels` that SFTTrainer takes as it is, and the counts that a person
    should see: rows, tokens, trained tokens, and what was dropped or cut."""
    encoded = encode_chats(chats, tokenizer)
    over = [(chat, row) for chat, row in zip(chats, encoded, strict=True) if len(row.input_ids) > max_length]
    if over and over_length == "error":
        chat, row = over[0]
        raise UserError(
            f"{chat.where}: {len(row.input_ids)} tokens, over training.max_length {max_length} (with "
            f"{len(over)} rows in all); raise it, or --data.over_length drop"
        )
    if over_length == "truncate":
        encoded = [Encoded(row.input_ids[:max_length], row.labels[:max_length], row.masked_answers) for row in encoded]
    kept = [row for row in encoded if len(row.input_ids) <= max_length and any(label != -100 for label in row.labels)]
    counts = {
        "rows": len(kept),
        "tokens": sum(len(row.input_ids) for row in kept),
        "trained_tokens": sum(label != -100 for row in kept for label in row.labels),
        "over_length": len(over),
        "dropped": len(encoded) - len(kept),
        "masked_answers": sum(row.masked_answers for row in kept),
    }
    if chats and not kept:
        shortest = min(len(row.input_ids) for row in encoded)
        raise UserError(
            f"no row is left to use: all {len(over)} are over training.max_length {max_length}; the "
            f"shortest has {shortest} tokens"
        )
    dataset = Dataset.from_dict({"input_ids": [r.input_ids for r in kept], "labels": [r.labels for r in kept]})
    return dataset, counts


def prompt_ids(messages: list[dict], tokenizer) -> list[int]:
    """The token ids that inference sends for `messages`, which end with a user turn."""
    text = _render(tokenizer, tokenizer.chat_template, messages, add_generation_prompt=True)[0]
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def stop_token_ids(tokenizer) -> list[int]:
    """The ids that end an answer: the template's end-of-turn token first, then the tokenizer's EOS."""
    labels = encode_chats([Chat([USER, ANSWER], "")], tokenizer)[0].labels
    end_of_turn = [label for label in labels if label != -100][-1]
    return list(dict.fromkeys([end_of_turn, tokenizer.eos_token_id]))


def _pieces(chat: Chat, tokenizer, special_tokens: tuple[str, ...]) -> tuple[list[tuple[str, bool]], int]:
    """The chat's text cut into (text, carries loss), and the number of answers that carry none."""
    try:
        text, spans = _render(tokenizer, tokenizer.chat_template, chat.messages)
        answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise TemplateError(f"the template marks {len(spans)} answers of {len(answers)}")
        prompts = [
            _render(tokenizer, tokenizer.chat_template, chat.messages[:index], add_generation_prompt=True)[0]
            for index in answers
        ]
    except TemplateError as error:
        raise UserError(f"{chat.where}: the chat template cannot carry this conversation: {error.message}") from error
    pieces, position, masked = [], 0, 0
    for (start, end), prompt in zip(spans, prompts, strict=True):
        # A template may mark the newline before an answer or after its end-of-turn token (TRL's Qwen2.5 twin does).
        # What inference sends is not learnt; nor is white space after the special token that ends the turn.
        learnt = text[start:end].rstrip()
        end = start + len(learnt) if learnt.endswith(special_tokens) else end
        start = max(start, len(prompt))
        if not text.startswith(prompt) or start >= end:
            masked += 1
            continue
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [*pieces, (text[position:], False)], masked


def _render(tokenizer, template: str, messages: list[dict], add_generation_prompt=False):
    """(text, [(start, end) of each loss-marked span, in characters])."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=has_generation_markers(template),
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0], (spans[0] if spans else [])


def _named_template(name: str, tokenizer) -> str:
    """The text of a .jinja file, or of this project's template `name`; `mistral` is v1 or v3 by the tokenizer."""
    if name == "mistral":
        # 7B v0.3 has [INST] as one control token, v0.1 and v0.2 spell it out; model_type is the same
        name = "mistral_v3" if "[INST]" in tokenizer.get_vocab() else "mistral_v1"
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        known = ["auto", "mistral", *sorted(file.stem for file in TEMPLATES.glob("*.jinja"))]
        raise UserError(f"model.chat_template: no {name!r}; known: {', '.join(known)}, or the path of a .jinja file")
    template = path.read_text(encoding="utf-8")
    if not has_generation_markers(template):
        raise UserError(f"{path}: marks no answers, so nothing would be learnt: {HOW_TO}")
    return template


def _same_text(tokenizer, own: str, ours: str, spaces_matter: bool) -> bool:
    """True if both templates render the same text wherever the model's own carries the conversation.

    Mistral's published templates differ among themselves in spaces; mistral-common's spaces are the reference there.
    A system message is compared in the prompt only: Hugging Face's v0.3 template loses it from a finished conversation.
    """
    probes = [
        ([USER], True),
        ([USER, ANSWER], False),
        ([USER, ANSWER, USER], True),
        ([USER, ANSWER, USER, ANSWER], False),
        ([SYSTEM, USER], True),
    ]
    for messages, prompt in probes:
        try:
            expected = _render(tokenizer, own, messages, add_generation_prompt=prompt)[0]
        except TemplateError:
            continue
        try:
            found = _render(tokenizer, ours, messages, add_generation_prompt=prompt)[0]
        except TemplateError:
            return False
        if not spaces_matter:
            expected, found = "".join(expected.split()), "".join(found.split())
        if expected != found:
            return False
    return True
