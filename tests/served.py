"""A small OpenAI-compatible server in this process: a real model answers, with the faults that servers have."""

import contextlib
import json
import random
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from conftest import BASE, TINY, chat, read_jsonl, run_recipe, small_config, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter

ROWS = 24
BEGUN = "<|im_start|>assistant\n"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
DEFAULT = "{% if messages[0].role != 'system' %}" + SYSTEM + "{% endif %}"


def scored_run(folder):
    """A run, scored and merged, that knows its few short rows by heart and ends each answer by itself; its base is the
    tiny one with a BOS, which its template writes."""
    base, draw = folder / "base", random.Random(0)
    cities = [json.loads(row["messages"][1]["content"])["city"] for row in read_jsonl(TINY / "train.jsonl")[:400]]
    cities = list(dict.fromkeys(cities))[:ROWS]
    rows = [chat(f"Who is in room {number}?", f"{city} {draw.randint(10, 99)}") for number, city in enumerate(cities)]
    shutil.copytree(BASE, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + DEFAULT + CHATML)
    known = str(write_jsonl(folder / "known.jsonl", rows))
    training = {
        "max_steps": 100, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "packing": False,
        "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
    }  # fmt: skip
    sections = {
        "model": {"name_or_path": str(base)}, "data": {"train": known, "test": known, "validation": None},
        "lora": {"r": 16, "lora_alpha": 32}, "training": training,
    }  # fmt: skip
    assert run_recipe("sft_lora", small_config(folder, **sections)) == 0
    found = evaluate_adapter(folder / "run", max_rows=ROWS)["adapter"]
    assert min(found["exact_match"], found["stopped"]) > 0.9
    merge_adapter(folder / "run", verify=False)
    return folder / "run"


class Served:
    """The model in `folder`, answering as a server of it would, but for the faults that are set on it."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ends = self.model.generation_config.eos_token_id
        self.stops = ends if isinstance(ends, list) else [ends]
        self.template, self.before, self.most = None, [], None
        self.names, self.asked, self.headers, self.counts = ["mine"], [], [], True

    def prompt(self, asked: dict) -> list[int]:
        how = {"add_generation_prompt": True, "chat_template": self.template, "return_dict": False}
        how |= asked.get("chat_template_kwargs", {})
        ids = self.tokenizer.apply_chat_template(asked["messages"], tools=asked.get("tools"), **how)
        return self.before + ids

    def generate(self, asked: dict) -> tuple[list[int], list[int], str]:
        """(prompt, answer, finish_reason)"""
        prompt, most = self.prompt(asked), min(asked["max_tokens"], self.most or asked["max_tokens"])
        pad = self.tokenizer.pad_token_id
        how = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=self.stops, pad_token_id=pad)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        answer = output[0, len(prompt) :].tolist()
        return prompt, answer, "stop" if self.stops and answer[-1] in self.stops else "length"

    def completion(self, asked: dict) -> dict:
        self.asked.append(asked)
        prompt, answer, reason = self.generate(asked)
        message = {"role": "assistant", "content": self.tokenizer.decode(answer, skip_special_tokens=True)}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(answer)} if self.counts else None
        return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}

    def pieces(self, asked: dict):
        """The answer as server-sent events, some words at a time."""
        text = self.completion(asked)["choices"][0]["message"]["content"]
        for start in range(0, len(text), 7):
            yield {"choices": [{"delta": {"content": text[start : start + 7]}}]}
        yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        yield {"choices": [], "usage": {"prompt_tokens": 1}}


@contextlib.contextmanager
def listening(answer):
    """The address of a server here: `answer(path, body, headers)` gives each reply: status, content type, text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            status, kind, text = answer(self.path, body, self.headers)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serving(served: Served):
    """The address of a server of `served`."""

    def answer(path, body, headers):
        served.headers.append(dict(headers))
        if path == "/v1/models":
            return 200, "application/json", json.dumps({"data": [{"id": name} for name in served.names]})
        assert path == "/v1/chat/completions"
        if body["stream"]:
            events = "".join(f"data: {json.dumps(piece)}\n\n" for piece in served.pieces(body))
            return 200, "text/event-stream", f"{events}data: [DONE]\n\n"
        return 200, "application/json", json.dumps(served.completion(body))

    with listening(answer) as url:
        yield url
