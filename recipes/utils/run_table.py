"""The table of a run: what is about to be trained on what, worked out."""

import math

from recipes.utils.console import print_table

import torch


def print_run_table(config, trainer, train: dict, validation: dict | None, reasons: dict) -> None:
    """The table before training: what is about to be trained on what, worked out.

    `train` and `validation` are the counts of `prepare`; `reasons` are further rows that say what was chosen and why.
    """
    args, processes = trainer.args, trainer.args.world_size
    steps, steps_an_epoch = steps_of(args, len(trainer.train_dataset))
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    trainable, total = trainer.model.get_nb_trainable_parameters()
    fill = train["tokens"] / (len(trainer.train_dataset) * args.max_length) if args.packing else None
    adapter = trainer.model.peft_config["default"]
    targets = adapter.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    if config.model.adapter:
        targets += f"; goes on from {config.model.adapter} with its settings, not those of the section `lora`"
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in train["shapes"].items())
    ignored = f"; ignored keys: {', '.join(train['ignored_keys'])}" if train["ignored_keys"] else ""
    table = {
        "model": config.model.name_or_path + (f" at {config.model.revision[:12]}" if config.model.revision else ""),
        "precision": config.model.dtype + (", base in 4 bit" if config.method == "qlora" else ""),
        "device": device_name(args.use_cpu) + (f" × {processes}" if processes > 1 else ""),
        **reasons,
        "files": f"{shapes} rows{ignored}",
        "rows": f"{train['rows']:,} train, {validation['rows'] if validation else 0:,} validation",
        "split": f"{train['split']:,} of them are one answer of a chat: in its row it would not follow the prompt that "
        "inference sends"
        if train["split"]
        else None,
        "not used": _left_out(train, validation, args.max_length, config.data.over_length),
        "tokens": f"{train['tokens']:,}, trained on {train['trained_tokens']:,} "
        f"({train['trained_tokens'] / train['tokens']:.0%}: {config.data.train_on} answers)",
        "packing": f"{len(trainer.train_dataset):,} rows of {args.max_length}, {fill:.1%} filled" if fill else "off",
        "effective batch": f"{args.per_device_train_batch_size} rows × {args.gradient_accumulation_steps} accumulation × "
        f"{processes} process{'es' * (processes > 1)} = {effective} rows, {train['rows'] / steps_an_epoch:.1f} chats a step",
        "steps": f"{steps:,} ({steps_an_epoch:,} an epoch)",
        "adapter": f"rank {adapter.r}, alpha {adapter.lora_alpha}, on {targets}",
        "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        "output": config.run_folder,
    }
    print_table(f"{config.name} · {config.method}", table)


def steps_of(args, rows: int) -> tuple[int, int]:
    """(optimizer steps of the run, of an epoch) for `rows` rows, packed ones where packing is on."""
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    steps_an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)), steps_an_epoch


def _left_out(train: dict, validation: dict | None, max_length: int, over_length: str) -> str | None:
    """What is in the files and is not learnt from, so that nothing is lost in silence."""
    lost = []
    for part, counts in (("train", train), ("validation", validation or {})):
        if counts.get("over_length"):
            done = {"drop": "dropped", "truncate": "cut"}[over_length]
            lost.append(f"{counts['over_length']:,} {part} rows over max_length {max_length} ({done})")
        if counts.get("bad"):
            lost.append(f"{len(counts['bad']):,} bad {part} rows (listed in bad_rows.jsonl)")
    if train["trimmed"]:
        lost.append(f"{train['trimmed']:,} rows end without an answer (trimmed)")
    return "; ".join(lost) or None


def device_name(use_cpu: bool) -> str:
    """What the run computes on."""
    threads = torch.get_num_threads()
    if use_cpu or not torch.cuda.is_available():
        return f"CPU, {threads} thread{'s' * (threads > 1)}"
    return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
