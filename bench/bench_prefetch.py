"""How long a step takes whose videos are decoded while the step before trains, beside the longer of the two alone.

    python bench/bench_prefetch.py [--videos 20] [--trials 7]

One thread decodes synthetic videos of the demo, enlarged to the size of real frames (48 frames of each), one trains
(matrix products of torch in one thread), each kept to a core of its own, which should be free: else decoding alone is slower than beside
the training, as the decoder's own threads wake a core that sleeps. Decoding and training are measured alone in the same
run, in turn with the two together, from the second step on; medians over the trials. The goal is 1.1. Linux.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.synthetic import make_scenes, render, write_video  # noqa: E402
from training.prefetch import prefetch  # noqa: E402
from video import open_video  # noqa: E402
from zoom_env import slice_centres  # noqa: E402

SCALE = 10  # frames of 280 x 280: as many pixels as the paper's
STEPS, CORES = 6, sorted(os.sched_getaffinity(0))


def make_videos(folder, number):
    """Paths and lengths in seconds of videos of about two minutes."""
    videos = []
    for i in range(number):
        duration_s, scenes = make_scenes(random.Random(i))
        frames = (np.kron(frame, np.ones((SCALE, SCALE, 1), np.uint8)) for frame in render(duration_s, scenes))
        write_video(folder / f"{i}.mp4", frames)
        videos.append((str(folder / f"{i}.mp4"), duration_s))
    return videos


def decode(videos):
    """48 frames of each video."""
    os.sched_setaffinity(0, CORES[:1])  # of this thread, and of those that the decoder makes
    for path, duration_s in videos:
        open_video(path).frames_at(slice_centres(0, duration_s - 1, 48))


def train(weights, products):
    os.sched_setaffinity(0, CORES[-1:])
    for _ in range(products):
        (weights @ weights).sum().item()


def seconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--videos", type=int, default=20, help="in a batch")
    parser.add_argument("--trials", type=int, default=7, help="timings of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = torch.randn(512, 512)
    with tempfile.TemporaryDirectory() as folder:
        videos = make_videos(Path(folder), args.videos)
        load = lambda batch: decode(videos)
        load(0)
        # training about as long as decoding, the hardest case, and half and twice as long
        one = min(seconds(train, weights, 20) for _ in range(5)) / 20
        decoding_s = min(seconds(load, 0) for _ in range(5))
        print(f"{'training : decoding':24}{'decoding':>10}{'training':>10}{'step':>10}{'step / longer':>16}")
        for share in (0.5, 1.0, 2.0):
            products, alone, steps = round(share * decoding_s / one), [], []
            for _ in range(args.trials):
                alone.append((statistics.median(seconds(load, 0) for _ in range(3)),
                              statistics.median(seconds(train, weights, products) for _ in range(3))))
                for batch, _, _ in prefetch(load, range(STEPS + 1)):
                    if batch == 1:
                        began = time.perf_counter()
                    if batch < STEPS:
                        train(weights, products)
                steps.append((time.perf_counter() - began) / (STEPS - 1))
            decoded, trained = (statistics.median(taken) for taken in zip(*alone))
            ratio = statistics.median(step / max(pair) for step, pair in zip(steps, alone))
            print(f"{share:<24}{decoded:8.3f} s{trained:8.3f} s{statistics.median(steps):8.3f} s{ratio:16.3f}")


if __name__ == "__main__":
    main()
