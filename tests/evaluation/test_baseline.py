"""The base as a good prompt would have it: whole train rows as examples, none of them among the rows held out."""

import pytest
from conftest import BASE, ROOT, TINY, chat, read_jsonl, write_jsonl
from transformers import AutoTokenizer

from recipes.utils.console import UserError
from recipes.utils.data import Encoder, fingerprint, held_out, read_chats
from recipes.utils.evaluation.baseline import choose_examples, prompted, prompts_of, read_system


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (ROOT / "configs" / "chat_templates" / "qwen2.jinja").read_text()
    return Encoder(tokenizer, escape=True)


def record_of(tmp_path, rows: list, seed=42, **data) -> dict:
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", rows)), **data}
    model = {"name_or_path": str(BASE), "dtype": "float32"}
    return {"data": data, "seed": seed, "training": {"max_length": 300}, "model": model, "data_sha256": {}}


ROWS = read_jsonl(TINY / "train.jsonl")[:40]
ASKED = read_jsonl(TINY / "test.jsonl")[:3]


def places(examples: list) -> list[int]:
    return [int(example.where.rpartition(":")[2]) for example in examples]


def test_examples_are_train_rows_by_seed_the_same_each_time_and_told(encoder, tmp_path, capsys):
    chats = read_chats(str(write_jsonl(tmp_path / "test.jsonl", ASKED)))
    first = choose_examples(record_of(tmp_path, ROWS), encoder, chats, 4, None, None)
    assert f"examples: {tmp_path / 'train.jsonl'}:" in capsys.readouterr().out
    assert len(set(places(first))) == 4
    assert choose_examples(record_of(tmp_path, ROWS), encoder, chats, 4, None, None) == first
    assert choose_examples(record_of(tmp_path, ROWS, seed=7), encoder, chats, 4, None, None) != first
    # other rows before them move none of them out, unless one of these is drawn itself
    longer = record_of(tmp_path, [*read_jsonl(TINY / "train.jsonl")[40:44], *ROWS])
    more = choose_examples(longer, encoder, chats, 4, None, None)
    assert len({fingerprint(row) for row in more} & {fingerprint(row) for row in first}) >= 2


def test_no_example_is_a_row_that_is_held_out_or_was_not_learnt(encoder, tmp_path):
    long = chat("say it", "x" * 400)
    unlearnt = chat("say it again", "no", "and again", "yes")
    unlearnt["messages"][1]["weight"] = 0
    rows = [*ASKED, long, unlearnt, *ROWS[:6]]
    chats = read_chats(str(write_jsonl(tmp_path / "test.jsonl", ASKED)))
    validation = str(write_jsonl(tmp_path / "validation.jsonl", ROWS[:2]))
    record = record_of(tmp_path, rows, validation=validation)
    found = choose_examples(record, encoder, chats, 10, None, None)
    assert sorted(places(found)) == [8, 9, 10, 11]
    share = record_of(tmp_path, rows, validation=0.5)
    found = choose_examples(share, encoder, chats, 10, None, None)
    assert found
    assert not any(held_out(one, 0.5, 42) for one in found)


def test_whole_rows_are_taken_as_far_as_they_fit_with_the_longest_question(encoder, tmp_path, capsys):
    """The tiny base reads 4,096 positions."""
    rows = [chat(f"{number} " + "q" * 1000, "a" * 100) for number in range(8)]
    record = record_of(tmp_path, rows)
    record["training"]["max_length"] = 4096
    asked = read_chats(str(write_jsonl(tmp_path / "test.jsonl", [chat("w" * 500, "a")])))
    found = choose_examples(record, encoder, asked, 8, None, None)
    assert 0 < len(found) < 8
    assert "more do not fit in 4,096 tokens" in capsys.readouterr().out
    question = prompted(asked[0], found, None)
    assert len(encoder.encode([question])[0].input_ids) <= 4096
    with pytest.raises(UserError, match="no train row of the run can be an example"):
        choose_examples(record, encoder, asked, 8, None, 3600)


def test_a_question_stands_behind_the_examples_and_carries_the_loss_alone(encoder, tmp_path):
    first, second = read_chats(str(write_jsonl(tmp_path / "two.jsonl", [
        chat("1+1?", "2", system="Old."), chat("2+2?", "4", "3+3?", "6", system="Be brief."),
    ])))  # fmt: skip
    found = prompted(second, [first], None)
    assert [turn["content"] for turn in found.messages] == ["Be brief.", "1+1?", "2", "2+2?", "4", "3+3?", "6"]
    row, alone = encoder.encode([found])[0], encoder.encode([second])[0]
    assert [label for label in row.labels if label != -100] == [label for label in alone.labels if label != -100]
    assert prompted(second, [first], "New.").messages[0] == {"role": "system", "content": "New."}
    merged = prompted(second, [first], "New.", merge_system=True)
    assert merged.messages[0] == {"role": "user", "content": "New.\n\n1+1?"}
    assert second.messages[0]["content"] == "Be brief."


def test_tools_of_examples_are_offered_behind_the_questions_own(tmp_path):
    tool = {"type": "function", "function": {"name": "add"}}
    other = {"type": "function", "function": {"name": "mail"}}
    asked = read_chats(str(write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")])))[0]
    found = prompted(asked._replace(tools=[tool]), [asked._replace(tools=[other, tool])], None)
    assert {one["function"]["name"] for one in found.tools} == {"add", "mail"}
    assert prompted(asked, [asked], None).tools is None


def test_each_baseline_that_was_asked_for(encoder, tmp_path, capsys):
    chats = read_chats(str(write_jsonl(tmp_path / "test.jsonl", ASKED)))
    record = record_of(tmp_path, ROWS)
    assert prompts_of(record, encoder, chats, 0, None, None) == ({}, {})
    found, said = prompts_of(record, encoder, chats, 2, "Answer in JSON.", None)
    assert list(found) == ["system", "shots", "system_shots"]
    assert [len(one[0].messages) for one in found.values()] == [3, 6, 7]
    assert said["system"] == "Answer in JSON."
    assert len(said["examples"]) == 2
    assert list(prompts_of(record, encoder, chats, 0, "Answer.", None)[0]) == ["system"]
    assert list(prompts_of(record, encoder, chats, 2, None, None)[0]) == ["shots"]


def test_a_template_without_a_system_role_gets_the_message_in_the_first_user_turn(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}<|im_start|>{{ m.content }}|{% endif %}{% endfor %}"
    )
    chats = read_chats(str(write_jsonl(tmp_path / "test.jsonl", ASKED)))
    found, _ = prompts_of(record_of(tmp_path, ROWS), Encoder(tokenizer, escape=True), chats, 0, "Be brief.", None)
    assert found["system"][0].messages[0]["content"].startswith("Be brief.\n\n")
    assert "put into the first user turn" in capsys.readouterr().out


def test_a_system_message_is_words_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "system.txt").write_text("From a file.\n")
    assert read_system("system.txt") == "From a file."
    assert read_system("Answer briefly.") == "Answer briefly."
    assert read_system(None) is None
    for text, message in {"gone.txt": "there is no such file", "": "is empty"}.items():
        with pytest.raises(UserError, match=message):
            read_system(text)


def test_train_rows_that_were_changed_since_are_told(encoder, tmp_path, capsys):
    record = record_of(tmp_path, ROWS)
    record["data_sha256"] = {record["data"]["train"]: "0" * 64}
    chats = read_chats(str(write_jsonl(tmp_path / "test.jsonl", ASKED)))
    choose_examples(record, encoder, chats, 1, None, None)
    assert "was changed since the run" in capsys.readouterr().out
