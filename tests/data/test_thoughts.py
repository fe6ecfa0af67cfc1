"""Thoughts stand where the template puts them, and no empty one is ever learnt: text, labels and the saved prompt."""

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_jsonl
from families import FAMILIES, qwen_tokenizer, trained_texts

from recipes.utils.console import UserError
from recipes.utils.data import Chat, DataOptions, Encoder, prepare
from recipes.utils.data.template import choose_chat_template

TRL = Path(find_spec("trl").origin).with_name("chat_templates")
ARGS = SimpleNamespace(max_length=512, seed=1)
R1_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
HYBRID = """{#- as SmolLM3 has it: the mode is in the system message, thoughts in the content, marks in the template -#}
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\\n' }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- ('' if enable_thinking else '<think>\\n\\n</think>\\n\\n') + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endgeneration %}
{%- else %}{{- message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n\\n') }}
{%- endif %}"""
Q, A = {"role": "user", "content": "Ask one"}, {"role": "assistant", "content": "Answer one"}
Q2, A2 = {"role": "user", "content": "Ask two"}, {"role": "assistant", "content": "Answer two"}
T, T2 = {**A, "reasoning_content": "Hm."}, {**A2, "reasoning_content": "Well."}
EMPTY = "<think>\n\n</think>\n\n"


@cache
def tokenizer_of(name):
    """The tiny tokenizer with a model's own chat template, or what is chosen for it."""
    if name in FAMILIES:
        return FAMILIES[name][0]()
    r1 = name.startswith("deepseek")
    tokenizer = qwen_tokenizer(HYBRID if name == "smollm3" else (TRL / f"{name}.jinja").read_text(), *R1_TOKENS * r1)
    tokenizer.eos_token = R1_TOKENS[1] if r1 else "<|im_end|>"
    tokenizer.chat_template = choose_chat_template(tokenizer, "auto", "qwen3")[0]
    return tokenizer


