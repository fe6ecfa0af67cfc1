"""The fast LoRA layers compute what PEFT's do, and leave to PEFT what they do not know."""

import contextlib

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, Linear4bit
from transformers import BitsAndBytesConfig

from benchmarks import fast_lora
from benchmarks.fast_lora import FastLinear, FastLinear4bit, register_fast_lora
from recipes.utils.model import ModelOptions, load_base, prepare_adapter

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def adapted(method, dtype, device, fast, checkpointing=False, **lora):
    """The tiny base with an adapter that does something, as a recipe trains it."""
    four_bit = None
    if method == "qlora":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = load_base(TINY / "base", ModelOptions(dtype=dtype), "sdpa", four_bit, device == "cpu")
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    config = LoraConfig(**lora)
    if fast:
        register_fast_lora(config)
    model = get_peft_model(base, config).train()
    prepare_adapter(model, ModelOptions())
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.05).to(device)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def step(model, dtype, device):
    """{name: value} of the loss and of the gradient of every trained parameter."""
    ids = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(2)).to(device)
    half = dtype != "float32"
    torch.manual_seed(3)  # dropout's
    with torch.autocast(device, getattr(torch, dtype)) if half else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def apart(one, other):
    """The largest distance of two steps, relative to each tensor's own length."""
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).norm() / other[key].norm()).item() for key in other)


def apart_as_a_whole(one, other):
    """The distance of all gradients taken as one vector, relative to its length."""
    distance, length = (
        sum(value.double().square().sum() for key, value in values.items() if key != "loss")
        for values in ({key: one[key] - other[key] for key in other}, other)
    )
    return (distance / length).sqrt().item()


def fast_layers(model):
    return [module for module in model.modules() if isinstance(module, (FastLinear, FastLinear4bit))]


@pytest.fixture
def taken(monkeypatch):
    """How often the fast way was taken, and how often it was not."""
    counts = {True: 0, False: 0}
    forward = fast_lora.fast_forward

    def counted(layer, x):
        found = forward(layer, x)
        counts[found is not None] += 1
        return found

    monkeypatch.setattr(fast_lora, "fast_forward", counted)
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_pefts(device, method, checkpointing, taken):
    one, other = (
        step(adapted(method, "float32", device, fast, checkpointing), "float32", device) for fast in (True, False)
    )
    assert taken[True] > 0 == taken[False]
    assert len(other) > 10
    assert apart(one, other) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_they_are_as_near_to_float32_as_pefts(device, method, checkpointing, taken):
    exact = step(adapted(method, "float32", device, False), "float32", device)
    one, other = (
        step(adapted(method, "bfloat16", device, fast, checkpointing), "bfloat16", device) for fast in (True, False)
    )
    assert taken[True] > 0 == taken[False]
    assert abs(one["loss"] - other["loss"]) < 2e-3 * other["loss"]
    assert 0 < apart_as_a_whole(one, exact) < 1.25 * apart_as_a_whole(other, exact)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("wrong", ["scale", "input gradient"])
def test_a_mistake_in_the_layers_is_seen(method, wrong, monkeypatch):
    def broken(ctx, gradient):
        if wrong == "scale":
            ctx.scaling = 1.0
        of_x, *others = backward(ctx, gradient)
        return (of_x * 1.001 if wrong == "input gradient" and of_x is not None else of_x, *others)

    right = step(adapted(method, "float32", "cpu", True), "float32", "cpu")
    backward = fast_lora.AddsIntoBase.backward
    monkeypatch.setattr(fast_lora.AddsIntoBase, "backward", staticmethod(broken))
    assert apart(step(adapted(method, "float32", "cpu", True), "float32", "cpu"), right) > 1e-4


def test_autograd_keeps_no_more_than_with_pefts():
    kept = []
    for fast in (True, False):
        model, storages = adapted("lora", "bfloat16", "cpu", fast), {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor, storages=storages, own=own):
            if tensor.untyped_storage()._cdata not in own:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            step(model, "bfloat16", "cpu")
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[0] <= kept[1]


@pytest.mark.parametrize(
    ("lora", "alike"),
    [
        ({"use_dora": True}, 0), ({"lora_dropout": 0.1}, 0), ({"lora_bias": True, "target_modules": ["q_proj"]}, 0),
        ({"bias": "all"}, 1e-5), ({"use_rslora": True}, 1e-5),
    ],
)  # fmt: skip
def test_what_else_an_adapter_can_be_is_pefts_to_the_bit_or_computed_alike(lora, alike, taken):
    one, other = (step(adapted("lora", "float32", "cpu", fast, **lora), "float32", "cpu") for fast in (True, False))
    assert (taken[True] > 0) == (alike > 0)
    assert apart(one, other) <= alike


def test_switched_off_merged_and_several_adapters_are_pefts(taken, tmp_path):
    model = adapted("lora", "float32", "cpu", True).eval()
    ids = torch.arange(20)[None] + 10
    with torch.no_grad():
        with_adapter = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        taken[True] = 0
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        both = model(input_ids=ids).logits  # the second one is new and adds nothing
    assert taken[True] == 0
    assert not torch.allclose(base, with_adapter, atol=1e-3)
    assert torch.allclose(merged, with_adapter, atol=1e-4)
    assert torch.allclose(both, with_adapter, atol=1e-4)


def test_generation_in_bfloat16_outside_of_autocast_is_pefts(taken):
    model = adapted("lora", "bfloat16", "cpu", True).eval()
    assert model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape[1] > 3
    assert taken[True] == 0


@pytest.mark.parametrize(("method", "kind"), [("lora", Linear), ("qlora", Linear4bit)])
def test_names_and_files_are_those_of_pefts_adapters(method, kind, tmp_path):
    """PEFT's hook is private: this is what these layers want of it."""
    model = adapted(method, "float32", "cpu", True)
    plain = adapted(method, "float32", "cpu", False)
    assert len(fast_layers(model)) == sum(type(module) is kind for module in plain.modules()) > 0
    assert fast_layers(plain) == []
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    for name, saved in (("fast", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_an_adapter_that_is_read_can_have_them_too(tmp_path):
    adapted("lora", "float32", "cpu", False).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    register_fast_lora(config)
    base = load_base(TINY / "base", ModelOptions(dtype="float32"), "sdpa", use_cpu=True)
    model = PeftModel.from_pretrained(base, str(tmp_path), config=config, is_trainable=True)
    assert len(fast_layers(model)) == 7 * base.config.num_hidden_layers
