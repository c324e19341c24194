"""SIGTERM and Ctrl-C: real processes get real signals, wherever they are, end in time, and lose nothing that can be saved."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher import launch
from test_training import finish, flags, lines, metrics, shared_place, wait_for, whole_run

import common
from training.run_checkpoints import run_folders

ROOT = Path(__file__).resolve().parent.parent
BEGIN = f"""
import ctypes, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import common
from common import ENDING, end_at_signals
common.GRACE_S = 2.5
say = lambda *words: print(*words, flush=True)
sleep, lock, mutex = lambda: time.sleep(60), ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
"""


class Child:
    """A Python process that runs `code` after BEGIN; it is killed after the test."""

    def __init__(self, code):
        self.process = subprocess.Popen([sys.executable, "-c", BEGIN + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)

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


# where the main thread is: what it does, what saving does, the line that is printed, and the least and most seconds
SAVED, LOST = "lambda: 'saved'", "-c: lost\n"
RAISES = """
def main():
    time.sleep(0.3)
    {}
common.run_main(main)"""
PLACES = {
    "computing": ("while True: sum(range(1000))", SAVED, "-c: saved\n", 0, 1.5),
    "asleep": ("sleep()", SAVED, "-c: saved\n", 0, 1.5),
    "in C code that runs no handlers": ("lock(mutex), lock(mutex)", SAVED, "-c: saved\n", 0, 1.5),
    "in a cleanup that does not end": ("try: sleep()\nfinally: sleep()", SAVED, "-c: saved\n", 0, 1.5),
    "raising while it saves": (RAISES.format("1 / 0"), "lambda: time.sleep(0.6) or 'saved'", "-c: saved\n", 0.5, 1.5),
    "refused while it saves": (RAISES.format("raise common.UserError('x')"), "lambda: time.sleep(0.6) or 'saved'", "-c: saved\n",
                               0.5, 1.5),
    "while saving takes too long": ("while True: sum(range(1000))", "sleep", LOST, 1.2, 2.5),
    "while saving fails": ("sleep()", "lambda: 1 / 0", LOST, 1.2, 2.5),
    "writing what nobody reads": ("while True: print('x', file=sys.stderr)", SAVED, None, 0, 2.5)}


def ends(save):
    """The code with which a process ends by a signal."""
    return f"ENDING.save, ENDING.lost = {save}, lambda: 'lost'\nend_at_signals()"


def test_a_process_ends_in_time_whatever_its_main_thread_does():
    """With 128 + the signal's number. More signals, of another kind too, change neither when nor how."""
    failures = []
    for where, (does, save, line, least_s, most_s) in PLACES.items():
        for numbers in ((signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM, signal.SIGINT)):
            with Child(f"{ends(save)}\nsay('inside')\n{does}") as child:
                child.says("inside")
                time.sleep(0.1)
                began = time.monotonic()
                for number in numbers:
                    child.process.send_signal(number)
                    time.sleep(0.05 * (len(numbers) - 1))
                status = child.process.wait(20)
                took_s = time.monotonic() - began
                complained = child.process.stderr.read() if line else None
                fits = status == 128 + numbers[0] and least_s <= took_s < most_s
                if not fits or (line and not complained.endswith(line)):
                    failures.append((where, numbers, status, took_s, complained))
    assert not failures


def test_a_forked_child_ends_by_its_own_signal_and_does_not_end_its_parent():
    with Child("""
end_at_signals()
child = os.fork()
if not child: time.sleep(20) or os._exit(1)
time.sleep(0.2)
os.kill(child, 15)
say(os.waitpid(child, 0)[1])
time.sleep(0.5)
say("alive")
""") as child:
        said, complained = child.process.communicate(timeout=20)
        assert (said.split(), complained, child.process.returncode) == (["15", "alive"], "", 0)


# ---------------------------------------------------------------------------------------------- runs that train
def rl_held_up(where, ranks, after, hurry, *flags):
    """rl.py with planted rewards, of which some processes are held up somewhere after some finished steps: for 3 s if
    slowly, else for as long as it takes. hurry: they end within 5 s."""
    import runpy

    import rl
    import rollout
    import training.run
    import training.weights

    run, rank = training.run.TrainingRun, os.environ["RANK"]
    finished, after = [0], int(after)
    if hurry == "True":
        common.GRACE_S = 5

    def hold_up():
        if rank in ranks and finished[0] >= after:
            print(f"inside{rank}", flush=True)
            end = time.time() + (3 if where.startswith("slowly") else 1000)
            while time.time() < end:
                time.sleep(0.05)
                sum(range(100_000))

    def before(owner, name):
        function = getattr(owner, name)

        def call(*args, **how):
            hold_up()
            return function(*args, **how)
        setattr(owner, name, call)

    def end_step(self, *args):
        end(self, *args)
        finished[0] += 1

    end, run.end_step = run.end_step, end_step
    match where:
        case "loading":
            before(rl, "load_weights")
        case "rollout":
            before(rollout.Engine, "play")
        case "adding gradients up":
            before(training.weights.MasterWeights, "sum_gradients")
        case "before an optimizer step" | "slowly before an optimizer step":
            before(training.weights.MasterWeights, "apply")
        case "optimizer step":
            before(training.weights.MasterWeights, "cast")
        case "held-out questions":
            before(training.run, "held_out")
    sys.argv = ["rl.py", *flags]
    runpy.run_path(str(ROOT / "bench/planted_rl.py"), run_name="__main__")


