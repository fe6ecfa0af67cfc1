"""Figures that are right: micro-batches document by document, tokens by time spent training, FLOPs as torch counts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_peak_flops

from recipes.utils.training import Flops, MicroBatch, Throughput, count_flops, observe
from recipes.utils.training.micro_batch import read
from recipes.utils.training.throughput import peak_flops

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES, **more)),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=None, **more)),
}


def with_adapter(model, **options):
    settings = {"r": 4, "target_modules": "all-linear", **options}
    return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family, lora):
    base = FAMILIES[family](attn_implementation="eager")
    base.enable_input_require_grads()  # the gradient of the first layer's input, which the formula counts
    model = with_adapter(base, **lora)
    ids = torch.randint(0, 512, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = count_flops(model)
    whole_squares = flops.pair * 2 * 48**2 / 2  # eager attention computes what the causal mask hides too
    assert flops.of(np.array([48, 48]), 96) + whole_squares == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_a_base_in_4_bit_is_as_much_arithmetic(tmp_path):
    whole = FAMILIES["mistral"]()
    whole.save_pretrained(tmp_path)
    quantised = MistralForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    assert count_flops(with_adapter(quantised)) == count_flops(with_adapter(whole))


def test_a_sliding_window_hides_what_is_outside_of_it():
    lengths = np.array([10, 6])
    pairs = sum(min(place + 0.5, 8) for length in lengths for place in range(length))
    assert Flops(0, 0, 1, window=8).of(lengths, 0) == pytest.approx(pairs, abs=0.5)
    assert Flops(0, 0, 1, window=None).of(lengths, 0) == (100 + 36) / 2


DOCUMENTS = [([5, 6, 7, 8], [-100, -100, 7, 8]), ([9, 10, 11], [-100, 10, 11]), ([12, 13], [-100, 13])]


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_micro_batch_is_read_document_by_document(padding_free):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    inputs = collate([{"input_ids": ids, "labels": labels} for ids, labels in DOCUMENTS])
    labels = inputs["labels"][:, 1:]
    outputs = SimpleNamespace(log_probs=-labels.clamp(min=0).float(), label_mask=labels != -100)
    batch = read(inputs, outputs)
    assert [document.tolist() for document in batch.documents] == [ids for ids, _ in DOCUMENTS]
    assert batch.nll.tolist() == [15, 21, 13]
    assert batch.trained.tolist() == [2, 2, 1]
    assert batch.slots == (9 if padding_free else 12)


def test_an_observer_sees_training_through_the_fused_head_alone_until_it_is_removed():
    class Model(torch.nn.Module):
        def forward(self, input_ids, labels=None, fused_lm_head=False):
            return SimpleNamespace(log_probs=torch.full((1, 3), -1.0), label_mask=torch.ones(1, 3, dtype=bool))

    model, seen = Model(), []
    handle = observe(model, seen.append)
    ids = torch.tensor([[1, 2, 3, 4]])
    for training, fused in ((True, True), (True, False), (False, True)):
        model.train(training)(input_ids=ids, fused_lm_head=fused)
    assert [(batch.documents[0].tolist(), batch.nll.tolist()) for batch in seen] == [([1, 2, 3, 4], [3.0])]
    handle.remove()
    model.train()(input_ids=ids, fused_lm_head=True)
    assert len(seen) == 1


@pytest.fixture
def throughput():
    return Throughput(Accelerator(cpu=True), with_adapter(FAMILIES["qwen2"]()), "bfloat16")


def test_throughput_is_tokens_by_the_time_spent_training(throughput, monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 100.0, 102.0])  # step; step; an evaluation; step
    monkeypatch.setattr("recipes.utils.training.throughput.time", SimpleNamespace(monotonic=lambda: next(clock)))
    batch = MicroBatch([np.arange(30), np.arange(20)], np.ones(2), np.array([10, 5]), slots=64)
    for pause in (False, False, True):
        if pause:
            throughput.on_evaluate()
        throughput.on_step_begin()
        throughput.see(batch)
        throughput.on_step_end()
    figures = throughput.figures()
    assert figures["tokens_per_second"] == 150 / 6
    assert figures["trained_tokens_per_second"] == 45 / 6
    assert figures["padding_share"] == pytest.approx(1 - 50 / 64)
    assert figures["flops_per_second"] == pytest.approx(3 * throughput.flops.of(np.array([30, 20]), 15) / 6, rel=1e-6)
    assert "mfu" not in figures  # a CPU's peak is not known
    throughput.peak = figures["flops_per_second"] * 4
    throughput.see(batch)
    throughput.seconds = 2.0
    assert throughput.figures()["mfu"] == pytest.approx(0.25, rel=1e-6)


def test_without_a_fused_head_the_machine_alone_is_shown_and_a_line_says_so_once(throughput, capsys):
    assert [set(throughput.figures()) for _ in range(2)] == [{"peak_memory_gb", "process_memory_gb", "cpu_percent"}] * 2
    assert capsys.readouterr().out.count("tokens a second and MFU are left out") == 1


def test_a_gpu_that_cannot_be_asked_is_told_of_once(throughput, capsys):
    """NVML is absent here, as it is in some containers."""
    throughput.on_gpu = True
    assert [throughput.machine() for _ in range(3)] == [{"peak_memory_gb": 0.0}] * 3
    assert capsys.readouterr().out.count("GPU utilisation, power and temperature are not shown") == 1


def test_the_peak_of_a_gpu_is_its_dense_rate():
    assert get_peak_flops("NVIDIA H200", "bfloat16") == 989e12  # NVIDIA's data sheet: 1,979 with sparsity
    assert get_peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert get_peak_flops("NVIDIA H200", "float32") is None


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12), ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("NVIDIA GeForce RTX 4090", "float16", 165.2e12), ("NVIDIA GeForce RTX 4090", "float32", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None), ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("NVIDIA L40", "bfloat16", 181e12), ("NVIDIA L40S", "bfloat16", 362e12), ("NVIDIA A40", "float16", 149.7e12),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2e12), ("Quadro RTX 6000", "float16", None),
        ("Tesla V100-SXM2-32GB", "float16", 125e12), ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("Tesla V100-PCIE-16GB", "float16", 112e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
    ],
)  # fmt: skip
def test_a_gpu_that_trl_does_not_know_has_the_rate_of_its_data_sheet_and_of_no_other(name, dtype, peak):
    assert peak_flops(name, dtype) == peak
