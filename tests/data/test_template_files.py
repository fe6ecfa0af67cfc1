"""The templates in configs/chat_templates: text and ids of the originals, loss marks on the answers and nothing else.

Qwen2 is held against its published template, Mistral-7B against mistral-common, through tokenizers built from the
sentencepiece files that come with it.
"""

import json
from contextlib import suppress
from functools import cache

import pytest
from conftest import DATA, ROOT, read_jsonl
from families import PUBLISHED_QWEN2
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
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

from recipes.utils.data.template import choose_chat_template

TEMPLATES = ROOT / "configs" / "chat_templates"

MISTRAL = {"v1": (mistral_v1_tokenizer, V1_FILE), "v3": (mistral_v3_tokenizer, V3_FILE)}
ALL = ["qwen2", "mistral_v1", "mistral_v3"]
WITHOUT_TOOLS = ["qwen2", "mistral_v1"]

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
few = settings(quick, max_examples=40)


def conversation(turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


CONVERSATIONS = st.builds(
    conversation, st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4), st.one_of(st.none(), TEXTS)
)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
SPELLINGS = [{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}, {"separators": (" , ", "\t:\r\n")}]
JSON_TEXTS = st.builds(lambda value, spelling: json.dumps(value, **spelling), JSON, st.sampled_from(SPELLINGS))
ARGUMENTS = st.one_of(st.dictionaries(TEXTS, JSON, max_size=3), JSON_TEXTS)
NAMES = st.text("azAZ09_-", min_size=1, max_size=8)


