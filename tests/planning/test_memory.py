"""The memory model against the real thing: what autograd keeps in a step of SFTTrainer, byte for byte."""

import copy

import bitsandbytes
import pytest
import torch
from conftest import BASE
from datasets import Dataset
from peft import LoraConfig
from published_models import PUBLISHED
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, MistralConfig, Qwen2Config
from trl import SFTConfig, SFTTrainer

from recipes.utils.model import ModelOptions, fast_lora
from recipes.utils.planning.memory import LiveBytes, Step, activations, nf4_bytes, on_meta, predict, trace

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {"mistral": MistralConfig(**SMALL, head_dim=16, sliding_window=None), "qwen2": Qwen2Config(**SMALL)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small bases of both families, saved in float32."""
    folders = {}
    for family, config in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
    return folders


def kept_in_a_step(folder, method, lora, dtype, packing, checkpointing, input_cast, output):
    """(bytes that autograd keeps in the first micro-batch of a real trainer, its shape, the model)."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", device_map={"": "cpu"},
        quantization_config=quantization if method == "qlora" else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 500, (length,), generator=generator).tolist() for length in (40, 24, 64, 50, 14, 64)]
    args = SFTConfig(
        output_dir=output, max_steps=1, max_length=64, packing=packing, per_device_train_batch_size=2, use_cpu=True,
        bf16=dtype == "bfloat16", gradient_checkpointing=checkpointing, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, peft_config=lora, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )  # fmt: skip
    for module in trainer.model.modules():
        if method == "qlora" and getattr(module, "weight", None) is not None and module.weight.requires_grad:
            module.weight.data = module.weight.data.float()  # as sft_qlora.py does
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = input_cast
    found = {}
    compute_loss = trainer.compute_loss

    def counted(model, inputs, **kwargs):
        kept, own = {}, {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = compute_loss(model, inputs, **kwargs)
        found.update(bytes=sum(s.nbytes() for s in kept.values()), shape=tuple(inputs["input_ids"].shape))
        return loss

    trainer.compute_loss = counted
    trainer.train()
    return found["bytes"], found["shape"], trainer.model


CASES = [
    # family, method, dtype, packing, checkpointing, dropout, input cast
    ("mistral", "lora", "float32", True, False, 0.0, False),
    ("mistral", "lora", "bfloat16", True, False, 0.0, False),
    ("mistral", "lora", "bfloat16", True, False, 0.1, True),
    ("mistral", "lora", "bfloat16", True, True, 0.1, False),
    ("mistral", "qlora", "bfloat16", True, False, 0.0, False),
    ("mistral", "qlora", "float32", False, True, 0.1, False),
    ("qwen2", "lora", "bfloat16", True, False, 0.0, True),
    ("qwen2", "lora", "float32", False, False, 0.1, False),
    ("qwen2", "lora", "float32", True, True, 0.0, False),
    ("qwen2", "qlora", "bfloat16", True, False, 0.1, False),
    ("qwen2", "qlora", "bfloat16", True, True, 0.0, False),
]


@pytest.mark.parametrize(("family", "method", "dtype", "packing", "checkpointing", "dropout", "cast"), CASES)
def test_activations_are_those_of_a_real_step(
    bases, tmp_path, family, method, dtype, packing, checkpointing, dropout, cast
):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    fast_lora(lora, ModelOptions(fast_lora=not cast))  # PEFT's own layers cast
    real, (rows, length), _ = kept_in_a_step(
        bases[family], method, lora, dtype, packing, checkpointing, cast, str(tmp_path)
    )
    step = Step(dtype, "sdpa", rows, length, packing, checkpointing, input_cast=cast, on_gpu=False)
    assert activations(FAMILIES[family], lora, step)[0] == real


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_weights_take_what_bitsandbytes_holds(bases, family):
    model = AutoModelForCausalLM.from_pretrained(
        bases[family], device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            held = module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
            assert nf4_bytes(module.in_features * module.out_features, True) == held


STEP = Step("bfloat16", "varlen", 1, 128, True, True)
ALL_LINEAR = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
# GB, worked out by hand: weights; activations kept and recomputed; 16 bytes a float32 adapter parameter
BY_HAND = [
    # tokens, checkpointing, method, GB
    (4096, True, "lora", 17.7), (8192, True, "lora", 20.0), (16384, True, "lora", 24.5),
    (4096, True, "qlora", 7.1), (8192, True, "qlora", 9.4), (16384, True, "qlora", 13.9),
    (4096, False, "lora", 40), (8192, False, "lora", 65), (16384, False, "lora", 115),
]  # fmt: skip


def test_mistral_7b_is_within_a_tenth_of_the_figures_by_hand():
    steps = [
        Step("bfloat16", "varlen", tokens // 2048, 2048, True, checkpointing) for tokens, checkpointing, _, _ in BY_HAND
    ]
    found = predict(PUBLISHED["Mistral-7B-v0.3"], ALL_LINEAR, steps)
    for memory_of, (_, _, method, gigabytes) in zip(found, BY_HAND, strict=True):
        assert memory_of[method].total / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize(("name", "whole", "in_4_bit"), [("Mistral-7B-v0.3", 14.5, 4.1), ("Qwen2-7B", 15.2, 5.6)])
def test_weights_of_the_published_models(name, whole, in_4_bit):
    [found] = predict(PUBLISHED[name], ALL_LINEAR, [STEP])
    assert found["lora"].weights / 1e9 == pytest.approx(whole, rel=0.01)
    assert found["qlora"].weights / 1e9 == pytest.approx(in_4_bit, rel=0.02)


def test_a_trained_head_is_counted_in_16_bit_and_its_copy_in_float32():
    config = PUBLISHED["Qwen2-7B"]
    plain, trained = (
        predict(
            config, LoraConfig(r=16, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM"), [STEP]
        )[0]
        for modules in (None, ["lm_head"])
    )
    head = 152064 * 3584
    for method in ("lora", "qlora"):
        assert trained[method].weights == plain[method].weights
        assert trained[method].adapter - plain[method].adapter == 16 * head
        assert trained[method].head - plain[method].head == 4 * head


def test_several_processes_hold_the_gradients_that_they_exchange():
    lora = LoraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    one, two = predict(PUBLISHED["Qwen2-7B"], lora, [STEP, STEP._replace(processes=2)])
    trained = 28 * 16 * (3584 + 3584)
    assert two["lora"].adapter - one["lora"].adapter == 4 * trained


def test_a_mask_of_packed_rows_costs_the_square_of_their_tokens():
    kept = {
        name: activations(PUBLISHED["Qwen2-7B"], ALL_LINEAR, Step("bfloat16", name, 4, 2048, True, False))[0]
        for name in ("varlen", "sdpa", "flash_attention_2")
    }
    assert kept["varlen"] == kept["flash_attention_2"]
    assert kept["sdpa"] - kept["varlen"] > 28 * 8192**2 * 2


def test_a_gpu_keeps_one_byte_for_each_dropped_value():
    dropout = LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    config, step = PUBLISHED["Mistral-7B-v0.3"], Step("bfloat16", "varlen", 1, 4096, True, False, input_cast=True)
    each = [trace(config, lora, step)[1] / 4096 for lora in (ALL_LINEAR, dropout)]
    inputs = 6 * 4096 + 14336  # of the adapters of a layer
    assert each[1] - each[0] == inputs


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_a_real_step(bases, checkpointing, fast):
    """Forward and backward of real tensors, the LM head left out in both."""
    config, tokens = FAMILIES["mistral"], 512
    lora = fast_lora(copy.deepcopy(ALL_LINEAR), ModelOptions(fast_lora=fast))
    model = on_meta(config, lora, "float32", attention="sdpa").to_empty(device="cpu").train()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for buffer in model.buffers():
        buffer.zero_()
    own = {t.untyped_storage()._cdata for p in model.parameters() for t in (p, p.grad) if t is not None}
    live = LiveBytes(own)
    backbone = model.get_base_model().base_model
    backbone.register_forward_hook(lambda module, args, output: live.pause(output.last_hidden_state))
    ids = torch.randint(512, (1, tokens))
    with live:
        model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss.backward()
    step = Step("float32", "sdpa", 1, tokens, False, checkpointing, on_gpu=False)
    assert sum(activations(config, lora, step)) == pytest.approx(live.peak, rel=0.02)
