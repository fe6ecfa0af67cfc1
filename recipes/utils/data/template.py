"""The tokenizer, and which chat template a model is trained with, and why; and what a template renders."""

import contextlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from recipes.utils.console import UserError, say, time_limit
from recipes.utils.files import read_json

TEMPLATES = Path(__file__).resolve().parents[3] / "configs" / "chat_templates"
HOW_TO = (
    "copy a file of configs/chat_templates, change it to the model's own text, wrap the answer and its end-of-turn "
    "token in {% generation %} ... {% endgeneration %}, and set model.chat_template to its path"
)
USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
SECONDS = 10  # to render one chat, which takes milliseconds


def load_tokenizer(base: Path, chat_template: str = "auto", trust_remote_code: bool = False):
    """The tokenizer in the folder `base`, with the chat template that will be trained and saved; says which and why."""
    tokenizer, reason = read_tokenizer(base, chat_template, trust_remote_code)
    say(f"chat template: {reason}")
    return tokenizer


def read_tokenizer(base: Path, chat_template: str = "auto", trust_remote_code: bool = False) -> tuple:
    """(the tokenizer in the folder `base` with its chat template, why it is that one). Raises a `UserError` if it
    cannot be loaded or is no fast one, and as `choose_chat_template` does."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # files that are no tokenizer's fail in any way
        why = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"{base}: its tokenizer cannot be loaded: {why}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{base}: has no fast tokenizer (tokenizer.json)")
    if prepends_blanks(tokenizer):
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        say("tokenizer: the base's legacy form puts a blank after every control token; mended as mistral-common has it")
    model_type = read_json(Path(base) / "config.json").get("model_type")
    tokenizer.chat_template, reason = choose_chat_template(tokenizer, chat_template, model_type)
    return tokenizer, reason


def prepends_blanks(tokenizer) -> bool:
    """True for sentencepiece's legacy form: a blank before every text between control tokens, not the first alone."""
    tokens = tokenizer.backend_tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False).tokens
    return tokens[-1].startswith("▁")


def choose_chat_template(tokenizer, setting: str, model_type: str | None) -> tuple[str, str]:
    """(a template with loss marks, which and why). Raises `UserError` if `setting` is unusable or `auto` finds none."""
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if setting != "auto":
        return _named_template(setting, tokenizer), f"{setting}, as asked for"
    if own is None:
        if model_type not in ("mistral", "qwen2"):
            raise UserError(f"model.chat_template: the model has none, and none is known for {model_type}: {HOW_TO}")
        return _named_template(model_type, tokenizer), f"{model_type}, since this base model has none of its own"
    if marks_answers(own):
        return own, "the model's own, which marks the answers"
    # To import TRL's costs a merge or a chat 2 seconds, so first: is the text one of those that it ships? Ours come
    # after them: without an image, Qwen2.5-VL's text is Qwen2's.
    shipped = Path(find_spec("trl").origin).with_name("chat_templates").glob("*.jinja")  # type: ignore
    if any(own == file.read_text(encoding="utf-8") for file in shipped):
        from trl.chat_template_utils import get_training_chat_template

        with contextlib.suppress(ValueError, TemplateError):  # it has no twin for some of them
            return get_training_chat_template(tokenizer), "TRL's training twin of the model's own"
    for name in ("qwen2", "mistral"):
        template = _named_template(name, tokenizer)
        if _same_text(tokenizer, own, template, spaces_matter=name == "qwen2"):
            return template, f"{name}: the text of the model's own, with answers marked"
    no_twin = "the model's own template does not mark the answers, and no known one renders the same text"
    raise UserError(f"model.chat_template: {no_twin}: {HOW_TO}")


def marks_answers(template: str) -> bool:
    """True if the template holds loss marks."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


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


def _named_template(name: str, tokenizer) -> str:
    """The text of a .jinja file, or of this project's template `name`; `mistral` is v1 or v3 by the tokenizer."""
    if name == "mistral":  # 7B v0.3 has [INST] as one control token, v0.1 and v0.2 spell it out; model_type is the same
        name = "mistral_v3" if "[INST]" in tokenizer.get_vocab() else "mistral_v1"
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        known = ["auto", "mistral", *sorted(file.stem for file in TEMPLATES.glob("*.jinja"))]
        raise UserError(f"model.chat_template: no {name!r}; known: {', '.join(known)}, or the path of a .jinja file")
    template = path.read_text(encoding="utf-8")
    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not a Jinja template: {error.message}") from error
    if not marks_answers(template):
        raise UserError(f"{path}: marks no answers, so nothing would be learnt: {HOW_TO}")
    return template


def _same_text(tokenizer, own: str, ours: str, spaces_matter: bool) -> bool:
    """True if both templates render the same text wherever the model's own carries the conversation.
    Mistral's published templates differ among themselves in spaces; mistral-common's spaces are the reference there.
    A system message is compared in the prompt only: Hugging Face's v0.3 template loses it from a finished chat."""

    def text(template: str, messages: list[dict], prompt: bool) -> str | None:
        with contextlib.suppress(TemplateError):
            found = render(tokenizer, messages, None, prompt, template)[0]
            return found if spaces_matter else "".join(found.split())
        return None

    prompts, turn = ([USER], [USER, ANSWER, USER], [SYSTEM, USER]), [USER, ANSWER]
    probes = [*((messages, True) for messages in prompts), (turn, False), (turn + turn, False)]
    return all(text(own, *probe) in (None, text(ours, *probe)) for probe in probes)