def learnt(name, messages, think, train_on="all"):
    """The rows of a chat, as [(what is read, then learnt, then read ...)] of texts."""
    documents = Encoder(tokenizer_of(name), think=think).documents(Chat(messages, "f:1"), train_on)
    return ["".join(f"«{text}»" if learns else text for text, learns in row.pieces) for row in documents]


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASKED = turn("user", "Ask one") + "<|im_start|>assistant\n"
AGAIN = turn("user", "Ask one") + turn("assistant", "Answer one") + turn("user", "Ask two") + "<|im_start|>assistant\n"
R1 = "<｜User｜>Ask one<｜Assistant｜>"
R1_AGAIN = f"{R1}Answer one<｜end▁of▁sentence｜><｜User｜>Ask two<｜Assistant｜>"
HEAD, HEAD_OFF = turn("system", "Reasoning Mode: /think"), turn("system", "Reasoning Mode: /no_think")
SMOL = HEAD_OFF + ASKED + EMPTY
CASES = {  # (template, messages, think): rows
    "an answer follows the empty thought": ("qwen3", [Q, A], "drop", [ASKED + EMPTY + "«Answer one<|im_end|>»\n"]),
    "a thought is learnt": ("qwen3", [Q, T], "keep", [ASKED + "«<think>\nHm.\n</think>\n\nAnswer one<|im_end|>»\n"]),
    "a thought in the text is the same": (
        "qwen3", [Q, {**A, "content": "<think>Hm.</think>Answer one"}], "keep",
        [ASKED + "«<think>\nHm.\n</think>\n\nAnswer one<|im_end|>»\n"]),
    "an empty thought in the text is none": (
        "qwen3", [Q, {**A, "content": f"{EMPTY}Answer one"}], "keep", [ASKED + EMPTY + "«Answer one<|im_end|>»\n"]),
    "a thought is read alone": (
        "qwen3", [Q, T], "mask", [ASKED + "<think>\nHm.\n</think>\n\n«Answer one<|im_end|>»\n"]),
    "a thought is left out": ("qwen3", [Q, T], "drop", [ASKED + EMPTY + "«Answer one<|im_end|>»\n"]),
    "earlier thoughts are left out as at inference": (
        "qwen3", [Q, T, Q2, T2], "keep",
        [AGAIN + "«<think>\nWell.\n</think>\n\nAnswer two<|im_end|>»\n",
         ASKED + "«<think>\nHm.\n</think>\n\nAnswer one<|im_end|>»\n"]),
    "an answer without one beside one that has one": (
        "qwen3", [Q, A, Q2, T2], "keep",
        [AGAIN + "«<think>\nWell.\n</think>\n\nAnswer two<|im_end|>»\n", ASKED + EMPTY + "«Answer one<|im_end|>»\n"]),
    "a prompt that opens the thought": (
        "qwen3_5_think", [Q, T], "keep", [ASKED + "<think>\n«Hm.\n</think>\n\nAnswer one<|im_end|>»\n"]),
    "and has a switch": ("qwen3_5_think", [Q, A], "drop", [ASKED + EMPTY + "«Answer one<|im_end|>»\n"]),
    "off unless asked for": (
        "qwen3_5_nothink", [Q, T], "keep", [ASKED + "<think>\n«Hm.\n</think>\n\nAnswer one<|im_end|>»\n"]),
    "R1, with a thought": (
        "deepseek_r1_distill", [Q, T], "keep",
        [f"{R1}<think>\n«Hm.\n</think>\n\nAnswer one<｜end▁of▁sentence｜>»"]),
    "R1, without": ("deepseek_r1_distill", [Q, A], "drop", [f"{R1}{EMPTY}«Answer one<｜end▁of▁sentence｜>»"]),
    "R1, in two rounds": (
        "deepseek_r1_distill", [Q, T, Q2, T2], "keep",
        [f"{R1_AGAIN}<think>\n«Well.\n</think>\n\nAnswer two<｜end▁of▁sentence｜>»",
         f"{R1}<think>\n«Hm.\n</think>\n\nAnswer one<｜end▁of▁sentence｜>»"]),
    "SmolLM3, with a thought": (
        "smollm3", [Q, T], "keep", [f"{HEAD}{ASKED}«<think>\nHm.\n</think>\n\nAnswer one<|im_end|>»\n"]),
    "SmolLM3, without, which keeps the empty ones": (
        "smollm3", [Q, A, Q2, A2], "drop",
        [f"{SMOL}«Answer one<|im_end|>»\n" + turn("user", "Ask two") + f"<|im_start|>assistant\n{EMPTY}"
         "«Answer two<|im_end|>»\n"]),
    "SmolLM3, one with and one without": (
        "smollm3", [Q, A, Q2, T2], "keep",
        [f"{HEAD}{AGAIN}«<think>\nWell.\n</think>\n\nAnswer two<|im_end|>»\n", f"{SMOL}«Answer one<|im_end|>»\n"]),
    "a template without thoughts takes them as text": (
        "qwen2", [Q, {**A, "content": "<think>Hm.</think>Answer one"}], "keep",
        [turn("system", "You are a helpful assistant.") + ASKED + "«<think>Hm.</think>Answer one<|im_end|>»\n"]),
    "reads them alone": (
        "qwen2", [Q, {**A, "content": "<think>Hm.</think>Answer one"}], "mask",
        [turn("system", "You are a helpful assistant.") + ASKED + "<think>Hm.</think>«Answer one<|im_end|>»\n"]),
    "or leaves them out": (
        "qwen2", [Q, {**T, "reasoning_content": "Hm."}], "drop",
        [turn("system", "You are a helpful assistant.") + ASKED + "«Answer one<|im_end|>»\n"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_answer_follows_what_inference_sends_and_no_empty_thought_is_learnt(case):
    name, messages, think, rows = CASES[case]
    assert learnt(name, messages, think) == rows


def test_the_last_answer_alone_keeps_its_thought():
    assert learnt("qwen3", [Q, T, Q2, T2], "keep", "last") == [
        AGAIN + "«<think>\nWell.\n</think>\n\nAnswer two<|im_end|>»\n"
    ]


def test_calls_of_one_round_keep_their_thoughts():
    """What Qwen3 leaves out is the thoughts before the last question, not those between calls of tools."""
    call = {**T, "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    (row,) = learnt("qwen3", [Q, call, {"role": "tool", "content": "5"}, T2], "keep")
    assert "«<think>\nHm.\n</think>\n\n<tool_call>" in row
    assert "«<think>\nWell.\n</think>\n\nAnswer two<|im_end|>»" in row


def test_a_thought_without_a_place_is_bad_by_its_turn():
    encoder = Encoder(tokenizer_of("qwen2"))
    with pytest.raises(UserError, match="f:1: turn 2: the chat template has no place for its thought.*data.think drop"):
        encoder.encode([Chat([Q, T], "f:1")])
    with pytest.raises(UserError, match="f:1: turn 2: the answer is a thought alone"):
        Encoder(tokenizer_of("qwen3"), think="drop").encode([Chat([Q, {**A, "content": "<think>a</think>"}], "f:1")])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "deepseek_r1_distill", "smollm3"])
@pytest.mark.parametrize("thoughts", [True, False])
def test_the_saved_template_sends_the_prompt_that_was_learnt(tmp_path, name, thoughts):
    """By default: thoughts are kept where any row has one, and else left out, and the template's default goes along;
    found in the cache it is switched alike, and a later `Encoder` of it treats other rows the same."""
    rows = [[Q, T if thoughts else A], [Q2, A2]]
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages} for messages in rows])
    for _ in range(2):  # made, then found
        tokenizer = copy.deepcopy(tokenizer_of(name))
        train, _ = prepare(DataOptions(str(path)), tokenizer, ARGS, report=False)
        assert (train.counts.think, train.counts.thoughts) == (("keep", 1) if thoughts else ("drop", 0))
        assert not [finding for finding in train.findings if finding.level == "stop"]
        asked = tokenizer.apply_chat_template([Q], add_generation_prompt=True, return_dict=False)
        first = train.rows[0]
        start = next(place for place, label in enumerate(first["labels"]) if label != -100)
        assert first["input_ids"][:start] == asked
        assert all("<think>\n\n" not in text for row in train.rows for text in trained_texts(
            tokenizer, SimpleNamespace(**row)))  # fmt: skip
        later = Encoder(tokenizer).encode([Chat(messages, "f:1") for messages in rows])
        assert [row.input_ids for row in later] == train.rows["input_ids"][:]
        assert [row.labels for row in later] == train.rows["labels"][:]


