"""Recipes, each in a fork of a process that has imported them, with a fault at one of its file operations.

Started with the shim in LD_PRELOAD; a JSON object a line of standard input is a list of jobs to run at once, and the
answer on standard output is a list of what became of them.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback

import datasets
import torch
from forks import run_recipe

for name in ("sft_lora", "merge_adapter", "evaluate_adapter", "sweep"):
    importlib.import_module(f"recipes.{name}")

SHIM, SECONDS = ctypes.CDLL(None), 600  # for a job
SHIM.faults_count.restype = ctypes.c_long


def work(job: dict) -> None:
    """Run `job` and leave how many file operations it had in its file `count`; never returns."""
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = job["cache"]
    code = 70
    try:
        texts = [job.get(key, "").encode() for key in ("under", "side", "journal")]
        SHIM.faults_arm(texts[0], ctypes.c_long(job.get("at", 0)), job.get("action", 0), *texts[1:])
        code = run_recipe(*job["command"])
    except BaseException:
        traceback.print_exc()
    SHIM.faults_arm(b"", ctypes.c_long(0), 0, b"", b"")
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        pids = {}
        for number, job in enumerate(json.loads(line)):
            if (pid := os.fork()) == 0:
                work(job)
            pids[pid] = number
        codes, end = [0] * len(pids), time.monotonic() + SECONDS
        while pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in pids:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                for late in pids:
                    os.kill(late, signal.SIGALRM)  # ends it with a status of its own
                end += SECONDS
            else:
                time.sleep(0.002)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
