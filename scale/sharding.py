"""Weights in shards over many processes (FSDP2), so that a model trains that no single GPU can hold.

Each process keeps a part of every trained tensor: float32 masters, gradients and AdamW's moments, (4 + 4 + 8)
bytes a parameter over the number of processes. A pass gathers the weights in the compute dtype, layer by
layer, and its gradients are added up in float32 and cut into shards right after each layer's backward pass.

    --shard all     over all processes
    --shard node    over a machine's processes; each machine holds one copy, and gradients are summed across

What has to be minded:
- One root. All of the policy's pass from ids to log-probabilities is `Policy.forward`, which FSDP wraps. The
  embedding, the last norm and the head stay in the root's group: they are gathered once a pass, however many
  chunks the head takes, and a tied embedding and head stay one tensor.
- A pass is a collective, so all processes must make as many: `passes` adds batches without a trained token,
  whose loss and gradients are 0.
- The loss is divided by the tokens of all processes already: gradients are summed, never averaged.
- The vision tower is frozen and small: each process has all of it, and features need no collective.
- Rollouts make no collective: `gathered` fills a plain copy of the language model in the compute dtype, which
  is emptied again before the update.
"""

import json
import os
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from common import UserError, choose_device, read_text
from model import Dialogue
from training.checkpoints import INDEX, find_checkpoint, load_policy, loading, read_parts
from training.weights import MasterWeights, rows_of

# Names in published checkpoints, and what transformers' class calls them today.
OLD_NAMES = (("visual.", "model.visual."), ("model.layers.", "model.language_model.layers."),
             ("model.embed_tokens.", "model.language_model.embed_tokens."),
             ("model.norm.", "model.language_model.norm."))


# ---------------------------------------------------------------------------------------------------- loading
class WeightFiles:
    """The weights in a checkpoint folder's safetensors files, of which rows can be read. Raises UserError."""

    def __init__(self, folder):
        files = [folder / "model.safetensors"]
        if not files[0].is_file():
            if not (folder / INDEX).is_file():
                raise UserError("its weights are no safetensors files, which --shard reads; load it with "
                                "transformers and save_pretrained it")
            names = json.loads(read_text(folder / INDEX))["weight_map"].values()
            files = [folder / name for name in sorted(set(names))]
        self.place = {}  # name: (open file, name in it)
        for file in files:
            opened = safe_open(file, "pt")
            for name in opened.keys():
                self.place[today(name)] = opened, name

    def read(self, name, start=0, stop=None):
        """Rows `start` to `stop` of a tensor, in the file's dtype."""
        opened, name = self.place[name]
        return opened.get_slice(name)[start:stop]


def today(name):
    for old, new in OLD_NAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@contextmanager
def no_parameters():
    """Modules that are made in it have parameters without memory (on the meta device), but true buffers:
    those that are in no file, as the rotary embedding's frequencies, are as transformers computes them."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def empty_model(folder, dtype, device):
    """transformers' model of a checkpoint folder, its parameters on the meta device, in eval mode."""
    config = AutoConfig.from_pretrained(folder)
    config.dtype = dtype
    with no_parameters():
        hf = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    for module in hf.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    return hf.eval()


def read_empty(name, dtype, device):
    """`read_checkpoint` without the weights: what a Policy is made of, its parameters on the meta device."""
    folder = find_checkpoint(name)
    return empty_model(folder, dtype, device), *read_parts(folder)


@torch.no_grad()
def fill(policy, files, mesh):
    """Reads this process's rows of a policy on the meta device that FSDP has wrapped: at any time there is at
    most what it keeps and one tensor more. Raises UserError."""
    names = {name.removeprefix("hf.") for name, _ in policy.named_parameters()}
    if missing := sorted(names - set(files.place)):
        raise UserError(f"it lacks the weights {', '.join(missing[:3])} ({len(missing)} in all); "
                        "download or copy it again")
    buffers = [buffer.clone() for buffer in policy.buffers()]
    policy.to_empty(device=mesh.device_type)  # of a sharded tensor this process's rows; buffers, too
    for buffer, value in zip(policy.buffers(), buffers, strict=True):
        buffer.copy_(value)
    for name, p in policy.named_parameters():
        name, local = name.removeprefix("hf."), p.to_local() if isinstance(p, DTensor) else p
        start, stop = rows_of(len(p), *shard_of(mesh)) if isinstance(p, DTensor) else (0, len(p))
        if start == stop:  # of a short tensor some processes hold nothing
            continue
        rows = files.read(name, start, stop)
        if rows.shape != local.shape:
            raise UserError(f"{name} does not have the shape that config.json says")
        local.copy_(rows)
        del rows  # before the next ones are read
        if not local.sum(dtype=torch.float64).isfinite():  # `isfinite` of all would make two more of its size
            raise UserError(f"its weights {name} are not finite; download or copy it again")


