"""One pass from files to training rows: what is learnt, what is counted, what is found again."""

import copy
import importlib
import json
import os
import re
import unicodedata
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import trl.chat_template_utils as trl_templates
from conftest import DATA, chat, write_jsonl
from families import FAMILIES, qwen_tokenizer, trained_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recipes.utils.data
from recipes.utils.console import UserError
from recipes.utils.data import Chat, DataOptions, Encoder, Prepared, document_hash, locate, prepare
from recipes.utils.data.prepare import fingerprint
from recipes.utils.data.template import choose_chat_template

recipes_prepare = importlib.import_module("recipes.utils.data.prepare")  # `prepare` of the package is the function


def both_parts(path, tokenizer, max_length=512, **options):
    """(train, validation) of `prepare`, whatever it finds."""
    args = SimpleNamespace(max_length=max_length, seed=1)
    return prepare(DataOptions(train=str(path), **options), tokenizer, args, report=False)


def prepared(path, tokenizer, max_length=512, **options) -> Prepared:
    """The train rows."""
    return both_parts(path, tokenizer, max_length, **options)[0]


def qwen2_5():
    tokenizer = qwen_tokenizer(trl_templates.qwen2_5_chat_template)
    tokenizer.chat_template = choose_chat_template(tokenizer, "auto", "qwen2")[0]
    return tokenizer


def learnt_by_place(rows, tokenizer) -> dict[str, list[str]]:
    """{file:line: the texts that carry loss, over all rows that came of it}."""
    learnt = {}
    for row in rows:
        encoded = SimpleNamespace(input_ids=row["input_ids"], labels=row["labels"])
        learnt.setdefault(row["where"], []).extend(trained_texts(tokenizer, encoded))
    return learnt


@cache
def family_of(name):
    """(an encoder, the end of a turn)."""
    make, end = (qwen2_5, "<|im_end|>") if name == "qwen2.5" else FAMILIES[name]
    return Encoder(make()), end


# Any text that JSON can hold and no control token stands in.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<[\ufdd0"), min_size=1, max_size=40)
ANSWER = TEXT.filter(str.strip)
TURNS = st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2.5"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=TURNS, system=st.none() | ANSWER)
def test_any_conversation_learns_exactly_its_answers_and_follows_what_inference_sends(family, turns, system):
    encoder, end = family_of(family)
    tokenizer = encoder.tokenizer
    messages = chat(*(text for turn in turns for text in turn), system=system)["messages"]
    rows = encoder.encode([Chat(messages, "f:1")])
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {index: encoder.prompt_ids(messages[:index]) for index in answers}
    served = tokenizer.apply_chat_template(messages[: answers[-1]], add_generation_prompt=True, return_dict=False)
    assert served == prompts[answers[-1]]

    learnt = {}
    for row in rows:
        starts = [place for place, label in enumerate(row.labels) if label != -100 and row.labels[place - 1] == -100]
        for start, text in zip(starts, trained_texts(tokenizer, row), strict=True):
            index = next(index for index in answers if prompts[index] == row.input_ids[:start])
            assert index not in learnt, "an answer must be learnt once"
            learnt[index] = text
    for index in answers:
        expected = messages[index]["content"]
        expected = expected.rstrip(" ") if family == "mistral v3" else expected
        found = learnt[index].removesuffix(end)
        assert found != learnt[index], "the end-of-turn token must be learnt"
        # byte fallback and the sentencepiece blank: compare what a reader would see
        expected = unicodedata.normalize("NFC", expected)  # as Qwen's tokenizer reads text
        assert unicodedata.normalize("NFC", found) in (expected, " " + expected, expected.removeprefix(" "))


@pytest.mark.parametrize("family", ["qwen2", "mistral v1", "mistral v3"])
def test_real_answers_are_what_is_trained(family):
    make, end = FAMILIES[family]
    tokenizer = make()
    path = DATA / "alpaca_train.jsonl"
    rows = prepared(path, tokenizer, max_length=100_000).rows
    assert len(rows) == 24
    for line, row in zip(path.read_text().splitlines(), rows, strict=True):
        expected = json.loads(line)["output"]
        expected = expected.rstrip(" ") if family == "mistral v3" else expected
        encoded = SimpleNamespace(input_ids=row["input_ids"], labels=row["labels"])
        assert [text.removeprefix(" ") for text in trained_texts(tokenizer, encoded)] == [
            expected.removeprefix(" ") + end
        ]


