"""Processes for tests, as torchrun would start them, but in a blink: one process imports everything once,
computes nothing, and is forked for each.

    runs = launch(2, "rl.py", flags)                   a script of the project
    runs = launch(2, "test_sharding:updates", flags)   a function of a test file, called with the flags
    runs = launch(4, ..., nodes=2)                     two machines with two processes each
    runs.wait()                                        returns what they said; raises with it if one fails
    runs.kill()                                        SIGKILL to all

Flags arrive as texts. A child cannot use CUDA if its parent has: what is imported here must not even ask
how many GPUs there are.
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
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# the slow imports of all scripts and tests; what else a child needs it imports itself
PRELOAD = ("pytest", "data_prep", "sft", "rl", "eval", "scale.sharding", "scale.offload", "scale.lora",
           "scale.plan", "scale.memory")


class Launcher:
    """The process that is forked, as seen from the tests. It ends, with its children, when its input does."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-u", __file__], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        atexit.register(self.end)

    def ask(self, question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


launcher = None


def launch(processes, script, flags=(), nodes=1):
    """Starts the processes of a run, see above. Returns Runs."""
    global launcher
    if processes > 1 and os.environ.get("TEST_DEVICE") == "cuda":
        pytest.skip("needs a GPU for each process")
    if launcher is None:
        launcher = Launcher()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    local = processes // nodes
    pids, logs = [], []
    for rank in range(processes):
        variables = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank % local,
                     "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        logs.append(folder / f"{rank}.log")
        pids.append(launcher.ask({"script": str(script), "flags": [*map(str, flags)], "log": str(logs[-1]),
                                  "variables": variables}))
    return Runs(pids, logs)


class Runs:
    """The processes of one run."""

    def __init__(self, pids, logs):
        self.pids, self.logs, self.statuses = pids, logs, {}

    def said(self):
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def poll(self):
        """Exit statuses so far, in order; None for who still runs."""
        for pid in self.pids:
            if self.statuses.get(pid) is None:
                self.statuses[pid] = launcher.ask({"poll": pid})
        return [self.statuses[pid] for pid in self.pids]

    def wait(self, statuses=None, timeout_s=300):
        """Until all have ended, with 0 or `statuses`; if one fails the others are killed, as torchrun
        does."""
        end = time.time() + timeout_s
        while None in (now := self.poll()):
            failed = statuses is None and any(now)
            if failed or time.time() > end:
                self.kill()
                late = "" if failed else "in time"
                raise AssertionError(f"exit statuses {now} {late}:\n{self.said()[-5000:]}")
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


# ----------------------------------------------------------------------------------------- the forked process
def run_child(question):
    """A child: becomes a script, or calls a function of a test file."""
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
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


def fork_child(question):
    """Returns its process id; in the child, never."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run_child(question)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for module in PRELOAD:
        importlib.import_module(module)
    assert not torch.cuda.is_initialized()
    running = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        else:
            answer = fork_child(question)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
