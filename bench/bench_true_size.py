"""A step at true size: Qwen2.5-VL-3B with random weights, and its width with fewer layers; peak memory
against the plan.

    python bench/bench_true_size.py --tokenizer DIR            DIR has Qwen's tokenizer.json, or the demo's
    python bench/bench_true_size.py --layers 2 4 6 --how offload   the slope of the peak, a layer
    python bench/bench_true_size.py --device cuda --episodes true --how full lora offload --no_save
    python bench/bench_true_size.py --model FOLDER --make          only writes the checkpoint, for other calls

Runs sft.py and rl.py as a user does, each in a process of its own, but for two things: episodes are scripted
(a random policy never calls the tool), up to two zooms each, and rewards are planted (bench/planted_rl.py),
as nothing would be learned where all are the same. `--episodes few` has small frames and few of them; `true`
has the paper's: 64 frames of the overview and 16 of a zoom of about 120 tokens, 16 episodes a question.

The peak is what tensors take on CUDA, what a process has in memory beyond its imports on a CPU, while it
loads, plays, updates and saves. `--no_save` leaves out what is written at the end of a run (a checkpoint with
master weights and moments is 45 GB for 3B). Checks that steps were made; with adapters, where they were
saved, that they moved and that what is frozen stayed.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers import Qwen2VLImageProcessor  # noqa: E402

import bench_rollout  # noqa: E402
import rl  # noqa: E402
import rollout as engine  # noqa: E402
import sft  # noqa: E402
import zoom_env  # noqa: E402
from common import parse_flags, run_main  # noqa: E402
from demo.synthetic import synthetic  # noqa: E402
from demo.tiny_base import TINY_BASE  # noqa: E402
from model import Policy  # noqa: E402
from on_device import card, device_of, peak_bytes, reset_peak  # noqa: E402
from planted_rl import planted_rewards  # noqa: E402
from protocols import PROTOCOLS  # noqa: E402
from scale.plan import make_plan, read_model_config  # noqa: E402
from scale.sharding import WeightFiles  # noqa: E402
from training.checkpoints import INDEX, save_policy  # noqa: E402
from training.environment import run_environment  # noqa: E402
from training.memory import out_of_memory  # noqa: E402
from training.run import TrainingRun  # noqa: E402
from zoom_env import EnvConfig  # noqa: E402

ENV = {
    "few": EnvConfig(overview_max_frames=4, zoom_max_frames=2, max_zooms=1, min_pixels=25_088,
                     max_pixels=25_088),
    "true": EnvConfig(min_pixels=100_352, max_pixels=100_352)}
COMMON = ["--dtype", "bfloat16", "--resume", "never", "--save_every", "1000"]
RL = {
    "few": ["--max_tokens_per_pass", "2048", "--steps", "1", "--batch_size", "2", "--mini_batch_size", "1",
            "--group_size", "2", "--max_turn_tokens", "16", "--max_response_tokens", "600", "--max_rows", "4",
            "--max_draws", "4", "--cache_gb", "0.3"],
    "true": ["--steps", "1", "--batch_size", "4", "--mini_batch_size", "1"]}
SFT = {"few": ["--max_tokens_per_pass", "2048", "--batch_size", "2"], "true": ["--batch_size", "8"]}
# of offloading few tokens a pass: several passes an update, so that the gradients of those before are there
# when the head's logits are
HOW = {
    "few": {"full": [], "lora": ["--lora_rank", "16", "--lr", "1e-4"],
            "offload": ["--offload", "optimizer", "--max_tokens_per_pass", "256"],
            "offload_reference": ["--offload", "optimizer", "reference", "--max_tokens_per_pass", "256"]},
    "true": {"full": [], "lora": ["--lora_rank", "16", "--lr", "1e-4"],
             "offload": ["--offload", "optimizer"],
             "offload_reference": ["--offload", "optimizer", "reference", "--batch_size", "2"]}}
TURN = {"few": (4, 12), "true": (100, 300)}  # tokens of a turn, drawn


# ------------------------------------------------------------------------------------------------ what is run
def make_checkpoint(config_folder, layers, tokenizer, folder, episodes="few", device="cpu"):
    """A random model in bfloat16, weights of the published size, made on the device, and a policy's settings.
    """
    config = Qwen2_5_VLConfig.from_pretrained(config_folder)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        hf = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    env = ENV[episodes]
    size = {"shortest_edge": env.min_pixels, "longest_edge": env.max_pixels}
    policy = Policy(hf, AutoTokenizer.from_pretrained(tokenizer), Qwen2VLImageProcessor(size=size), env)
    save_policy(policy, folder)


def write_scripts(data, env_config, length):
    """What each episode of the questions in `data` does, see bench_rollout.ScriptedEnv: two zooms where so
    many are allowed, each of as many frames as may be, then an answer."""
    rng, most = random.Random(0), env_config.zoom_max_frames
    for line in Path(data).read_text().splitlines():
        question = json.loads(line)
        for number in range(64):
            starts = [rng.randrange(100) for _ in range(min(2, env_config.max_zooms))]
            said = [f'<think>x</think><video_zoom>{{"segment": [{s}, {s + most / 2}], "fps": 2}}</video_zoom>'
                    for s in starts]
            said.append(f"<think>x{number}</think><answer>A</answer>")
            script = [(rng.randint(*length), text) for text in said]
            bench_rollout.ScriptedEnv.scripts[question["id"], number] = script


class Peaks:
    """Bytes taken at most in each phase of a run in this process, beyond those before it."""

    def __init__(self, device, file):
        self.device, self.file, self.peaks = device, file, {}
        reset_peak(device)
        self.before = peak_bytes(device)

    def end(self, phase):
        """The phase that ends here; what is taken from now on is another one's."""
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak_bytes(self.device) - self.before)
        reset_peak(self.device)
        self.file.write_text(json.dumps(self.peaks))

    def around(self, function, before, after):
        """The function, with phases that end before and after it."""
        def called(*args, **how):
            if before:
                self.end(before)
            result = function(*args, **how)
            self.end(after)
            return result

        return called


