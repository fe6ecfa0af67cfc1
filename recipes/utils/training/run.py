"""A run: its folder, what it is made of, whether a resume is the same run, and run.json, which says how it ended."""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from recipes.utils.config import Config, check_machine
from recipes.utils.console import RunEnded, UserError, disk_error, is_main_process, say
from recipes.utils.data import Finding, Prepared
from recipes.utils.files import adapter_sha256, locked, record_of, write_json, write_jsonl
from recipes.utils.model import base_hashes, check_base, check_lora, find_base, has_fast_lora, holds_adapter, on_hub
from recipes.utils.training.checkpoint import fault, newest_complete, read_manifest
from recipes.utils.training.table import device_name
from recipes.utils.training.trainer import signals_to, tell

FORMAT = 3  # of run folders: what a resume can go on from
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
# Arguments of the trainer that leave each step's arithmetic as it is; all others are compared at a resume.
FREE = """
    activation_checkpointing activation_offloading batch_eval_metrics bf16_full_eval dataloader_pin_memory
    ddp_find_unused_parameters ddp_timeout disable_tqdm do_eval do_predict do_train eval_accumulation_steps eval_delay
    eval_do_concat_batches eval_on_start eval_packing eval_steps eval_strategy eval_use_gather_object fp16_full_eval
    gradient_accumulation_steps gradient_checkpointing hub_always_push hub_model_id hub_private_repo hub_revision
    hub_strategy hub_token include_for_metrics include_num_input_tokens_seen load_best_model_at_end local_rank
    log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy output_dir per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project
    push_to_hub report_to resume_from_checkpoint run_name save_on_each_node save_only_model save_steps save_strategy
    save_total_limit torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id use_cache
""".split()  # noqa: SIM905
ON_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedulers that step when it evaluates
DATA = ("over_length", "train_on", "system", "think", "control_tokens")  # of the section, what changes a row
NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")


@dataclasses.dataclass
class Run:
    """What is decided once a run begins."""

    folder: Path
    base: Path  # the folder that the base is loaded from
    commit: str | None  # of a base from the hub
    base_sha256: dict[str, str]  # of its files
    checkpoint: str | None = None  # to go on from
    findings: list[Finding] = dataclasses.field(default_factory=list)
    accepted: list[str] = dataclasses.field(default_factory=list)  # changes that a resume was allowed
    continues: dict | None = None  # the run that model.adapter is of
    description: dict = dataclasses.field(default_factory=dict)  # of all that decides what a step computes


@contextlib.contextmanager
def begin(config: Config) -> Iterator[Run]:
    """Take the run's folder, which is locked in here, and find its base; a folder without a file goes in the end.
    A folder that holds a run is never written over, but by `--resume` of that run, from its newest complete checkpoint
    and with the commit of the base that it began with. Without a checkpoint it begins again in its folder, so that a
    job which was killed early needs nobody. Raises `UserError` for what this machine cannot do, a folder that holds a
    run or is in use, a checkpoint that is not complete, and a base that cannot be had."""
    check_machine(config)
    with contextlib.ExitStack() as held:
        folder, checkpoint = _on_first(config, lambda: (_resume if config.resume else _take_folder)(config, held))
        model, before = config.model, record_of(folder, {"model": dict}) if checkpoint else {}
        same = all(before.get("model", {}).get(key) == getattr(model, key) for key in ("name_or_path", "revision"))
        commit = _on_first(config, lambda: on_hub(find_base(model, before.get("commit") if same else None))[1])
        base = find_base(model, commit)
        hashes = _on_first(config, lambda: base_hashes(base))  # until each machine has it
        longest = config.training.get("max_length", SFTConfig.max_length)
        check_base(base, model, config.use_cpu_asked, config.method, longest)
        check_lora(base, model, config.lora)
        yield Run(folder, base, commit, hashes, checkpoint)


