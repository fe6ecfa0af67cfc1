"""A Modelfile for Ollama, whose Go template is derived from the very chat template that was trained."""

import json

from recipes.utils.console import UserError

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

SYSTEM, FIRST, ANSWER, SECOND = "<<the system>>", "<<first question>>", "<<an answer>>", "<<second question>>"
DIALOGUE = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
]


def make_modelfile(gguf: str, tokenizer, stop_ids: list[int]) -> str:
    """The text of a Modelfile: the GGUF file, the template, and every text that ends an answer.

    Raises:
        UserError: if the chat template puts texts in places that this cannot express.
    """
    stops = [json.dumps(token, ensure_ascii=False) for token in tokenizer.convert_ids_to_tokens(stop_ids)]
    lines = [f"FROM {gguf}", f'TEMPLATE """{go_template(tokenizer)}"""', *(f"PARAMETER stop {stop}" for stop in stops)]
    return "\n".join(lines) + "\n"


def go_template(tokenizer) -> str:
    """The Go template that renders what the tokenizer's chat template renders: one system message or none, then user
    and assistant in turn. The begin-of-sequence token is left out: llama.cpp puts it there.

    The chat template is rendered with four known texts, and what stands between them is taken over.
    """
    plain = _render(tokenizer, DIALOGUE)
    head, opening, closing, prompt = _between(plain, [FIRST, ANSWER, SECOND])
    if not opening.startswith(prompt):
        raise UserError(
            "--ollama: the chat template asks otherwise for the next answer than for this; write a Modelfile"
        )
    lead = opening.removeprefix(prompt)  # Mistral: the blank that begins an answer is the model's to write
    try:
        with_system = _render(tokenizer, [{"role": "system", "content": SYSTEM}, *DIALOGUE])
    except TemplateError:
        with_system = plain  # the template knows no system message
    start, last, rest = _quote(head), "", [opening, closing, prompt]
    if SYSTEM in with_system.partition(FIRST)[0]:
        before, after, *rest = _between(with_system, [SYSTEM, FIRST, ANSWER, SECOND])
        given = f"{_quote(before)}{{{{ $.System }}}}{_quote(after)}"
        start = f"{{{{ if $.System }}}}{given}{{{{ else }}}}{start}{{{{ end }}}}"
    elif SYSTEM in with_system:  # in the last user message, as Mistral v3 has it
        _, *rest, after, end = _between(with_system, [FIRST, ANSWER, SYSTEM, SECOND])
        rest.append(end)
        given = f"{{{{ $.System }}}}{_quote(after)}"
        last = f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{given}{{{{ end }}}}"
    if rest != [opening, closing, prompt]:
        raise UserError("--ollama: the chat template changes more than the system message with it; write a Modelfile")
    user = f"{{{{ if $first }}}}{start}{{{{ $first = false }}}}{{{{ else }}}}{_quote(closing)}{{{{ end }}}}{last}"
    return (
        "{{- $first := true }}{{- range $i, $message := .Messages }}"
        f'{{{{- if eq .Role "user" }}}}{user}{{{{ .Content }}}}{_quote(prompt)}'
        f'{{{{- else if eq .Role "assistant" }}}}{_quote(lead)}{{{{ .Content }}}}{{{{- end }}}}{{{{- end }}}}'
    )


def _render(tokenizer, messages: list[dict]) -> str:
    """The text of a prompt, without its begin-of-sequence token."""
    text = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.chat_template,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )[0][0]
    return text.removeprefix(tokenizer.bos_token or "")


def _between(text: str, marks: list[str]) -> list[str]:
    """What stands before, between and after `marks`, in this order."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            raise UserError(f"--ollama: the chat template leaves out {mark!r} where it is expected; write a Modelfile")
        pieces.append(piece)
    return [*pieces, text]


def _quote(text: str) -> str:
    """A Go action that writes `text` as it is: plain text beside an action could lose its blanks."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
