"""A memory plan, before anything is loaded: what a run needs on each GPU and on the host, and if it fits.

    python rl.py --plan --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 8 --gpu_gb 80 ...     any other flags
    python sft.py --plan --model FOLDER --gpus 1 --gpu_gb 24 --host_gb 64

It reads the model's config.json (and zoom_config.json), touches no device and writes nothing. It counts the
two times at which a GPU holds most: the rollout (RL), and the update, each at its worst moment. Exit status
0: it fits. 1: it does not, and the plan names flags with which it would, and what they cost. GB are 1e9
bytes. Where episodes decide (features, times), scale/estimates.py says what is expected of one.

`choose` does the same for a run whose flags leave it open who holds the weights.
"""

import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from common import UserError, read_text
from rollout import RolloutConfig
from scale import estimates as of
from scale.devices import gpu_here, host_here
from training.checkpoints import EXPORT_BYTES, config_fault, loading, object_fault
from training.environment import run_environment

GPUS_A_MACHINE = 8
RESERVE, RESERVE_SMALL = 3e9, 2e9  # CUDA's context, libraries' workspaces, gaps between tensors; up to 24 GB
RESERVE_NCCL = 2e9  # ... and buffers of NCCL, of more than one process
PROCESS = 4e9  # host memory of a process with PyTorch, CUDA's libraries and what videos are decoded in


# --------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Plan:
    """What a run needs.

    rollout, update: {category: bytes} of a GPU; without rollout in SFT that plays no held-out questions.
    host: the same of a machine. seconds: {"rollout", "update": {part of a step: expected seconds}}."""

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
        """{time: {category: bytes}}, of the times that there are."""
        return {what: part for what, part in (("rollout", self.rollout), ("update", self.update)) if part}

    @property
    def faults(self):
        """What does not fit, in words."""
        needs = [(f"GPU at {what}", part, self.gpu_bytes) for what, part in self.on_gpu.items()]
        needs = [(where, sum(part.values()), there) for where, part, there in
                 (*needs, ("host", self.host, self.host_bytes))]
        return [f"{where} {size / 1e9:.1f} of {there / 1e9:.0f} GB"
                for where, size, there in needs if size > there + 1e3]  # a cache may take all that is left

    @property
    def fits(self):
        return not self.faults

    def text(self):
        """The plan, as a table."""
        def row(name, sizes):
            return f"  {name:<24}" + "".join(f"{size / 1e9:>10.2f}" for size in sizes)

        times = self.on_gpu
        lines = [f"plan: {self.title}", f"  {'GB a GPU':<24}" + "".join(f"{what:>10}" for what in times)]
        for category in dict.fromkeys(itertools.chain(*times.values())):
            sizes = [part.get(category, 0) for part in times.values()]
            if any(sizes):
                lines.append(row(category, sizes))
        lines.append(row(f"all, of {self.gpu_bytes / 1e9:.0f}", [sum(p.values()) for p in times.values()]))
        lines.append("  GB of a machine's host")
        lines += [row(category, [size]) for category, size in self.host.items() if size]
        lines.append(row(f"all, of {self.host_bytes / 1e9:.0f}", [sum(self.host.values())]))
        for what, parts in self.seconds.items():
            shares = ", ".join(f"{part} {seconds:.0f}" for part, seconds in parts.items() if seconds >= 0.5)
            lines.append(f"  {what}: about {sum(parts.values()):.0f} s a step ({shares})")
        lines.append(f"  seconds are arithmetic, not measured: {of.OF_PEAK:.0%} of the FLOP/s and "
                     f"{of.OF_BANDWIDTH:.0%} of the bytes/s of one {self.card}, {of.ZOOMS} zooms an episode, "
                     f"{of.TURN_TOKENS} tokens a turn")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines + ["fits" if self.fits else f"does not fit: {'; '.join(self.faults)}"])


