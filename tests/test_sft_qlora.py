"""The Q-LoRA recipe: NF4 weights, float32 adapters, and nothing else that the LoRA recipe has not."""

import difflib

import bitsandbytes
import torch
from conftest import ROOT, read_jsonl
from safetensors.torch import load_file
from test_sft_lora import train

from recipes import sft_qlora


def test_qlora_trains_float32_adapters_on_nf4_layers(config_file, monkeypatch):
    built = []

    class Kept(sft_qlora.ResumableTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    monkeypatch.setattr(sft_qlora, "ResumableTrainer", Kept)
    folder = train(config_file(), "qlora")
    model = built[0].model
    quantised = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 2 * 7
    assert all(module.weight.quant_state.quant_type == "nf4" for module in quantised)
    assert all(module.weight.quant_state.nested for module in quantised)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    losses = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]


def test_the_two_recipes_differ_by_the_recorded_lines_alone():
    """A fix in one recipe that is forgotten in the other fails here. To record a wanted difference:
    `diff -U1 recipes/sft_lora.py recipes/sft_qlora.py | tail -n +3 > tests/what_qlora_adds.diff`."""
    lora, qlora = ((ROOT / "recipes" / f"sft_{method}.py").read_text().splitlines() for method in ("lora", "qlora"))
    found = [
        line
        for line in difflib.unified_diff(lora, qlora, lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    recorded = (ROOT / "tests" / "what_qlora_adds.diff").read_text().splitlines()
    assert found == [line for line in recorded if line[0] in "+-"]
