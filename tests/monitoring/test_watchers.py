"""Each watcher stands alone: with the library's own trainer, an own loss, own rows, another trainer of TRL. Nothing
crashes, and what cannot be measured is left out with one line."""

import pytest
import torch
from conftest import BASE, TINY, read_jsonl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from recipes.utils.data import Encoder, load_tokenizer, read_chats
from recipes.utils.monitoring import Ledger, Progress, Report, Samples, Trackers, read_ledger
from recipes.utils.training import Resumable, ResumableTrainer

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = {
    "per_device_train_batch_size": 2, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1,
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no",
}  # fmt: skip


class OwnLoss(SFTTrainer):
    """Goes round TRL's fused head."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        labels = inputs["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class ResumableOwnLoss(Resumable, OwnLoss):
    pass


class ResumableDPOTrainer(Resumable, DPOTrainer):
    pass


def token_rows(tokenizer, count: int, *columns: str) -> Dataset:
    encoded = Encoder(tokenizer).encode(read_chats(str(TINY / "train.jsonl"))[:count])
    names = columns or ("input_ids", "labels")
    return Dataset.from_list([{name: getattr(row, name) for name in names} for row in encoded])


def message_rows(count: int) -> Dataset:
    return Dataset.from_list([{"messages": chat.messages} for chat in read_chats(str(TINY / "train.jsonl"))[:count]])


def preferences(count: int) -> Dataset:
    rows = [chat.messages for chat in read_chats(str(TINY / "train.jsonl"))[:count]]
    return Dataset.from_list([
        {"prompt": row[:-1], "chosen": row[-1:], "rejected": [{"role": "assistant", "content": "I do not know."}]}
        for row in rows
    ])  # fmt: skip


def watched_run(folder, trainer_class, train_rows, eval_rows=None, **settings):
    """Train with every watcher there is, and return the trainer."""
    tokenizer = load_tokenizer(BASE)
    report = Report(folder)
    config_class = DPOConfig if issubclass(trainer_class, DPOTrainer) else SFTConfig
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        args=config_class(output_dir=str(folder), **(SETTINGS | settings)),
        train_dataset=train_rows,
        eval_dataset=train_rows.select(range(2)) if eval_rows is None else eval_rows,
        processing_class=tokenizer,
        peft_config=LORA,
        callbacks=[
            Progress(folder),
            Ledger(folder, train_rows),
            Samples(folder, train_rows if eval_rows is None else eval_rows, tokenizer, 1),
            Trackers(["tensorboard"], folder),
            report,
        ],
    )
    with report:
        trainer.train()
    return trainer


@pytest.mark.parametrize("trainer_class", [SFTTrainer, ResumableTrainer])
def test_rows_of_a_dataset_in_memory_are_named_by_their_index(tmp_path, trainer_class, capsys):
    tokenizer = load_tokenizer(BASE)
    watched_run(tmp_path, trainer_class, token_rows(tokenizer, 4), packing=True, max_length=320)
    assert {row.where for row in read_ledger(tmp_path)} <= {f"rows[{index}]" for index in range(4)}
    assert len(read_ledger(tmp_path)) >= 2
    assert [sample["where"] for sample in read_jsonl(tmp_path / "samples.jsonl")] == ["rows[0]"] * 2
    logged = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert [line["step"] for line in logged if "eval_loss" in line] == [1, 2]
    assert all(
        ("tokens_per_second" in line) == (trainer_class is ResumableTrainer) for line in logged if "loss" in line
    )
    assert (tmp_path / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "validation loss" in shown
    assert "ledger:" not in shown
    assert "samples:" not in shown
    assert ("{'loss'" in shown) == (trainer_class is SFTTrainer)  # the library's display stands beside ours there


@pytest.mark.parametrize("trainer_class", [OwnLoss, ResumableOwnLoss])
def test_an_own_loss_leaves_out_the_ledger_with_a_line(tmp_path, trainer_class, capsys):
    tokenizer = load_tokenizer(BASE)
    watched_run(tmp_path, trainer_class, token_rows(tokenizer, 4), max_length=320)
    assert capsys.readouterr().out.count("ledger: ") == 1
    assert read_ledger(tmp_path) == []
    assert len(read_jsonl(tmp_path / "samples.jsonl")) == 2
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in line] == [1, 2]
    assert (tmp_path / "report.html").is_file()


def test_rows_that_the_trainer_tokenises_itself_leave_out_ledger_and_samples_with_a_line_each(tmp_path, capsys):
    watched_run(tmp_path, ResumableTrainer, message_rows(4), max_length=320)
    shown = capsys.readouterr().out
    assert shown.count("ledger: ") == shown.count("samples: ") == 1
    assert not (tmp_path / "ledger.jsonl").exists()
    assert not (tmp_path / "samples.jsonl").exists()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4


@pytest.mark.parametrize("trainer_class", [DPOTrainer, ResumableDPOTrainer])
def test_another_trainer_of_trl_is_watched_as_far_as_it_goes(tmp_path, trainer_class, capsys):
    watched_run(tmp_path, trainer_class, preferences(4))
    shown = capsys.readouterr().out
    assert shown.count("ledger: ") == shown.count("samples: ") == 1
    assert "reward margin" in shown
    assert "validation loss" in shown
    logged = read_jsonl(tmp_path / "metrics.jsonl")
    assert all("rewards/margins" in line for line in logged if "loss" in line)
    assert (tmp_path / "report.html").is_file()


def test_rows_that_are_cut_are_left_out_of_the_ledger_with_a_line(tmp_path, capsys):
    tokenizer = load_tokenizer(BASE)
    watched_run(tmp_path, SFTTrainer, token_rows(tokenizer, 4), max_length=90)
    shown = capsys.readouterr().out
    assert shown.count("ledger: rows that were trained on otherwise") == 1
    assert {row.where for row in read_ledger(tmp_path)} < {f"rows[{index}]" for index in range(4)}
