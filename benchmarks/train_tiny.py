"""Training the tiny base on a CPU: this project's recipe against a plain TRL script on the same rows, in turn.

    python benchmarks/train_tiny.py                three rounds of 60 steps; medians

Both train from the same seed on the same labels, so the losses must be equal (but for rounding: the recipe's LoRA
layers take sums in another order); what differs is what a recipe does besides (progress, metrics.jsonl, guards) and the
levers that it pulls. The time is the trainer's own, without start-up. A third run packs the rows: its tokens a second
against those of the padded one, of which padding is none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.95  # of TRL's steps a second
PLAIN = """
import json, sys
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

rows, base, template, steps, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.chat_template = open(template).read()
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base),
    args=SFTConfig(
        output_dir=output, max_steps=int(steps), learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=0.03,
        max_length=192, per_device_train_batch_size=16, gradient_checkpointing=False, assistant_only_loss=True,
        logging_steps=10, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
seconds = trainer.train().metrics["train_runtime"]
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(json.dumps({"seconds": seconds, "losses": losses}))
"""


def run(words: list[str]) -> str:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def plain(steps: int, folder: str) -> dict:
    tiny = ROOT / "examples" / "tiny"
    template = ROOT / "configs" / "chat_templates" / "qwen2.jinja"
    words = ["-c", PLAIN, str(tiny / "train.jsonl"), str(tiny / "base"), str(template), str(steps), f"{folder}/plain"]
    return json.loads(run(words).splitlines()[-1])


def ours(steps: int, folder: str, packing: bool = False) -> dict:
    name = "packed" if packing else "ours"
    settings = {
        "max_steps": steps, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false",
        "output_dir": f"{folder}/{name}", "packing": str(packing).lower(),
    }  # fmt: skip
    flags = [word for key, value in settings.items() for word in (f"--training.{key}", str(value))]
    run(["recipes/sft_lora.py", "configs/tiny.yaml", *flags])
    record = json.loads(Path(folder, name, "run.json").read_text())
    lines = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    seconds, losses = record["train"]["train_runtime"], [line["loss"] for line in lines]
    return {"seconds": seconds, "losses": losses, "tokens_per_second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    pairs = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            steps = options.steps
            pairs.append((plain(steps, folder), ours(steps, folder), ours(steps, folder, packing=True)))
    apart = max(abs(a - b) for trl, own, _ in pairs for a, b in zip(trl["losses"], own["losses"], strict=True))
    ratio = statistics.median(trl["seconds"] / own["seconds"] for trl, own, _ in pairs)
    speeds = [[pair[index]["tokens_per_second"] for pair in pairs] for index in (1, 2)]
    packed = statistics.median(packed / padded for padded, packed in zip(*speeds, strict=True))
    load = os.getloadavg()[0]
    print(f"load average {load:.1f}, {os.cpu_count()} cores")
    for name, index in (("TRL", 0), ("recipe", 1)):
        middle = statistics.median(options.steps / pair[index]["seconds"] for pair in pairs)
        print(f"{name:8}{middle:7.2f} steps/s")
    print(f"ratio   {ratio:7.2f}   (asked: {LIMIT}); losses are apart by {apart:.1e}")
    padded, own = map(statistics.median, speeds)
    print(f"packed  {own:7,.0f} tokens/s, padded {padded:,.0f}: {packed:.2f} ×")
    if options.json:
        figures = {"steps": options.steps, "each": pairs, "ratio": ratio, "losses_apart": apart, "limit": LIMIT,
                   "packed_to_padded": packed,
                   "load_average": load, "machine": f"{os.cpu_count()} cores"}  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
