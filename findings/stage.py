"""A command that is run once, in a folder of its own: what a row of ablations.py consists of.

begun.json says with what it began: its flags, and what its inputs were; and the commits at which it was given.
One that was stopped is given again and goes on by itself; where it began with something else, its folder is
removed and it begins anew. result.json, written when it has ended well, adds command, version, device and
seconds. One that fails is not tried again by the same process."""

import ctypes
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

from common import UserError, gpu_names, open_folder, write_json
from findings.compare import read_lines
from training.run_folder import code_version, fingerprint

GUESS_S = {  # of stages of which none was run, by suite, on two cores
    "demo": {"sft": 220, "rl": 400, "successes": 240, "rft": 140, "eval": 30},
    "search": {"sft": 150, "rl": 1100, "successes": 240, "rft": 140, "eval": 25},
    "quick": {"sft": 30, "rl": 10, "successes": 50, "rft": 25, "eval": 5}}
FAILED = set()  # folders


class Stage(NamedTuple):
    """A command and its folder."""

    kind: str
    command: list  # script and flags
    key: str  # what tells it from others of its kind
    folder: Path
    inputs: tuple = ()  # paths

    def result(self):
        """What is known of it once it is finished with the inputs that are there now; else None."""
        path = self.folder / "result.json"
        if not path.exists() or not all(Path(name).exists() for name in self.inputs):
            return None
        result = json.loads(path.read_text())
        return result if result["begun"] == self.beginning() else None

    def beginning(self):
        return {"key": self.key, "inputs": [fingerprint(name) for name in self.inputs]}

    def run(self):
        """Runs it, or what is left of it. Raises UserError where it fails."""
        if self.result():
            return
        if self.folder in FAILED:
            raise UserError(f"{self.folder} has failed before")
        print(f"{self.folder} ...", end="", flush=True)
        began, begun = time.time(), self.beginning()
        path, old = self.folder / "begun.json", self.folder.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        before = json.loads(path.read_text()) if path.exists() else {"begun": begun, "commits": []}
        if before["begun"] != begun:
            self.folder.rename(old)  # at once, as a kill may come while it is removed
            shutil.rmtree(old)
            before["commits"] = []
        log, commits = open_folder(self.folder) / "log.txt", sorted({*before["commits"], str(code_version())})
        write_json(path, {"begun": begun, "commits": commits})
        command = ["python", *self.command]
        if self.kind == "rl":
            processes = len(gpu_names()) or 2
            command = ["torchrun", "--standalone", f"--nproc_per_node={processes}", *self.command]
        with open(log, "a", encoding="utf-8") as file:
            status = subprocess.run(as_words(command), stdout=file, stderr=file,
                                    preexec_fn=end_with_parent).returncode
        if status:
            FAILED.add(self.folder)
            raise UserError(f"{' '.join(self.command)} ended with status {status}, see {log}")
        steps = self.folder / "metrics.jsonl"  # they know of the seconds before a kill
        seconds = sum(step["seconds"] for step in read_lines(steps)) if steps.exists() else 0.0
        seconds = max(seconds, time.time() - began)
        write_json(self.folder / "result.json", {
            "command": " ".join(command), "seconds": seconds, "commits": commits, "begun": begun,
            "made_with": f"torch {torch.__version__}, {' + '.join(gpu_names()) or 'CPU'}"})
        print(f" {seconds:.0f} s", flush=True)


def as_words(command):
    """A command as it is started here: by this Python, with the scripts of this folder."""
    here = Path(__file__).parent.parent
    words = [here / word if word.endswith(".py") else word for word in command[1:]]
    return [sys.executable, *(["-m", "torch.distributed.run"] if command[0] == "torchrun" else []), *words]


def show_plan(chains, runs):
    """Prints what is missing, and how long it takes by what such stages took before. chains: (place, row, its
    Stages)."""
    total_s, seen = 0.0, set()
    for place, row, stages in chains:
        guess_s = GUESS_S.get(place.suite.split("-")[-1], GUESS_S["demo"])
        missing = [stage for stage in stages if not stage.result() and stage.folder not in seen]
        seen |= {stage.folder for stage in missing}
        for stage in missing:
            before = runs.glob(f"{place.suite}/*/stages/{stage.kind}-*/result.json")
            taken = [json.loads(path.read_text())["seconds"] for path in before]
            total_s += mean(taken or [guess_s[stage.kind]])
        todo = ", ".join(stage.kind for stage in missing) or "-"
        print(f"{place.suite} {place.seed}  {row.group:9} {row.name:20} {todo:26} {row.shows}")
    print(f"{len(seen)} stages to run, some {total_s / 60:.0f} minutes", flush=True)


def end_with_parent():
    """In a child: it gets SIGTERM, at which it saves, when this script has ended, however it did."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
