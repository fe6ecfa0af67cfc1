"""The ledger: the loss of every training row at every epoch, from the passes that train it, right to the row."""

import json
import random
import shutil

import pytest
import torch
from conftest import BASE, TINY, chat, read_jsonl, run_recipe, write_jsonl
from forks import log_of, start_several
from scipy.stats import rankdata
from trained import adapter_of, same, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.utils.console import UserError
from recipes.utils.data import Encoder, read_chats
from recipes.utils.monitoring import read_ledger

LAYOUTS = {
    "packed": {"packing": True, "max_length": 320, "per_device_train_batch_size": 2},
    "unpacked": {"packing": False, "per_device_train_batch_size": 3},
}
NO_EVALUATION = {"eval_strategy": "no", "load_best_model_at_end": False}


def test_the_ledger_holds_the_cross_entropy_of_each_row_alone(config_file):
    """Packed, against plain arithmetic: one step over the whole file, so that nothing is learnt yet."""
    training = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, **NO_EVALUATION}
    training["gradient_checkpointing"] = True  # its second pass is not a second look
    path = config_file(training={**training, "save_strategy": "no"})
    folder = train(path)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    rows = encoder.encode(read_chats(str(folder.parent / "train.jsonl")))
    ledger = {row.where: row for row in read_ledger(folder)}
    assert ledger.keys() == {row.where for row in rows}
    for row in rows:
        logits = base(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].detach()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:])).item()
        assert ledger[row.where].losses == {1: pytest.approx(loss, rel=1e-4)}
        assert ledger[row.where].tokens == sum(label != -100 for label in row.labels)


@pytest.mark.parametrize(("method", "layout"), [("lora", "packed"), ("qlora", "unpacked")])
def test_every_row_is_there_once_an_epoch_and_a_steps_rows_make_its_loss(config_file, method, layout):
    training = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, **NO_EVALUATION}
    folder = train(config_file(training={**LAYOUTS[layout], **training, "save_strategy": "no"}), method)
    lines = read_jsonl(folder / "ledger.jsonl")
    places = [f"{folder.parent / 'train.jsonl'}:{number}" for number in range(1, 49)]
    for epoch in (1, 2):
        assert sorted(line["where"] for line in lines if line["epoch"] == epoch) == sorted(places)
    for logged in (line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line):
        rows = [line for line in lines if line["step"] == logged["step"]]
        mean = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
        assert mean == pytest.approx(logged["loss"], rel=1e-3)


def test_after_a_resume_no_row_and_no_sample_is_there_twice(config_file, tmp_path):
    path = config_file(
        data={"samples": 1}, training={"eval_steps": 2, "save_steps": 6, "load_best_model_at_end": False}
    )
    whole = train(path)
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-6", broken / "checkpoint-6")
    ledger, samples = ((whole / name).read_text() for name in ("ledger.jsonl", "samples.jsonl"))
    (broken / "ledger.jsonl").write_text(ledger + '{"step": 8, "epo')  # cut off by a kill
    (broken / "samples.jsonl").write_text(samples + samples.splitlines()[0].replace('"step": 2', '"step": 7') + "\n")
    train(path, resume=str(broken / "checkpoint-6"), overrides={"training.output_dir": str(broken)})
    assert (broken / "ledger.jsonl").read_text() == ledger
    assert {line["step"] for line in read_jsonl(broken / "ledger.jsonl")} == set(range(1, 9))
    assert (broken / "samples.jsonl").read_text() == samples
    assert [line["step"] for line in read_jsonl(broken / "samples.jsonl")] == [2, 4, 6, 8]