def test_real_tool_calls_are_what_is_trained():
    """Calls and answers, not what tools said, by Qwen2.5's template through TRL's training twin."""
    tokenizer = qwen2_5()
    path = DATA / "sharegpt_tools.jsonl"
    train = prepared(path, tokenizer, max_length=100_000)
    assert train.counts.bad == []
    learnt = learnt_by_place(train.rows, tokenizer)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        turns = [turn for turn in json.loads(line)["conversations"] if turn["from"] in ("gpt", "function_call")]
        found = learnt[f"{path}:{number}"]
        assert len(found) == len(turns)
        for turn, text in zip(turns, found, strict=True):
            assert text.endswith("<|im_end|>")
            if turn["from"] == "gpt":
                assert text == turn["value"] + "<|im_end|>"
            else:
                call = json.loads(text.removesuffix("\n</tool_call><|im_end|>").removeprefix("<tool_call>\n"))
                assert call == json.loads(turn["value"])


def test_real_tool_calls_are_trained_in_mistrals_form_too():
    """Each call and answer once, after the prompt that inference sends: it has the tools before the last user turn."""
    tokenizer = FAMILIES["mistral v3"][0]()
    path = DATA / "sharegpt_tools.jsonl"
    train = prepared(path, tokenizer, max_length=100_000)
    assert train.counts.bad == []
    learnt = learnt_by_place(train.rows, tokenizer)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        turns = [turn for turn in json.loads(line)["conversations"] if turn["from"] in ("gpt", "function_call")]
        found = sorted(text.strip() for text in learnt[f"{path}:{number}"] if not text.startswith("[TOOL_CALLS]"))
        assert found == sorted(turn["value"].strip() + "</s>" for turn in turns if turn["from"] == "gpt")
        assert len(learnt[f"{path}:{number}"]) == len(turns)


def test_ids_of_other_makers_keep_calls_and_results_together(tmp_path):
    """Mistral's form takes ids of nine characters; two calls at once, answered in the other order, stay paired."""
    tokenizer = FAMILIES["mistral v3"][0]()
    calls = [{"id": f"call_{name * 20}", "function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    results = [{"role": "tool", "content": name, "tool_call_id": f"call_{name * 20}"} for name in ("g", "f")]
    row = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": calls}, *results,
                        {"role": "assistant", "content": "done"}], "tools": [{"name": "f"}, {"name": "g"}]}  # fmt: skip
    text = tokenizer.decode(prepared(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer).rows[0]["input_ids"])
    ids = re.findall(r'"(?:id|call_id)": "([0-9a-z]{9})"', text)
    assert len(ids) == 4
    assert ids[:2] == ids[:1:-1]


def test_an_answer_with_weight_0_carries_no_loss(tmp_path):
    tokenizer = FAMILIES["qwen2"][0]()
    row = chat("a", "bad answer", "b", "good answer")
    row["messages"][1]["weight"] = 0
    rows = prepared(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer).rows
    encoded = SimpleNamespace(input_ids=rows[0]["input_ids"], labels=rows[0]["labels"])
    assert trained_texts(tokenizer, encoded) == ["good answer<|im_end|>"]


def test_what_the_assistant_says_before_anybody_asked_is_read_and_not_learnt(tmp_path):
    """In a form that carries it, as Qwen2's does; a form such as Mistral's refuses the row (test_template_files.py)."""
    greeted = {"messages": [{"role": "assistant", "content": "Hello!"}, *chat("Say two.", "two")["messages"]]}
    tokenizer = FAMILIES["qwen2"][0]()
    (row,) = prepared(write_jsonl(tmp_path / "rows.jsonl", [greeted]), tokenizer).rows
    assert "assistant\nHello!<|im_end|>" in tokenizer.decode(row["input_ids"])
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "two<|im_end|>"


def test_train_on_last_trains_the_last_answer_alone(tmp_path):
    tokenizer = FAMILIES["qwen2"][0]()
    rows = prepared(write_jsonl(tmp_path / "a.jsonl", [chat("a", "b", "c", "d")]), tokenizer, train_on="last").rows
    encoded = SimpleNamespace(input_ids=rows[0]["input_ids"], labels=rows[0]["labels"])
    assert trained_texts(tokenizer, encoded) == ["d<|im_end|>"]


