"""What is unwise in settings and base is warned of with a flag to paste, and the flags do what they say."""

import os
import shutil

import pytest
import torch
from conftest import BASE, TINY, chat, read_jsonl, run_recipe, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.sft_lora import train_lora
from recipes.utils.config import load_config
from recipes.utils.files import read_json
from recipes.utils.training import check_settings, steps_of
from recipes.utils.training.table import check_capacity

NORMAL = [chat(f"What is {number} and {number}?", f"It is {2 * number}, of course.") for number in range(40)]


@pytest.mark.parametrize(
    ("training", "warning"),
    [
        ({"learning_rate": 2e-5}, "--training.learning_rate 2e-4"),
        ({"warmup_steps": 50}, "--training.warmup_steps 0.03"),
        ({"max_steps": 1, "warmup_steps": 0.03}, "(1 step), so nothing is learnt: --training.warmup_steps 0"),
        ({}, "few steps: 2"),
        ({"save_strategy": "no", "load_best_model_at_end": False}, "--training.save_strategy steps"),
        (
            {"max_length": 8192},
            "max_length 8,192 is over the 4,096 tokens that this model was made for: --training.max",
        ),
    ],
)
def test_unwise_settings_are_warned_of_with_a_flag(config_file, capsys, training, warning):
    train_lora(load_config(config_file(training={"max_steps": 2, **training}), {}, "lora", dry_run=True))
    assert warning in capsys.readouterr().out


def test_the_table_names_the_rows_that_will_be_scored(config_file, capsys):
    """A config's own test rows stay where the training rows are somebody's own."""
    for test in (str(TINY / "test.jsonl"), None):
        train_lora(load_config(config_file(data={"test": test}, training={"max_steps": 1}), {}, "lora", dry_run=True))
        lines = [line for line in capsys.readouterr().out.splitlines() if "scored later" in line]
        assert [line.split()[-1] for line in lines] == ([os.path.relpath(test)] if test else [])


def test_the_flags_that_few_steps_prints_give_a_hundred(config_file, capsys):
    training = {"max_steps": -1, "num_train_epochs": 8, "per_device_train_batch_size": 8, "packing": False}
    path = config_file(training=training)
    train_lora(load_config(path, {}, "lora", dry_run=True))
    words = capsys.readouterr().out.split("This gives more: ")[1].split()
    flags = {words[0].removeprefix("--"): int(words[1]), words[2].removeprefix("--"): int(words[3])}
    train_lora(load_config(path, flags, "lora", dry_run=True))
    assert "few steps" not in capsys.readouterr().out


ROWS_40 = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, {"num_train_epochs": 3}),  # no batch makes a hundred steps of 40 rows
        ({"per_device_train_batch_size": 4},
         {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 3}),
        ({"max_steps": 60}, {"max_steps": 100}),  # the 40 of an epoch are fewer
        ({"max_steps": 20}, {"max_steps": -1}),
    ],
)  # fmt: skip
def test_what_few_steps_advises_changes_something_on_few_rows_too(settings, advice):
    args = SFTConfig(use_cpu=True, bf16=False, num_train_epochs=1, learning_rate=1e-4, **{**ROWS_40, **settings})
    before, (found,) = steps_of(args, 40)[0], check_settings(args, 40, 40)
    assert found.message.endswith("more: " + " ".join(f"--training.{key} {value}" for key, value in advice.items()))
    for key, value in advice.items():
        setattr(args, key, value)
    assert steps_of(args, 40)[0] > before


@pytest.mark.parametrize(
    ("tokens", "targets", "mend"),
    [
        (999, ["q_proj"], None),
        (3000, ["q_proj"], "--lora.target_modules all-linear --lora.r 32"),
        (3000, "all-linear", "--lora.r 32"),
        (1_000_000, "all-linear", "--lora.r 256"),
    ],
)
def test_more_label_tokens_than_an_adapter_has_parameters_are_warned_of(tokens, targets, mend):
    found = [finding.message for finding in check_capacity(tokens, 1000, 8, targets)]
    assert [message.rpartition(": ")[2] for message in found] == ([mend] if mend else [])


def test_a_run_ends_early_where_the_validation_loss_no_longer_falls_and_a_resume_goes_on_counting(config_file, capsys):
    """A rate of nothing: each evaluation after the first is no better. A stop between two of them changes nothing."""
    training = {"learning_rate": 1e-12, "max_steps": 12, "eval_steps": 2, "save_steps": 2}
    path = config_file(training=training, run={"early_stopping_patience": 3})
    folder = train_lora(load_config(path, {}, "lora"))
    assert "early stopping: 3 evaluations in a row brought no better validation loss" in capsys.readouterr().out
    assert read_json(folder / "run.json")["status"] == "finished"
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == 8
    shutil.rmtree(folder / "checkpoint-8")
    train_lora(load_config(path, {}, "lora", resume="latest"))
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == 8


def test_ten_steps_on_five_rows_run_without_a_fight(config_file, tmp_path):
    data = {"train": str(write_jsonl(tmp_path / "five.jsonl", NORMAL[:5])), "validation": None}
    training = {"max_steps": 10, "eval_strategy": "no", "load_best_model_at_end": False}
    folder = train_lora(load_config(config_file(data=data, training=training), {}, "lora"))
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def untrained_stop(tmp_path_factory):
    """The tiny base, untied, with an <|im_end|> that it never saw: a zero row in the embedding and in the head."""
    folder = tmp_path_factory.mktemp("untrained")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    row = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        weight.data[row] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_control_token_that_the_base_never_saw_is_warned_of(untrained_stop, config_file, capsys):
    for base, warnings in ((BASE, 0), (untrained_stop, 2)):
        path = config_file(model={"name_or_path": str(base)}, training={"max_steps": 100})
        train_lora(load_config(path, {}, "lora", dry_run=True))
        found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        assert len(found) == warnings
        assert all("<|im_end|> (norm 0, " in line and "--lora.modules_to_save '[lm_head]'" in line for line in found)


def test_nothing_is_said_of_the_head_where_it_is_trained_as_advised(untrained_stop, config_file, capsys, recwarn):
    for base in (untrained_stop, TINY / "base"):  # untied, and tied: PEFT warns of the latter, which the merge unties
        path = config_file(model={"name_or_path": str(base)}, training={"max_steps": 100})
        assert run_recipe("sft_lora", path, "--dry-run", "--lora.modules_to_save", "[lm_head]") == 0
        assert "warning: " not in capsys.readouterr().out
    assert not [str(one.message) for one in recwarn if "tie_word_embeddings" in str(one.message)]


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
