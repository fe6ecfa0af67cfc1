"""How fast it trains, and how busy the machine is."""

import time

from recipes.utils.console import say
from recipes.utils.flops import count_flops
from recipes.utils.micro_batch import MicroBatch

import numpy as np
import psutil
import torch
from trl.trainer.utils import get_peak_flops


class Throughput:
    """Counts the tokens of the micro-batches that it is shown, against the time that went by while training.

    The clock stands still while the run evaluates, answers samples or writes a checkpoint.
    """

    def __init__(self, trainer, dtype: str):
        self.accelerator, self.flops = trainer.accelerator, count_flops(trainer.model)
        self.on_gpu = trainer.accelerator.device.type == "cuda"
        # TRL's table of dense rates, from the makers' data sheets; None for a GPU that is not in it, and for float32. A
        # part of a GPU (MIG) bears the name of the whole.
        name = torch.cuda.get_device_name() if self.on_gpu else None
        self.peak = get_peak_flops(name, dtype) if name and "MIG" not in name else None
        self.counts = np.zeros(4)  # positions, tokens, trained tokens, FLOPs
        self.seconds = self.mark = self.highest = 0.0
        self.paused = True
        self.process = psutil.Process()

    def see(self, batch: MicroBatch) -> None:
        lengths, trained = np.array([len(ids) for ids in batch.documents]), batch.trained.sum()
        self.counts += (batch.slots, lengths.sum(), trained, self.flops.of(lengths, trained))

    def step_begins(self) -> None:
        if self.paused:
            self.paused, self.mark = False, time.monotonic()

    def step_ends(self) -> None:
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def figures(self) -> dict:
        """Figures since the last call, of all processes together; those of the machine are this process's own.

        Every process must call it: they add up their counts.
        """
        counts = torch.tensor(self.counts, dtype=torch.float32, device=self.accelerator.device)
        slots, tokens, trained, flops = self.accelerator.reduce(counts, "sum").tolist()
        seconds, self.counts, self.seconds = max(self.seconds, 1e-9), np.zeros(4), 0.0
        figures = {
            "tokens_per_second": tokens / seconds,
            "trained_tokens_per_second": trained / seconds,
            "padding_share": 1 - tokens / slots,
            "flops_per_second": flops / seconds,
        }
        if self.peak:
            figures["mfu"] = flops / seconds / (self.peak * self.accelerator.num_processes)
        return figures | self.machine()

    def machine(self) -> dict:
        """Memory and use of this process's GPU, or of the process where there is none."""
        if not self.on_gpu:
            memory = self.process.memory_info().rss / 1e9
            self.highest = max(self.highest, memory)
            return {
                "peak_memory_gb": self.highest,
                "process_memory_gb": memory,
                "cpu_percent": self.process.cpu_percent(),
            }
        return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9, **self._gpu()}

    def _gpu(self) -> dict:
        """What NVML says of the GPU; nothing where it cannot be asked (in some containers, on parts of a GPU)."""
        try:
            return {
                "gpu_utilization": torch.cuda.utilization(),
                "gpu_power_w": torch.cuda.power_draw() / 1000,
                "gpu_temperature_c": torch.cuda.temperature(),
            }
        except Exception as error:  # pynvml has an exception of its own for each refusal
            say(f"GPU utilisation, power and temperature are not shown: {error}")
            self._gpu = dict
            return {}
