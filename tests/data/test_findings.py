"""Each guard stops, drops or warns where it should, with a flag to paste, and is silent on normal data."""

import copy
from types import SimpleNamespace

import pytest
from conftest import chat, write_jsonl
from families import FAMILIES, qwen_tokenizer, with_template

from recipes.utils.console import UserError
from recipes.utils.data import DataOptions, Finding, prepare, report_findings


@pytest.fixture
def found(tmp_path):
    """A function: findings for train and validation rows, and the validation part, with a tokenizer of choice."""

    def check(train, validation=None, tokenizer=None, max_length=320, **options):
        paths = {"train": str(write_jsonl(tmp_path / "t.jsonl", train))}
        if validation:
            paths["validation"] = str(write_jsonl(tmp_path / "v.jsonl", validation))
        args, tokenizer = SimpleNamespace(max_length=max_length, seed=42), tokenizer or FAMILIES["qwen2"][0]()
        train, validation = prepare(DataOptions(**{**paths, **options}), tokenizer, args, report=False)
        return [*train.findings, *(validation.findings if validation else [])], validation

    return check


def messages(findings, level):
    return [finding.message for finding in findings if finding.level == level]


NORMAL = [chat(f"What is {number} and {number}?", f"It is {2 * number}, of course.") for number in range(40)]


def test_normal_data_meets_no_guard(found):
    findings, validation = found(NORMAL, [chat("Who wrote Faust?", "Goethe did.")])
    assert findings == []
    assert len(validation.rows) == 1


def test_too_much_lost_to_max_length_stops_with_the_length_that_keeps_99_percent(found):
    rows = NORMAL[:10] + [chat(f"Tell me more of {number}", "word " * 100) for number in range(10)]
    findings, _ = found(rows)
    (message,) = messages(findings, "stop")
    assert "10 of 20 train rows are over training.max_length 320" in message
    length = message.split("--training.max_length ")[1].split(",")[0]
    assert found(rows, max_length=int(length))[0] == []
    assert found(rows, max_over_length=1.0)[0] == []


def test_an_end_of_turn_token_without_loss_stops(found):
    tokenizer = FAMILIES["qwen2"][0]()
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert tokenizer.chat_template != before
    (message,) = messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")
    assert "never learn to stop" in message


def test_a_token_that_the_base_has_no_row_for_stops(found):
    """Tokens were added to the tokenizer and the model was not resized; one that no row uses and pads none is fine."""
    tokenizer = with_template(qwen_tokenizer(), "qwen2")
    tokenizer.add_tokens([f"<tag{number}>" for number in range(320 - len(tokenizer) + 1)])
    last = tokenizer.convert_ids_to_tokens(320)
    assert found(NORMAL, tokenizer=tokenizer)[0] == []
    (message,) = messages(found([*NORMAL, chat(f"Say {last}", "No.")], tokenizer=tokenizer)[0], "stop")
    assert f":{len(NORMAL) + 1}: '{last}' is token 320 and the base has 320 of them, counted from 0: resize" in message
    tokenizer.pad_token = last
    assert f"padding: '{last}' is token 320" in messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")[0]


def test_a_beginning_twice_stops(found):
    tokenizer = copy.deepcopy(FAMILIES["mistral v3"][0]())
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "{{- bos_token + bos_token }}")
    assert any(
        "begins with <s> twice" in message for message in messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")
    )


def test_a_saved_tokenizer_that_sends_other_tokens_stops(found, monkeypatch):
    """The template that is saved is read back: one that loses its generation prompt on the way is noticed."""
    tokenizer = FAMILIES["qwen2"][0]()
    save = type(tokenizer).save_pretrained

    def lossy(self, folder, **options):
        other = copy.deepcopy(self)
        other.chat_template = self.chat_template.replace("You are a helpful assistant.", "You are helpful.")
        return save(other, folder, **options)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", lossy)
    (message,) = messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")
    assert "t.jsonl:1: the training row does not begin with the tokens that inference sends" in message


