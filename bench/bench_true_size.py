"""A step at true size: Qwen2.5-VL-3B with random weights, and its width with fewer layers; peak memory
against the plan.

    python bench/bench_true_size.py --tokenizer DIR            DIR has Qwen's tokenizer.json, or the demo's
    python bench/bench_true_size.py --layers 2 4 6 --offload   the slope of the peak, a layer

Rewards are planted (bench/planted_rl.py): those of a random policy are all the same and nothing would be
learned. The peak is what the process has in memory (VmRSS, sampled; CPU), less what it has after its imports.
Runs sft.py and rl.py as a user does; checks that steps were made and that what is frozen stayed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers import Qwen2VLImageProcessor  # noqa: E402

import rl  # noqa: E402
import sft  # noqa: E402
from common import parse_flags  # noqa: E402
from demo.synthetic import synthetic  # noqa: E402
from demo.tiny_base import TINY_BASE  # noqa: E402
from model import Policy  # noqa: E402
from scale.plan import make_plan, read_model_config  # noqa: E402
from scale.sharding import WeightFiles  # noqa: E402
from training.checkpoints import save_policy  # noqa: E402
from training.environment import run_environment  # noqa: E402
from zoom_env import EnvConfig  # noqa: E402

FEW = EnvConfig(overview_max_frames=4, zoom_max_frames=2, max_zooms=1, min_pixels=25_088, max_pixels=25_088)
COMMON = ["--dtype", "bfloat16", "--max_tokens_per_pass", "2048", "--resume", "never", "--save_every", "1000"]
RL = ["--steps", "1", "--batch_size", "2", "--mini_batch_size", "1", "--group_size", "2", "--max_turn_tokens",
      "16", "--max_response_tokens", "600", "--max_rows", "4", "--max_draws", "4", "--cache_gb", "0.3"]
SFT = ["--batch_size", "2"]
IMPORTS = ("import sys; sys.path.insert(0, {root!r}); import rl, sft, time; print('there', flush=True); "
           "time.sleep(60)")


def make_checkpoint(config_folder, layers, tokenizer, folder):
    """A random model in bfloat16, weights of the published size, and a policy's settings for few frames."""
    config = Qwen2_5_VLConfig.from_pretrained(config_folder)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    hf = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    size = {"shortest_edge": FEW.min_pixels, "longest_edge": FEW.max_pixels}
    policy = Policy(hf, AutoTokenizer.from_pretrained(tokenizer), Qwen2VLImageProcessor(size=size), FEW)
    save_policy(policy, folder)


