"""The LoRA recipe, run for real on the tiny base; with the methods side by side where both must do the same."""

import json
import math
import shutil

import pytest
import torch
import yaml
from conftest import BASE, DATA, ROOT, TINY, chat, read_jsonl, run_script, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import sft_lora, sft_qlora
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.data import Encoder, read_chats
from recipes.utils.evaluation.evaluate import score_answers

RECIPES = {"lora": sft_lora.train_lora, "qlora": sft_qlora.train_qlora}


def train(path, method="lora", **options):
    overrides = options.pop("overrides", {})
    return RECIPES[method](load_config(path, overrides, method, **options))


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def trainers(monkeypatch):
    """The SFTTrainers that the recipes build, to look into after a run."""
    built = []
    for recipe in (sft_lora, sft_qlora):

        class Kept(recipe.ResumableTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                built.append(self)

        monkeypatch.setattr(recipe, "ResumableTrainer", Kept)
    return built


def test_a_lora_run_leaves_a_complete_folder_and_a_lower_loss(config_file, capsys):
    folder = train(config_file(training={"max_steps": 16, "save_steps": 8, "eval_steps": 8}))
    metrics = read_jsonl(folder / "metrics.jsonl")
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[:4])
    assert [line["step"] for line in metrics if "eval_loss" in line] == [8, 16]
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["rows"]["train"]["rows"] == 48
    assert len(record["data_sha256"]) == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "{%- generation" in tokenizer.chat_template or "{% generation" in tokenizer.chat_template
    shown = capsys.readouterr().out
    for row in (
        "attention",
        "chat template",
        "trained on",
        "effective batch",
        "trainable",
        "filled",
        "evaluate_adapter",
    ):
        assert row in shown
    assert (folder / "checkpoint-16" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config_file, tmp_path, method):
    """From the middle of a save interval's run, with dropout, evaluations and the best checkpoint loaded at the end."""
    path = config_file(lora={"lora_dropout": 0.1}, training={"max_steps": 12, "gradient_accumulation_steps": 2})
    whole = train(path, method)
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-8", broken / "checkpoint-8")
    shutil.copy(whole / "metrics.jsonl", broken / "metrics.jsonl")
    resumed = train(path, method, resume=str(broken / "checkpoint-8"), overrides={"training.output_dir": str(broken)})
    assert resumed == broken
    assert same(adapter_of(whole), adapter_of(resumed))
    lines = [
        [line for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line] for folder in (whole, broken)
    ]
    assert [(line["step"], line["eval_loss"]) for line in lines[0]] == [
        (line["step"], line["eval_loss"]) for line in lines[1]
    ]


