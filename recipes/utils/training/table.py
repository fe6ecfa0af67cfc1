"""Before it trains: the table, worked out, and what is unwise."""

import math
import shutil
from pathlib import Path

import torch
from trl import SFTConfig

from recipes.utils.config import Config
from recipes.utils.console import UserError, print_table
from recipes.utils.data import Counts, Finding, Prepared, report_findings
from recipes.utils.model import check_tokens, context_of
from recipes.utils.training.trainer import checkpoint_bytes


def print_run(run, config: Config, trainer, train: Prepared, validation: Prepared | None) -> None:
    """Print what is about to be trained on what, and what is unwise in settings and base. Of rows that `prepare` did
    not make, what it counts is left out. Raises `UserError` where the disk has no room for the checkpoints."""
    args, counts, processes, packed = trainer.args, train.counts, trainer.args.world_size, len(trainer.train_dataset)
    steps, an_epoch = steps_of(args, packed)
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = f"{micro} rows × {accumulation} accumulation × {processes} process{'es' * (processes > 1)}"
    batch += f" = {micro * accumulation * processes} rows, {len(train.rows) / an_epoch:.1f} chats a step"
    lora = trainer.model.peft_config["default"]
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(sorted(lora.target_modules))
    if config.model.adapter:
        targets += f"; goes on from {config.model.adapter} with its settings, not those of the section `lora`"
    trainable, total = trainer.model.get_nb_trainable_parameters()
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in counts.shapes.items())
    ignored = f"; ignored keys: {', '.join(counts.ignored_keys)}" if counts.ignored_keys else ""
    split = "of them are one answer of a chat: in its row it would not follow the prompt that inference sends"
    packing, tokens = f"{packed:,} rows of {args.max_length}" if getattr(args, "packing", False) else "off", None
    if counts.tokens:
        share = f"{counts.trained_tokens / counts.tokens:.0%}: {config.data.train_on} answers"
        tokens = f"{counts.tokens:,}, trained on {counts.trained_tokens:,} ({share})"
        packing += f", {counts.tokens / (packed * args.max_length):.1%} filled" if args.packing else ""
    table = {
        "model": config.model.name_or_path + (f" at {run.commit[:12]}" if run.commit else ""),
        "precision": config.model.dtype + (", base in 4 bit" if config.method == "qlora" else ""),
        "device": device_name(args.use_cpu) + (f" × {processes}" if processes > 1 else ""),
        "checkpoints": check_disk(args, trainer.model, steps), "files": f"{shapes} rows{ignored}" if shapes else None,
        "rows": f"{len(train.rows):,} train, {len(validation.rows) if validation else 0:,} validation",
        "an epoch": ", ".join(f"{number:,} rows of {path}" for path, number in counts.mixture.items()) or None,
        "scored later": config.data.test, "split": f"{counts.split:,} {split}" if counts.split else None,
        "not used": _left_out(counts, validation.counts if validation else Counts(), args, config.data.over_length),
        "tokens": tokens, "packing": packing, "effective batch": batch, "steps": f"{steps:,} ({an_epoch:,} an epoch)",
        "adapter": f"rank {lora.r}, alpha {lora.lora_alpha}, on {targets}",
        "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})", "output": run.folder,
    }  # fmt: skip
    print_table(f"{config.name} · {config.method}", table)
    run.findings = check_settings(args, packed, len(train.rows))
    run.findings += check_capacity(counts.trained_tokens, trainable, lora.r, config.lora.get("target_modules"))
    context, longest = context_of(trainer.model.config), getattr(args, "max_length", None) or 0
    if context and longest > context:
        over = f"max_length {longest:,} is over the {context:,} tokens that this model was made for"
        run.findings.append(Finding("warn", f"{over}: --training.max_length {context}"))
    if {"input_ids", "labels"} <= set(train.rows.column_names):
        run.findings += check_tokens(trainer.model, train.rows, trainer.processing_class)
    report_findings(run.findings)


def steps_of(args, rows: int) -> tuple[int, int]:
    """(optimizer steps of the run, of an epoch) for `rows` rows, packed ones where packing is on."""
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)), an_epoch


def device_name(use_cpu: bool) -> str:
    """What the run computes on."""
    threads = torch.get_num_threads()
    if use_cpu or not torch.cuda.is_available():
        return f"CPU, {threads} thread{'s' * (threads > 1)}"
    return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"


