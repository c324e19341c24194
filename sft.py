"""Stage 1, cold start: supervised fine-tuning on trajectories (paper, section 3.2).

    loss = - 1/N * sum over trained tokens t of log pi(token_t | everything before t)

A trained token is one that the assistant produced in a turn that its row marks with `learn`. N counts them
over the whole batch on all processes, so the loss does not depend on how the batch is split. What the policy
saw is replayed from the video by the environment, through the same encoder as in RL.

    python sft.py                                           the tiny base on synthetic data, minutes on a CPU
    torchrun --standalone --nproc_per_node=8 sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data my_sft.jsonl

Writes to --out: the checkpoint (Hugging Face format), metrics.jsonl, skipped.jsonl, and checkpoints/, from
which the same command goes on when it was stopped.

From the paper: 1 epoch, batch 64, cosine schedule with warm-up 0.1, vision encoder and projector frozen,
bf16, context 32,768. The learning rate is the text's 5e-6 (its table says 5e-5). Departures: master weights
stay in float32; AdamW has betas 0.9 / 0.95 and no weight decay; trajectories that are longer than the
context are skipped and named, not cut.
"""

import math
import random
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from common import UserError, check_bad, gather, run_main, start_processes, sum_over_processes
from demo.synthetic import ensure_demo
from demo.tiny_base import TINY_BASE
from model import fill_features, replay, split_by_tokens, token_log_probs
from rollout import RolloutConfig
from scale.pick import check_flags, load_weights, show_plan
from sources.read import read_questions, read_trajectories
from sources.released_data import encode_stored
from training.environment import run_environment, with_chosen_frames, with_num_frames
from training.held_out import check_held_out
from training.memory import out_of_memory
from training.prefetch import in_threads, prefetch
from training.run import TrainConfig, TrainingRun, make_optimizer, parse_training_flags
from video import VideoError


@dataclass(frozen=True)
class Config(TrainConfig):
    model: str = TINY_BASE  # checkpoint folder or hub name
    data: str = "runs/data/sft.jsonl"  # trajectories; made, if missing, in the demo
    kinds: list[str] | None = None  # only trajectories of these kinds (exemplar, reflection); else all
    out: str = "runs/sft"  # folder for the checkpoint and the metrics
    epochs: int = 1  # passes over the trajectories
    batch_size: int = 64  # trajectories an optimizer step, over all processes
    lr: float = 5e-6  # peak learning rate of AdamW
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then cosine to 0
    max_length: int = 32_768  # longer trajectories are skipped
    save_every: int = 50  # steps between checkpoints


PRESETS = {"paper": {},
           "demo": dict(epochs=2, lr=5e-4, batch_size=8, max_tokens_per_pass=8192, gradient_checkpointing=False)}


