"""One training step without memory: what autograd keeps, and how much more the passes take.

The model is built on torch's meta device, gets the adapter that the run would give it and takes a step on tensors that
have a shape and nothing else (torch's FakeTensorMode), with two of its layers. What autograd keeps for the backward pass
is counted storage by storage; decoder layers are alike, so each further one keeps what the second does.
"""

import contextlib
import copy
import dataclasses
import weakref

from recipes.utils.adapter import train_in_float32
from recipes.utils.attention import VARLEN

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head


@dataclasses.dataclass(frozen=True)
class Step:
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


def trace(model_config, lora: LoraConfig, step: Step) -> tuple[int, int, int]:
    """(bytes kept by the model with two layers, those of the second, the most that is taken on top). The first layer may
    keep less than the others: nothing before it is trained."""
    # The flash-attn package keeps what torch's own copy of its kernel keeps, and so does sdpa where it needs no mask.
    maskless = step.attention.startswith("flash_") or (step.attention == "sdpa" and not step.masked)
    attention = VARLEN if maskless else step.attention
    model = on_meta(model_config, lora, step.dtype, 2, attention)
    rows, length = step.batch
    with FakeTensorMode():
        _materialise(model)
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = step.input_cast
            if isinstance(module, torch.nn.Dropout) and step.on_gpu:  # a GPU keeps one byte a value, a CPU four
                module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0] if p else x
        model.train()
        if step.checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        inputs = {
            "input_ids": torch.empty(rows, length, dtype=torch.long),
            "labels": torch.empty(rows, length, dtype=torch.long),
            **_borders(step, attention),
        }
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
        half = step.dtype != "float32"
        autocast = torch.autocast("cpu", getattr(torch, step.dtype)) if half else contextlib.nullcontext()
        with live:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                # as in SFTTrainer.compute_loss
                losses = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs
                loss = losses.sum() / torch.empty(())
            total = size()
            kept.clear()
            loss.backward()
    return total, after_layer[1] - after_layer[0], live.peak - total


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, but for the `own` ones, parameters and their gradients; `peak` is
    the most there were outside the LM head."""

    def __init__(self, own: set):
        super().__init__()
        self.now = self.peak = 0
        self.known, self.paused = set(own), False

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return output

    def add(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
            if not self.paused:
                self.peak = max(self.peak, self.now)

    def free(self, address, size):
        self.known.discard(address)
        self.now -= size

    def pause(self, hidden):
        """No peak is taken from here to where the gradient of `hidden` is known."""
        self.paused = True
        hidden.register_hook(lambda gradient: setattr(self, "paused", False))


def on_meta(model_config, lora: LoraConfig, dtype: str, layers: int | None = None, attention: str = "sdpa"):
    """The model with its adapter as SFTTrainer would have it, without memory; with `layers` layers if that is given."""
    model_config, lora = copy.deepcopy(model_config), copy.deepcopy(lora)
    lora.init_lora_weights = True  # PiSSA and its like look at the weights; the shapes are the same
    if layers:
        model_config.num_hidden_layers, lora.layers_to_transform = layers, None
        if getattr(model_config, "layer_types", None):
            model_config.layer_types = model_config.layer_types[-layers:]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    train_in_float32(model)
    return model


def _materialise(model) -> None:
    """Parameters and buffers of the meta device as tensors of the FakeTensorMode that is on, with a gradient each where
    they are trained: gradients are counted with the adapter."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                made.grad = torch.empty_like(made) if made.requires_grad else None
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _borders(step: Step, attention: str) -> dict:
    """What tells the documents of a micro-batch apart, as TRL's collator and transformers hand it on: positions and the
    documents' borders, or a mask."""
    rows, length = step.batch
    inputs = {"position_ids": torch.empty(rows, length, dtype=torch.long)} if step.packed else {}
    if attention != VARLEN:
        inputs["attention_mask"] = torch.empty(rows, 1, length, length, dtype=torch.bool)
    if attention == VARLEN:
        borders = torch.empty(3, dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length}
    return inputs
