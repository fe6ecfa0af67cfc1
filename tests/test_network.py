"""Nothing secret or local stands in what a run writes, and nothing goes to a network that nobody asked for."""

import json
import os
import shutil
import subprocess
import sys

from conftest import BASE, ROOT, TINY, small_config, write_jsonl

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
         "MLFLOW_TRACKING_PASSWORD", "SOME_PASSWORD")  # fmt: skip
SECRETS = {name: f"s3cret-{name.lower()}" for name in NAMES}


def test_no_secret_and_no_local_path_stands_in_any_file_and_nothing_calls_home(tmp_path):
    """A true process runs both recipes as a person would, with every secret set, absolute paths in its config, a bad
    row, and no network."""
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:40]]
    train = write_jsonl(tmp_path / "some-customer.jsonl", [*rows, {"messages": []}])
    model = {"name_or_path": str(shutil.copytree(BASE, tmp_path / "base"))}
    data = {"train": str(train), "on_bad_row": "skip"}
    config = small_config(tmp_path, model=model, data=data, training={"report_to": "tensorboard"})
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI"):
        environment.pop(name, None)
    recipes = []
    for method in ("lora", "qlora"):
        run = tmp_path / method
        recipes += [f"sft_{method}.py", config, "--training.output_dir", run, "--then"]
        recipes += ["evaluate_adapter.py", run.name, "--max-rows", "1", "--then"]
        recipes += ["merge_adapter.py", run.name, "--then"]
    words = [ROOT / "recipes" / word if str(word).endswith(".py") else word for word in recipes[:-1]]
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "without_network.py", *map(str, words)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "NETWORK" not in result.stderr
    for method in ("lora", "qlora"):
        assert (tmp_path / method / "merged" / "config.json").is_file()
        files = [path for path in (tmp_path / method).rglob("*") if path.is_file()]
        assert len(files) > 20
        assert not [path for path in files if path.name == "training_args.bin"]
        for path in files:
            content = path.read_bytes()
            for secret in SECRETS.values():
                assert secret.encode() not in content, path
            for local in (str(tmp_path), str(ROOT)):
                assert local.encode() not in content, (path, local)
