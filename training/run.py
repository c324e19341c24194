"""What both scripts that train do beside training: begin or go on, save, and report how it goes.

    run = TrainingRun("rl", config, inputs, rank, world, device)    before anything is loaded; may be finished
    progress = run.start(weights, optimizer, total_steps, {"step": 0, ...})
    for step in range(progress["step"] + 1, total_steps + 1):
        ...                                     rollouts, optimizer steps: what the method does
        run.end_step(metrics, {"step": step, ...})
    run.finish(skipped)

A checkpoint is of the end of a step: the weights, the optimizer, `progress` and the random states as they
were then. It is saved after every `save_every` steps.

At SIGTERM or Ctrl-C a thread (stopping.py) saves the end of the last step, in a rollout of minutes,
too; the loop knows nothing of it. It can do so while the weights are at rest: from the end of a step to the
first optimizer step of the next one. From there on the main thread holds the lock `at_rest`, until the
held-out questions are played and the step is saved, and the thread waits for it as long as there is time.
All processes must get the signal, as torchrun sends it: they agree on the step that is saved.
"""

import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from common import (WAITED, RunConfig, UserError, choose_dtype, first_line, gather, on_own_stream,
                    parse_flags, sum_over_processes, write_jsonl)
from stopping import ENDING
from training import run_folder
from training.environment import load_env_config
from training.held_out import held_out
from training.metrics import FILES, Metrics, check_installed
from training.run_checkpoints import SavedRun, Shard, run_folders, save_run
from training.safe_files import sync

# Settings that may differ when a run goes on, beside those of run_folder.py: how often is saved and shown,
# what bounds memory alone. Of the model the content counts (see `inputs`).
TRAINING_MAY_DIFFER = (
    "model", "val", "val_every", "save_every", "keep", "tensorboard", "wandb", "shard", "offload",
    "max_tokens_per_pass", "gradient_checkpointing", "plan")
