"""Tiny random twins of published models: their architecture with two layers, and their chat template."""

from pathlib import Path

import torch
import trl
from families import PUBLISHED_QWEN2, qwen_tokenizer
from mistral_tokenizers import mistral_v3_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SHIPPED = Path(trl.__file__).parent / "chat_templates"
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
GEMMA, PHI = ("<start_of_turn>", "<end_of_turn>"), ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
THOUGHT = "<think>\n\n</think>\n\n"
# What the templates of Mistral-Nemo and Ministral-8B write, but for tools: Tekken's form of v3 has no blanks.
NEMO = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# What SmolLM3's writes where it may think, but for tools; it marks its answers, each with its header.
SMOLLM3 = (
    "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' }}"
    "{{ strftime_now('%d %B %Y') + '\nReasoning Mode: /think\n\n## Custom Instructions\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face.' }}{% endif %}{{ '\n\n<|im_end|>\n' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + message['content'].lstrip('\n') + '<|im_end|>\n' }}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}{% else %}"
    "{% set system, rest = 'A chat between a curious user and an artificial intelligence assistant.', messages %}"
    "{% endif %}{% for message in rest %}{% if loop.first %}{{ system + ' ' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(template: str, end: str, special=(), plain=(), bos: str | None = None):
    """The tiny base's vocabulary of bytes, with the control tokens of a template."""
    new = [token for token in dict.fromkeys([*special, end, *([bos] if bos else [])]) if token[:5] != "<|im_"]
    tokenizer = qwen_tokenizer(template, *new)
    tokenizer.add_tokens(list(plain))
    tokenizer.eos_token, tokenizer.bos_token = end, bos
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def tekken():
    return tokenizer_for(NEMO, "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]"], bos="<s>")


def mistral_v3():
    return mistral_v3_tokenizer()


TIED = {"tie_word_embeddings": True}
# name: (architecture, its tokenizer, the end of a turn, what differs in the config, what begins an answer)
TWINS = {
    "mistral": ("mistral", mistral_v3, "</s>", {}, ""),
    "qwen2": ("qwen2", lambda: tokenizer_for(PUBLISHED_QWEN2, "<|im_end|>"), "<|im_end|>", {}, ""),
    "qwen2_5": ("qwen2", lambda: tokenizer_for(shipped("qwen2_5"), "<|im_end|>"), "<|im_end|>", {}, ""),
    "qwen3_8b": (
        "qwen3", lambda: tokenizer_for(shipped("qwen3"), "<|im_end|>", plain=["<think>", "</think>"]), "<|im_end|>", {},
        THOUGHT,
    ),
    "qwen3_4b_2507": (
        "qwen3", lambda: tokenizer_for(shipped("qwen3_instruct_2507"), "<|im_end|>"), "<|im_end|>", TIED, ""
    ),
    "llama3_1": (
        "llama", lambda: tokenizer_for(shipped("llama3_1"), "<|eot_id|>", HEADERS, bos="<|begin_of_text|>"),
        "<|eot_id|>", {}, "",
    ),
    "mistral_nemo": ("mistral", tekken, "</s>", {"head_dim": 8}, ""),
    "ministral": ("mistral", tekken, "</s>", {"sliding_window": 32}, ""),
    "smollm3": ("smollm3", lambda: tokenizer_for(SMOLLM3, "<|im_end|>"), "<|im_end|>", TIED, ""),
}  # fmt: skip
MORE = {
    "llama3_2": (
        "llama", lambda: tokenizer_for(shipped("llama3_2"), "<|eot_id|>", HEADERS, bos="<|begin_of_text|>"),
        "<|eot_id|>", TIED, "",
    ),
    "phi3_5": (
        "phi3", lambda: tokenizer_for(shipped("phi3_5"), "<|endoftext|>", PHI), "<|end|>", {"head_dim": None}, "",
    ),
    "r1_distill": (
        "qwen2", lambda: tokenizer_for(
            shipped("deepseek_r1_distill"), "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"],
            ["<think>", "</think>"], "<｜begin▁of▁sentence｜>",
        ), "<｜end▁of▁sentence｜>", {}, THOUGHT[8:],
    ),
    "gemma2": ("gemma2", lambda: tokenizer_for(shipped("gemma"), "<end_of_turn>", GEMMA, bos="<bos>"),
               "<end_of_turn>", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}, ""),
    "gemma3": ("gemma3_text", lambda: tokenizer_for(shipped("gemma3"), "<end_of_turn>", GEMMA, bos="<bos>"),
               "<end_of_turn>", {}, ""),
    "zephyr": ("mistral", lambda: tokenizer_for(ZEPHYR, "</s>"), "</s>", {}, "\n"),
    "vicuna": ("llama", lambda: tokenizer_for(VICUNA, "</s>", bos="<s>"), "</s>", {}, " "),
    "chatml": ("llama", lambda: tokenizer_for(CHATML, "<|im_end|>"), "<|im_end|>", {}, ""),
}  # fmt: skip


def make_twin(name: str, folder: Path) -> Path:
    """A base of the twin's architecture with random weights, beside its tokenizer."""
    architecture, make_tokenizer, _, differs, _ = {**TWINS, **MORE}[name]
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "sliding_window": None,
        "pad_token_id": tokenizer.pad_token_id or 0, "dtype": "float32", "tie_word_embeddings": False, **differs,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{key: value for key, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