class Run:
    """What a run's settings come to: its Config, sizes and episodes, and who holds what."""

    def __init__(self, name, config, model_config, env_config, processes, sizes=None):
        self.name, self.config, self.env_config, self.processes = name, config, env_config, processes
        self.sizes = sizes or of.sizes_of(model_config, config.lora_rank, config.lora_targets)
        self.episodes = of.episodes_of(config, model_config, env_config, processes)
        self.item = 4 if config.dtype == "float32" else 2  # bytes of a number in the compute dtype
        self.in_rl, self.here = name == "rl", min(processes, GPUS_A_MACHINE)  # here: processes of a machine
        self.shard, self.shards = shards_of(config, processes)
        self.in_shards = self.shard != "none"
        self.offload, self.on_host = bool(config.offload), getattr(config, "on_host", ())
        self.with_reference = self.in_rl and config.kl_weight > 0
        self.own_reference = self.with_reference and not config.lora_rank  # it has weights
        self.entropy = self.in_rl and config.entropy_weight != 0
        # what plays, if any: SFT's held-out questions do, too
        self.play = config if self.in_rl else RolloutConfig() if config.val else None

    @property
    def frame_bytes(self):
        """Features of a frame."""
        return self.episodes.frame_tokens * self.sizes.hidden * self.item

    @property
    def live_frames(self):
        """Of the episodes that are played at one time."""
        e = self.episodes
        rows = min(self.play.max_rows, e.groups * e.size) if self.play else 0
        return -(-rows // e.size) * e.frames + rows * e.zoomed


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
    run = Run(name, config, model_config, env_config, processes, sizes)
    s, e, card = run.sizes, run.episodes, of.card_of(gpu_bytes)
    reserve = (RESERVE if gpu_bytes > 24e9 else RESERVE_SMALL) + RESERVE_NCCL * (processes > 1)
    update = held(run) | update_of(run) | {"reserve": reserve}
    across = run.shard == "all" and processes > run.here  # machines
    seconds = {"update": of.update_seconds(s, e, config, card, run.shards, across, run.item,
                                           run.with_reference, run.offload)}
    rollout, notes = {}, ()
    if run.play:
        rollout = rollout_of(run, held(run) | {"reserve": reserve}, gpu_bytes)
    if run.in_rl:
        rows, notes = rows_at_once(run, rollout["cache"]), notes_of(run, rollout["cache"])
        seconds = {"rollout": of.rollout_seconds(s, e, rows, card, run.item)} | seconds
    title = (f"{name}.py, {s.total / 1e9:.2f} B parameters, {s.trained / 1e9:.2f} B trained, {processes} "
             f"GPU(s), {f'weights in {run.shards} shards' if run.in_shards else 'all weights on each'}"
             + ", offload" * run.offload)
    return Plan(title, rollout, update, host_of(run), gpu_bytes, host_bytes, seconds, card[0], notes)


def held(run):
    """{category: bytes} of what a GPU holds at all times."""
    s, item = run.sizes, run.item
    compute = s.vision + (0 if run.in_shards else s.language) + (s.trained if s.rank else 0)
    reference = item * s.language / run.shards
    if "reference" in run.on_host:  # its layers come to two places
        reference = item * (s.root + 2 * s.layer)
    apart = run.in_shards or item < of.FLOAT  # masters are not the compute weights
    return {"compute weights": item * compute,
            "masters": of.FLOAT * s.trained / run.shards if apart and not run.offload else 0,
            "moments": 0 if run.offload else 2 * of.FLOAT * s.trained / run.shards,
            "reference": reference if run.own_reference else 0}


def host_of(run):
    """{category: bytes} of a machine's host, when it holds most."""
    s, e = run.sizes, run.episodes
    processes, load = run.here * PROCESS, run.item * (s.largest / run.shards if run.in_shards else s.total)
    # images: in RL of what is played and decoded ahead, in SFT of this batch and the next one
    ahead = max(4, run.play.max_rows // e.size) * e.frames if run.play else 0
    frames = max(run.live_frames + ahead, 0 if run.in_rl else 2 * e.all_frames)
    stays, passing = {}, {"frames": run.here * 3 * run.env_config.max_pixels * frames}
    if run.offload:  # and the memory that two groups of gradients pass through
        stays["masters and moments"] = of.FLOAT * (3 * s.trained + 2 * max(s.layer, s.largest))
    if run.own_reference and "reference" in run.on_host:
        stays["reference"] = run.item * s.layers * s.layer
    if "features" in run.on_host:
        stays["features"] = run.here * e.all_frames * run.frame_bytes
    # the first process exports, a file at a time, with adapters copies of what is merged
    of_file = min(run.item * s.total, max(EXPORT_BYTES, run.item * s.vocabulary * s.hidden))
    if (exporting := run.item * s.adapted + of_file) > sum(passing.values()):
        passing = {"exporting": exporting}
    there = stays | passing
    if run.here * load > sum(there.values()):
        there = {"loading": run.here * load}
    return {"processes": processes} | there


def update_of(run):
    """{category: bytes} of the update beside what is held, at the moment of a pass, or of the optimizer's
    step, at which there is most."""
    s, item, shards, config = run.sizes, run.item, run.shards, run.config
    tokens, head = config.max_tokens_per_pass, item * s.vocabulary * s.hidden
    moments = of.pass_moments(s, tokens, item, config.gradient_checkpointing, run.entropy)
    at_head, at_layer, at_end = (moments[name] for name in ("head", "layer", "end"))
    if run.in_shards:
        root, layer = s.root, s.layer
        at_head["gathered weights"] = item * (root + layer)
        at_layer["gathered weights"] = item * (root + 2 * layer)
        at_layer["passing gradients"] = head + of.FLOAT * layer
        at_end["passing gradients"] = (item + of.FLOAT + of.FLOAT / shards) * root
        if run.processes > shards:  # what is summed over machines stays to the end of the backward pass
            summed = of.FLOAT * s.layers * layer / shards
            less = (s.layers - 1) * s.hidden * tokens * item
            moments["first layer"] = at_layer | {
                "activations": max(0, at_layer["activations"] - less),
                "passing gradients": at_layer["passing gradients"] + summed}
            at_end["passing gradients"] += summed - of.FLOAT * root / shards
        if run.own_reference:  # the policy's root, and the reference's with two layers
            forward = of.forward_activations(s, tokens, item)
            moments["reference"] = {"activations": at_head["activations"] + forward,
                                    "gathered weights": item * (2 * root + 2 * layer)}
    elif run.processes > 1:  # gradients are summed in buckets
        moments["step"] = {"passing gradients": max(64e6, of.FLOAT * s.largest)}
    features = 0 if "features" in run.on_host else run.episodes.all_frames * run.frame_bytes
    return {"gradients": of.FLOAT * s.trained / shards, "features": features,
            **max(moments.values(), key=lambda moment: sum(moment.values()))}


def rollout_of(run, there, gpu_bytes):
    """{category: bytes} of the rollout, with what is `there`. A cache that is to take what is left gets at
    least what one episode may need, and at most what --max_rows of them may."""
    s, e, item, play = run.sizes, run.episodes, run.item, run.play
    frames = e.all_frames if run.in_rl and "features" not in run.on_host else run.live_frames
    rollout = there | {"gathered weights": item * s.language if run.in_shards else 0,
                       "features": frames * run.frame_bytes,
                       "activations": of.rollout_activations(s, e.frame_tokens, item),
                       "logits": of.decode_logits(s, play.max_rows, item)}
    if play.cache_gb == "auto":
        row = longest(run) * of.cache_token(s, item)
        cache = of.auto_cache(s, item, gpu_bytes - sum(rollout.values()), row, play.max_rows)
    else:
        cache = play.cache_gb * 1e9
    rollout["activations"] += of.decode_activations(s, item) * cache
    return rollout | {"cache": cache}


def longest(run):
    """Tokens of the longest episode that may be."""
    return run.episodes.prompt + run.play.max_response_tokens


def rows_at_once(run, cache):
    """Episodes that play at one time, as the cache has room for them."""
    e, token = run.episodes, of.cache_token(run.sizes, run.item)
    prompts = -(-run.play.max_rows // e.size) * e.prompt * token
    return max(1, min(run.play.max_rows, e.groups * e.size, (cache - prompts) // (token * e.own)))


def notes_of(run, cache):
    """Lines on episodes as long as they may be."""
    s, config, notes = run.sizes, run.config, []
    if cache < (row := longest(run) * of.cache_token(s, run.item)):
        notes.append(f"the longest episode takes {row / 1e9:.1f} GB of cache, more than --cache_gb")
    if longest(run) > config.max_tokens_per_pass:
        moments = of.pass_moments(s, longest(run), run.item, config.gradient_checkpointing, run.entropy)
        activations = moments["layer"]["activations"] / 1e9
        notes.append(f"an episode of {longest(run):,} tokens, the longest that may be, runs in one pass all "
                     f"the same, whose activations are {activations:.1f} GB")
    return tuple(notes)


# ------------------------------------------------------------------------------------------------- the choice
def options_of(name, config, processes):
    """Settings for what the flags leave open, what costs least first. With several processes each has all
    weights, or they are in shards, of a machine (where there are several) or of all; with one, masters and
    moments go to the host. In each of them the reference (if offloaded) and frames' features may, too."""
    bases = [{}]
    if processes > 1 and config.shard is None and not config.lora_rank and config.dtype != "float32":
        shards = ["none", *(["node"] if processes > GPUS_A_MACHINE else []), "all"]
        bases = [{"shard": shard} for shard in shards]
    elif (processes == 1 and config.offload is None and not config.lora_rank
          and config.shard in (None, "none")):
        bases.append({"offload": True})
    for base in bases:
        yield base
        if name == "rl" and not config.on_host:
            offload = base.get("offload", config.offload)
            hosts = [["reference"], ["features"], ["features", "reference"]] if offload else [["features"]]
            yield from (base | {"on_host": names} for names in hosts)


def choose(name, config, model_config, env_config, processes, gpu_bytes, host_bytes):
    """Who holds the weights, where the flags leave it open: of what fits, what costs least.

    Returns (the changed config, a line that says what and why); where nothing fits, what takes least."""
    sizes = of.sizes_of(model_config, config.lora_rank, config.lora_targets)
    for changes in options_of(name, config, processes):
        chosen = replace(config, **changes)
        plan = make_plan(name, chosen, model_config, env_config, processes, gpu_bytes, host_bytes, sizes)
        if plan.fits:
            break
    shard, shards = shards_of(chosen, processes)
    what = f"weights in {shards} shards" if shard != "none" else "all weights on each GPU"
    on_host = ["masters", "moments"] * bool(chosen.offload) + [*getattr(chosen, "on_host", ())]
    if on_host:
        what += f", {' and '.join(on_host)} in host memory"
    gb = {time: f"{sum(part.values()) / 1e9:.0f}" for time, part in plan.on_gpu.items()}
    also = f", {gb['rollout']} at rollout" if "rollout" in gb else ""
    return chosen, (f"memory: {what}; {gb['update']} of {gpu_bytes / 1e9:.0f} GB a GPU at update{also} (plan)"
                    + f"; it may not fit: see {name}.py --plan" * (not plan.fits))


# ------------------------------------------------------------------------------------------- what would help
def remedies(name, config, model_config, env_config, processes, gpu_bytes, host_bytes):
    """Flags with which a run fits that does not: [(settings, {setting: what it costs})], of each kind what
    costs least: the same results, fewer questions a step, adapters, more GPUs."""
    sized = {rank: of.sizes_of(model_config, rank, config.lora_targets) for rank in {config.lora_rank, 16}}

    def plan_of(changes):
        changed = replace(config, **changes)
        return make_plan(name, changed, model_config, env_config, changes.get("gpus", processes), gpu_bytes,
                         host_bytes, sized[changed.lora_rank])

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
    first_of = lambda options: next((found for forced in options if (found := best(**forced))), None)
    same = best()
    kinds = [same, same is None and first_of({"batch_size": n} for n in fewer)]
    if not config.lora_rank:
        kinds.append(first_of([{"lora_rank": 16}, *({"lora_rank": 16, "batch_size": n} for n in fewer)]))
    more = first_of({"gpus": n} for n in (2, 4, 8, 16, 32, 64) if n > processes)
    kinds.append(more if not same or more and len(more) < len(same) else None)
    return [(changes, costs(changes, config, plan_of)) for changes in kinds if changes]


def changes_of(name, config, forced, processes):
    """Dicts of settings that change what fits and no result, each with those that are `forced`."""
    one, offload = forced.get("gpus", processes) == 1, config.offload
    on_host = set(getattr(config, "on_host", ()))
    trains_all = not (config.lora_rank or "lora_rank" in forced)
    choices = [[forced]]
    if name == "rl" and config.cache_gb != "auto":
        choices.append([{}, {"cache_gb": "auto"}])
    tokens = [n for n in (16_384, 8192, 4096) if n < config.max_tokens_per_pass]
    choices.append([{}, *({"max_tokens_per_pass": n} for n in tokens)])
    if not config.gradient_checkpointing:
        choices.append([{}, {"gradient_checkpointing": True}])
    if offload and not (one and trains_all):
        choices.append([{"offload": False} | ({"on_host": ["features"]} if "reference" in on_host else {})])
    elif one and trains_all and not offload:
        choices.append([{}, {"offload": True}])
    if not one and trains_all and config.shard == "none":
        choices.append([{"shard": "all"}])
    if name == "rl":
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
    without = lambda key: plan_of({k: v for k, v in changes.items() if k != key})
    passes = has("passes") - without("max_tokens_per_pass").seconds["update"]["passes"]
    cache = [plan.rollout.get("cache", 0) / 1e9 for plan in (after, without("cache_gb"))]
    copies = has("features") + has("reference")
    words = {"cache_gb": f"{cache[0]:.1f} GB of cache, not {cache[1]:.1f}: if less, fewer episodes at a time",
             "on_host": f"{copies:.0f} s a step for copies, beyond those beside passes",
             "max_tokens_per_pass": f"prompts are computed again for each pass: {passes:.0f} s a step",
             "gradient_checkpointing": "each layer is computed twice",
             "offload": f"the CPU steps: {has('optimizer'):.0f} s a step" if changes.get("offload") else
                        "not with adapters, nor with several processes",
             "shard": f"weights are gathered for each pass: {has('gathering'):.0f} s a step beyond passes",
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
def read_settings(name_or_path, config):
    """A model's configuration and settings of the environment, of a folder with config.json or a name on the
    hub, with the --protocol of `config`. Raises PolicyError and UserError."""
    path = Path(name_or_path)
    with loading(name_or_path):
        if path.exists() or str(name_or_path).startswith((".", "/", "~", "runs/")):
            if not (path / "config.json").is_file():
                raise UserError("a plan needs a folder with a config.json, or a name on the hub")
            file = path / "config.json"
            if fault := object_fault(file) or config_fault(json.loads(read_text(file))):
                raise UserError(fault)
        model_config = AutoConfig.from_pretrained(name_or_path)
        if fault := config_fault(model_config.to_dict()):
            raise UserError(fault)
    return model_config, run_environment(name_or_path, config)


def plan_main(name, config, model=None):
    """Prints what a run would choose, and the plan of the flags as they are given, and exits, with status 0 if
    that fits, else 1. `model`: without --model. Raises UserError."""
    there = config.gpu_gb * 1e9 if config.gpu_gb else gpu_here()
    host = config.host_gb * 1e9 if config.host_gb else host_here()
    given = name, config, *read_settings(config.model or model, config), config.gpus, there, host
    plan = make_plan(*given)
    print(f"a run chooses, where flags leave it open: {choose(*given)[1]}\n{plan.text()}")
    if not plan.fits:
        found = remedies(*given)
        print("It would fit with" if found else "No flags are known with which it would fit.")
        for changes, words in found:
            print(f"  {as_flags(changes)}")
            for flag, cost in words.items():
                print(f"      --{flag}: {cost}")
    sys.exit(0 if plan.fits else 1)
