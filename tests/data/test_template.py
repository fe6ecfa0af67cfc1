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
from twins import CHATML, NEMO, SMOLLM3, VICUNA, ZEPHYR, shipped, tokenizer_for
from twins import SHIPPED as SHIPPED_BY_TRL

import recipes.utils.data.template as template_module
from recipes.utils.console import UserError
from recipes.utils.data import Chat, Encoder, load_tokenizer, read_chats
from recipes.utils.data.template import TEMPLATES, choose_chat_template, render

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
    assert trained_texts(tokenizer, encoded) == answers
    assert Encoder(tokenizer).stop_ids[0] == tokenizer.convert_tokens_to_ids(end)


# Control tokens as TRL's texts name them.
CONTROL = re.compile(
    r"<\|[^|>{}' ]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_(?:turn|utterance|image)>|<bos>|</s>|<turn\|>|<\|turn>"
)
ENDS = ("<|return|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<｜end▁of▁sentence｜>", "<|eot|>",
        "<|END_OF_TURN_TOKEN|>", "<|im_end|>", "<end_of_utterance>", "<|endoftext|>", "<|user|>", "</s>")  # fmt: skip
STARTS = ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<BOS_TOKEN>", None)
SHIPPED = sorted(SHIPPED_BY_TRL.glob("*.jinja"))
REFUSED = {  # what TRL ships and is not trained here, and why: texts of models that see, and one whose thoughts are cut
    "deepseekv3": "does not follow the prompt that inference sends, ...", "idefics3": "content as a list of parts",
    "llava_next": "does not take messages as plain text", "smolvlm": "content as a list of parts",
}  # fmt: skip


def tokenizer_of(template):
    special = sorted({*CONTROL.findall(template)} - {"<|endoftext|>"})
    end = next((token for token in ENDS if token in template), "<|im_end|>")
    bos = next(token for token in STARTS if token is None or token in template)
    return tokenizer_for(template, end, special, ["<think>", "</think>"], bos)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_template_that_trl_ships_is_trained_exactly_or_refused_with_its_reason(path):
    template, name = path.read_text(encoding="utf-8"), path.stem.removesuffix("_training")
    tokenizer = tokenizer_of(template)
    if name in REFUSED:
        with pytest.raises(UserError, match=re.escape(REFUSED[name])):
            choose_chat_template(tokenizer, "auto", "any")
        return
    tokenizer.chat_template, reason = choose_chat_template(tokenizer, "auto", "any")
    print(f"{path.stem}: {reason}")
    messages = chat("2+2?", "It is 4", "And\n3+3?", "6\n\nindeed", "Sure?", "Yes 🙂")["messages"]
    encoder, learnt = Encoder(tokenizer, think="drop"), []  # the thoughts of test_thoughts.py aside
    prompts = [encoder.prompt_ids(messages[:place]) for place in (1, 3, 5)]
    for row in encoder.encode([Chat(messages, "f:1")]):
        starts = [place for place, label in enumerate(row.labels) if label != -100 and row.labels[place - 1] == -100]
        assert all(row.input_ids[:start] in prompts for start in starts)
        assert row.stops
        ends = [label for label, then in zip(row.labels, [*row.labels[1:], -100], strict=True) if then == -100 != label]
        assert len(ends) == len(starts)
        assert set(ends) <= {*encoder.stop_ids}
        learnt += trained_texts(tokenizer, row)
    for answer in ("It is 4", "6\n\nindeed", "Yes 🙂"):
        (text,) = [text for text in learnt if answer in text]
        before, _, after = text.partition(answer)
        assert not before.strip() or (before.startswith(("<", " to=user")) and "think" not in before)  # channels
        assert re.search("|".join(map(re.escape, encoder.control_tokens)), after)
        assert "\n" not in after


TOOL = {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("gptoss", ["<|return|>", "<|call|>"]),
        ("glm4moe", ["<|user|>", "<|observation|>"]),
        ("llama3_1", ["<|eot_id|>"]),
        ("gemma", ["<end_of_turn>"]),
    ],
)
def test_each_id_that_ends_an_answer_or_a_call_stops_the_model(name, stops):
    """gpt-oss ends an answer with `<|return|>`, an earlier one with `<|end|>`, as it ends a thought: such an answer has
    a row of its own, where it ends as inference stops."""
    tokenizer = tokenizer_of(shipped(name))
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "any")
    encoder = Encoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids) == stops
    rows = encoder.encode([Chat(CHATS["three turns"]["messages"], "f:1")])
    assert len(rows) == (3 if name == "gptoss" else 1)
    assert all(text.endswith(stops[0]) for row in rows for text in trained_texts(tokenizer, row))
    if name != "gemma":
        called = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
        (row,) = encoder.encode([Chat(called, "f:1", [{"type": "function", "function": TOOL}])])
        assert trained_texts(tokenizer, row)[0].endswith(stops[-1])


