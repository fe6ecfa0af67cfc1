"""Is a resumed run the run that was begun? What a checkpoint was made of, compared setting by setting."""

import hashlib
import json
from pathlib import Path

from recipes.utils.adapter import adapter_shapes, stored_shapes
from recipes.utils.checkpoint import read_made_of
from recipes.utils.config import Config
from recipes.utils.console import UserError, say

import numpy as np
import torch

# Settings of `training` that leave each step's arithmetic as it is.
FREE = (
    "output_dir", "log", "report_to", "run_name", "project", "trackio", "save_", "eval_", "per_device_eval", "load_best",
    "batch_eval", "do_", "disable_tqdm", "dataloader_num_workers", "dataloader_pin",
    "dataloader_prefetch", "dataloader_persistent", "gradient_checkpointing", "activation_checkpointing", "push_to_hub",
    "hub_", "ddp_timeout", "skip_memory", "include_", "resume_from", "dataset_num_proc", "use_cache", "activation_offloading", "bf16_full", "fp16_full",
    "dataloader_multiprocessing", "remove_unused", "label_names", "length_column", "ddp_find", "ddp_bucket",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "debug", "prediction",
    "local_rank", "torch_empty_cache",
)  # fmt: skip
ON_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedulers that step when it evaluates
FREE_OF_EVALUATIONS = tuple(prefix for prefix in FREE if prefix != "eval_")
NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")
DATA_KEYS = ("over_length", "train_on", "system", "control_tokens")
MAY_GROW = ("training.num_train_epochs", "training.max_steps")


def describe(config: Config, trainer, train, validation, attention: str) -> dict:
    """{setting: value} of all that decides what a step computes, as JSON has it. Data, template, tokenizer and base are
    digests of their content; the base's is of 256 numbers of each of its weights."""
    args, tokenizer = trainer.args, trainer.processing_class
    adapter = trainer.model.peft_config["default"].to_dict()
    processes, free = args.world_size, FREE if args.lr_scheduler_type not in ON_EVALUATIONS else FREE_OF_EVALUATIONS
    made_of = {
        "data.train": _digest(" ".join(train.files.values())),
        "data.validation": config.data.validation if isinstance(config.data.validation, float | None) else
        _digest(" ".join(validation.files.values())),
        **{f"data.{key}": getattr(config.data, key) for key in DATA_KEYS},
        "chat template": _digest(tokenizer.chat_template),
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str() + repr(sorted(tokenizer.special_tokens_map.items()))),
        "base weights": _base_digest(trainer.model),
        "model.dtype": config.model.dtype,
        "model.adapter": config.model.adapter,
        "model.compile_layers": config.model.compile_layers,
        "attention": attention,
        **{f"quantization.{key}": value for key, value in config.quantization.items()},
        **{f"lora.{key}": value for key, value in adapter.items() if key not in NOT_OF_THE_ADAPTER},
        **{f"training.{key}": value for key, value in args.to_dict().items() if not key.startswith(free)},
        "training.num_train_epochs": args.num_train_epochs,
        "training.max_steps": args.max_steps,
        "effective batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * processes,
        "micro-batch": args.per_device_train_batch_size,
        "processes": processes,
        "sharded": trainer.is_fsdp_enabled,
        "training.gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs,
        "training.activation_checkpointing_kwargs": args.activation_checkpointing_kwargs,
        "rows": _rows_digest(train.rows),
        "validation rows": _rows_digest(validation.rows) if validation else None,
    }  # fmt: skip
    return json.loads(
        json.dumps(made_of, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def check_same_run(config: Config, trainer, made_of: dict) -> list[str]:
    """Compare `made_of` with what the checkpoint of `config.resume` was made with; returns the changes that were
    accepted, one line each (none without a resume).

    Raises:
        UserError: naming each setting that is not the same, unless `--accept-changes` was given; and always for an
            adapter of other shapes, or another number of processes.
    """
    if config.resume is None:
        return []
    before = read_made_of(Path(config.resume))
    changed = {key: (before[key], made_of[key]) for key in before if key in made_of and before[key] != made_of[key]}
    if "rows" in changed and len(changed.keys() & {"data.train", "chat template", "tokenizer", "training.max_length"}):
        del changed["rows"]  # that is why
    if "validation rows" in changed and len(changed) > 1:
        del changed["validation rows"]
    if "micro-batch" in changed and "effective batch" not in changed and "processes" not in changed:
        was, now = changed.pop("micro-batch")
        say(
            f"resume: micro-batches of {now} rows, not {was}, at the same effective batch: sums are taken in another order"
        )
    for key in MAY_GROW:
        if key in changed and changed[key][1] > changed[key][0] > 0:
            was, now = changed.pop(key)
            say(f"resume: {key} {now}, not {was}: the learning rate follows the longer schedule from here on")
    lines = [f"{key}: {_short(was)} in the checkpoint, {_short(now)} now" for key, (was, now) in changed.items()]
    if "processes" in changed:
        raise UserError(
            f"--resume: {lines[list(changed).index('processes')]}; rows are dealt out by process, so go on with as many "
            "as it was begun with"
        )
    fits = stored_shapes(config.resume) == adapter_shapes(trainer.model)
    if not lines and fits:
        return []
    told = "\n  ".join(lines or ["the adapter's shapes"])
    if not fits:
        raise UserError(
            f"--resume: {config.resume} holds another adapter; put these back, or begin a new run:\n  {told}"
        )
    if not config.accept_changes:
        raise UserError(
            f"--resume: this is not the run that {config.resume} is of:\n  {told}\nput them back, begin a new run, or go "
            "on all the same with --accept-changes"
        )
    for line in lines:
        say(f"resume: accepted: {line}")
    return lines


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows_digest(rows) -> str:
    """Of the token ids and labels of all rows in order: what is trained on, however it came about."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            digest.update(np.asarray(column.flatten()).tobytes() + np.asarray(column.value_lengths()).tobytes())
    return digest.hexdigest()[:16]


def _base_digest(model) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            start = parameter.detach().flatten()[:256].contiguous()
            digest.update(name.encode() + start.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
