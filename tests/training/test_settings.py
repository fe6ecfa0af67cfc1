"""What is unwise in settings and base is warned of with a flag to paste, and the flags do what they say."""

import pytest
import torch
from conftest import TINY, chat, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
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


@pytest.fixture(scope="module")
def untrained_stop(tmp_path_factory):
    """The tiny base, untied, with an <|im_end|> that it never saw: a zero row in the embedding and in the head."""
    folder = tmp_path_factory.mktemp("untrained")
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    row = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        weight.data[row] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_control_token_that_the_base_never_saw_is_warned_of(untrained_stop, config_file, capsys):
    for base, warnings in ((TINY / "base", 0), (untrained_stop, 2)):
        path = config_file(model={"name_or_path": str(base)}, training={"max_steps": 100})
        train_lora(load_config(path, {}, "lora", dry_run=True))
        found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        assert len(found) == warnings
        assert all("<|im_end|> (norm 0)" in line and "--lora.modules_to_save '[lm_head]'" in line for line in found)


def test_the_mend_for_an_untrained_stop_token_trains_merges_and_makes_the_model_stop(
    untrained_stop, config_file, tmp_path
):
    rows = read_jsonl(TINY / "train.jsonl")[56:120]
    parts = {"train": rows, "test": rows[:8]}
    data = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()}
    training = {"max_steps": 60, "learning_rate": 5e-3, "eval_steps": 60, "save_steps": 60}
    model, lora = {"name_or_path": str(untrained_stop)}, {"modules_to_save": ["lm_head"]}
    folder = train_lora(load_config(config_file(model=model, data=data, training=training, lora=lora), {}, "lora"))
    scores = evaluate_adapter(folder, max_rows=8, max_new_tokens=150)
    merged = evaluate_adapter(folder, model=merge_adapter(folder), max_rows=8, max_new_tokens=150)["merged"]
    assert scores["base"]["stopped"] == 0
    assert scores["adapter"]["stopped"] > 0.5
    assert merged["stopped"] == scores["adapter"]["stopped"]
