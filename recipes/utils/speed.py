"""Levers on speed that leave the losses as they are, each a line in the section `model`."""

from recipes.utils.config_keys import ModelOptions

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


def speed_up(model, options: ModelOptions, backend: str = "inductor") -> str:
    """Pull the levers of `options` on a model with its adapter; returns what was done, for the run table.

    `backend` is torch.compile's.
    """
    done = []
    if not options.adapter_input_cast:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._cast_input_dtype = cast_outside_autocast
        done.append("adapter inputs uncast")
    if options.compile_layers:
        for layer in model.get_base_model().base_model.layers:
            layer.compile(backend=backend)  # in place: no name in a checkpoint changes
        done.append("decoder layers compiled, which the first steps pay for")
    return ", ".join(done) or "as the libraries come"


def cast_outside_autocast(x: torch.Tensor | None, dtype: torch.dtype):
    """PEFT casts the input of each adapter to float32, and autocast casts it back: the same values, a copy in the
    memory of every adapter more. Outside of autocast (generation) the cast is needed."""
    if x is None or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)
