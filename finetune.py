"""The recipes from Python. Each function fills in a config and calls the recipe of the same name.

from finetune import train_lora
train_lora(model_name="Qwen/Qwen2-7B", dataset_path="./datasets/train.jsonl", output_dir="./checkpoints/")
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from recipes.utils.console import RunEnded, UserError, near, out, quiet, say
from recipes.utils.notebook import Page, in_notebook, in_python

with quiet():  # bitsandbytes tells at its import that it would fetch kernels
    from recipes import evaluate_adapter as _evaluate
    from recipes import merge_adapter as _merge
    from recipes import sft_lora as _sft_lora
    from recipes import sft_qlora as _sft_qlora
    from recipes.utils.config import FLAGS, SECTIONS, Config, key_names, load_config
    from recipes.utils.model import ModelOptions, find_base, model_config

__all__ = ["evaluate_adapter", "merge_adapter", "train_lora", "train_qlora"]

CONFIGS = Path(__file__).resolve().parent / "configs"
KEYS = {
    "model_name": "model.name_or_path", "dataset_path": "data.train", "val_dataset_path": "data.validation",
    "output_dir": "training.output_dir", "lora_rank": "lora.r", "batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps", "learning_rate": "training.learning_rate",
    "epochs": "training.num_train_epochs",
}  # fmt: skip

ARGUMENTS = {key: name for name, key in KEYS.items()}


@contextlib.contextmanager
def _at_python() -> Iterator[None]:
    """In here what is said is Python's, in a notebook on one display, and the libraries are quiet; the caller's process
    is as before afterwards."""
    words = functools.partial(in_python, names=ARGUMENTS, shell="!" * in_notebook())
    before = out.words, out.page
    out.words, out.page = words, Page(words) if in_notebook() else None
    try:
        with quiet():
            yield
    except (UserError, RunEnded) as error:
        error.args = (words(str(error)),)
        line = f"{type(error).__name__}: {error}"
        error._render_traceback_ = lambda: [line]  # type: ignore[union-attr]  # what a notebook shows of it
        raise
    finally:
        out.words, out.page = before


evaluate_adapter, merge_adapter = _at_python()(_evaluate.evaluate_adapter), _at_python()(_merge.merge_adapter)


@_at_python()
def train_lora(
    model_name, dataset_path, val_dataset_path=None, output_dir=None, lora_rank=None, batch_size=None,
    gradient_accumulation_steps=None, learning_rate=None, epochs=None, config=None, **sections,
) -> Path:  # fmt: skip
    """Train a LoRA adapter and return its folder.

    Args:
        model_name: a hub name or a folder of any causal language model. What is not given here comes from the YAML in
            configs/ that is named for it, or for its type, else from one that trains all of its linear layers.
        dataset_path: JSONL files: a path, a list or a glob.
        val_dataset_path: the same, or a share of the train rows (0.05); without it nothing is evaluated.
        output_dir: the run folder; runs/<YAML or type>-lora, numbered, without it.
        config: another YAML file to start from; its validation rows stay where `val_dataset_path` is not given.
        **sections: further keys by section, such as training={"max_length": 1024}, lora={"lora_alpha": 64}, and
            dry_run=True, resume="latest", accept_changes=True or max_hours=11.5.

    Raises:
        UserError: for anything in the settings or the data that the user can mend.
    """
    return _sft_lora.train_lora(_config("lora", locals()))


@_at_python()
@functools.wraps(train_lora, assigned=("__annotations__",), updated=())
def train_qlora(*args, **kwargs) -> Path:
    """`train_lora` on a base in 4 bit; takes a section quantization={...} as well."""
    given = inspect.signature(train_lora).bind(*args, **kwargs)
    return _sft_qlora.train_qlora(_config("qlora", given.arguments))


def _config(method: str, given: dict) -> Config:
    """A YAML of configs/, or the one `given`, with the arguments laid over it."""
    settings = {key: given[name] for name, key in KEYS.items() if given.get(name) is not None}
    path, sections = given.get("config"), given.get("sections", {})
    if path is None and "data.validation" not in settings:
        settings |= {"data.validation": None, "training.eval_strategy": "no", "training.load_best_model_at_end": False}
    flags = {name: sections.pop(name) for name in FLAGS if name in sections}
    for name, values in sections.items():
        if not isinstance(values, dict):
            raise UserError(_where_it_belongs(name, values))
        settings |= {f"{name}.{key}": value for key, value in values.items()}
    path, name = (path, None) if path else _start_from(str(given["model_name"]))
    config = load_config(path, settings, method, **flags)
    return replace(config, name=name) if name else config


def _where_it_belongs(name: str, value: object) -> str:
    """What to write in the place of an argument that is none."""
    keys = {key: section for section in reversed(SECTIONS) for key in key_names(section)}
    if name in keys:
        return f"{name}: further settings are given by section: {keys[name]}={{{name!r}: {value!r}}}"
    meant = near(name, [*KEYS, *FLAGS, "config", *keys])
    by_section = "further settings are given by section, such as training={'max_length': 1024}"
    wanted = f"{keys[meant]}={{{meant!r}: {value!r}}}" if meant in keys else f"{meant}={value!r}"
    return f"{name}: no such argument; {f'did you mean {wanted}?' if meant else by_section}"


def _start_from(model_name: str) -> tuple[Path, str]:
    """(the YAML in configs/ to start from, a name for the run): the model's own, or that of its type; for any other
    type the one that trains every linear layer, whatever they are called."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        known = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["name_or_path"]
        if Path(model_name).name.lower() == known.partition("/")[2].lower():
            return path, path.stem
    options = ModelOptions(model_name)
    model_type = model_config(find_base(options, weights=False), options).model_type
    if model_type in ("qwen2", "mistral"):
        return CONFIGS / f"{model_type}.yaml", model_type
    family = "qwen2" if model_type.startswith("qwen") else "mistral"
    say(f"{model_name} ({model_type}): no YAML of its own; with the settings of configs/{family}_all_linear.yaml")
    return CONFIGS / f"{family}_all_linear.yaml", model_type
