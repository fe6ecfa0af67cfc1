"""The plan before a run: what fits which GPU, flags that can be pasted, speed that was measured or none."""

import json
import shlex

from recipes import plan_run as recipe
from recipes.utils import machine, plan
from recipes.utils.config import load_config
from recipes.utils.config_file import read_flags
from recipes.utils.console import UserError, run

import pytest
import torch
from conftest import ROOT, run_script
from test_memory import PUBLISHED


@pytest.fixture
def mistral(tmp_path):
    """The config of configs/mistral.yaml on a folder that holds the model's config and nothing else."""
    PUBLISHED["Mistral-7B-v0.3"].save_pretrained(tmp_path / "model")
    return [str(ROOT / "configs" / "mistral.yaml"), "--model.name_or_path", str(tmp_path / "model")]


def shown(capsys, *words) -> str:
    recipe.main([*map(str, words)])
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_for_a_gpu_says_what_fits_and_which_flags_to_paste(mistral, capsys):
    text = shown(capsys, *mistral, "--gpu", "RTX 4090")
    assert "weights 14.5 14.5 4.1 4.1" in text
    assert "4 rows, 8,192 tokens 18.8 fits 54.1 no 8.6 fits 43.9 no" in text
    assert "not measured on this GPU (RTX 4090)" in text
    flags = text[text.index("--training") : text.index(" speed")]
    config = load_config(mistral[0], read_flags(shlex.split(flags)), "lora", new_run=False)
    assert config.training["per_device_train_batch_size"] == config.training["gradient_accumulation_steps"] == 4
    assert config.training["gradient_checkpointing"] is True


def test_a_plan_needs_no_data(mistral):
    result = run_script("recipes/plan_run.py", *mistral, "--data.train", "gone.jsonl", "--gpu", "24GB")
    assert result.returncode == 0, result.stderr
    assert "--training.per_device_train_batch_size" in result.stdout


def test_settings_and_size_change_the_plan(mistral, capsys):
    text = shown(capsys, *mistral, "--gpu", "9gb", "--qlora", "--lora.target_modules", "all-linear", "--lora.r", "64")
    assert "adapter, its gradients and optimizer 2.7" in text
    assert "mistral · qlora" in text
    assert "--training.per_device_train_batch_size 1 --training.gradient_accumulation_steps 16" in text
    assert "does not fit" in shown(capsys, *mistral, "--gpu", "8GB")


def test_an_older_gpu_is_planned_with_the_mask_and_the_dtype_that_it_needs(mistral, capsys, tmp_path):
    text = shown(capsys, *mistral, "--gpu", "t4")
    assert "float16, attention sdpa" in text
    assert "--training.gradient_checkpointing true --model.dtype float16" in text
    PUBLISHED["Qwen2-7B"].save_pretrained(tmp_path / "model")
    assert "float32, attention sdpa" in shown(capsys, *mistral, "--gpu", "T4", "--qlora")


def test_where_16_bit_has_no_room_the_flags_are_those_of_4_bit(mistral, capsys):
    text = shown(capsys, *mistral, "--gpu", "12GB")
    assert text.index("mistral · lora does not fit") < text.index("mistral · qlora fits") < text.index("--training")


@pytest.mark.parametrize(
    ("device", "gpu", "same"),
    [
        ("NVIDIA A100-SXM4-80GB", "A10", False),
        ("NVIDIA L40S", "L4", False),
        ("NVIDIA A100-SXM4-40GB", "A100-40", True),
        ("NVIDIA A100-SXM4-80GB", "A100-40", False),
        ("NVIDIA H200", "H200", True),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", True),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", True),
    ],
)
def test_a_measured_speed_is_of_that_gpu_and_of_no_other(device, gpu, same):
    assert plan._is(device, gpu) is same


@pytest.mark.parametrize(("capability", "there"), [((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_that_this_torch_has_no_kernels_for_is_told(monkeypatch, capability, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "compute_120"])
    assert (machine.no_kernels() is None) is there


def test_an_unknown_gpu_is_answered_with_those_that_are_known(mistral, capsys):
    assert run(recipe.main, [*mistral, "--gpu", "RTX 4900"]) == 2
    assert "RTX 4090" in capsys.readouterr().err


def test_without_a_gpu_here_one_must_be_named(mistral, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu 24GB"):
        recipe.main(mistral)


def test_speed_is_what_was_measured_on_that_gpu_for_that_shape(mistral, capsys, tmp_path, monkeypatch):
    measured = {
        "gpu": "a made-up GPU H200", "shape": ["mistral", 4096, 32], "method": "lora", "ours": True, "date": "2000-01-01",
        "checkpointing": False, "variant": "a variant", "useful_tokens_per_second": 1000.0,
    }  # fmt: skip
    runs = [measured, {**measured, "shape": ["qwen2", 3584, 28], "useful_tokens_per_second": 9000.0}]
    (tmp_path / "measured.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(plan, "MEASURED", tmp_path / "measured.json")
    text = shown(capsys, *mistral, "--gpu", "H200")
    assert "1,000 tokens/s (a variant, a made-up GPU H200, 2000-01-01)" in text
    assert "10 million tokens × 3 epochs take 8.3 h" in text
    assert "not measured" in shown(capsys, *mistral, "--gpu", "H100")


def test_the_machine_is_told_line_by_line_and_no_secret_with_it(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    monkeypatch.setenv("HF_TOKEN", "hf_anothersecret")
    monkeypatch.setattr(machine, "_version", lambda name: {"peft": None, "wandb": "0.1"}.get(name, "1.0"))
    text = shown(capsys)
    assert "missing peft pip install -r requirements.txt" in text
    assert "missing trl 1.0, tested with 1.16.0: pip install trl==1.16.0" in text
    assert "ok 4 bit NF4 on cpu" in text
    assert "ok wandb 0.1, logged in" in text
    assert "ok Hugging Face logged in" in text
    assert "secret" not in text


def test_4_bit_arithmetic_is_tried_and_not_only_looked_for(monkeypatch):
    import bitsandbytes

    assert machine.check_four_bit().state == "ok"
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, weight, quant_state: x * 2)
    assert machine.check_four_bit().state == "missing"


def test_a_probe_takes_real_steps(config_file, capsys, tmp_path):
    """On a CPU it tells the process's memory; nothing stays behind but what was there."""
    before = set(tmp_path.iterdir())
    text = shown(capsys, config_file(), "--qlora", "--probe", "--training.max_length", 64)
    assert "3 steps at the longest row" in text
    assert "GB resident" in text
    assert "tokens/s" in text
    assert {path for path in tmp_path.iterdir() if path.name == "run"} <= before
