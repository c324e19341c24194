"""Questions and trajectories: synthetic videos with a scripted teacher, and the tiny base model that learns from them.

    python data_prep.py synthetic --out runs/data --train 1200 --test 300 --seed 0
    python data_prep.py tiny_base --out tiny_base

synthetic writes into --out: videos/*.mp4 (H.264), train.jsonl and test.jsonl (questions), sft.jsonl (trajectories).
A video is a row of scenes, each of one background colour. In each of them a coloured shape flashes for about a second,
once or up to four times. The overview shows where each scene is, and almost never a flash, so a question about a flash
needs a zoom:

    detail     which colour or shape flashes in the blue scene?            one zoom
    count      how many shapes flash in the blue scene?                    one zoom, close enough
    order      which colours flash in the blue and in the red scene?       two zooms
    holistic   which scene comes first, last, or right after another?      none

A question's meta says how well N uniform frames could do: `uniform_accuracy[N]` is 1 where they show all the evidence,
and a guess among the options that what they show leaves open elsewhere, averaged over the phase of the sampling.

The scripted teacher plays through the environment like any policy, and a trajectory is kept only if the environment
grades it right and well formed. It knows where to look, but not how closely: see `Teacher`.

tiny_base makes the model that the demo starts from, as the paper starts from a pretrained one: a Qwen2.5-VL of 1.1 M
parameters with a tokenizer of its own, pretrained on descriptions and look-ups over synthetic frames. It can name
colours and shapes, find a scene's time tags and pick an option's letter, and has never seen the zoom tool.
"""

import argparse

from common import UserError, fail, run_main
from demo.synthetic import NUM_TEST, NUM_TRAIN, synthetic
from demo.tiny_base import BASE_STEPS, TINY_BASE, tiny_base


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    commands = parser.add_subparsers(dest="command", required=True)
    show = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub = commands.add_parser("synthetic", help="videos, questions and trajectories of the demo", **show)
    sub.add_argument("--out", default="runs/data", help="folder to write")
    sub.add_argument("--train", type=int, default=NUM_TRAIN, help="number of training questions")
    sub.add_argument("--test", type=int, default=NUM_TEST, help="number of held-out questions")
    sub.add_argument("--seed", type=int, default=0, help="seed of videos, questions and the teacher")
    sub = commands.add_parser("tiny_base", help="pretrain the tiny base model", **show)
    sub.add_argument("--out", default=TINY_BASE, help="checkpoint folder to write")
    sub.add_argument("--steps", type=int, default=BASE_STEPS,
                     help="optimizer steps of the curriculum; three tenths as many follow")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights and lessons")
    sub.add_argument("--init", help="checkpoint folder to begin the last part from")
    args = parser.parse_args()
    if args.command == "synthetic":
        if args.train < 1 or args.test < 1:
            raise UserError("--train and --test must be at least 1")
        synthetic(args.out, args.train, args.test, args.seed)
    else:
        tiny_base(args.out, args.steps, args.seed, args.init)


if __name__ == "__main__":
    run_main(main)
