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

from common import check_bad, gather, parse_flags, run_main, start_processes, sum_over_processes
from data_prep import read_questions, read_trajectories
from demo.synthetic import ensure_demo
from demo.tiny_base import TINY_BASE
from model import fill_features, replay, split_by_tokens, token_log_probs
from rollout import RolloutConfig
from scale.ahead import batches_ahead, in_threads
from scale.plan import plan_main
from scale.sharding import load_weights
from scale.training import AT_LEAST_ONE, TrainConfig, TrainingRun
from sources.overview import use_overview
from sources.protocols import use_protocol
from sources.released_data import encode_stored
from video import VideoError


@dataclass(frozen=True)
class Config(TrainConfig):
    model: str | None = None  # checkpoint folder or hub name; without it, the tiny base
    data: str = "runs/data/sft.jsonl"  # trajectories; made, if missing, in the demo
    out: str = "runs/sft"  # folder for the checkpoint and the metrics
    epochs: int = 1  # passes over the trajectories
    batch_size: int = 64  # trajectories an optimizer step, over all processes
    lr: float = 5e-6  # peak learning rate of AdamW
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then cosine to 0
    max_length: int = 32_768  # longer trajectories are skipped
    save_every: int = 50  # steps between checkpoints


DEMO = dict(lr=1e-3, batch_size=8, max_tokens_per_pass=8192, gradient_checkpointing=False)


def learning_rate(step, steps, config):
    """Linear warm-up, then half a cosine to 0."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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


def train_step(weights, dialogues, ids, optimizer, config, device, total=sum_over_processes):
    """One optimizer step on this process's share of a batch, of questions `ids`. Returns metrics over all."""
    # tokens over all processes: the loss's denominator
    num_trained = sum(sum(d.trained) for d in dialogues)
    counts = total({"tokens": num_trained, "length": sum(len(d.ids) for d in dialogues)}, device)
    policy = weights.policy
    fill_features(policy, dialogues)
    # loss and gradient, pass after pass
    loss_sum = 0.0
    for batch in weights.passes(split_by_tokens([[d] for d in dialogues], config.max_tokens_per_pass)):
        log_probs, _ = token_log_probs(policy, batch)
        loss = -log_probs.sum() / max(1, counts["tokens"])
        loss.backward()
        loss_sum += loss.item()
    norm = counts["tokens"] and weights.step(optimizer, config.max_grad_norm, config.max_bad_steps, ids)
    step = {"grad_norm": norm, "bad_steps": 0} if math.isfinite(norm) else {"grad_norm": 0.0, "bad_steps": 1}
    return sum_over_processes({"loss": loss_sum}, device) | counts | step


def batches(num_rows, config, rank, world):
    """(epoch, numbers of this process's rows) of each batch of a run."""
    for epoch in range(config.epochs):
        order = list(range(num_rows))
        random.Random(config.seed + epoch).shuffle(order)
        for start in range(0, num_rows, config.batch_size):
            yield epoch, order[start:start + config.batch_size][rank::world]


def train(weights, rows, config, run, rank, world, device, val):
    optimizer = torch.optim.AdamW(weights.parameters, lr=config.lr, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    progress = run.start(weights, optimizer, steps, {"step": 0, "skipped": []}, val=val)
    skipped, began = progress["skipped"], time.time()
    # this process's share of a batch, replayed while the batch before is trained
    load = lambda batch: load_dialogues(weights.policy, [rows[i] for i in batch[1]], Path(config.data).parent,
                                        config.max_length)
    left = islice(batches(len(rows), config, rank, world), progress["step"], None)
    ahead = enumerate(batches_ahead(load, left), progress["step"] + 1)
    for step, ((epoch, mine), (dialogues, bad), waited_s) in ahead:
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step - 1, steps, config)
        ids = [rows[i]["question"]["id"] for i in mine]
        metrics = train_step(weights, dialogues, ids, optimizer, config, device, run.total)
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
    config = parse_flags(Config, __doc__, DEMO, ("epochs", "batch_size", "max_length", *AT_LEAST_ONE))
    if config.plan:
        return plan_main("sft", config, TINY_BASE)
    rank, world, device = start_processes(config.device, config.timeout_min)
    if config.model is None and config.data == Config.data and rank == 0:
        ensure_demo(Path(config.data).parent, config.seed)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    model, (rows, bad) = config.model or TINY_BASE, read_trajectories(config.data, config.max_bad)
    val = config.val and (read_questions(config.val, config.max_bad)[0], Path(config.val).parent,
                          RolloutConfig())
    run = TrainingRun("sft", config, {"model": model, "trajectories": config.data}, rank, world, device)
    if run.finished:
        return
    config = run.config  # with what was left to the memory plan
    torch.manual_seed(config.seed)
    weights = load_weights(model, config, device)
    policy = weights.policy
    policy.env_config = use_protocol(policy.env_config, config, model)
    policy.env_config, known, without = use_overview(
        policy.env_config, [row["question"] for row in rows], config.overview, config.max_bad)
    known = {id(question) for question in known}
    rows, bad = [row for row in rows if id(row["question"]) in known], bad + without
    policy.train()
    if rank == 0:
        print(f"sft: {len(rows)} trajectories from {config.data}, model {model}, {weights.describe()}, "
              f"{world} process(es) on {device}")
    run.finish(bad + train(weights, rows, config, run, rank, world, device, val))


if __name__ == "__main__":
    run_main(main)
