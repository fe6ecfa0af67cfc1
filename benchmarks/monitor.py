"""What watching a run costs: the time spent counting, showing and keeping, as a share of the time spent training.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --steps 100 --machine "what the result file shall say"

The demo is trained for real, packed and not, logging every step, with a clock around the trainer's own hook and
callback and Progress (the monitor), and around the Ledger's; evaluation, samples and checkpoints are off. A model this
small is the worst case, since its steps are short. The same code is timed on a micro-batch of the size that a 7B model
takes as well, 16,384 tokens in 39 documents, on the host. The figures go to benchmarks/results/monitor.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from recipes import sft_lora
from recipes.utils import training
from recipes.utils.config import load_config
from recipes.utils.monitoring import Ledger, Progress
from recipes.utils.training import Flops, Throughput
from recipes.utils.training.micro_batch import read

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {
    "unpacked": {"training.packing": False},
    "packed": {"training.packing": True, "training.max_length": 320, "training.per_device_train_batch_size": 4},
}
EVENTS = ("on_step_begin", "on_step_end", "on_log", "on_epoch_end", "on_train_end")


class Clock:
    """Adds up the seconds spent in what it is put around."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, function):
        def timed(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        return timed


def train_timed(layout: dict, steps: int) -> dict:
    """Train the demo for `steps` steps: the milliseconds of a step, and those of it that the parts took."""
    monitor, ledger, total = Clock(), Clock(), []
    clock_of = {Progress: monitor, Ledger: ledger}

    def put_around(callback, clock: Clock) -> None:
        for event in EVENTS:
            setattr(callback, event, clock.around(getattr(callback, event)))

    class Timed(sft_lora.ResumableTrainer):
        def train(self, **options):
            hooks = self.model._forward_hooks
            for key, hook in list(hooks.items()):
                hooks[key] = monitor.around(hook)
            self._throughput.figures = monitor.around(self._throughput.figures)
            for callback in self.callback_handler.callbacks:
                if type(callback) in clock_of:
                    put_around(callback, clock_of[type(callback)])
            result = super().train(**options)
            total.append(result.metrics["train_runtime"])
            return result

        def add_callback(self, callback):
            put_around(callback, monitor)  # the trainer's own, while it trains
            super().add_callback(callback)

    def observe(model, see):
        handle = stock[1](model, see)
        model._forward_hooks[handle.id] = ledger.around(model._forward_hooks[handle.id])
        return handle

    stock = sft_lora.ResumableTrainer, training.observe
    sft_lora.ResumableTrainer, training.observe = Timed, observe
    off = {"training.eval_strategy": "no", "training.save_strategy": "no", "training.load_best_model_at_end": False}
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = {"training.max_steps": steps, "training.logging_steps": 1, "training.output_dir": f"{folder}/run"}
            settings = {**layout, **off, **run, "data.samples": 0}
            sft_lora.train_lora(load_config(ROOT / "configs" / "tiny.yaml", settings, "lora"))
    finally:
        sft_lora.ResumableTrainer, training.observe = stock
    return {
        "ms_a_step": 1000 * total[0] / steps,
        "ms_monitor": 1000 * monitor.seconds / steps,
        "ms_ledger": 1000 * ledger.seconds / steps,
        "monitor_share": monitor.seconds / total[0],
        "ledger_share": ledger.seconds / total[0],
    }


def large_micro_batch(tokens: int = 16384, documents: int = 39, times: int = 50) -> dict:
    """Milliseconds that a micro-batch of a 7B model's size takes to be read, counted, and kept in the ledger."""
    rng = np.random.default_rng(0)
    starts = np.sort(rng.choice(np.arange(1, tokens), documents - 1, replace=False))
    lengths = np.diff([0, *starts, tokens])
    inputs = {
        "input_ids": torch.randint(0, 32768, (1, tokens)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    mask = torch.rand(1, tokens - 1) < 0.55
    outputs = SimpleNamespace(log_probs=-torch.rand(1, tokens - 1) * mask, label_mask=mask)
    throughput = SimpleNamespace(flops=Flops(28_000_000_000, 524_288_000, 1_572_864, None), counts=np.zeros(4))
    ledger, batch, taken = Ledger(Path(), None, on=False), read(inputs, outputs), {}
    for name, work in (
        ("read", lambda: read(inputs, outputs)),
        ("counted", lambda: Throughput.see(throughput, batch)),
        ("kept in the ledger", lambda: ledger.see(batch)),
    ):
        work()
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        taken[name] = 1000 * statistics.median(seconds)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "monitor.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    result = {
        "machine": options.machine,
        "load average before": round(os.getloadavg()[0], 1),
        "date": date.today().isoformat(),
        "steps": options.steps,
        "ms_a_micro_batch_of_16384_tokens": large_micro_batch(),
        **{layout: train_timed(settings, options.steps) for layout, settings in LAYOUTS.items()},
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
