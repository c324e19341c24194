"""SIGTERM: real processes get real signals, wherever they are, and end with 143 in time."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.stopping import Stopping

ROOT = Path(__file__).resolve().parent.parent
HANDLER = signal.getsignal(signal.SIGTERM)  # before any test
BEGIN = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
from training.stopping import Stopping
say = lambda *words: print(*words, flush=True)
"""
JOIN = BEGIN + """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
"""


class Child:
    """A Python process that runs `lines` after BEGIN or another beginning; it is killed after the test."""

    def __init__(self, lines, begin=BEGIN, **variables):
        self.process = subprocess.Popen([sys.executable, "-c", begin + lines], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def says(self, word, within_s=60):
        """Waits for the next line, which must be this word."""
        assert select.select([self.process.stdout], [], [], within_s)[0], f"no {word}"
        line = self.process.stdout.readline().strip()
        assert line == word, line or self.process.stderr.read()

    def stop(self, times=1, pause_s=0.2):
        for _ in range(times):
            self.stopped_at = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
            time.sleep(pause_s if times > 1 else 0)

    def end(self, within_s):
        """(exit status, the rest of what it says on stdout, stderr)."""
        said, complained = self.process.communicate(timeout=within_s)
        return self.process.returncode, said.split(), complained


WAITING = {
    "in a future": """
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(work)
            say("inside")
            future.result()
        except BaseException:
            pool.shutdown(wait=False)
            over.set()
            raise""",
    "computing": """
    thread = threading.Thread(target=work)
    thread.start()
    try:
        say("inside")
        while True: sum(range(1000))
    finally:
        over.set()""",
    "asleep": """
    say("inside")
    time.sleep(60)""",
    "in a generator": """
    def numbers():
        try:
            while True: yield time.sleep(0.001)
        finally:
            over.set()
    say("inside")
    for _ in numbers(): pass"""}


@pytest.mark.parametrize("where", WAITING)
def test_what_can_be_left_is_left_at_once_and_the_rest_goes_on(where):
    """Work of other threads, too; what is called next in the same way does not begin."""
    with Child(f"""
stopping, over = Stopping(30), threading.Event()
stopping.armed = True
def work():
    while not over.is_set(): sum(range(1000))
def play():{WAITING[where]}
returned = stopping.interruptibly(play)
say("left", returned, stopping.requested, stopping.interruptibly(say, "begun"))
stopping.leave("saved")
""") as child:
        child.says("inside")
        child.stop()
        status, said, complained = child.end(5)
        assert (status, said) == (143, ["left", "None", "True", "None"])
        assert complained == "-c: saved\n" and time.monotonic() - child.stopped_at < 3


LOADING = {"computing": "while True: sum(range(1000))",
           "asleep": "time.sleep(60)",
           "in C code that runs no handlers": "os.system('exec sleep 6 >/dev/null 2>&1')"}


@pytest.mark.parametrize("where", LOADING)
def test_before_it_is_armed_the_process_ends_right_away(where):
    with Child(f"stopping = Stopping(30)\nsay('loading')\n{LOADING[where]}") as child:
        child.says("loading")
        time.sleep(0.3)
        child.stop()
        child.process.wait(5)
        status = child.process.returncode
        assert status == 143 and time.monotonic() - child.stopped_at < 3


def test_a_loop_sees_that_it_is_to_stop_and_ends_in_order():
    """Nothing is raised outside `interruptibly`."""
    with Child("""
stopping = Stopping(30)
stopping.armed, steps = True, 0
say(stopping.interruptibly(lambda: "played"))
while not stopping.requested:
    time.sleep(0.01)
    steps += 1
say("saving", steps > 5)
stopping.leave("stopped after a step")
""") as child:
        child.says("played")
        time.sleep(0.5)
        child.stop()
        assert child.end(5) == (143, ["saving", "True"], "-c: stopped after a step\n")


def test_exceptions_pass_through_and_a_stop_takes_the_place_of_what_was_returned():
    """In this process, which gets a real signal, and no end for a long time."""
    stopping = Stopping(1e6)
    stopping.armed = True
    assert stopping.interruptibly(lambda a, b: (a, b), 1, b=2) == (1, 2)
    for error in (ValueError("mine"), KeyboardInterrupt(), SystemExit(3)):
        def fail():
            raise error
        with pytest.raises(type(error)) as raised:
            stopping.interruptibly(fail)
        assert raised.value is error and not stopping.inside and not stopping.requested

    def stop_while_cleaning_up(seen=[]):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # raises nothing again
            seen.append(time.sleep(0.1))
        return seen
    assert stopping.interruptibly(stop_while_cleaning_up) is None
    assert stop_while_cleaning_up.__defaults__ == ([None],) and stopping.requested


@pytest.mark.parametrize("grace_s", [1.5, 2.5])
@pytest.mark.parametrize("times", [1, 4])
def test_it_ends_in_time_whatever_the_main_thread_does(grace_s, times):
    """As if the save took too long. More signals change neither when nor how, nor does work in other threads."""
    with Child(f"""
stopping = Stopping({grace_s}, lambda: "2 steps are lost")
stopping.armed = True
threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(int, 1)]).start()
def play():
    say("inside")
    time.sleep(60)
stopping.interruptibly(play)
try:
    while True: time.sleep(0.01)
except BaseException as error:
    say(error)
""") as child:
        child.says("inside")
        began = time.monotonic()
        child.stop(times)
        status, said, complained = child.end(grace_s + 5)
        assert (status, said, complained) == (143, [], "-c: 2 steps are lost\n")
        assert grace_s - 1.1 < time.monotonic() - began < grace_s


def test_it_ends_in_time_if_nobody_reads_what_it_says_or_the_line_cannot_be_made():
    """A full pipe holds whoever writes into it."""
    for lost in ("lambda: 'stopped'", "lambda: 1 / 0"):
        with Child(f"""
stopping = Stopping(1.5, {lost})
stopping.armed = True
say("inside")
while True: print("x", file=sys.stderr)
""") as child:
            child.says("inside")
            time.sleep(0.3)
            child.stop()
            assert child.process.wait(5) == 143 and time.monotonic() - child.stopped_at < 3


def test_a_forked_child_ends_by_its_own_signal_and_does_not_end_its_parent():
    with Child("""
stopping = Stopping(1.2)
child = os.fork()
if not child: time.sleep(20) or os._exit(1)
time.sleep(0.2)
os.kill(child, 15)
say(os.waitpid(child, 0)[1])
time.sleep(0.5)
say(stopping.requested)
""") as child:
        assert child.end(10) == (0, ["15", "False"], "")


def test_a_process_that_waits_for_one_that_hangs_ends_in_time():
    """No signal handler runs while it does."""
    lines = """
stopping = Stopping(2)
stopping.armed = True
say("joined")
if rank == 1: time.sleep(60)
dist.all_reduce(torch.ones(1))
"""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29700 + os.getpid() % 2000)}
    with Child(lines, JOIN, RANK="1", **variables) as hanging, Child(lines, JOIN, RANK="0", **variables) as child:
        hanging.says("joined"), child.says("joined")
        time.sleep(0.5)
        child.stop()
        assert child.end(10) == (143, [], "-c: stopped\n")
        assert 0.5 < time.monotonic() - child.stopped_at < 2


def test_under_torchrun_the_workers_end_with_143_and_torchrun_with_1(tmp_path):
    """One of them waits for the other one."""
    script = tmp_path / "run.py"
    script.write_text(JOIN + """
stopping = Stopping(3)
stopping.armed = True
def note(status): open(f"{sys.argv[1]}/{rank}", "w").write(str(status))
leave = os._exit
os._exit = lambda status: (note(status), leave(status))
print(f"ready{rank}\\n", end="", flush=True)
if rank == 1:
    while not stopping.requested: time.sleep(0.01)
    time.sleep(60)
dist.all_reduce(torch.ones(1))
""")
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert {run.stdout.readline().strip() for _ in range(2)} == {"ready0", "ready1"}
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        _, complained = run.communicate(timeout=20)
        assert run.returncode == 1 and "SignalException" in complained and "run.py: stopped" in complained
        assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["143", "143"]
        assert 1.5 < time.monotonic() - began < 6


def test_the_signals_are_pytests_again():
    """A test above makes one in this process, as those of the scripts do."""
    assert signal.getsignal(signal.SIGTERM) == HANDLER and signal.set_wakeup_fd(-1) == -1
