"""Broken data files, one kind each: line 3 of every file in broken/ is wrong, and is named with the mend."""

import copy
import json
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import chat, read_jsonl, run_recipe, write_jsonl
from families import FAMILIES
from mistral_tokenizers import mistral_v3_tokenizer
from twins import CHATML, shipped, tokenizer_for

from recipes.utils.console import UserError
from recipes.utils.data import Chat, DataOptions, Encoder, prepare
from recipes.utils.data.template import choose_chat_template

FOLDER = Path(__file__).parent / "broken"
ARGS = SimpleNamespace(max_length=512, seed=1)
BROKEN = {  # file: (what is wrong, how to mend it)
    "a_number": ("expected a JSON object, found int", "write one object a line"),
    "a_string": ("expected a JSON object, found str", "write one object a line"),
    "all_weights_zero": ("every answer has weight 0", "remove the row"),
    "alpaca_empty_output": ("turn 2: the answer is empty", "fill it in, or remove the row"),
    "an_array": ("expected a JSON object, found list", "write one object a line"),
    "content_wrong_type": ("turn 1 (user): content: expected a string, found int", "write it as such"),
    "control_token_answer": (
        "turn 2 (assistant): holds the control token <|endoftext|>",
        "--data.control_tokens escape",
    ),
    "control_token_user": ("turn 1 (user): holds the control token <|im_end|>", "--data.control_tokens escape"),
    "cut_off_line": ("not JSON: Unterminated string", "mend this line, or remove it"),
    "duplicate_key": ("prompt: the key stands twice in one object", "keep one"),
    "duplicate_key_within": ("role: the key stands twice in one object", "keep one"),
    "empty_answer": (
        "turn 2: the answer is empty; it would teach the model to stop at once",
        "fill it in, or remove the row",
    ),
    "function_call_no_json": ("turn 2: function_call: not JSON", "write it as JSON, with double quotes"),
    "input_wrong_type": ("input: expected a string, found list", "write it as such"),
    "lone_surrogate": ("messages[1].content: holds half a character (\\ud83d)", "write it whole, or remove it"),
    "messages_no_list": ("messages: expected a list, found str", "write it as such"),
    "missing_colon": ("not JSON: Expecting ':' delimiter (column 29)", "mend this line, or remove it"),
    "misspelt_completion": ("completion: missing", "did you write `completions` for it?"),
    "misspelt_content": ("turn 1 (user): content: missing", "did you write `contents` for it?"),
    "misspelt_conversations": ("no known shape", "did you write `conversatons` for conversations?"),
    "misspelt_messages": ("no known shape", "did you write `mesages` for messages?"),
    "misspelt_output": ("output: missing", "did you write `outptu` for it?"),
    "mistral_begins_with_assistant": ("the chat template cannot carry this conversation: message 1", "Join neighbours"),
    "mistral_control_token": ("turn 1 (user): holds the control token [INST]", "--data.control_tokens escape"),
    "mistral_two_users": (
        "the chat template cannot carry this conversation: message 2 has the role 'user' where 'assistant' is due",
        "Join neighbours",
    ),
    "no_answer": ("no assistant turn, so there is nothing to learn", "add one"),
    "no_completion": ("completion: missing", "add it"),
    "no_content": ("turn 2 (assistant): content: missing", "add it"),
    "no_known_shape": ("no known shape: found the keys ['body']", "expected `messages`"),
    "no_output": ("output: missing", "add it"),
    "no_role": ("turn 1: unknown role None", "known: system, user, assistant, tool"),
    "no_turns": ("no assistant turn", "add one"),
    "not_json": ("not JSON: Expecting value (column 15)", "mend this line, or remove it"),
    "not_utf8": ("not UTF-8 at byte 16", "save the file as UTF-8"),
    "nul": ("messages[1].content: holds a NUL character", "remove it"),
    "null": ("expected a JSON object, found NoneType", "write one object a line"),
    "odd_weight": ("turn 2: weight: expected 0 (no loss on this turn) or 1", "write one of them"),
    "output_null": ("output: is null", "fill it in, or remove the row"),
    "plain_text": ("not JSON", "mend this line, or remove it"),
    "prompt_wrong_type": ("prompt: expected a string or a list, found int", "write it as such"),
    "sharegpt_turn_without_value": ("turn 1 (user): value: missing", "add it"),
    "sharegpt_unknown_role": ("turn 1: unknown role 'humann'", "did you mean 'human'?"),
    "single_quotes": (
        "not JSON: Expecting property name enclosed in double quotes (column 2)",
        "mend this line, or remove it",
    ),
    "system_not_first": ("a system message is not the first one", "--data.system merge"),
    "tool_arguments_no_json": ("turn 2: arguments of f: not JSON", "write it as JSON, with double quotes"),
    "tool_arguments_no_object": ("turn 2: arguments of f: expected an object", 'write {"name": value}'),
    "tool_call_without_name": ("turn 2: tool_calls: expected objects with `name` and `arguments`", "write both"),
    "tools_no_json": ("tools: not JSON", "write it as JSON, with double quotes"),
    "tools_not_carried_by_qwen2": ("the chat template cannot carry this conversation", "leave the list of tools out"),
    "trailing_comma": ("not JSON", "mend this line, or remove it"),
    "turn_no_object": ("turn 1: expected an object with `role` and `content`", "write both"),
    "two_objects_on_a_line": ("not JSON: Extra data (column 36)", "mend this line, or remove it"),
    "unknown_role": ("turn 1: unknown role 'asistant'", "did you mean 'assistant'?"),
    "white_answer": ("turn 2: the answer is empty", "fill it in, or remove the row"),
}


