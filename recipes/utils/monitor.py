"""While it trains: a progress bar on a terminal, a line now and then in a log, every figure in metrics.jsonl."""

import json
import sys
import time
from pathlib import Path

from recipes.utils.console import out, say

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

LINES_IN_A_LOG = 20


def watch(trainer, run_folder: Path) -> None:
    """Put this project's progress display in the place of the Trainer's own on `trainer`."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Monitor(run_folder))


class Monitor(TrainerCallback):
    """Shows progress and writes metrics.jsonl: one object a logging step or evaluation, with `step`, `epoch`,
    `seconds` since training began, and what the trainer logged (`loss` in nats a token, `eval_loss`, ...)."""

    def __init__(self, run_folder: Path):
        self.path = run_folder / "metrics.jsonl"
        self.bar = self.task = None
        self.started = self.counted = self.step_ended = 0.0
        self.tokens = self.line_due = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.counted = time.monotonic()
        if not state.is_world_process_zero:
            return
        # After a resume the steps since the checkpoint are done again: their old lines go.
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= state.global_step]
        self.path.write_text("".join(line + "\n" for line in kept))
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=out,
            )
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ended = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        now = time.monotonic()
        if "loss" in logs:
            # num_tokens restarts at a resume, so a fall is no progress
            tokens = max(0, logs["num_tokens"] - self.tokens)
            logs = {**logs, "tokens_per_second": tokens / max(1e-9, now - self.counted)}
            self.tokens, self.counted = logs["num_tokens"], now
        record = {"step": state.global_step, "epoch": state.epoch, "seconds": round(now - self.started, 3), **logs}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if "eval_loss" in logs:
            self.counted += now - self.step_ended  # time spent evaluating is not the training's
            self._print(
                state, f"validation loss {logs['eval_loss']:.4f}  accuracy {logs['eval_mean_token_accuracy']:.1%}"
            )
        elif "loss" in logs:
            text = (
                f"loss {logs['loss']:.4f}  accuracy {logs['mean_token_accuracy']:.1%}  lr {logs['learning_rate']:.1e}"
            )
            text += f"  {record['tokens_per_second']:,.0f} tokens/s"
            if self.bar:
                self.bar.update(self.task, description=text)
            elif state.global_step >= self.line_due:
                self._print(state, f"{text}  {self._left(state, now)} left")
                self.line_due = state.global_step + max(1, state.max_steps // LINES_IN_A_LOG)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.stop()

    def _print(self, state, text: str) -> None:
        say(f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {text}")

    def _left(self, state, now: float) -> str:
        """Time left as h:mm:ss, from the mean step time of this process so far."""
        seconds = (now - self.started) / max(1, state.global_step) * (state.max_steps - state.global_step)
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; none for a line that a kill has cut off."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
