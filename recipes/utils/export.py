"""A complete model folder: written beside its place, synced, renamed; tokenizer, template, stop ids, card.

A kill at any moment leaves the target absent or whole. The folder beside it that a killed merge leaves behind gets its
config.json after all its weights, so that it cannot be taken for a model before it is one.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from recipes.utils.console import UserError, say
from recipes.utils.disk import DISK_FULL, sync, sync_path

from transformers import AutoTokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@contextlib.contextmanager
def staged(output: Path):
    """Yield a new folder beside `output`, and rename it to `output` when all that was written there is on the disk.

    After an error nothing is left.

    Raises:
        UserError: if `output` holds something or cannot be made, or the disk is full.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output")
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror}); name another folder with --output") from error
    for left in output.parent.glob(f".{output.name}.partial-*"):
        if left != partial:
            say(f"{left}: was left by another merge; if that one is not running, delete it")
    try:
        yield partial
        sync(partial)
        partial.replace(output)
        sync_path(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"{output}: the disk is full; nothing is left there. Name another with --output") from error
        raise


def check_space(folder: Path, size: int, what: str = "the merged model") -> None:
    """Raise `UserError` if the disk under `folder` has no room for `size` bytes of `what` and 64 MB beside them."""
    free, needed = shutil.disk_usage(folder).free, size + (64 << 20)
    if free < needed:
        raise UserError(
            f"{folder.parent}: {what} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; nothing was kept. "
            "Name another disk with --output"
        )


def write_config(base: Path, output: Path, dtype: str, untied: bool) -> None:
    """The base's config.json with the weights' dtype, without the path that it was once saved from."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config |= {"dtype": dtype, "torch_dtype": dtype}  # the key of transformers 5, and the one that others know
    if untied:
        config["tie_word_embeddings"] = False
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # transformers 5 writes it there alone, and others would silently take their default
        config.setdefault("rope_theta", rope["rope_theta"])
    _write_json(output / "config.json", config)


def write_generation_config(base: Path, output: Path, stop_ids: list[int]) -> None:
    """The base's generation settings with every id that ends an answer; without what no reader would accept."""
    path = base / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    settings["eos_token_id"] = list(dict.fromkeys([*stop_ids, *known]))
    if not settings.get("do_sample"):  # with them, transformers refuses to save the model again
        settings = {key: value for key, value in settings.items() if key not in SAMPLING}
    _write_json(output / "generation_config.json", settings)


def write_tokenizer(base: Path, output: Path, tokenizer) -> None:
    """The base's own tokenizer files, which every runtime knows, with the trained `tokenizer`'s chat template.

    If they do not give the ids that were trained on (a legacy form was mended), the trained tokenizer's are written.
    """
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, output / name)
    template = plain_template(tokenizer.chat_template)
    _write_tokenizer_config(output, template)
    probe = f"a  b\n{tokenizer.eos_token}c é {tokenizer.decode([100, 200])} [INST] d[/INST] <|im_start|>e"
    if AutoTokenizer.from_pretrained(output).encode(probe) != tokenizer.encode(probe):
        say("tokenizer: the trained one is written, since the base's own files give other ids")
        for name in TOKENIZER_FILES:
            (output / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(output)
        _write_tokenizer_config(output, template, tokenizer_class="PreTrainedTokenizerFast")


def plain_template(template: str) -> str:
    """`template` without its loss marks, which only transformers and TRL read; it renders the same text to the letter.

    A mark trims the blanks around it as its dashes say; an `if` that is always true trims the same ones.
    """
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def _write_tokenizer_config(output: Path, template: str, **keys) -> None:
    path = output / "tokenizer_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **keys, "chat_template": template}
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5 alone
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # likewise: transformers 4 takes a dict there and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(path, config)
    (output / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
