"""Weights that an optimizer changes: float32 master weights apart from compute weights of another dtype."""

import math
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from common import UserError, gather, warn
from training.checkpoints import save_policy

MAX_BAD_STEPS = 5  # optimizer steps in a row whose gradient is not finite, after which a run ends


class MasterWeights:
    """The float32 weights that an optimizer changes, and the compute weights of the policy, cast from them.
    Each process has all of them (scale/sharding.py: a part).

    Where the compute weights are float32 they are the master weights themselves. Else each backward pass adds
    their gradients to the master weights' in float32: an update of 1e-6 would round away in bfloat16, and so
    would the sum of many passes.

    Args:
        policy: a module; its trained parameters are the compute weights.
        reference: a frozen policy, or None.
    Attributes:
        policy, reference: what the passes of training go through.
        player: the policy that plays episodes and is saved. It has its weights only within `gathered`, as it
            is another copy where training needs the memory meanwhile; here it is the policy itself.
        compute, master_weights: {name: parameter} of the trained ones.
        parameters: the master weights as a list, which the optimizer takes.
        bad_steps: optimizer steps in a row that were left out."""

    gathered_bytes, seconds_gather = 0, 0.0  # what `gathered` received, and took, see gather_metrics

    def __init__(self, policy, reference=None):
        self.policy, self.player, self.reference, self.bad_steps = policy, policy, reference, 0
        self.compute = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.master_weights = {name: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
                               for name, p in self.compute.items()}
        self.parameters = list(self.master_weights.values())
        for p, master in zip(self.compute.values(), self.parameters):
            if p is not master:
                p.register_post_accumulate_grad_hook(partial(self._add_gradient, master))

    @staticmethod
    def _add_gradient(master, p):
        """Called in the backward pass, once p's gradient is there, which is freed at once."""
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    def adopt(self, optimizer):
        """Called once, before a run begins or goes on, with the optimizer of `parameters`: who keeps AdamW's
        moments in memory of its own gives it to the optimizer here."""

    def gather_metrics(self):
        """{metric: what rollouts gathered since the last call}: GB, and seconds of this process."""
        metrics = {"gathered_gb": self.gathered_bytes / 1e9, "seconds_gather": self.seconds_gather}
        self.gathered_bytes, self.seconds_gather = 0, 0.0
        return metrics

    @contextmanager
    def gathered(self):
        """A context in which `player` has its weights."""
        yield self.player

    def export(self, path):
        """Writes the policy as others load it; of the first process."""
        save_policy(self.player, path)

    def save(self, path):
        """`export`, by the first process. Raises UserError on all."""
        with self.gathered():
            error = None
            if not dist.is_initialized() or dist.get_rank() == 0:
                try:
                    self.export(path)
                except UserError as failed:
                    error = failed
            if errors := gather([error] if error else []):
                raise errors[0]
        self.gather_metrics()  # not for rollouts

    def describe(self):
        return f"{sum(p.numel() for p in self.parameters):,} trained parameters in {self.policy.dtype}"

    def passes(self, batches):
        """Yields batches as `split_by_tokens` makes them, for each of which the caller makes its passes, as
        many as it likes. Where a pass needs all processes, batches without a trained token, [[Dialogue]],
        follow until each process has had as many: their loss is 0, and so is each of their gradients."""
        yield from batches

    @torch.no_grad()
    def step(self, optimizer, max_norm, questions=()):
        """One step of an optimizer of `parameters`, on the gradients of all processes added up, of norm at
        most `max_norm`. Returns the norm before clipping; a step whose norm is not finite is left out, with a
        warning that names its `questions`. Raises UserError after MAX_BAD_STEPS such steps in a row."""
        self.sum_gradients()
        norm = self.clip(max_norm)
        if math.isfinite(norm):
            self.bad_steps = 0
            self.apply(optimizer)
        else:
            self.bad_steps += 1
            reason = f"the gradient's norm is {norm} on the questions {', '.join(gather([*questions]))}"
            if self.bad_steps >= MAX_BAD_STEPS:
                raise UserError(f"{reason}; {self.bad_steps} such steps in a row: lower --lr, "
                                "or look at their videos")
            warn(f"{reason}: this step is left out")
        self.free_gradients(optimizer)
        return norm

    def sum_gradients(self):
        """Adds the gradients of all processes up."""
        sync_gradients(self.parameters)

    def clip(self, max_norm):
        """Scales the gradients down to a norm of `max_norm`. Returns their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).item()

    def apply(self, optimizer):
        """A step on the gradients as they are."""
        optimizer.step()
        self.cast()

    def free_gradients(self, optimizer):
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def cast(self):
        """Casts the master weights to the compute weights."""
        for p, master in zip(self.compute.values(), self.parameters):
            if p is not master:
                p.copy_(master)

    def rows_to_save(self, tensor):
        """(rows, first): the rows of a master weight, or of a moment of it, that this process writes into a
        checkpoint of the run, so that all of them write about as much, and the number of the first."""
        part, parts = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        start, stop = rows_of(len(tensor), part, parts)
        return tensor.detach()[start:stop], start

    def rows_to_load(self, tensor):
        """The same of the rows that it holds, which it reads again when the run goes on."""
        return tensor.detach(), 0


def rows_of(length, part, parts):
    """(start, stop) of the rows of a tensor of `length` that a part holds, as FSDP2 cuts it."""
    size = -(-length // parts)
    return min(length, part * size), min(length, (part + 1) * size)


def sync_gradients(parameters):
    """Adds the gradients of all processes up, in place. A process without tokens takes part with zeros."""
    if not dist.is_initialized():
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
