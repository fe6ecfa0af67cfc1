"""What watching a run costs: the time spent in the monitor and the ledger, as a share of the time spent training.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --steps 100 --machine "what the result file shall say"

The demo is trained for real, packed and not, logging every step, with a clock around each of the project's hooks and callbacks;
evaluation, samples and checkpoints are off. A model this small is the worst case, since its steps are short. The same code
is timed on a micro-batch of the size that a 7B model takes as well, 16,384 tokens in 39 documents, on the host. The figures
go to benchmarks/results/monitor.json.
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

from recipes import sft_lora
from recipes.utils.config import load_config
from recipes.utils.flops import Flops
from recipes.utils.ledger import Ledger
from recipes.utils.micro_batch import read
from recipes.utils.monitor import Monitor
from recipes.utils.throughput import Throughput

import numpy as np
import torch

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
    clocks, total = {"hook": Clock(), Monitor: Clock(), Ledger: Clock()}, []

    class Timed(sft_lora.SFTTrainer):
        def train(self, **options):
            hooks = self.model._forward_hooks
            for key, hook in list(hooks.items()):
                hooks[key] = clocks["hook"].around(hook)
            for callback in self.callback_handler.callbacks:
                for event in EVENTS if type(callback) in clocks else ():
                    setattr(callback, event, clocks[type(callback)].around(getattr(callback, event)))
            result = super().train(**options)
            total.append(result.metrics["train_runtime"])
            return result

    trainer, see, in_hook = sft_lora.SFTTrainer, Ledger.see, Clock()
    sft_lora.SFTTrainer, Ledger.see = Timed, in_hook.around(see)
    try:
        with tempfile.TemporaryDirectory() as folder:
            off = {
                "training.eval_strategy": "no",
                "training.save_strategy": "no",
                "training.load_best_model_at_end": False,
            }
            run = {"training.max_steps": steps, "training.logging_steps": 1, "training.output_dir": f"{folder}/run"}
            sft_lora.train_lora(
                load_config(ROOT / "configs" / "tiny.yaml", {**layout, **off, **run, "data.samples": 0}, "lora")
            )
    finally:
        sft_lora.SFTTrainer, Ledger.see = trainer, see
    ledger = clocks[Ledger].seconds + in_hook.seconds
    monitor = clocks["hook"].seconds - in_hook.seconds + clocks[Monitor].seconds
    return {
        "ms_a_step": 1000 * total[0] / steps,
        "ms_monitor": 1000 * monitor / steps,
        "ms_ledger": 1000 * ledger / steps,
        "monitor_share": monitor / total[0],
        "ledger_share": ledger / total[0],
    }


def large_micro_batch(tokens: int = 16384, documents: int = 39, times: int = 50) -> dict:
    """Milliseconds that a micro-batch of a 7B model's size takes to be read and counted, and to be kept in the ledger."""
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
    ledger, batch, taken = Ledger(Path(), None), read(inputs, outputs), {}
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
