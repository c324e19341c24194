"""One GPU trains all parameters: master weights and AdamW's moments stand in host memory, and the CPU steps.

    sft.py --offload optimizer           12 bytes a parameter on the host; on the device 2, and 4 in an update
    rl.py --offload optimizer reference  the reference's 2 on the host, too

The compute weights stay on the device. Their gradients are added up there in float32, in buffers that there
are from an update's first pass to its step, so never beside the cache of rollouts. The step takes group by
group (a decoder layer, the embedding, the head): the gradient comes to the host, AdamW moves the group's
master weights, and what is cast from them goes back. While the CPU works on a group, the next one's gradient
comes. So a parameter's 4 bytes of gradient and 2 of compute weight go over the bus once an optimizer step.
FSDP's CPUOffloadPolicy moves more with each pass, of which an update has many: the 4 bytes of the float32
weight twice, for the forward and for the backward pass, and the 4 of the gradient after it.

Host memory that the device copies from or to is pinned: the three slabs, so that a run for which there is too
little of it ends before it begins, and the memory that a group passes through.
"""

import re
from functools import partial
from itertools import groupby

import torch

from scale.devices import Copies, pin_memory
from scale.sharding import WeightFiles
from training.checkpoints import find_checkpoint, loading
from training.weights import MasterWeights


class OffloadedWeights(MasterWeights):
    """MasterWeights of one process whose master weights and moments are in host memory, in any compute dtype.

    Args:
        read: read(name of a parameter) -> its values, as the checkpoint's WeightFiles has them; the compute
            weights may be rounded.
        reference: a frozen policy (`reference_of`), or None.
    Attributes:
        slabs: master weights, exp_avg and exp_avg_sq of all parameters, one behind the other.
        gradients: {name: a float32 buffer on the device}, within an update.
        groups: lists of names that are stepped together. staging: host memory for two of them."""

    def __init__(self, policy, read, reference=None):
        self.policy, self.player, self.reference, self.bad_steps = policy, policy, reference, 0
        self.compute = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.copies, self.gradients = Copies(policy.device), {}
        # master weights and moments
        sizes = {name: p.numel() for name, p in self.compute.items()}
        self.slabs = [pin_memory(torch.zeros(sum(sizes.values())), policy.device) for _ in range(3)]
        weights, *self.moments = (self._views(slab, self.compute) for slab in self.slabs)
        for name, weight in weights.items():
            weight.copy_(read(name))
        self.master_weights = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
        self.parameters = list(self.master_weights.values())
        # groups, and memory for two of them
        self.groups = [list(names) for _, names in groupby(self.compute, group_of)]
        largest = max(sum(sizes[name] for name in names) for names in self.groups)
        self.staging = [pin_memory(torch.empty(largest), policy.device) for _ in range(2)]
        for name, p in self.compute.items():
            p.register_post_accumulate_grad_hook(partial(self._add_gradient, name))

    def _views(self, flat, names):
        """{name: its part of a flat tensor, in its shape} of tensors that stand one behind the other."""
        shapes = [self.compute[name].shape for name in names]
        parts = flat[:sum(shape.numel() for shape in shapes)].split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}

    def _add_gradient(self, name, p):
        """Called in the backward pass, once p's gradient is there, which is freed at once."""
        if name in self.gradients:
            self.gradients[name] += p.grad
        else:
            self.gradients[name] = p.grad.float()
        p.grad = None

    def describe(self):
        held = sum(slab.nbytes for slab in self.slabs)
        return f"{super().describe()}, {held / 1e9:.1f} GB of master weights and moments in host memory"

    def adopt(self, optimizer):
        """AdamW's moments are in the slabs."""
        exp_avg, exp_avg_sq = self.moments
        for name, master in self.master_weights.items():
            optimizer.state[master] = {
                "step": torch.tensor(0.0), "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}

    def sum_gradients(self):
        """Nothing: there is one process."""

    def clip(self, max_norm):
        gradients = [self.gradients[name] for name in self.compute if name in self.gradients]
        norm = torch.nn.utils.get_total_norm(gradients)
        share = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # that of clip_grad_norm_
        for gradient in gradients:
            gradient *= share
        return norm.item()

    def apply(self, optimizer):
        groups = [[name for name in names if name in self.gradients] for names in self.groups]

        def fetch(number):
            """The gradients of a group begin to come. Returns (what waits for them, {name: gradient})."""
            staged = self._views(self.staging[number % 2], groups[number])
            return self.copies.begin(staged.values(), [self.gradients[name] for name in staged]), staged

        coming = fetch(0)
        for number, names in enumerate(groups):
            wait, staged = coming
            if number + 1 < len(groups):
                coming = fetch(number + 1)
            wait()
            # those without a gradient AdamW leaves as they are
            for name in names:
                self.master_weights[name].grad = staged[name]
            optimizer.step()
            for name in names:
                self.master_weights[name].grad = None
            # the compute weights go back by way of the gradient's place: copies keep their order
            cast = self._views(self.staging[number % 2].view(self.policy.dtype), names)
            for name in names:
                cast[name].copy_(self.master_weights[name])
            self.copies.begin([self.compute[name] for name in names], cast.values())
        self.copies.join()

    def free_gradients(self, optimizer):
        self.gradients.clear()


def group_of(name):
    """What a parameter is stepped with: its decoder layer, else itself."""
    layer = re.match(r".*\.layers\.\d+\.", name)
    return layer[0] if layer else name


@torch.no_grad()
def reference_of(policy, on_host=False):
    """The policy as it is now, see `Policy.frozen_copy`.

    With `on_host` its layers' weights are in host memory, and come before each layer's pass to one of two
    places on the device, while the layer before computes. Its parameters are these places."""
    if not on_host:
        return policy.frozen_copy()
    layers, weights, instead = policy.language_model.layers, [], {}
    shapes = [p.shape for p in layers[0].parameters()]
    sizes = [shape.numel() for shape in shapes]
    places = [torch.empty(sum(sizes), dtype=policy.dtype, device=policy.device) for _ in range(2)]
    for number, layer in enumerate(layers):
        host = pin_memory(torch.empty(sum(sizes), dtype=policy.dtype), policy.device)
        for p, part, place in zip(layer.parameters(), host.split(sizes), places[number % 2].split(sizes)):
            part.view(p.shape).copy_(p)
            instead[id(p)] = torch.nn.Parameter(place.view(p.shape), requires_grad=False)
        weights.append(host)
    reference = policy.frozen_copy(instead)
    stream_layers(reference.language_model.layers, weights, places, Copies(policy.device))
    return reference


def stream_layers(layers, weights, places, copies):
    """Before each layer's forward pass its weights are there, and the next layer's begin to come."""
    def come(number):
        copies.begin([places[number % 2]], [weights[number]])

    def before(number):
        if number == 0:
            come(0)
        copies.join()
        if number + 1 < len(layers):
            come(number + 1)  # once the layer before, whose place it takes, is done

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: before(number))


def offload_weights(policy, name, config, with_reference):
    """OffloadedWeights of a policy that was loaded from the checkpoint `name`."""
    reference = reference_of(policy, "reference" in config.offload) if with_reference else None
    with loading(name):
        return OffloadedWeights(policy, WeightFiles(find_checkpoint(name)).read, reference)
