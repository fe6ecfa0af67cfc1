"""While it trains: one progress line on a terminal, a line now and then in a log, every figure in metrics.jsonl."""

import sys
import time
from pathlib import Path

from recipes.utils.console import out, say
from recipes.utils.jsonl import append_lines, keep_steps
from recipes.utils.ledger import Ledger
from recipes.utils.micro_batch import observe
from recipes.utils.samples import Samples
from recipes.utils.throughput import Throughput
from recipes.utils.trackers import join_trackers

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

LINES_IN_A_LOG = 20


def watch(trainer, config, train, validation) -> None:
    """Let `trainer` show and keep what happens: progress and metrics.jsonl in the place of the Trainer's own display, the
    ledger of the train rows, samples of the validation rows; its trackers get the same.

    `train` and `validation` (or None) are what `prepare` made.
    """
    throughput = Throughput(trainer, config.model.dtype)
    listeners, callbacks = [throughput.see], [Monitor(config.run_folder, throughput)]
    if config.data.ledger:
        callbacks.append(Ledger(config.run_folder, train.rows))
        listeners.append(callbacks[-1].see)
    samples = None
    asked_for = config.data.samples and validation
    if asked_for and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        say("samples: none, since a model that is spread over processes cannot answer in one of them")
    elif asked_for:
        samples = Samples(config.run_folder, validation.rows, config.data.samples, trainer.processing_class)
        callbacks.append(samples)
    observe(trainer.model, *listeners)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    # After the Trainer's first callback, which decides when to save; before the trackers, so that they get every figure.
    trainer.callback_handler.callbacks[1:1] = callbacks
    join_trackers(trainer, config.run_folder, samples)


class Monitor(TrainerCallback):
    """Shows progress and writes metrics.jsonl: one object a logging step or evaluation; docs/run_folder.md says what is
    in it."""

    def __init__(self, run_folder: Path, throughput: Throughput):
        self.path, self.throughput = run_folder / "metrics.jsonl", throughput
        self.bar = self.task = None
        self.started = 0.0
        self.begun_at = self.line_due = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.begun_at = time.monotonic(), state.global_step
        self.throughput.machine()  # the CPU's use is counted from one call to the next
        if not state.is_world_process_zero:
            return
        keep_steps(self.path, state.global_step)
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                console=out,
                expand=True,
            )
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == self.begun_at:  # trackers take their time to begin
            self.started = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.throughput.step_begins()

    def on_step_end(self, args, state, control, **kwargs):
        self.throughput.step_ends()
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.throughput.paused = True

    on_save = on_evaluate

    def on_log(self, args, state, control, logs, **kwargs):
        if "train_runtime" in logs:
            return
        now = time.monotonic()
        if "loss" in logs:
            a_step = (now - self.started) / max(1, state.global_step - self.begun_at)  # evaluations and all
            logs.update(
                self.throughput.figures(), seconds_left=round(a_step * (state.max_steps - state.global_step), 1)
            )
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "epoch": state.epoch, "seconds": round(now - self.started, 3), **logs}
        append_lines(self.path, [record])
        if "eval_loss" in logs:
            shown = f"validation loss {logs['eval_loss']:.4f}  accuracy {logs['eval_mean_token_accuracy']:.1%}"
            self._print(state, shown)
        elif "loss" in logs and self.bar:
            self.bar.update(self.task, description=progress_line(logs))
        elif "loss" in logs and state.global_step >= self.line_due:
            self._print(state, log_line(logs))
            self.line_due = state.global_step + max(1, state.max_steps // LINES_IN_A_LOG)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.stop()

    def _print(self, state, text: str) -> None:
        say(f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {text}")


def progress_line(logs: dict) -> str:
    """What stands beside the bar; it fits a terminal of 80 columns."""
    busy = f"MFU {logs['mfu']:.0%}  " if "mfu" in logs else ""
    return (
        f"loss {logs['loss']:.4f}  accuracy {logs['mean_token_accuracy']:.1%}  "
        f"{logs['tokens_per_second']:,.0f} tokens/s  {busy}{_clock(logs['seconds_left'])} left"
    )


def log_line(logs: dict) -> str:
    """The same for a log file, with room for more."""
    parts = [
        f"loss {logs['loss']:.4f}  accuracy {logs['mean_token_accuracy']:.1%}  lr {logs['learning_rate']:.1e}",
        f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['trained_tokens_per_second']:,.0f} trained",
        f"padding {logs['padding_share']:.0%}" if logs["padding_share"] > 0.005 else None,
        f"MFU {logs['mfu']:.0%}" if "mfu" in logs else None,
        f"{logs['peak_memory_gb']:.1f} GB",
        f"GPU {logs['gpu_utilization']} %, {logs['gpu_power_w']:.0f} W" if "gpu_power_w" in logs else None,
        f"{_clock(logs['seconds_left'])} left",
    ]
    return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
