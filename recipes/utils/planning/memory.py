"""Will it fit: the memory of one training step, from the model's own config and the run's settings, without weights.

What is held throughout is counted on the model's shapes. What a step keeps and takes is read off one that is traced
without memory: the model, with two layers and the run's adapter, takes a step on tensors that have a shape and nothing
else (torch's meta device and FakeTensorMode). What autograd keeps for the backward pass is counted by storage; decoder
layers are alike, so each keeps what the second does. No formula knows the architecture, and no GPU is needed.
"""

import copy
import math
import weakref
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from recipes.utils.model import VARLEN, register_varlen

# The tile of logits that TRL's fused head computes at once (trl/kernels/chunked_logprob.py): tokens × vocabulary.
TILE = (4096, 32768)


class Step(NamedTuple):
    """What decides the memory of a step besides the model's shape and its adapter."""

    dtype: str
    attention: str
    rows: int  # a micro-batch, of `length` tokens each
    length: int
    packed: bool
    checkpointing: bool
    input_cast: bool = False  # PEFT's cast of each adapter's input to float32
    double_quantisation: bool = True
    optimizer: str = "adamw_torch_fused"
    on_gpu: bool = True
    processes: int = 1

    @property
    def batch(self) -> tuple[int, int]:
        """Rows and tokens as the model sees them: packed rows reach it as one."""
        return (1, self.rows * self.length) if self.packed else (self.rows, self.length)

    @property
    def masked(self) -> bool:
        """True where sdpa and eager need a mask to keep documents, or padding, apart."""
        return self.packed or self.rows > 1


class Memory(NamedTuple):
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
    """For each of `steps`, all of one dtype, what it takes on a base in that dtype, "lora", and in 4 bit, "qlora"."""
    model = on_meta(model_config, lora, steps[0].dtype)
    head = model.get_output_embeddings()
    (vocabulary, width), head_trains = head.weight.shape, any(p.requires_grad for p in head.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # Q-LoRA holds all linear layers of the base in 4 bit but the head, be it a trained one.
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    linear = [m.weight.numel() for name, m in layers if m not in set(head.modules()) and "lora_" not in name]
    found = []
    for step in steps:
        size, tokens = getattr(torch, step.dtype).itemsize, math.prod(step.batch)
        kept, working = activations(model_config, lora, step)
        # float32, a gradient, AdamW's two moments, and with several processes the gradients that they exchange
        each = 4 + 4 + (2 if "8bit" in step.optimizer else 8) + 4 * (step.processes > 1)
        tile = min(tokens, TILE[0]) * min(vocabulary, TILE[1]) * size
        at_head = tile + tokens * width * (4 + size) + head_trains * vocabulary * width * 4
        base = Memory(frozen * size, trained * each, kept, working, at_head)
        # A 4-bit weight is dequantised for each product; what autograd keeps is the same, since the base is frozen.
        weights = (frozen - sum(linear)) * size + sum(nf4_bytes(count, step.double_quantisation) for count in linear)
        qlora = base._replace(weights=weights, working=working + max(linear) * size)
        found.append({"lora": base, "qlora": qlora})
    return found


def nf4_bytes(count: int, double_quantisation: bool) -> int:
    """Bytes of `count` weights in 4 bit: half a byte each and a float32 scale for every 64; with double quantisation
    one byte for every 64, and a float32 for every 256 of those (arXiv 2305.14314, section 3)."""
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


def trace(model_config, lora: LoraConfig, step: Step) -> tuple[int, int, int]:
    """(bytes kept with two layers, by the second, most on top); the first may keep less: nothing trains before it."""
    # The flash-attn package keeps what torch's own copy of its kernel keeps, and so does sdpa where it needs no mask.
    maskless = step.attention.startswith("flash_") or (step.attention == "sdpa" and not step.masked)
    attention = VARLEN if maskless else step.attention
    model = on_meta(model_config, lora, step.dtype, 2, attention)
    with FakeTensorMode():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # off the meta device
        for parameter in model.parameters():  # gradients are counted with the adapter
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = step.input_cast
            if isinstance(module, torch.nn.Dropout) and step.on_gpu:  # a GPU keeps one byte a value, a CPU four
                module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0] if p else x
        model.train()
        if step.checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        inputs = _inputs(step, attention)
        own = {t.untyped_storage()._cdata for p in model.parameters() for t in (p, p.grad) if t is not None}
        kept, live, after_layer = {}, LiveBytes(own), []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no other takes its place
            return tensor

        def size():
            return sum(storage.nbytes() for storage in kept.values())

        # The head is counted apart: on a GPU it works otherwise than here.
        backbone = model.get_base_model().base_model
        backbone.register_forward_hook(lambda module, args, output: live.pause(output.last_hidden_state))
        for layer in backbone.layers:
            layer.register_forward_hook(lambda *_: after_layer.append(size()))
        autocast = torch.autocast("cpu", getattr(torch, step.dtype), enabled=step.dtype != "float32")
        with live:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                # as in SFTTrainer.compute_loss
                loss = (-model(**inputs, use_cache=False, fused_lm_head=True).log_probs).sum() / torch.empty(())
            total = size()
            kept.clear()
            loss.backward()
    return total, after_layer[1] - after_layer[0], live.peak - total


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors but the `own`, parameters and gradients; `peak`: the most outside the head."""

    def __init__(self, own: set):
        super().__init__()
        self.now, self.peak, self.known, self.paused = 0, 0, set(own), False

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.peak = self.peak if self.paused else max(self.peak, self.now)
        return output

    def free(self, address, size):
        self.known.discard(address)
        self.now -= size

    def pause(self, hidden):
        """No peak is taken from here to where the gradient of `hidden` is known."""
        self.paused = True
        hidden.register_hook(lambda gradient: setattr(self, "paused", False))


def on_meta(model_config, lora: LoraConfig, dtype: str, layers: int | None = None, attention: str = "eager"):
    """The model with its adapter as SFTTrainer would have it, without memory; with `layers` layers if that is given."""
    register_varlen()
    model_config, lora = copy.deepcopy(model_config), copy.deepcopy(lora)
    lora.init_lora_weights = True  # the shapes are the same, and some look at the weights
    if layers:
        model_config.num_hidden_layers, lora.layers_to_transform = layers, None
        if getattr(model_config, "layer_types", None):
            model_config.layer_types = model_config.layer_types[-layers:]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=attention)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _inputs(step: Step, attention: str) -> dict:
    """A micro-batch, with what tells its documents apart, as TRL and transformers hand it on: borders, or a mask."""
    rows, length = step.batch
    names = ["input_ids", "labels"] + ["position_ids"] * step.packed
    inputs = {name: torch.empty(rows, length, dtype=torch.long) for name in names}
    if attention != VARLEN:
        return {**inputs, "attention_mask": torch.empty(rows, 1, length, length, dtype=torch.bool)}
    borders = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.empty(3, dtype=torch.int32))
    return {**inputs, **borders, "max_length_q": length, "max_length_k": length}