def test_the_best_checkpoint_by_validation_loss_is_what_is_saved(config_file, tmp_path):
    """Validation rows that the base can do already and forgets as it learns another task: the first save is best."""
    rows = [chat(f"Copy: {word}", word) for word in ("hello", "seven", "Anna", "blue train")]
    data = {"validation": str(write_jsonl(tmp_path / "copy.jsonl", rows))}
    model = {"name_or_path": str(TINY / "base")}
    folder = train(config_file(model=model, data=data, training={"learning_rate": 5e-3, "max_steps": 12}))
    losses = {line["step"]: line["eval_loss"] for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best != 12
    assert same(adapter_of(folder), adapter_of(folder / f"checkpoint-{best}"))


def test_save_total_limit_is_kept(config_file):
    folder = train(config_file(training={"save_total_limit": 1, "max_steps": 12, "load_best_model_at_end": False}))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-12"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_each_row_alone(config_file, trainers, attention):
    train(config_file(model={"attn_implementation": attention}, training={"max_steps": 1, "max_length": 512}))
    trainer = trainers[0]
    model = trainer.model.eval()
    packed = [row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1][:2]
    assert packed
    batch = trainer.data_collator(packed)
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        rows = torch.split(batch["input_ids"][0], [length for row in packed for length in row["seq_lengths"]])
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        leaky = model(input_ids=batch["input_ids"]).logits[0]
    size = alone.abs().max()
    assert (together - alone).abs().max() / size < 1e-5
    assert (leaky - alone).abs().max() / size > 1e-2, "the check cannot see a leak"


def test_the_trainer_gets_the_labels_that_were_made(config_file, trainers):
    path = config_file(training={"packing": False, "max_steps": 1})
    train(path)
    trainer = trainers[0]
    chats = read_chats(yaml.safe_load(path.read_text())["data"]["train"])
    expected = Encoder(AutoTokenizer.from_pretrained(trainer.args.output_dir)).encode(chats)
    assert [row["labels"] for row in trainer.train_dataset] == [row.labels for row in expected]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert (batch["labels"] != -100).sum() == sum(label != -100 for row in expected[:2] for label in row.labels)


def test_the_first_loss_is_the_cross_entropy_of_the_base_on_the_answers(config_file):
    """The whole path against plain arithmetic: no learning yet, one step over the whole file."""
    folder = train(config_file(training={"max_steps": 1, "per_device_train_batch_size": 48, "packing": False}))
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    rows = Encoder(AutoTokenizer.from_pretrained(folder)).encode(read_chats(str(folder.parent / "train.jsonl")))
    total = count = 0
    for row in rows:
        labels = torch.tensor(row.labels[1:])
        logits = base(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].detach()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert math.isclose(read_jsonl(folder / "metrics.jsonl")[0]["loss"], total / count, rel_tol=1e-4)


def test_a_bfloat16_base_stays_bfloat16_and_its_adapter_float32(config_file, mistral_twin, trainers):
    path = config_file(
        model={"name_or_path": str(mistral_twin), "dtype": "bfloat16"},
        training={"max_steps": 1, "max_length": 160, "per_device_train_batch_size": 1, "eval_strategy": "no",
                  "load_best_model_at_end": False},
    )  # fmt: skip
    train(path)
    parameters = dict(trainers[0].model.named_parameters())
    assert {p.dtype for name, p in parameters.items() if "lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in parameters.items() if "lora_" in name} == {torch.float32}


LORA_OPTIONS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
]


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"]], ids=str)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trained_modules_are_float32_on_a_base_in_16_bit_and_the_model_answers_all_the_same(
    config_file, method, modules
):
    config = config_file(
        model={"dtype": "bfloat16"}, data={"samples": 1}, lora={"modules_to_save": modules},
        training={"max_steps": 2, "eval_steps": 1, "save_steps": 1},
    )  # fmt: skip
    folder = train(config, method)
    assert {tensor.dtype for tensor in adapter_of(folder).values()} == {torch.float32}
    assert len(read_jsonl(folder / "samples.jsonl")) == 2


@pytest.mark.parametrize("lora", LORA_OPTIONS, ids=str)
def test_what_loraconfig_has_works_and_reads_back_as_it_was_trained(config_file, lora):
    training = {"max_steps": 4, "learning_rate": 5e-3, "per_device_eval_batch_size": 8}
    folder = train(config_file(lora=lora, training=training))
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert all(saved[key] == value or sorted(saved[key]) == sorted(value) for key, value in lora.items())
    last_loss = [line["eval_loss"] for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line][-1]
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    rows = encoder.encode(read_chats(str(folder.parent / "validation.jsonl")))
    torch.manual_seed(99)  # what reads back must not depend on a seed
    live = PeftModel.from_pretrained(base, folder)
    assert score_answers(live, encoder, rows)[0] == pytest.approx(last_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("start", "method"), [("eva", "lora"), ("pissa", "lora"), ("olora", "lora"), ("loftq", "qlora")]
)
def test_an_initialisation_that_would_not_read_back_is_refused(config_file, start, method, tmp_path):
    with pytest.raises(UserError, match="init_lora_weights"):
        train(config_file(lora={"init_lora_weights": start}), method)
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing_but_memory(config_file, tmp_path):
    folders = []
    for flag in (False, True):
        folder = tmp_path / f"checkpointing-{flag}"
        folders.append(train(config_file(training={"gradient_checkpointing": flag, "output_dir": str(folder)})))
    assert same(adapter_of(folders[0]), adapter_of(folders[1]))


