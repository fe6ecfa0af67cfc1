"""The templates in configs/chat_templates: text and ids of the originals, loss marks on the answers and nothing else.

Qwen2 is held against its published template, Mistral-7B against mistral-common, through tokenizers built from the
sentencepiece files that come with it.
"""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer, ValidationMode
from mistral_tokenizers import (
    V1_FILE,
    V3_FILE,
    mistral_v1_legacy_tokenizer,
    mistral_v1_tokenizer,
    mistral_v3_tokenizer,
)
from sentencepiece import SentencePieceProcessor
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = Path(__file__).parents[1] / "configs" / "chat_templates"

# chat_template in the tokenizer_config.json of Qwen2-7B and Qwen2-7B-Instruct.
PUBLISHED_QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MISTRAL = {"v1": (mistral_v1_tokenizer, V1_FILE), "v3": (mistral_v3_tokenizer, V3_FILE)}
ALL = ["qwen2", "mistral_v1", "mistral_v3"]

# What has gone wrong in chat templates before: blanks that are stripped, doubled or merged, and text that is no ASCII.
NASTY = [
    "Hello",
    "Yes. ",
    "No.   ",
    " leading",
    "    four leading",
    "\n",
    "\n\nnew\nlines\n",
    "ends with a newline \n",
    "\ttab\t",
    "a  b   c" + " " * 17 + "d",
    " " * 33,
    "x" + " " * 15,
    "no\u00a0break\u2003em\u3000wide\u200bzero ",
    "🦙 👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 é ﬁ Å",
    "日本語のテキスト。",
    "مرحبا بالعالم",
    "▁underlines▁like sentencepiece's ▁",
    "\x00 nul \ufeff bom \ufffd",
    "{{ bos_token }} {% raw %} {# no #}",
    "<0x0A> [ INST ] [/ INST]",
    "[REFERENCE_DOC_3] and [REFERENCE_DOC_12] ",
    "<|im_start|>",
    "a]",
    "]",
]
NASTY_CONTENT = st.sampled_from(NASTY)
BLANK_MIXES = st.lists(st.sampled_from([" ", "  ", "\n", "\t", "a", "I", ".", "▁", "\r\n", "é", "🦙"])).map("".join)
TEXTS = st.one_of(NASTY_CONTENT, st.text(max_size=30), BLANK_MIXES)
ANSWERS = TEXTS.filter(bool)

quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def conversation(turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


CONVERSATIONS = st.builds(
    conversation, st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4), st.one_of(st.none(), TEXTS)
)


@cache
def template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def render(chat_template, messages, **options):
    options = {"bos_token": "<s>", "eos_token": "</s>"} | options
    return render_jinja_template([messages], chat_template=chat_template, **options)[0][0]


def marked(name, messages):
    """The pieces of the rendered text that are trained on, and the pieces of text around them (one more)."""
    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=template(name),
        bos_token="<s>",
        eos_token="</s>",
        return_assistant_tokens_mask=True,
    )
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[start:end] for start, end in spans], [
        text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def ids(version, messages, **options):
    tokenizer = MISTRAL[version][0]()
    return tokenizer.apply_chat_template(
        messages, chat_template=template(f"mistral_{version}"), tokenize=True, return_dict=False, **options
    )


@cache
def reference(version, mode):
    return MistralTokenizer.from_file(MISTRAL[version][1], mode=mode)


def reference_ids(version, messages, mode=ValidationMode.finetuning):
    return reference(version, mode).encode_chat_completion(ChatCompletionRequest(messages=messages, model="any")).tokens


def prompts(messages):
    """For every answer, the messages that inference was given."""
    return [messages[:end] for end, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.mark.parametrize("version", MISTRAL)
def test_the_rebuilt_tokenizer_encodes_as_sentencepiece_does(version):
    build, file = MISTRAL[version]
    sentencepiece = SentencePieceProcessor(model_file=str(file))

    def check(text):
        # Text at the very start gets its blank from the Metaspace rule, which adds none before a blank: start with x.
        assert build().encode("x" + text, add_special_tokens=False) == sentencepiece.encode("x" + text)

    for text in NASTY + [" " * length + end for length in range(70) for end in ("", "a", "\n")]:
        check(text)
    quick(given(TEXTS)(check))()


@pytest.mark.parametrize("version", MISTRAL)
def test_the_rebuilt_tokenizer_has_the_special_tokens_of_the_original(version):
    tokenizer = MISTRAL[version][0]()
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer("Hi  there\n 🦙 ")["input_ids"], skip_special_tokens=True) == "Hi  there\n 🦙 "
    assert len(tokenizer) == {"v1": 32000, "v3": 32768}[version]
    assert len(tokenizer.tokenize("[INST]")) == {"v1": 3, "v3": 1}[version]


@quick
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=6), st.booleans())
def test_qwen2_renders_every_conversation_as_the_published_template_does(turns, add_generation_prompt):
    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"add_generation_prompt": add_generation_prompt}
    assert render(template("qwen2"), messages, **options) == render(PUBLISHED_QWEN2, messages, **options)


