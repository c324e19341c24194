"""A memory plan, before anything is loaded: what a run needs on each GPU and on a machine's host, and whether
it fits.

    python rl.py --plan 8x80 --model Qwen/Qwen2.5-VL-7B-Instruct ...    8 GPUs of 80 GB; any other flags
    python sft.py --plan 1x24x64 --model FOLDER --lora_rank 16          ... of a machine with 64 GB of its own

The plan reads the model's config.json and zoom_config.json, asks nothing of this machine and writes nothing.
It takes the flags as they are, and where they leave it open what scale/pick.py picks on GPUs. It counts the
two times when a GPU holds most, the rollout (in RL, and of held-out questions) and the update, each at its
worst moment. Where episodes decide, scale/estimates.py says what is expected of one; an episode longer than
--max_tokens_per_pass runs in one pass all the same, and takes more than the plan says. GB are 1e9 bytes. Exit
status 0: it fits. 1: it does not.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from common import UserError, choose_dtype
from rollout import RolloutConfig
from scale import estimates
from scale.estimates import FLOAT, RESERVE
from scale.pick import check_flags, shard_of_run
from training.checkpoints import EXPORT_BYTES, config_fault, loading, object_fault
from training.environment import largest_environment, run_environment

GPUS_A_MACHINE = 8
RESERVE_SMALL = 2e9  # in place of RESERVE, of a GPU of up to 24 GB
RESERVE_NCCL = 2e9  # ... and buffers of NCCL, of more than one process
PROCESS = 4e9  # host memory of a process with PyTorch, CUDA's libraries and what videos are decoded in

SHARDS = "--shard all on more GPUs (each pass sends weights; not with --lora_rank)"
OFFLOAD = "--offload optimizer on one GPU (the CPU makes the optimizer step)"
ADAPTERS = "--lora_rank (adapters alone are trained, with an --lr of their own)"
BATCH = "a smaller --batch_size (another run: fewer questions a step)"
LOWER = {  # what lowers a part, and what that costs
    "compute weights": SHARDS,
    "master weights": f"{SHARDS}, {OFFLOAD}, {ADAPTERS}",
    "moments": f"{SHARDS}, {OFFLOAD}, {ADAPTERS}",
    "gradients": f"{SHARDS}, {ADAPTERS}",
    "reference": f"{SHARDS}, --offload optimizer reference on one GPU (passes fetch it), {ADAPTERS}",
    "features": f"--offload features (they are copied to the host and back), {BATCH}",
    "activations": "--max_tokens_per_pass (more passes compute prompts again), --gradient_checkpointing "
                   "(layers are computed twice)",
    "cache": "--cache_gb (fewer episodes play at one time)",
    "master weights and moments on the host": f"{SHARDS}, {ADAPTERS}",
    "features on the host": BATCH,
    "images": f"in RL --max_rows (fewer episodes play at one time), in SFT {BATCH}",
    "loading": SHARDS}


# --------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Plan:
    """What a run needs.

    rollout, update: {part: bytes} of a GPU; rollout is empty where nothing is played. host: of a machine.
    gpu_bytes, host_bytes: what a GPU and a machine have; a host of None is not judged."""

    title: str
    rollout: dict
    update: dict
    host: dict
    gpu_bytes: float
    host_bytes: float | None

    @property
    def fits(self):
        gpu = max(total(self.rollout), total(self.update))
        on_gpu = gpu <= self.gpu_bytes + 1e3  # --cache_gb auto takes all that is left
        return on_gpu and (self.host_bytes is None or total(self.host) <= self.host_bytes)

    def text(self):
        """The parts of each time and place, the largest first, and the flags that lower the largest."""
        lines, hints = [f"plan: {self.title}"], {}
        for where, parts, there in (("a GPU at rollout", self.rollout, self.gpu_bytes),
                                    ("a GPU at update", self.update, self.gpu_bytes),
                                    ("the host of a machine", self.host, self.host_bytes)):
            if not parts:
                continue
            limit = "" if there is None else f" of {there / 1e9:g}"
            lines.append(f"{where}: {total(parts) / 1e9:.1f}{limit} GB")
            largest = sorted(filter(parts.get, parts), key=parts.get, reverse=True)
            lines += [f"  {parts[part] / 1e9:>8.2f}  {part}" for part in largest]
            hints |= {part: LOWER[part] for part in largest[:3] if part in LOWER}
        lines += [f"what lowers {part}: {flags}" for part, flags in hints.items()]
        return "\n".join([*lines, "fits" if self.fits else "does not fit"])


def total(parts):
    return sum(parts.values())


class Run:
    """What a run's settings come to: its sizes and episodes, and who holds which weights."""

    def __init__(self, name, config, model_config, env_config, processes):
        dtype = choose_dtype(config.dtype or "bfloat16", None)
        self.config, self.item, self.in_rl, self.processes = config, dtype.itemsize, name == "rl", processes
        self.sizes = estimates.sizes_of(model_config, config.lora_rank)
        # what is played, also where SFT plays held-out questions, and trained on
        self.episodes = estimates.episodes_of(config, env_config, processes)
        self.play = RolloutConfig() if config.val else None
        if self.in_rl:
            self.play = config
        self.frame_tokens = estimates.frame_tokens_of(model_config, env_config)
        self.frame_bytes = self.frame_tokens * self.sizes.hidden * self.item  # of its features
        self.image_bytes = 3 * env_config.max_pixels
        if self.play:
            self.longest = estimates.longest_episode(env_config, self.frame_tokens, self.play)
            rows = min(self.play.max_rows, self.episodes.groups * self.episodes.size)
            self.live_frames = self.episodes.frames_of(rows)
        # the weights
        self.here = min(processes, GPUS_A_MACHINE)  # processes of a machine
        shard = shard_of_run(config, processes, dtype)
        self.shards = {"none": 1, "all": processes, "node": self.here}[shard]
        self.in_shards = shard != "none"
        self.offload = "optimizer" in config.offload
        # adapters' reference is the base, which is there
        self.has_reference = self.in_rl and config.kl_weight > 0 and not config.lora_rank


