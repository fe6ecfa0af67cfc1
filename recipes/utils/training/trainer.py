"""A trainer that survives: it stops at signals and deadlines with a whole checkpoint, and steps on no loss that is not
finite, but ends with the rows it came from. Before any trainer of TRL: `class MyTrainer(Resumable, DPOTrainer)`."""

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from recipes.utils.console import RunEnded, UserError, disk_error, is_main_process, say
from recipes.utils.data import document_hash, locate
from recipes.utils.files import record_of, sync_path
from recipes.utils.model import publish_base
from recipes.utils.training.checkpoint import clear, fault, newest_complete, publish, read_manifest, step_of
from recipes.utils.training.micro_batch import MicroBatch, documents_of, observe
from recipes.utils.training.throughput import Throughput

_Trainer: Any = object  # for a type checker, the trainer of TRL that the mixin goes before
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SLOW_DISK = 50e6  # bytes a second; for the first save, which nobody has timed yet
ROWS_NAMED = 10
# A gradient norm beyond it is no direction: clipped, it leaves nothing of the other rows' gradients in float32; not
# clipped, Adam's second moment stands still for thousands of steps.
ABSURD_NORM = 1e10


class StopHere(Exception):
    """Leaves the trainer's loop; the reason is its message."""


class Resumable(_Trainer):
    """What a trainer of TRL lacks to be killed and taken up again. The rows of `train_dataset` and `eval_dataset` are
    named where they have `input_ids` and `where` (file:line). What the libraries raise about settings that they alone
    can judge (a target module that the model lacks) is a `UserError`."""

    def __init__(self, *args, **kwargs):
        # before packing, which leaves no more of a row than its token ids
        self._rows = {"train": kwargs.get("train_dataset"), "validation": kwargs.get("eval_dataset")}
        self._step: list[tuple[dict, torch.Tensor]] = []  # its micro-batches, each with its loss
        self._odd: list[np.ndarray] = []  # their documents with a loss that is not finite
        self._validated: list[torch.Tensor] = []  # [rows, 2] of each batch: tokens times loss, tokens
        self._counted = False  # this micro-batch, by the throughput
        try:
            super().__init__(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the settings cannot be used: {why}") from error
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not self.is_fsdp_enabled:
            raise UserError("FSDP was asked for and is not in use: launch with configs/accelerate/fsdp2.yaml as it is")
        dtype = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
        if self.accelerator.is_fsdp2 and dtype != "float32":
            # accelerate would round what comes out of the model too, and so each loss that is logged to 8 bits
            policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        self._throughput = Throughput(self.accelerator, self.model, dtype)
        observe(self.model, self._look, evaluating=True)
        for callback in list(self.callback_handler.callbacks):
            for other in getattr(callback, "in_place_of", ()):
                self.remove_callback(other)
        self.add_callback(self._throughput)

    def _send_telemetry(self):
        """Nothing is told to anybody."""

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Train; `resume_from_checkpoint` is a folder, or True for the newest complete checkpoint in args.output_dir.
        SIGTERM, SIGINT, SIGUSR1, SIGHUP (but under nohup) and a `Deadline` end it after the step in hand, with a
        checkpoint and `RunEnded` of the word `stopped`; a second SIGINT ends it at once."""
        folder = Path(self.args.output_dir)
        found = newest_complete(folder) if resume_from_checkpoint is True else resume_from_checkpoint
        checkpoint = str(found) if found else None
        if self.args.should_save:
            clear(folder, step_of(Path(checkpoint)) if checkpoint else -1)
        events = self._events = _Events(self, checkpoint)
        self.control.should_evaluate = bool(events.manifest.get("evaluation_due"))  # its lines will be written again
        self.add_callback(events)  # the last one: it knows what the others have asked for
        try:
            with signals_to(events.ask):
                return super().train(checkpoint, trial, ignore_keys_for_eval)
        except StopHere as reason:
            if not events.saved:  # it was evaluating
                self._save_checkpoint(self.model, None)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            step = self.state.global_step
            complete = f"stopped by {reason} after step {step}: {folder}/checkpoint-{step} is complete"
            raise RunEnded("stopped", f"{complete}; the same command with --resume goes on") from None
        finally:
            self.remove_callback(events)

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)
        else:  # a run that is over is taken up: the library would make one step more
            self.control.should_training_stop = True

    def _save_checkpoint(self, model, trial):
        """Write the checkpoint under another name, and rename it when it is on the disk. trainer_state.json names no
        best checkpoint, which would be a path of this machine: a resume finds it by its step. Raises `RunEnded` where a
        checkpoint cannot be written; the one before it stays."""
        args, state, folder, limit = self.args, self.state, Path(self.args.output_dir), self.args.save_total_limit
        final, staging = folder / f"checkpoint-{state.global_step}", folder / ".saving"
        staged = staging / final.name
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        args.output_dir, args.save_total_limit = str(staging), None
        try:
            for lines in folder.glob("*.jsonl") if args.should_save else ():
                sync_path(lines)  # a resume goes on from what they say up to here
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written its part
            state.best_model_checkpoint = None
            if args.should_save:
                state.save_to_json(str(staged / "trainer_state.json"))
                (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine
                if (staged / "adapter_config.json").is_file():
                    publish_base(staged)
                due, made_of = self._events.evaluation_due, record_of(folder).get("description")
                publish(staged, final, {"processes": args.world_size, "evaluation_due": due, "run": made_of})
        except Exception as error:
            if (why := disk_error(error)) is None:
                raise
            kept = "The checkpoint before it is whole, and nothing half-written is left"
            mend = "make room on the disk, or mend it, then run again with --resume"
            raise RunEnded("failed", f"{final} could not be written: {why}\n{kept}; {mend}") from error
        finally:
            if args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            args.output_dir, args.save_total_limit = str(folder), limit
        self.accelerator.wait_for_everyone()
        best = folder / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if args.should_save:
            rotate_checkpoints(str(folder), limit, state.best_model_checkpoint)

    def _look(self, batch: MicroBatch) -> None:
        self._odd += [batch.documents[index] for index in np.flatnonzero(~np.isfinite(batch.nll))]
        # A second pass without gradients is DPO's reference; the only one is beside a loss over full logits.
        if self.model.training and (torch.is_grad_enabled() or not self._counted):
            self._throughput.see(batch)
            self._counted = True

    def training_step(self, model, inputs, *args, **kwargs):
        self._counted = False
        told_by = {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask") if name in inputs}
        self._step.append((told_by, super().training_step(model, inputs, *args, **kwargs)))
        return self._step[-1][1]

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self._throughput.figures())
        super().log(logs, start_time)

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient norm before clipping, which would make zeros of all gradients beside an infinite one. Raises
        `RunEnded` of the word `diverged` if it, or a loss of this step, is not finite. In float16 an infinite gradient
        is normal (the scaler skips the step), so there the loss alone counts."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm, finite = whole_norm(grad_norm), math.isfinite(float(sum(loss for _, loss in self._step)))
        what = f"gradient norm is {norm:.1e}" if finite and norm < math.inf else "loss or its gradient is not finite"
        fine = finite and (self.args.fp16 or norm <= ABSURD_NORM)
        self._end_unless(fine, f"step {self.state.global_step + 1}: the {what}", "train")
        self._step, self._odd = [], []
        return grad_norm

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        tokens = (inputs["labels"][:, 1:] != -100).sum(1) if "labels" in inputs else None
        loss, *outputs = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if tokens is not None:
            sums = torch.stack([tokens.to(loss.device) * loss, tokens.to(loss.device)], 1)
            self._validated.append(self.accelerator.gather_for_metrics(sums))
        return loss, *outputs

    def evaluation_loop(self, *args, **kwargs):
        """An evaluation that draws no random number of the training's: its loader does, for each pass over the rows.
        The library's mean over batches, however few answer tokens one has, becomes the mean over answer tokens."""
        self._step, self._odd, self._validated = [], [], []
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            result = super().evaluation_loop(*args, **kwargs)
        if self._validated:
            loss, tokens = torch.cat(self._validated).double().sum(0).tolist()
            result.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / max(1, tokens)
        fine = all(math.isfinite(value) for name, value in result.metrics.items() if name.endswith("_loss"))
        self._end_unless(fine, f"step {self.state.global_step}: the validation loss is not finite", "validation")
        return result

    def _end_unless(self, fine: bool, what: str, part: str) -> None:
        """Raise `RunEnded` in every process unless it is `fine` in all of them, with the rows of `part` to suspect."""
        if not any(gather_object([not fine])):
            return
        given = [ids for batch, _ in self._step if "input_ids" in batch for ids in documents_of(**batch)[0]]
        odd, every = (gather_object([document_hash(ids) for ids in some]) for some in (self._odd, given))
        named_rows = {"input_ids", "where"} <= set(getattr(self._rows[part], "column_names", None) or ())
        places = locate(self._rows[part]) if named_rows else {}
        rows = sorted({places[key] for key in odd or every if key in places})  # every one, if only a gradient is odd
        named = ", ".join(rows[:ROWS_NAMED]) or "unknown"
        named += f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        kept = ", ".join(sorted(path.name for path in Path(self.args.output_dir).glob("checkpoint-*"))) or "none"
        mends = "Look at the rows (recipes/inspect_data.py), lower --training.learning_rate, or see that the base suits"
        not_taken = f"The step was not taken; kept: {kept}. {mends} model.dtype"
        raise RunEnded("diverged", f"{what}, from these rows: {named}\n{not_taken}")


class ResumableTrainer(Resumable, SFTTrainer):
    """TRL's SFTTrainer, resumable."""


class Deadline(TrainerCallback):
    """Ends training with a checkpoint before `max_hours` are over, counted from the start of this process; None never
    does. A resumable trainer then ends as by a signal, any other as if it had taken its last step."""

    def __init__(self, max_hours: float | None):
        self.end = psutil.Process().create_time() + max_hours * 3600 if max_hours else math.inf
        self.longest_step = self.longest_save = self.began = 0.0
        self.reached = False

    def is_near(self) -> bool:
        """True when it is one more step and two saves away."""
        return time.time() + 2 * self.longest_step + 2 * self.longest_save > self.end

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.longest_save = checkpoint_bytes(model, args) / SLOW_DISK

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    on_evaluate = on_step_begin

    def on_step_end(self, args, state, control, **kwargs):
        self.longest_step = max(self.longest_step, time.monotonic() - self.began)
        if self.end < math.inf and any(gather_object([self.is_near()])):
            say("--max-hours: training ends here, with a checkpoint")
            control.should_save = control.should_training_stop = self.reached = True
        self.began = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.longest_save = max(self.longest_save, time.monotonic() - self.began)


class EarlyStopping(EarlyStoppingCallback):
    """Ends training once `patience` evaluations in a row have brought no better validation loss; None never does. A
    resumed run goes on counting where its checkpoint ended."""

    def __init__(self, patience: int | None):
        super().__init__(early_stopping_patience=patience or 1)
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        before = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.early_stopping_patience_counter = (before or self.state())["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.patience:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            if control.should_training_stop:
                say(f"early stopping: {self.patience} evaluations in a row brought no better validation loss")


class _Events(TrainerCallback):
    """What a `Resumable` does at the events of one call of `train`: take up `checkpoint` where it ended, and ask after
    each step, evaluated batch and save whether to stop. An evaluation that is due at a stop is put off, since a batch
    system does not wait for it: the checkpoint says so, and the resumed run evaluates first and saves that checkpoint
    anew, as the run that was not stopped would have it."""

    def __init__(self, trainer: Resumable, checkpoint: str | None):
        self.trainer, self.checkpoint, self.manifest = trainer, checkpoint, dict[str, Any]()
        self.asked_by: str | None = None
        self.saved = self.evaluation_due = False
        with contextlib.suppress(OSError, UserError):  # of another tool, without one
            self.manifest = read_manifest(Path(checkpoint)) if checkpoint else {}

    def ask(self, number, frame) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.asked_by:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if not self.asked_by and is_main_process():  # not through rich, which may hold its lock just now
            tell(f"{name}: stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        self.asked_by = self.asked_by or name

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._throughput.machine()  # the CPU's use is counted from one call to the next
        if self.checkpoint is None:
            return
        state.compute_steps(args, state.max_steps)  # how often it logs, evaluates and saves would be the checkpoint's
        self._find_best(Path(self.checkpoint), self.manifest.get("run"), args, state)
        control.should_evaluate = False
        if self.manifest.get("evaluation_due"):
            say("resume: the evaluation that the stop has put off comes first")
            trainer._load_rng_state(self.checkpoint)
            trainer._determine_best_metric(trainer._evaluate(None, None), None)
            trainer._save_checkpoint(trainer.model, None)

    def _find_best(self, checkpoint: Path, before: dict | None, args, state) -> None:
        """The best checkpoint so far, if it is still whole, and comparable by what the run was made of `before`."""
        best = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
        now = record_of(args.output_dir).get("description")
        known = args.load_best_model_at_end and state.best_global_step
        why = fault(best) if known and best != checkpoint else None
        judges = "training.metric_for_best_model", "training.greater_is_better", "data.validation", "validation rows"
        if before and now and any(before.get(key) != now.get(key) for key in judges):
            why = "what is best is judged otherwise now"
        if known and why:
            say(f"resume: {best}, the best checkpoint so far, is not used: {why}")
        if known and not why:
            state.best_model_checkpoint = str(best)
        else:
            state.best_metric = state.best_global_step = None

    def on_step_end(self, args, state, control, **kwargs):
        if self._stops():
            at_the_end = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
            end_of_epoch = args.eval_strategy == "epoch" and at_the_end and args.eval_delay <= state.epoch
            self.evaluation_due = control.should_evaluate or end_of_epoch
            control.should_evaluate, control.should_save = False, True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._stops():
            self.evaluation_due = True
            raise StopHere(self.asked_by)

    def on_save(self, args, state, control, **kwargs):
        if self._stops():
            self.saved = True
            raise StopHere(self.asked_by)

    def _stops(self) -> bool:
        """True in every process as soon as one of them was asked to stop, or its deadline is near."""
        deadlines = [each for each in self.trainer.callback_handler.callbacks if isinstance(each, Deadline)]
        if not self.asked_by and any(each.reached or each.is_near() for each in deadlines):
            self.asked_by = "--max-hours"
        stops = any(gather_object([self.asked_by is not None]))  # a signal in the midst of it counts the next time
        if stops:
            self.asked_by = self.asked_by or "a signal to another process"
        return stops


def tell(text: str) -> None:
    """Print a line from within a signal's handler: after SIGHUP there may be no terminal."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have `handler` called at each of `SIGNALS`, which reach the main thread alone; nohup's SIGHUP stays ignored."""
    with contextlib.ExitStack() as afterwards:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                afterwards.callback(signal.signal, number, signal.signal(number, handler) or signal.SIG_DFL)
        yield


def checkpoint_bytes(model, args) -> int:
    """Bytes of one checkpoint: the float32 adapter, the optimizer's two moments of it, and small files, generously."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable * (4 + (2 if "8bit" in args.optim else 8)) + (32 << 20)


def whole_norm(norm) -> float:
    """A gradient norm as a number; sharded training gives one that is spread over the processes."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