def test_what_a_checkpoint_was_trained_on_is_in_the_ledger_when_it_is_written(config_file, monkeypatch, tmp_path):
    """So that a run that is killed after it can go on with nothing lost."""
    from transformers import Trainer

    steps, save = {}, Trainer._save_checkpoint

    def looked_at(self, model, trial):
        lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
        steps[self.state.global_step] = {json.loads(line)["step"] for line in lines}
        save(self, model, trial)

    monkeypatch.setattr(Trainer, "_save_checkpoint", looked_at)
    train(config_file(training={**NO_EVALUATION, "save_steps": 3}))
    assert steps == {3: {1, 2, 3}, 6: set(range(1, 7)), 8: set(range(1, 9))}


def test_without_a_ledger_there_is_no_file_and_the_same_adapter(config_file, tmp_path):
    training = {**NO_EVALUATION, "save_strategy": "no", "max_steps": 4}
    with_it = train(config_file(training=training))
    without = train(config_file(data={"ledger": False}, training={**training, "output_dir": str(tmp_path / "without")}))
    assert same(adapter_of(with_it), adapter_of(without))
    assert not (without / "ledger.jsonl").exists()
    with pytest.raises(UserError, match="unless data.ledger is false"):
        read_ledger(without)


def test_two_processes_write_one_ledger(config_file):
    training = {**NO_EVALUATION, "max_steps": -1, "num_train_epochs": 1, "packing": False, "save_strategy": "no"}
    path = config_file(training={**training, "use_cpu": True, "gradient_accumulation_steps": 2})
    folder = path.parent / "run"
    processes = start_several(2, "lora", path, folder)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], log_of(folder)
    lines = read_jsonl(folder / "ledger.jsonl")
    assert len({line["where"] for line in lines}) == len(lines) == 48
    for logged in (line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line):
        rows = [line for line in lines if line["step"] == logged["step"]]
        assert len(rows) == 8
        shares = logged["trained_tokens_per_second"] / logged["tokens_per_second"]
        assert 0.45 < shares < 0.6  # of both processes: half of the tokens of these rows are answers
        mean = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
        assert mean == pytest.approx(logged["loss"], rel=1e-3)


def plant(rows: list, share: float) -> list[int]:
    """Give a share of the rows each other's answers; returns their line numbers."""
    chosen = random.Random(0).sample(range(len(rows)), int(len(rows) * share))
    answers = [rows[index]["messages"][-1]["content"] for index in chosen]
    for index, answer in zip(chosen, [*answers[1:], answers[0]], strict=True):
        rows[index]["messages"][-1]["content"] = answer
    return [index + 1 for index in chosen]


def auroc(ledger, planted: list[int]) -> float:
    """The chance that a planted row ranks above another one."""
    wrong = [int(row.where.rsplit(":", 1)[1]) in planted for row in ledger]
    ranks = rankdata([row.excess for row in ledger])
    positives = sum(wrong)
    above = sum(rank for rank, is_wrong in zip(ranks, wrong, strict=True) if is_wrong) - positives * (positives + 1) / 2
    return above / (positives * (len(wrong) - positives))


PLANTED = {  # the demo's settings, on fewer rows and once over them; packed, two or three rows share one
    "packed": {"packing": True, "max_length": 288, "per_device_train_batch_size": 4},
    "unpacked": {"packing": False, "per_device_train_batch_size": 8},
}


def train_with_planted_rows(config_file, tmp_path, count: int, epochs: int, method: str, **training):
    rows = read_jsonl(TINY / "train.jsonl")[:count]
    planted = plant(rows, 0.05)
    settings = {
        "max_steps": -1, "num_train_epochs": epochs, "learning_rate": 5e-3, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03, "save_strategy": "no", **NO_EVALUATION, **training,
    }  # fmt: skip
    data = {"train": str(write_jsonl(tmp_path / "planted.jsonl", rows)), "validation": None}
    lora = {"r": 16, "lora_alpha": 32}
    model = {"name_or_path": str(TINY / "base")}  # it foretells what is not planted
    return train(config_file(model=model, data=data, lora=lora, training=settings), method), planted


