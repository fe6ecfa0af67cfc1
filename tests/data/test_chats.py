"""Files become checked chats; every bad row is named by file and line. What rows mean is in test_shapes.py."""

import gzip
import json
import tracemalloc

import pytest
from conftest import DATA, chat, write_jsonl

from recipes.utils.console import UserError
from recipes.utils.data import Chat, Reading, chats, held_out, read_chats, stream_chats

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
    reading = Reading()
    list(stream_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)), reading))
    assert sorted(reading.ignored_keys) == ["id", "source"]
    assert dict(reading.shapes) == {"messages": 1, "prompt-completion": 2, "alpaca": 3, "sharegpt": 1}


def test_all_bad_rows_are_found_in_one_pass_and_each_fault_told_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"messages": [QUESTION, ANSWER]}), '{"prompt": "a"}', *["nope"] * 33]
    path.write_text("\n".join(rows))
    with pytest.raises(UserError) as error:
        read_chats(str(path))
    assert str(error.value).replace(f"{path}:", "").splitlines() == [
        "2: completion: missing; add it",
        "3: not JSON: Expecting value (column 1); mend this line, or remove it (also 4, 5, 6 and 29 more)",
        "34 bad rows in all: 33 not JSON, 1 missing field. To train without them: --data.on_bad_row skip",
    ]


def test_of_many_faults_the_first_twenty_are_told(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": f"r{n}", "content": ""}]} for n in range(33)])
    with pytest.raises(UserError) as error:
        read_chats(str(path))
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "13 more; 33 bad rows in all: 33 unknown role. No row can be used as it is"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "### Human: a"}, "these rows are text that is rendered already"),
        ({"system": "SYSTEM: x", "chat": "USER: a ASSISTANT: b"}, "these rows are Glaive's"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "these rows are preferences; keep the chosen answer alone"),
        ({"conversation_a": [], "conversation_b": []}, "these rows are preferences; keep the better"),
        (
            {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
            "these rows are single messages of a",
        ),
        ({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "these rows are Gemini's; rename `contents` to"),
        ({"id": "1", "data": ["a", "b"]}, "these rows are UltraChat's first form"),
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "these rows are preferences"),
        ({"prompt": None, "completion": "b"}, "prompt: is null; fill it in, or remove the row"),
    ],
)
def test_what_a_file_of_another_kind_is_is_told_once(tmp_path, row, said):
    with pytest.raises(UserError) as error:
        read_chats(str(write_jsonl(tmp_path / "rows.jsonl", [row] * 480)))
    first, last = str(error.value).splitlines()
    assert f"rows.jsonl:1: {said}" in first
    assert first.endswith("(also 2, 3, 4 and 476 more)")
    assert last.startswith("480 bad rows in all")


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


def test_a_user_turn_at_the_end_is_trimmed_and_counted_and_so_are_blank_lines(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b", "c"), chat("a", "b")])
    path.write_text(path.read_text().replace("\n", "\n\n \n"))
    reading = Reading()
    assert [len(row.messages) for row in stream_chats(str(path), reading)] == [2, 2]
    assert (reading.trimmed, reading.blank, reading.bad) == (1, 4, [])


def test_a_share_is_held_out_by_the_rows_own_text():
    """Near the share asked for, the same at every call, and unmoved by rows that come later; copies together."""
    chats = [Chat(chat(f"question {number}", f"answer {number}")["messages"], f"f:{number}") for number in range(2000)]
    first = [row.where for row in chats if held_out(row, 0.1, seed=1)]
    assert 150 < len(first) < 250
    assert first == [row.where for row in chats if held_out(row, 0.1, seed=1)]
    assert first != [row.where for row in chats if held_out(row, 0.1, seed=2)]
    assert all(held_out(row, 0.1, 1) == held_out(row._replace(where="other:1"), 0.1, 1) for row in chats)


def test_system_messages_are_merged_into_the_user_turn_that_follows(tmp_path):
    rows = [{"messages": [SYSTEM, QUESTION, ANSWER, SYSTEM, QUESTION, ANSWER]}]
    found = read_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)), merge_system=True)[0].messages
    asked = {"role": "user", "content": "Be brief.\n\n2+2?"}
    assert found == [asked, ANSWER, asked, ANSWER]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
