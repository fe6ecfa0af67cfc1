"""Which template is chosen and why; exactly the answers and their end-of-turn tokens carry loss."""

import copy
import re
import subprocess
import sys

import pytest
import trl.chat_template_utils as trl_templates
from conftest import DATA, chat
from families import FAMILIES, PUBLISHED_QWEN2, qwen_tokenizer, trained_texts, with_template
from jinja2 import TemplateError
from mistral_tokenizers import mistral_v1_legacy_tokenizer, mistral_v1_tokenizer, mistral_v3_tokenizer

import recipes.utils.data.template as template_module
from recipes.utils.console import UserError
from recipes.utils.data import Chat, Encoder, load_tokenizer, read_chats
from recipes.utils.data.template import TEMPLATES, choose_chat_template, marks_answers, render

# What Hugging Face's templates for Mistral do, in short: v0.3 puts the system message into a last user turn that ends
# the conversation, and loses it from a finished one; v0.1 refuses it.
HF_MISTRAL_V3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (messages[0]['content'] + '\n\n' if loop.last and messages[0]['role'] == 'system' else '')"
    " + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HF_MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
)


CHATS = {
    "one turn": chat("2+2?", "It is 4."),
    "three turns": chat("2+2?", "4", "And\n3+3?", "6\n\nindeed", "Sure?", "Yes, 6 🙂"),
    "system": chat("2+2?", "4", system="Be brief."),
    "answer begins with a newline": chat("List", "\n- a\n- b"),
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_decode_to_the_answers_and_their_end_of_turn_token_turn_by_turn(family, name):
    make, end = FAMILIES[family]
    tokenizer = make()
    encoded = Encoder(tokenizer).encode([Chat(CHATS[name]["messages"], "f:1")])[0]
    answers = [message["content"] + end for message in CHATS[name]["messages"] if message["role"] == "assistant"]
    assert [text.removeprefix(" ") for text in trained_texts(tokenizer, encoded)] == answers


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_row_begins_with_the_ids_that_inference_sends(family, name):
    tokenizer = FAMILIES[family][0]()
    messages = CHATS[name]["messages"]
    encoder = Encoder(tokenizer)
    encoded = encoder.encode([Chat(messages, "f:1")])[0]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encoder.prompt_ids(messages[:index])
            served = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, return_dict=False)
            assert encoded.input_ids[: len(prompt)] == prompt == served
            assert encoded.labels[len(prompt)] != -100


@pytest.mark.parametrize("family", ["mistral v1", "mistral v3"])
def test_tokenising_piece_by_piece_gives_the_ids_of_the_whole_text(family):
    tokenizer = FAMILIES[family][0]()
    for row in CHATS.values():
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert Encoder(tokenizer).encode([Chat(row["messages"], "f:1")])[0].input_ids == whole


def test_mistral_v3_with_a_system_message_is_split_into_one_row_an_answer():
    """In one row, the first answer would follow a prompt that inference never sends: without the system message."""
    tokenizer = FAMILIES["mistral v3"][0]()
    row = chat("2+2?", "4", "3+3?", "6", system="Be brief.")
    rows = Encoder(tokenizer).encode([Chat(row["messages"], "f:1")])
    assert sorted(trained_texts(tokenizer, encoded)[0].removeprefix(" ") for encoded in rows) == ["4</s>", "6</s>"]
    for encoded, end in zip(sorted(rows, key=lambda row: len(row.input_ids)), (2, 4), strict=True):
        prompt = Encoder(tokenizer).prompt_ids(row["messages"][:end])
        assert encoded.input_ids[: len(prompt)] == prompt
    assert len(Encoder(tokenizer).encode([Chat(row["messages"], "f:1")], train_on="last")) == 1


