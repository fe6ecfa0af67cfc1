"""How fast it trains, and how busy the machine is."""

import time
from typing import NamedTuple

import numpy as np
import psutil
import torch
from transformers import TrainerCallback
from trl.trainer.utils import get_peak_flops

from recipes.utils.console import say
from recipes.utils.training.micro_batch import MicroBatch

# Dense FLOPs a second in 16 bit, summed up in float32: from NVIDIA's data sheets, none measured here. By the name that
# CUDA has for the GPU, whole: a laptop's, and an L40S, are others.
DATA_SHEET = {
    "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA A40": 149.7e12, "NVIDIA L40": 181e12, "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    **dict.fromkeys((f"Tesla V100-SXM2-{size}GB" for size in (16, 32)), 125e12),
    **dict.fromkeys((f"Tesla V100-PCIE-{size}GB" for size in (16, 32)), 112e12),
}  # fmt: skip


def peak_flops(name: str, dtype: str) -> float | None:
    """Dense FLOPs a second of the GPU `name` in `dtype`, by TRL's table or `DATA_SHEET`; None for what is in neither,
    and for a part of a GPU (MIG), which bears the name of the whole."""
    own = DATA_SHEET.get(name) if dtype == "float16" or (dtype == "bfloat16" and "V100" not in name) else None
    return None if "MIG" in name else get_peak_flops(name, dtype) or own


class Throughput(TrainerCallback):
    """Counts the tokens of the micro-batches that it is shown, against the time that went by while training: the clock
    stands still while the run evaluates, answers samples or writes a checkpoint. `dtype` is what the products are
    computed in: "bfloat16", "float16" or "float32"."""

    def __init__(self, accelerator, model, dtype: str):
        self.accelerator, self.model, self.process = accelerator, model, psutil.Process()
        self.flops: Flops | None = None  # counted at the first micro-batch: a model without a head shows none
        self.on_gpu = accelerator.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(), dtype) if self.on_gpu else None
        self.counts = np.zeros(4)  # positions, tokens, trained tokens, FLOPs
        self.seconds = self.mark = self.highest = 0.0
        self.paused, self.left_out, self.nvml = True, False, True

    def see(self, batch: MicroBatch) -> None:
        self.flops = self.flops or count_flops(self.model)
        lengths, trained = np.array([len(ids) for ids in batch.documents]), batch.trained.sum()
        self.counts += (batch.slots, lengths.sum(), trained, self.flops.of(lengths, trained))

    def on_step_begin(self, *event, **kwargs) -> None:
        self.mark, self.paused = time.monotonic() if self.paused else self.mark, False

    def on_step_end(self, *event, **kwargs) -> None:
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def on_evaluate(self, *event, **kwargs) -> None:
        self.paused = True

    on_save = on_evaluate

    def figures(self) -> dict[str, float]:
        """Figures since the last call, of all processes together (each must call it), and of this process's machine;
        where no micro-batch was shown, only the latter, and a line says so once."""
        counts = torch.tensor(self.counts, dtype=torch.float32, device=self.accelerator.device)
        slots, tokens, trained, flops = self.accelerator.reduce(counts, "sum").tolist()
        seconds, self.counts, self.seconds = max(self.seconds, 1e-9), np.zeros(4), 0.0
        if not slots:
            if not self.left_out:
                say("tokens a second and MFU are left out: this loss does not go through TRL's fused LM head")
            self.left_out = True
            return self.machine()
        figures = {"tokens_per_second": tokens / seconds, "trained_tokens_per_second": trained / seconds}
        figures |= {"padding_share": 1 - tokens / slots, "flops_per_second": flops / seconds}
        if self.peak:
            figures["mfu"] = flops / seconds / (self.peak * self.accelerator.num_processes)
        return figures | self.machine()

    def machine(self) -> dict[str, float]:
        """Memory and use of this process's GPU, the use where NVML can be asked (not in some containers, nor on parts
        of a GPU); without a GPU, of the process, its CPU's since the last call."""
        if not self.on_gpu:
            memory, cpu = self.process.memory_info().rss / 1e9, self.process.cpu_percent()
            self.highest = max(self.highest, memory)
            return {"peak_memory_gb": self.highest, "process_memory_gb": memory, "cpu_percent": cpu}
        figures = {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        try:
            if self.nvml:
                figures |= {"gpu_utilization": torch.cuda.utilization(), "gpu_power_w": torch.cuda.power_draw() / 1000,
                            "gpu_temperature_c": torch.cuda.temperature()}  # fmt: skip
        except Exception as error:  # pynvml has an exception of its own for each refusal
            say(f"GPU utilisation, power and temperature are not shown: {error}")
            self.nvml = False
        return figures


class Flops(NamedTuple):
    """FLOPs of training: `token` for each token, `label` more for each one with a label, `pair` more for each pair of a
    token and one that it attends to (half the square of a document's length, less outside of a sliding window)."""

    token: int
    label: int
    pair: int
    window: int | None  # tokens that one attends to at most

    def of(self, lengths: np.ndarray, labels: int) -> float:
        """FLOPs of documents of these `lengths` with `labels` labelled tokens in all."""
        beyond = (lengths - self.window).clip(min=0) if self.window else 0 * lengths
        pairs = ((lengths**2 - beyond**2) / 2).sum()
        return float(self.token * lengths.sum() + self.label * labels + self.pair * pairs)


def count_flops(model) -> Flops:
    """The FLOPs of training `model`, recomputation left out, as MFU is defined (PaLM, arXiv 2204.02311, appendix B).
    A weight of a linear layer takes 2 FLOPs a token forward, 2 for the gradient of its input and, if it is trained, 2
    for its own: 4N + 6r a token for N frozen and r trained ones. The H of the head take 4H (trained: 6H) a labelled
    token, since only those go through TRL's fused head. Attention takes 4 FLOPs a pair, head and dimension forward
    (query by key, weight by value), twice that backward. The first layer's input is counted as if it had a gradient."""
    head, token = model.get_output_embeddings(), 0
    skipped = {id(module) for module in head.modules()}
    for name, module in model.named_modules():
        # original_module: the untrained copy that PEFT keeps of a module that is trained whole
        if isinstance(module, torch.nn.Linear) and id(module) not in skipped and "original_module" not in name:
            each = 6 if module.weight.requires_grad else 4
            token += each * module.in_features * module.out_features  # a 4-bit weight is stored packed
    config = model.config.get_text_config()
    label = (6 if head.weight.requires_grad else 4) * config.hidden_size * config.vocab_size
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 3 * 4 * config.num_attention_heads * size * config.num_hidden_layers
    return Flops(token, label, pair, getattr(config, "sliding_window", None))