RESULT = {"role": "tool", "content": "4"}
TOOL_ROWS = {
    "messages": {
        "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ANSWER],
        "tools": [TOOL],
    },
    "bare calls and tools": {
        "messages": [
            QUESTION, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 2}'}]}, RESULT, ANSWER,
        ],
        "tools": [TOOL["function"]],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_ROWS)
def test_tool_calls_of_each_shape_become_one_form(tmp_path, name):
    found = read_chats(str(write_jsonl(tmp_path / "a.jsonl", [TOOL_ROWS[name]])))[0]
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages == [QUESTION, call, RESULT, ANSWER]
    assert found.tools == [TOOL]


def test_real_alpaca_and_sharegpt_rows_are_read():
    assert len(read_chats(str(DATA / "alpaca_train.jsonl"))) == 24
    chats = read_chats(str(DATA / "sharegpt_tools.jsonl"))
    assert len(chats) == 16
    assert sum(bool(message.get("tool_calls")) for row in chats for message in row.messages) == 9


def test_weight_0_on_a_sharegpt_call_is_kept(tmp_path):
    turns = [dict(turn) for turn in TOOL_ROWS["sharegpt"]["conversations"]]
    turns[1]["weight"] = 0
    rows = [{"conversations": turns, "tools": TOOL_ROWS["sharegpt"]["tools"]}]
    assert read_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)))[0].messages[1]["weight"] == 0


def test_a_misspelt_key_of_a_message_is_bad_and_another_is_listed(tmp_path):
    row = {"messages": [QUESTION, {**ANSWER, "language": "en"}]}
    reading = Reading()
    assert len(list(stream_chats(str(write_jsonl(tmp_path / "a.jsonl", [row])), reading))) == 1
    assert list(reading.ignored_keys) == ["messages.language"]
    row["messages"][1]["wieght"] = 0
    with pytest.raises(UserError, match="turn 2: unknown key `wieght`; did you mean `weight`?"):
        read_chats(str(write_jsonl(tmp_path / "a.jsonl", [row])))


def test_a_trailing_system_message_is_not_lost_by_merging(tmp_path):
    rows = [{"messages": [QUESTION, ANSWER, SYSTEM]}]
    with pytest.raises(UserError, match="a system message at the end"):
        read_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)), merge_system=True)


def test_files_that_cannot_be_read_are_user_errors(tmp_path):
    whole = gzip.compress(json.dumps(chat("a", "b")).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    for name in ("cut.jsonl.gz", "no.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read after line"):
            read_chats(str(tmp_path / name))


def test_what_is_no_text_is_told_by_what_it_is(tmp_path):
    files = {
        "a.jsonl": (b"PK\x03\x04", "packed, and not by gzip; unpack it"),
        "b.jsonl": (b"\x28\xb5\x2f\xfd", "packed, and not by gzip; unpack it"),
        "c.jsonl": (json.dumps(chat("a", "b")).encode("utf-16"), "UTF-16; save it as UTF-8"),
    }
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: is {said}"):
            read_chats(str(tmp_path / name))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_and_objects_on_several_lines_are_read_row_by_row(tmp_path, indent):
    rows = [chat("1", "a\u2028b"), {"prompt": "no answer"}, chat("3", "c")]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    (tmp_path / "pretty.jsonl").write_text("\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in rows))
    (tmp_path / "packed.json").write_bytes(gzip.compress((tmp_path / "array.json").read_bytes()))
    for name in ("array.json", "pretty.jsonl", "packed.json"):
        reading = Reading()
        found = list(stream_chats(str(tmp_path / name), reading))
        assert [row.messages[-1]["content"] for row in found] == ["a\u2028b", "c"]
        assert [row.where.rpartition(":")[2] for row in found] == ["1", "3"]
        assert [bad["where"].rpartition(":")[2] for bad in reading.bad] == ["2"]


def test_a_json_array_that_breaks_off_is_named_where_it_does(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([chat("1", "2")] * 3)[:-20])
    with pytest.raises(UserError, match=r"a.json:3: not JSON"):
        read_chats(str(tmp_path / "a.json"))


def test_csv_cells_are_texts_and_rows_named_by_their_first_line(tmp_path):
    path = tmp_path / "rows.csv"  # "NA" and "1.0" stay what they are; to pandas they are something else
    path.write_text('prompt,completion\n"a\nb",NA\nc,1.0\nd,\ne,f,g\nh\n')
    reading = Reading()
    found = list(stream_chats(str(path), reading))
    assert [[message["content"] for message in row.messages] for row in found] == [["a\nb", "NA"], ["c", "1.0"]]
    assert [row.where.rpartition(":")[2] for row in found] == ["2", "4"]
    kinds = {bad["where"].rpartition(":")[2]: bad["kind"] for bad in reading.bad}
    assert kinds == {"5": "empty answer", "6": "wrong type", "7": "missing field"}
    (tmp_path / "rows.tsv").write_text("instruction\tinput\toutput\na\t\tb\n")
    assert read_chats(str(tmp_path / "rows.tsv"))[0].messages[0]["content"] == "a"
    cell = json.dumps([QUESTION, ANSWER]).replace('"', '""')
    (tmp_path / "turns.csv").write_text(f'messages\n"{cell}"\n')
    assert read_chats(str(tmp_path / "turns.csv"))[0].messages == [QUESTION, ANSWER]


def test_parquet_is_read_whatever_its_suffix_with_its_nulls_as_padding(tmp_path):
    """Columns and fields that other rows have are null; so are arguments and schemas, and a row's weight."""
    from datasets import Dataset

    calls = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}]},
        {"role": "assistant", "content": "x", "weight": 1, "tool_calls": [{"name": "f", "arguments": {"day": 3}}]},
    ]
    schemas = [
        {"name": "f", "parameters": {"type": "object", "properties": {name: {"type": kind}}}}
        for name, kind in (("city", "string"), ("day", "integer"))
    ]
    rows = [
        *({"messages": [QUESTION, call, RESULT, ANSWER], "tools": [s]} for call, s in zip(calls, schemas, strict=True)),
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "2+2?", "completion": " "},
    ]
    keys = {key for row in rows for key in row}
    Dataset.from_list([{key: row.get(key) for key in keys} for row in rows]).to_parquet(tmp_path / "rows.data")
    reading = Reading()
    first, second, third = stream_chats(str(tmp_path / "rows.data"), reading)
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert first.messages[:1] + first.messages[2:] == [QUESTION, RESULT, ANSWER]
    assert first.tools == [{"type": "function", "function": schemas[0]}]
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"day": 3}
    assert third.messages == [QUESTION, ANSWER]
    assert [bad["where"].rpartition(":")[2] for bad in reading.bad] == ["4"]


