"""Stop signals and deadlines: the step in hand is finished, a whole checkpoint saved, the trackers closed, status 75.

Around TRL's trainer: a callback asks after each step whether to stop, and all processes agree on the answer.
"""

import contextlib
import os
import signal
import threading
import time

from recipes.utils.console import RunEnded, is_main_process, say
from recipes.utils.disk import checkpoint_bytes

import psutil
import torch
import torch.distributed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SLOW_DISK = 50e6  # bytes a second; for the first save, which nobody has timed yet


class StopHere(Exception):
    """Leaves the trainer's loop; the reason is its message."""


@contextlib.contextmanager
def stoppable(trainer, max_hours: float | None):
    """While the body runs, SIGTERM, SIGINT, SIGUSR1 and the end of `max_hours` (since the process began) stop `trainer`
    after the step in hand, and the body ends with `RunEnded` of the word `stopped`. A second SIGINT ends it at once."""
    stop = Stop(trainer, max_hours)
    trainer.add_callback(stop)
    here = threading.current_thread() is threading.main_thread()  # signals reach no other
    before = {number: signal.signal(number, stop.ask) for number in SIGNALS} if here else {}
    try:
        yield
    except StopHere as reason:
        if not stop.saved:  # it was evaluating, for which the loader of the rows had drawn a number
            torch.random.set_rng_state(stop.random_state)
            trainer._save_checkpoint(trainer.model, None)
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        step = trainer.state.global_step
        message = f"stopped by {reason} after step {step}: {trainer.args.output_dir}/checkpoint-{step} is complete"
        raise RunEnded("stopped", f"{message}; run again with --resume") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop(TrainerCallback, ExportableState):
    """Asks after each step, evaluated batch and save whether to stop here.

    An evaluation that is due is put off, since a batch system does not wait for it: the checkpoint says so, and the
    resumed run evaluates first and saves that checkpoint anew, as the run that was not stopped would have it.
    """

    def __init__(self, trainer, max_hours: float | None):
        self.trainer, self.asked_by, self.saved, self.evaluation_due = trainer, None, False, False
        self.deadline = psutil.Process().create_time() + max_hours * 3600 if max_hours else None
        self.longest_step, self.longest_save = 0.0, checkpoint_bytes(trainer) / SLOW_DISK
        self.began, self.random_state = time.monotonic(), None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"evaluation_due": self.evaluation_due}}

    def ask(self, number, frame) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.asked_by:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if not self.asked_by and is_main_process():  # not through rich, which may hold its lock just now
            os.write(2, f"\n{name}: stopping after this step, with a checkpoint; Ctrl-C again ends at once\n".encode())
        self.asked_by = self.asked_by or name

    def on_train_begin(self, args, state, control, **kwargs):
        left = state.stateful_callbacks.get("Stop", {}).get("attributes", {})
        if left.get("evaluation_due"):
            trainer, checkpoint = self.trainer, f"{args.output_dir}/checkpoint-{state.global_step}"
            say("resume: the evaluation that the stop has put off comes first")
            trainer._load_rng_state(checkpoint)
            self.random_state = torch.random.get_rng_state()
            trainer._determine_best_metric(trainer._evaluate(None, None), None)
            trainer._save_checkpoint(trainer.model, None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.longest_step = max(self.longest_step, time.monotonic() - self.began)
        if self._agreed():
            at_the_end = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
            end_of_epoch = args.eval_strategy == "epoch" and at_the_end and args.eval_delay <= state.epoch
            self.evaluation_due = control.should_evaluate or end_of_epoch
            control.should_evaluate, control.should_save = False, True
        self.began, self.random_state = time.monotonic(), torch.random.get_rng_state()

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._agreed():
            self.evaluation_due = True
            raise StopHere(self.asked_by)

    def on_evaluate(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.longest_save = max(self.longest_save, time.monotonic() - self.began)
        self.began = time.monotonic()
        if self._agreed():
            self.saved = True
            raise StopHere(self.asked_by)

    def _agreed(self) -> bool:
        """True in every process as soon as one of them was asked to stop, or its deadline is near: one more step and two
        saves away."""
        if self.deadline and time.time() + 2 * self.longest_step + 2 * self.longest_save > self.deadline:
            self.asked_by = self.asked_by or "--max-hours"
        if self.trainer.args.world_size > 1:
            asked = torch.tensor(int(self.asked_by is not None), device=self.trainer.args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            if asked.item() and not self.asked_by:
                self.asked_by = "a signal to another process"
        return self.asked_by is not None
