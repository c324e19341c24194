"""A command that is run once, in a folder of its own: what a row of ablations.py consists of.

Its result.json, written when it has ended well, says command, commit, version, seconds and what its inputs
were. A command that was stopped, or whose inputs are others now, is given again, and goes on by itself or
begins anew."""

import ctypes
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from common import UserError, open_folder, write_json
from findings.compare import read_lines
from training.run_folder import code_version, fingerprint


class Stage(NamedTuple):
    """A command and its folder."""

    kind: str
    command: list  # script and flags
    key: str
    folder: Path
    inputs: tuple = ()  # paths

    def result(self):
        """What is known of it once it is finished with the inputs that are there now; else None."""
        path = self.folder / "result.json"
        if not path.exists() or not all(Path(name).exists() for name in self.inputs):
            return None
        result = json.loads(path.read_text())
        same = result["inputs"] == self.fingerprints() and result["command"].endswith(" ".join(self.command))
        return result if same else None

    def fingerprints(self):
        return {str(name): fingerprint(name) for name in self.inputs}

    def run(self):
        """Runs it, or what is left of it. Raises UserError where it fails."""
        if self.result():
            return
        print(f"{self.folder} ...", end="", flush=True)
        here, log, began = Path(__file__).parent.parent, open_folder(self.folder) / "log.txt", time.time()
        commit, inputs = code_version(), self.fingerprints()
        processes = torch.cuda.device_count() or 2
        start = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if self.kind == "rl" else ["python"]
        module = ["-m", "torch.distributed.run"] if self.kind == "rl" else []
        words = [sys.executable, *module, *start[1:], here / self.command[0], *self.command[1:]]
        with open(log, "a", encoding="utf-8") as file:
            status = subprocess.run(words, stdout=file, stderr=file, preexec_fn=end_with_parent).returncode
        if status:
            raise UserError(f"{' '.join(self.command)} ended with status {status}, see {log}")
        steps = self.folder / "metrics.jsonl"  # they know of the seconds before a kill
        seconds = sum(step["seconds"] for step in read_lines(steps)) if steps.exists() else 0.0
        write_json(self.folder / "result.json", {
            "command": " ".join([*start, *self.command]), "seconds": max(seconds, time.time() - began),
            "commit": commit, "torch": torch.__version__, "inputs": inputs})
        print(f" {self.result()['seconds']:.0f} s", flush=True)


def end_with_parent():
    """In a child: it gets SIGTERM, at which it saves, when this script has ended, however it did."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
