"""SIGTERM and Ctrl-C: real processes get real signals, wherever they are, end in time, and lose nothing that can be saved."""

import os
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import all_hold
from launcher import launch
from test_training import (assert_same_metrics, finish, flags, lines, metrics, shared_place, wait_for,
                           whole_run)

import stopping
from training.run_checkpoints import run_folders

ROOT = Path(__file__).resolve().parent.parent
BEGIN = f"""
import ctypes, os, signal, sys, threading, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who started the tests may ignore it, as nohup does
sys.path.insert(0, {str(ROOT)!r})
import stopping
from stopping import ENDING, end_at_signals
stopping.GRACE_S = 2.5
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
try:
    time.sleep(0.3)
    {}
finally:
    stopping.wait_for_the_end()"""
PLACES = {
    "computing": ("while True: sum(range(1000))", SAVED, "-c: saved\n", 0, 1.5),
    "asleep": ("sleep()", SAVED, "-c: saved\n", 0, 1.5),
    "in C code that runs no handlers": ("lock(mutex), lock(mutex)", SAVED, "-c: saved\n", 0, 1.5),
    "in a cleanup that does not end": ("try: sleep()\nfinally: sleep()", SAVED, "-c: saved\n", 0, 1.5),
    "raising while it saves": (RAISES.format("1 / 0"), "lambda: time.sleep(0.6) or 'saved'", "-c: saved\n", 0.5, 1.5),
    "refused while it saves": (RAISES.format("sys.exit(2)"), "lambda: time.sleep(0.6) or 'saved'", "-c: saved\n",
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


@pytest.mark.slow
def test_a_second_signal_ends_at_once_if_one_of_them_is_by_hand():
    """Else a scheduler's second SIGTERM would. One that comes twice, as to a process and to its group, is one."""
    def check(pause_s, hurries, *numbers):
        with Child(f"{ends('sleep')}\nsay('inside')\nsleep()") as child:
            child.says("inside")
            for number in numbers:
                child.process.send_signal(number)
                time.sleep(pause_s)
            began = time.monotonic()
            assert child.process.wait(20) == 128 + numbers[0]
            assert (time.monotonic() - began < 0.3) == hurries
            assert child.process.stderr.read() == LOST

    term, by_hand = signal.SIGTERM, signal.SIGINT
    all_hold(check, [(0.6, True, by_hand, by_hand), (0.6, True, by_hand, term), (0.6, True, term, by_hand),
                     (0.6, False, term, term), (0.1, False, by_hand, by_hand)])


def test_a_terminal_that_is_closed_ends_a_process_but_for_nohup():
    with Child(f"{ends(SAVED)}\nsay('inside')\nsleep()") as child:
        child.says("inside")
        child.process.send_signal(signal.SIGHUP)
        assert child.process.wait(20) == 129 and child.process.stderr.read() == "-c: saved\n"
    with Child(f"signal.signal(1, signal.SIG_IGN)\n{ends(SAVED)}\nsay('inside')\nsleep()") as child:
        child.says("inside")
        child.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert child.process.poll() is None


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
        stopping.GRACE_S = 5

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
    assert_same_metrics(metrics(out), metrics(whole_run("rl.py", shard, processes)))


@pytest.mark.device
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
    assert stopping.GRACE_S == 20  # torchrun kills after 30


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


@pytest.mark.slow
def test_ctrl_c_saves_as_much_when_it_ends_what_reads_the_output_too(tmp_path):
    """As `python rl.py 2>&1 | cat` in a terminal, which sends it to all of them."""
    command = [sys.executable, ROOT / "bench/planted_rl.py",
               *flags(shared_place(), tmp_path, "rl.py", "none", "--steps", 1000, "--save_every", 1000)]
    shell = f"{shlex.join(map(str, command))} 2>&1 | cat"
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.DEVNULL, start_new_session=True) as process:
        end = time.time() + 120
        while len(lines(tmp_path)) < 3 and time.time() < end:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    while len(run_folders(tmp_path)) < 1 and time.time() < end:
        time.sleep(0.05)
    assert run_folders(tmp_path)[-1].name == f"step_{len(lines(tmp_path))}" and len(lines(tmp_path)) >= 3


def eval_held_up():
    """An evaluation that plays no more after 3 rows."""
    import eval as evaluation
    from training.run_folder import Rows

    write, rows = Rows.write, []

    def write_some(self, row):
        write(self, row)
        rows.append(row)
        if len(rows) == 3:
            print("inside0", flush=True)
            time.sleep(1000)

    Rows.write = write_some
    evaluation.run_main(evaluation.main)


def script_held_up(where, *flags):
    """A script that is stopped somewhere."""
    sys.argv = [where, *flags]
    if where == "eval.py":
        return eval_held_up()
    import data_prep
    import demo.tiny_base

    def hold_up(*_):
        print("inside0", flush=True)
        time.sleep(1000)

    demo.tiny_base.pretrain = hold_up
    data_prep.run_main(data_prep.main)


@pytest.mark.slow
def test_scripts_that_do_not_train_say_what_is_saved_too(tmp_path):
    place = shared_place()
    evaluate = ["eval.py", "--model", place / "model", "--data", place / "train.jsonl", "--mode", "zoom", "--max_rows", 1,
                "--max_turn_tokens", 4, "--device", "cpu"]
    for number in (signal.SIGINT, signal.SIGTERM):
        for command, line in (([*evaluate], "eval.py: stopped; 3 episodes are there, the same command goes on\n"),
                              (["data_prep.py", "tiny_base"], "data_prep.py: stopped; nothing was saved\n")):
            runs = launch(1, "test_stopping:script_held_up", [*command, "--out", tmp_path / f"{number}{command[0]}"])
            wait_for(runs, lambda: "inside0" in runs.said())
            runs.signal(number)
            said = runs.wait([128 + number], timeout_s=10)
            assert said.endswith(line) and "Traceback" not in said, said[-2000:]
