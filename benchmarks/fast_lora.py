"""LoRA layers that move less memory than PEFT's and compute the same.

PEFT multiplies the full-width product of an adapter by its scale, adds it to the base's output in a third tensor, and
in the backward pass lets autograd do all of that again and sum two gradients of the input. On a 7B model that is a
fifth of a step, spent on reading and writing. Here the scale is applied to the narrow output of lora_A, lora_B is one
matrix product that adds into what the base has put out, and the adapter's gradient of the input is added into the
base's the same way. The layers are PEFT's own classes otherwise: names, files, merging and DoRA are as they were.
"""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit as BaseLinear4bit
from peft import LoraConfig
from peft.tuners.lora import Linear, Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable


def register_fast_lora(config: LoraConfig) -> None:
    """Have PEFT build the layers of this module for the linear layers that `config` names. PEFT calls the hook
    experimental; nothing of it is saved with an adapter."""
    config._register_custom_module({nn.Linear: fast_layer})


def fast_layer(target, adapter_name: str, config: LoraConfig, **kwargs):
    """PEFT asks for the adapter's layer around `target`; None leaves it to PEFT."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kinds = {nn.Linear: FastLinear, BaseLinear4bit: FastLinear4bit}  # not their subclasses: 8-bit layers are some
    if type(base) not in kinds or config.fan_in_fan_out:
        return None
    return kinds[type(base)](target, adapter_name, config=config, **kwargs)


class FastLinear(Linear):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        found = None if args or kwargs else fast_forward(self, x)
        return super().forward(x, *args, **kwargs) if found is None else found


class FastLinear4bit(Linear4bit):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        found = None if args or kwargs else fast_forward(self, x)
        return super().forward(x, *args, **kwargs) if found is None else found


def fast_forward(layer, x: torch.Tensor) -> torch.Tensor | None:
    """What `layer` makes of `x`, or None for what PEFT's own forward is for: no adapter or several, merged ones, DoRA
    and its like, dropout, trained base layers, dtypes that have to be brought together, and compilation."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if name not in layer.lora_A or name in layer.lora_variant or layer.disable_adapters or layer.merged:
        return None
    base, a, b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    in_use = layer.training and not isinstance(dropout, nn.Identity)
    if in_use or b.bias is not None or torch.compiler.is_compiling() or any(p.requires_grad for p in base.parameters()):
        return None
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else a.weight.dtype
    if isinstance(base, BaseLinear4bit):
        if x.dtype != dtype or base.compute_dtype not in (None, dtype):
            return None
    elif not autocast and not x.dtype == base.weight.dtype == dtype:
        return None
    return AddsIntoBase.apply(x.to(dtype), a.weight.to(dtype), b.weight.to(dtype), layer.scaling[name], base)


class AddsIntoBase(torch.autograd.Function):
    """base(x) + scaling · x Aᵀ Bᵀ for a frozen `base`; keeps x and the narrow product for the backward pass."""

    @staticmethod
    def forward(ctx, x, a, b, scaling: float, base):
        output = base(x)
        flat = x.reshape(-1, x.shape[-1])
        narrow = (flat @ a.t()).mul_(scaling)
        output.view(-1, output.shape[-1]).addmm_(narrow, b.t())
        ctx.save_for_backward(x, narrow, a if ctx.needs_input_grad[0] else None, b)
        ctx.scaling, ctx.base = scaling, base
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, narrow, a, b = ctx.saved_tensors
        to_x, to_a, to_b = ctx.needs_input_grad[:3]
        flat = gradient.reshape(-1, gradient.shape[-1])
        inner = (flat @ b).mul_(ctx.scaling)
        of_a = inner.t() @ x.reshape(-1, x.shape[-1]) if to_a else None
        of_b = flat.t() @ narrow if to_b else None
        of_x = None
        if to_x:
            weight = ctx.base.weight
            if isinstance(ctx.base, BaseLinear4bit):
                weight = dequantize_4bit(weight.data, weight.quant_state)
            of_x = (flat @ weight.to(flat.dtype)).addmm_(inner, a).view(x.shape)
        return of_x, of_a, of_b, None, None
