"""Will it fit: the memory of one training step, from the model's own config and the run's settings, without weights.

What is held throughout is counted on the model's shapes; what a step keeps and takes is read off a step of two layers
that is traced without memory. No formula knows the architecture, and no GPU is needed.
"""

import dataclasses
import math

from recipes.utils.memory_trace import Step, on_meta, trace

import torch
from peft import LoraConfig

# The tile of logits that TRL's fused head computes at once (trl/kernels/chunked_logprob.py): tokens × vocabulary.
TILE = (4096, 32768)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step on one device, by part."""

    weights: int
    adapter: int  # with its gradients and the optimizer's state
    activations: int  # kept for the backward pass
    working: int  # the most that a pass through one layer takes on top, recomputation included
    head: int  # the tile of logits, the gradient that leaves the head, and that of a head that is trained

    @property
    def total(self) -> int:
        """The peak: the head is done when the backward pass of the layers begins."""
        return self.weights + self.adapter + self.activations + max(self.working, self.head)


def predict(model_config, lora: LoraConfig, steps: list[Step]) -> list[dict[str, Memory]]:
    """For each of `steps`, which are of one dtype, {"lora": ..., "qlora": ...}: what it takes on a base in that dtype
    and on one in 4 bit."""
    model = on_meta(model_config, lora, steps[0].dtype)
    head = model.get_output_embeddings()
    (vocabulary, width), head_trains = head.weight.shape, any(p.requires_grad for p in head.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    linear = [p.numel() for p in _quantised(model)]
    found = []
    for step in steps:
        size, tokens = getattr(torch, step.dtype).itemsize, math.prod(step.batch)
        kept, working = activations(model_config, lora, step)
        base = Memory(
            weights=frozen * size,
            # float32, a gradient, AdamW's two moments, and with several processes the gradients that they exchange
            adapter=trained * (4 + 4 + (2 if "8bit" in step.optimizer else 8) + 4 * (step.processes > 1)),
            activations=kept,
            working=working,
            head=min(tokens, TILE[0]) * min(vocabulary, TILE[1]) * size
            + tokens * width * (4 + size)
            + head_trains * vocabulary * width * 4,
        )
        # A 4-bit weight is dequantised for each product; what autograd keeps is the same, since the base is frozen.
        in_4_bit = sum(nf4_bytes(count, step.double_quantisation) for count in linear)
        in_4_bit = dataclasses.replace(
            base, weights=(frozen - sum(linear)) * size + in_4_bit, working=working + max(linear) * size
        )
        found.append({"lora": base, "qlora": in_4_bit})
    return found


def nf4_bytes(count: int, double_quantisation: bool) -> int:
    """Bytes of `count` weights in 4 bit: half a byte each and a float32 scale for every 64; with double quantisation one
    byte for every 64, and a float32 for every 256 of those (arXiv 2305.14314, section 3)."""
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + (blocks + 4 * math.ceil(blocks / 256) if double_quantisation else 4 * blocks)


def activations(model_config, lora: LoraConfig, step: Step) -> tuple[int, int]:
    """(bytes that autograd keeps for the backward pass, the most that forward and backward take on top of them)."""
    two, second, working = trace(model_config, lora, step)
    layers = model_config.num_hidden_layers
    kept = two + (layers - 2) * second
    if step.on_gpu and step.attention == "sdpa" and step.masked:
        # On a GPU, sdpa makes numbers of the mask's booleans in every layer anew.
        mask = step.batch[0] * step.batch[1] ** 2 * getattr(torch, step.dtype).itemsize
        kept, working = kept + (0 if step.checkpointing else layers * mask), working + mask
    return kept, working


def _quantised(model):
    """The weights that Q-LoRA holds in 4 bit: those of all linear layers of the base but the head, be it a trained one."""
    head = set(model.get_output_embeddings().modules())
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module not in head and "lora_" not in name
    ]