def resident_bytes(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def peaks_of(command, out):
    """(peaks, seconds) of a command that has to succeed: bytes in memory while it loads, trains and
    exports."""
    began, peaks = time.time(), [0, 0, 0]
    run = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    said = []
    reader = threading.Thread(target=lambda: said.extend(run.stdout))
    reader.start()
    while run.poll() is None:
        exports = (out / "metrics.jsonl").exists()  # the step's line is written before its checkpoint
        phase = 2 if exports else int(any("trained parameters" in line for line in said))
        peaks[phase] = max(peaks[phase], resident_bytes(run.pid))
        time.sleep(0.02)
    reader.join()
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{''.join(said)[-3000:]}")
    return peaks, time.time() - began


def after_imports():
    """Memory that a process has before it does anything."""
    run = subprocess.Popen([sys.executable, "-c", IMPORTS.format(root=str(ROOT))], stdout=subprocess.PIPE,
                           text=True)
    run.stdout.readline()
    taken = resident_bytes(run.pid)
    run.kill()
    return taken


def same_base(model, out):
    """Whether the tensors that adapters do not touch are the base's, bit for bit; and how many others
    differ."""
    before, after = WeightFiles(model), WeightFiles(out)
    same, moved = True, 0
    for name in before.place:
        equal = torch.equal(before.read(name), after.read(name))
        if "language_model" in name and name.endswith("_proj.weight"):
            moved += not equal
        else:
            same = same and equal
    return same, moved


def adapters_moved(folder):
    """Whether B, 0 at first, is anything else now, of every adapter."""
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        return all(file.get_tensor(name).abs().max() > 0 for name in file.keys() if "lora_B" in name)


def plan_total(stage, flags):
    """GB of the plan while it trains, without its reserve and the process's own: of a CPU, where device and
    host are one."""
    config = parse_flags({"rl": rl, "sft": sft}[stage].Config, "", (), argv=flags)
    plan = make_plan(stage, config, read_model_config(config.model), run_environment(config.model, config), 1,
                     1e12)
    others = "reserve", "processes", "loading", "exporting"
    of = lambda parts: sum(size for name, size in parts.items() if name not in others)
    return (max(of(plan.rollout), of(plan.update)) + of(plan.host)) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "tests/configs/qwen2.5-vl-3b"))
    parser.add_argument("--tokenizer", default=str(TINY_BASE), help="folder with a tokenizer")
    parser.add_argument("--layers", type=int, nargs="+", default=[None], help="fewer layers; without it all")
    parser.add_argument("--stages", nargs="+", default=["sft", "rl"])
    parser.add_argument("--offload", action="store_true",
                        help="all parameters with --offload optimizer, in place of adapters")
    parser.add_argument("--folder", help="where to work; several GB")
    args = parser.parse_args()
    # of offloading several passes an update: the gradients of those before are there when the head's logits
    # are
    how = ["--offload", "optimizer", "--max_tokens_per_pass", "256"] if args.offload else ["--lora_rank",
                                                                                           "16", "--lr",
                                                                                           "1e-4"]
    before = after_imports()
    print(f"{before / 1e9:.2f} GB after imports", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder, peaks = Path(folder), {}
        synthetic(folder / "data", 10, 5, seed=3)
        rows = (folder / "data/sft.jsonl").read_text().splitlines()[:2]
        (folder / "data/two.jsonl").write_text("\n".join(rows) + "\n")
        for layers in args.layers:
            model = folder / "model"
            shutil.rmtree(model, ignore_errors=True)
            # in a process of its own, with which its memory goes
            make = (f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\nimport bench_true_size\n"
                    f"bench_true_size.make_checkpoint({args.config!r}, {layers}, {args.tokenizer!r}, "
                    f"{str(model)!r})")
            subprocess.run([sys.executable, "-c", make], check=True)
            for stage in args.stages:
                flags = ["--model", str(model), *COMMON, *how, *(RL if stage == "rl" else SFT), "--device",
                         "cpu"]
                data = folder / ("data/train.jsonl" if stage == "rl" else "data/two.jsonl")
                out = folder / f"{stage}_{layers}"
                script = "bench/planted_rl.py" if stage == "rl" else "sft.py"
                command = [sys.executable, str(ROOT / script), *flags, "--data", str(data)]
                taken, seconds = peaks_of(command, out)
                metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
                assert metrics["grad_norm"] > 0 and metrics.get("updates",
                                                                1) >= 1 and not metrics["bad_steps"], metrics
                if not args.offload:
                    same, moved = same_base(model, out)
                    assert same and moved and adapters_moved(out), (same, moved)
                taken, plan = [(size - before) / 1e9 for size in taken], plan_total(stage, flags)
                loading, training, exporting = taken
                peaks.setdefault(stage, []).append((layers, training, plan))
                print(f"{stage:4} {layers or 'all'} layers {' '.join(how)}: loading {loading:.2f} GB; "
                      f"training {training:.2f} GB, plan {plan:.2f} ({training / plan:.2f}); "
                      f"exporting {exporting:.2f} GB; {seconds:.0f} s in all, "
                      f"{metrics.get('updates', 1)} optimizer steps", flush=True)
                shutil.rmtree(out)
        for stage, points in peaks.items():
            if len(points) > 1:
                (l0, p0, q0), (l1, p1, q1) = points[0], points[-1]
                print(f"{stage:4} slope a layer: {(p1 - p0) / (l1 - l0):.3f} GB, "
                      f"plan {(q1 - q0) / (l1 - l0):.3f} ({(p1 - p0) / (q1 - q0):.3f} of it)")


if __name__ == "__main__":
    main()
