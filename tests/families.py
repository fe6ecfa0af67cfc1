"""The families of models that tests are about: their tokenizers with chat templates, and what of a row carries loss."""

import copy

from conftest import TINY
from mistral_tokenizers import mistral_v1_tokenizer, mistral_v3_tokenizer
from transformers import AutoTokenizer

from recipes.utils.data.template import TEMPLATES

# chat_template in the tokenizer_config.json of Qwen2-7B and Qwen2-7B-Instruct.
PUBLISHED_QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen_tokenizer(template=PUBLISHED_QWEN2, *special_tokens):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", *special_tokens]})
    tokenizer.chat_template = template
    return tokenizer


def with_template(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


FAMILIES = {  # name: (a tokenizer with its template, the end of a turn)
    "qwen2": (lambda: with_template(qwen_tokenizer(), "qwen2"), "<|im_end|>"),
    "mistral v1": (lambda: with_template(mistral_v1_tokenizer(), "mistral_v1"), "</s>"),
    "mistral v3": (lambda: with_template(mistral_v3_tokenizer(), "mistral_v3"), "</s>"),
}


def trained_texts(tokenizer, encoded):
    """The decoded runs of labelled tokens."""
    runs, run = [], []
    for token, label in zip([*encoded.input_ids, 0], [*encoded.labels, -100], strict=True):
        if label != -100:
            assert label == token
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
    return runs