def _on_first(config: Config, decide: Callable[[], Any]) -> Any:
    """What `decide()` returns in the first process, in all of them; a `UserError` that it raises there, too."""
    decision: list = [None, None]
    if is_main_process():
        try:
            decision[0] = decide()
        except UserError as error:
            decision[1] = error
    PartialState(cpu=config.training["use_cpu"])  # where nothing has connected the processes yet
    if torch.distributed.is_initialized():  # in a group that waits: to fetch a base may take longer than a step may
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        torch.distributed.broadcast_object_list(decision, group=patient)
    if decision[1]:
        raise decision[1]
    return decision[0]


def _take_folder(config: Config, held: contextlib.ExitStack) -> tuple[Path, None]:
    """The folder of a new run: the one that was given, or the first of its numbered ones that is free."""
    given, default = config.output_dir, f"runs/{config.name}-{config.method}"
    numbered = itertools.chain([default], (f"{default}-{number}" for number in itertools.count(2)))
    for folder in map(Path, [given] if given else numbered):
        with contextlib.ExitStack() as attempt:
            try:
                attempt.enter_context(_held(folder))
            except UserError:  # in use
                if given or not folder.is_dir():
                    raise
                continue
            if not any(list(folder.glob(name)) for name in ("run.json", "adapter_config.json", "checkpoint-*")):
                held.push(attempt.pop_all())
                return folder, None
    raise UserError(f"{given}: holds a run already; give another --training.output_dir, or --resume to go on")


def _resume(config: Config, held: contextlib.ExitStack) -> tuple[Path, str | None]:
    """(the folder of the run that was named, or else of this config's that was written last; its checkpoint)."""
    given, default, named = config.output_dir, Path(f"runs/{config.name}-{config.method}"), str(config.resume)
    if named == "latest":
        records = [path / "run.json" for path in (default, *default.parent.glob(f"{default.name}-*"))]
        newest = max(records, key=lambda record: record.stat().st_mtime if record.is_file() else 0.0)
        folder = Path(given) if given else newest.parent
    else:
        folder = Path(named).parent
        if given and Path(given).resolve() != folder.resolve():
            raise UserError(f"--resume: {named} is not in training.output_dir {given}; leave one of the two out")
        if why := fault(Path(named)) if Path(named).is_dir() else "there is no such folder":
            raise UserError(f"--resume: {named}: {why}; --resume alone takes the newest complete checkpoint")
    held.enter_context(_held(folder))
    checkpoint, record = newest_complete(folder) if named == "latest" else Path(named), record_of(folder)
    if (record and record.get("format") != FORMAT) or (checkpoint and "run" not in read_manifest(checkpoint)):
        raise UserError(f"--resume: {folder} was begun by an older version of these recipes; begin a new run")
    return folder, str(checkpoint) if checkpoint else None


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make `folder`, with its parents, and lock it; what holds nothing in the end goes again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "is a file, not a folder" if folder.is_file() else f"cannot be made: {error.strerror}"
        raise UserError(f"training.output_dir: {folder} {why}") from error
    try:
        with locked(folder):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_same_run(run: Run, config: Config, trainer, train: Prepared, validation: Prepared | None) -> None:
    """Describe the run, and at a resume compare that with the checkpoint's description. Raises `UserError` naming each
    setting that differs, unless `--accept-changes` was given, and always for other shapes or numbers of processes."""
    run.description = _describe(run, config, trainer, train, validation)
    run.continues = _continued(config, trainer.model, run.description)
    if run.checkpoint is None:
        return
    before, now = read_manifest(Path(run.checkpoint))["run"], run.description
    if before is None:
        say(f"resume: nobody has recorded what {run.checkpoint} is made of, so nothing is compared")
        return
    before.setdefault("model.fast_lora", False)  # runs from before it was a setting
    changed = {key: (before[key], now[key]) for key in before if key in now and before[key] != now[key]}
    if changed.keys() & {"data.train", "data.exclude", "chat template", "tokenizer", "training.max_length"}:
        changed.pop("rows", None)  # that is why
    if len(changed) > 1:
        changed.pop("validation rows", None)
    drawn = changed.keys() & {"effective batch", "processes"} or now["lora.lora_dropout"]
    if "micro-batch" in changed and not drawn:  # dropout would draw other masks
        was, is_now = changed.pop("micro-batch")
        say(f"resume: micro-batches of {is_now} rows, not {was}, at the same effective batch: sums in another order")
    for key in ("training.num_train_epochs", "training.max_steps"):
        if key in changed and changed[key][1] > changed[key][0] > 0:
            was, is_now = changed.pop(key)
            say(f"resume: {key} {is_now}, not {was}: the learning rate follows the longer schedule from here on")
    lines = {}
    for key, pair in changed.items():
        texts = [value if isinstance(value, str) else json.dumps(value) for value in pair]
        short = [text if len(text) <= 60 else f"{text[:57]}..." for text in texts]
        lines[key] = f"{key}: {short[0]} in the checkpoint, {short[1]} now"
    if "processes" in lines:
        dealt = "rows are dealt out by process, so go on with as many as it was begun with"
        raise UserError(f"--resume: {lines['processes']}; {dealt}")
    listed = "\n  ".join(lines.values()) or "the adapter's shapes"
    if not holds_adapter(run.checkpoint, trainer.model):
        raise UserError(f"--resume: {run.checkpoint} holds another adapter; put back, or begin a new run:\n  {listed}")
    if lines and not config.accept_changes:
        mend = "put them back, begin a new run, or go on all the same with --accept-changes"
        raise UserError(f"--resume: this is not the run that {run.checkpoint} is of:\n  {listed}\n{mend}")
    run.accepted = list(lines.values())
    for line in run.accepted:
        say(f"resume: accepted: {line}")


