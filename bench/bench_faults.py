"""Faults, more of them than the tests have time for. A process that saves checkpoint after checkpoint, of a
policy and then of a run that is to go on, is killed at random points, and what is in the folder is loaded:
every weight of checkpoint k is k, so one that is a mixture shows. Then random bytes are put into each file
that a command reads. Then whole runs of rl.py and sft.py on two processes are killed once each and started
again, with shards and without: their metrics have to be an undisturbed run's to the bit. Then groups are
dealt to two processes at random, and no update may hang or differ.

    python bench/bench_faults.py [--kills 20] [--bytes 500] [--runs 20] [--splits 50] [--seed 0]
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

from launcher import launch
from test_random_bytes import make_place, one_case
from test_safe_files import kill_saves, left_over, number_in
from test_training import finish, kill_and_go_on, metrics
from test_training import make_place as make_runs
from tiny import tied_and_untied

from demo.synthetic import synthetic
from training.checkpoints import save_policy


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a save is killed")
    parser.add_argument("--bytes", type=int, default=500, help="how many files are spoiled")
    parser.add_argument("--runs", type=int, default=20, help="how many runs are killed and go on")
    parser.add_argument("--splits", type=int, default=50, help="how often groups are dealt at random")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    delays_s = [rng.uniform(0.05, 1) for _ in range(args.kills)]
    failed = kills("policy", delays_s) + kills("run", delays_s)
    failed += random_bytes(args.bytes, args.seed)
    failed += killed_runs(args.runs, rng)
    failed += random_splits(args.splits, args.seed)
    sys.exit(1 if failed else 0)


def kills(kind, delays_s):
    """How many kills leave no whole checkpoint, or one older than the last that was reported."""
    print(f"| kill of a save of a {kind} | after (s) | last save reported | checkpoint in the folder | "
          "files left over | whole |\n|---|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        for number, (folder, reported) in enumerate(kill_saves(root, delays_s, kind)):
            left = len(left_over(kind, folder))
            try:
                value = number_in(kind, folder)
            except Exception as error:
                value = f"{type(error).__name__}: {error}".splitlines()[0]
            whole = value in (reported, reported + 1)
            failed += not whole
            print(f"| {number + 1} | {delays_s[number]:.2f} | {reported} | {value} | {left} | "
                  f"{'yes' if whole else 'NO'} |", flush=True)
    print(f"\n{len(delays_s) - failed} of {len(delays_s)} folders held one whole checkpoint\n")
    return failed


def killed_runs(number, rng):
    """How many runs that were killed have other metrics than an undisturbed one."""
    print("| run | shards | killed after (lines, s) | lines then | the same metrics |\n|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        place, whole = Path(root), {}
        make_runs(place)
        kinds = itertools.cycle([("rl.py", "none"), ("rl.py", "all"), ("sft.py", "none"), ("sft.py", "all")])
        for i, (script, shard) in enumerate(itertools.islice(kinds, number)):
            if (script, shard) not in whole:
                whole[script, shard] = place / f"whole-{script}-{shard}"
                finish(place, whole[script, shard], script, shard, 2)
            after, delay_s, out = rng.randrange(4), rng.uniform(0, 1), place / f"killed{i}"
            there = kill_and_go_on(place, out, script, shard, 2, after, delay_s)
            same = metrics(out) == metrics(whole[script, shard])
            failed += not same
            print(f"| {script} | {shard} | {after}, {delay_s:.2f} | {there} | {'yes' if same else 'NO'} |",
                  flush=True)
    print(f"\n{number - failed} of {number} runs went on as if nothing had been\n")
    return failed


def random_splits(number, seed):
    """1 if an update with groups dealt at random hangs or is not that of replicas."""
    with tempfile.TemporaryDirectory() as root:
        synthetic(Path(root), 10, 5, seed=3)
        for name, policy in tied_and_untied():
            save_policy(policy, Path(root) / name)
        try:
            runs = launch(2, "test_sharding:random_splits", [root, root, seed, number])
            runs.wait(timeout_s=60 + 30 * number)
            print(f"{number} of {number} random splits: no hang, the same metrics")
            return 0
        except AssertionError as error:
            print(f"random splits: {error}")
            return 1


def random_bytes(cases, seed):
    """How many of the cases end in anything but a file that is read or one line."""
    ends = Counter()
    with tempfile.TemporaryDirectory() as root:
        place = make_place(Path(root) / "place")
        for case in range(seed, seed + cases):
            try:
                end = one_case(place, Path(root) / "copy", case)
                ends["read" if end.endswith(": read") else "one line"] += 1
            except (Exception, pytest.fail.Exception) as error:
                ends["traceback or hang"] += 1
                print(f"case {case}: {type(error).__name__}: {error}")
    print(f"{cases} files with random bytes: {dict(ends)}")
    return ends["traceback or hang"]


if __name__ == "__main__":
    main()