def check_disk(args, model, steps: int) -> str:
    """What kept, best and unfinished checkpoints need of the disk. Raises `UserError` if there is less."""
    folder, size = Path(args.output_dir), checkpoint_bytes(model, args)
    interval = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    saves = {"no": 0, "steps": math.ceil(steps / interval), "epoch": math.ceil(args.num_train_epochs)}
    kept = saves.get(args.save_strategy.value, 1)
    kept = min(kept, args.save_total_limit + args.load_best_model_at_end) if args.save_total_limit else kept
    needed = (kept + (kept > 0)) * size
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("checkpoint-*/*"))
    if needed > free:
        need = f"{kept} checkpoints of {size / 1e9:.2f} GB and the one that is being written need {needed / 1e9:.2f} GB"
        mend = "--training.save_total_limit 2, or another disk with --training.output_dir"
        raise UserError(f"{folder}: {need}, and {free / 1e9:.2f} GB are free: {mend}")
    return f"{kept} of {size / 1e9:.2f} GB at most; {free / 1e9:,.0f} GB free" if kept else "none"


def check_settings(args, packed_rows: int, rows: int) -> list[Finding]:
    """Findings about settings that are fine each on their own; `rows` become `packed_rows`, which the trainer draws."""
    found, (steps, an_epoch) = [], steps_of(args, packed_rows)
    if args.learning_rate < 5e-5 and isinstance(args, SFTConfig):  # preferences want far less
        rate = f"learning rate {args.learning_rate:g} is one for full fine-tuning; an adapter learns little there"
        found.append(f"{rate}: --training.learning_rate 2e-4")
    if (warmup := args.get_warmup_steps(steps)) >= steps:
        long = f"the warm-up ({warmup}) is as long as the run ({steps} step{'s' * (steps > 1)}), "
        long += "so nothing is learnt" if steps == 1 else "so the learning rate is never reached"
        found.append(f"{long}: --training.warmup_steps {0 if steps == 1 else 0.03}")
    if steps < 100:
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        drawn = int(packed_rows * args.num_train_epochs / args.world_size)  # micro-batches of one row in all epochs
        batch = max(1, drawn // 100)
        micro, now = min(batch, micro), micro * accumulation
        smaller = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": batch // micro}
        flags: dict[str, object] = {**smaller} if batch < now else {}
        if batch == 1 and getattr(args, "packing", False):
            flags["packing"], drawn = "false", int(rows * args.num_train_epochs / args.world_size)
        if drawn < 100:  # few rows: no batch makes a hundred of them
            flags["num_train_epochs"] = math.ceil(args.num_train_epochs * 100 / max(1, drawn))
        if args.max_steps > 0:
            flags = {"max_steps": -1 if math.ceil(args.num_train_epochs * an_epoch) > steps else 100}
        more = " ".join(f"--training.{key} {value}" for key, value in flags.items())
        few = f"few steps: {steps}, each with {rows / an_epoch:.1f} chats; an adapter wants 100 or more"
        found.append(f"{few}. This gives more: {more}")
    if args.save_strategy == "no":
        kept = "no checkpoint is kept but at a stop signal, so a run that is killed begins anew"
        found.append(f"{kept}: --training.save_strategy steps")
    return [Finding("warn", message) for message in found]


def check_capacity(label_tokens: int, trainable: int, rank: int, targets) -> list[Finding]:
    """A finding where there is more to learn than the adapter can hold, by the rule of thumb of "LoRA Without Regret"
    (Schulman 2025): a token teaches about a bit, a parameter holds about two; adapters fall behind near the limit."""
    if label_tokens <= trainable:
        return []
    wider = min(256, 1 << math.ceil(math.log2(rank * label_tokens / trainable)))
    mends = ["--lora.target_modules all-linear"] * (targets != "all-linear") + [f"--lora.r {wider}"] * (wider > rank)
    many = f"{label_tokens:,} label tokens are more than the adapter's {trainable:,} parameters, which may be too few"
    return [Finding("warn", f"{many}: {' '.join(mends) or 'full fine-tuning would hold more'}")]


def _left_out(train: Counts, validation: Counts, args, over_length: str) -> str | None:
    """What is in the files and is not learnt from, so that nothing is lost in silence."""
    lost, done = {}, "cut" if over_length == "truncate" else "dropped"
    for part, counts in (("train", train), ("validation", validation)):
        lost[f"{part} rows over max_length {getattr(args, 'max_length', None)} ({done})"] = counts.over_length
        lost[f"bad {part} rows (listed in bad_rows.jsonl)"] = sum(counts.bad_kinds.values())
    lost["rows end without an answer (trimmed)"] = train.trimmed
    lost["rows begin with an answer (read, not learnt)"] = train.opened
    lost["rows named in data.exclude"] = len(train.excluded | validation.excluded)
    return "; ".join(f"{number:,} {what}" for what, number in lost.items() if number) or None
