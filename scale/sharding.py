"""Weights in shards over many processes (FSDP2), so that a model trains that no single GPU can hold.

Each process keeps a part of every trained tensor: float32 master weights, gradients and AdamW's moments,
(4 + 4 + 8) bytes a parameter over the number of processes. A pass gathers the weights in the compute dtype,
layer by layer, and its gradients are added up in float32 and cut into shards right after each layer's
backward pass.

    --shard all     over all processes
    --shard node    over a machine's processes; each machine holds one copy, and gradients are summed across

What has to be minded:
- One root. All of the policy's pass from ids to log-probabilities is `Policy.forward`, which FSDP wraps. The
  embedding, the last norm and the head stay in the root's group: they are gathered once a pass, however many
  chunks the head takes, and a tied embedding and head stay one tensor.
- A pass is a collective, so all processes must make as many: `passes` gives the training loop batches without
  a trained token, whose loss and gradients are 0, until it has made as many as the others.
- The loss is divided by the tokens of all processes already: gradients are summed, never averaged.
- The vision tower is frozen and small: each process has all of it, and features need no collective.
- Rollouts make no collective: `gathered` fills a plain copy of the language model in the compute dtype, which
  is emptied again before the update.
- Loading takes what a process keeps and one tensor more. (Of PyTorch's own ways, `set_model_state_dict` wants
  the whole model in one process, and `HuggingFaceStorageReader` reads every file of a folder, also those that
  the index no longer names.)
"""

import json
import os
import re
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


# ---------------------------------------------------------------------------------------------------- loading
class WeightFiles:
    """The weights in a checkpoint folder's safetensors files, of which rows can be read.

    place: {name of the parameter in a Policy: (open file, name in it)}. Raises UserError where there are no
    such files."""

    def __init__(self, folder):
        names = {"model.safetensors"}
        if not (folder / "model.safetensors").is_file():
            if not (folder / INDEX).is_file():
                raise UserError("its weights are no safetensors files, which --shard and --offload read; "
                                "load it with transformers and save_pretrained it")
            names = set(json.loads(read_text(folder / INDEX))["weight_map"].values())
        self.place = {}
        for file in sorted(names):
            opened = safe_open(folder / file, "pt")
            for name in opened.keys():
                self.place[name_in_policy(name)] = opened, name

    def read(self, name, start=0, stop=None):
        """Rows `start` to `stop` of a tensor, in the file's dtype. Raises UserError."""
        if name not in self.place:
            raise UserError(f"it lacks the weights {name}; download or copy it again")
        opened, name_in_file = self.place[name]
        return opened.get_slice(name_in_file)[start:stop]


def name_in_policy(name):
    """The parameter of a Policy that a weight in a file is: files have the names of transformers' older
    class."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return "hf." + re.sub(r"^model\.(?=(layers|embed_tokens|norm)\.)", "model.language_model.", name)


def read_empty(name, dtype, device):
    """`read_checkpoint` without the weights: what a Policy is made of, its tensors on the meta device."""
    folder = find_checkpoint(name)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = dtype
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    if (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    return hf.eval(), *read_parts(folder)


def make_buffers(policy, device):
    """Buffers, the rotary embeddings' frequencies, are in no file: transformers computes them once more, in
    modules that have nothing else."""
    for module in policy.modules():
        if next(module.buffers(recurse=False), None) is not None:
            module.to_empty(device=device, recurse=False)
            policy.hf._init_weights(module)


@torch.no_grad()
def fill(policy, files, mesh):
    """Reads this process's rows of a policy on the meta device that FSDP has wrapped: at any time there is at
    most what it keeps and one tensor more. Raises UserError."""
    policy.to_empty(device=mesh.device_type)  # of a sharded tensor this process's rows
    make_buffers(policy, mesh.device_type)
    for name, p in policy.named_parameters():
        local, start, stop = p, 0, len(p)
        if isinstance(p, DTensor):
            local = p.to_local()
            start, stop = rows_of(len(p), *shard_of(mesh))
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
    layers, frozen = policy.language_model.layers, not any(p.requires_grad for p in policy.parameters())
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how = dict(mesh=mesh if mesh["replicate"].size() > 1 else mesh["shard"], mp_policy=precision)
    for layer in layers:
        fully_shard(layer, **how)
    # the policy last: its group has what no layer took, but for the frozen vision tower. It stays gathered
    # until the backward pass, which a reference does not have
    fully_shard(policy, **how, reshard_after_forward=frozen, ignored_params={*policy.visual.parameters()})
    for module in (*layers, policy):
        module.set_gradient_divide_factor(1.0)  # the loss is divided by all processes' tokens
        module.set_force_sum_reduction_for_comms(True)  # gloo has no such division
    return policy


class ShardedWeights(MasterWeights):
    """MasterWeights in shards: the master weights are the policy's parameters, DTensors in float32.

    Args:
        policy: trains, in shards. reference: frozen, in shards in the compute dtype, or None.
        player: a plain policy in the compute dtype, without memory but within `gathered`, see `make_player`.
        mesh: see `make_mesh`.
    whole: the player's parameters that `gathered` fills, one for each master weight."""

    def __init__(self, policy, player, reference, mesh):
        self.policy, self.player, self.reference, self.bad_steps = policy, player, reference, 0
        self.master_weights = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.parameters, self.mesh = list(self.master_weights.values()), mesh
        self.whole = [p for name, p in player.named_parameters() if name in self.master_weights]

    def describe(self):
        return f"{super().describe()}, in {shard_of(self.mesh)[1]} shards"

    def sum_gradients(self):
        """Nothing: each pass has done so."""

    def clip(self, max_norm):
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).full_tensor().item()  # of all shards

    def cast(self):
        """Nothing: each pass casts what it gathers."""

    @contextmanager
    def gathered(self):
        began, parts = time.time(), self.mesh["shard"].size()
        with torch.no_grad():
            for p, whole in zip(self.parameters, self.whole, strict=True):
                whole.untyped_storage().resize_(whole.numel() * whole.itemsize)
                whole.copy_(p.to(whole.dtype).full_tensor())  # cast before it is sent
                self.gathered_bytes += whole.nbytes * (parts - 1) // parts
            float(whole.view(-1)[0])  # waits for a GPU
        self.player.weights_version += 1
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
        untrained = Dialogue()
        untrained.add([self.policy.im_end])
        for _ in range(int(most) - len(batches)):
            yield [[untrained]]

    def rows_to_save(self, tensor):
        rows, first = self.rows_to_load(tensor)
        return (rows, first) if self.mesh["replicate"].get_local_rank() == 0 else (rows[:0], first)

    def rows_to_load(self, tensor):
        return tensor.detach().to_local(), rows_of(len(tensor), *shard_of(self.mesh))[0]


def load_sharded(name, device, dtype, env_config, mesh, trained, config):
    """A policy in shards: trained, in float32, or frozen in the compute dtype."""
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
    """A plain policy without memory for its language model's parameters, and with the vision tower of another
    one."""
    player = load_policy(name, device, dtype, env_config, read_empty)
    make_buffers(player, device)
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
    player = make_player(name, device, dtype, env_config, policy.visual)
    return ShardedWeights(policy, player, reference, mesh)
