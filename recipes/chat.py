"""Talk to an adapter or a merged model, with the chat template that it was trained with; or to one that is served.

    python recipes/chat.py                                  the newest finished run
    python recipes/chat.py runs/mistral-lora/merged --system "Answer in one sentence." --temperature 0.7
    python recipes/chat.py --url http://localhost:8000/v1   any OpenAI-compatible endpoint
    echo "Why is the sky blue?" | python recipes/chat.py runs/mistral-lora

Each line is a message; /help names the commands. In a pipe each line is a question of its own, and only answers go to
standard output. Where all training rows had the same system message, it is sent; --system "" leaves it out.
"""

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

from recipes.utils.console import (
    ArgumentParser,
    CommandLine,
    UserError,
    first_look,
    recipe_parser,
    run_main,
    say,
    visible,
)


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("path", nargs="?", metavar="PATH", help="a run, adapter or merged folder; the newest run")
    elsewhere = "where the adapter's base lies now: a folder, or a name on the hub"
    parser.add_argument("--base-model", metavar="PATH_OR_NAME", help=elsewhere)
    parser.add_argument("--url", help="an endpoint, in the place of PATH")
    parser.add_argument("--model", metavar="NAME", help="which one to ask there, where it lists several")
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the endpoint's key")
    parser.add_argument("--system", help="a system message; the one of all training rows")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (512)")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

from recipes.utils.data import Encoder, system_merged
from recipes.utils.evaluation import load_adapter, load_adapter_tokenizer, newest_run, read_adapter
from recipes.utils.files import read_json
from recipes.utils.model import loading
from recipes.utils.serving import Endpoint

HELP = "/reset forgets the conversation, /help shows this line, /quit or Ctrl-C ends it; all else goes to the model"


def chat(
    path=None, url=None, model=None, api_key_env=None, system=None, temperature=0.0, max_new_tokens=512, lines=None,
    base_model=None,
) -> list[dict]:  # fmt: skip
    """Answer each of `lines` on standard output as the answer is generated; without it those that a person types, or of
    a pipe, where each begins a conversation. `temperature` 0 takes the most likely token each time. `system` None is
    the system message that all training rows had, if they had one; "" is none. Returns the conversation since the last
    /reset. Raises `UserError` if `path` holds neither an adapter nor a model with a chat template, `url` cannot be
    asked, or a setting cannot be."""
    if not 0 <= temperature < math.inf or max_new_tokens < 1:
        raise UserError("--temperature is 0 or more, and --max-new-tokens 1 or more")
    if (url and (path or base_model)) or (not url and (model or api_key_env)):
        raise UserError("PATH is a folder here, --url, --model and --api-key-env an endpoint's: give one of the two")
    settings, alone = (max_new_tokens, temperature), lines is None and not sys.stdin.isatty()
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
        if url:
            answer = _answer_there(Endpoint(url, model, api_key_env), *settings)
        else:
            folder = Path(path or newest_run())
            answer = _answer_here(folder, base_model, *settings)
            if system is None and (system := trained_with(folder)[0]):
                shown = " ".join(f"{system[:100]}{'...' * (len(system) > 100)}".split())
                say(f"system message, as in all its training rows: {shown!r} (--system '' leaves it out)")
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in _typed() if lines is None else lines:
        text = line.strip()
        if text == "/quit":
            break
        if text == "/help":
            with contextlib.redirect_stdout(sys.stderr):
                say(HELP)
        if text == "/reset" or (text and alone):
            messages = list(opening)
        if text in ("", "/reset", "/help"):
            continue
        messages.append({"role": "user", "content": text})
        text = answer(messages)
        if text.strip():
            messages.append({"role": "assistant", "content": text})
        else:
            messages.pop()  # templates refuse an empty answer in a conversation
    return messages


def trained_with(folder: Path) -> tuple[str, bool]:
    """(the system message that all training rows had of what is in `folder`: a run, its checkpoint or a merged model;
    whether it was merged into the user turn). "" where they had none, or several, or nobody has recorded it."""
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    files = [place / name for place in places for name in ("merge.json", "run.json")]
    record = next((read_json(path) for path in files if path.is_file()), {})
    rows, data = record.get("rows"), record.get("data")
    if rows and data:  # a run's
        record = {"systems": rows.get("train", {}).get("systems"), "system": data.get("system")}
    systems = record.get("systems") or []
    return systems[0] if len(systems) == 1 else "", record.get("system") == "merge"


def _answer_there(endpoint: Endpoint, max_new_tokens: int, temperature: float) -> Callable[[list[dict]], str]:
    """A function that prints the endpoint's answer to messages as it comes, and returns it."""

    def answer(messages: list[dict]) -> str:
        pieces = []
        for piece in endpoint.stream(messages, max_new_tokens, temperature):
            print(visible(piece), end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces)

    return answer


def _answer_here(folder: Path, base_model, max_new_tokens: int, temperature: float) -> Callable[[list[dict]], str]:
    """The same of the model in `folder`."""
    model, encoder, stops = _load(folder, base_model)
    _, merges = trained_with(folder)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0], **sampling)

    def answer(messages: list[dict]) -> str:
        try:
            prompt = encoder.prompt_ids(system_merged(messages) if merges else messages)
        except TemplateError as error:
            raise UserError(f"the chat template cannot carry this conversation: {error.message}") from error
        ids = torch.tensor([prompt], device=model.device)
        streamer = Shown(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer)
        ids = [token for token in output[0, len(prompt) :].tolist() if token not in stops]
        return encoder.tokenizer.decode(ids, skip_special_tokens=True)

    return answer


class Shown(TextStreamer):
    """Prints an answer as it comes, its control characters written out: a terminal would act upon them."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(visible(text), stream_end)


def _load(folder: Path, base_model: str | None) -> tuple:
    """(model, `Encoder`, the ids that end an answer) of an adapter folder or of a whole model's."""
    if (folder / "adapter_config.json").is_file():
        record = read_adapter(folder, base_model)
        encoder = Encoder(load_adapter_tokenizer(folder, record))
        say(f"adapter {folder} on base {record['model']['name_or_path']}")
        return load_adapter(folder, record).eval(), encoder, encoder.stop_ids
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no adapter (adapter_config.json) and no model (config.json)")
    if base_model:
        raise UserError(f"--base-model: {folder} is a whole model, which has no base")
    with loading(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: has no chat template, so it is no model to talk to")
    say(f"model {folder}")
    how = {"dtype": "auto", "device_map": "auto", "use_safetensors": True, "local_files_only": True}
    with loading(str(folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return model, Encoder(tokenizer), ends if isinstance(ends, list) else [ends]


def _typed():
    """Lines of standard input, with a prompt if a person types them, until its end or Ctrl-D."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    say(HELP)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def main(given: CommandLine) -> None:
    try:
        chat(**{name: value for name, value in given.options.items() if name != "traceback"})
    except KeyboardInterrupt:
        say("")  # the shell's prompt begins a line of its own


if __name__ == "__main__":
    sys.exit(run_main(main, given))