# --------------------------------------------------------------------------------------------------- sharding
def make_mesh(shard, device):
    """The processes as (replicas, shards), a DeviceMesh. Raises UserError."""
    if not dist.is_initialized():  # one process, started without torchrun
        dist.init_process_group(choose_device(device.type)[1], store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    size = world if shard == "all" else int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    if world % size:
        raise UserError(f"--shard {shard}: every machine must have as many processes as the others")
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def shard_of(mesh):
    """(number of this process's shard, how many there are)."""
    return mesh["shard"].get_local_rank(), mesh["shard"].size()


def wrap(policy, mesh, dtype):
    """FSDP2: each layer a group, all else of the language model the root's. Weights that are not frozen are
    gathered in `dtype`, their gradients added up in float32. Returns the policy."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how = dict(mesh=mesh if mesh["replicate"].size() > 1 else mesh["shard"], mp_policy=precision)
    # the policy last: its group, the root's, has what no layer took, but for the frozen vision tower. It
    # stays gathered until the backward pass; a reference has none
    frozen = not any(p.requires_grad for p in policy.parameters())
    for module in (*policy.language_model.layers, policy):
        how["reshard_after_forward"] = True if frozen or module is not policy else None
        ignored = {"ignored_params": set(policy.visual.parameters())} if module is policy else {}
        fully_shard(module, **how, **ignored)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by all processes' tokens
        module.set_force_sum_reduction_for_comms(True)  # gloo has no such division
    return policy


class ShardedWeights(MasterWeights):
    """MasterWeights in shards: `parameters` are DTensors.

    policy: trains. player: the plain copy that plays and is saved, while it is `gathered`. reference: frozen,
    in the compute dtype, or None."""

    def __init__(self, policy, player, reference, mesh):
        self.policy, self.player, self.reference, self.bad_steps = policy, player, reference, 0
        self.masters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.parameters, self.mesh = list(self.masters.values()), mesh
        self.whole = [p for name, p in player.named_parameters() if name in self.masters]
        self.untrained = Dialogue()  # for passes that only take part: a token that nobody trains
        self.untrained.add([policy.im_end])

    def describe(self):
        return f"{super().describe()}, in {shard_of(self.mesh)[1]} shards"

    def sum_gradients(self):
        """Each pass has done so."""

    def cast(self):
        """Each pass casts what it gathers."""

    @contextmanager
    def gathered(self):
        began = time.time()
        with torch.no_grad():
            for p, whole in zip(self.parameters, self.whole, strict=True):
                whole.untyped_storage().resize_(whole.numel() * whole.itemsize)
                whole.copy_(p.to(whole.dtype).full_tensor())  # cast before it is sent
                parts = self.mesh["shard"].size()
                self.gathered_bytes += whole.nbytes * (parts - 1) // parts
            float(whole.view(-1)[0])  # waits for a GPU
        self.player.weights_version += 1
        self.player.env_config = self.policy.env_config
        self.seconds_gather += time.time() - began
        try:
            yield self.player
        finally:
            for whole in self.whole:
                whole.untyped_storage().resize_(0)

    def passes(self, batches):
        most = torch.tensor(len(batches), device=self.policy.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        yield from batches
        for _ in range(int(most) - len(batches)):
            yield [[self.untrained]]

    def rows_to_save(self, tensor):
        rows, first = self.rows_to_load(tensor)
        return (rows, first) if self.mesh["replicate"].get_local_rank() == 0 else (rows[:0], first)

    def rows_to_load(self, tensor):
        return tensor.detach().to_local(), rows_of(len(tensor), *shard_of(self.mesh))[0]


def load_sharded(name, device, dtype, env_config, mesh, trained, config):
    """A policy in shards: trained, its masters in float32, or frozen in the compute dtype."""
    policy = load_policy(name, device, dtype, env_config, read_empty)
    with loading(name):
        if trained:
            policy.language_model.float()
            policy.hf.lm_head.float()
        policy.freeze_vision()
        if trained and config.gradient_checkpointing:
            policy.checkpoint_layers()
        if not trained:
            policy.requires_grad_(False)
        fill(wrap(policy, mesh, dtype), WeightFiles(find_checkpoint(name)), mesh)
    return policy


def make_player(name, device, dtype, env_config, visual):
    """A plain policy without memory for its language model, and with the vision tower of another one."""
    player = load_policy(name, device, dtype, env_config, read_empty)
    player.hf.model.visual = visual
    for p in [*player.language_model.parameters(), *player.head.parameters()]:
        if p.is_meta:
            empty = torch.empty_like(p, device=device)
            empty.untyped_storage().resize_(0)
            # in place, so that a tied head stays the embedding
            torch.utils.swap_tensors(p, torch.nn.Parameter(empty, requires_grad=False))
    return player


def load_shards(name, config, env_config, device, dtype, shard, with_reference):
    """ShardedWeights of a checkpoint; shard: all or node. Raises UserError."""
    mesh = make_mesh(shard, device)
    policy = load_sharded(name, device, dtype, env_config, mesh, True, config)
    reference = load_sharded(name, device, dtype, env_config, mesh, False, config) if with_reference else None
    if reference:
        reference.hf.model.visual = policy.visual  # frozen in both
    return ShardedWeights(policy, make_player(name, device, dtype, env_config, policy.visual), reference, mesh)