def test_train_on_last_takes_the_last_answer_that_has_weight(tmp_path):
    row = chat("a", "b", "c", "d")
    row["messages"][3]["weight"] = 0
    tokenizer = FAMILIES["qwen2"][0]()
    rows = prepared(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, train_on="last").rows
    encoded = SimpleNamespace(input_ids=rows[0]["input_ids"], labels=rows[0]["labels"])
    assert trained_texts(tokenizer, encoded) == ["b<|im_end|>"]


def test_an_answer_that_begins_without_a_blank_gets_none_from_sentencepiece():
    """Zephyr's form on Mistral's vocabulary: the tokens of an answer are those that stand in the whole text."""
    tokenizer = copy.deepcopy(FAMILIES["mistral v1"][0]())
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|user|>\\n' + message['content'] + eos_token }}{% else %}"
        "{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    messages = chat("Hi", "yo 0 answer", "And?", "more")["messages"]
    (row,) = Encoder(tokenizer).encode([Chat(messages, "f:1")])
    assert row.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert trained_texts(tokenizer, row) == ["yo 0 answer</s>", "more</s>"]
    first = row.input_ids[row.labels.index(next(label for label in row.labels if label != -100))]
    assert tokenizer.convert_ids_to_tokens(first) == "yo"


def test_a_chat_that_is_split_is_counted_and_every_answer_is_learnt_once(tmp_path):
    tokenizer = FAMILIES["mistral v3"][0]()
    found = prepared(
        write_jsonl(tmp_path / "a.jsonl", [chat("a", "b", "c", "d", system="s"), chat("e", "f")]), tokenizer
    )
    assert (found.counts.rows, found.counts.split) == (3, 1)
    assert [row["where"].rpartition(":")[2] for row in found.rows] == ["1", "1", "2"]


def test_rows_over_max_length_are_dropped_or_cut_or_refused_as_asked_and_counted(tmp_path):
    tokenizer = FAMILIES["qwen2"][0]()
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b" * size) for size in (10, 20, 400)])
    found = prepared(path, tokenizer, 200)
    assert (len(found.rows), found.counts.rows, found.counts.over_length, found.counts.dropped) == (2, 2, 1, 1)
    assert found.counts.trained_tokens == 10 + 20 + 2
    assert found.counts.length_99 > 400
    found = prepared(path, tokenizer, 200, over_length="truncate")
    assert (len(found.rows), max(map(len, found.rows["input_ids"])), found.counts.over_length) == (3, 200, 1)
    assert found.counts.lost_tokens == found.counts.all_tokens - found.counts.tokens
    with pytest.raises(UserError, match=r"a.jsonl:3: \d+ tokens, over training.max_length 200"):
        prepared(path, tokenizer, 200, over_length="error")
    with pytest.raises(UserError, match="no train row is left to use"):
        prepared(path, tokenizer, 20)


def test_a_cut_row_without_any_answer_left_is_dropped_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a" * size, "b") for size in (10, 400)])
    found = prepared(path, FAMILIES["qwen2"][0](), 200, over_length="truncate")
    assert (len(found.rows), found.counts.dropped) == (1, 1)


@pytest.mark.parametrize("validation", [None, 0.2, "other file"])
def test_a_file_is_read_once_between_two_looks_at_its_hash(tmp_path, monkeypatch, validation):
    """Prompts and near copies are looked at on rows that are in hand; an unchanged file is read for its hash alone."""
    rows = [chat(f"question {number}", "answer") for number in range(300)]
    path, other = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[:9])
    validation = str(other) if validation == "other file" else validation
    opened, real_open = [], open

    def counted(name, *args, **kwargs):
        opened.append(str(name))
        return real_open(name, *args, **kwargs)

    monkeypatch.setattr("builtins.open", counted)
    for times in (3, 4):
        both_parts(path, FAMILIES["qwen2"][0](), validation=validation)
        assert opened.count(str(path)) == times
        assert opened.count(str(other)) == (times if validation == str(other) else 0)


def test_a_share_splits_the_rows_and_loses_none(tmp_path):
    tokenizer = FAMILIES["qwen2"][0]()
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"question {number}", "answer") for number in range(300)])
    parts = [list(part.rows["where"]) for part in both_parts(path, tokenizer, validation=0.2)]
    assert sorted(parts[0] + parts[1]) == sorted(f"{path}:{number}" for number in range(1, 301))
    assert 30 < len(parts[1]) < 90
    with pytest.raises(UserError, match="share between 0 and 1"):
        prepared(path, tokenizer, validation=1.5)
    with pytest.raises(UserError, match="with a share of 1e-09 no validation row is left; give another share"):
        prepared(path, tokenizer, validation=1e-9)