def tool(name, description, about):
    properties = {"city": {"type": "string", "description": about}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def tool_conversation(turns, system=None):
    """Each turn is (question, steps, answer), each step a list of (function, arguments, result) called at once."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    count = 0
    for question, steps, answer in turns:
        messages.append({"role": "user", "content": question})
        for step in steps:
            calls, results = [], []
            for name, arguments, result in step:
                count += 1
                function = {"name": name, "arguments": arguments}
                calls.append({"id": f"Call{count:05}", "type": "function", "function": function})
                results.append({"role": "tool", "content": result, "tool_call_id": f"Call{count:05}", "name": name})
            messages += [{"role": "assistant", "content": None, "tool_calls": calls}, *results]
        messages.append({"role": "assistant", "content": answer})
    return messages


STEPS = st.lists(
    st.lists(st.tuples(NAMES, ARGUMENTS, st.one_of(TEXTS, JSON_TEXTS)), min_size=1, max_size=2), min_size=0, max_size=2
)
TOOL_TURNS = st.lists(st.tuples(TEXTS, STEPS, ANSWERS), min_size=1, max_size=3)
TOOL_CONVERSATIONS = st.builds(tool_conversation, TOOL_TURNS, st.one_of(st.none(), TEXTS))
TOOLS = st.lists(st.builds(tool, NAMES, TEXTS, TEXTS), max_size=2)

WEATHER = tool("weather", "Tells the weather.", "Where?")
TWO_TURNS = tool_conversation(
    [
        ("Hi", [], "Hello"),
        ("Oslo? Rome?", [[("weather", {"city": "Oslo"}, "42"), ("weather", {"city": "Rome"}, "hot")]], "Mild and hot."),
        ("Bath?", [[("weather", {"city": "Bath"}, "rain")], [("weather", {"city": "Bath"}, "sun")]], "Mixed."),
    ]
)


@cache
def template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def render(chat_template, messages, **options):
    options = {"bos_token": "<s>", "eos_token": "</s>"} | options
    return render_jinja_template([messages], chat_template=chat_template, **options)[0][0]


def marked(name, messages, **options):
    """The pieces of the rendered text that are trained on, and the pieces of text around them (one more)."""
    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=template(name),
        bos_token="<s>",
        eos_token="</s>",
        return_assistant_tokens_mask=True,
        **options,
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


def reference_ids(version, messages, mode=ValidationMode.finetuning, tools=None):
    request = ChatCompletionRequest(messages=messages, tools=tools, model="any")
    return reference(version, mode).encode_chat_completion(request).tokens


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


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_variant_for_tekken_is_the_text_of_mistral_commons_ids(system):
    """Mistral-Nemo's and Ministral-8B's tokenizer, of 2024-07-18: a blank is a blank, and none is put before a text."""
    tokenizer = MistralTokenizer.from_file(V3_FILE.with_name("tekken_240718.json"), mode=ValidationMode.finetuning)
    text_of = choose_chat_template(mistral_v3_tokenizer(), "mistral_v3_tekken", "mistral")[0]
    turns = [[(text, NASTY[place - 1]), ("a", NASTY[place - 2])] for place, text in enumerate(NASTY)]
    for messages, tools in [*((conversation(each, system), None) for each in turns), (TWO_TURNS, [WEATHER])]:
        request = ChatCompletionRequest(messages=messages, tools=tools, model="any")
        tokens = tokenizer.encode_chat_completion(request).tokens
        text = tokenizer.instruct_tokenizer.tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
        assert render(text_of, messages, tools=tools) == text


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


@few
@given(TOOL_CONVERSATIONS, TOOLS)
def test_mistral_v3_tool_rows_have_mistral_commons_finetuning_ids(messages, tools):
    assert ids("v3", messages, tools=tools) == reference_ids("v3", messages, tools=tools)


@pytest.mark.parametrize("system", [None, "", " Be brief. \n"])
def test_mistral_v3_tool_rows_have_mistral_commons_ids_on_every_nasty_text(system):
    for text in NASTY:
        # as a key, a value, a text that is no JSON, a JSON text, and in the description of a tool
        step = [("f", {text: text}, text), ("f", json.dumps({text: [text]}), json.dumps(text)), ("f", text, "{}")]
        messages = tool_conversation([(text, [step], text), (text, [step], text)], system)
        tools = [tool("f", text, text)]
        assert ids("v3", messages, tools=tools) == reference_ids("v3", messages, tools=tools)


@few
@given(TOOL_CONVERSATIONS, TOOLS)
def test_mistral_v3_tool_prompts_have_mistral_commons_serving_ids(messages, tools):
    for prompt in prompts(messages):
        expected = reference_ids("v3", prompt, ValidationMode.serving, tools)
        assert ids("v3", prompt, tools=tools, add_generation_prompt=True) == expected
        assert ids("v3", prompt, tools=tools) == expected


def written_result(text):
    """What the template writes for a tool's result."""
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    rendered = render(template("mistral_v3"), [USER, call, {"role": "tool", "content": text}])
    return rendered.split('[TOOL_RESULTS] {"content": ')[1].removesuffix(', "call_id": "000000001"}[/TOOL_RESULTS]')


def dumped_if_json(text):
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except json.JSONDecodeError:
        return json.dumps(text, ensure_ascii=False)


# fmt: off
WORDS = [*"{}[],:", " ", "\t", "\r\n", '"', '"a"', '"b" :', "true", "null", "NaN", "-Infinity", "0", "-0", "-0.0", "12",
         "1.50", "1E+2", "1e-7", "1e999", '"\\u00e9"', '"\\ud83e\\uDD99"', '"\\ud83e"', '"\\\\"', '"\\""',
         '"\\/\\b\\f\\n\\r\\t"',
         '"\\u0000\\u005c\\u0022"', "[1, 2]", "[]", "{}", '{"a": 1}', '{"c": [{}, 1], "d": "e"}', '"{}[],:"']
NEARLY = ["01", "1.", ".5", "+1", "-", "1e", "1_0", "1e+-1", "--1", "1.2.3", "0x1F", "١", "²", "True", "nul", "inf",
          "a", "'a'",
          "\\", '\\"', '"\\"', '"\\x"', '"\\u12"', '"\\u+123"', '"\\u 123"', '"\n"', '"\x01"', "\x00", "\xa0", "\x0b",
          "\ufeff",
          "1 2", "1, 2", '"a" "b"', '"a": 1', "[1,]", "[,1]", '{"a": 1,}', '{"a"}', "{1: 2}", '{"a": 1, 2}',
          '{"a": [1], 2}',
          '["a": 1]', '[1, "a": 2]', '{"a": 1: 2}', '{"a":: 1}', "[1, 2}", "[[1]", "[1]]", "1}, {"]
# fmt: on


@pytest.mark.parametrize("text", [*WORDS, *NEARLY, " 1 ", " ", "[1, [2, [3, 4], 5], {}, []]"])
def test_mistral_v3_writes_a_tool_result_as_json_where_it_is_json_and_else_as_a_string(text):
    for result in (text, f"[{text}]", f"[0, {text}]", f'{{"a": {text}, "b": 1}}', f"{text} 1", f'{{"a": "{text}"}}'):
        assert written_result(result) == dumped_if_json(result)


@settings(quick, max_examples=300)
@given(st.one_of(JSON_TEXTS, st.lists(st.sampled_from(WORDS), max_size=9).map("".join), st.text('{}[],:"\\u01e.- \n')))
def test_mistral_v3_reads_json_as_python_does(text):
    def without_a_key_twice(pairs):  # that is a known difference
        assume(len(dict(pairs)) == len(pairs))
        return dict(pairs)

    with suppress(json.JSONDecodeError):
        json.loads(text, object_pairs_hook=without_a_key_twice)
    assert written_result(text) == (dumped_if_json(text) if text else "{}")


def without_ids(messages):
    """A copy with ids neither in calls nor in results."""
    return [
        {key: value for key, value in message.items() if key != "tool_call_id"}
        | ({"tool_calls": [call | {"id": None} for call in message["tool_calls"]]} if "tool_calls" in message else {})
        for message in messages
    ]


def numbered(messages):
    """A copy with the ids Call00001, Call00002, ... as 000000001, 000000002, ..."""
    return json.loads(json.dumps(messages).replace('"Call', '"0000'))


def test_mistral_v3_numbers_the_tool_calls_without_ids_and_mistral_common_takes_them_so():
    bare = without_ids(TWO_TURNS)
    assert ids("v3", bare, tools=[WEATHER]) == reference_ids("v3", numbered(TWO_TURNS), tools=[WEATHER])
    for prompt, full in zip(prompts(bare), prompts(numbered(TWO_TURNS)), strict=True):
        expected = reference_ids("v3", full, ValidationMode.serving)
        assert ids("v3", prompt, add_generation_prompt=True) == expected


def test_real_sharegpt_rows_with_tools_have_mistral_commons_ids_of_numbered_calls():
    for row in read_jsonl(DATA / "sharegpt_tools.jsonl"):
        messages, count = [], 0
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                count += 1
                call = {"id": f"Call{count:05}", "function": json.loads(turn["value"])}
                messages.append({"role": "assistant", "tool_calls": [call]})
            elif turn["from"] == "observation":
                messages.append({"role": "tool", "content": turn["value"], "tool_call_id": f"Call{count:05}"})
            else:
                messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]})
        tools = [{"type": "function", "function": function} for function in json.loads(row["tools"] or "[]")]
        expected = reference_ids("v3", numbered(messages), tools=tools)
        assert ids("v3", without_ids(messages), tools=tools) == expected


