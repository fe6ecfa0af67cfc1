"""Document-wise attention: the same losses as sdpa with its mask, packed, padded and with a cache."""

import pytest
import torch
from conftest import BASE, read_jsonl, run_recipe
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recipes.utils.model import attention

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def small_model(family, implementation, window=None):
    torch.manual_seed(0)
    if family == "mistral":
        config = MistralConfig(**SMALL, head_dim=8, sliding_window=window)
        return MistralForCausalLM._from_config(config, attn_implementation=implementation)
    config = Qwen2Config(**SMALL, use_sliding_window=bool(window), sliding_window=window, max_window_layers=1)
    return Qwen2ForCausalLM._from_config(config, attn_implementation=implementation)


def packed(*lengths):
    """A row of documents as TRL's collator hands it over."""
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.randint(64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
        "max_length_q": max(lengths), "max_length_k": max(lengths), "use_cache": False,
    }  # fmt: skip


def both(call, family="mistral", window=None):
    """What `call(model)` returns with sdpa and with document-wise attention, on equal weights."""
    return [call(small_model(family, name, window)) for name in ("sdpa", attention.VARLEN)]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_packed_logits_and_gradients_equal_those_of_sdpa(family, window):
    def call(model):
        logits = model(**packed(7, 12, 1, 9)).logits
        logits.square().mean().backward()
        return logits, model.model.layers[0].self_attn.k_proj.weight.grad

    for one, other in zip(*both(call, family, window), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_borders_come_from_positions_where_a_collator_gives_none():
    def call(model):
        batch = packed(6, 10)
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    torch.testing.assert_close(*both(call), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_packed_rows_build_no_mask(monkeypatch, window):
    """Neither with the collator's borders nor without them do they go the way of sdpa."""
    monkeypatch.delattr(attention, "sdpa_mask")
    monkeypatch.delattr(attention, "sdpa_attention_forward")
    batch = packed(6, 10)
    small_model("mistral", attention.VARLEN, window)(**batch)
    small_model("mistral", attention.VARLEN, window)(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    )


def test_a_document_does_not_see_the_one_before_it():
    batch = packed(8, 8)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :8] = 3
    model = small_model("mistral", attention.VARLEN)
    assert torch.equal(model(**batch).logits[:, 8:], model(**other).logits[:, 8:])
    assert not torch.equal(model(**batch).logits[:, :8], model(**other).logits[:, :8])


@pytest.mark.parametrize("window", [None, 5])
def test_padded_rows_equal_those_of_sdpa(window):
    ids, mask = torch.randint(64, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = mask[2, 3:] = 0

    def call(model):
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]

    torch.testing.assert_close(*both(call, window=window), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_generation_with_a_cache_gives_the_tokens_of_sdpa(window):
    ids, mask = torch.randint(1, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0  # padded on the left

    def call(model):
        several = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return several, model.generate(ids[1:], max_new_tokens=8, do_sample=False, pad_token_id=0)

    for one, other in zip(*both(call, window=window), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}],
    ids=["several packed rows", "checkpointing and accumulation"],
)
def test_a_packed_run_has_the_losses_of_sdpa(config_file, settings):
    """Training, evaluation and the adapter that comes out; several packed rows are one row to the kernel."""
    found = []
    for name in ("sdpa", attention.VARLEN):
        path = config_file(name, training={"output_dir": str(config_file().parent / name), **settings})
        assert run_recipe("sft_lora", path, "--model.attn_implementation", name) == 0
        folder = path.parent / name
        found.append((read_jsonl(folder / "metrics.jsonl"), load_file(folder / "adapter_model.safetensors")))
    (lines, adapter), (other_lines, other_adapter) = found
    for line, other in zip(lines, other_lines, strict=True):
        for key in {"loss", "eval_loss"} & set(line):
            assert line[key] == pytest.approx(other[key], abs=1e-4)
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, other_adapter[name], atol=1e-3, rtol=1e-2)


def test_the_kernel_of_this_torch_takes_what_it_is_given():
    """Shapes and gradients alone: without a GPU nothing is computed."""
    with FakeTensorMode():
        query = torch.empty(20, 4, 16, requires_grad=True)
        key, value = (torch.empty(20, 2, 16, requires_grad=True) for _ in range(2))
        borders = torch.empty(3, dtype=torch.int32)
        for window in (None, 5):
            output = attention.varlen_kernel(query, key, value, borders, 12, 0.25, window)
            assert output.shape == query.shape
            output.sum().backward()
            assert key.grad.shape == key.shape


def test_the_kernel_gets_one_dtype_of_16_bit_also_under_a_trained_embedding(monkeypatch):
    """Such an embedding makes queries and keys float32, values stay in 16 bit; autocast does not know the kernel."""
    seen, attend = [], attention.attend_by_document

    def spy(query, key, value, *others):
        seen.append({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value, *others)

    monkeypatch.setattr(attention, "attend_by_document", spy)
    model = small_model("qwen2", attention.VARLEN).to(torch.bfloat16)
    model.model.embed_tokens.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(**packed(7, 12))
    assert seen == [{torch.bfloat16}] * 2


def test_it_is_the_name_that_a_model_keeps():
    """Loaded as a recipe loads it: the name is known to transformers and holds no word that asks for a package."""
    base = AutoModelForCausalLM.from_pretrained(BASE, attn_implementation=attention.VARLEN)
    assert base.config._attn_implementation == attention.VARLEN
    assert "flash" not in attention.VARLEN
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    answer = base.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > 1
