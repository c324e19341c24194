"""A memory plan, before anything is loaded: what a run needs on each GPU and on the host, and whether it fits.

    python rl.py --plan --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 8 --gpu_gb 80 ...     any other flags
    python sft.py --plan --model FOLDER --gpus 1 --gpu_gb 24 --host_gb 64

It reads the model's config.json (and zoom_config.json), touches no device and writes nothing. It counts the two times at
which a GPU holds most: the rollout (RL), and the update, each at its worst moment. Exit status 0: it fits. 1: it does
not, and the plan names flags with which it would, and what they cost. GB are 1e9 bytes. Where episodes decide (features,
times), scale/estimates.py says what is expected of one.

`choose` does the same for a run whose flags leave it open who holds the weights.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from transformers import AutoConfig

from common import UserError, read_text
from rollout import RolloutConfig
from scale import estimates as of
from scale.checkpoints import config_fault, load_env_config, loading, object_fault

GPUS_A_MACHINE = 8
RESERVE, RESERVE_SMALL = 3e9, 2e9  # CUDA's context, libraries' workspaces, gaps between tensors; up to 24 GB
RESERVE_NCCL = 2e9  # ... and buffers of NCCL, of more than one process
PROCESS = 4e9  # host memory of a process with PyTorch, CUDA's libraries and what videos are decoded in


# --------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Plan:
    """rollout and update: {category: bytes} of a GPU, host: of a machine; without rollout in SFT. seconds: expected
    of the parts of a step, {} for each of rollout and update. notes: lines."""

    title: str
    rollout: dict
    update: dict
    host: dict
    gpu_bytes: float
    host_bytes: float
    seconds: dict
    card: str
    notes: tuple = ()

    @property
    def on_gpu(self):
        return {what: sum(part.values()) for what, part in (("rollout", self.rollout), ("update", self.update)) if part}

    @property
    def faults(self):
        """What does not fit, in words."""
        needs = [(f"GPU at {what}", size, self.gpu_bytes) for what, size in self.on_gpu.items()]
        needs.append(("host", sum(self.host.values()), self.host_bytes))
        return [f"{where} {size / 1e9:.1f} of {there / 1e9:.0f} GB" for where, size, there in needs if size > there]

    @property
    def fits(self):
        return not self.faults

    def text(self):
        """The plan, as a table."""
        times = {"rollout": self.rollout, "update": self.update} if self.rollout else {"update": self.update}
        row = lambda name, cells: f"  {name:<24}" + "".join(f"{cell:>10}" for cell in cells)
        lines = [f"plan: {self.title}", row("GB a GPU", times)]
        for category in dict.fromkeys(itertools.chain(*times.values())):
            cells = [part.get(category, 0) for part in times.values()]
            if any(cells):
                lines.append(row(category, [f"{size / 1e9:.2f}" for size in cells]))
        lines.append(row(f"all, of {self.gpu_bytes / 1e9:.0f}", [f"{sum(p.values()) / 1e9:.2f}" for p in times.values()]))
        lines.append(row("GB of a machine's host", []))
        lines += [row(category, [f"{size / 1e9:.2f}"]) for category, size in self.host.items() if size]
        lines.append(row(f"all, of {self.host_bytes / 1e9:.0f}", [f"{sum(self.host.values()) / 1e9:.2f}"]))
        for what, parts in self.seconds.items():
            shares = ", ".join(f"{part} {seconds:.0f}" for part, seconds in parts.items() if seconds >= 0.5)
            lines.append(f"  {what}: about {sum(parts.values()):.0f} s a step ({shares})")
        lines.append(f"  seconds are arithmetic, not measured: {of.OF_PEAK:.0%} of the FLOP/s and {of.OF_BANDWIDTH:.0%} of the "
                     f"bytes/s of one {self.card}, {of.ZOOMS} zooms an episode, {of.TURN_TOKENS} tokens a turn")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines + ["fits" if self.fits else f"does not fit: {'; '.join(self.faults)}"])


def shards_of(config, processes):
    """(what --shard stands for, the number of shards)."""
    plain = processes == 1 or config.dtype == "float32" or config.lora_rank
    shard = config.shard or ("none" if plain else "all")
    return shard, {"none": 1, "all": processes, "node": min(processes, GPUS_A_MACHINE)}[shard]


def make_plan(name, config, model_config, env_config, processes, gpu_bytes, host_bytes, sizes=None):
    """The plan of a run.

    Args:
        name: of the script, "rl" or "sft". config: its Config.
        model_config: a Qwen2_5_VLConfig. env_config: an EnvConfig.
        processes: of the run, one a GPU, 8 a machine.
        gpu_bytes, host_bytes: what a GPU and a machine have.
        sizes: `estimates.sizes_of`, if they are there already."""
    s = sizes or of.sizes_of(model_config, config.lora_rank, config.lora_targets)
    item = 4 if config.dtype == "float32" else 2
    in_rl, here = name == "rl", min(processes, GPUS_A_MACHINE)
    play = config if in_rl else RolloutConfig() if config.val else None  # what plays, if any: SFT's held-out questions
    on_host, offload = getattr(config, "on_host", ()), getattr(config, "offload", False)
    shard, shards = shards_of(config, processes)
    in_shards, e = shard != "none", of.episodes_of(config, model_config, env_config, processes)
    with_reference = in_rl and config.kl_weight > 0
    apart = with_reference and not s.rank  # the reference has weights of its own

    # weights, gradients, moments
    held = {"compute weights": item * (s.vision + (0 if in_shards else s.language) + s.trained * bool(s.rank)),
            "masters": of.FLOAT * s.trained / shards if in_shards or item < of.FLOAT else 0,
            "moments": 2 * of.FLOAT * s.trained / shards, "reference": item * s.language / shards if apart else 0}
    gradients = of.FLOAT * s.trained / shards
    host = {"processes": here * PROCESS}
    if offload:
        largest = max(s.layer, s.vocabulary * s.hidden)
        host["masters and moments"] = of.FLOAT * (3 * s.trained + 2 * largest)
        held |= {"masters": 0, "moments": 0}
    if apart and "reference" in on_host:
        host["reference"] = item * s.layers * s.layer
        held["reference"] = item * (s.root + 2 * s.layer)

    # frames: features on the GPU or the host, images on the host as long as they may be shown
    of_frame = e.frame_tokens * s.hidden * item
    features, image = e.all_frames * of_frame, 3 * env_config.max_pixels
    live, ahead = 0, 0  # frames of the episodes that are played, and of what is decoded meanwhile
    if play:
        rows = min(play.max_rows, e.groups * e.size)
        live = -(-rows // e.size) * e.frames + rows * e.zoomed
        ahead = max(4, play.max_rows // e.size) * e.frames
    host["frames"] = here * image * max(live + ahead, 0 if in_rl else 2 * e.all_frames)  # SFT: this batch and the next
    if "features" in on_host:
        host["features"] = here * features
    # before and after: each process reads, the first one exports, with adapters merged copies of what has them
    files = max(here * item * (s.largest / shards if in_shards else s.total), item * (s.total + s.adapted))
    if files > sum(host.values()) - host["processes"]:
        host = {"processes": host["processes"], "loading and exporting": files}
    reserve = (RESERVE if gpu_bytes > 24e9 else RESERVE_SMALL) + RESERVE_NCCL * (processes > 1)

    # the update, at the moment of a pass, or of the optimizer's step, at which there is most
    entropy = in_rl and config.entropy_weight != 0
    moments = of.pass_moments(s, config.max_tokens_per_pass, item, config.gradient_checkpointing, entropy)
    if in_shards:
        root, layer = s.root, s.layer
        moments["head"]["gathered weights"] = item * (root + layer)
        moments["layer"]["gathered weights"] = item * (root + 2 * layer)
        moments["layer"]["passing gradients"] = item * s.vocabulary * s.hidden + of.FLOAT * layer
        moments["end"]["passing gradients"] = (item + of.FLOAT + of.FLOAT / shards) * root
        if processes > shards:  # what goes to other machines stays to the end of the backward pass
            summed = of.FLOAT * s.layers * layer / shards
            less = (s.layers - 1) * s.hidden * config.max_tokens_per_pass * item
            first = {"activations": max(0, moments["layer"]["activations"] - less),
                     "passing gradients": moments["layer"]["passing gradients"] + summed}
            moments["first layer"] = moments["layer"] | first
            moments["end"]["passing gradients"] += summed - of.FLOAT * root / shards
        if apart:  # the policy's root, and the reference's with two layers
            forward = of.forward_activations(s, config.max_tokens_per_pass, item)
            moments["reference"] = {"activations": moments["head"]["activations"] + forward,
                                    "gathered weights": item * (2 * root + 2 * layer)}
    elif processes > 1:  # gradients are summed in buckets
        moments["step"] = {"passing gradients": max(64e6, of.FLOAT * s.largest)}
    peak = max(moments.values(), key=lambda moment: sum(moment.values()))
    update = held | {"gradients": gradients, **peak, "features": 0 if "features" in on_host else features,
                     "reserve": reserve}

    # the rollout
    rollout, notes, rows = {}, [], 1
    if play:
        row = (e.prompt + play.max_response_tokens) * of.cache_token(s, item)
        playing = max(of.forward_activations(s, of.PREFILL_TOKENS, item), of.vision_activations(s, e.frame_tokens, item))
        rollout = held | {"gathered weights": item * s.language if in_shards else 0,
                          "features": features if in_rl and "features" not in on_host else of_frame * live,
                          "activations": playing, "logits": of.decode_logits(s, play.max_rows, item), "reserve": reserve}
        of_cache = of.decode_activations(s, item)
        cache = play.cache_gb
        if cache == "auto":
            left = (gpu_bytes - sum(rollout.values())) / (1 + of_cache)
            cache = max(row, min(left, play.max_rows * row)) / 1e9
        rollout["cache"] = cache * 1e9
        rollout["activations"] += of_cache * cache * 1e9
        prompts = -(-play.max_rows // e.size) * e.prompt * of.cache_token(s, item)
        rows = max(1, min(play.max_rows, e.groups * e.size, (cache * 1e9 - prompts) // (of.cache_token(s, item) * e.own)))
        if cache * 1e9 < row:
            notes.append(f"an episode of --max_response_tokens takes {row / 1e9:.1f} GB of cache, more than --cache_gb")
        if in_rl and (longest := e.prompt + play.max_response_tokens) > config.max_tokens_per_pass:
            more = of.pass_moments(s, longest, item, config.gradient_checkpointing, entropy)["layer"]["activations"]
            notes.append(f"an episode of {longest:,} tokens, the longest that may be, runs in one pass all the same: its "
                         f"activations would be {more / 1e9:.1f} GB")
    card = of.card_of(gpu_bytes)
    seconds = {"update": of.update_seconds(s, e, config, card, shards, shard == "all" and processes > here, item,
                                           with_reference, offload)}
    if in_rl:
        seconds = {"rollout": of.rollout_seconds(s, e, rows, card, item)} | seconds
    title = (f"{name}.py, {s.total / 1e9:.2f} B parameters, {s.trained / 1e9:.2f} B trained, {processes} GPU(s), "
             + (f"weights in {shards} shards" if in_shards else "all weights on each") + ", offload" * offload)
    return Plan(title, rollout, update, host, gpu_bytes, host_bytes, seconds, card[0], tuple(notes))


# ------------------------------------------------------------------------------------------------- the choice
def choose(name, config, model_config, env_config, processes, gpu_bytes, host_bytes):
    """Who holds the weights, where the flags leave it open: of what fits, what costs least. With several processes
    each all of them, or shards of a machine's (of several machines) or of all; with one, masters and moments on the
    host, then frames' features and the reference, too.

    Returns (the changed config, a line that says what and why); where nothing fits, the last of them."""
    options, has = [{}], {f.name for f in fields(config)}
    if processes > 1 and config.shard is None and not config.lora_rank and config.dtype != "float32":
        machines = processes > GPUS_A_MACHINE
        options = [{"shard": "none"}, *([{"shard": "node"}] if machines else []), {"shard": "all"}]
    elif processes == 1 and not config.lora_rank and not getattr(config, "offload", False) and "offload" in has:
        hosts = [[], ["features"], ["features", "reference"]] if "on_host" in has and name == "rl" else [None]
        options += [{"offload": True} | ({} if names is None else {"on_host": sorted({*config.on_host, *names})})
                    for names in hosts]
    sizes = of.sizes_of(model_config, config.lora_rank, config.lora_targets)
    for changes in options:
        chosen = replace(config, **changes)
        plan = make_plan(name, chosen, model_config, env_config, processes, gpu_bytes, host_bytes, sizes)
        if plan.fits:
            break
    shard, shards = shards_of(chosen, processes)
    what = f"weights in {shards} shards" if shard != "none" else "all weights on each GPU"
    if getattr(chosen, "offload", False):
        what = " and ".join(["masters", "moments", *getattr(chosen, "on_host", ())]) + " in host memory"
    sums = plan.on_gpu
    also = f", {sums['rollout'] / 1e9:.0f} at rollout" if "rollout" in sums else ""
    return chosen, (f"memory: {what}; {sums['update'] / 1e9:.0f} of {gpu_bytes / 1e9:.0f} GB a GPU at update{also} (plan)"
                    + f"; it may not fit: see {name}.py --plan" * (not plan.fits))


# ------------------------------------------------------------------------------------------- what would help
def remedies(name, config, model_config, env_config, processes, gpu_bytes, host_bytes):
    """Flags with which a run fits that does not: [(settings, {setting: what it costs})], of each kind what costs least:
    the same results, fewer questions a step, adapters, more GPUs."""
    sized = {rank: of.sizes_of(model_config, rank, config.lora_targets) for rank in {config.lora_rank, 16}}

    def plan_of(changes):
        gpus, changed = changes.get("gpus", processes), replace(config, **changes)
        return make_plan(name, changed, model_config, env_config, gpus, gpu_bytes, host_bytes, sized[changed.lora_rank])

    def best(**forced):
        """Of what fits: the most questions a step, then the fewest flags, then the least time."""
        found = []
        for changes in changes_of(name, config, forced, processes):
            plan = plan_of(changes)
            if plan.fits:
                size = changes.get("batch_size", config.batch_size)
                seconds = sum(sum(part.values()) for part in plan.seconds.values())
                found.append((-size, len(changes), seconds / size, json.dumps(changes), changes))
        return min(found)[-1] if found else None

    fewer = [n for n in (64, 32, 16, 8) if n < config.batch_size] if name == "rl" else []
    first_of = lambda options: next((changes for forced in options if (changes := best(**forced)) is not None), None)
    same = best()
    kinds = [same, same is None and first_of({"batch_size": n} for n in fewer)]
    if not config.lora_rank:
        kinds.append(first_of([{"lora_rank": 16}, *({"lora_rank": 16, "batch_size": n} for n in fewer)]))
    more = first_of({"gpus": n} for n in (2, 4, 8, 16, 32, 64) if n > processes)
    kinds.append(more if not same or more and len(more) < len(same) else None)
    return [(changes, costs(changes, config, plan_of)) for changes in kinds if changes]


def changes_of(name, config, forced, processes):
    """Dicts of settings that change what fits and no result, each with those that are `forced`."""
    has, one = {f.name for f in fields(config)}, forced.get("gpus", processes) == 1
    offload, on_host = getattr(config, "offload", False), set(getattr(config, "on_host", ()))
    trains_all = not (config.lora_rank or "lora_rank" in forced)
    choices = [[forced]]
    if name == "rl" and config.cache_gb != "auto":
        choices.append([{}, {"cache_gb": "auto"}])
    choices.append([{}, *({"max_tokens_per_pass": n} for n in (16_384, 8192, 4096) if n < config.max_tokens_per_pass)])
    if not config.gradient_checkpointing:
        choices.append([{}, {"gradient_checkpointing": True}])
    if offload and not (one and trains_all):
        choices.append([{"offload": False} | ({"on_host": ["features"]} if "reference" in on_host else {})])
    elif one and trains_all and "offload" in has and not offload:
        choices.append([{}, {"offload": True}])
    if not one and trains_all and config.shard == "none":
        choices.append([{"shard": "all"}])
    if name == "rl" and "on_host" in has:
        more = [{"features"}, {"reference"}, {"features", "reference"}]
        choices.append([{}, *({"on_host": sorted(on_host | names)} for names in more if names - on_host)])
    for parts in itertools.product(*choices):
        changes = {key: value for part in parts for key, value in part.items()}
        streams = "reference" in changes.get("on_host", ())
        if not streams or one and trains_all and changes.get("offload", offload):
            yield changes


def costs(changes, config, plan_of):
    """{setting: what it costs, in words}."""
    after, has = plan_of(changes), lambda part: after.seconds["update"].get(part, 0.0)
    before = {key: plan_of({k: v for k, v in changes.items() if k != key}) for key in ("cache_gb", "max_tokens_per_pass")}
    passes = has("passes") - before["max_tokens_per_pass"].seconds["update"]["passes"]
    words = {"cache_gb": f"{after.rollout.get('cache', 0) / 1e9:.1f} GB of cache, not "
                         f"{before['cache_gb'].rollout.get('cache', 0) / 1e9:.1f}: if less, fewer episodes at a time",
             "on_host": f"{has('features') + has('reference'):.0f} s a step for copies, beyond those beside passes",
             "max_tokens_per_pass": f"prompts are computed again for each pass: {passes:.0f} s a step",
             "gradient_checkpointing": "each layer is computed twice",
             "offload": f"the CPU steps: {has('optimizer'):.0f} s a step" if changes.get("offload") else
                        "not with adapters, nor with several processes",
             "shard": f"weights are gathered for each pass: {has('gathering'):.0f} s a step beyond what goes beside it",
             "batch_size": "another run: fewer questions a step",
             "lora_rank": "another method: adapters are trained alone, with an --lr of their own",
             "gpus": "more GPUs"}
    return {key: words[key] for key in changes}


def as_flags(changes):
    """A command line's words for settings."""
    def words(name, value):
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name} " + (" ".join(value) if isinstance(value, list | tuple) else str(value))
    return " ".join(words(*change) for change in changes.items())


