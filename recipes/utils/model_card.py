"""README.md of a merged model: what it was made of, without a local path or a secret."""

import json
import re
from pathlib import Path

# A list of what may be told, not of what may not: settings hold folders, names of accounts and tokens too.
SETTINGS = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_length",
    "packing", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
SCORES = ("loss", "perplexity", "token_accuracy", "exact_match", "stopped")


def write_card(output: Path, record: dict, base: Path, adapter: Path, how: dict, drift: dict | None) -> None:
    """Write README.md into `output`; `how` is what merge.json says of the merge."""
    name = public_name(record["model"]["name_or_path"])
    on_hub = not Path(record["model"]["name_or_path"]).is_dir()
    lines = ["---", *([f"base_model: {name}"] if on_hub else []), "library_name: transformers"]
    lines += ["pipeline_tag: text-generation", "tags: [lora, trl]", "---", "", f"# {record['name']}", ""]
    lines += [f"{name} with {_article(record['method'])} adapter merged into it.", ""]
    facts = {
        "base": name,
        "base revision": base_revision(record, base),
        "merged into": f"{how['base']} weights, at scale {how['scale']:g}",
        "dtype": how["dtype"],
        **_settings(record.get("lora") or _adapter_config(adapter), LORA),
        **_settings(record.get("training", {}), SETTINGS),
        **_settings(record.get("quantization") or {}, ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")),
        "rows trained on": record.get("rows", {}).get("train", {}).get("rows"),
        "best validation loss": record.get("best_validation_loss"),
    }
    if drift:
        facts["distance from the adapter"] = (
            f"KL {drift['mean_kl']:.2e} nats a token, {drift['top1_agreement']:.1%} same"
        )
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items() if value is not None)]
    lines += [f"| sha256 of {Path(path).name} | {digest} |" for path, digest in record.get("data_sha256", {}).items()]
    if metrics := _scores(adapter / "evaluation", how["scale"]):
        lines += ["", f"| score | {' | '.join(metrics)} |", "| --- |" + " --- |" * len(metrics)]
        lines += [f"| {key} | {' | '.join(f'{figures[key]:.4g}' for figures in metrics.values())} |" for key in SCORES]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scores(folder: Path, scale: float) -> dict[str, dict]:
    """What evaluate_adapter.py left in `folder` of the base and of the adapter at `scale`, {} without it."""
    path, names = folder / "metrics.json", {"base": "base", "adapter": "adapter"}
    if scale != 1:
        path, names = folder / "scales.json", {"0": "base", f"{scale:g}": f"adapter at scale {scale:g}"}
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {names[who]: figures for who, figures in metrics.items() if who in names}


def public_name(name_or_path: str) -> str:
    """A hub name as it is; of a folder only its last part."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path


def base_revision(record: dict, base: Path) -> str | None:
    """The commit of the hub that the base is of, or what the run asked for."""
    commit = re.fullmatch(r"[0-9a-f]{40}", base.name)
    return base.name if commit else record["model"]["revision"]


def _article(method: str) -> str:
    return {"lora": "a LoRA", "qlora": "a Q-LoRA"}[method]


def _adapter_config(adapter: Path) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))


def _settings(section: dict, keys: tuple[str, ...]) -> dict:
    found = {key: section.get(key) for key in keys}
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in found.items() if value
    }
