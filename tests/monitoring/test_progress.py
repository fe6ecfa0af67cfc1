"""While it trains: figures that are right, one tidy line, and a count of FLOPs that torch agrees with."""

import io
import json
import re
from types import SimpleNamespace

from recipes.utils.flops import Flops, count_flops
from recipes.utils.micro_batch import MicroBatch, read
from recipes.utils.monitor import Monitor, log_line, progress_line
from recipes.utils.throughput import Throughput

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, read_jsonl
from peft import LoraConfig, get_peft_model
from rich.console import Console
from test_sft import train
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_peak_flops

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES, **more)),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=None, **more)),
}


def with_adapter(model, **options):
    return get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}, task_type="CAUSAL_LM")
    )


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


def test_throughput_is_tokens_by_the_time_spent_training(monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 100.0, 102.0])  # step; step; an evaluation; step
    monkeypatch.setattr("recipes.utils.throughput.time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), model=with_adapter(FAMILIES["qwen2"]()))
    throughput = Throughput(trainer, "bfloat16")
    batch = MicroBatch([np.arange(30), np.arange(20)], np.ones(2), np.array([10, 5]), slots=64)
    for paused in (False, False, True):
        throughput.paused |= paused
        throughput.step_begins()
        throughput.see(batch)
        throughput.step_ends()
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


def test_a_gpu_that_cannot_be_asked_is_told_of_once(capsys):
    """NVML is absent here, as it is in some containers."""
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), model=with_adapter(FAMILIES["qwen2"]()))
    throughput = Throughput(trainer, "bfloat16")
    throughput.on_gpu = True
    assert [throughput.machine() for _ in range(3)] == [{"peak_memory_gb": 0.0}] * 3
    assert capsys.readouterr().out.count("GPU utilisation, power and temperature are not shown") == 1


def test_the_peak_of_a_gpu_is_its_dense_rate():
    assert get_peak_flops("NVIDIA H200", "bfloat16") == 989e12  # NVIDIA's data sheet: 1,979 with sparsity
    assert get_peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert get_peak_flops("NVIDIA H200", "float32") is None


def test_a_runs_metrics_hold_every_figure(config_file):
    training = {"packing": False, "max_steps": -1, "num_train_epochs": 1, "eval_steps": 12, "save_steps": 12}
    folder = train(config_file(training=training))
    logged = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert logged[-1].keys() >= {
        "step", "epoch", "seconds", "loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "num_tokens",
        "tokens_per_second", "trained_tokens_per_second", "padding_share", "flops_per_second", "peak_memory_gb",
        "process_memory_gb", "cpu_percent", "seconds_left",
    }  # fmt: skip
    rows = json.loads((folder / "run.json").read_text())["rows"]["train"]
    shares = [line["trained_tokens_per_second"] / line["tokens_per_second"] for line in logged]
    assert np.mean(shares) == pytest.approx(rows["trained_tokens"] / rows["tokens"], rel=0.05)
    assert 0 < np.mean([line["padding_share"] for line in logged]) < 0.2
    assert all(0.1 < line["process_memory_gb"] <= line["peak_memory_gb"] < 50 for line in logged)
    assert logged[0]["seconds_left"] > logged[-1]["seconds_left"] == 0
    documented = (ROOT / "docs" / "run_folder.md").read_text()
    for line in read_jsonl(folder / "metrics.jsonl"):
        assert not [key for key in line if f"`{key}`" not in documented]


LOGS = {
    "loss": 1.2345, "mean_token_accuracy": 0.981, "learning_rate": 2e-4, "tokens_per_second": 112345.0,
    "trained_tokens_per_second": 61234.0, "padding_share": 0.031, "mfu": 0.412, "peak_memory_gb": 22.14,
    "gpu_utilization": 98, "gpu_power_w": 651.2, "gpu_temperature_c": 61, "seconds_left": 3725.0,
}  # fmt: skip


def test_a_line_says_what_matters_and_leaves_out_what_is_not_known():
    assert log_line(LOGS) == (
        "loss 1.2345  accuracy 98.1%  lr 2.0e-04  112,345 tokens/s, 61,234 trained  padding 3%  MFU 41%  22.1 GB  "
        "GPU 98 %, 651 W  1:02:05 left"
    )
    assert progress_line(LOGS) == "loss 1.2345  accuracy 98.1%  112,345 tokens/s  MFU 41%  1:02:05 left"
    on_a_cpu = {key: value for key, value in LOGS.items() if key != "mfu" and not key.startswith("gpu")}
    assert "MFU" not in log_line(on_a_cpu) + progress_line(on_a_cpu)
    assert "GPU" not in log_line(on_a_cpu)


def test_on_a_terminal_of_80_columns_progress_is_one_line(monkeypatch, tmp_path):
    """The bar is drawn again in its place: no line is wider than the terminal, and none is left behind."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr("recipes.utils.monitor.out", terminal)
    monkeypatch.setattr("recipes.utils.console.out", terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    throughput = SimpleNamespace(machine=dict, step_begins=int, step_ends=int, figures=dict)
    monitor = Monitor(tmp_path, throughput)
    state = SimpleNamespace(global_step=0, max_steps=3000, is_world_process_zero=True, epoch=0)
    monitor.on_train_begin(None, state, None)
    for state.global_step in range(998, 1001):
        monitor.on_log(None, state, None, logs=dict(LOGS))
        monitor.on_step_end(None, state, None)
        monitor.bar.refresh()
    monitor.on_log(None, state, None, logs={"eval_loss": 1.0, "eval_mean_token_accuracy": 0.5})
    monitor.on_train_end(None, state, None)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", terminal.file.getvalue())
    line, bar = (line.strip("\r").split("\r")[-1] for line in shown.strip().split("\n"))
    assert line == "step 1000/3000  validation loss 1.0000  accuracy 50.0%"
    assert re.fullmatch(
        r"1000/3000 ━+ +loss 1.2345  accuracy 98.1%  112,345 tokens/s  MFU 41%  0:00:00 left", bar.strip()
    )
    assert len(bar) <= 80