@cache
def tokenizer_of(family):
    return FAMILIES[family][0]()


def prepared(path, **options):
    tokenizer = tokenizer_of("mistral v3" if Path(path).name.startswith("mistral") else "qwen2")
    return prepare(DataOptions(train=str(path), **options), tokenizer, ARGS)[0]


def test_each_file_of_the_folder_has_its_row_here():
    assert {path.stem for path in FOLDER.iterdir()} == set(BROKEN)
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_and_the_mend_are_named_and_nothing_is_written(name):
    what, mend = BROKEN[name]
    assert mend
    path = FOLDER / f"{name}.jsonl"
    cache = Path(os.environ["HF_HOME"])
    before = sorted(cache.rglob("*.arrow"))
    with pytest.raises(UserError) as error:
        prepared(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ")
    assert what in message
    assert mend in message
    assert len(message.splitlines()) == 1
    assert sorted(cache.rglob("*.arrow")) == before


@pytest.mark.parametrize("name", BROKEN)
def test_skipped_bad_rows_are_counted_and_the_good_ones_kept(name):
    found = prepared(FOLDER / f"{name}.jsonl", on_bad_row="skip")
    good = len((FOLDER / f"{name}.jsonl").read_bytes().splitlines()) - 2
    assert len(found.rows) == good
    assert [bad["where"].rpartition(":")[2] for bad in found.counts.bad] == ["3"]
    assert BROKEN[name][0] in found.counts.bad[0]["error"]
    assert found.counts.blank == 1


def test_a_run_that_skips_bad_rows_writes_them_into_its_folder(config_file, capsys):
    path = config_file(
        data={"train": str(FOLDER / "empty_answer.jsonl"), "on_bad_row": "skip"}, training={"max_steps": 1}
    )
    assert run_recipe("sft_lora", path) == 0
    assert "1 bad train rows" in capsys.readouterr().out
    bad = read_jsonl(path.parent / "run" / "bad_rows.jsonl")
    assert bad[0]["kind"] == "empty answer"
    assert bad[0]["line"].startswith('{"messages"')


def test_typed_control_tokens_are_plain_text_when_escaped():
    for name, end in (("control_token_user", "<|im_end|>"), ("mistral_control_token", "</s>")):
        tokenizer = tokenizer_of("mistral v3" if name.startswith("mistral") else "qwen2")
        found = prepared(FOLDER / f"{name}.jsonl", control_tokens="escape")
        assert found.counts.bad == []
        ids = found.rows[1]["input_ids"]
        special = [token for token in ids if token in tokenizer.added_tokens_decoder]
        plain = found.rows[0]["input_ids"]
        assert special == [token for token in plain if token in tokenizer.added_tokens_decoder]
        assert end in tokenizer.decode(ids, clean_up_tokenization_spaces=False).split("b")[0]


def row_with(text: str, place: str) -> dict:
    """A chat with a call of a tool, which has `text` in one place of it."""
    calls = [{"name": "f", "arguments": {text if place == "argument name" else "a": 1}}]
    result = json.dumps({"k": text}).replace("[", "\\u005b") if place == "tool result" else "4"
    return {
        "messages": [
            {"role": "user", "content": text if place == "user" else "go"},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": "done"},
        ],
        "tools": [{"name": "f", "description": text if place == "tool description" else "d"}],
    }


def test_a_control_token_is_found_wherever_it_hides(tmp_path):
    """Refused, or by `escape` encoded as text: as many control tokens as the same row has without it."""
    texts = ["[[INST]]", "[see [INST] x]", "x < 3 and [INST] > y", "<[INST]>", "a[INST]b"]
    places = ["user", "tool description", "argument name", "tool result"]
    rows = [(text, place) for text in texts for place in places]
    good = row_with("word", "user")
    path = write_jsonl(tmp_path / "mistral.jsonl", [*(row_with(*row) for row in rows), good])
    bad = prepared(path, on_bad_row="skip").counts.bad
    assert [found["where"] for found in bad] == [f"{path}:{line}" for line in range(1, len(rows) + 1)]
    assert all("holds the control token [INST]" in found["error"] for found in bad)

    specials = tokenizer_of("mistral v3").added_tokens_decoder

    def marks(path, **options):
        found = prepared(path, **options).rows["input_ids"]
        return [[token for token in ids if token in specials] for ids in found]

    plain = write_jsonl(tmp_path / "mistral-plain.jsonl", [*(row_with("word", place) for _, place in rows), good])
    assert marks(path, control_tokens="escape") == marks(plain)


MARKS = {  # (template, its end of turn, special tokens, tokens that are none): as R1-Distill and many a merge has them
    "r1": (shipped("deepseek_r1_distill"), "<｜end▁of▁sentence｜>", [], ["<｜User｜>", "<｜Assistant｜>", "<think>"]),
    "added": (CHATML.replace("<|im_start|>", "<|turn|>"), "<|im_end|>", [], ["<|turn|>", "<think>", "<tool_call>"]),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_mark_of_a_turn_that_is_no_special_token_is_guarded_as_one_that_is(name):
    template, end, special, plain = MARKS[name]
    tokenizer = tokenizer_for(template, end, special, plain)
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "any")
    refusing, escaping = (Encoder(tokenizer, escape, "drop") for escape in (False, True))
    typed = plain[0]
    assert tokenizer.convert_tokens_to_ids(typed) in tokenizer(f"a{typed}b")["input_ids"]  # parsed out of any text
    with pytest.raises(UserError, match=f"holds the control token {re.escape(typed)}"):
        refusing.encode([Chat(chat(f"a{typed}b", "c")["messages"], "f:1")])
    for asked, same in ((f"a{typed}b", "a-b"), (f"{typed} {typed}{end}", "-")):
        found, other = (escaping.encode([Chat(chat(text, "c")["messages"], "f:1")])[0] for text in (asked, same))
        added = [
            [token for token in row.input_ids if token in tokenizer.added_tokens_decoder] for row in (found, other)
        ]
        assert added[0] == added[1]
        assert asked in tokenizer.decode(found.input_ids, clean_up_tokenization_spaces=False)
        asked, answer = chat(asked, "c")["messages"]
        first = next(place for place, label in enumerate(found.labels) if label != -100)
        assert escaping.prompt_ids([asked], answer=answer) == found.input_ids[:first]
    # What a row means by a token of its own stays one.
    (row,) = refusing.encode([Chat(chat(f"a{plain[-1]}c", "d")["messages"], "f:1")])
    assert tokenizer.convert_tokens_to_ids(plain[-1]) in row.input_ids


def test_escaping_changes_no_row_without_control_tokens():
    tokenizer = copy.deepcopy(mistral_v3_tokenizer())
    assert tokenizer.backend_tokenizer.encode_special_tokens is False
    path = FOLDER / "empty_answer.jsonl"
    escaped, plain = (prepared(path, on_bad_row="skip", control_tokens=how).rows for how in ("escape", "refuse"))
    assert escaped["input_ids"] == plain["input_ids"]