TRL_TEMPLATES = {
    "Qwen2.5": (trl_templates.qwen2_5_chat_template, (), "<|im_end|>"),
    "Qwen3": (trl_templates.qwen3_chat_template, ("<think>", "</think>"), "<|im_end|>"),
    "Llama 3": (
        trl_templates.llama3_chat_template,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
}


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_models_that_trl_knows_are_trained_by_its_templates_on_the_answers_alone(name):
    template, special_tokens, end = TRL_TEMPLATES[name]
    tokenizer = qwen_tokenizer(template, *special_tokens)
    if name == "Llama 3":
        tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template, reason = choose_chat_template(tokenizer, "auto", "llama")
    assert "TRL" in reason
    row = CHATS["three turns"]
    encoded = Encoder(tokenizer).encode([Chat(row["messages"], "f:1")])[0]
    answers = [message["content"] + end for message in row["messages"] if message["role"] == "assistant"]
    thinking = "<think>\n\n</think>\n\n"  # Qwen3's template opens the last answer with an empty thought
    assert [text.removeprefix(thinking) for text in trained_texts(tokenizer, encoded)] == answers
    assert Encoder(tokenizer).stop_ids[0] == tokenizer.convert_tokens_to_ids(end)


SHIPPED = {
    name: text
    for name, text in vars(trl_templates).items()
    if name.endswith("_chat_template") and isinstance(text, str)
}


@pytest.mark.parametrize("make", [qwen_tokenizer, mistral_v1_tokenizer, mistral_v3_tokenizer])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_text_that_trl_ships_is_trained_as_trl_has_it(name, make):
    """Qwen2.5-VL's too, whose conversations without an image are Qwen2's."""
    tokenizer = published(make(), SHIPPED[name])
    if marks_answers(SHIPPED[name]):
        assert choose_chat_template(tokenizer, "auto", "qwen2")[0] == SHIPPED[name]
    elif twin := SHIPPED.get(name.replace("_chat_template", "_training_chat_template")):
        assert choose_chat_template(tokenizer, "auto", "qwen2") == (twin, "TRL's training twin of the model's own")
    else:
        with pytest.raises(UserError, match="no known one renders the same text"):
            choose_chat_template(tokenizer, "auto", "qwen2")


def test_trl_is_not_imported_for_a_text_that_is_none_of_its_own(tmp_path):
    qwen_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    code = (
        "import sys; from pathlib import Path; from recipes.utils.data import read_tokenizer\n"
        "print(read_tokenizer(Path(sys.argv[1]))[1], 'trl' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=TEMPLATES.parents[1], capture_output=True, text=True
    )
    assert done.stdout.strip() == "qwen2: the text of the model's own, with answers marked False False", done.stderr


def test_auto_takes_a_template_that_marks_the_answers_as_it_is():
    tokenizer = with_template(qwen_tokenizer(), "qwen2")
    template, reason = choose_chat_template(tokenizer, "auto", "qwen2")
    assert template == tokenizer.chat_template
    assert "own" in reason


@pytest.mark.parametrize(
    ("tokenizer", "model_type", "chosen"),
    [
        (lambda: qwen_tokenizer(), "qwen2", "qwen2"),
        (lambda: qwen_tokenizer(None), "qwen2", "qwen2"),
        (lambda: mistral_v1_tokenizer(), "mistral", "mistral_v1"),
        (lambda: mistral_v3_tokenizer(), "mistral", "mistral_v3"),
        (lambda: published(mistral_v1_tokenizer(), HF_MISTRAL_V1), "mistral", "mistral_v1"),
        (lambda: published(mistral_v3_tokenizer(), HF_MISTRAL_V3), "mistral", "mistral_v3"),
    ],
    ids=["qwen2", "qwen2 without", "v0.1 without", "v0.3 without", "v0.1 published", "v0.3 published"],
)
def test_auto_takes_this_projects_template_where_the_text_is_the_models_own(tokenizer, model_type, chosen):
    template, reason = choose_chat_template(tokenizer(), "auto", model_type)
    assert template == (TEMPLATES / f"{chosen}.jinja").read_text()
    assert chosen.split("_")[0] in reason


def published(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: published(mistral_v1_tokenizer(), ZEPHYR),
        lambda: qwen_tokenizer(PUBLISHED_QWEN2.replace("You are a helpful assistant.", "You are Qwen.")),
    ],
    ids=["zephyr", "another default system line"],
)
def test_auto_refuses_a_template_whose_text_no_known_one_renders(tokenizer):
    with pytest.raises(UserError, match=r"\{% generation %\}"):
        choose_chat_template(tokenizer(), "auto", "mistral")


def test_a_template_asked_for_by_name_or_path_is_taken(tmp_path):
    tokenizer = qwen_tokenizer()
    own = tmp_path / "mine.jinja"
    own.write_text((TEMPLATES / "qwen2.jinja").read_text() + "{# mine #}")
    assert choose_chat_template(tokenizer, str(own), "qwen2")[0] == own.read_text()
    assert choose_chat_template(tokenizer, "mistral", "qwen2")[0] == (TEMPLATES / "mistral_v1.jinja").read_text()
    with pytest.raises(UserError, match="known: auto, mistral"):
        choose_chat_template(tokenizer, "chatml", "qwen2")
    own.write_text(ZEPHYR)
    with pytest.raises(UserError, match="marks no answers"):
        choose_chat_template(tokenizer, str(own), "qwen2")


def test_a_conversation_that_the_template_cannot_carry_is_refused_with_file_and_line():
    tokenizer = FAMILIES["mistral v3"][0]()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    with pytest.raises(UserError, match=r"^rows.jsonl:7: the chat template cannot carry this conversation: message 2"):
        Encoder(tokenizer).encode([Chat(messages, "rows.jsonl:7")])


def test_the_legacy_blanks_of_old_mistral_tokenizers_are_mended_and_said(tmp_path, capsys, mistral_twin):
    legacy = copy.deepcopy(mistral_v1_legacy_tokenizer())
    legacy.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((mistral_twin / "config.json").read_text())
    tokenizer = load_tokenizer(tmp_path)
    assert "blank" in capsys.readouterr().out
    reference = FAMILIES["mistral v1"][0]()
    for row in CHATS.values():
        rows = [Chat(row["messages"], "f:1")]
        assert Encoder(tokenizer).encode(rows)[0].input_ids == Encoder(reference).encode(rows)[0].input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_real_answers_are_what_is_trained(family):
    make, end = FAMILIES[family]
    tokenizer = make()
    chats = read_chats(str(DATA / "alpaca_validation.jsonl"))
    for row, encoded in zip(chats, Encoder(tokenizer).encode(chats), strict=True):
        expected = row.messages[-1]["content"]
        expected = expected.rstrip(" ") if family == "mistral v3" else expected
        assert [text.removeprefix(" ") for text in trained_texts(tokenizer, encoded)] == [
            expected.removeprefix(" ") + end
        ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages[9]['role'] + 'a' }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ 'a' * 10 ** 18 }}", "MemoryError|OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_whatever_a_template_raises_is_an_error_of_the_template_in_bounded_time(template, said, monkeypatch):
    monkeypatch.setattr(template_module, "SECONDS", 0.3)
    with pytest.raises(TemplateError) as error:
        render(qwen_tokenizer(), [{"role": "user", "content": "a"}], template=template)
    assert re.search(said, str(error.value))