def run_inside(stage, episodes, no_save, peaks_file, argv):
    """A stage in this process, with scripted episodes and planted rewards. Writes the peaks of its phases."""
    module = {"rl": rl, "sft": sft}[stage]
    given = parse_flags(module.Config, "", (), argv=argv)
    if stage == "rl":
        zoom_env.reward_parts = planted_rewards
        engine.Episode.turn_is_over = bench_rollout.scripted_end
        PROTOCOLS["videozoomer"] = bench_rollout.ScriptedEnv
        write_scripts(given.data, run_environment(given.model, given), TURN[episodes])
    peaks = Peaks(device_of(given.device), peaks_file)
    start = peaks.around(TrainingRun.start, None, "loading")

    def start_run(run, weights, *args, **how):
        if no_save:
            weights.save = lambda path: None
            run._save = lambda: None
        return start(run, weights, *args, **how)

    TrainingRun.start = start_run
    TrainingRun.finish = peaks.around(TrainingRun.finish, "exporting", "exporting")
    if stage == "rl":
        rl.update = peaks.around(rl.update, "rollout", "update")
    else:
        sft.train_step = peaks.around(sft.train_step, None, "update")
    sys.argv = [f"{stage}.py", *argv]  # whose errors and settings these are
    run_main(module.main, out_of_memory)


# ------------------------------------------------------------------------------------------------ the checks
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


def planned_gb(stage, flags, on_cuda):
    """GB of the plan at rollout and at update, without its reserve and the process's own; on a CPU with the
    host's, as device and host are one there."""
    config = parse_flags({"rl": rl, "sft": sft}[stage].Config, "", (), argv=flags)
    plan = make_plan(stage, config, read_model_config(config.model), run_environment(config.model, config), 1,
                     1e12)
    others = "reserve", "processes", "loading", "exporting"
    of = lambda parts: sum(size for name, size in parts.items() if name not in others) / 1e9
    host = 0.0 if on_cuda else of(plan.host)
    return {"rollout": of(plan.rollout) + host, "update": of(plan.update) + host}