def test_mistral_v3_fills_in_only_the_ids_that_are_missing():
    messages = tool_conversation([("Hi", [[("f", {}, "1"), ("g", {}, "2")]], "Done.")])
    _, call, first, second, _ = partial = without_ids(messages)
    call["tool_calls"][1]["id"] = "abcdefgh9"
    rendered = render(template("mistral_v3"), partial)
    assert '"f", "arguments": {}, "id": "000000001"}, {"name": "g", "arguments": {}, "id": "abcdefgh9"}' in rendered
    assert '1, "call_id": "000000001"}[/TOOL_RESULTS][TOOL_RESULTS] {"content": 2, "call_id": "abcdefgh9"}' in rendered
    first["tool_call_id"], second["tool_call_id"] = "abcdefgh9", "000000001"  # results in another order
    assert '1, "call_id": "abcdefgh9"}[/TOOL_RESULTS][TOOL_RESULTS] {"content": 2, "call_id": "000000001"}' in render(
        template("mistral_v3"), partial
    )


@pytest.mark.parametrize("missing", [{}, {"id": "null"}, {"id": None}, {"id": ""}])
def test_mistral_v3_writes_calls_in_the_last_message_without_the_ids_that_they_lack_as_mistral_common_does(missing):
    function = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    earlier = tool_conversation([("Hi", [[("f", {}, "1")]], "One.")])

    def row(missing):
        calls = [function | missing, function | {"id": "abcdefgh2"}]
        return [*earlier, USER, {"role": "assistant", "tool_calls": calls}]

    assert ids("v3", row(missing)) == reference_ids("v3", row({}))


def test_mistral_v3_takes_calls_and_tools_with_and_without_function_around_them():
    bare = [
        message | {"tool_calls": [{"id": call["id"], **call["function"]} for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in TWO_TURNS
    ]
    assert bare != TWO_TURNS
    assert ids("v3", bare, tools=[WEATHER["function"]]) == reference_ids("v3", TWO_TURNS, tools=[WEATHER])


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": None}])
@pytest.mark.parametrize("arguments", [{"arguments": {}}, {"arguments": ""}, {"arguments": None}, {}])
def test_mistral_v3_takes_a_call_without_content_or_arguments(content, arguments):
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "f"}}
    message = {"role": "assistant", **content, "tool_calls": [call | {"function": {"name": "f", **arguments}}]}
    expected = {"role": "assistant", "tool_calls": [call | {"function": {"name": "f", "arguments": "{}"}}]}
    assert ids("v3", [USER, message]) == reference_ids("v3", [USER, expected])


