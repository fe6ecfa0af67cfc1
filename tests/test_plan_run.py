"""The plan before a run: what fits which GPU, flags that can be pasted, speed that was measured or none."""

import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import BASE, ROOT, TINY, run_recipe
from forks import fork_script
from published_models import PUBLISHED

from recipes.utils.config import load_config
from recipes.utils.console import read_flags
from recipes.utils.planning import fit

# One size of micro-batch is predicted in a quarter of the time of four, where it does not matter which.
ONE_ROW = ["--training.per_device_train_batch_size", "1", "--training.gradient_accumulation_steps", "1"]


@pytest.fixture
def mistral(tmp_path):
    """The config of configs/mistral.yaml on a folder that holds the model's config and nothing else."""
    PUBLISHED["Mistral-7B-v0.3"].save_pretrained(tmp_path / "model")
    return [str(ROOT / "configs" / "mistral.yaml"), "--model.name_or_path", str(tmp_path / "model")]


def shown(capsys, *words) -> str:
    assert run_recipe("plan_run", *words) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_for_a_gpu_says_what_fits_and_which_flags_to_paste(mistral, capsys):
    text = shown(capsys, *mistral, "--gpu", "RTX 4090")
    assert "weights 14.5 14.5 4.1 4.1" in text
    assert "4 rows, 8,192 tokens 18.8 fits 54.1 no 8.6 fits 43.9 no" in text
    assert "not measured on this GPU (RTX 4090)" in text
    flags = text[text.index("--training") : text.index(" speed")]
    config = load_config(mistral[0], read_flags(shlex.split(flags)), "lora")
    assert config.training["per_device_train_batch_size"] == config.training["gradient_accumulation_steps"] == 4
    assert config.training["gradient_checkpointing"] is True


def test_a_plan_needs_no_data(mistral):
    words = [*mistral, *ONE_ROW, "--data.train", "gone.jsonl", "--gpu", "24GB"]
    result = fork_script("recipes/plan_run.py", *words, folder=ROOT)
    assert result.returncode == 0, result.stderr
    assert "--training.per_device_train_batch_size" in result.stdout


def test_settings_and_size_change_the_plan(mistral, capsys):
    text = shown(capsys, *mistral, "--gpu", "9gb", "--qlora", "--lora.target_modules", "all-linear", "--lora.r", "64")
    assert "adapter, its gradients and optimizer 2.7" in text
    assert "mistral · qlora" in text
    assert "--training.per_device_train_batch_size 1 --training.gradient_accumulation_steps 16" in text
    assert "does not fit" in shown(capsys, *mistral, *ONE_ROW, "--gpu", "8GB")


def test_an_older_gpu_is_planned_with_the_mask_and_the_dtype_that_it_needs(mistral, capsys, tmp_path):
    text = shown(capsys, *mistral, "--gpu", "t4")
    assert "float16, attention sdpa" in text
    assert "--training.gradient_checkpointing true --model.dtype float16" in text
    PUBLISHED["Qwen2-7B"].save_pretrained(tmp_path / "model")
    assert "float32, attention sdpa" in shown(capsys, *mistral, *ONE_ROW, "--gpu", "T4", "--qlora")


def test_where_16_bit_has_no_room_the_flags_are_those_of_4_bit(mistral, capsys):
    text = shown(capsys, *mistral, "--gpu", "12GB")
    assert text.index("mistral · lora does not fit") < text.index("mistral · qlora fits") < text.index("--training")


def test_an_unknown_gpu_is_answered_with_those_that_are_known(mistral, capsys):
    assert run_recipe("plan_run", *mistral, "--gpu", "RTX 4900") == 2
    assert "RTX 4090" in capsys.readouterr().err