def test_a_twin_of_trls_comes_before_the_general_way():
    tokenizer = tokenizer_of(shipped("qwen2_5"))
    chosen = choose_chat_template(tokenizer, "auto", "qwen2")
    assert chosen == (shipped("qwen2_5_training"), "TRL's training twin of the model's own")
    # Qwen3's writes the thoughts of earlier answers, which its own leaves out.
    assert choose_chat_template(tokenizer_of(shipped("qwen3")), "auto", "qwen3")[0] == shipped("qwen3")
    # Phi-3's marks a second span for the <|endoftext|> that ends the text, so its own is taken without marks.
    template, reason = choose_chat_template(tokenizer_of(shipped("phi3")), "auto", "phi3")
    assert template == shipped("phi3")
    assert "after the prompt that inference sends" in reason


FORMS = {"chatml": CHATML, "zephyr": ZEPHYR, "vicuna": VICUNA, "nemo": NEMO, "smollm3": SMOLLM3}


@pytest.mark.parametrize("name", FORMS)
def test_published_forms_that_trl_has_not_are_trained_as_they_are_served(name):
    end = "<|im_end|>" if "<|im_end|>" in FORMS[name] else "</s>"
    tokenizer = tokenizer_for(FORMS[name], end, ["[INST]", "[/INST]"], bos="<s>")
    served = copy.deepcopy(tokenizer)
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "mistral")
    encoder, messages = Encoder(tokenizer, think="drop"), CHATS["three turns"]["messages"]
    served.chat_template = served.chat_template if name != "smollm3" else encoder.template
    (row,) = encoder.encode([Chat(messages, "f:1")])
    for place in (1, 3, 5):
        ids = served.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False)
        assert row.input_ids[: len(ids)] == ids == encoder.prompt_ids(messages[:place])
        assert row.labels[len(ids)] != -100
    answers = [messages[place]["content"] + end for place in (1, 3, 5)]
    assert [text.lstrip() for text in trained_texts(tokenizer, row)] == answers
    assert encoder.stop_ids[0] == tokenizer.convert_tokens_to_ids(end)


WRONG = {
    "in which this tokenizer has no control token": CHATML.replace("<|im_end|>", "<|stop|>"),
    "it has no generation prompt": VICUNA.partition("{% if add_generation_prompt")[0],
    "does not follow the prompt that inference sends, ...": CHATML.replace("assistant\n' }}", "assistant\nSure: ' }}"),
    "leaves out the": CHATML.replace("message['content']", "message['content'][:3]"),
    "messages as plain text": CHATML.replace("message['content']", "(message['content'] | first).text + 'x'"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_cannot_be_proven_is_refused_with_its_reason(reason):
    tokenizer = tokenizer_for(WRONG[reason], "<|im_end|>" if "im_end" in WRONG[reason] else "</s>")
    with pytest.raises(UserError, match=re.escape(reason)):
        choose_chat_template(tokenizer, "auto", "any")


def test_chatml_without_a_generation_prompt_gets_one():
    tokenizer = qwen_tokenizer(CHATML.partition("{% if add_generation_prompt")[0])
    template, reason = choose_chat_template(tokenizer, "auto", "llama")
    assert template == (TEMPLATES / "chatml.jinja").read_text()
    assert reason == "chatml: the text of the model's own, with answers marked"


def test_marks_that_leave_out_the_end_of_turn_of_the_models_own_are_not_used():
    marked = CHATML.replace(
        "+ message['content'] + '<|im_end|>'",
        "}}{% if message.role == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>'",
    )
    assert marked != CHATML
    tokenizer = qwen_tokenizer(marked)
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "llama")
    (row,) = Encoder(tokenizer).encode([Chat(CHATS["one turn"]["messages"], "f:1")])
    assert trained_texts(tokenizer, row) == ["It is 4.<|im_end|>"]


def test_a_part_of_an_answer_that_a_template_drops_is_refused_and_history_without_it_is_a_row_of_its_own():
    """R1's first template and its kin drop an answer's thought: from a last answer it would be lost without a word."""
    tokenizer = qwen_tokenizer(CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"))
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "llama")
    with pytest.raises(UserError, match="f:1: .*it leaves out a part of answer 1"):
        Encoder(tokenizer).encode([Chat(chat("2+2?", "<think>Hm.</think>4")["messages"], "f:1")])
    kept = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    tokenizer = qwen_tokenizer(CHATML.replace("message['content']", kept))
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "llama")
    answers = ["<think>\nHm.\n</think>\n\n4", "<think>\nOh.\n</think>\n\n6"]
    rows = Encoder(tokenizer).encode([Chat(chat("2+2?", answers[0], "3+3?", answers[1])["messages"], "f:1")])
    assert sorted(trained_texts(tokenizer, row)[0] for row in rows) == [f"{answer}<|im_end|>" for answer in answers]