def test_mistral_v3_writes_of_a_tool_what_mistral_common_does_in_its_order():
    function = {"parameters": {"type": "object", "properties": {}}, "strict": True, "description": "é", "name": "f"}
    tools = [{"function": function, "type": "function"}, tool("g", "", "")]
    assert ids("v3", [USER, ANSWER], tools=tools) == reference_ids("v3", [USER, ANSWER], tools=tools)

    shortest = [{"type": "function", "function": {"name": "f", "description": None, "return": {"type": "null"}}}]
    full = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    assert ids("v3", [USER, ANSWER], tools=shortest) == reference_ids("v3", [USER, ANSWER], tools=full)
    assert ids("v3", [USER, ANSWER], tools=[]) == reference_ids("v3", [USER, ANSWER])


@few
@given(TOOL_TURNS)
def test_every_turn_in_a_mistral_v3_row_without_system_message_and_tools_follows_its_inference_prompt(turns):
    messages = tool_conversation(turns)
    row = ids("v3", messages)
    for prompt in prompts(messages):
        expected = reference_ids("v3", prompt, ValidationMode.serving)
        assert row[: len(expected)] == expected


@few
@given(TOOL_TURNS, st.one_of(st.none(), TEXTS), st.lists(st.builds(tool, NAMES, TEXTS, TEXTS), min_size=1, max_size=2))
def test_with_tools_only_what_follows_the_last_user_message_in_a_mistral_v3_row_follows_its_inference_prompt(
    turns, system, tools
):
    messages = tool_conversation(turns, system)
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    row = ids("v3", messages, tools=tools)
    for prompt in prompts(messages):
        expected = reference_ids("v3", prompt, ValidationMode.serving, tools)
        assert (row[: len(expected)] == expected) == (len(prompt) > last_user)


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


def test_mistral_v3_marks_each_turn_of_calls_from_its_control_token_through_its_end_token_and_each_answer():
    trained, around = marked("mistral_v3", TWO_TURNS, tools=[WEATHER])
    assert trained == [
        " Hello</s>",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "Call00001"}, '
        '{"name": "weather", "arguments": {"city": "Rome"}, "id": "Call00002"}]</s>',
        " Mild and hot.</s>",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bath"}, "id": "Call00003"}]</s>',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bath"}, "id": "Call00004"}]</s>',
        " Mixed.</s>",
    ]
    assert around == [
        "<s>[INST] Hi[/INST]",
        "[INST] Oslo? Rome?[/INST]",
        '[TOOL_RESULTS] {"content": 42, "call_id": "Call00001"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": "hot", "call_id": "Call00002"}[/TOOL_RESULTS]',
        f"[AVAILABLE_TOOLS] [{json.dumps(WEATHER)}][/AVAILABLE_TOOLS][INST] Bath?[/INST]",
        '[TOOL_RESULTS] {"content": "rain", "call_id": "Call00003"}[/TOOL_RESULTS]',
        '[TOOL_RESULTS] {"content": "sun", "call_id": "Call00004"}[/TOOL_RESULTS]',
        "",
    ]


@few
@given(TOOL_CONVERSATIONS, TOOLS)
def test_the_marked_mistral_v3_tokens_are_what_mistral_common_adds_to_the_prompts(messages, tools):
    encoded = mistral_v3_tokenizer().apply_chat_template(
        messages,
        tools=tools,
        chat_template=template("mistral_v3"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    expected = []
    for prompt in prompts(messages):
        row = [*prompt, messages[len(prompt)]]
        expected += reference_ids("v3", row)[len(reference_ids("v3", prompt, ValidationMode.serving)) :]
    assert trained == expected


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
TWO_CALLS = CALL | {"tool_calls": CALL["tool_calls"] * 2}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "developer", "content": "x"}, USER], "message 1 has the role 'developer'.*rewrite it"),
        ([USER, {"content": "no role"}], "message 2 has the role ''.*rewrite it"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER], "message 1 .*must be a string"),
        ([USER, {"role": "assistant", "content": None}], "message 2 .*must be a string"),
        ([{"role": "system"}, USER, ANSWER], "message 1 .*must be a string"),
    ],
)
def test_every_template_refuses_what_it_would_have_to_drop_and_names_the_message(name, messages, said):
    with pytest.raises(TemplateError, match=said):
        render(template(name), messages)


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, TOOL], "message 2 has the role 'tool'.*rewrite it"),
        ([USER, CALL], "message 2 has tool calls.*write them into its content"),
    ],
)
def test_templates_without_tools_refuse_calls_and_results_and_name_the_message(name, messages, said):
    with pytest.raises(TemplateError, match=said):
        render(template(name), messages)


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_templates_without_tools_refuse_a_list_of_tools(name):
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