def test_without_a_gpu_here_one_must_be_named(mistral, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_recipe("plan_run", *mistral) == 2
    assert "--gpu 24GB" in capsys.readouterr().err


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MEASURED = {
    "gpu": "a made-up GPU H200", "shape": ["mistral", 4096, 32], "method": "lora", "ours": True, "date": "2000-01-01",
    "checkpointing": False, "variant": "a variant", "useful_tokens_per_second": 1000.0, "targets": ATTENTION,
    "settings": {"packing": True, "method": "lora", "targets": "qkvo", "attention": "varlen", "cast": False,
                 "fast_lora": True},
}  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that writes what was measured: a run for each dict of differences from `MEASURED`."""

    def write(*others: dict) -> None:
        runs = [{**MEASURED, **other, "settings": {**MEASURED["settings"], **other}} for other in others]
        (tmp_path / "measured.json").write_text(json.dumps({"runs": runs}))
        monkeypatch.setattr(fit, "MEASURED", tmp_path / "measured.json")

    return write


FASTER = {"useful_tokens_per_second": 9000.0}


OTHERS = [
    {"shape": ["qwen2", 3584, 28]},
    {"gpu": "NVIDIA A100-SXM4-80GB"},
    {"ours": False},
    {"method": "qlora"},
    {"checkpointing": True},
    {"packing": False},
    {"compile": True},
    {"liger": True},
    {"fast_lora": False},
    {"cast": True},
    {"attention": "sdpa"},
    {"targets": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
]


def test_speed_is_the_fastest_measured_for_that_shape_gpu_and_settings(mistral, capsys, measured):
    faster = [{"useful_tokens_per_second": 9000.0 + number, **other} for number, other in enumerate(OTHERS)]
    measured({}, {"useful_tokens_per_second": 900.0}, *faster)
    text = shown(capsys, *mistral, *ONE_ROW, "--gpu", "H200")
    assert "1,000 tokens/s (a variant, a made-up GPU H200, 2000-01-01)" in text
    assert "10 million tokens × 3 epochs take 8.3 h" in text
    assert "not measured on this GPU (H100)" in shown(capsys, *mistral, *ONE_ROW, "--gpu", "H100")


def test_where_others_alone_were_measured_the_nearest_is_named_with_what_is_other(mistral, capsys, measured):
    every = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    near, far = {"targets": every, "liger": True}, {"targets": every, "liger": True, "compile": True}
    measured(near, {**FASTER, **far}, {**FASTER, "method": "qlora"})
    text = shown(capsys, *mistral, *ONE_ROW, "--gpu", "H200")
    assert "not measured with this run's targets, liger; nearest: 1,000 tokens/s (a variant, a made-up GPU" in text
    assert "million" not in text
    text = shown(capsys, *mistral, *ONE_ROW, "--gpu", "H200", "--lora.target_modules", "all-linear")
    assert "not measured with this run's liger; nearest" in text


def test_ligers_kernels_are_said_to_be_unknown_to_the_prediction(mistral, capsys):
    said = "Liger's kernels are not known to what follows"
    assert said in shown(capsys, *mistral, *ONE_ROW, "--gpu", "H100", "--training.use_liger_kernel", "true")
    assert said not in shown(capsys, *mistral, *ONE_ROW, "--gpu", "H100")


def test_the_speeds_that_are_recorded_can_be_quoted(mistral, capsys):
    """By the file in the repository: as measured, the nearest, and none for a size, which several GPUs have."""
    text = shown(capsys, *mistral, *ONE_ROW, "--gpu", "H100", "--lora.target_modules", "all-linear")
    assert "tokens/s (packed, no checkpointing, fast LoRA, NVIDIA H100 80GB HBM3, " in text
    assert "million tokens" in text
    assert "not measured with this run's targets; nearest: " in shown(capsys, *mistral, *ONE_ROW, "--gpu", "H100")
    text = shown(
        capsys,
        *mistral,
        *ONE_ROW,
        "--gpu",
        "H100",
        "--lora.target_modules",
        "all-linear",
        "--model.attn_implementation",
        "sdpa",
    )
    assert "not measured with this run's attention" in text
    assert "not measured on this GPU (80GB)" in shown(capsys, *mistral, *ONE_ROW, "--gpu", "80GB")


def test_a_model_that_cannot_be_predicted_is_told_in_a_line(mistral, capsys):
    text = shown(capsys, *mistral, *ONE_ROW, "--gpu", "24GB", "--lora.target_modules", "[layers.30.self_attn.q_proj]")
    assert text.startswith("memory: not predicted for this model: ")


def test_nothing_is_predicted_where_weights_are_sharded(mistral, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert shown(capsys, *mistral, *ONE_ROW, "--gpu", "24GB") == "memory: not predicted under FSDP"


def test_flags_without_a_config_are_a_slip():
    for words in (["--gpu", "24GB"], ["--qlora"], ["--lora.r", "4"]):
        with pytest.raises(SystemExit) as ended:
            run_recipe("plan_run", *words)
        assert ended.value.code == 2


def test_hours_and_cost_of_a_run_a_curve_and_a_sweep_where_the_speed_is_known(mistral, capsys, measured, tmp_path):
    """The tokens are those that the run would train on; the speed is measured, or the user's own."""
    measured({})
    _tokenizer_of_the_tiny_base(tmp_path)
    data = ["--data.train", str(TINY / "train.jsonl"), "--data.validation", "0.1"]
    text = shown(capsys, *mistral, *ONE_ROW, *data, "--gpu", "H200", "--price", "2.5")
    tokens = int(re.search(r"\(([\d,]+) tokens at 1,000 a second", text)[1].replace(",", ""))
    hours = tokens / 1000 / 3600
    assert f"this run {hours:.2f} h, {hours * 2.5:.2f}" in text
    assert f"learning curve {1.875 * hours:.2f} h, {1.875 * hours * 2.5:.2f} (shares 1/8, 1/4, 1/2, 1)" in text
    assert f"sweep {20 * hours:.2f} h, {20 * hours * 2.5:.2f} at most" in text
    assert tokens % 3 == 0, "three epochs"
    text = shown(capsys, *mistral, *ONE_ROW, *data, "--gpu", "24GB", "--qlora", "--tokens-per-second", "500")
    assert f"this run {2 * hours:.2f} h ({tokens:,} tokens at 500 a second" in text


def test_where_the_speed_is_not_known_the_formula_is_given(mistral, capsys, measured, tmp_path):
    measured({})
    _tokenizer_of_the_tiny_base(tmp_path)
    data = ["--data.train", str(TINY / "train.jsonl"), "--data.validation", "0.1"]
    text = shown(capsys, *mistral, *ONE_ROW, *data, "--gpu", "H100", "--price", "2.5")
    assert "hours not measured on this GPU (H100): give yours, which a run prints: --tokens-per-second 3000" in text
    assert "hours = train tokens × epochs / (tokens a second × 3,600), cost = hours × 2.5; tokens × epochs are " in text
    text = shown(capsys, *mistral, *ONE_ROW, "--data.train", "gone.jsonl", "--gpu", "H200", "--price", "2.5")
    assert "tokens: not counted: " in text
    assert "formula hours = train tokens" in text
    assert "this run" not in text


def test_a_price_that_is_none_is_refused(mistral, capsys):
    assert run_recipe("plan_run", *mistral, "--gpu", "24GB", "--price", "0") == 2
    assert "--price: a number above 0" in capsys.readouterr().err


def _tokenizer_of_the_tiny_base(tmp_path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, tmp_path / "model")
