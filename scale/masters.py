"""Weights that an optimizer changes: float32 masters apart from compute weights of another dtype."""

import math
from functools import partial

import torch

from common import UserError, gather, sync_gradients, warn


class MasterWeights:
    """Float32 weights, `parameters`, that an optimizer changes, and the compute weights, cast from them.

    Where the compute weights are float32 they are the masters themselves. Else each backward pass adds their
    gradients to the masters' in float32: an update of 1e-6 would round away in bfloat16, and so would the sum
    of many passes."""

    def __init__(self, parameters):
        self.compute, self.bad_steps = [p for p in parameters if p.requires_grad], 0
        self.parameters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
                           for p in self.compute]
        for p, master in zip(self.compute, self.parameters):
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

    @torch.no_grad()
    def step(self, optimizer, max_norm, max_bad_steps=5, questions=()):
        """One step of an optimizer of `parameters`, on the gradients of all processes added up, of norm at
        most `max_norm`. Returns the norm before clipping; a step whose norm is not finite is left out, with a
        warning that names its `questions`. Raises UserError after `max_bad_steps` such steps in a row."""
        sync_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).item()
        if math.isfinite(norm):
            self.bad_steps = 0
            optimizer.step()
            for p, master in zip(self.compute, self.parameters):
                if p is not master:
                    p.copy_(master)
        else:
            self.bad_steps += 1
            reason = f"the gradient's norm is {norm} on the questions {', '.join(gather([*questions]))}"
            if self.bad_steps >= max_bad_steps:
                raise UserError(f"{reason}; {self.bad_steps} such steps in a row: lower --lr, "
                                "or look at their videos")
            warn(f"{reason}: this step is left out")
        optimizer.zero_grad(set_to_none=True)
        return norm