def make_plan(name, config, model_config, env_config, processes, gpu_bytes, host_bytes=None):
    """The plan of a run.

    Args:
        name: of the script, "rl" or "sft". config: its Config.
        model_config: a Qwen2_5_VLConfig. env_config: an EnvConfig, what the run plays.
        processes: of the run, one a GPU, GPUS_A_MACHINE a machine.
        gpu_bytes, host_bytes: what a GPU and a machine have; the latter None where it is not known.
    Returns a Plan."""
    run = Run(name, config, model_config, env_config, processes)
    reserve = RESERVE if gpu_bytes > 24e9 else RESERVE_SMALL
    if processes > 1:
        reserve += RESERVE_NCCL
    held = held_of(run) | {"reserve": reserve}
    where = f"weights in {run.shards} shards" if run.in_shards else "all weights on each"
    if config.offload:
        where += f", on the host {' '.join(config.offload)}"
    title = (f"{name}.py, {run.sizes.total / 1e9:.2f} B parameters, {run.sizes.trained / 1e9:.2f} B trained, "
             f"{processes} GPU(s), {where}")
    rollout = rollout_of(run, held, gpu_bytes) if run.play else {}
    return Plan(title, rollout, held | update_of(run), host_of(run), gpu_bytes, host_bytes)


def held_of(run):
    """{part: bytes} of what a GPU holds at all times."""
    s, item = run.sizes, run.item
    compute = s.vision
    if not run.in_shards:
        compute += s.language
    if s.rank:
        compute += s.trained
    held = {"compute weights": item * compute}
    if not run.offload:
        if run.in_shards or item < FLOAT:  # else the compute weights are the master weights
            held["master weights"] = FLOAT * s.trained / run.shards
        held["moments"] = 2 * FLOAT * s.trained / run.shards
    if run.has_reference:
        held["reference"] = item * s.language / run.shards
        if "reference" in run.config.offload:  # its layers come to two places
            held["reference"] = item * (s.root + 2 * s.layer)
    return held


def rollout_of(run, held, gpu_bytes):
    """{part: bytes} of a GPU at rollout, with what is `held`. --cache_gb auto is the rest of `gpu_bytes`."""
    s, item, play = run.sizes, run.item, run.play
    frames = run.live_frames
    if run.in_rl and "features" not in run.config.offload:  # the update needs them
        frames = run.episodes.all_frames
    rollout = dict(held)
    if run.in_shards:
        rollout["gathered weights"] = item * s.language
    rollout |= {"features": frames * run.frame_bytes,
                "prefill and decode step": estimates.rollout_activations(s, run.frame_tokens, item),
                "logits": estimates.decode_logits(s, play.max_rows, item)}
    if play.cache_gb == "auto":
        cache = estimates.auto_cache(s, item, gpu_bytes - total(rollout), run.longest, play.max_rows)
    else:
        cache = play.cache_gb * 1e9
    rollout["prefill and decode step"] += estimates.decode_activations(s, item) * cache
    return rollout | {"cache": cache}