def learning_rate(step, steps, config):
    """Linear warm-up, then half a cosine to 0."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------------ data
def filter_kinds(rows, kinds):
    """The trajectories of these kinds. Raises UserError where there are none of one."""
    if kinds is None:
        return rows
    for kind in kinds:
        there = {str(row.get("kind")) for row in rows}
        if kind not in there:
            known = ", ".join(sorted(there))
            raise UserError(f"--kinds {kind}: there is no such trajectory; kinds are {known}")
    return [row for row in rows if row.get("kind") in kinds]


def load_dialogues(policy, rows, root, max_length):
    """Dialogues of trajectory rows, and [(id, reason)] of those that cannot be replayed."""
    def load(row):
        try:
            dialogue = encode_stored(policy, row, root) if "messages" in row else replay(policy, row, root)[0]
        except (VideoError, ValueError) as error:
            return row["question"]["id"], str(error)
        if len(dialogue.ids) > max_length:
            return row["question"]["id"], f"{len(dialogue.ids)} tokens, above --max_length {max_length}"
        return dialogue

    loaded = in_threads(load, rows)  # videos decode side by side
    return [d for d in loaded if not isinstance(d, tuple)], [d for d in loaded if isinstance(d, tuple)]


def batches(num_rows, config, rank, world):
    """(epoch, numbers of this process's rows) of each batch of a run."""
    for epoch in range(config.epochs):
        order = list(range(num_rows))
        random.Random(config.seed + epoch).shuffle(order)
        for start in range(0, num_rows, config.batch_size):
            yield epoch, order[start:start + config.batch_size][rank::world]


# -------------------------------------------------------------------------------------------------- training
def train_step(weights, dialogues, ids, optimizer, config, device):
    """One optimizer step on this process's share of a batch, of questions `ids`. Returns metrics over all."""
    # the loss's denominator: the trained tokens of the batch, over all processes
    num_trained = sum(sum(d.trained) for d in dialogues)
    counts = sum_over_processes({"tokens": num_trained, "length": sum(len(d.ids) for d in dialogues)}, device)
    fill_features(weights.policy, dialogues)
    # loss and gradient, pass after pass
    loss_sum = 0.0
    for batch in weights.passes(split_by_tokens([[d] for d in dialogues], config.max_tokens_per_pass)):
        log_probs, _ = token_log_probs(weights.policy, batch)
        loss = -log_probs.sum() / max(1, counts["tokens"])
        loss.backward()
        loss_sum += loss.item()
    metrics = sum_over_processes({"loss": loss_sum}, device) | counts | {"grad_norm": 0.0, "bad_steps": 0}
    if counts["tokens"]:
        norm = weights.step(optimizer, config.max_grad_norm, ids)
        metrics |= {"grad_norm": norm} if math.isfinite(norm) else {"bad_steps": 1}
    return metrics


def train(weights, rows, config, run, rank, world, device, val):
    optimizer = make_optimizer(weights, config)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    progress = run.start(weights, optimizer, steps, {"step": 0, "skipped": []}, val=val)
    skipped, began = progress["skipped"], time.time()

    def load(batch):
        """This process's share of a batch, replayed while the batch before is trained."""
        _, mine = batch
        mine = [rows[i] for i in mine]
        return load_dialogues(weights.policy, mine, Path(config.data).parent, config.max_length)

    left = islice(batches(len(rows), config, rank, world), progress["step"], None)
    loaded_batches = enumerate(prefetch(load, left), progress["step"] + 1)
    for step, ((epoch, mine), (dialogues, bad), waited_s) in loaded_batches:
        lr = learning_rate(step - 1, steps, config)
        optimizer.param_groups[0]["lr"] = lr
        ids = [rows[i]["question"]["id"] for i in mine]
        metrics = train_step(weights, dialogues, ids, optimizer, config, device)
        skipped = skipped + gather(bad)
        check_bad(skipped, len(rows) * config.epochs, config.max_bad, config.data)
        metrics = {"step": step, "epoch": epoch, **metrics, "lr": lr, "skipped": len(skipped),
                   "seconds_data": waited_s, "seconds": time.time() - began}
        if step % max(1, steps // 10) == 0 or step == steps:
            run.metrics.print(f"step {step}/{steps}  loss {metrics['loss']:.4f}  trained tokens "
                              f"{metrics['tokens']:.0f} of {metrics['length']:.0f}  lr {lr:.1e}  grad norm "
                              f"{metrics['grad_norm']:.2f}  {metrics['seconds']:.1f} s")
        run.end_step(metrics, {"step": step, "skipped": skipped})
        began = time.time()
    return skipped


def main():
    config = parse_training_flags(Config, __doc__, PRESETS, ("epochs", "batch_size", "max_length"))
    if config.plan:
        show_plan("sft", config)
    rank, world, device = start_processes(config.device)
    # all that can be wrong, before a model loads
    check_flags(config, world)
    if config.preset == "demo" and config.data == Config.data and rank == 0:
        ensure_demo(Path(config.data).parent, config.seed)
    gather([])  # the others wait until the data is there
    rows, bad = read_trajectories(config.data, config.max_bad)
    rows = filter_kinds(rows, config.kinds)
    chosen, without = with_chosen_frames([row["question"] for row in rows], config)
    rows = [rows[number] | {"question": question} for number, question in chosen.items()]
    env_config = run_environment(config.model, config)
    val = None
    if config.val:
        val_config = RolloutConfig(max_turn_tokens=env_config.max_turn_tokens)
        val_rows = check_held_out(*read_questions(config.val, config.max_bad), config.val, env_config)
        val_rows = with_num_frames(val_rows, config)
        val = val_rows, Path(config.val).parent, val_config
    inputs = {"model": config.model, "trajectories": config.data}
    run = TrainingRun("sft", config, inputs, rank, world, device)
    if run.finished:
        return
    # the policy
    torch.manual_seed(config.seed)
    weights = load_weights(config.model, config, env_config, device)
    weights.policy.train()
    if rank == 0:
        print(f"sft: {len(rows)} trajectories from {config.data}, model {config.model}, "
              f"{weights.describe()}, {world} process(es) on {device}")
    run.finish(bad + without + train(weights, rows, config, run, rank, world, device, val))


if __name__ == "__main__":
    run_main(main, out_of_memory)