def call(**changes):
    return CALL | {"tool_calls": [{"name": "add", "arguments": {}} | changes]}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([TOOL], "message 1 is a tool's result, but no tool call"),
        ([USER, TOOL], "message 2 is a tool's result, but no tool call"),
        ([USER, ANSWER, TOOL], "message 3 is a tool's result, but no tool call"),
        ([USER, CALL, TOOL, TOOL], "message 4 is a tool's result, but no tool call"),
        ([CALL, TOOL], "message 1 has the role 'assistant' where 'user' is due"),
        ([USER, CALL, ANSWER], "message 3 has the role 'assistant' where 'tool' is due.*have 0 of 1 results. Add"),
        ([USER, CALL, USER], "message 3 has the role 'user' where 'tool' is due.*have 0 of 1 results"),
        ([USER, CALL, CALL, TOOL], "message 3 has the role 'assistant' where 'tool' is due"),
        (
            [USER, TWO_CALLS, TOOL, ANSWER],
            "message 4 has the role 'assistant' where 'tool' is due.*have 1 of 2 results",
        ),
        ([USER, TWO_CALLS, TOOL], "the conversation ends with 1 of 2 tool results: add the others"),
        ([USER, CALL, TOOL, USER, ANSWER], "message 4 has the role 'user' where 'assistant' is due"),
        ([USER, CALL, TOOL, ANSWER, ANSWER], "message 5 has the role 'assistant' where 'user' is due"),
        ([USER | {"tool_calls": CALL["tool_calls"]}], "message 1 has tool calls, but only the assistant"),
        ([USER, CALL | {"content": "I look."}], "message 2 has text beside its tool calls.*leave the text out"),
        ([USER, CALL | {"tool_calls": []}], "message 2 is an empty answer"),
        ([USER, CALL | {"tool_calls": ["add()"]}], "message 2 has a tool call without the name"),
        ([USER, call(name=None)], "message 2 has a tool call without the name"),
        ([USER, call(arguments=[1])], "message 2 has a tool call whose arguments are neither"),
        ([USER, CALL, {"role": "tool", "content": {"a": 1}}], "message 3 has no text.*must be a string"),
        ([USER, CALL, {"role": "tool"}], "message 3 has no text.*must be a string"),
        ([USER, call(id="call_0123456789")], "message 2 has the tool call id 'call_0123456789'.*leave it out of both"),
        ([USER, call(id="call_0123")], "message 2 has the tool call id 'call_0123'.*9 letters or digits"),
        ([USER, call(id="déjàvu123")], "message 2 has the tool call id"),
        ([USER, call(id=123456789)], "message 2 has the tool call id"),
        ([USER, CALL, TOOL | {"tool_call_id": "1"}], "message 3 has the tool call id '1'"),
        ([USER, CALL, TOOL | {"tool_call_id": "abcdefgh1"}], "message 3 is the result of the tool call 'abcdefgh1'"),
    ],
)
def test_mistral_v3_refuses_calls_and_results_that_it_cannot_write_and_names_the_message(messages, said):
    with pytest.raises(TemplateError, match=said):
        render(template("mistral_v3"), messages)


@pytest.mark.parametrize(
    "broken", [{"type": "function"}, {"name": 1}, {"name": "f", "description": [1]}, {"name": "f", "parameters": "{}"}]
)
def test_mistral_v3_refuses_a_tool_that_it_cannot_write_and_names_it(broken):
    with pytest.raises(TemplateError, match="tool 2 is no function.*correct it"):
        render(template("mistral_v3"), [USER, ANSWER], tools=[WEATHER, broken])


@pytest.mark.parametrize("last", [ANSWER, CALL])
def test_mistral_v3_refuses_a_prompt_that_ends_with_an_answer_or_a_call(last):
    with pytest.raises(TemplateError, match="already ends with an answer: remove it"):
        render(template("mistral_v3"), [USER, last], tools=[WEATHER], add_generation_prompt=True)


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


def test_known_difference_mistral_v3_keeps_a_key_that_a_tools_result_has_twice():
    assert written_result('{"a": 1, "b": 2, "a": 3}') == '{"a": 1, "b": 2, "a": 3}'
    assert dumped_if_json('{"a": 1, "b": 2, "a": 3}') == '{"a": 3, "b": 2}'