def test_an_answer_that_opens_a_chat_is_read_and_not_learnt():
    messages = [{"role": "assistant", "content": "Hello!"}, *chat("2+2?", "4")["messages"]]
    for template in (CHATML, shipped("llama3_1"), shipped("qwen2_5")):
        tokenizer = tokenizer_of(template)
        tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "llama")
        (row,) = Encoder(tokenizer).encode([Chat(messages, "f:1")])
        (text,) = trained_texts(tokenizer, row)
        assert text.startswith("4<|")
        assert "Hello!" in tokenizer.decode(row.input_ids)
        with pytest.raises(UserError, match="the answer opens the chat, so nothing asks"):
            Encoder(tokenizer).encode([Chat(messages[:1], "f:1")])


def test_a_template_that_has_no_system_message_says_how_to_keep_its_words():
    tokenizer = tokenizer_of(shipped("gemma"))
    tokenizer.chat_template, _ = choose_chat_template(tokenizer, "auto", "gemma")
    with pytest.raises(UserError, match="f:1: .*System role not supported; --data.system merge puts it"):
        Encoder(tokenizer).encode([Chat(CHATS["system"]["messages"], "f:1")])


@pytest.mark.parametrize(
    ("name", "text"),
    [("llama3", shipped("llama3_training")), ("gemma", shipped("gemma_training")), ("phi3", shipped("phi3"))],
)
def test_a_base_is_given_a_template_of_trls_by_name(name, text):
    tokenizer = tokenizer_of(shipped(name))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="--model.chat_template chatml, one of TRL's .*llama3"):
        choose_chat_template(tokenizer, "auto", "any")
    assert choose_chat_template(tokenizer, name, "any") == (text, f"{name}, as asked for")
    if name != "phi3":  # whose text ends with the tokenizer's own EOS
        with pytest.raises(UserError, match=f"{name} does not suit this model: .*no control token"):
            choose_chat_template(mistral_v1_tokenizer(), name, "any")


def test_nemo_and_ministral_are_trained_without_the_blanks_of_sentencepiece():
    for own in (NEMO, None):
        tokenizer = tokenizer_for(own, "</s>", ["[INST]", "[/INST]"], bos="<s>")
        tokenizer.chat_template, reason = choose_chat_template(tokenizer, "auto", "mistral")
        assert reason.startswith("mistral")
        (row,) = Encoder(tokenizer).encode([Chat(CHATS["system"]["messages"], "f:1")])
        assert tokenizer.decode(row.input_ids) == "<s>[INST]Be brief.\n\n2+2?[/INST]4</s>"


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


def test_another_default_system_line_keeps_the_models_own_text():
    own = PUBLISHED_QWEN2.replace("You are a helpful assistant.", "You are Qwen.")
    template, reason = choose_chat_template(qwen_tokenizer(own), "auto", "qwen2")
    assert template == own
    assert "the model's own; an answer is what it renders" in reason


def test_a_template_asked_for_by_name_or_path_is_taken(tmp_path):
    tokenizer = qwen_tokenizer()
    own = tmp_path / "mine.jinja"
    own.write_text((TEMPLATES / "qwen2.jinja").read_text() + "{# mine #}")
    assert choose_chat_template(tokenizer, str(own), "qwen2")[0] == own.read_text()
    assert choose_chat_template(tokenizer, "mistral", "qwen2")[0] == (TEMPLATES / "mistral_v1.jinja").read_text()
    with pytest.raises(UserError, match="did you mean 'chatml'. known: auto, mistral"):
        choose_chat_template(tokenizer, "chatmll", "qwen2")
    assert choose_chat_template(tokenizer, "chatml", "qwen2")[0] == (TEMPLATES / "chatml.jinja").read_text()
    own.write_text(CHATML)
    assert choose_chat_template(tokenizer, str(own), "qwen2")[0] == CHATML
    own.write_text(CHATML.replace("<|im_end|>", "."))
    with pytest.raises(UserError, match="mine.jinja does not suit this model: .*no control token"):
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
        ("{{ messages[9]['role'] + 'a' }}", "undefined|no element 9"),
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
