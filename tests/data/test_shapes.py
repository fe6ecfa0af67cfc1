"""What rows mean to those who wrote them is honoured, or the row is bad, by file and line."""

import json

import pytest
from conftest import write_jsonl

from recipes.utils.console import UserError
from recipes.utils.data import Reading, read_chats, stream_chats

Q, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONTEXT = {**A, "weight": 0}  # an answer that is read, not learnt
HUMAN, GPT = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}


def call(arguments=None, text="", **others):
    made = {"type": "function", "function": {"name": "add", "arguments": {"a": 2} if arguments is None else arguments}}
    return {"role": "assistant", "content": text, "tool_calls": [{**others, **made}]}


def schema(properties):
    return {"name": "add", "parameters": {"type": "object", "properties": properties}}


def tool(properties):
    return {"type": "function", "function": schema(properties)}


def result(text="4", **others):
    return {"role": "tool", "content": text, **others}


HONOURED = {
    "OpenAI's older calls, beside text": (
        {"messages": [Q, {**A, "content": "Let me see.", "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                      {"role": "function", "name": "add", "content": "4"}, A], "functions": [schema({})]},
        [Q, call(text="Let me see."), result(name="add"), A],
    ),
    "OpenAI's older calls without text": (
        {"messages": [Q, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}]},
        [Q, call({})],
    ),
    "developer": ({"messages": [{**SYSTEM, "role": "developer"}, Q, A]}, [SYSTEM, Q, A]),
    "weight null": ({"messages": [Q, {**A, "weight": None, "name": None, "tool_calls": None}]}, [Q, A]),
    "weight 1.0": ({"messages": [Q, {**A, "weight": 1.0}]}, [Q, {**A, "weight": 1}]),
    "ShareGPT loss": (
        {"conversations": [HUMAN, {**GPT, "loss": False}, HUMAN, {**GPT, "loss": True}]},
        [Q, CONTEXT, Q, {**A, "weight": 1}],
    ),
    "axolotl train": ({"conversations": [HUMAN, {**GPT, "train": 0}, HUMAN, GPT]}, [Q, CONTEXT, Q, A]),
    "torchtune masked": ({"messages": [{**Q, "masked": True}, {**A, "masked": True}, Q, A]}, [Q, CONTEXT, Q, A]),
    "reasoning_content": (
        {"messages": [Q, {**A, "reasoning_content": "\nhm\n"}]}, [Q, {**A, "reasoning_content": "hm"}]),
    "thinking": ({"messages": [Q, {**A, "thinking": "hm"}]}, [Q, {**A, "reasoning_content": "hm"}]),
    "thinking null": ({"messages": [Q, {**A, "thinking": None, "reasoning": ""}]}, [Q, A]),
    "a column of thoughts": (
        {"question": "2+2?", "reasoning": "hm", "answer": "4"}, [Q, {**A, "reasoning_content": "hm"}]),
    "Anthropic": (
        {"system": [{"type": "text", "text": "Be brief."}], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"},
                                              {"type": "text", "text": "Let me see."},
                                              {"type": "tool_use", "id": "abcdefghi", "name": "add",
                                               "input": {"a": 2}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "abcdefghi",
                                          "content": [{"type": "text", "text": "4"}]}]},
            {"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
         "tools": [{"name": "add", "input_schema": {"type": "object", "properties": {}}}]},
        [SYSTEM, Q, {**call(text="Let me see.", id="abcdefghi"), "reasoning_content": "hm"},
         result(tool_call_id="abcdefghi"), A],
    ),
    "Bedrock": (
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "Be brief."}],
         "messages": [{"role": "user", "content": [{"text": "2+2?"}]},
                      {"role": "assistant", "content": [{"text": "4"}]}]},
        [SYSTEM, Q, A],
    ),
    "system beside messages": ({"system": "Be brief.", "messages": [Q, A]}, [SYSTEM, Q, A]),
    "the same system twice": ({"system": "Be brief.", "messages": [SYSTEM, Q, A]}, [SYSTEM, Q, A]),
    "system beside a prompt": ({"system": "Be brief.", "prompt": "2+2?", "completion": "4"}, [SYSTEM, Q, A]),
    "a prompt whose answers are context": (
        {"prompt": [SYSTEM, Q, A, Q], "completion": [A]}, [SYSTEM, Q, CONTEXT, Q, A]),
    "a prompt of turns and a text": ({"prompt": [Q, {**A, "weight": None}, Q], "completion": "4"}, [Q, CONTEXT, Q, A]),
    "alpaca history": (
        {"instruction": "2+2?", "input": "", "output": "4", "history": [["2+2?", "4"]]}, [Q, A, Q, A]),
    "an export's nulls": (
        {"messages": [Q, A], "prompt": None, "tools": None, "history": None, "images": None, "conversations": None},
        [Q, A],
    ),
    "conversations with roles": ({"conversations": [Q, A]}, [Q, A]),
    "WildChat": (
        {"conversation": [{**Q, "language": "English", "toxic": False}, {**A, "redacted": 0}], "model": "m"}, [Q, A]),
    "messages with from and value": ({"messages": [HUMAN, GPT]}, [Q, A]),
    "chatgpt": ({"conversations": [HUMAN, {**GPT, "from": "chatgpt"}]}, [Q, A]),
    "model": ({"conversations": [{**HUMAN, "from": "user"}, {**GPT, "from": "model"}]}, [Q, A]),
    "bing": ({"conversations": [HUMAN, {**GPT, "from": "bing"}]}, [Q, A]),
    "Dolly": (
        {"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "math"},
        [{"role": "user", "content": "Add.\n\n2 and 2"}, A],
    ),
    "OpenOrca": ({"id": "1", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"}, [SYSTEM, Q, A]),
    "OpenOrca without a system prompt": ({"system_prompt": "", "question": "2+2?", "response": "4"}, [Q, A]),
    "MetaMathQA": ({"query": "2+2?", "response": "4", "type": "x", "original_question": "?"}, [Q, A]),
    "a table that joins Alpaca's rows and Dolly's": (
        {"instruction": "2+2?", "input": None, "output": None, "context": None, "response": "4"}, [Q, A]),
    "FLAN": ({"inputs": "2+2?", "targets": "4"}, [Q, A]),
    "no_robots": ({"prompt": "2+2?", "prompt_id": "1", "messages": [Q, A], "category": "x"}, [Q, A]),
    "UltraFeedback's messages": (
        {"prompt": "2+2?", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, A], "score_chosen": 3.0}, [Q, A]),
    "Magpie": ({"conversations": [HUMAN, GPT], "instruction": "2+2?", "response": "4", "quality": "good"}, [Q, A]),
    "xLAM": (
        {"id": 0, "query": "2+2?", "answers": '[{"name": "add", "arguments": {"a": 2}}]',
         "tools": '[{"name": "add", "description": "d", "parameters": {"a": {"type": "int"}}}]'},
        [Q, call()],
    ),
    "APIGen-MT": (
        {"system": "Be brief.", "conversations": [
            HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"}, GPT], "tools": json.dumps([schema({})])},
        [SYSTEM, Q, call(), result(), A],
    ),
    "a call whose arguments the schema knows, padded": (
        {"messages": [Q, call({"a": 2, "b": None, "c": None}), result(), A], "tools": [schema({"a": {}, "b": None})]},
        [Q, call({"a": 2}), result(), A],
    ),
    "a null that the schema allows": (
        {"messages": [Q, call({"a": None, "b": None, "c": None, "d": {"e": None, "f": 1}}), result(), A],
         "tools": [tool({"a": {"type": ["integer", "null"]}, "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                         "c": {"type": "integer"},
                         "d": {"type": "object", "properties": {"e": {"type": "string"}, "f": {"type": "integer"}}}})]},
        [Q, call({"a": None, "b": None, "d": {"f": 1}}), result(), A],
    ),
    "a null within a text, which no export pads": (
        {"messages": [Q, {**A, "content": None, "tool_calls": [{"name": "add", "arguments": '{"a": 2, "b": null}'}]}]},
        [Q, call({"a": 2, "b": None})],
    ),
    "Hermes, whose tools stand in the system message": (
        {"conversations": [{"from": "system", "value": "<tools>[]</tools>"}, HUMAN, GPT], "tools": '[{"name": "add"}]'},
        [{"role": "system", "content": "<tools>[]</tools>"}, Q, A],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_meant_is_read(tmp_path, name):
    row, messages = HONOURED[name]
    (found,) = read_chats(str(write_jsonl(tmp_path / "a.jsonl", [row])))
    assert found.messages == messages
    assert bool(found.tools) == (bool(row.get("tools") or row.get("functions")) and "Hermes" not in name)


REFUSED = {
    "loss on a question": ({"conversations": [{**HUMAN, "loss": True}, GPT]}, "turn 1 (user): loss: only answers are"),
    "a half weight": ({"messages": [Q, {**A, "weight": 0.5}]}, "turn 2: weight: expected 0 (no loss on this"),
    "two that differ": ({"messages": [Q, {**A, "weight": 0, "train": True}]}, "turn 2: weight, train say different"),
    "loss on a part": (
        {"conversations": [HUMAN, {**GPT, "train_detail": [{"begin_offset": 0}]}]}, "turn 2: train_detail: may change"),
    "a loss scale": ({"messages": [Q, {**A, "loss_scale": 0.3}]}, "turn 2: loss_scale: may change what is learnt"),
    "a row's weight": ({"messages": [Q, A], "weight": 0}, "weight: may change what is learnt"),
    "a thought in another form": ({"messages": [Q, {**A, "reasoning_details": [{}]}]}, "turn 2: reasoning_details"),
    "a thought of a user": ({"messages": [{**Q, "thinking": "hm"}, A]}, "turn 1: a thought is a string, in"),
    "a thought beside messages": ({"messages": [Q, A], "reasoning": "hm"}, "reasoning: may change what is learnt"),
    "a thought and no answer": (
        {"messages": [Q, {"role": "assistant", "content": "", "thinking": "hm"}]}, "turn 2: the answer is empty"),
    "a chain of thought": ({"instruction": "2+2?", "output": "4", "cot": "hm"}, "cot: may change what is learnt"),
    "a refusal": (
        {"messages": [Q, {"role": "assistant", "content": None, "refusal": "No."}]}, "turn 2 (assistant): content: is"),
    "another system": ({"system": "Be long.", "messages": [SYSTEM, Q, A]}, "system: the turns begin with another"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A]},
        "turn 1 (user): content: holds a part that is no text (image_url)",
    ),
    "images": ({"messages": [Q, A], "images": ["a.png"]}, "images: may change what is learnt"),
    "KTO": ({"prompt": "2+2?", "completion": "5", "label": False}, "label: this answer is one not to be learnt (KTO)"),
    "LLaMA-Factory's KTO": ({"conversations": [HUMAN, GPT], "kto_tag": False}, "kto_tag: may change what is learnt"),
    "preferences in ShareGPT's form": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "these rows are preferences"),
    "settings of the template": (
        {"messages": [Q, A], "chat_template_kwargs": {"custom_instructions": "x"}}, "chat_template_kwargs: may change"),
    "tools in a turn": ({"messages": [{**SYSTEM, "tools": "[]"}, Q, A]}, "turn 1: tools: may change what is learnt"),
    "a prompt that is answered already": (
        {"prompt": [Q, A], "completion": "4"}, "prompt: ends with an answer; end it with a question"),
    "history that is none": ({"instruction": "a", "output": "b", "history": ["a"]}, "history: expected a list of"),
    "a null without a schema": (
        {"messages": [Q, call({"a": None}), result(), A]}, "turn 2: arguments of add: a is null, and no schema"),
    "turns without roles": ({"conversations": ["2+2?", "4"]}, "turn 1: expected an object with `role` and `content`"),
    "Firefly's rounds": ({"conversation": [{"human": "2+2?", "assistant": "4"}]}, "turn 1: unknown role None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_bad_by_its_line(tmp_path, name):
    row, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        read_chats(str(write_jsonl(tmp_path / "a.jsonl", [{"messages": [Q, A]}, row])))
    assert f"a.jsonl:2: {message}" in str(error.value)


def test_a_schema_loses_the_nulls_of_an_export_and_keeps_its_own(tmp_path):
    own = {
        "a": {"type": ["integer", "null"], "default": None},
        "b": {"type": "string", "enum": ["x", None]},
        "c": {"type": "array", "items": {"type": "object", "properties": {"d": {"type": "string"}}}},
    }
    padded = {
        "a": {**own["a"], "description": None, "enum": None},
        "b": {**own["b"], "default": None},
        "c": {"type": "array", "items": {**own["c"]["items"], "required": None}},
        "z": None, "y": {"type": None, "description": None},
    }  # fmt: skip
    padded["b"]["enum"] = ["x", None]
    own["b"]["default"] = None  # its enum allows null
    rows = [{"messages": [Q, call()], "tools": [{**tool(padded), "strict": None}]}]
    assert read_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)))[0].tools == [tool(own)]
    rows[0]["tools"] = json.dumps([schema({"a": {"type": "int", "default": None}})])  # a text: nobody padded it
    assert read_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)))[0].tools == [
        tool({"a": {"type": "int", "default": None}})
    ]


def test_fields_that_change_nothing_are_listed_once(tmp_path):
    rows = [
        {
            "messages": [{**Q, "id": 3, "rating": 5}, {**A, "finish_reason": "stop"}],
            "source": "x",
            "split": "train",
        },
        {"messages": [Q, A], "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": ""}},
        {"prompt": "2+2?", "completion": "4", "label": True, "weight": 1, "parallel_tool_calls": False},
    ]
    reading = Reading()
    assert len(list(stream_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)), reading))) == 3
    assert reading.ignored_keys == [
        "chat_template_kwargs", "label", "messages.finish_reason", "messages.id", "messages.rating",
        "parallel_tool_calls", "source", "split", "weight",
    ]  # fmt: skip
    assert reading.bad == []


def test_rows_with_thoughts_are_counted(tmp_path):
    rows = [{"messages": [Q, answer]} for answer in (A, {**A, "thinking": "hm"}, {**A, "content": "<think>a</think>4"})]
    reading = Reading()
    list(stream_chats(str(write_jsonl(tmp_path / "a.jsonl", rows)), reading))
    assert reading.thoughts == 2
