"""inspect_data shows what is trained, to people and machines, without weights."""

import json
import os
import re
import shutil

import pytest
from conftest import BASE, TINY, chat, read_jsonl, run_recipe, write_jsonl
from families import FAMILIES

from recipes.utils import console
from recipes.utils.data import Chat, Encoder
from recipes.utils.show import token_pieces


@pytest.fixture
def inspect(config_file, tmp_path, capsys):
    """A function that runs the recipe on a base folder without weights: (exit status, standard output, errors)."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("*.safetensors"))

    def call(*flags, **sections):
        path = config_file(model={"name_or_path": str(base)}, **sections)
        status = run_recipe("inspect_data", path, *flags)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_what_is_printed_is_what_the_file_holds(inspect):
    status, shown, errors = inspect("--rows", 1)
    assert (status, errors) == (0, "")
    answer = read_jsonl(TINY / "train.jsonl")[0]["messages"][1]["content"]
    assert f"«{answer}<|im_end|>»" in shown
    assert "48 train, 8 validation" in shown
    assert "48 rows of 1" in shown
    for name in ("tokens a row", "packing", "steps", "█", "warn: few steps: 8"):
        assert name in shown


def test_json_is_for_a_machine(inspect):
    status, shown, _ = inspect("--json")
    report = json.loads(shown)
    assert status == 0
    assert report["train"]["rows"] == 48
    assert sum(bar["rows"] for bar in report["histogram"]) == 48
    assert report["findings"][0]["level"] == "warn"
    trained = "".join(text for text, kind in report["rows"][0]["tokens"] if kind == "trained")
    assert trained == read_jsonl(TINY / "train.jsonl")[0]["messages"][1]["content"] + "<|im_end|>"
    assert report["packing"]["fill"] == report["train"]["tokens"] / (report["packing"]["rows"] * 320)


def test_json_stands_alone_on_standard_output(inspect, tmp_path):
    status, shown, errors = inspect("--json", "--html", tmp_path / "p.html")
    assert status == 0
    assert json.loads(shown)
    assert "written" in errors


def test_what_is_printed_afterwards_is_on_standard_output_again(inspect, capsys):
    inspect("--json")
    console.say("here")
    assert capsys.readouterr() == ("here\n", "")


def test_one_row_can_be_named_and_an_unknown_one_is_a_user_error(inspect, tmp_path):
    status, shown, _ = inspect("--row", f"{tmp_path}/train.jsonl:7")
    assert status == 0
    assert f"{os.path.relpath(tmp_path)}/train.jsonl:7" in shown
    assert read_jsonl(TINY / "train.jsonl")[6]["messages"][1]["content"] in shown
    status, _, errors = inspect("--row", "nowhere.jsonl:7")
    assert status == 2
    assert "no such row" in errors


def test_random_rows_differ(inspect):
    shown = {re.findall(r"train.jsonl:(\d+)   \(", inspect("--random", "--rows", 5)[1])[0] for _ in range(6)}
    assert len(shown) > 1


def test_what_would_stop_a_run_is_shown_and_does_not_stop_the_inspection(inspect):
    status, shown, _ = inspect("--training.max_length", 125)
    assert status == 0
    assert "stop: " in shown
    assert "--data.max_over_length" in shown


def test_a_config_that_is_not_there_is_a_user_error(capsys):
    assert run_recipe("inspect_data", "nowhere.yaml") == 2
    assert "nowhere.yaml: no such config file" in capsys.readouterr().err


def test_a_bad_row_is_an_error_here_too(inspect, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    status, _, errors = inspect("--data.train", tmp_path / "bad.jsonl")
    assert status == 2
    assert "bad.jsonl:1: not JSON" in errors


def test_the_page_holds_all_of_it_and_nothing_from_elsewhere(inspect, tmp_path):
    rows = [
        chat("What is <b>bold</b> & why?", "Tags: <i>this</i>\nand 'that' 🙂"),
        *read_jsonl(TINY / "train.jsonl")[:5],
    ]
    data = {"train": str(write_jsonl(tmp_path / "tags.jsonl", rows))}
    status, _, errors = inspect("--html", tmp_path / "data.html", data=data)
    assert (status, errors) == (0, "")
    page = (tmp_path / "data.html").read_text()
    assert "<i>this" not in page
    assert "<b>bold" not in page
    assert "🙂" in page
    assert "tags.jsonl:1" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"(?:src|href)=|https?://|@import|url\(", page)
    assert "few steps" in page


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_shown_one_by_one_spell_the_row(family):
    tokenizer = FAMILIES[family][0]()
    messages = chat("Why? 🙂", "Because é 日本 it  is.\n", "And?", " no")["messages"]
    row = Encoder(tokenizer).encode([Chat(messages, "f:1")])[0]
    pieces = token_pieces(tokenizer, row.input_ids, row.labels)
    text = "".join(piece for piece, _ in pieces)
    assert text.lstrip() == tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False).lstrip()
    trained = "".join(piece for piece, kind in pieces if kind == "trained")
    assert "Because é 日本 it  is." in trained
    assert "Why?" not in trained