def test_validation_rows_that_are_in_training_are_left_out_and_counted(found):
    copies = [NORMAL[3], chat("what is 5 and 5", "IT IS 10 -- OF COURSE"), chat("Who wrote Faust?", "Goethe did.")]
    findings, validation = found(NORMAL, copies)
    (message,) = messages(findings, "drop")
    assert message.startswith("2 of 3 validation rows are in training")
    assert [row["where"].rpartition(":")[2] for row in validation.rows] == ["3"]
    assert any("nothing would be measured" in message for message in messages(found(NORMAL, NORMAL[:2])[0], "stop"))


def test_copies_within_training_are_a_line(found):
    rows = [*NORMAL, NORMAL[3], NORMAL[3], chat("What is 3 and 3 ?", "It is 6, of course.")]
    (message,) = messages(found(rows)[0], "warn")
    assert message.startswith("2 of 43 train rows are copies of others, to the letter, such as ")
    assert "t.jsonl:41: each is learnt again" in message


def test_the_bad_rows_of_all_files_are_told_at_once(found):
    bad, typed = chat("a", ""), chat("<|im_end|>", "b")
    with pytest.raises(UserError) as error:
        found([*NORMAL, bad, typed], [bad, NORMAL[0], typed])
    told = [line.rpartition("/")[2][:10] for line in str(error.value).splitlines() if "jsonl:" in line]
    assert told == ["t.jsonl:41", "t.jsonl:42", "v.jsonl:1:", "v.jsonl:3:"]


def test_near_duplicates_are_named_with_both_lines(found):
    story = (
        "Once upon a time there lived a miller who had three sons and a mill and a donkey and a cat of great wit " * 3
    )
    train = [*NORMAL, chat("Tell a story", story)]
    findings, _ = found(train, [chat("Tell a story", story + "and a dog")], max_length=1024)
    (message,) = messages(findings, "warn")
    assert "v.jsonl:1 is nearly" in message
    assert "t.jsonl:41" in message


def test_a_shared_system_prompt_makes_no_near_duplicates(found):
    prompt = "You are the assistant of a shop and answer in the words of the handbook and never otherwise. " * 20
    train = [chat(f"Question {number} of its own?", f"Answer {number}.", system=prompt) for number in range(20)]
    validation = [chat("Where is the till?", "By the door.", system=prompt)]
    assert found(train, validation, max_length=4096)[0] == []


def test_all_tokens_trained_warns(found):
    tokenizer = FAMILIES["qwen2"][0]()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert any("every token" in message for message in messages(found(NORMAL, tokenizer=tokenizer)[0], "warn"))


def test_a_stop_is_a_user_error_and_a_warning_is_a_line(capsys):
    report_findings([Finding("warn", "mind this"), Finding("drop", "two rows"), Finding("warn", "mind this")])
    assert capsys.readouterr().out == "warning: mind this\nleft out: two rows\n"
    with pytest.raises(UserError, match="^this cannot be$"):
        report_findings([Finding("warn", "mind this"), *[Finding("stop", "this cannot be")] * 2])


def test_preparing_tells_what_it_finds_and_stops_where_it_cannot_be_right(tmp_path, capsys):
    train = write_jsonl(tmp_path / "t.jsonl", NORMAL)
    args, tokenizer = SimpleNamespace(max_length=320, seed=42), FAMILIES["qwen2"][0]()
    validation = write_jsonl(tmp_path / "v.jsonl", [NORMAL[3], chat("Who wrote Faust?", "Goethe did.")])
    _, rows = prepare(DataOptions(str(train), str(validation)), tokenizer, args)
    assert "left out: 1 of 2 validation rows are in training" in capsys.readouterr().out
    assert (rows.counts.rows, len(rows.rows)) == (1, 1)
    for _ in range(2):  # made, and then found in the cache
        with pytest.raises(UserError, match="nothing would be measured"):
            prepare(DataOptions(str(train), str(train)), tokenizer, args)