# ------------------------------------------------------------------------------------------------ the command
def read_settings(name_or_path):
    """A model's configuration and settings of the environment, of a folder with config.json or a name on the hub.
    Raises PolicyError."""
    path = Path(name_or_path)
    with loading(name_or_path):
        if path.exists() or str(name_or_path).startswith((".", "/", "~", "runs/")):
            if not (path / "config.json").is_file():
                raise UserError("a plan needs a folder with a config.json, or a name on the hub")
            if fault := object_fault(path / "config.json") or config_fault(json.loads(read_text(path / "config.json"))):
                raise UserError(fault)
        model_config = AutoConfig.from_pretrained(name_or_path)
        if fault := config_fault(model_config.to_dict()):
            raise UserError(fault)
        return model_config, load_env_config(path)


def gpu_here():
    """Bytes of this machine's first GPU, without touching it."""
    try:
        ask = "nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"
        return float(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]) * 2 ** 20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        raise UserError("--plan: no GPU is seen here; say with --gpu_gb what one of them has") from None


def host_here():
    """Bytes of this machine's memory, or of what its container may take."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            there = min(there, int(Path(file).read_text()))
        except (OSError, ValueError):  # no limit
            continue
    return there


def plan_main(name, config, model=None):
    """Prints the plan of a run and exits, with status 0 where it fits, else 1. `model`: where --model is not given."""
    model_config, env_config = read_settings(config.model or model)
    gpu_bytes = config.gpu_gb * 1e9 if config.gpu_gb else gpu_here()
    host_bytes = config.host_gb * 1e9 if config.host_gb else host_here()
    given = name, config, model_config, env_config, config.gpus, gpu_bytes, host_bytes
    plan = make_plan(*given)
    print(plan.text())
    if not plan.fits:
        found = remedies(*given)
        print("It would fit with" if found else "No flags are known with which it would fit.")
        for changes, words in found:
            print(f"  {as_flags(changes)}")
            for flag, cost in words.items():
                print(f"      --{flag}: {cost}")
    sys.exit(0 if plan.fits else 1)
