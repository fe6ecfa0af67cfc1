"""The base as a Q-LoRA adapter saw it: each weight through NF4 and back, one at a time."""

from recipes.utils.config import ModelOptions
from recipes.utils.model import load_model_config

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

PIECE = 1 << 22  # elements at a time: quantising takes several float32 copies of what it is given
BLOCK = 64  # elements that share a constant: what bitsandbytes.nn.Linear4bit takes


class RoundTrip:
    """Which weights of a run's base were in 4 bit (`names`), and what that made of them (`apply`)."""

    def __init__(self, record: dict):
        """`record` is the run.json of a Q-LoRA run."""
        options = ModelOptions(**record["model"])
        self.config, self.dtype = BitsAndBytesConfig(**record["quantization"]), getattr(torch, options.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_model_config(options))
        # transformers decides which layers stay as they are (the head, and what the config skips), so it is asked
        AutoHfQuantizer.from_config(self.config).preprocess_model(model=model, dtype=self.dtype, device_map={"": "cpu"})
        self.names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` quantised and dequantised, in the precision that the run held the base in; may be done in its place.

        Equal to dequantising the whole weight of the live model. The blocks are independent of each other, so they are
        quantised piece by piece; the constants, if they are quantised too, all together.
        """
        kind, flat = self.config.bnb_4bit_quant_type, weight.reshape(-1).to(self.dtype)
        packed, constants = [], []
        for start in range(0, len(flat), PIECE):
            codes, state = functional.quantize_4bit(flat[start : start + PIECE], blocksize=BLOCK, quant_type=kind)
            packed.append(codes)
            constants.append(state.absmax)
        constants = torch.cat(constants)
        if self.config.bnb_4bit_use_double_quant:
            mean = constants.mean()
            constants = functional.dequantize_blockwise(*functional.quantize_blockwise(constants - mean, blocksize=256))
            constants = (constants + mean).float()
        for start, codes in zip(range(0, len(flat), PIECE), packed, strict=True):
            piece = flat[start : start + PIECE]
            part = constants[start // BLOCK : -(-(start + len(piece)) // BLOCK)].contiguous()
            piece.copy_(self._restore(codes, part, piece.shape, kind).view(-1))  # in place: one copy is enough
        return flat.view(weight.shape)

    def _restore(self, codes: torch.Tensor, constants: torch.Tensor, shape, kind: str) -> torch.Tensor:
        state = functional.QuantState(
            absmax=constants,
            shape=shape,
            dtype=self.dtype,
            blocksize=BLOCK,
            code=functional.get_4bit_type(kind, device=codes.device),
            quant_type=kind,
        )
        return functional.dequantize_4bit(codes, state)