def _continued(config: Config, model, description: dict) -> dict | None:
    """What run.json says of the run that `model.adapter` goes on from; None for an adapter of another tool. Raises
    `UserError` where base, tokenizer or template differ (but with `--accept-changes`), or the adapter's shapes."""
    folder = Path(config.model.adapter or "")  # which may be a run's checkpoint
    record = record_of(folder) or (record_of(folder.parent) if folder.name.startswith("checkpoint-") else {})
    if not config.model.adapter or not record:
        return None
    before, kept = record.get("description", {}), ("name", "started", "finished", "data_sha256", "continues")
    compared = ("base", "tokenizer", "chat template")  # a run of an older version has another digest of its base
    wrong = [key for key in compared if key in before and before[key] != description[key]]
    if not holds_adapter(folder, model):
        raise UserError(f"model.adapter: {folder} has other tensors than its adapter_config.json says")
    if wrong and not config.accept_changes:
        mend = "give the model section of that run, or go on all the same with --accept-changes"
        raise UserError(f"model.adapter: {folder} was trained with another {' and '.join(wrong)}; {mend}")
    known = {key: record[key] for key in kept if key in record}
    return {"run": str(folder), **known, "adapter_sha256": adapter_sha256(folder)}


def _describe(run: Run, config: Config, trainer, train: Prepared, validation: Prepared | None) -> dict:
    """{setting: value} of all that decides what a step computes, as JSON has it. Data, template, tokenizer and base are
    digests of their content; the rows are those that the trainer has made of them, packed or not."""
    args, tokenizer, model = trainer.args, trainer.processing_class, trainer.model
    micro, processes = args.per_device_train_batch_size, args.world_size
    free = FREE if args.lr_scheduler_type not in ON_EVALUATIONS else [key for key in FREE if key[:5] != "eval_"]
    validated = config.data.validation
    if validation and not isinstance(validated, float):
        validated = _digest(" ".join(validation.files.values()))
    adapter = model.peft_config["default"].to_dict().items()
    description = {
        "data.train": _digest(" ".join([*train.files.values(), *map(repr, train.counts.mixture.items())])),
        "data.validation": validated, "data.exclude": _digest(json.dumps(train.counts.excluded)),
        **{f"data.{key}": getattr(config.data, key) for key in DATA},
        "chat template": _digest(tokenizer.chat_template or ""), "base": _digest(json.dumps(run.base_sha256)),
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str() + repr(sorted(tokenizer.special_tokens_map.items()))),
        **{f"model.{key}": getattr(config.model, key) for key in ("dtype", "adapter", "compile_layers")},
        "model.fast_lora": has_fast_lora(model),
        **{f"quantization.{key}": value for key, value in _quantization(model).items()},
        **{f"lora.{key}": value for key, value in adapter if key not in NOT_OF_THE_ADAPTER},
        **{f"training.{key}": value for key, value in args.to_dict().items() if key not in free},
        "effective batch": micro * args.gradient_accumulation_steps * processes, "micro-batch": micro,
        "processes": processes, "sharded": trainer.is_fsdp_enabled, "attention": model.config._attn_implementation,
        "rows": _rows_digest(trainer.train_dataset),
        "validation rows": _rows_digest(validation.rows) if validation else None,
    }  # fmt: skip
    return json.loads(json.dumps(description, default=lambda it: sorted(it) if isinstance(it, set) else str(it)))


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _rows_digest(rows) -> str:
    """Of the token ids and labels of all rows in order, however they came about, or of all that they have."""
    digest, names = hashlib.sha256(), ["input_ids", "labels"]
    if not set(names) <= set(rows.column_names):
        return _digest(json.dumps(list(rows), default=str))
    for batch in rows.select_columns(names).with_format("arrow").iter(1000):
        for column in (batch[name].combine_chunks() for name in names):
            digest.update(np.asarray(column.flatten()).tobytes() + np.asarray(column.value_lengths()).tobytes())
    return digest.hexdigest()[:16]