def test_globs_reach_into_folders_and_names_with_brackets_are_names(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl", "f[1].jsonl"):
        write_jsonl(tmp_path / name, [chat("a", "b")])
    assert len(read_chats(str(tmp_path / "**" / "*.jsonl"))) == 4
    assert len(read_chats(str(tmp_path / "f[1].jsonl"))) == 1


def test_a_line_beyond_the_limit_is_one_bad_row_that_says_the_limit_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "LONGEST_LINE", 1 << 20)
    row = json.dumps(chat("question", "answer")).encode()
    content = row + b"\n" + b"x" * (3 << 20) + b"\n" + row + b"\n" + b'{"messages": "' + b"y" * (1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    reading = Reading()
    assert [one.where[-2:] for one in stream_chats(str(tmp_path / "a.jsonl.gz"), reading)] == [":1", ":3"]
    told = [(bad["where"][-2:], bad["error"]) for bad in reading.bad]
    limit = "the line is longer than 1 MB; put one row on each line"
    assert told == [(":2", limit), (":4", limit)]


def test_bad_lines_are_counted_all_and_kept_as_far_as_they_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "MOST_KEPT", 100)
    (tmp_path / "a.jsonl").write_text(("x" * 5000 + "\n") * 300)
    reading = Reading()
    tracemalloc.start()
    assert list(stream_chats(str(tmp_path / "a.jsonl"), reading)) == []
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert (len(reading.bad), dict(reading.bad_kinds)) == (100, {"not JSON": 300})
    with pytest.raises(UserError, match="300 bad rows in all: 300 not JSON"):
        reading.raise_if_bad()


def test_the_system_messages_that_differ_are_kept_up_to_two(tmp_path):
    for systems, kept in ((["A", "A"], ["A"]), (["A", None], ["A", ""]), (["A", "B", "C"], ["A", "B"]), ([None], [""])):
        rows = [chat("hi", "ho", system=system) for system in systems]
        for merge in (False, True):
            reading = Reading()
            assert len(list(stream_chats([str(write_jsonl(tmp_path / "rows.jsonl", rows))], reading, merge))) == len(
                rows
            )
            assert reading.systems == kept