def test_typed_control_tokens_and_other_bad_rows_of_both_files_are_told_in_one_pass(tmp_path):
    fine, typed, empty = chat("a", "b"), chat("a <|im_start|> b", "c"), chat("a", "")
    train = write_jsonl(tmp_path / "train.jsonl", [fine, empty, typed])
    validation = write_jsonl(tmp_path / "validation.jsonl", [typed, fine, {"messages": []}])
    with pytest.raises(UserError) as error:
        both_parts(train, qwen2_5(), validation=str(validation))
    told = str(error.value)
    for where in (f"{train}:2: ", f"{train}:3: ", f"{validation}:1: ", f"{validation}:3: "):
        assert where in told
    assert told.count("holds the control token <|im_start|>") == 2


def test_an_empty_list_of_files_is_a_user_error():
    args = SimpleNamespace(max_length=512, seed=1)
    with pytest.raises(UserError, match=r"data\.train: names no rows"):
        prepare(DataOptions(train=[]), FAMILIES["qwen2"][0](), args)


def test_an_unchanged_file_is_not_prepared_again_and_an_edit_that_keeps_the_mtime_is(tmp_path, monkeypatch):
    tokenizer = FAMILIES["qwen2"][0]()
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "one")])
    stamp = path.stat()
    first = prepared(path, tokenizer).rows[0]["input_ids"]
    calls = []
    monkeypatch.setattr(Encoder, "encode_documents", lambda *args: calls.append(args))
    assert prepared(path, tokenizer).rows[0]["input_ids"] == first
    assert prepared(path, tokenizer, ledger=False, samples=1, test=str(path)).rows[0]["input_ids"] == first
    assert calls == []
    monkeypatch.undo()
    write_jsonl(path, [chat("a", "two")])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns
    assert prepared(path, tokenizer).rows[0]["input_ids"] != first


def test_of_this_project_the_cache_depends_on_the_data_package_alone(tmp_path, monkeypatch):
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: seen.append(self) or read(self))
    prepared(write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")]), FAMILIES["qwen2"][0]())
    package = Path(recipes.utils.data.__file__).parent
    assert sorted(path for path in seen if path.suffix == ".py") == sorted(package.glob("*.py"))


def test_an_edit_of_the_validation_file_leaves_the_train_rows_as_they_are(tmp_path, monkeypatch):
    story = "Once upon a time there lived a miller who had three sons and a mill and a donkey and a cat " * 3
    path, other = write_jsonl(tmp_path / "a.jsonl", [chat("Tell", story)]), tmp_path / "b.jsonl"
    tokenizer, seen, encode = FAMILIES["qwen2"][0](), [], Encoder.encode_documents
    monkeypatch.setattr(Encoder, "encode_documents", lambda *args: seen.extend(args[1]) or encode(*args))
    for number in (1, 2):
        write_jsonl(other, [chat("Tell", story + f"and {number} dogs")])
        _, validation = both_parts(path, tokenizer, validation=str(other))
        assert "b.jsonl:1 is nearly" in validation.findings[0].message
        assert [document.where for document in seen].count(f"{path}:1") == 1
    assert [document.where for document in seen].count(f"{other}:1") == 2


@pytest.mark.parametrize("change", ["template", "max_length", "train_on"])
def test_a_changed_setting_is_prepared_anew(tmp_path, change):
    tokenizer = FAMILIES["qwen2"][0]()
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b" * 60, "c", "d")])
    first = prepared(path, tokenizer).counts
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("You are a helpful assistant.", "Hello.")
    options = {"max_length": 70, "over_length": "truncate"} if change == "max_length" else {}
    options |= {"train_on": "last"} if change == "train_on" else {}
    assert prepared(path, tokenizer, **options).counts != first


def test_a_packed_document_is_traced_back_to_its_file_and_line(tmp_path):
    from trl.data_utils import pack_dataset

    tokenizer = FAMILIES["qwen2"][0]()
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"question {number}", "x" * number) for number in range(1, 40)])
    rows = prepared(path, tokenizer).rows
    places = locate(rows)
    assert len(places) == 39
    found = []
    for row in pack_dataset(rows.select_columns(["input_ids", "labels"]), 512, "bfd"):
        start = 0
        for length in row["seq_lengths"]:
            found.append(places[document_hash(row["input_ids"][start : start + length])])
            start += length
    assert sorted(found) == sorted(rows["where"])


