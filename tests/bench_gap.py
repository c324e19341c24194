"""The gap between log-probabilities that were noted while sampling and those that training computes, and between two ways
to compute them: in packed groups, and one by one. Float32 and bfloat16 compute weights, 10 questions x 4 rollouts.

    python tests/bench_gap.py runs/sft
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from demo.synthetic import synthetic  # noqa: E402
from model import load_policy, token_log_probs  # noqa: E402
from rollout import RolloutConfig, rollout  # noqa: E402

CONFIG = RolloutConfig(max_turn_tokens=160, max_response_tokens=1500, max_rows=40)


@torch.no_grad()
def gaps(policy, folder, questions):
    """{which two: absolute differences of the log-probabilities of all sampled tokens, (N,)}."""
    generator = torch.Generator(policy.device).manual_seed(0)
    groups, _ = rollout(policy, questions, 4, CONFIG, root=folder, generator=generator)
    dialogues = [[e.dialogue for e in group] for group in groups]
    sampled = torch.tensor([p for group in dialogues for d in group for p in d.sampled_log_probs])
    packed = token_log_probs(policy, dialogues)[0].cpu()
    single = torch.cat([token_log_probs(policy, [[d]])[0].cpu() for group in dialogues for d in group])
    return {"sampled, packed": (sampled - packed).abs(), "sampled, one by one": (sampled - single).abs(),
            "packed, one by one": (packed - single).abs()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint of the demo")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        synthetic(folder, 10, 10, seed=9)
        questions = [json.loads(line) for line in open(Path(folder, "test.jsonl"))]
        for dtype in (torch.float32, torch.bfloat16):
            policy = load_policy(args.model, args.device, dtype)
            for which, gap in gaps(policy, folder, questions).items():
                print(f"{str(dtype):15} {which:20} mean {gap.mean():.1e}  largest {gap.max():.1e}  {len(gap)} tokens")


if __name__ == "__main__":
    main()
