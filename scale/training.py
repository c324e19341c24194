"""What both scripts that train do beside training: begin or go on, save, stop, and say how it goes.

    run = TrainingRun("rl", config, inputs, rank, world, device)    before anything is loaded; may be finished
    progress = run.start(weights, optimizer, total_steps, {"step": 0, ...})
    for step in range(progress["step"] + 1, total_steps + 1):
        run.interruptible(function, otherwise)(...)        what SIGTERM ends at once, as nothing has moved yet
        run.total(values, device)               a sum over all processes; if one was told to stop, all do
        run.end_step(metrics, {"step": step, ...})
    run.finish(skipped)

A checkpoint is of the time between two steps: the weights, the optimizer, `progress` and the random states as
they were then. It is saved after every `save_every` steps, and at a SIGTERM as long as the weights have not
moved since.
"""

import base64
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from common import RunConfig, UserError, choose_dtype, sum_over_processes, write_jsonl
from scale import runs
from scale.checkpoints import SavedRun, Shard, run_folders, save_run, sync
from scale.held_out import held_out
from scale.lora import TARGETS
from scale.memory import auto_cache_of_run, plan_run
from scale.metrics import FILES, Metrics, check_installed
from scale.plan import check_places
from scale.sharding import SHARDS
from scale.stopping import Stopping
from sources.protocols import check_protocol

# Settings that may differ when a run goes on, beside those of runs.py: how often is saved and shown, what
# bounds memory alone. Of the model the content counts (see `inputs`).
TRAINING_MAY_DIFFER = (
    "model", "val", "val_every", "save_every", "keep", "grace_s", "show_every", "tensorboard", "wandb",
    "shard", "offload", "on_host", "max_tokens_per_pass", "gradient_checkpointing", "plan", "gpus", "gpu_gb",
    "host_gb")