def test_fingerprints_ignore_case_space_and_punctuation_alone():
    first, second, third = (
        Chat(chat("How are you?", text)["messages"], "f:1") for text in ("Fine, thanks!", "fine thanks", "fine, thank")
    )
    assert fingerprint(first) == fingerprint(second) != fingerprint(third)
    calls = [[{"type": "function", "function": {"name": name, "arguments": {}}}] for name in "fg"]
    other = [
        first._replace(messages=[first.messages[0], {"role": "assistant", "content": "", "tool_calls": call}])
        for call in calls
    ]
    assert fingerprint(other[0]) != fingerprint(other[1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 600 MB in a process that may grow by 400 MB."""
    import resource
    import subprocess
    import sys

    row = json.dumps(chat("question " * 600, "answer " * 600)) + "\n"
    with open(tmp_path / "large.jsonl", "w") as file:
        for number in range(60_000):
            file.write(row.replace("question", f"q{number}", 1))
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from families import FAMILIES
from test_prepare import prepared
tokenizer = FAMILIES["mistral v3"][0]()
prepared({str(tmp_path / "small.jsonl")!r}, tokenizer, 4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepared({str(tmp_path / "large.jsonl")!r}, tokenizer, 4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    write_jsonl(tmp_path / "small.jsonl", [chat("a", "b")])
    assert resource.RUSAGE_SELF == 0
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[-1]) < 400


@pytest.mark.parametrize("name", ["train.arrow", "train.npy", "validation.npy", "counts.json"])
@pytest.mark.parametrize("damage", ["cut", "removed", "flipped", "zeroed"])
def test_a_damaged_cache_entry_is_made_anew_and_said(tmp_path, monkeypatch, capsys, name, damage):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {number}", "b") for number in range(20)])
    tokenizer = qwen2_5()
    whole = [part.rows.to_dict() for part in both_parts(path, tokenizer, validation=0.5)]
    [entry] = (tmp_path / "cache" / "lora-recipes").iterdir()
    if damage == "cut":
        os.truncate(entry / name, (entry / name).stat().st_size // 2)
    elif damage == "removed":
        (entry / name).unlink()
    else:  # what a power loss or a disk does to rows, which train another adapter
        content = bytearray((entry / name).read_bytes())
        middle = slice(len(content) // 2, len(content) // 2 + 1 + 200 * (damage == "zeroed"))
        content[middle] = bytes(byte ^ 4 if damage == "flipped" else 0 for byte in content[middle])
        (entry / name).write_bytes(content)
    assert [part.rows.to_dict() for part in both_parts(path, tokenizer, validation=0.5)] == whole
    assert "are damaged" in capsys.readouterr().out
    both_parts(path, tokenizer, validation=0.5)
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/self"], ids=["no folder", "a folder that takes none"])
def test_a_cache_that_cannot_be_written_is_told_with_the_variable_that_moves_it(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    with pytest.raises(UserError, match=rf"^{cache}/lora-recipes: .*: export HF_HOME=FOLDER$"):
        prepared(path, qwen2_5())


def test_entries_that_nobody_used_for_a_month_go_when_another_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    entries, tokenizer = tmp_path / "cache" / "lora-recipes", qwen2_5()
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [chat("a", name)]) for name in "bcd"]
    for path in paths[:2]:
        prepared(path, tokenizer)
    for entry in entries.iterdir():
        os.utime(entry, (0, 0))
    prepared(paths[0], tokenizer)  # used again
    prepared(paths[2], tokenizer)
    assert len(list(entries.iterdir())) == 2


def test_a_file_that_is_changed_while_it_is_read_is_not_kept_under_its_old_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {number}", "b") for number in range(20)])
    read = recipes_prepare.stream_chats

    def edited(*args):
        path.write_text(path.read_text().replace("question 19", "question 91"))
        yield from read(*args)

    monkeypatch.setattr(recipes_prepare, "stream_chats", edited)
    with pytest.raises(UserError, match=r"rows\.jsonl: was changed while it was read"):
        prepared(path, qwen2_5())
    assert list((tmp_path / "cache" / "lora-recipes").iterdir()) == []
