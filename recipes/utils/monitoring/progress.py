"""While it trains: one progress line on a terminal, a line now and then in a log, every figure in metrics.jsonl."""

import atexit
import sys
import time
from pathlib import Path
from typing import Any

import rich.progress
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # in a notebook another one

from recipes.utils.console import out, say
from recipes.utils.files import append_jsonl, keep_steps, read_jsonl

LINES_IN_A_LOG = 20
BESIDE_THE_BAR = ("loss", "mean_token_accuracy", "tokens_per_second", "mfu")  # they fit a terminal of 80 columns
SHOWN = {  # what is logged, and how a line has it: whatever is not there is left out
    "loss": "  loss {:.4f}", "mean_token_accuracy": "  accuracy {:.1%}", "rewards/margins": "  reward margin {:.3f}",
    "learning_rate": "  lr {:.1e}", "tokens_per_second": "  {:,.0f} tokens/s",
    "trained_tokens_per_second": ", {:,.0f} trained", "padding_share": "  padding {:.0%}", "mfu": "  MFU {:.0%}",
    "peak_memory_gb": "  {:.1f} GB", "gpu_utilization": "  GPU {} %", "gpu_power_w": ", {:.0f} W",
}  # fmt: skip


class Progress(TrainerCallback):
    """Shows progress, and writes `folder`/metrics.jsonl: an object a logging step or evaluation, of all that the
    trainer logs then; docs/run_folder.md says what that is."""

    # which a `Resumable` trainer leaves out, then
    in_place_of = (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)

    def __init__(self, folder: Path):
        self.path = Path(folder) / "metrics.jsonl"
        self.bar: Any = None  # rich's on a terminal, a notebook's page
        self.started, self.first_step, self.line_due = time.monotonic(), 0, 0
        self.before = 0.0  # seconds that a run which goes on has trained up to its checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        step, due = state.global_step, control.should_evaluate  # the evaluation that a stop has put off
        keep_steps(self.path, step, lambda line: due and line["step"] == step and "eval_loss" in line)
        self.before = max((line.get("seconds", 0.0) for line in read_jsonl(self.path)), default=0.0)
        if out.page or sys.stdout.isatty():
            columns = "{task.completed}/{task.total}", rich.progress.BarColumn(bar_width=None), "{task.description}"
            self.bar = out.page or rich.progress.Progress(*columns, console=out, expand=True)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()
            if not out.page:
                atexit.register(self.bar.stop)  # it hides the cursor, and a run that fails has no on_train_end

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:  # trackers take their time to begin
            self.started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)
        if state.global_step == state.max_steps and state.is_world_process_zero:
            evaluation = "the last evaluation, " * (args.eval_strategy != "no")
            say(f"all steps are taken; {evaluation}the adapter and the report follow")

    def on_log(self, args, state, control, logs, **kwargs):
        if "train_runtime" in logs or not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self.started
        record = {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.before + seconds, 3)}
        record |= {name: value.item() if hasattr(value, "item") else value for name, value in logs.items()}
        if "loss" in record:
            a_step = seconds / max(1, state.global_step - self.first_step)  # evaluations and all
            record["seconds_left"] = round(a_step * (state.max_steps - state.global_step), 1)
        append_jsonl(self.path, [record])
        place = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  "
        if "eval_loss" in record:
            of_evaluation = {name[len("eval_") :]: value for name, value in record.items() if name.startswith("eval_")}
            say(place + "validation " + metrics_line(of_evaluation))
        elif "loss" in record and self.bar:
            self.bar.update(self.task, description=metrics_line(record, BESIDE_THE_BAR))
        elif "loss" in record and state.global_step >= self.line_due:
            say(place + metrics_line(record))
            self.line_due = state.global_step + max(1, state.max_steps // LINES_IN_A_LOG)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.stop()


def metrics_line(logs: dict, names=tuple(SHOWN)) -> str:
    """Those of `names` that `logs` has, and the time left where it is known."""
    known = [name for name in SHOWN if name in names and isinstance(logs.get(name), int | float)]
    line = "".join(SHOWN[name].format(logs[name]) for name in known if name != "padding_share" or logs[name] > 0.005)
    line = line.replace("lr 0.0e+00", "lr 0: a step that changes nothing")  # the first of a warm-up
    if "seconds_left" in logs:
        seconds = int(logs["seconds_left"])
        line += f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
    return line.strip()
