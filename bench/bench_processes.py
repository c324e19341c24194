"""What two processes lose by working together: RL steps of the demo's policy, the same work for each process,
each with one core, beside two processes that do not know each other and run at the same time.

    python bench/bench_processes.py [runs/sft] [--steps 4] [--trials 3] [--others]

A step is rollouts of 8 questions x 8 episodes and two optimizer steps on them. The learning rate is 0 and the
random numbers of a step are the same each time, so all steps are the same work. With --others the second
process has other questions, as in training, and who has the longer ones is waited for. A trial's figure is the
seconds a step of both processes; a row is the median of the trials' ratios, each of runs one after the other.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUESTIONS, GROUP, GOAL = 8, 8, 0.9


def worker(args):
    """Plays and updates, and prints the seconds a step, the first one left out."""
    import torch

    import rl
    from common import start_processes
    from scale.pick import load_weights
    from sources.read import read_questions
    from training.environment import run_environment

    number = int(os.environ["CORE"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    rank, world, device = start_processes("cpu")
    torch.set_num_threads(1)
    own = dict(model=args.model, lr=0.0, batch_size=QUESTIONS * world, mini_batch_size=QUESTIONS * world // 2,
               group_size=GROUP, shard=args.shard, cache_gb=1.0)
    config = rl.Config(**rl.PRESETS["demo"] | own)
    env_config = run_environment(config.model, config)
    config = replace(config, max_turn_tokens=env_config.max_turn_tokens)
    weights = load_weights(config.model, config, env_config, device, with_reference=True)
    optimizer = torch.optim.AdamW(weights.parameters, lr=0.0, fused=True)
    generator = torch.Generator()
    engine = rl.Engine(weights.player, GROUP, config, generator)
    rows, _ = read_questions(args.data, 0.0)
    share = number if args.others else 0
    rows = rows[share * QUESTIONS:][:QUESTIONS]
    began = 0.0
    for step in range(args.steps + 1):
        if step == 1:
            began = time.perf_counter()
        generator.manual_seed(share)
        weights.policy.eval()
        with weights.gathered():
            groups, _ = engine.play(rows, Path(args.data).parent)
        for group in groups:
            for i, e in enumerate(group):
                e.dialogue.advantage = 1.0 if i % 2 else -1.0
        weights.policy.train()
        rl.update(weights, groups, optimizer, config, rank, device)
    print(json.dumps({"seconds": (time.perf_counter() - began) / args.steps}))


def run(args, together, shard):
    """Seconds a step, the mean of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(2):
        own = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if together else {}
        command = [sys.executable, __file__, args.model, "--data", args.data, "--steps", str(args.steps),
                   "--worker", "--shard", shard, *["--others"] * args.others]
        variables = os.environ | {"CORE": str(number), "OMP_NUM_THREADS": "1"} | own
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables))
    said = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return statistics.mean(json.loads(text.splitlines()[-1])["seconds"] for text in said)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="runs/sft")
    parser.add_argument("--data", default="runs/data/train.jsonl")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--others", action="store_true", help="other questions for each process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="none", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    for path in (args.model, args.data):
        if not Path(path).exists():
            parser.error(f"{path} is not there: python sft.py makes it")
    print(f"{'':34}{'apart s':>9}{'together s':>12}{'ratio':>8}{'goal':>6}{'met':>5}")
    for shard, goal in (("none", GOAL), ("all", None)):
        trials = [(run(args, False, "none"), run(args, True, shard)) for _ in range(args.trials)]
        ratio = statistics.median(apart / together for apart, together in trials)
        apart, together = (statistics.median(x) for x in zip(*trials))
        met = "" if goal is None else "yes" if ratio >= goal else "NO"
        print(f"two processes, --shard {shard:11}{apart:9.3f}{together:12.3f}{ratio:8.2f}{goal or '':>6}"
              f"{met:>5}", flush=True)


if __name__ == "__main__":
    main()