def _quantization(model) -> dict:
    """The arguments of BitsAndBytesConfig that the base was loaded with; none for one in 16 bit."""
    settings = getattr(model.config, "quantization_config", None)
    known = [key for key in inspect.signature(BitsAndBytesConfig).parameters if "4bit" in key or "skip" in key]
    return {key: settings.to_dict()[key] for key in known} if settings else {}


@contextlib.contextmanager
def recorded(run: Run, config: Config, trainer, train: Prepared, validation: Prepared | None) -> Iterator[dict]:
    """Keep run.json true: `running` while the body runs, then how it ended: `finished`, `stopped`, `diverged` or
    `failed`. Yields a dict for the results to be written at the end. What the body raises goes on; running out of
    memory, or a disk that fails, becomes a `RunEnded` that says what to do. Rows that were skipped go to
    bad_rows.jsonl. A stop signal in the last save waits for it, a second Ctrl-C does not."""
    record = _record(run, config, trainer, train, validation)
    results: dict = {}

    def write(**more) -> None:
        if is_main_process():
            write_json(run.folder / "run.json", {**record, **more})

    bad = {row["where"]: row for part in (train, validation) if part for row in part.counts.bad}
    if bad and is_main_process():
        write_jsonl(run.folder / "bad_rows.jsonl", bad.values())
    write()
    asked = []

    def wait(number, frame) -> None:
        if not trainer.state.global_step or (number == signal.SIGINT and number in asked):
            raise KeyboardInterrupt  # there is nothing to save yet, or somebody insists
        asked.append(number)
        tell("all steps are taken: ending when the adapter is saved; Ctrl-C again ends at once")

    try:
        with signals_to(wait):
            yield results
    except BaseException as error:
        end = error
        if isinstance(error, torch.OutOfMemoryError):
            end = RunEnded("failed", out_of_memory(config, trainer))
        elif why := disk_error(error):
            end = RunEnded("failed", f"{why}; make room on the disk, or mend it, then run again with --resume")
        # the message of any other error may hold paths
        word, why = (end.word, str(end)) if isinstance(end, RunEnded) else ("failed", type(error).__name__)
        with contextlib.suppress(OSError):
            write(status=word, ended=_now(), step=trainer.state.global_step, reason=why)
        if end is error:
            raise
        raise end from error
    write(status="finished", finished=_now(), best_validation_loss=trainer.state.best_metric, **results)


