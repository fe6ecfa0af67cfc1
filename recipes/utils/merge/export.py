"""What makes weights a model: config, stop ids, tokenizer, template, a card that says what it was made of, a Modelfile.

Nothing here tells a local path or a secret. config.json comes last: what a killed merge leaves looks like no model.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from recipes.utils.console import UserError, disk_error, say, visible
from recipes.utils.data import Encoder, bounded, plain_template, shipped_template
from recipes.utils.files import adapter_sha256, evaluation_of, locked, own_file, read_json, sync, sync_path, write_json
from recipes.utils.model import on_hub, read_adapter_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"  # <template>.modelfile
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# A list of what a card may tell, not of what it may not: settings hold folders, names of accounts and tokens too.
SETTINGS = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_length",
    "packing", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
QUANTIZATION = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
SCORES = ("loss", "perplexity", "token_accuracy", "exact_match", "stopped")
ASKED, SYSTEM = {"role": "user", "content": " Why?"}, {"role": "system", "content": "Be brief."}
DIALOGUES = ([ASKED], [SYSTEM, ASKED], [SYSTEM, ASKED, {"role": "assistant", "content": "So."}, ASKED])


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a new folder beside `output`, renamed to `output` when all that was written there is on the disk; an error
    leaves nothing. It is locked: what a killed merge has left there goes, while of two at once the second one ends.
    Raises `UserError` if `output` holds something or cannot be made, another process is at it, or a disk fails."""
    partial = output.parent / f".{output.name}.partial"
    with contextlib.ExitStack() as held:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(partial))
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                partial.rmdir()
                raise UserError(f"{output}: is there already; name another folder with --output")
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        except OSError as error:
            raise UserError(f"{output}: cannot be made ({error.strerror}); name another with --output") from error
        try:
            yield partial
            sync(partial)
            partial.replace(output)
            sync_path(output.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if why := disk_error(error):
                mend = "name another folder with --output"
                raise UserError(f"{output}: {why}; nothing is left there. Mend that, or {mend}") from error
            raise


def check_space(folder: Path, size: int, what: str = "the merged model") -> None:
    """Raise `UserError` if the disk under `folder` has no room for `size` bytes of `what` and 64 MB beside them."""
    free, needed = shutil.disk_usage(folder).free, size + (64 << 20)
    if free < needed:
        why = f"{what} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; nothing was kept"
        raise UserError(f"{folder.parent}: {why}. Name another disk with --output")


def write_config(base: Path, output: Path, dtype: str, untied: bool) -> None:
    """The base's config.json with the weights' dtype, without the path that it was once saved from; with the size of
    the vocabulary in the config that PEFT's merge has left in `output`, if it has: it may be the adapter's."""
    config = read_json(own_file(base / "config.json"), {"rope_parameters": dict | None})
    merged = output / "config.json"
    if merged.is_file():
        size = read_json(merged).get("text_config", read_json(merged))["vocab_size"]
        config.get("text_config", config)["vocab_size"] = size
    config.pop("_name_or_path", None)
    config |= {"dtype": dtype, "torch_dtype": dtype}  # the key of transformers 5, and the one that others know
    if untied:
        config["tie_word_embeddings"] = False
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config.setdefault("rope_theta", theta)  # transformers 5 writes it there alone; others would take their default
    write_json(output / "config.json", config)


def write_generation_config(base: Path, output: Path, stop_ids: list[int]) -> None:
    """The base's generation settings with every id that ends an answer; without what no reader would accept."""
    path = base / "generation_config.json"
    settings = read_json(own_file(path)) if path.is_file() else {}
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    settings["eos_token_id"] = list(dict.fromkeys([*stop_ids, *known]))
    if not settings.get("do_sample"):  # with them, transformers refuses to save the model again
        settings = {key: value for key, value in settings.items() if key not in SAMPLING}
    write_json(output / "generation_config.json", settings)


def write_tokenizer(base: Path, output: Path, tokenizer) -> None:
    """The base's own tokenizer files, which every runtime knows, with the trained `tokenizer`'s chat template; where
    they do not give the ids that were trained on (a legacy form was mended, tokens were added), the trained one's."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(own_file(base / name), output / name)
    template = plain_template(tokenizer.chat_template)
    _write_tokenizer_config(output, template)
    probe = f"a  b\n{tokenizer.eos_token}c é {tokenizer.decode([100, 200])} [INST] d[/INST] <|im_start|>e"
    written = AutoTokenizer.from_pretrained(output, local_files_only=True)
    found, wanted = ((one.encode(probe), one.get_vocab(), one.eos_token) for one in (written, tokenizer))
    if found != wanted:
        say("tokenizer: the trained one is written, since the base's own files give other ids")
        for name in TOKENIZER_FILES:
            (output / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(output)
        _write_tokenizer_config(output, template, tokenizer_class="PreTrainedTokenizerFast")


def _write_tokenizer_config(output: Path, template: str, **keys) -> None:
    path = output / "tokenizer_config.json"
    config = {**read_json(path), **keys, "chat_template": template}
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5 alone
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # likewise: transformers 4 takes a dict there and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)
    (output / "chat_template.jinja").write_text(template, encoding="utf-8")


def make_modelfile(tokenizer, gguf: str) -> str:
    """Ollama's Modelfile for `gguf`, by the shipped template that renders as the tokenizer's own, with all that ends an
    answer; else `UserError`."""
    expected = _prompts(tokenizer, tokenizer.chat_template)
    for path in sorted(CONFIGS.glob("*.modelfile")):
        if _prompts(tokenizer, shipped_template(path.stem)) == expected:
            stops = tokenizer.convert_ids_to_tokens(Encoder(tokenizer).stop_ids)
            text = re.sub("^FROM .*$", lambda _: f"FROM {gguf}", path.read_text(encoding="utf-8"), flags=re.M)
            text = re.sub("^PARAMETER stop .*\n", "", text, flags=re.M)
            return text + "".join(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in stops)
    known = ", ".join(path.name for path in sorted(CONFIGS.glob("*.modelfile")))
    raise UserError(f"--ollama: the chat template is of no Modelfile in configs/ ({known}); write one like them")


def _prompts(tokenizer, template: str) -> dict[int, str]:
    """What `template` asks of the model in a few dialogues, without those that it cannot carry."""
    prompts, how = {}, {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    for number, messages in enumerate(DIALOGUES):
        with contextlib.suppress(TemplateError), bounded():
            prompts[number] = tokenizer.apply_chat_template(messages, **how)
    return prompts


def write_card(output: Path, record: dict, base: Path, adapter: Path, how: dict, drift: dict | None) -> None:
    """Write README.md and merge.json into `output`. `how`: `base` (which form of it), `scale` and `dtype`."""
    name = record["model"]["name_or_path"]
    of_hub = not Path(name).is_dir()
    name = name if of_hub else Path(name).resolve().name
    revision = on_hub(base)[1] or record["model"]["revision"]
    of = {"adapter": record["name"], "adapter_sha256": adapter_sha256(adapter)}
    trained = {"systems": ((record.get("rows") or {}).get("train") or {}).get("systems")}  # chat.py sends a single one
    trained["system"] = (record.get("data") or {}).get("system")
    merged = {**of, **how, "base_model": name, "revision": revision, **trained}
    write_json(output / "merge.json", {**merged, **(drift or {})})
    quoted = name if re.fullmatch(r"[\w./-]+", name) else json.dumps(name)
    lines = ["---", *([f"base_model: {quoted}"] if of_hub else []), "library_name: transformers"]
    lines += ["pipeline_tag: text-generation", "tags: [lora, trl]", "---", "", f"# {_plain(record['name'])}", ""]
    kind = {"lora": "a LoRA", "qlora": "a Q-LoRA"}[record["method"]]
    facts = {
        "base": name, "base revision": revision,
        "merged into": f"{how['base']} weights, at scale {how['scale']:g}", "dtype": how["dtype"],
        **_settings(record.get("lora") or read_adapter_config(adapter), LORA),
        **_settings(record.get("training", {}), SETTINGS),
        **_settings(record.get("quantization") or {}, QUANTIZATION),
        "rows trained on": record.get("rows", {}).get("train", {}).get("rows"),
        "best validation loss": record.get("best_validation_loss"),
        "distance from the adapter": drift
        and f"KL {drift['mean_kl']:.2e} nats a token, {drift['top1_agreement']:.1%} same",
    }  # fmt: skip
    lines += [f"{_plain(name)} with {kind} adapter merged into it.", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_plain(value)} |" for key, value in facts.items() if value is not None]
    lines += [
        f"| sha256 of {_plain(Path(path).name)} | {_plain(digest)} |"
        for path, digest in record.get("data_sha256", {}).items()
    ]
    if metrics := _scores(adapter, how["scale"]):
        lines += ["", f"| score | {' | '.join(metrics)} |", "| --- |" + " --- |" * len(metrics)]
        lines += [f"| {key} | {' | '.join(f'{figures[key]:.4g}' for figures in metrics.values())} |" for key in SCORES]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plain(text: object) -> str:
    """`text` within a line or a cell of Markdown: no new line, cell or tag begins in it."""
    return re.sub(r"([|<`\[\]\\])", r"\\\1", " ".join(visible(str(text)).split()))


def _scores(adapter: Path, scale: float) -> dict[str, dict]:
    """What evaluate_adapter.py said of the base and of this `adapter` at `scale`, {} if nothing."""
    folder, names = adapter / "evaluation", {"base": "base", "adapter": "adapter"}
    if scale != 1:
        path, names = folder / "scales.json", {"0": "base", f"{scale:g}": f"adapter at scale {scale:g}"}
        metrics = read_json(path, {"of": dict | None}) if path.is_file() else {}
        if (metrics.pop("of", None) or {}).get("adapter_sha256") not in (None, adapter_sha256(adapter)):
            metrics = {}
    else:
        found = evaluation_of(adapter)
        metrics = read_json(found / "metrics.json") if found else {}
    return {names[who]: figures for who, figures in metrics.items() if who in names}


def _settings(section: dict, keys: tuple[str, ...]) -> dict:
    found = {key: section[key] for key in keys if section.get(key)}
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in found.items()}
