"""Whatever goes wrong at a file operation, what is left is taken up to the very result of a run that nothing went wrong
with, or refused by name.

    python tests/faults/injector.py --states 1000             each scenario and kind of fault, spread out
    python tests/faults/injector.py --seed 7 --mixes 50       faults, signals and deaths of two processes at random

Prints a table, and each state that fell with the words that try it again. See docs/reliability.md.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ACTIONS = ("none", "kill", "full disk", "I/O error", "no access", "quota", "short write", "power: names lost",
           "power: zeros", "power: cut off", "SIGTERM", "SIGHUP", "SIGINT")  # fmt: skip
FAULTS = tuple(range(1, 10))
CALM = (0, 1, 2, 3, 75, -9)


class Scenario(NamedTuple):
    """`command(folder)` runs where the template `start` was copied to; `outcome(folder)` is what is compared."""

    name: str
    start: str | None
    command: Callable[[Path], list]
    again: Callable[[Path], list]
    outcome: Callable[[Path], dict]
    under: str  # the folder, in the state's own, whose operations are counted


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def of_a_run(folder: Path) -> dict:
    """All that must not depend on what happened on the way: the adapter, losses, rows of each step, what is left."""
    run = folder / "run"
    if (
        not (run / "adapter_config.json").is_file()
        or json.loads((run / "run.json").read_text())["status"] != "finished"
    ):
        return {}
    metrics = lines(run / "metrics.jsonl")
    return {
        "adapter": sha(run / "adapter_model.safetensors"), "config": sha(run / "adapter_config.json"),
        "losses": [(line["step"], line["loss"]) for line in metrics if "loss" in line],
        "evaluations": [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line],
        "ledger": [sorted(line.items()) for line in lines(run / "ledger.jsonl")],
        "samples": [(line["step"], line["where"], line["answer"]) for line in lines(run / "samples.jsonl")],
        "checkpoints": sorted(path.name for path in run.glob("checkpoint-*")),
        "left over": sorted(path.name for path in run.rglob(".*")),
    }  # fmt: skip


def of_a_merge(folder: Path) -> dict:
    merged = folder / "out" / "merged"
    return {path.name: sha(path) for path in sorted(merged.iterdir())} if merged.is_dir() else {}


def of_an_evaluation(folder: Path) -> dict:
    """The rows, and the figures with the adapter that they are of: one set, or none."""
    found = folder / "run" / "evaluation"
    if not found.is_dir():
        return {}
    parts = {path.name: sha(path) for path in sorted(found.iterdir())}
    return parts | {"left over": sorted(path.name for path in (folder / "run").glob(".*"))}


def of_a_cache(folder: Path) -> dict:
    entries = sorted(entry for entry in (folder / "cache" / "lora-recipes").glob("*") if "." not in entry.name)
    return {f"{entry.name}/{path.name}": sha(path) for entry in entries for path in sorted(entry.iterdir())}


def of_a_sweep(folder: Path) -> dict:
    trials = sorted((folder / "sweep").glob("trial-*/adapter_model.safetensors"))
    return {path.parent.name: sha(path) for path in trials}


class Injector:
    """A server of forks under the shim, and templates of folders to begin in."""

    def __init__(self, work: Path, samples: int = 1):
        self.work, self.states, self.samples = work, 0, samples
        shim = work / "shim.so"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", shim, HERE / "shim.c", "-ldl", "-lpthread"], check=True)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        env = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
               "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}  # fmt: skip
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, HERE / "server.py"], env=env, cwd=work, **pipes)
        self.config, self.expected = self.write_config(), {}
        (work / "side").mkdir()
        assert self.server.stdout.readline() == "ready\n"

    def write_config(self) -> Path:
        from conftest import small_config

        training = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "max_length": 200}
        data = {"samples": self.samples}
        path = small_config(self.work, lora={"lora_dropout": 0.1}, training=training, data=data)
        for name, rows in (("train", 10), ("validation", 3)):
            file = self.work / f"{name}.jsonl"
            file.write_text("\n".join(file.read_text().splitlines()[:rows]) + "\n")
        return path

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()

    def ask(self, *jobs: dict) -> list[int]:
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def job(self, folder: Path, command: list, cache: Path | None = None, **fault) -> dict:
        cache = cache or self.work / "cache"
        return {"command": [str(word) for word in command], "log": str(folder / "log"), "cache": str(cache), **fault}

    def scenarios(self) -> dict[str, Scenario]:
        def train(folder, *flags):
            return ["sft_lora", self.config, "--training.output_dir", folder / "run", *flags]

        def merge(folder):
            return ["merge_adapter", folder / "run", "--output", folder / "out" / "merged", "--no-verify"]

        def score(folder):
            return ["evaluate_adapter", folder / "run", "--max-rows", 1, "--max-new-tokens", 2]

        def sweep(folder):
            values = ["--lora.lora_alpha", "4,8", "--training.max_steps", 2]
            return ["sweep", self.config, "--folder", folder / "sweep", *values]

        def resume(folder):
            return train(folder, "--resume")

        def prepare(folder):
            return train(folder, "--dry-run")

        found = [
            Scenario("a run", None, resume, resume, of_a_run, "run"),
            Scenario("a resume", "stopped", resume, resume, of_a_run, "run"),
            Scenario("row cache", None, prepare, prepare, of_a_cache, "cache"),
            Scenario("a merge", "finished", merge, merge, of_a_merge, "out"),
            Scenario("an evaluation", "scored", score, score, of_an_evaluation, "run"),
            Scenario("a sweep", None, sweep, sweep, of_a_sweep, "sweep"),
        ]
        return {one.name: one for one in found}

    def begin(self, start: str | None) -> Path:
        """A new folder, a copy of the template `start`, which is made the first time."""
        folder = self.work / f"state-{self.states}"
        self.states += 1
        folder.mkdir()
        if start:
            shutil.copytree(self.template(start), folder, dirs_exist_ok=True)
        return folder

    def template(self, name: str) -> Path:
        folder = self.work / name
        if folder.is_dir():
            return folder
        if name == "finished":
            folder.mkdir()
            assert self.ask(self.job(folder, self.scenarios()["a run"].command(folder))) == [0], (
                folder / "log"
            ).read_text()
        elif name == "scored":  # with the figures of another evaluation
            shutil.copytree(self.template("finished"), folder)
            command = [*self.scenarios()["an evaluation"].command(folder), "--max-new-tokens", 1]
            assert self.ask(self.job(folder, command)) == [0], (folder / "log").read_text()
        elif name == "stopped":  # killed in the midst of its second checkpoint
            folder.mkdir()
            one = self.scenarios()["a run"]
            place = next(number for number, kind, path in self.journal(one) if path.endswith("run/checkpoint-4"))
            fault = {"under": str(folder / "run"), "at": place, "action": 1}
            assert self.ask(self.job(folder, one.command(folder), **fault)) == [-9]
            (folder / "log").unlink()
        return folder

    def journal(self, one: Scenario) -> list[tuple[int, str, str]]:
        """The operations of a scenario without a fault, and what comes of it, kept as the expected outcome."""
        folder = self.begin(one.start)
        file = folder / "journal"
        command = self.job(folder, one.command(folder), **self.place(one, folder), journal=str(file))
        assert self.ask(command) == [0], (folder / "log").read_text()
        self.expected[one.name] = one.outcome(folder)
        found = [line.split(" ", 2) for line in file.read_text().splitlines()]
        shutil.rmtree(folder)
        return [(int(number), kind, path) for number, kind, path in found]

    def place(self, one: Scenario, folder: Path) -> dict:
        cache = folder / "cache" if one.under == "cache" else None
        return {"under": str(folder / one.under), "side": str(self.work / "side")} | (
            {"cache": cache and str(cache)} if cache else {}
        )

    def try_state(self, one: Scenario, at: int, action: int) -> tuple[str, str]:
        """("equal" | "refused" | "fell", why) for a fault of the kind `action` at the operation `at`."""
        if one.name not in self.expected:
            self.journal(one)
        folder = self.begin(one.start)
        where = self.place(one, folder)
        (code,) = self.ask(self.job(folder, one.command(folder), **where, at=at, action=action))
        verdict = self.judge(one, folder, code)
        shutil.rmtree(folder, ignore_errors=True)
        return verdict

    def judge(self, one: Scenario, folder: Path, code: int, allowed=CALM) -> tuple[str, str]:
        log = (folder / "log").read_text() if (folder / "log").is_file() else ""
        if code not in allowed or "Traceback" in log:
            return "fell", f"status {code}: {log[-1500:]}"
        expected = self.expected[one.name]
        if code == 0 or (one.outcome(folder) == expected and one.name != "a run"):
            found = one.outcome(folder)
            if found == expected:
                return "equal", ""
            if found | {"left over": []} != expected:
                return "fell", f"status 0, and {differing(found, expected)}"
            # what could not be removed goes with the next command
        cache = {key: value for key, value in self.place(one, folder).items() if key == "cache"}
        (code,) = self.ask(self.job(folder, one.again(folder), **cache))
        log = (folder / "log").read_text()
        if "Traceback" in log:
            return "fell", f"again: status {code}: {log[-1500:]}"
        found = one.outcome(folder)
        if found == expected:
            return "equal", ""
        if code in (1, 2):
            return "refused", log.strip().splitlines()[-1]
        return "fell", f"again: status {code}, and {differing(found, expected)}"

    def try_mix(self, seed: int) -> tuple[str, str]:
        """A run with a few faults and signals after each other, now and then two processes at once."""
        drawn, one = random.Random(seed), self.scenarios()["a run"]
        operations = len(self.journal(one)) if one.name not in self.expected else 300
        folder = self.begin(None)
        for _ in range(drawn.randint(1, 4)):
            jobs = []
            for number in range(drawn.choice([1, 1, 2])):
                fault = {"at": drawn.randint(1, operations), "action": drawn.randint(1, len(ACTIONS) - 1)}
                side = {
                    "side": str(self.work / "side"),
                    "under": str(folder / "run"),
                    "log": str(folder / f"log-{number}"),
                }
                jobs.append({**self.job(folder, one.command(folder)), **side, **fault})
            codes = self.ask(*jobs)
            told = "".join(Path(job["log"]).read_text() for job in jobs if Path(job["log"]).is_file())
            if any(code not in (*CALM, -15, -1) for code in codes) or "Traceback" in told:
                return "fell", f"status {codes}: {told[-1500:]}"
        (code,) = self.ask(self.job(folder, one.again(folder)))
        verdict = self.judge(one, folder, code)
        shutil.rmtree(folder, ignore_errors=True)
        return verdict


def differing(found: dict, expected: dict) -> str:
    keys = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
    return "; ".join(f"{key} is {str(found.get(key))[:300]}, not {str(expected.get(key))[:300]}" for key in keys[:3])


def spread(operations: int, states: int) -> list[int]:
    """Up to `states` of the operations, evenly, and one after the last."""
    step = max(1.0, operations / states)
    return sorted({1 + int(number * step) for number in range(int(operations / step))})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=0, help="how many states in all, 0 for none")
    parser.add_argument("--scenario", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--at", type=int, help="only this operation")
    parser.add_argument("--action", choices=ACTIONS, help="only this kind of fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixes", type=int, default=0, help="how many random mixes")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no state after so many")
    given = parser.parse_args()
    fell, table, end = [], {}, time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as work:
        injector = Injector(Path(work))
        every = [one for one in injector.scenarios().values() if one.name in (given.scenario or [one.name])]
        shares = {one.name: 1 / 60 if one.name == "a sweep" else 1 for one in every}
        plan = []
        for one in every if given.states or given.at else []:
            operations = len(injector.journal(one))
            actions = [ACTIONS.index(given.action)] if given.action else FAULTS
            each = max(1, int(given.states * shares[one.name] / sum(shares.values()) / len(actions)))
            plan += [
                (one, at, action) for action in actions for at in ([given.at] if given.at else spread(operations, each))
            ]
            print(f"{one.name}: {operations} operations", flush=True)
        random.Random(given.seed).shuffle(plan)  # so that a part of it is a sample of all
        for seed in range(given.seed, given.seed + given.mixes):
            if time.monotonic() > end:
                break
            verdict, why = injector.try_mix(seed)
            table.setdefault(("random mix", ""), Counter())[verdict] += 1
            if verdict == "fell":
                fell.append(f"--seed {seed} --mixes 1: {why}")
                print(fell[-1], flush=True)
        for one, at, action in plan:
            if time.monotonic() > end:
                break
            verdict, why = injector.try_state(one, at, action)
            table.setdefault((one.name, ACTIONS[action]), Counter())[verdict] += 1
            if verdict == "fell":
                fell.append(f"--scenario '{one.name}' --at {at} --action '{ACTIONS[action]}': {why}")
                print(fell[-1], flush=True)
        injector.close()
    print("\n| what | fault | states | bit-equal | refused by name | fell |\n| --- | --- | ---: | ---: | ---: | ---: |")
    total = Counter()
    for (name, action), found in sorted(table.items()):
        total += found
        print(f"| {name} | {action} | {found.total()} | {found['equal']} | {found['refused']} | {found['fell']} |")
    print(f"| all | | {total.total()} | {total['equal']} | {total['refused']} | {total['fell']} |")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