def stopped(out, where, ranks="01", after=2, shard="none", number=signal.SIGTERM, processes=2, times=1, hurry=False,
            more=()):
    """Starts a run, which saves nothing by itself, waits until it is held up, and sends a signal to its processes. Returns
    what they say, the number of the step that is saved, and how long it took."""
    runs = launch(processes, "test_stopping:rl_held_up",
                  [where, ranks, after, hurry, *flags(shared_place(), out, "rl.py", shard, "--save_every", 100, *more)])
    wait_for(runs, lambda: None not in [log.exists() or None for log in runs.logs])
    wait_for(runs, lambda: all(f"inside{rank}" in runs.said() for rank in ranks[:processes]))
    began = time.monotonic()
    for _ in range(times):
        runs.signal(number)
        time.sleep(0.2)
    said = runs.wait([128 + number] * processes, timeout_s=30)
    took_s = time.monotonic() - began
    folders = run_folders(out)
    return said, int(folders[-1].name.removeprefix("step_")) if folders else 0, took_s


def check_goes_on(out, processes=2, shard="none"):
    """The metrics are those of an undisturbed run."""
    finish(shared_place(), out, "rl.py", shard, processes, "--save_every", 100)
    assert metrics(out) == metrics(whole_run("rl.py", shard, processes))


def test_a_run_that_is_stopped_in_a_rollout_saves_the_step_before(tmp_path):
    """One process, Ctrl-C twice: no finished step is lost, and what follows is an undisturbed run."""
    said, saved, took_s = stopped(tmp_path, "rollout", "0", number=signal.SIGINT, processes=1, times=2)
    assert saved == 2 and "rl.py: stopped; the same command goes on after step 2\n" in said and took_s < 10
    check_goes_on(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("where, ranks, shard, saved", [
    ("rollout", "0", "all", 2), ("adding gradients up", "1", "none", 2),
    ("slowly before an optimizer step", "1", "none", 3)])
def test_two_processes_agree_on_what_they_save(tmp_path, where, ranks, shard, saved):
    """The step before, as long as no process is in an optimizer step; then this one, once it is over, for which the other
    one must be let go."""
    said, step, took_s = stopped(tmp_path, where, ranks, shard=shard)
    assert step == saved == len(lines(tmp_path)) and took_s < 20
    assert f"rl.py: stopped; the same command goes on after step {saved}\n" in said
    check_goes_on(tmp_path, shard=shard)


@pytest.mark.slow
def test_a_run_that_cannot_save_says_so_in_time(tmp_path):
    """One process hangs where the weights have moved, or before that while the other one is there; the disk is full."""
    for where, ranks in (("optimizer step", "0"), ("before an optimizer step", "1")):
        said, saved, took_s = stopped(tmp_path / where, where, ranks, 1, hurry=True)
        assert saved == 0 and "goes on after step 0, finished steps lost: 1" in said and 2 < took_s < 6
        assert not list((tmp_path / where).glob("checkpoints/*"))
    check_goes_on(tmp_path / "optimizer step")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoints").symlink_to("/dev/full")
    said, _, took_s = stopped(tmp_path / "full", "rollout", after=1)
    assert "finished steps lost: 1 (UserError: cannot save " in said and took_s < 10
    assert common.GRACE_S == 20  # torchrun kills after 30


@pytest.mark.slow
def test_before_the_first_step_nothing_is_lost_and_held_out_questions_end_in_time(tmp_path):
    said, saved, took_s = stopped(tmp_path / "loading", "loading", after=0, processes=1, ranks="0")
    assert saved == 0 and "stopped; nothing is lost" in said and took_s < 3
    said, saved, took_s = stopped(tmp_path / "rollout", "rollout", "1", after=0)
    assert saved == 0 and "goes on after step 0\n" in said and took_s < 3
    held_out = ("--val", shared_place() / "test.jsonl", "--val_every", 2)
    said, saved, took_s = stopped(tmp_path / "val", "held-out questions", "0", 1, processes=1, more=held_out, hurry=True)
    assert saved == 0 and "goes on after step 0, finished steps lost: 1" in said and 2 < took_s < 6


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(tmp_path):
    """The steps are saved. torchrun's own exit status is 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "bench/planted_rl.py",
               *flags(shared_place(), tmp_path, "rl.py", "none", "--steps", 1000, "--save_every", 1000)]
    with subprocess.Popen([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        end = time.time() + 120
        while len(lines(tmp_path)) < 2 and time.time() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    saved = int(run_folders(tmp_path)[-1].name.removeprefix("step_"))
    assert process.returncode == 1 and f"the same command goes on after step {saved}\n" in said, said[-2000:]
    assert saved == len(lines(tmp_path)) >= 2
