"""Processes for tests, as torchrun would start them, but in a blink: one process imports everything once and computes
nothing, and is forked for each.

    runs = launch(2, "rl.py", flags)            a script of the project, or "test_sharding:three_updates", a function
    runs = launch(4, ..., nodes=2)              of a test file, called with the flags; two machines with two each
    runs.wait()                                 raises with what they said if one does not end with 0
    runs.kill()                                 SIGKILL to all
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = "import rl, sft, eval, pytest, scale.sharding, scale.lora, scale.offload, demo.tiny_base"


class Launcher:
    """The process that is forked, as seen from the tests."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-u", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        atexit.register(self.process.kill)

    def ask(self, question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


launcher = None


def launch(processes, script, flags, nodes=1):
    global launcher
    launcher = launcher or Launcher()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    local = processes // nodes
    children = [{"script": str(script), "flags": [*map(str, flags)], "log": str(folder / f"{rank}.log"), "variables": {
        "RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}} for rank in range(processes)]
    return Runs([launcher.ask(child) for child in children], [Path(child["log"]) for child in children])


class Runs:
    """The processes of one run."""

    def __init__(self, pids, logs):
        self.pids, self.logs, self.statuses = pids, logs, {}

    def said(self):
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def poll(self):
        """Exit statuses so far, in order; None for who still runs."""
        for pid in self.pids:
            if pid not in self.statuses and (status := launcher.ask({"poll": pid})) is not None:
                self.statuses[pid] = status
        return [self.statuses.get(pid) for pid in self.pids]

    def wait(self, statuses=None, timeout_s=300):
        """Until all have ended, with 0 or `statuses`; if one fails the others are killed, as torchrun does."""
        end = time.time() + timeout_s
        while None in (now := self.poll()):
            failed = [status for status in now if status] if statuses is None else []
            if failed or time.time() > end:
                self.kill()
                raise AssertionError(f"exit statuses {now} {'' if failed else 'in time'}:\n{self.said()[-5000:]}")
            time.sleep(0.02)
        assert now == (statuses or [0] * len(now)), (now, self.said()[-5000:])
        return self.said()

    def signal(self, number):
        for pid in self.pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def kill(self):
        self.signal(signal.SIGKILL)
        while None in self.poll():
            time.sleep(0.01)


# ------------------------------------------------------------------------------------------- the forked process
def run_child(question):
    """A child: becomes a script, or calls a function of a test file."""
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2), os.close(0)
    os.environ.update({name: str(value) for name, value in question["variables"].items()})
    script, flags = question["script"], question["flags"]
    if ":" in script:
        module, function = script.split(":")
        getattr(importlib.import_module(module), function)(*flags)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # who leaves early is missed by the others
            torch.distributed.destroy_process_group()
    else:
        sys.argv = [str(ROOT / script), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    exec(PRELOAD)
    answers = sys.stdout
    for line in sys.stdin:
        question, answer = json.loads(line), None
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            status = 1
            try:
                run_child(question)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