# ---------------------------------------------------------------------------------------------- the commands
class Bench:
    """Rows of the stages that were run."""

    def __init__(self, args, folder):
        self.args, self.folder, self.rows = args, folder, []
        self.device = device_of(args.device)
        synthetic(folder / "data", 10, 5, seed=3)
        rows = [json.loads(line) for line in open(folder / "data/sft.jsonl")]
        most = ENV[args.episodes].max_zooms + 1  # turns
        playable = [row for row in rows if row["kind"] != "direct" and len(row["turns"]) <= most]
        trajectories = [json.dumps(row) for row in playable]
        count = 2 if args.episodes == "few" else 8
        few = (trajectories * count)[:count]
        (folder / "data/few.jsonl").write_text("\n".join(few) + "\n")

    def add(self, name, ours, peer, ratio, met):
        row = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "met": met,
               "goal": None if met is None else "0.85 to 1.15"}
        self.rows.append(row)
        if self.args.json:
            Path(self.args.json).write_text(json.dumps(self.rows, indent=1))

    def run(self, stage, how, model, layers):
        """Returns {phase: GB at most}, {phase: GB of the plan}."""
        args, folder = self.args, self.folder
        flags = ["--model", str(model), *COMMON, *(RL if stage == "rl" else SFT)[args.episodes],
                 *HOW[args.episodes][how], "--device", args.device, "--preset", "paper",
                 *shlex.split(args.more)]
        data, out = folder / ("data/train.jsonl" if stage == "rl" else "data/few.jsonl"), folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, __file__, "--inside", stage, "--episodes", args.episodes, "--json",
                   str(folder / "peaks.json"), *["--no_save"] * args.no_save, "--", *flags,
                   "--data", str(data), "--out", str(out)]
        began = time.time()
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=os.environ | {"PYTHONUNBUFFERED": "1"})
        name = f"{stage} {how}, {layers or 'all'} layers"
        if run.returncode:
            raise SystemExit(f"{name} ended with {run.returncode}:\n{run.stdout[-3000:]}")
        seconds = time.time() - began
        metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        made = metrics["grad_norm"] > 0 and metrics.get("updates", 1) >= 1 and not metrics["bad_steps"]
        assert made, metrics
        if how == "lora" and not args.no_save:
            same, moved = same_base(model, out)
            assert same and moved and adapters_moved(out), (same, moved)
        taken = {phase: size / 1e9 for phase, size in json.loads((folder / "peaks.json").read_text()).items()}
        plan = planned_gb(stage, flags, self.device.type == "cuda")
        said = [f"{name}: loading {taken['loading']:.2f} GB"]
        for phase in ("rollout", "update"):
            if phase not in taken:
                continue
            ratio = taken[phase] / plan[phase]
            met = abs(ratio - 1) <= 0.15 if phase == "update" else None
            self.add(f"{name}: GB at {phase}, against the plan", taken[phase], plan[phase], ratio, met)
            said.append(f"{phase} {taken[phase]:.2f} GB, plan {plan[phase]:.2f} ({ratio:.2f})")
        said.append(f"exporting {taken['exporting']:.2f} GB; {seconds:.0f} s in all, "
                    f"{metrics.get('updates', 1)} optimizer steps")
        print("; ".join(said), flush=True)
        for key in ("seconds_rollout", "seconds_update", "seconds", "tokens", "episodes", "mismatch",
                    "mismatch_max"):
            if key in metrics:
                print(f"    {key} {metrics[key]:.4g}")
                self.add(f"{name}: {key}", metrics[key], None, None, None)
        self.add(f"{name}: seconds with start and loading", seconds, None, None, None)
        shutil.rmtree(out)
        return taken, plan


def make_in_process(args, layers, model):
    """The checkpoint, made in a process of its own, with which its memory goes."""
    make = (f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\nimport bench_true_size\n"
            f"bench_true_size.make_checkpoint({args.config!r}, {layers}, {args.tokenizer!r}, "
            f"{str(model)!r}, {args.episodes!r}, {args.device!r})")
    subprocess.run([sys.executable, "-c", make], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "tests/configs/qwen2.5-vl-3b"))
    parser.add_argument("--tokenizer", default=str(TINY_BASE), help="folder with a tokenizer")
    parser.add_argument("--layers", type=int, nargs="+", default=[None], help="fewer layers; without it all")
    parser.add_argument("--stages", nargs="+", choices=["sft", "rl"], default=["sft", "rl"])
    parser.add_argument("--how", nargs="+", choices=HOW["true"], default=["lora"],
                        help="all weights, adapters, the optimizer on the host, the reference there, too")
    parser.add_argument("--episodes", choices=ENV, default="few")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--more", default="", help="more flags of the stages, as one word")
    parser.add_argument("--no_save", action="store_true", help="runs end without writing a checkpoint")
    parser.add_argument("--json", help="file for the rows: name, ours, peer, ratio, goal, met")
    parser.add_argument("--folder", help="where to work; several GB")
    parser.add_argument("--model", help="folder of a checkpoint, which stays; made if it is not there")
    parser.add_argument("--make", action="store_true", help="only make the checkpoint")
    parser.add_argument("--inside", choices=["sft", "rl"], help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return run_inside(args.inside, args.episodes, args.no_save, Path(args.json), args.rest)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.make:
            return make_in_process(args, args.layers[0], args.model)
        bench, points = Bench(args, Path(folder)), {}
        print(card(bench.device), flush=True)
        for layers in args.layers:
            model = Path(args.model or f"{folder}/model")
            if not (model / INDEX).is_file() or len(args.layers) > 1:
                shutil.rmtree(model, ignore_errors=True)
                make_in_process(args, layers, model)
            for how in args.how:
                for stage in args.stages:
                    taken, plan = bench.run(stage, how, model, layers)
                    pair = max(taken.get("rollout", 0), taken["update"]), max(plan.values())
                    points.setdefault((stage, how), []).append((layers, *pair))
        for (stage, how), found in points.items():
            if len(found) > 1:
                (l0, p0, q0), (l1, p1, q1) = found[0], found[-1]
                print(f"{stage} {how}, slope a layer: {(p1 - p0) / (l1 - l0):.3f} GB, "
                      f"plan {(q1 - q0) / (l1 - l0):.3f} ({(p1 - p0) / (q1 - q0):.3f} of it)")


if __name__ == "__main__":
    main()
