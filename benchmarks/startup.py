"""Seconds until a command answers, against `from trl import SFTTrainer` in turn within one run.

python benchmarks/startup.py                three rounds; medians
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BROKEN = "model:\n  name_or_path: [x\n"
TINY = ROOT / "configs" / "tiny.yaml"
COMMANDS = {  # name -> (words, exit status)
    "from trl import SFTTrainer": (["-c", "from trl import SFTTrainer"], 0),
    "--help": (["recipes/sft_lora.py", "--help"], 0),
    "a config that is not YAML": (["recipes/sft_lora.py", "BROKEN"], 2),
    "a misspelt key": (["recipes/sft_lora.py", str(TINY), "--training.learning_rat", "1"], 2),
    "a plan": (["recipes/plan_run.py", str(TINY), "--gpu", "24GB"], 0),
    "a dry run": (["recipes/sft_lora.py", str(TINY), "--dry-run"], 0),
}
# Seconds on an idle machine of two cores.
LIMITS = {"--help": 1, "a config that is not YAML": 1, "a plan": 10}


def seconds(words: list[str], status: int, cwd: Path) -> float:
    began = time.perf_counter()
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != status:
        sys.exit(f"{words}: status {done.returncode}\n{done.stderr}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.yaml"
        broken.write_text(BROKEN)
        found = {name: [] for name in COMMANDS}
        for _ in range(options.rounds):
            for name, (words, status) in COMMANDS.items():
                found[name].append(seconds([str(broken) if word == "BROKEN" else word for word in words], status, ROOT))
    stock = statistics.median(found["from trl import SFTTrainer"])
    load = os.getloadavg()[0]
    print(f"load average {load:.1f}, {os.cpu_count()} cores")
    for name, times in found.items():
        middle = statistics.median(times)
        limit = f"   (asked: {LIMITS[name]} s)" if name in LIMITS else ""
        print(f"{name:30}{middle:7.2f} s   {middle / stock:5.2f} of the import{limit}")
    if options.json:
        figures = {"each": found, "limits": LIMITS, "load_average": load, "machine": f"{os.cpu_count()} cores"}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
