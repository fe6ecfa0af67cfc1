"""What is left to memory: chosen at a fixed effective batch, shown, and a warning where nothing fits."""

from recipes.utils import fit
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.fit import choose, settle_memory

import pytest
import torch
from conftest import ROOT, read_jsonl
from test_sft import train

AUTO = {"training.per_device_train_batch_size": "auto", "training.gradient_checkpointing": "auto"}
GB = 10**9


def settled(monkeypatch, there, overrides=AUTO, config="mistral", method="lora", model=None):
    """(config, rows of the run table) of a 7B run on a GPU with `there` bytes; the model is its published shape."""
    from test_memory import PUBLISHED

    monkeypatch.setattr(fit, "memory_there", lambda use_cpu: there)
    monkeypatch.setattr(fit, "load_model_config", lambda options: PUBLISHED["Mistral-7B-v0.3"])
    loaded = load_config(ROOT / "configs" / f"{config}.yaml", {**overrides, "model.dtype": "float32"}, method)
    loaded.training["use_cpu"] = False
    loaded.model.dtype = "bfloat16"
    return loaded, settle_memory(loaded, "varlen")


@pytest.mark.parametrize(
    ("method", "there", "rows", "checkpointing"),
    [("lora", 141 * GB, 4, False), ("lora", 24 * GB, 4, True), ("qlora", 9 * GB, 2, True)],
)
def test_auto_takes_the_fastest_that_fits_at_the_same_effective_batch(monkeypatch, method, there, rows, checkpointing):
    config, shown = settled(monkeypatch, there, method=method)
    training = config.training
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 16
    assert (training["per_device_train_batch_size"], training["activation_checkpointing"]) == (rows, checkpointing)
    assert f"{rows} rows a micro-batch" in shown["auto"]
    assert f"{there / 1e9:.1f} GB there" in shown["memory"]


def test_a_run_that_will_not_fit_is_told_with_flags_that_make_it_fit(monkeypatch, capsys):
    settled(monkeypatch, 18 * GB, {})
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: the run will probably not fit" in shown
    assert "--training.per_device_train_batch_size 2 --training.gradient_accumulation_steps 8" in shown
    settled(monkeypatch, 12 * GB, {})
    assert "recipes/sft_qlora.py takes" in capsys.readouterr().out
    settled(monkeypatch, 24 * GB, {})
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fit_at_all", "fit_without", "expected"),
    [
        (16, 16, (4, False)),  # 8,192 tokens are enough
        (16, 2, (2, False)),  # 4,096 without recomputing
        (16, 1, (4, True)),  # too few without
        (2, 0, (2, True)),
        (0, 0, (1, True)),  # nothing: the smallest
    ],
)
def test_the_rule(fit_at_all, fit_without, expected):
    def fit(rows, checkpointing):
        return rows <= (fit_at_all if checkpointing else fit_without)

    assert choose([1, 2, 4, 8, 16], [False, True], 2048, fit) == expected


@pytest.mark.parametrize("word", ["activation_checkpointing", "gradient_checkpointing"])
def test_auto_in_a_file_is_known_under_both_names(config_file, word):
    training = {"gradient_checkpointing": None, word: "auto", "gradient_accumulation_steps": 8}
    training |= {"per_device_train_batch_size": "auto"}
    path = config_file(training=training)
    text = path.read_text()
    path.write_text(text.replace("  gradient_checkpointing: null\n", ""))
    config = load_config(path, {}, "lora")
    assert config.auto == {"checkpointing": True, "rows": 8}
    assert not load_config(path, {f"training.{word}": False, "training.per_device_train_batch_size": 1}, "lora").auto


def test_a_flag_for_checkpointing_overrides_the_file_under_either_name(config_file):
    config = load_config(config_file(), {"training.activation_checkpointing": True}, "lora")
    assert "gradient_checkpointing" not in config.training
    assert config.training["activation_checkpointing"] is True


def test_auto_with_one_row_a_step_says_where_the_rows_go(config_file):
    path = config_file(training={"per_device_train_batch_size": "auto"})
    with pytest.raises(UserError, match="gradient_accumulation_steps 16"):
        load_config(path, {}, "lora")


def test_a_model_that_cannot_be_predicted_is_trained_all_the_same(monkeypatch):
    only_one_layer = {"lora.target_modules": ["layers.30.self_attn.q_proj"]}
    _, shown = settled(monkeypatch, 24 * GB, only_one_layer)
    assert shown["memory"].startswith("not predicted")
    with pytest.raises(UserError, match="auto"):
        settled(monkeypatch, 24 * GB, {**AUTO, **only_one_layer})


def test_processes_of_one_run_see_the_same_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (20 * GB + index, 24 * GB))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert fit.memory_there(use_cpu=False) == 20 * GB + 3
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert fit.memory_there(use_cpu=False) == 24 * GB


def test_nothing_is_predicted_where_weights_are_sharded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert settled(monkeypatch, 24 * GB, {})[1] == {"memory": "not predicted under FSDP"}
    with pytest.raises(UserError, match="FSDP"):
        settled(monkeypatch, 24 * GB)


def test_another_key_does_not_take_the_word(config_file):
    with pytest.raises(UserError, match="training.max_length"):
        load_config(config_file(), {"training.max_length": "auto"}, "lora")


def test_a_run_with_auto_has_the_losses_of_the_run_with_its_choice(config_file, tmp_path, capsys):
    """On a CPU too: 2 rows × 2 accumulation stay 4 rows a step."""
    path = config_file(training={"gradient_accumulation_steps": 2, "max_steps": 4})
    losses = []
    for name, overrides in (
        ("auto", AUTO),
        ("set", {"training.per_device_train_batch_size": 4, "training.gradient_accumulation_steps": 1}),
    ):
        folder = train(path, overrides={**overrides, "training.output_dir": str(tmp_path / name)})
        losses.append([line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line])
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 rows a micro-batch, activation checkpointing off" in shown
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
