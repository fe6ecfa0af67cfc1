"""The merged folder in transformers 4, installed into a folder of its own: what most servers still run."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_recipe
from mistral_tokenizers import mistral_v1_legacy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.merge_adapter import merge_adapter
from recipes.utils.data import Encoder, load_tokenizer
from recipes.utils.merge import write_tokenizer
from recipes.utils.model import generate_answers

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
    found |= {"answer": output[0, ids.shape[1]:].tolist(), "dtype": str(model.dtype)}
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
def test_the_merged_folder_loads_and_answers_alike(tmp_path, config_file, transformers_4):
    assert run_recipe("sft_lora", config_file(training={"learning_rate": 5e-3})) == 0
    merged = merge_adapter(tmp_path / "run")
    encoder = Encoder(AutoTokenizer.from_pretrained(tmp_path / "run"))
    prompt = encoder.prompt_ids(QUESTION)
    found = transformers_4(merged, json.dumps(QUESTION), "generate")
    assert found["class"] == "Qwen2TokenizerFast"
    assert found["ids"] == prompt
    assert found["dtype"] == "torch.float32"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    answer = generate_answers(model, encoder, [prompt], 24)[0]
    assert len(found["answer"]) == answer.tokens
    assert encoder.tokenizer.decode(found["answer"], skip_special_tokens=True) == answer.text


@pytest.mark.slow
def test_mistrals_mended_tokenizer_gives_the_trained_ids(tmp_path, transformers_4):
    base, output = tmp_path / "base", tmp_path / "out"
    mistral_v1_legacy_tokenizer().save_pretrained(base)
    (base / "config.json").write_text('{"model_type": "mistral"}')
    trained = load_tokenizer(base, str(ROOT / "configs" / "chat_templates" / "mistral_v1.jinja"))
    output.mkdir()
    write_tokenizer(base, output, trained)
    found = transformers_4(output, json.dumps(QUESTION))
    assert found["class"] == "PreTrainedTokenizerFast"
    assert found["ids"] == Encoder(trained).prompt_ids(QUESTION)
