"""The train-inference mismatch: the differences of log-probabilities that were noted while sampling and those
that training computes, and of two ways to compute them: in packed groups, and one by one. Float32 and
bfloat16 compute weights, 10 questions x 4 rollouts (--questions).

    python bench/bench_mismatch.py runs/sft
    python bench/bench_mismatch.py runs/rl_lora --base runs/sft --adapter runs/rl_lora/adapter --questions 40

The second one is of the same policy with its adapters merged; beside it, in bfloat16, come the adapters
unmerged, and sampled merged and scored unmerged, as ratios of it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from demo.synthetic import synthetic  # noqa: E402
from model import token_log_probs  # noqa: E402
from rollout import RolloutConfig, rollout  # noqa: E402
from scale.lora import add_adapters, merge  # noqa: E402
from training.checkpoints import load_policy  # noqa: E402

CONFIG = RolloutConfig(max_turn_tokens=160, max_response_tokens=1500, max_rows=40, cache_gb=1.0)


@torch.no_grad()
def mismatches(policy, folder, questions, player=None):
    """{which two: absolute differences of the log-probabilities of all sampled tokens, (N,)}. player: the
    policy that samples, by default the same."""
    generator = torch.Generator(policy.device).manual_seed(0)
    groups, _ = rollout(player or policy, questions, 4, CONFIG, root=folder, generator=generator)
    dialogues = [[e.dialogue for e in group] for group in groups]
    sampled = torch.tensor([p for group in dialogues for d in group for p in d.sampled_log_probs])
    packed = token_log_probs(policy, dialogues)[0].cpu()
    single = torch.cat([token_log_probs(policy, [[d]])[0].cpu() for group in dialogues for d in group])
    return {"sampled, packed": (sampled - packed).abs(), "sampled, one by one": (sampled - single).abs(),
            "packed, one by one": (packed - single).abs()}


def with_adapter(base, folder):
    """A checkpoint in bfloat16 with an adapter beside it, and {name: float32 tensor} of the adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    policy = add_adapters(load_policy(base, dtype=torch.bfloat16), config["r"], config["lora_alpha"])
    tensors = {f"hf.{name.removeprefix('base_model.model.').removesuffix('.weight')}": tensor
               for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    parameters = dict(policy.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
    return policy, tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint of the demo")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--base", help="what an adapter was trained on")
    parser.add_argument("--adapter", type=Path, help="its folder")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        synthetic(folder, 10, args.questions, seed=9)
        questions = [json.loads(line) for line in open(Path(folder, "test.jsonl"))]
        for dtype in (torch.float32, torch.bfloat16):
            policy = load_policy(args.model, args.device, dtype)
            found = mismatches(policy, folder, questions)
            full = found["sampled, packed"]
            for which, x in found.items():
                print(f"{str(dtype):15} {which:20} mean {x.mean():.1e}  largest {x.max():.1e}  "
                      f"{len(x)} tokens")
        if args.adapter:
            policy, tensors = with_adapter(args.base, args.adapter)
            for how, player in (("unmerged", None), ("merged", merge(policy, tensors))):
                x = mismatches(policy, folder, questions, player)["sampled, packed"]
                print(f"adapters, sampled {how:8} mean {x.mean():.1e}  largest {x.max():.1e}  "
                      f"{len(x)} tokens; mean / that of {args.model} {x.mean() / full.mean():.2f}")


if __name__ == "__main__":
    main()