def test_accumulation_of_micro_batches_equals_one_large_batch(config_file, tmp_path):
    losses = []
    for micro, accumulation in ((4, 1), (1, 4)):
        training = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "output_dir": str(tmp_path / f"a{micro}"),
        }
        folder = train(config_file(training=training))
        losses.append([line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_training_goes_on_from_an_existing_adapter(config_file, tmp_path, capsys):
    first = train(config_file(training={"max_steps": 16, "eval_steps": 8, "save_steps": 8}))
    last_loss = [line["eval_loss"] for line in read_jsonl(first / "metrics.jsonl") if "eval_loss" in line][-1]
    second = train(
        config_file(
            model={"adapter": str(first)}, training={"output_dir": str(tmp_path / "second"), "learning_rate": 1e-5}
        )
    )
    assert "goes on from" in capsys.readouterr().out
    first_loss = next(line["eval_loss"] for line in read_jsonl(second / "metrics.jsonl") if "eval_loss" in line)
    assert first_loss == pytest.approx(last_loss, abs=0.01)
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 4
    assert not same(adapter_of(first), adapter_of(second))


def test_a_dry_run_does_everything_up_to_training_and_leaves_nothing(config_file, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    path = config_file()
    train(path, dry_run=True)
    assert "effective batch" in capsys.readouterr().out
    assert sorted(set(tmp_path.iterdir()) - set(before)) == sorted(
        [path, tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]
    )


def test_rows_over_length_are_said_before_training(config_file, capsys, tmp_path):
    rows = read_jsonl(TINY / "train.jsonl")[:20]
    rows[3]["messages"][1]["content"] *= 10
    path = config_file(
        data={"train": str(write_jsonl(tmp_path / "long.jsonl", rows)), "max_over_length": 1.0},
        training={"max_steps": 1},
    )
    train(path)
    assert "1 train rows over max_length 320 (dropped)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_second_run_into_the_folder_of_another_is_refused(config_file, method):
    path = config_file(training={"max_steps": 1})
    folder = train(path, method)
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        train(path, method)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_real_alpaca_rows_train_to_the_end(config_file):
    data = {
        "train": str(DATA / "alpaca_train.jsonl"), "validation": str(DATA / "alpaca_validation.jsonl"),
        "max_over_length": 1.0,
    }  # fmt: skip
    steps = {"max_steps": 3, "eval_steps": 3, "save_steps": 3}
    folder = train(config_file(data=data, training={"max_length": 1024, "per_device_train_batch_size": 1, **steps}))
    rows = json.loads((folder / "run.json").read_text())["rows"]
    assert rows["train"]["rows"] + rows["train"]["dropped"] == len(read_jsonl(DATA / "alpaca_train.jsonl"))
    assert rows["train"]["rows"] > 10


def test_real_sharegpt_rows_without_tools_train_to_the_end(config_file, tmp_path):
    rows = [
        row
        for row in read_jsonl(DATA / "sharegpt_tools.jsonl")
        if {turn["from"] for turn in row["conversations"]} <= {"human", "gpt", "system"} and row["tools"] == "[]"
    ]
    assert len(rows) >= 8
    data = {"train": str(write_jsonl(tmp_path / "sharegpt.jsonl", rows)), "validation": 0.3, "max_over_length": 1.0}
    steps = {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    folder = train(config_file(data=data, training={"max_length": 2048, "per_device_train_batch_size": 1, **steps}))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_copied_recipe_and_config_run_from_outside_the_repository(config_file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(ROOT / "recipes" / "sft_lora.py", elsewhere / "my_run.py")
    config_file("mine", training={"max_steps": 2, "eval_steps": 2, "save_steps": 2, "output_dir": "out"})
    result = run_script("my_run.py", "../mine.yaml", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert (elsewhere / "out" / "adapter_model.safetensors").is_file()
    assert result.stderr == ""
