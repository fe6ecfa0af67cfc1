"""Rows a second from a JSONL file of chats to a trainer that is ready to train: this project against TRL alone.

    python benchmarks/prepare_data.py                 20,000 chats of about 960 tokens, three runs of each, in turn
    python benchmarks/prepare_data.py --rows 500 --runs 1

TRL reads the file with `datasets` and prepares it itself, by the same chat template and with assistant_only_loss; this
project prepares it and hands TRL the token ids and labels. Each run is a process of its own with an empty cache. The
labels of both are compared. Needs mistral-common (requirements-dev.txt) for a real vocabulary; no model is downloaded.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2.5


def write_chats(path: Path, rows: int) -> None:
    """Chats of one to four turns; words drawn by Zipf's law from a vocabulary of made-up ones, seeded."""
    rng = random.Random(0)
    words = ["".join(rng.choice("etaoinshrdlucmfwypvbgk") for _ in range(rng.randint(2, 9))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w") as file:
        for _ in range(rows):
            turns, messages = rng.randint(1, 4), []
            for _ in range(turns):
                for role, length in (("user", 90), ("assistant", 250)):
                    text = " ".join(
                        rng.choices(words, weights, k=max(3, int(rng.gauss(length, length / 3) / turns * 0.85)))
                    )
                    messages.append({"role": role, "content": text})
            file.write(json.dumps({"messages": messages}) + "\n")


def prepare_once(which: str, path: str) -> dict:
    """Prepare the file in this process; {"preparation", "seconds" (to a trainer), "peak_mb", ...}."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import datasets
    from mistral_tokenizers import mistral_v3_tokenizer
    from transformers import MistralConfig, MistralForCausalLM
    from trl import SFTConfig, SFTTrainer

    from recipes.utils.data import DataOptions, prepare

    datasets.disable_progress_bars()
    tokenizer = mistral_v3_tokenizer()
    tokenizer.chat_template = (ROOT / "configs" / "chat_templates" / "mistral_v3.jinja").read_text()
    config = MistralConfig(
        vocab_size=32768, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = MistralForCausalLM(config)
    output = tempfile.mkdtemp()
    args = SFTConfig(output_dir=output, max_length=8192, assistant_only_loss=which == "trl", use_cpu=True, bf16=False,
                     report_to="none")  # fmt: skip
    started = time.perf_counter()
    if which == "trl":
        rows = datasets.load_dataset("json", data_files=path, split="train")
    else:
        rows = prepare(DataOptions(train=path), tokenizer, args)[0].rows
    prepared = time.perf_counter() - started
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    # TRL prepares in the trainer's constructor; over rows that are ready it passes once more there.
    preparation = seconds if which == "trl" else prepared
    digest = hashlib.sha256()
    for row in trainer.train_dataset:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "preparation": preparation,
        "seconds": seconds,
        "peak_mb": peak,
        "rows": len(trainer.train_dataset),
        "labels": digest.hexdigest(),
    }


def run(which: str, path: Path) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(
            [sys.executable, __file__, "--once", which, str(path)], env=env, capture_output=True, text=True
        )
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(prepare_once(*options.once)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, options.rows)
        runs = [(run("trl", path), run("ours", path)) for _ in range(options.runs)]
    assert all(trl["labels"] == ours["labels"] for trl, ours in runs), "the labels differ"
    ratios = {key: statistics.median(trl[key] / ours[key] for trl, ours in runs) for key in ("preparation", "seconds")}
    figures = {
        "rows": options.rows, "runs": options.runs, "machine": f"{os.cpu_count()} cores", "limit": LIMIT,
        "trl_rows_per_second": options.rows / statistics.median(trl["preparation"] for trl, _ in runs),
        "rows_per_second": options.rows / statistics.median(ours["preparation"] for _, ours in runs),
        "ratio": ratios["preparation"], "ratio_to_a_trainer": ratios["seconds"], "each": runs,
        "trl_peak_mb": max(trl["peak_mb"] for trl, _ in runs), "peak_mb": max(ours["peak_mb"] for _, ours in runs),
    }  # fmt: skip
    print(f"TRL      {figures['trl_rows_per_second']:8,.0f} rows/s   peak {figures['trl_peak_mb']:,.0f} MB")
    print(f"recipes  {figures['rows_per_second']:8,.0f} rows/s   peak {figures['peak_mb']:,.0f} MB")
    print(f"ratio    {figures['ratio']:8.2f}   (asked: {LIMIT}); labels are equal")
    print(f"         {figures['ratio_to_a_trainer']:8.2f}   to a trainer: TRL passes over ready rows once more")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
