"""Four row shapes become checked chats; every bad row is named by file and line."""

import gzip
import json

from recipes.utils.config_keys import DataOptions
from recipes.utils.console import UserError
from recipes.utils.dataset import load_chats, read_chats

import pytest
from conftest import chat, real_rows, write_jsonl

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}

SHAPES = {
    "messages": ({"messages": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, [QUESTION, ANSWER]),
    "prompt and completion of messages": (
        {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "alpaca": ({"instruction": "2+2?", "output": "4"}, [QUESTION, ANSWER]),
    "alpaca with empty input": ({"instruction": "2+2?", "input": "", "output": "4"}, [QUESTION, ANSWER]),
    "alpaca with input": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [{"role": "user", "content": "Add.\n\n2 and 2"}, ANSWER],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
        [SYSTEM, QUESTION, ANSWER],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_row_shape_becomes_messages(tmp_path, name):
    row, expected = SHAPES[name]
    assert read_chats(str(write_jsonl(tmp_path / "a.jsonl", [row])))[0].messages == expected


def test_shapes_are_reported_and_other_keys_listed_once(tmp_path):
    rows = [{**row, "id": number, "source": "web"} for number, (row, _) in enumerate(SHAPES.values())]
    notes = {}
    read_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)), notes)
    assert notes["ignored keys"] == ["id", "source"]
    assert dict(notes["shapes"]) == {"messages": 1, "prompt-completion": 2, "alpaca": 3, "sharegpt": 1}


BAD = {
    '{"messages": [': "not JSON",
    "[1]": "expected a JSON object, found list",
    '"text"': "expected a JSON object, found str",
    '{"text": "hello"}': "no known shape: found the keys ['text']",
    '{"messages": "hi"}': "messages: expected a list, found str",
    '{"prompt": "hi"}': "completion: missing",
    '{"prompt": 3, "completion": "x"}': "prompt: expected a string or a list, found int",
    '{"instruction": "hi"}': "output: missing",
    '{"instruction": "hi", "output": null}': "output: expected a string, found NoneType",
    '{"conversations": [{"from": "human"}]}': "conversations: turn 1: expected an object with `from` and `value`",
    '{"conversations": [{"from": "robot", "value": "x"}]}': "conversations: turn 1: unknown role 'robot'",
    '{"conversations": [{"from": "function_call", "value": "x"}]}': "tool calls are not supported",
    '{"messages": ["hi"]}': "turn 1: expected an object with `role` and `content`",
    '{"messages": [{"role": "bot", "content": "x"}]}': "turn 1: unknown role 'bot'",
    '{"messages": [{"role": "user"}]}': "turn 1 (user): content: missing",
    '{"messages": [{"role": "user", "content": ["x"]}]}': "turn 1 (user): content: expected a string, found list",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}': "turn 2: the answer is empty",
    '{"messages": [{"role": "user", "content": "x"}]}': "no assistant turn",
    '{"messages": []}': "no assistant turn",
    '{"instruction": "x", "output": ""}': "turn 2: the answer is empty",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line):
    good = json.dumps(chat("a", "b"))
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UserError) as error:
        read_chats(str(path))
    assert str(error.value).startswith(f"{path}:3: ")
    assert BAD[line] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(chat("a", "b")).encode() + b"\n" + '{"prompt": "café"}'.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"rows.jsonl:2: not UTF-8 at byte 16"):
        read_chats(str(path))


def test_all_bad_rows_are_found_in_one_pass_and_the_first_twenty_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("nope\n" * 33)
    with pytest.raises(UserError) as error:
        read_chats(str(path))
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 13 more bad rows"


@pytest.mark.parametrize("name", ["absent.jsonl", "*.jsonl"])
def test_a_missing_file_is_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match="no such data file|no file matches"):
        read_chats(str(tmp_path / name))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_a_user_error(tmp_path, text):
    (tmp_path / "empty.jsonl").write_text(text)
    with pytest.raises(UserError, match="empty.jsonl: has no rows"):
        read_chats(str(tmp_path / "empty.jsonl"))


def test_lists_globs_gzip_and_a_byte_order_mark_are_read(tmp_path):
    write_jsonl(tmp_path / "a1.jsonl", [chat("1", "1")])
    (tmp_path / "a2.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(chat("2", "2")).encode() + b"\r\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(chat("3", "3")))
    chats = read_chats([str(tmp_path / "a*.jsonl"), str(tmp_path / "b.jsonl.gz")])
    assert [row.messages[0]["content"] for row in chats] == ["1", "2", "3"]
    assert [row.where.rpartition("/")[2] for row in chats] == ["a1.jsonl:1", "a2.jsonl:1", "b.jsonl.gz:1"]


def test_a_user_turn_at_the_end_is_trimmed_and_counted(tmp_path):
    notes = {}
    chats = read_chats(str(write_jsonl(tmp_path / "a.jsonl", [chat("a", "b", "c"), chat("a", "b")])), notes)
    assert [len(row.messages) for row in chats] == [2, 2]
    assert notes["unanswered turns trimmed"] == 1


def test_a_share_of_train_is_held_out_by_seed_and_shares_no_row(tmp_path):
    rows = [chat(f"question {number}", f"answer {number}") for number in range(40)]
    data = DataOptions(train=str(write_jsonl(tmp_path / "a.jsonl", rows)), validation=0.1)
    train, validation, _ = load_chats(data, seed=1)
    assert (len(train), len(validation)) == (36, 4)
    assert not {row.where for row in train} & {row.where for row in validation}
    assert [row.where for row in load_chats(data, seed=1)[1]] == [row.where for row in validation]
    assert [row.where for row in load_chats(data, seed=2)[1]] != [row.where for row in validation]
    with pytest.raises(UserError, match="share between 0 and 1"):
        load_chats(DataOptions(train=data.train, validation=1.5), seed=1)


def test_real_alpaca_and_sharegpt_rows_are_read():
    assert len(read_chats(str(real_rows("alpaca_train.jsonl")))) == 900
    with pytest.raises(UserError, match=r"sharegpt_tools.jsonl:\d+: .*tool calls are not supported"):
        read_chats(str(real_rows("sharegpt_tools.jsonl")))
