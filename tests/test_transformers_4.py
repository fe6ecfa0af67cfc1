"""The merged folder in transformers 4, installed into a folder of its own: what most servers still run."""

import json
import os
import subprocess
import sys

from recipes.merge_adapter import merge_adapter
from recipes.utils.encoding import prompt_ids
from recipes.utils.evaluation import generate_answers

import pytest
from conftest import ROOT
from mistral_tokenizers import mistral_v1_legacy_tokenizer
from test_merged_folder import load, saved, small_run
from transformers import AutoTokenizer

SCRIPT = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.")
question = json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = {"class": type(tokenizer).__name__, "ids": tokenizer.apply_chat_template(question, add_generation_prompt=True)}
if len(sys.argv) > 3:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype="auto")
    ids = torch.tensor([found["ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24)
    found |= {"answer": output[0, ids.shape[1]:].tolist(), "dtype": str(model.dtype), "logits": model(ids).logits[0, -1].tolist()}
print(json.dumps(found))
"""
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two apples,  please.\n"}]


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """Runs SCRIPT with transformers 4 before all other packages."""
    target = tmp_path_factory.mktemp("transformers4")
    packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *packages], check=True
    )

    def run(*words) -> dict:
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, words)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_the_merged_folder_loads_and_answers_alike(tmp_path, transformers_4):
    adapter = small_run(tmp_path, "lora")
    merged = merge_adapter(adapter)
    tokenizer, model = AutoTokenizer.from_pretrained(adapter), load(merged)
    prompt = prompt_ids(QUESTION, tokenizer)
    found = transformers_4(merged, json.dumps(QUESTION), "generate")
    assert found["class"] == "Qwen2TokenizerFast"
    assert found["ids"] == prompt
    assert found["dtype"] == "torch.float32"
    answer = generate_answers(model, tokenizer, [prompt], 24)[0]
    assert len(found["answer"]) == answer.tokens
    assert tokenizer.decode(found["answer"], skip_special_tokens=True) == answer.text


@pytest.mark.slow
def test_mistrals_mended_tokenizer_gives_the_trained_ids(tmp_path, transformers_4):
    from recipes.utils import export
    from recipes.utils.chat_template import TEMPLATES
    from recipes.utils.config_keys import ModelOptions
    from recipes.utils.model import load_tokenizer

    base = saved(mistral_v1_legacy_tokenizer(), tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "mistral"}')
    trained, _ = load_tokenizer(ModelOptions(str(base), chat_template=str(TEMPLATES / "mistral_v1.jinja")))
    (tmp_path / "out").mkdir()
    export.write_tokenizer(base, tmp_path / "out", trained)
    found = transformers_4(tmp_path / "out", json.dumps(QUESTION))
    assert found["class"] == "PreTrainedTokenizerFast"
    assert found["ids"] == prompt_ids(QUESTION, trained)