@pytest.mark.parametrize("version", MISTRAL)
@quick
@given(CONVERSATIONS)
def test_mistral_training_rows_have_mistral_commons_finetuning_ids(version, messages):
    assert ids(version, messages) == reference_ids(version, messages)


@pytest.mark.parametrize("system", [None, "", "Be brief.", " Be brief. \n"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("version", MISTRAL)
def test_mistral_training_rows_have_mistral_commons_ids_on_every_nasty_text(version, turns, system):
    for start in range(len(NASTY)):
        texts = [NASTY[(start + step) % len(NASTY)] for step in range(2 * turns)]
        messages = conversation(list(zip(texts[::2], texts[1::2], strict=True)), system)
        assert ids(version, messages) == reference_ids(version, messages)


@pytest.mark.parametrize("version", MISTRAL)
@quick
@given(CONVERSATIONS, TEXTS)
def test_mistral_inference_prompts_have_mistral_commons_serving_ids(version, messages, question):
    for history in (messages, [m for m in messages if m["role"] == "system"]):
        prompt = [*history, {"role": "user", "content": question}]
        expected = reference_ids(version, prompt, ValidationMode.serving)
        assert ids(version, prompt, add_generation_prompt=True) == expected
        assert ids(version, prompt) == expected  # the prompt ends at [/INST]: there is nothing to add


@pytest.mark.parametrize("version", MISTRAL)
@pytest.mark.parametrize("question", ["", " "])
def test_mistral_accepts_an_empty_user_message_as_mistral_common_does(version, question):
    for system in (None, "Be brief."):
        messages = conversation([(question, "Yes?"), (question, "Still here.")], system)
        assert ids(version, messages) == reference_ids(version, messages)


@quick
@given(CONVERSATIONS)
def test_every_answer_in_a_qwen2_row_follows_its_inference_prompt(messages):
    row = render(template("qwen2"), messages)
    for prompt in prompts(messages):
        assert row.startswith(render(template("qwen2"), prompt, add_generation_prompt=True))


@quick
@given(CONVERSATIONS)
def test_every_answer_in_a_mistral_v1_row_follows_its_inference_prompt(messages):
    row = ids("v1", messages)
    for prompt in prompts(messages):
        expected = reference_ids("v1", prompt, ValidationMode.serving)
        assert row[: len(expected)] == expected


@quick
@given(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4))
def test_every_answer_in_a_mistral_v3_row_without_a_system_message_follows_its_inference_prompt(turns):
    messages = conversation(turns)
    row = ids("v3", messages)
    for prompt in prompts(messages):
        expected = reference_ids("v3", prompt, ValidationMode.serving)
        assert row[: len(expected)] == expected


@quick
@given(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4), ANSWERS)
def test_with_a_system_message_only_the_last_answer_in_a_mistral_v3_row_follows_its_inference_prompt(turns, system):
    messages = conversation(turns, system)
    row = ids("v3", messages)
    *earlier, last = [reference_ids("v3", prompt, ValidationMode.serving) for prompt in prompts(messages)]
    assert row[: len(last)] == last
    for expected in earlier:
        assert row[: len(expected)] != expected


