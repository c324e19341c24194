"""`--cache_gb auto`: what is free for the rollouts' keys and values, once the policy is loaded."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scale import estimates
from scale.devices import free_bytes
from training.environment import largest_environment


def find_cache_gb(policy, config, weights=None):
    """The size in 1e9 bytes of a cache that takes what is free beside what a rollout needs, and beside what a
    run that trains keeps through it. There is room for at least one episode, at most for --max_rows of them.

    Args:
        policy: is loaded, and plays. config: the run's settings, with those of rollouts.
        weights: the MasterWeights of a run that trains, whose processes all call this and get the smallest
            size of all. None: the policy only plays, and each process has a size of its own."""
    s, item = estimates.sizes_of(policy.hf.config), policy.dtype.itemsize
    frame_tokens = estimates.frame_tokens_of(policy.hf.config, policy.env_config)
    left = free_bytes(policy.device) - estimates.RESERVE
    left -= estimates.rollout_activations(s, frame_tokens, item)
    left -= estimates.decode_logits(s, config.max_rows, item)
    if weights is not None:
        left -= to_come(weights, config, s.language * item, frame_tokens * s.hidden * item)
    longest = estimates.longest_episode(largest_environment(policy.env_config, config), frame_tokens, config)
    size = estimates.auto_cache(s, item, left, longest, config.max_rows) / 1e9
    if weights is not None and dist.is_initialized():
        smallest = torch.tensor(size, device=policy.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        size = smallest.item()
    return size


def to_come(weights, config, language_bytes, frame_bytes):
    """Bytes that will be on the device at a rollout and are not there yet: AdamW's moments, the language
    model where its weights are in shards, features of a step's frames (of `frame_bytes` each)."""
    size, sharded = 0, False
    for p in weights.parameters:
        if isinstance(p, DTensor):
            p, sharded = p.to_local(), True
        if p.device == weights.policy.device:  # not with --offload optimizer
            size += 2 * p.nbytes
    if sharded:
        size += language_bytes
    if "features" not in config.offload:
        processes = dist.get_world_size() if dist.is_initialized() else 1
        env_config = largest_environment(weights.policy.env_config, config)
        size += estimates.episodes_of(config, env_config, processes).all_frames * frame_bytes
    return size