NAMES = rf"{FILES}|skipped\.jsonl|checkpoints"  # what a run writes, besides the exported checkpoint


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of both scripts that train."""

    beta1: float = 0.9  # of AdamW's first moment
    beta2: float = 0.95  # of AdamW's second moment
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    max_bad_steps: int = 5  # the run ends after so many optimizer steps in a row whose gradient is not finite
    max_tokens_per_pass: int = 32_768  # tokens in a forward and backward pass: bounds memory, nothing else
    gradient_checkpointing: bool = True  # recompute each layer in the backward pass: less memory, more time
    shard: str | None = None  # none, all, node: who shares a copy of the weights; else as the plan says
    offload: bool | None = None  # one process: masters and AdamW's moments on the host; else as the plan says
    lora_rank: int = 0  # train adapters of this rank beside frozen weights (scale/lora.py); 0: all weights
    lora_alpha: float = 32.0  # an adapter counts lora_alpha / lora_rank times
    lora_targets: list[str] = TARGETS  # names of the layers that get one
    resume: str = "auto"  # auto: an unfinished run in --out goes on; never: it is moved aside
    save_every: int = 10  # steps between checkpoints
    keep: int = 2  # so many checkpoints to go on from stay in --out/checkpoints
    grace_s: float = 20.0  # seconds from SIGTERM to the end, to save in; torchrun kills after 30
    val: str | None = None  # questions that are played now and then, at temperature 0
    val_every: int = 10  # steps between that
    tensorboard: bool = False  # write the metrics for TensorBoard, too (--out/tensorboard)
    wandb: str | None = None  # ... and to this project in Weights & Biases
    plan: bool = False  # only say what memory this run needs, and whether it is there (scale/plan.py)
    gpus: int = 1  # ... on so many GPUs
    gpu_gb: float | None = None  # ... with so much memory each, 1e9 bytes; by default what this machine has
    host_gb: float | None = None  # ... in machines with so much memory; by default what this one has


AT_LEAST_ONE = ("max_tokens_per_pass", "max_bad_steps", "save_every", "keep", "val_every", "gpus")


class TrainingRun:
    """One run in the folder `config.out`. `finished` says whether there is nothing left to do, `config` the
    settings with what was left to the memory plan.

    Args:
        name: of the script. config: a TrainConfig.
        inputs: {what: path or None}, see `runs.begin_run`.
    Raises UserError."""

    def __init__(self, name, config, inputs, rank, world, device):
        for flag, known in (("resume", ("auto", "never")), ("shard", (None, *SHARDS))):
            if getattr(config, flag) not in known:
                names = ", ".join(name for name in known if name)
                raise UserError(f"--{flag} must be one of {names}, not {getattr(config, flag)}")
        check_places(config, world)
        check_protocol(config, inputs.get("model"))
        self.config, choice = plan_run(name, config, inputs.get("model"), world, device)
        resolved = replace(config, dtype=str(choose_dtype(config.dtype, device)).removeprefix("torch."))
        self.name, self.out = name, Path(config.out)
        self.rank, self.world, self.device = rank, world, device
        check_installed(config.tensorboard, config.wandb)
        by_file = (config.overview or "").endswith(".json")
        inputs = inputs | {"system prompt": config.system_prompt,
                           "overview": config.overview if by_file else None,
                           "protocol": config.protocol if (config.protocol or "").endswith(".json") else None}
        box = [None, None]  # new, unfinished or finished; the checkpoint to go on from
        if rank == 0:
            box[0] = runs.begin_run(runs.open_folder(self.out), resolved, TRAINING_MAY_DIFFER, inputs, NAMES)
            if box[0] == "unfinished" and (folders := run_folders(self.out)):
                box[1] = str(folders[-1])
        if dist.is_initialized():
            dist.broadcast_object_list(box, 0, device=device)
        self.finished, self.stopping = box[0] == "finished", Stopping(config.grace_s, self._lost)
        if self.finished and rank == 0:
            print(f"{name}: the run in {self.out} is finished; --resume never makes it again")
        if choice and not self.finished and rank == 0:
            print(f"{name}: {choice}", flush=True)
        self.before = SavedRun(box[1]) if box[1] else None
        self.saved_step, self.moved = 0, False  # moved: the weights are no longer those of `progress`
        self.idle_s, self.last_save_s, self.seconds_save = 0.0, 0.0, 0.0

    def start(self, weights, optimizer, total_steps, progress, generator=None, val=None):
        """Makes weights, optimizer and random generators what they were, if the run goes on.

        Args:
            progress: a dict for JSON with "step": what the run has done so far.
            generator: of the sampling.
            val: (question rows, root folder, RolloutConfig) of held-out questions, or None.
        Returns the progress that was saved, else the one that is given."""
        self.weights, self.optimizer, self.val, self.total_steps = weights, optimizer, val, total_steps
        self.generators = [torch.default_generator, *([generator] if generator else [])]
        self.progress = self.before.state if self.before else progress
        weights.adopt(optimizer)
        self.fixed = {}  # what a run that goes on must not find anew
        if getattr(self.config, "cache_gb", None) == "auto":
            size = self.progress.get("cache_gb") or auto_cache_of_run(weights, self.config)
            self.fixed = {"cache_gb": size}
            self.config = replace(self.config, cache_gb=size)
            self.val = val and (*val[:2], replace(val[2], cache_gb=size))
        if "features" in getattr(self.config, "on_host", ()):
            weights.player.features_device = torch.device("cpu")
        if self.before:
            self._read(self.before)
        done = self.saved_step = self.progress["step"]
        if self.rank == 0:
            Metrics.cut(self.out, done)
            if self.before:
                print(f"{self.name}: goes on after step {done}")
            if self.fixed:
                print(f"{self.name}: --cache_gb auto is {self.fixed['cache_gb']}")
        self.metrics = Metrics(self.out, total_steps, self.name, self.config.tensorboard, self.config.wandb,
                               done, self.rank)
        self.rank_state, self.bad_steps = self._random_states(), weights.bad_steps
        self.before = None  # its files are closed
        optimizer.register_step_post_hook(self._has_moved)
        self.stopping.armed = True
        return self.progress

    def _has_moved(self, *_):
        self.moved = True

    def interruptible(self, function, otherwise):
        """The function, but that SIGTERM ends it at once; then `otherwise` is what it returns."""
        def call(*args, **how):
            returned = self.stopping.interruptibly(function, *args, **how)
            return otherwise if returned is None else returned
        return call

    def total(self, values, device):
        """`sum_over_processes`. If one of them was told to stop, all save the start of the step, unless the
        weights have moved since or there is no time, and end."""
        began, too_long = time.monotonic(), self.last_save_s > self.config.grace_s / 2
        total = sum_over_processes(values | {"stop": self.stopping.requested, "too long": too_long}, device)
        self.idle_s += time.monotonic() - began
        too_long = total.pop("too long")
        if total.pop("stop"):
            if self.saved_step != self.progress["step"] and not self.moved and not too_long:
                self._save(export=False)
            self.stopping.leave(self._lost())
        return total

    def _lost(self):
        lost = self.progress["step"] - self.saved_step
        return (f"stopped; the same command goes on after step {self.saved_step}"
                + f", {lost} finished step{'s are' if lost > 1 else ' is'} lost" * (lost > 0))

    def end_step(self, metrics, progress):
        """Writes a step's metrics, plays the held-out questions and saves where it is time to."""
        step, last = progress["step"], progress["step"] == self.total_steps
        gathered = self.weights.gather_metrics()
        if self.val and (step % self.config.val_every == 0 or last):
            with self.weights.gathered():
                metrics |= held_out(self.weights.player, *self.val, self.rank, self.world, self.device)
        idle_s = sum_over_processes({"idle": self.idle_s}, self.device)["idle"] / self.world
        self.weights.gather_metrics()  # of the held-out questions: not in the metrics
        self.metrics.write(metrics | gathered | {"seconds_idle": idle_s, "seconds_save": self.seconds_save})
        self.progress, self.bad_steps = progress | self.fixed, self.weights.bad_steps
        self.rank_state = self._random_states()
        self.moved, self.idle_s, self.seconds_save = False, 0.0, 0.0
        if step % self.config.save_every == 0 or last:
            self._save()

    def finish(self, skipped):
        """The run is over: its checkpoint is in the folder."""
        self.metrics.close()
        self.stopping.armed = False
        if self.rank == 0:
            write_jsonl(self.out / "skipped.jsonl", [{"row": w, "reason": r} for w, r in skipped])
            runs.finish_run(self.out)
            print(f"{self.name}: wrote {self.out}")

    # ------------------------------------------------------------------------------------------ state on disk
    def _save(self, export=True):
        """The policy as others load it, and a checkpoint to go on from."""
        began = time.time()
        if export:
            self.weights.save(self.out)
        if self.rank == 0 and (self.out / "metrics.jsonl").exists():
            sync(self.out / "metrics.jsonl")  # its lines go with the checkpoint
        state = {"bad_steps": self.bad_steps, "optimizer_steps": self._steps_taken()}
        self.last_save_s = save_run(self.out, self.progress["step"], self._shards(), self.progress | state,
                                    self.rank_state, self.config.keep)
        self.saved_step = self.progress["step"]
        self.seconds_save = time.time() - began

    def _steps_taken(self):
        return max([int(state["step"]) for state in self.optimizer.state.values()], default=0)

    def _shards(self):
        """The rows of masters and moments that this process writes."""
        for name, master in self.weights.masters.items():
            for what, tensor in {"": master, **self.optimizer.state.get(master, {})}.items():
                if what != "step":
                    rows, first = self.weights.rows_to_save(tensor)
                    yield Shard(f"{name} {what}".strip(), rows, first, tuple(tensor.shape))

    @torch.no_grad()
    def _read(self, saved):
        """Masters and moments of a checkpoint, and random states."""
        state = saved.state
        steps = state["optimizer_steps"]
        for name, master in self.weights.masters.items():
            there = self.optimizer.state.get(master, {})  # adopted
            moments = {what: there[what] if there else torch.zeros_like(master)
                       for what in ("exp_avg", "exp_avg_sq") if steps}
            for what, tensor in {"": master, **moments}.items():
                rows, first = self.weights.rows_to_load(tensor)
                saved.read_into(f"{name} {what}".strip(), rows, first, tensor.shape)
            if steps:
                count = torch.tensor(float(steps), dtype=torch.float32, device=master.device)
                self.optimizer.state[master] = {"step": count} | moments
        self.weights.cast()
        self.weights.bad_steps = state["bad_steps"]
        if len(saved.rank_states) == self.world:
            texts = saved.rank_states[self.rank]["random"]
            states = [torch.tensor([*base64.b64decode(text)], dtype=torch.uint8) for text in texts]
            # another device's are of another length
            if [len(x) for x in states] == [len(g.get_state()) for g in self.generators]:
                for generator, random_state in zip(self.generators, states):
                    generator.set_state(random_state)
                return
        for number, generator in enumerate(self.generators):
            seeds = self.config.seed, state["step"], self.rank, self.world, number
            generator.manual_seed(hash(seeds) % 2 ** 63)
        if self.rank == 0:
            print(f"{self.name}: {len(saved.rank_states)} processes before, {self.world} now, or another "
                  "device: random numbers are drawn from new seeds")

    def _random_states(self):
        return {"random": [base64.b64encode(bytes(g.get_state().numpy())).decode() for g in self.generators]}
