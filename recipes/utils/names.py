"""Slips in the names and numbers of a config that can be told without any library, and so at once: sections, keys of
other tools and versions, keys that are refused, numbers out of range."""

import difflib
from collections.abc import Iterable

SECTION_NAMES = ("model", "data", "lora", "training", "quantization", "run")

_ELSEWHERE = {  # a key here: what other versions and tools call it, in whatever section
    "training.max_length": "max_seq_length max_seq_len cutoff_len sequence_len", "training.learning_rate": "lr",
    "training.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size", "training.num_train_epochs": "epochs num_epochs",
    "training.warmup_steps, which takes a share of all steps below 1": "warmup_ratio", "training.use_cpu": "no_cuda",
    "training.packing": "group_by_length sample_packing", "training.eval_strategy": "evaluation_strategy",
    "nothing: a folder that holds a run is never overwritten": "overwrite_output_dir", "training.optim": "optimizer",
    "nothing: safetensors are always written": "save_safetensors", "nothing: adapters are trained here": "use_peft",
    "nothing: trackers write below the run's folder, or where their own variables say": "logging_dir",
    "model.name_or_path": "model_name_or_path model_name base_model", "model.attn_implementation": "attn_impl",
    "model.dtype": "torch_dtype", "data.train": "dataset dataset_name train_file", "lora.lora_alpha": "alpha",
    "lora.r": "lora_r rank lora_rank", "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules", "run.early_stopping_patience": "early_stopping",
    "the command hf auth login, and hf upload NAME RUN_FOLDER": "push_to_hub_token",
}  # fmt: skip
NAMES_ELSEWHERE = {name: home for home, names in _ELSEWHERE.items() for name in names.split()}

_NO_USE = "rows reach TRL with token ids and labels (answers only), so this key would change nothing"
_OF_LABELS = ("assistant_only_loss", "completion_only_loss", "eos_token", "pad_token", "dataset_text_field",
              "dataset_kwargs", "truncation_mode", "formatting_func")  # fmt: skip
REFUSED = {
    **{f"training.{key}": _NO_USE for key in _OF_LABELS},
    "training.model_init_kwargs": "use section `model`", "training.trust_remote_code": "use model.trust_remote_code",
    "training.chat_template_path": "use model.chat_template", "lora.revision": "it follows model.revision",
    "training.bf16": "it follows model.dtype", "training.fp16": "it follows model.dtype",
    "training.resume_from_checkpoint": "use the flag --resume [CHECKPOINT]",
    "training.do_train": "a recipe trains; recipes/evaluate_adapter.py evaluates",
    "training.do_eval": "use training.eval_strategy", "training.do_predict": "use recipes/evaluate_adapter.py",
    "training.hub_token": "it would be written into every checkpoint; use: hf auth login",
    "training.push_to_hub": "a run writes to its folder alone; afterwards: hf upload NAME RUN_FOLDER",
    "training.save_only_model": "a run could not go on from such a checkpoint",
    "training.ignore_data_skip": "a resumed run would see rows twice",
    "training.auto_find_batch_size": "it begins again in silence; an out-of-memory error says what to turn down",
    "training.eval_on_start": "recipes/evaluate_adapter.py scores the base",
    "training.restore_callback_states_from_checkpoint": "a resume has what it needs without it",
    "training.dataloader_num_workers": "rows are ready: workers gain nothing, and a stop signal would end them first",
    "training.enable_jit_checkpoint": "SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint already",
    "lora.task_type": "it is CAUSAL_LM here", "lora.inference_mode": "an adapter in training is not in inference mode",
    "lora.trainable_token_indices": "TRL's fused head cannot train single rows; use --lora.modules_to_save '[lm_head]'",
}  # fmt: skip

RANGES = {  # 1e-12 stands for above zero
    "training.per_device_train_batch_size": (1, 100_000), "training.per_device_eval_batch_size": (1, 100_000),
    "training.gradient_accumulation_steps": (1, 1_000_000), "training.max_length": (2, 10_000_000),
    "training.learning_rate": (1e-12, 1e3), "training.num_train_epochs": (1e-12, 1e6),
    "lora.r": (1, 100_000), "lora.lora_alpha": (1e-12, 1e6), "lora.lora_dropout": (0, 0.999),
    "data.max_over_length": (0, 1.0), "data.samples": (0, 64), "run.early_stopping_patience": (1, 10_000),
    "training.eval_accumulation_steps": (1, 1_000_000), "training.weight_decay": (0, 100.0),
    "training.seed": (0, 2**32 - 1),
}  # fmt: skip


def near(name: object, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` may be a slip of."""
    return next(iter(difflib.get_close_matches(str(name), list(names), n=1)), None)


def placed(where: str, key: str, message: str) -> str:
    """The message, which may begin with its `key`, and where the value stands; a flag's place is its key already."""
    return f"{where}: {message.removeprefix(f'{key}: ') if where == f'--{key}' else message}"


def slip_of_section(name: str, key: str = "") -> str | None:
    """What to say of a section that is none; None for a lone word that is like none of them, and may be a key."""
    meant = near(name, SECTION_NAMES)
    if name in SECTION_NAMES or not (key or (meant and len(name) > 2)):  # lr is not lora
        return None
    mend = f"did you mean `{meant}`?" if meant else f"there are {', '.join(SECTION_NAMES)}"
    return f"unknown section `{name}`; {mend}"


def slip_of_key(key: str) -> str | None:
    """What to say of a section.key that is refused, or that is called otherwise here; None for any other."""
    if key in REFUSED:
        return f"`{key}` is refused: {REFUSED[key]}"
    if home := NAMES_ELSEWHERE.get(key.partition(".")[2]):
        return f"`{key}` is no key of these libraries (any more); now: {home}"
    return None


def slip_of_number(key: str, value: object) -> str | None:
    """What to say of a number that is out of the range of its key, or of a word in its place."""
    if key not in RANGES or not isinstance(value, (str, int, float)):
        return None
    least, most = RANGES[key]
    if isinstance(value, str):
        return f"{key}: expected {type(most).__name__}, got {value!r}"
    return None if least <= value <= most else f"{key}: {value} is not between {least} and {most}"
