"""The recipes from Python. Each function fills in a config and calls the recipe of the same name.

from finetune import train_lora
train_lora(model_name="Qwen/Qwen2-7B", dataset_path="./datasets/train.jsonl", output_dir="./checkpoints/")
"""

from pathlib import Path

from recipes import evaluate_adapter as _evaluate
from recipes import merge_adapter as _merge
from recipes.sft_lora import train_lora as _train_lora
from recipes.sft_qlora import train_qlora as _train_qlora
from recipes.utils import OFFLINE_ASKED_FOR
from recipes.utils.config import load_config
from recipes.utils.config_keys import ModelOptions
from recipes.utils.console import UserError, say
from recipes.utils.hub import offline
from recipes.utils.model import load_model_config

import datasets
from huggingface_hub import constants

# The recipes close the network when they are imported; here it is the caller's, and closed while a recipe runs.
constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = OFFLINE_ASKED_FOR
evaluate_adapter, merge_adapter = offline()(_evaluate.evaluate_adapter), offline()(_merge.merge_adapter)

__all__ = ["evaluate_adapter", "merge_adapter", "train_lora", "train_qlora"]

FLAGS = ("dry_run", "resume", "accept_changes", "max_hours")
CONFIGS = Path(__file__).resolve().parent / "configs"


@offline()
def train_lora(
    model_name: str,
    dataset_path,
    val_dataset_path=None,
    output_dir=None,
    lora_rank=None,
    batch_size=None,
    gradient_accumulation_steps=None,
    learning_rate=None,
    epochs=None,
    config=None,
    **sections,
) -> Path:
    """Train a LoRA adapter and return its folder.

    Args:
        model_name: a hub name or a folder; its own type decides which of configs/*.yaml gives all that is not given here.
        dataset_path: JSONL files: a path, a list or a glob.
        val_dataset_path: the same, or a share of the train rows (0.05); without it nothing is evaluated.
        output_dir: the run folder; runs/<family>-lora, numbered, without it.
        config: another YAML file to start from; its validation rows stay where `val_dataset_path` is not given.
        **sections: further keys by section, such as training={"max_length": 1024}, lora={"lora_alpha": 64}, and
            dry_run=True, resume="latest", accept_changes=True or max_hours=11.5.

    Raises:
        UserError: for anything in the settings or the data that the user can mend.
    """
    return _train_lora(_config("lora", **locals()))


@offline()
def train_qlora(
    model_name: str,
    dataset_path,
    val_dataset_path=None,
    output_dir=None,
    lora_rank=None,
    batch_size=None,
    gradient_accumulation_steps=None,
    learning_rate=None,
    epochs=None,
    config=None,
    **sections,
) -> Path:
    """`train_lora` on a base in 4 bit; takes a section quantization={...} as well."""
    return _train_qlora(_config("qlora", **locals()))


def _config(
    method,
    model_name,
    dataset_path,
    val_dataset_path,
    output_dir,
    lora_rank,
    batch_size,
    gradient_accumulation_steps,
    learning_rate,
    epochs,
    config,
    sections,
):
    """The family's YAML with the arguments laid over it."""
    keys = {
        "model.name_or_path": model_name,
        "data.train": dataset_path,
        "data.validation": val_dataset_path,
        "training.output_dir": output_dir,
        "lora.r": lora_rank,
        "training.per_device_train_batch_size": batch_size,
        "training.gradient_accumulation_steps": gradient_accumulation_steps,
        "training.learning_rate": learning_rate,
        "training.num_train_epochs": epochs,
    }
    keys = {key: _plain(value) for key, value in keys.items() if value is not None}
    if val_dataset_path is None and config is None:
        keys |= {"data.validation": None, "training.eval_strategy": "no", "training.load_best_model_at_end": False}
    flags = {name: sections.pop(name) for name in FLAGS if name in sections}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise UserError(
                f"{section}: further settings are given by section, such as training={{{section!r}: {values!r}}}"
            )
        keys |= {f"{section}.{key}": value for key, value in values.items()}
    return load_config(config or _family(str(model_name)), keys, method, **flags)


def _plain(value):
    """Paths as the strings that a YAML would hold."""
    return (
        [str(part) for part in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value
    )


def _family(model_name: str) -> Path:
    """The YAML in configs/ for the model's own type."""
    model_type = load_model_config(ModelOptions(model_name)).model_type
    family = "qwen2" if model_type.startswith("qwen") else "mistral"
    if model_type not in ("qwen2", "mistral"):
        say(f"{model_name} is of type {model_type}, which has no config of its own; taking configs/{family}.yaml")
    return CONFIGS / f"{family}.yaml"
