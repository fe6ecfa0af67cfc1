"""forget_rows.py takes rows out of a run as if they had never been in its files, and its receipt can be checked."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, chat, read_jsonl, run_recipe, small_config, write_jsonl

from recipes.forget_rows import forget_rows
from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.data import DataOptions
from recipes.utils.deletion import find_rows
from recipes.utils.deletion.receipt import auroc


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of packed rows (mine.jsonl, one of them twice but for case) that was merged, and run-forgot,
    the same without two rows. All paths are relative to it."""
    folder, before = tmp_path_factory.mktemp("forgotten"), os.getcwd()
    rows = read_jsonl(TINY / "train.jsonl")[:48]
    shout = {"messages": [{**turn, "content": turn["content"].upper()} for turn in rows[2]["messages"]]}
    train = write_jsonl(folder / "mine.jsonl", [*rows, shout])
    os.chdir(folder)
    try:
        assert run_recipe("sft_lora", small_config(folder, data={"train": str(train)})) == 0
        merge_adapter("run", verify=False)
        found = forget_rows("run", rows="mine.jsonl:3, mine.jsonl:8")
    finally:
        os.chdir(before)
    return folder, found


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of that folder, to be in."""
    copy = shutil.copytree(made[0], tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def test_the_adapter_is_that_of_a_run_on_files_without_the_rows_and_their_copies(folder, made):
    assert made[1]["run"] == Path("run-forgot")
    rows = read_jsonl(folder / "mine.jsonl")
    kept = [row for number, row in enumerate(rows, start=1) if number not in (3, 8, 49)]
    for name, left in (("without", kept), ("one-left", [*kept[:2], rows[2], *kept[2:]])):
        (folder / name).mkdir()
        train = write_jsonl(folder / name / "mine.jsonl", left)
        assert run_recipe("sft_lora", small_config(folder / name, data={"train": str(train)})) == 0
    assert adapter(folder / "run-forgot") == adapter(folder / "without" / "run") != adapter(folder / "run")
    assert adapter(folder / "run-forgot") != adapter(folder / "one-left" / "run"), (
        "a row that was left in would be seen"
    )
    counts = json.loads((folder / "run-forgot" / "run.json").read_text())["rows"]["train"]
    assert counts["rows"] == 46
    assert sorted(counts["excluded"]) == ["mine.jsonl:3", "mine.jsonl:49", "mine.jsonl:8"]


def test_the_receipt_holds_no_text_names_what_else_holds_the_rows_and_holds(folder, made, capsys):
    text = (folder / "run-forgot" / "deletion.json").read_text()
    receipt, measured = json.loads(text), made[1]["measured"]
    for row in (read_jsonl(folder / "mine.jsonl")[place] for place in (2, 7)):
        assert all(turn["content"][:20] not in text for turn in row["messages"])
    excluded = (folder / "run-forgot" / "excluded.txt").read_text().split()
    assert len(receipt["rows"]) == len(excluded) == 2
    assert not any(number in text for number in excluded), "fingerprints are salted"
    assert receipt["measured"] == measured
    assert set(measured) == {"rows", "base", "old", "new"}
    assert 0 <= measured["old"]["low"] <= measured["old"]["auroc"] <= measured["old"]["high"] <= 1
    held = {one["path"]: one for one in receipt["still_held"]}
    of_run = {f"run/{name}" for name in ("adapter_model.safetensors", "checkpoint-8", "ledger.jsonl", "merged")}
    assert {"mine.jsonl", *of_run} <= set(held)
    assert held["mine.jsonl"]["remove"] == "sed -i '3d;8d;49d' mine.jsonl"
    assert any(one["holds"] == "prepared rows" for one in held.values())
    assert run_recipe("forget_rows", "--verify", "run-forgot/deletion.json") == 0
    out = capsys.readouterr().out
    assert "NOT" not in out
    assert "mine.jsonl: the rows themselves, in 3 lines" in out


def test_a_receipt_that_does_not_hold_is_told(folder, capsys):
    shutil.copy("run/adapter_model.safetensors", "run-forgot")
    record = json.loads(Path("run-forgot/run.json").read_text())
    record["data"]["exclude"] = None
    record["training"]["seed"] = 7
    Path("run-forgot/run.json").write_text(json.dumps(record))
    assert run_recipe("forget_rows", "--verify", "run-forgot/deletion.json") == 4
    out = capsys.readouterr().out
    for what in ("the new adapter", "its configuration", "no removed row among those of the new run"):
        assert f"NOT   {what}: " in out
    assert "ok    its data files" in out
    Path("run-forgot/deletion.json").write_text("{}")
    with pytest.raises(UserError, match="is no receipt of forget_rows.py"):
        forget_rows(verify="run-forgot/deletion.json")
    with pytest.raises(UserError, match="--verify takes a receipt alone"):
        forget_rows("run", verify="run-forgot/deletion.json")


def test_what_still_holds_the_rows_is_looked_for_again_when_the_old_run_is_gone(folder, capsys):
    Path("sold").mkdir()
    shutil.move("run/merged", "sold/merged")
    shutil.rmtree("run")
    lines = Path("mine.jsonl").read_text().splitlines(keepends=True)
    Path("mine.jsonl").write_text("".join(line for number, line in enumerate(lines, 1) if number not in (3, 8, 49)))
    assert run_recipe("forget_rows", "--verify", "run-forgot/deletion.json") == 0
    out = capsys.readouterr().out
    assert "sold/merged: a model that the old adapter was merged into" in out
    assert "the rows themselves" not in out
    assert "ledger.jsonl" not in out
    assert "mine.jsonl is not as the new run had it" in out


def test_a_dry_run_says_what_goes_what_is_near_and_the_cost_and_trains_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    name = json.loads(read_jsonl(folder / "mine.jsonl")[0]["messages"][1]["content"])["name"]
    assert run_recipe("forget_rows", "run", "--match", name, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "mine.jsonl:1" in shown
    assert "the old one took" in shown
    assert sorted(folder.iterdir()) == before


def test_near_copies_are_listed_and_stay(folder, capsys):
    long = " ".join(f"word{number}" for number in range(60))
    rows = [chat(f"{long} one", "a"), chat(f"{long} two", "a"), chat("Something else", "b")]
    record = {"data": vars(DataOptions(train=[str(write_jsonl(folder / "near.jsonl", rows))]))}
    found = find_rows(record, [f"{folder / 'near.jsonl'}:1"])
    assert [chat.where for chat in found.rows] == [f"{folder / 'near.jsonl'}:1"]
    assert found.copies == []
    assert [(a, b, share > 0.8) for a, b, share in found.near] == [
        (f"{folder / 'near.jsonl'}:2", f"{folder / 'near.jsonl'}:1", True)
    ]


def test_rows_that_cannot_be_taken_out_are_told(folder):
    cases = {
        "mine.jsonl:4000": "mine.jsonl:4000: names no row of the run's train and validation files",
        "mine.jsonl": "a row is named by file:line", "jsonl:3": "names no row", "": "name the rows to take out",
    }  # fmt: skip
    for rows, message in cases.items():
        with pytest.raises(UserError, match=message):
            forget_rows("run", rows=rows)
    with pytest.raises(UserError, match="no row of the run holds this text"):
        forget_rows("run", match="Nobody wrote this")
    with pytest.raises(UserError, match="no row would be left"):
        forget_rows("run", match='"')
    with pytest.raises(UserError, match="is there already"):
        forget_rows("run", rows="mine.jsonl:3", output="run")
    with pytest.raises(UserError, match="name the run to take rows out of"):
        forget_rows(rows="mine.jsonl:3")


def test_rows_that_a_run_before_was_trained_on_are_to_be_forgotten_there_first(folder, tmp_path):
    more = str(write_jsonl(folder / "more.jsonl", read_jsonl(TINY / "train.jsonl")[2:40]))
    (folder / "next").mkdir()
    path = small_config(folder / "next", model={"adapter": "run"}, data={"train": more}, training={"max_steps": 4})
    assert run_recipe("sft_lora", path) == 0
    with pytest.raises(UserError, match="goes on from run, which was trained on 1 of the rows; forget them there"):
        forget_rows("next/run", rows="more.jsonl:1")


def test_the_auroc_is_the_share_of_pairs():
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auroc(np.array([3.0]), np.array([1.0, 2.0])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == (1 + 1 + 0 + 0.5) / 4
    assert auroc(np.array([5.0]), np.array([5.0])) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_ten_random_sets_are_taken_out_byte_for_byte(tmp_path, method, packing):
    rows = read_jsonl(TINY / "train.jsonl")[:48]
    training = {
        "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2 if packing else 8, "packing": packing,
        "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
    }  # fmt: skip

    def trained(folder: Path, left: list[dict]) -> bytes:
        """The adapter of a run on a file that holds the rows `left` alone."""
        folder.mkdir(exist_ok=True)
        data = {"train": str(write_jsonl(folder / "mine.jsonl", left)), "validation": None}
        config = small_config(folder, data=data, training=training, lora={"lora_dropout": 0.1})
        assert run_recipe(f"sft_{method}", config) == 0
        return adapter(folder / "run")

    whole, draw = trained(tmp_path, rows), random.Random(0)
    for number in range(10):
        out = draw.sample(range(1, len(rows) + 1), draw.randint(1, 30))
        named = ",".join(f"mine.jsonl:{line}" for line in out)
        new = forget_rows(tmp_path / "run", rows=named, output=tmp_path / f"forgot-{number}")["run"]
        excluded = json.loads((new / "run.json").read_text())["rows"]["train"]["excluded"]
        gone = {int(where.rpartition(":")[2]) for where in excluded}
        assert set(out) <= gone
        kept = [row for line, row in enumerate(rows, start=1) if line not in gone]
        assert adapter(new) == trained(tmp_path / f"without-{number}", kept) != whole
    kept.insert(min(out) - 1, rows[min(out) - 1])
    assert adapter(new) != trained(tmp_path / "one-left", kept), "a row that was left in would be seen"


@pytest.mark.slow
def test_the_measured_check_tells_planted_rows_before_and_no_longer_after(tmp_path):
    """Unseen rows are the planted ones with each other's answers, so that only who has seen a row knows it."""
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    codes = ["".join(draw.choices(letters, k=8)) for _ in range(40)]
    asked = ["The code of " + "".join(draw.choices(letters, k=4)) for _ in codes]
    planted = [chat(question, code) for question, code in zip(asked, codes, strict=True)]
    unseen = [chat(question, code) for question, code in zip(asked, codes[1:] + codes[:1], strict=True)]
    train = str(write_jsonl(tmp_path / "mine.jsonl", read_jsonl(TINY / "train.jsonl")[:10] + planted))
    training = {"max_steps": 120, "learning_rate": 1e-2, "per_device_train_batch_size": 16, "packing": False,
                "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}  # fmt: skip
    lora = {"r": 16, "lora_alpha": 32}
    path = small_config(tmp_path, data={"train": train, "validation": None}, lora=lora, training=training)
    assert run_recipe("sft_lora", path) == 0
    others = str(write_jsonl(tmp_path / "unseen.jsonl", unseen))
    measured = forget_rows(tmp_path / "run", match="The code of", unseen=others)["measured"]
    print(json.dumps(measured))
    assert measured["old"]["auroc"] >= 0.95
    assert abs(measured["new"]["auroc"] - 0.5) <= 0.05
    assert measured["rows"] == {"removed": 40, "unseen": 40}