def update_of(run):
    """{part: bytes} of a GPU in the update beside what is held, at the moment of a pass when it is most."""
    s, item, shards, config = run.sizes, run.item, run.shards, run.config
    tokens, entropy = config.max_tokens_per_pass, run.in_rl and config.entropy_weight != 0
    at_head, at_layer = estimates.pass_moments(s, tokens, item, config.gradient_checkpointing, entropy)
    moments = [at_head, at_layer]
    if run.in_shards:
        at_head["gathered weights"] = item * (s.root + s.layer)
        at_layer["gathered weights"] = item * (s.root + 2 * s.layer)
        at_layer["passing gradients"] = item * s.head + FLOAT * s.layer
    if run.processes > run.shards > 1:  # what is summed over machines stays to the end of the backward pass
        later = (s.layers - 1) * s.hidden * tokens * item  # what the other layers kept has gone
        moments.append(at_layer | {
            "activations": max(0, at_layer["activations"] - later),
            "passing gradients": at_layer["passing gradients"] + FLOAT * s.layers * s.layer / shards})
    features = run.episodes.all_frames * run.frame_bytes
    if "features" in config.offload:
        features = 0
    return {"gradients": FLOAT * s.trained / shards, "features": features} | max(moments, key=total)


def host_of(run):
    """{part: bytes} of a machine's host, when it holds most: with images of frames, exporting, or loading."""
    s, e, item, offload = run.sizes, run.episodes, run.item, run.config.offload
    kept = {}
    if run.offload:  # with the memory that two groups of gradients pass through
        kept["master weights and moments on the host"] = FLOAT * (3 * s.trained + 2 * max(s.layer, s.head))
    if run.has_reference and "reference" in offload:
        kept["reference on the host"] = item * s.layers * s.layer
    if "features" in offload:
        kept["features on the host"] = run.here * e.all_frames * run.frame_bytes
    # images of what is played and of groups whose frames are decoded ahead; in SFT of this and the next batch
    frames = 0 if run.in_rl else 2 * e.all_frames
    if run.play:
        frames = max(frames, run.live_frames + max(4, run.play.max_rows // e.size) * e.frames)
    # the first process exports, a file at a time, with adapters copies of what is merged
    file = min(item * s.total, max(EXPORT_BYTES, item * s.head))
    loaded = item * (s.head / run.shards if run.in_shards else s.total)
    moments = [kept | {"images": run.here * frames * run.image_bytes},
               kept | {"exporting": item * s.adapted + file}, {"loading": run.here * loaded}]
    return {"processes": run.here * PROCESS} | max(moments, key=total)


# ------------------------------------------------------------------------------------------------ the command
def read_machines(text):
    """(number of GPUs, bytes of each, bytes of a machine's host or None) of --plan. Raises UserError."""
    found = re.fullmatch(r"([1-9]\d*)x(\d+\.?\d*)(?:x(\d+\.?\d*))?", text)
    if not found:
        raise UserError("--plan must be GPUs x GB of each, as 8x80, or 8x80x1000 with GB of a machine's host "
                        f"memory, not {text}")
    gpus, gpu_gb, host_gb = found.groups()
    host_bytes = float(host_gb) * 1e9 if host_gb else None
    return int(gpus), float(gpu_gb) * 1e9, host_bytes


def read_model_config(name_or_path):
    """The Qwen2_5_VLConfig of a folder with config.json, or of a name on the hub. Raises PolicyError."""
    with loading(name_or_path):
        fault = None
        if Path(name_or_path).is_dir():
            fault = object_fault(Path(name_or_path, "config.json"))
        fault = fault or config_fault(PreTrainedConfig.get_config_dict(name_or_path)[0])
        if fault:
            raise UserError(fault)
        return AutoConfig.from_pretrained(name_or_path)


def plan_main(name, config):
    """Prints the plan of a run and ends the process, with status 0 if it fits, else 1. Raises UserError."""
    gpus, gpu_bytes, host_bytes = read_machines(config.plan)
    check_flags(config, gpus)
    env_config = largest_environment(run_environment(config.model, config), config)
    plan = make_plan(name, config, read_model_config(config.model), env_config, gpus, gpu_bytes, host_bytes)
    print(plan.text())
    sys.exit(0 if plan.fits else 1)
