"""What replies say of a server, without one: tool calls in their forms, thinking that is cut out, what is counted."""

import json

import pytest
from conftest import BASE, ROOT
from mistral_tokenizers import mistral_v3_tokenizer
from transformers import AutoTokenizer

from recipes.utils.data import Encoder
from recipes.utils.serving import Reply, compare_served

CALL = {"name": "book", "arguments": {"city": "Oslo", "count": 2}}
TOOLS = [{"type": "function", "function": {"name": "book", "description": "", "parameters": {}}}]


def encoder_of(template="qwen2", tokenizer=None):
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (ROOT / "configs" / "chat_templates" / f"{template}.jinja").read_text()
    return Encoder(tokenizer, escape=True)


def row(encoder, answer="yes", base="no", stopped=True, prompt="Two to Oslo", tools=None, system=None):
    own = {"stopped": stopped, "answer_tokens": 5, "exact_match": True, "rouge_l": 1.0, "chrf": 100.0}
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    found = {"prompt": messages, "tools": tools, "expected": answer, "base": {"answer": base, **own}}
    found |= {"tokens_of_prompt": len(encoder.prompt_ids(messages, tools)), "adapter": {"answer": answer, **own}}
    return found


def said(text="", calls=(), stopped=True, more=0, of=None, tokens=5):
    return Reply(text, stopped, list(calls), of["tokens_of_prompt"] + more if of else None, tokens)


@pytest.mark.parametrize(
    "answer",
    [
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        f"[TOOL_CALLS] [{json.dumps(CALL | {'id': '000000001'})}]",
        "<function=book><parameter=city>Oslo</parameter><parameter=count>2</parameter></function>",
    ],
)
def test_calls_that_the_server_took_out_of_the_answer_are_the_same_calls(tmp_path, answer):
    encoder = encoder_of()
    one = row(encoder, answer)
    assert compare_served(tmp_path, encoder, [one], [said(calls=[CALL], of=one)])["equal"]["adapter"] == 1
    other = CALL | {"arguments": {"city": "Rome", "count": 2}}
    found = compare_served(tmp_path, encoder, [one], [said(calls=[other], of=one)])
    assert (found["equal"]["adapter"], found["agreement"]["adapter"]) == (0, 0.0)


def test_thinking_that_the_server_cut_out_is_no_difference(tmp_path):
    encoder = encoder_of()
    one = row(encoder, "<think>hm</think>\n\nOslo")
    assert compare_served(tmp_path, encoder, [one], [said("Oslo", of=one)])["equal"]["adapter"] == 1


def test_an_answer_that_was_cut_is_compared_as_far_as_it_goes(tmp_path):
    encoder = encoder_of()
    one = row(encoder, "Oslo is\N{REPLACEMENT CHARACTER}", stopped=False)
    assert compare_served(tmp_path, encoder, [one], [said("Oslo is a", of=one)])["equal"]["adapter"] == 1
    assert compare_served(tmp_path, encoder, [one], [said("Oslo was", of=one)])["equal"]["adapter"] == 0


def test_tools_and_a_system_message_that_are_left_out_are_named(tmp_path):
    encoder = encoder_of("mistral_v3", mistral_v3_tokenizer())
    rows = [row(encoder, tools=TOOLS), row(encoder)]
    without = [len(encoder.prompt_ids(one["prompt"])) - one["tokens_of_prompt"] for one in rows]
    replies = [said("other", more=more, of=one) for one, more in zip(rows, without, strict=True)]
    (cause,) = compare_served(tmp_path, encoder, rows, replies)["causes"]
    assert "the tools are left out" in cause["what"]
    rows = [row(encoder, system="Be brief."), row(encoder)]
    without = [len(encoder.prompt_ids(one["prompt"][-1:])) - one["tokens_of_prompt"] for one in rows]
    replies = [said("other", more=more, of=one) for one, more in zip(rows, without, strict=True)]
    (cause,) = compare_served(tmp_path, encoder, rows, replies)["causes"]
    assert "the system message is left out" in cause["what"]
    replies = [said("other", more=1, of=one) for one in rows]
    (cause,) = compare_served(tmp_path, encoder, rows, replies)["causes"]
    assert cause["what"] == "prompts are 1 token longer: BOS (<s>) twice"


def test_another_count_of_equal_answers_is_the_servers_own_way_to_count(tmp_path):
    encoder = encoder_of()
    rows = [row(encoder, prompt="a"), row(encoder, prompt="b c d")]
    replies = [said("yes", more=more, of=one) for one, more in zip(rows, (-7, -9), strict=True)]
    found = compare_served(tmp_path, encoder, rows, replies)
    assert (found["status"], found["prompt_tokens"]) == (0, [-9, -7])
    found = compare_served(tmp_path, encoder, rows, [reply._replace(text="no way") for reply in replies])
    assert "from -9 to -7 tokens off: another chat template" in found["causes"][0]["what"]


def test_a_penalty_in_the_merged_folder_is_told_where_answers_differ(tmp_path):
    encoder = encoder_of()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    rows = [row(encoder, "yes it is, of course") for _ in range(24)]
    found = compare_served(tmp_path, encoder, rows, [said("of course", of=one) for one in rows])
    assert found["status"] == 4
    assert "repetition_penalty 1.05, which servers apply" in found["causes"][0]["mend"]
    found = compare_served(tmp_path, encoder, rows, [said("of course") for _ in rows])
    assert "it counts no prompt tokens, so it may be the template" in found["causes"][0]["what"]


def test_answers_that_part_late_and_score_alike_are_as_good(tmp_path):
    encoder = encoder_of()
    text = "one two three four five six seven eight nine ten"
    rows = [row(encoder, text) for _ in range(30)]
    for one in rows:
        one["expected"] = "eleven"
        one["adapter"] |= {"exact_match": False, "rouge_l": 0.0, "chrf": 0.0}
    found = compare_served(tmp_path, encoder, rows, [said(text[:-3] + "six", of=one) for one in rows])
    assert found["status"] == 0
    assert found["verdict"].startswith("as good as what was evaluated: answers are equal up to token 4")
    assert "exact match +0.0" in found["verdict"]
    found = compare_served(tmp_path, encoder, rows[:10], [said(text[:-3] + "six", of=one) for one in rows[:10]])
    assert found["status"] == 5