NAMES = rf"{FILES}|skipped\.jsonl|checkpoints"  # what a run writes, besides the exported checkpoint


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of both scripts that train."""

    preset: str | None = None  # paper or demo: what holds where no flag says; else as the checkpoint names it
    beta2: float = 0.95  # of AdamW's second moment
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    max_tokens_per_pass: int = 32_768  # tokens in a forward and backward pass: bounds memory, nothing else
    gradient_checkpointing: bool = True  # recompute each layer in the backward pass: less memory, more time
    shard: str | None = None  # none, all, node: processes that share the weights; else as scale/pick.py says
    offload: list[str] = ()  # what is on the host: optimizer (one process), in RL reference, features, too
    lora_rank: int = 0  # train adapters of this rank beside frozen weights (scale/lora.py); 0: all weights
    resume: str = "auto"  # auto: an unfinished run in --out goes on; never: it is moved aside
    save_every: int = 10  # steps between checkpoints
    keep: int = 2  # the newest checkpoints that stay in --out/checkpoints, to go on from
    val: str | None = None  # held-out questions that are played every val_every steps, at temperature 0
    val_every: int = 10  # steps between plays of --val
    tensorboard: bool = False  # write the metrics for TensorBoard, too (--out/tensorboard)
    wandb: str | None = None  # ... and to this project in Weights & Biases
    plan: str | None = None  # only say what memory this run needs on so many GPUs of so many GB, as 8x80


AT_LEAST_ONE = ("max_tokens_per_pass", "save_every", "keep", "val_every")


def parse_training_flags(config_class, description, presets, at_least_one):
    """Settings from the command line, over those of a preset: of --preset, else of the one that the model's
    settings name (a checkpoint that descends from the demo's base says demo). presets: {name: settings}."""
    def settings_of(given):
        model = given.get("model", config_class.model)
        name = given.get("preset") or load_env_config(model).preset
        if name not in presets:
            raise UserError(f"--preset must be {' or '.join(presets)}, not {name}")
        if os.environ.get("RANK", "0") == "0":
            why = "--preset" if "preset" in given else f"as {model} says"
            print(f"{Path(sys.argv[0]).name}: default settings of the preset {name} ({why})", flush=True)
        return {"preset": name} | presets[name]

    return parse_flags(config_class, description, (*at_least_one, *AT_LEAST_ONE), settings_of)


def make_optimizer(weights, config):
    """AdamW over the trained weights, as both stages use it."""
    return torch.optim.AdamW(weights.parameters, lr=config.lr, betas=(0.9, config.beta2),
                             weight_decay=config.weight_decay, fused=True)


class TrainingRun:
    """One run in the folder `config.out`. `finished` says whether there is nothing left to do.

    Args:
        name: of the script. config: a TrainConfig.
        inputs: {what: path or None}, see `run_folder.begin_run`.
    Raises UserError."""

    def __init__(self, name, config, inputs, rank, world, device):
        if config.resume not in ("auto", "never"):
            raise UserError(f"--resume must be one of auto, never, not {config.resume}")
        check_installed(config.tensorboard, config.wandb)
        self.config, self.name, self.out = config, name, Path(config.out)
        self.rank, self.world, self.device = rank, world, device
        self.progress = None  # until `start`
        self.saved_step, self.seconds_save = 0, 0.0
        # held while the weights move by the main thread, which is then `moving`, else by one that saves
        self.at_rest, self.moving = threading.Lock(), False
        # groups in which processes save, and agree on it at a signal: main threads may be in the default one
        self.saving = run_folder.own_group(timedelta(minutes=30))
        self.agreeing = run_folder.own_group(timedelta(minutes=30))
        ENDING.save, ENDING.lost = self._save_at_a_signal, self._stopped
        # a new run, an unfinished one, or a finished one; and the checkpoint to go on from
        state, folder = None, None
        if rank == 0:
            dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
            state = run_folder.begin_run(self.out, replace(config, dtype=dtype),
                                         TRAINING_MAY_DIFFER, inputs | run_folder.files_of(config), NAMES)
            folders = run_folders(self.out) if state == "unfinished" else []
            folder = str(folders[-1]) if folders else None
        state, folder = gather([(state, folder)])[0]
        self.finished = state == "finished"
        if self.finished and rank == 0:
            print(f"{name}: the run in {self.out} is finished; --resume never makes it again")
        self.before = SavedRun(folder) if folder else None

    def once(self, name, find):
        """A value that a run that goes on must not find anew: what `find` returned when the run began."""
        value = find()
        if self.rank == 0:
            value = run_folder.note(self.out).get(name, value)
            run_folder.note(self.out, **{name: value})
        return gather([value])[0]

    def start(self, weights, optimizer, total_steps, progress, generator=None, val=None):
        """Makes weights, optimizer and random generators what they were, if the run goes on.

        Args:
            progress: a dict for JSON with "step": what the run has done so far.
            generator: of the sampling.
            val: (question rows, root folder, RolloutConfig) of held-out questions, or None.
        Returns the progress that was saved, else the one that is given."""
        self.weights, self.optimizer, self.val, self.total_steps = weights, optimizer, val, total_steps
        self.generators = [torch.default_generator]
        if generator is not None:
            self.generators.append(generator)
        weights.adopt(optimizer)
        if "features" in self.config.offload:
            for policy in (weights.policy, weights.player):
                policy.features_device = torch.device("cpu")
        done = progress
        if self.before:
            self._read(self.before)
            done = self.before.state
        if self.rank == 0:
            Metrics.cut(self.out, done["step"])
            if self.before:
                print(f"{self.name}: goes on after step {done['step']}")
        self.metrics = Metrics(self.out, total_steps, self.name, self.config.tensorboard, self.config.wandb,
                               done["step"], self.rank)
        self.before = None  # its files are closed
        self.saved_step = done["step"]
        self._remember(done)
        optimizer.register_step_pre_hook(lambda *_: self._weights_move())
        return done

    def end_step(self, metrics, progress):
        """Writes a step's metrics, plays the held-out questions and saves where it is time to."""
        step, last = progress["step"], progress["step"] == self.total_steps
        gathered = self.weights.gather_metrics()
        if self.val and (step % self.config.val_every == 0 or last):
            with self.weights.gathered():
                metrics |= held_out(self.weights.player, *self.val, self.rank, self.world, self.device)
        self.weights.gather_metrics()  # of the held-out questions: not in the metrics
        waited_s = sum_over_processes({"waited": WAITED.take_s()}, self.device)["waited"] / self.world
        self.metrics.write(metrics | gathered | {"seconds_idle": waited_s, "seconds_save": self.seconds_save})
        self.seconds_save = 0.0
        self._weights_move()  # where no optimizer step was made
        self._remember(progress)
        if step % self.config.save_every == 0 or last:
            began = time.time()
            self.weights.save(self.out)
            self._save()
            self.seconds_save = time.time() - began
        self._weights_rest()

    def finish(self, skipped):
        """The run is over: its checkpoint is in the folder."""
        self.metrics.close()
        if self.rank == 0:
            write_jsonl(self.out / "skipped.jsonl", [{"row": w, "reason": r} for w, r in skipped])
            run_folder.finish_run(self.out)
            print(f"{self.name}: wrote {self.out}")

    # ----------------------------------------------------------------------------------- the end of a step
    def _remember(self, progress):
        """What a checkpoint says of the end of a step."""
        self.progress, self.rank_state = progress, self._random_states()
        steps_taken = max([int(state["step"]) for state in self.optimizer.state.values()], default=0)
        self.state = progress | {"bad_steps": self.weights.bad_steps, "optimizer_steps": steps_taken}

    def _weights_move(self):
        """From here on the weights are no longer those of `progress`."""
        if not self.moving:
            self.at_rest.acquire()
            self.moving = True

    def _weights_rest(self):
        """They are those of `progress` again."""
        self.moving = False
        self.at_rest.release()

    def _save(self):
        """A checkpoint to go on from. All processes call it."""
        if self.rank == 0:
            sync(self.out / "metrics.jsonl")  # its lines go with the checkpoint
        step = self.progress["step"]
        save_run(self.out, step, self._shards(), self.state, self.rank_state, self.config.keep, self.saving)
        self.saved_step = step

    def _save_at_a_signal(self):
        """At a signal, in a thread: saves the end of the last step, once all processes are at rest after the
        same one. Returns what to say."""
        if self.progress is None:
            return self._stopped()
        try:
            while True:
                resting = self.at_rest.acquire(timeout=0.5)
                step = self.progress["step"] if resting else None
                steps = gather([step], self.agreeing)
                if resting and steps == [step] * self.world:
                    break
                if resting:
                    self.at_rest.release()
                    time.sleep(0.1)  # the main thread takes it: another one may wait for its optimizer step
            if step != self.saved_step:
                with on_own_stream(self.device):
                    self._save()
        except Exception as error:  # another process has left, or the disk is full
            return f"{self._stopped()} ({first_line(error)})"
        return self._stopped()

    def _stopped(self):
        if self.progress is None:
            return "stopped; nothing is lost"
        said = f"stopped; the same command goes on after step {self.saved_step}"
        lost = self.progress["step"] - self.saved_step
        return f"{said}, finished steps lost: {lost}" if lost else said

    # ---------------------------------------------------------------------------------------- state on disk
    def _tensors(self):
        """{name: tensor} of the master weights and of the optimizer's moments."""
        tensors = dict(self.weights.master_weights)
        for name, master in self.weights.master_weights.items():
            for what, moment in self.optimizer.state.get(master, {}).items():
                if what != "step":
                    tensors[f"{name} {what}"] = moment
        return tensors

    def _shards(self):
        """The rows of `_tensors` that this process writes."""
        for name, tensor in self._tensors().items():
            rows, first = self.weights.rows_to_save(tensor)
            yield Shard(name, rows, first, tuple(tensor.shape))

    @torch.no_grad()
    def _read(self, saved):
        """Master weights and moments of a checkpoint, and random states."""
        steps = saved.state["optimizer_steps"]
        for master in self.weights.parameters if steps else ():
            state = self.optimizer.state[master]
            for what in ("exp_avg", "exp_avg_sq"):
                if what not in state:
                    state[what] = torch.zeros_like(master)
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=master.device)
        for name, tensor in self._tensors().items():
            rows, first = self.weights.rows_to_load(tensor)
            saved.read_into(name, rows, first, tensor.shape)
        self.weights.cast()
        self.weights.bad_steps = saved.state["bad_steps"]
        # random states are of a process and a device; with others there are new seeds
        lengths = [len(generator.get_state()) for generator in self.generators]
        states = saved.rank_states[self.rank]["random"] if len(saved.rank_states) == self.world else []
        if [len(numbers) for numbers in states] == lengths:
            for generator, numbers in zip(self.generators, states):
                generator.set_state(torch.tensor(numbers, dtype=torch.uint8))
            return
        for number, generator in enumerate(self.generators):
            seeds = self.config.seed, saved.step, self.rank, self.world, number
            generator.manual_seed(hash(seeds) % 2 ** 63)
        if self.rank == 0:
            print(f"{self.name}: {len(saved.rank_states)} processes before, {self.world} now, or another "
                  "device: random numbers are drawn from new seeds")

    def _random_states(self):
        return {"random": [generator.get_state().tolist() for generator in self.generators]}