def _record(run: Run, config: Config, trainer, train: Prepared, validation: Prepared | None) -> dict:
    """What the run is made of; after a resume, with when it began and how often it was taken up again."""
    parts = {"train": train, "validation": validation} if validation else {"train": train}
    sections, findings = config.sections(), [finding for part in parts.values() for finding in part.findings]
    training = {key: value for key, value in sections["training"].items() if not key.endswith("token")}
    counted = {name: dataclasses.asdict(part.counts) if part.files else {} for name, part in parts.items()}
    for name, part in parts.items():  # of rows that `prepare` did not make, their number is known
        counted[name] |= {"rows": len(part.rows), "bad": sum(part.counts.bad_kinds.values())}
    record = {
        "format": FORMAT, "status": "running", "method": config.method, "name": config.name, "started": _now(),
        "started_in": os.path.relpath(os.path.realpath("."), os.path.realpath(run.folder)),  # from the run folder
        **sections, "training": {"output_dir": str(run.folder), **training},
        "quantization": _quantization(trainer.model), "commit": run.commit, "device": device_name(trainer.args.use_cpu),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "processes": trainer.args.world_size, "seed": trainer.args.seed, "rows": counted,
        "data_sha256": {file: digest for part in parts.values() for file, digest in part.files.items()},
        "base_sha256": run.base_sha256,
        "findings": [finding._asdict() for finding in [*findings, *run.findings]], "description": run.description,
    }  # fmt: skip
    record |= {"continues": run.continues} if run.continues else {}
    old = record_of(run.folder, {"started": str, "resumed": list | None, "versions": dict}) if run.checkpoint else {}
    if run.checkpoint and old:
        again = {"from": Path(run.checkpoint).name, "at": _now(), "accepted": run.accepted}
        record |= {"started": old["started"], "resumed": [*old.get("resumed", []), again]}
        before, now = old["versions"], record["versions"]
        if changed := [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]:
            say(f"resume: other versions than the run was begun with: {'; '.join(changed)}")
    return record


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def out_of_memory(config: Config, trainer) -> str:
    """What to turn down, in the order of what it costs, with this run's numbers; ready to paste."""
    args, evaluating = trainer.args, not trainer.model.training
    micro, length = args.per_device_train_batch_size, args.max_length
    half, batch = max(1, micro // 2), micro * args.gradient_accumulation_steps
    flags = f"--training.per_device_train_batch_size {half} --training.gradient_accumulation_steps {batch // half}"
    peak, reserved = (how() / 1e9 for how in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    mends = {
        "PYTORCH_ALLOC_CONF=expandable_segments:True before the command: what is reserved lies in pieces, too small":
            reserved > 1.1 * peak,
        "--training.per_device_eval_batch_size 1        costs little time": evaluating and args.eval_batch_size > 1,
        "--training.gradient_checkpointing true         saved activations shrink; about 1.4 times the time":
            not (args.gradient_checkpointing or args.activation_checkpointing),
        f"{flags}{' --accept-changes' * bool(config.lora.get('lora_dropout'))}    the same effective batch of {batch}":
            micro > 1,
        "--lora.lora_dropout 0    another run: begin it anew": config.lora.get("lora_dropout"),
        "recipes/sft_qlora.py in the place of sft_lora.py: the base in 4 bit; another run: begin it anew":
            config.method == "lora",
        f"--training.max_length {length // 2} (now {length}): longer rows are dropped; another run": True,
    }  # fmt: skip
    listed = [f"  {number}. {mend}" for number, mend in enumerate((mend for mend in mends if mends[mend]), 1)]
    memory = f" Peak: {peak:.1f} GB, {reserved:.1f} reserved." if reserved else ""
    when = f"{'in an evaluation after' if evaluating else 'in the step after'} step {trainer.state.global_step}"
    head = f"out of memory {when}, with micro-batches of {micro} × {length} tokens.{memory} In this order:"
    return "\n".join([head, *listed, f"then go on with: python recipes/sft_{config.method}.py CONFIG --resume"])