def answers(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


@quick
@given(CONVERSATIONS)
def test_qwen2_marks_each_answer_and_its_end_token_without_header_and_newlines(messages):
    trained, around = marked("qwen2", messages)
    assert trained == [answer + "<|im_end|>" for answer in answers(messages)]
    assert all(text.endswith("<|im_start|>assistant\n") for text in around[:-1])
    assert all(text.startswith("\n") for text in around[1:])


@quick
@given(CONVERSATIONS)
def test_mistral_v1_marks_each_answer_with_its_leading_blank_and_its_end_token(messages):
    trained, around = marked("mistral_v1", messages)
    assert trained == [" " + answer + "</s>" for answer in answers(messages)]
    assert all(text.endswith(" [/INST]") for text in around[:-1])
    assert all(text.startswith(" [INST] ") for text in around[1:-1])
    assert around[-1] == ""


@quick
@given(CONVERSATIONS)
def test_mistral_v3_marks_each_answer_with_its_leading_blank_and_its_end_token(messages):
    trained, around = marked("mistral_v3", messages)
    stripped = [answer.rstrip(" ") for answer in answers(messages)]
    assert trained == [(" " + answer if answer else "") + "</s>" for answer in stripped]
    assert all(text.endswith("[/INST]") for text in around[:-1])
    assert all(text.startswith("[INST]") for text in around[1:-1])
    assert around[-1] == ""


@pytest.mark.parametrize("version", MISTRAL)
@quick
@given(CONVERSATIONS)
def test_the_marked_mistral_tokens_are_the_ids_of_the_answers(version, messages):
    tokenizer = MISTRAL[version][0]()
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template(f"mistral_{version}"), return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    sentencepiece = SentencePieceProcessor(model_file=str(MISTRAL[version][1]))
    expected = []
    for answer in answers(messages):
        expected += [*sentencepiece.encode(answer.rstrip(" ") if version == "v3" else answer), tokenizer.eos_token_id]
    assert trained == expected


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "42"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, TOOL], "message 2 has the role 'tool'.*rewrite it"),
        ([{"role": "developer", "content": "x"}, USER], "message 1 has the role 'developer'.*rewrite it"),
        ([USER, {"content": "no role"}], "message 2 has the role ''.*rewrite it"),
        ([USER, CALL], "message 2 has tool calls.*write them into its content"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER], "message 1 .*must be a string"),
        ([USER, {"role": "assistant", "content": None}], "message 2 .*must be a string"),
        ([{"role": "system"}, USER, ANSWER], "message 1 .*must be a string"),
    ],
)
def test_every_template_refuses_what_it_would_have_to_drop_and_names_the_message(name, messages, said):
    with pytest.raises(TemplateError, match=said):
        render(template(name), messages)


@pytest.mark.parametrize("name", ALL)
def test_every_template_refuses_a_list_of_tools(name):
    with pytest.raises(TemplateError, match="leave the list of tools out"):
        render(template(name), [USER, ANSWER], tools=[{"type": "function", "function": {"name": "add"}}])


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3"])
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no user message: add one"),
        ([SYSTEM], "no user message: add one"),
        ([ANSWER], "message 1 has the role 'assistant' where 'user' is due.*user begins"),
        ([SYSTEM, ANSWER], "message 2 has the role 'assistant' where 'user' is due"),
        ([USER, USER, ANSWER], "message 2 has the role 'user' where 'assistant' is due.*Join neighbours"),
        ([SYSTEM, USER, ANSWER, ANSWER], "message 4 has the role 'assistant' where 'user' is due"),
        ([USER, ANSWER, SYSTEM, USER, ANSWER], "message 3 is a system message.*move its text"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "message 2 is a system message.*move its text"),
        ([USER, {"role": "assistant", "content": ""}], "message 2 is an empty answer.*fill it in"),
    ],
)
def test_mistral_refuses_an_order_that_it_cannot_write_and_names_the_message(name, messages, said):
    with pytest.raises(TemplateError, match=said):
        render(template(name), messages)


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3"])
def test_mistral_refuses_a_prompt_that_ends_with_an_answer(name):
    with pytest.raises(TemplateError, match="already ends with an answer: remove it"):
        render(template(name), [USER, ANSWER], add_generation_prompt=True)


@pytest.mark.parametrize(("version", "typed"), [("v1", "</s>"), ("v1", "<s>"), ("v3", "</s>"), ("v3", "[INST]")])
def test_known_difference_a_control_token_typed_by_a_user_becomes_a_real_one(version, typed):
    messages = conversation([(f"What does {typed} mean?", "It is a mark.")])
    token = MISTRAL[version][0]().convert_tokens_to_ids(typed)
    assert ids(version, messages).count(token) == reference_ids(version, messages).count(token) + 1


def test_known_difference_a_tokenizer_with_legacy_blanks_has_one_too_many_before_each_inst():
    messages = conversation([("Hi", "Hello"), ("More?", "Yes.")])
    legacy = mistral_v1_legacy_tokenizer()
    encoded = legacy.apply_chat_template(messages, chat_template=template("mistral_v1"), return_dict=False)
    expected = reference_ids("v1", messages)
    blank = legacy.convert_tokens_to_ids("▁")
    second_turn = expected.index(legacy.eos_token_id) + 1
    assert encoded == [expected[0], blank, *expected[1:second_turn], blank, *expected[second_turn:]]
