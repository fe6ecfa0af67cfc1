"""Settings that are fine each on their own and unwise together are warned of with a flag to paste."""

import pytest
from conftest import chat, write_jsonl

from recipes.sft_lora import train_lora
from recipes.utils.config import load_config

NORMAL = [chat(f"What is {number} and {number}?", f"It is {2 * number}, of course.") for number in range(40)]


@pytest.mark.parametrize(
    ("training", "warning"),
    [
        ({"learning_rate": 2e-5}, "--training.learning_rate 2e-4"),
        ({"warmup_steps": 50}, "--training.warmup_steps 0.03"),
        ({}, "few steps: 2"),
        ({"save_strategy": "no", "load_best_model_at_end": False}, "--training.save_strategy steps"),
    ],
)
def test_unwise_settings_are_warned_of_with_a_flag(config_file, capsys, training, warning):
    train_lora(load_config(config_file(training={"max_steps": 2, **training}), {}, "lora", dry_run=True))
    assert warning in capsys.readouterr().out


def test_the_flags_that_few_steps_prints_give_a_hundred(config_file, capsys):
    training = {"max_steps": -1, "num_train_epochs": 8, "per_device_train_batch_size": 8, "packing": False}
    path = config_file(training=training)
    train_lora(load_config(path, {}, "lora", dry_run=True))
    words = capsys.readouterr().out.split("This gives more: ")[1].split()
    flags = {words[0].removeprefix("--"): int(words[1]), words[2].removeprefix("--"): int(words[3])}
    train_lora(load_config(path, flags, "lora", dry_run=True))
    assert "few steps" not in capsys.readouterr().out


def test_ten_steps_on_five_rows_run_without_a_fight(config_file, tmp_path):
    data = {"train": str(write_jsonl(tmp_path / "five.jsonl", NORMAL[:5])), "validation": None}
    training = {"max_steps": 10, "eval_strategy": "no", "load_best_model_at_end": False}
    folder = train_lora(load_config(config_file(data=data, training=training), {}, "lora"))
    assert (folder / "adapter_model.safetensors").is_file()