@pytest.mark.parametrize("layout", PLANTED)
def test_planted_wrong_answers_are_the_worst_rows_after_one_epoch(config_file, tmp_path, layout):
    folder, planted = train_with_planted_rows(config_file, tmp_path, 160, 1, "lora", **PLANTED[layout])
    assert auroc(read_ledger(folder), planted) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("layout", PLANTED)
def test_planted_wrong_answers_are_the_worst_rows_after_the_demos_epochs(config_file, tmp_path, layout, method):
    folder, planted = train_with_planted_rows(config_file, tmp_path, 1600, 3, method, **PLANTED[layout])
    ledger = read_ledger(folder)
    assert auroc(ledger, planted) >= 0.95
    assert {int(row.where.rsplit(":", 1)[1]) for row in ledger[:80]} == set(planted)


def lines_of(folder, *lines) -> None:
    keys = ("step", "epoch", "where", "loss", "tokens")
    write_jsonl(folder / "ledger.jsonl", [dict(zip(keys, line, strict=True)) for line in lines])
    (folder / "run.json").write_text(json.dumps({"data_sha256": {}}))


def test_rows_are_ranked_against_those_of_their_own_time(tmp_path):
    """a is as bad as any early row and bad when the others are learnt; b was merely early."""
    early = [(1, 1, f"early:{n}", 3.0, 10) for n in range(20)]
    late = [(2, 1, f"late:{n}", 0.1, 10) for n in range(20)]
    lines_of(tmp_path, *early, (1, 1, "b", 3.2, 10), *late, (2, 1, "a", 1.5, 10))
    assert [row.where for row in read_ledger(tmp_path)[:2]] == ["a", "b"]


def test_a_row_that_filled_up_a_batch_has_one_loss_an_epoch(tmp_path):
    lines_of(tmp_path, (1, 1, "a", 2.0, 10), (2, 1, "a", 1.0, 10), (3, 2, "a", 0.5, 10))
    (row,) = read_ledger(tmp_path)
    assert (row.losses, row.tokens) == ({1: 1.5, 2: 0.5}, 10)


def test_the_answers_of_a_split_chat_have_a_loss_each(tmp_path):
    lines_of(tmp_path, (1, 1, "a", 2.0, 10), (1, 1, "a", 0.1, 12))
    assert [(row.where, row.tokens, row.losses) for row in read_ledger(tmp_path)] == [
        ("a", 10, {1: 2.0}),
        ("a", 12, {1: 0.1}),
    ]


def test_inspect_data_shows_the_worst_rows_token_by_token(config_file, tmp_path, capsys):
    rows = [chat(f"Say {word} twice", f"{word} {word}") for word in ("hello", "blue", "seven", "train") * 6]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f", please, {number}"
    rows[10]["messages"][1]["content"] = "quartz fjord"
    path = config_file(
        data={"train": str(write_jsonl(tmp_path / "say.jsonl", rows))},
        training={**NO_EVALUATION, "save_strategy": "no", "max_steps": 8, "learning_rate": 5e-3, "packing": False},
    )
    folder = train(path)
    capsys.readouterr()
    flags = [path, "--ledger", folder, "--rows", "2"]
    assert run_recipe("inspect_data", *flags) == 0
    shown = capsys.readouterr().out
    worst = [row.where for row in read_ledger(folder)]
    assert all(where in shown for where in worst[:20])
    answer = rows[int(worst[0].rsplit(":", 1)[1]) - 1]["messages"][1]["content"]
    assert f"«{answer}<|im_end|>»" in shown[shown.rindex(worst[0]) :]
    page = tmp_path / "page.html"
    assert run_recipe("inspect_data", *flags, "--html", page) == 0
    assert f"<code>{worst[0]}</code>" in page.read_text()
    with open(tmp_path / "say.jsonl", "a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    assert run_recipe("inspect_data", *flags) == 2
    assert "has changed since" in capsys.readouterr().err