@pytest.mark.parametrize("think", ["mask", "drop", "keep"])
def test_what_is_asked_for_is_done_with_validation_rows_as_well(tmp_path, capsys, think):
    train = write_jsonl(tmp_path / "t.jsonl", [{"messages": [Q, T]}, {"messages": [Q2, A2]}])
    validation = write_jsonl(tmp_path / "v.jsonl", [{"messages": [{**Q, "content": "Why?"}, T2]}])
    tokenizer = copy.deepcopy(tokenizer_of("qwen3"))
    parts = prepare(DataOptions(str(train), str(validation), think=think), tokenizer, ARGS)
    said = {"mask": "read, not learnt", "drop": "left out; the template that is saved asks for none", "keep": "learnt"}
    assert f"thoughts: 1 of 2 rows have one; {said[think]}\n" in capsys.readouterr().out
    texts = [trained_texts(tokenizer, SimpleNamespace(**part.rows[0]))[0] for part in parts]
    ends = ["Answer one<|im_end|>", "Answer two<|im_end|>"]
    kept = [f"<think>\n{thought}\n</think>\n\n{end}" for thought, end in zip(("Hm.", "Well."), ends, strict=True)]
    assert texts == (kept if think == "keep" else ends)
    shown = [tokenizer.decode(part.rows[0]["input_ids"]) for part in parts]
    assert [thought in text for thought, text in zip(("Hm.", "Well."), shown, strict=True)] == [think != "drop"] * 2


def test_hermes_results_are_wrapped_once():
    results = '<tool_response>\n{"a": 1}\n</tool_response>\n<tool_response>\nb\n</tool_response>'
    result, call = {"role": "tool", "content": results}, {**A, "content": "<tool_call>\n{}\n</tool_call>"}
    (row,) = learnt("qwen2_5", [Q, call, result, A2], None)
    assert turn("user", results) in row
    plain = copy.deepcopy(tokenizer_of("qwen2_5"))  # a template that writes no such tags leaves them as they are
    plain.chat_template = HYBRID
    (document,) = Encoder(plain).documents(Chat([Q, call, result, A2], "f:1"))
    assert turn("tool", results) in "".join(text for text, _ in document.pieces)
