"""`--cache_gb auto`: what is free for the rollouts' keys and values, by what is on the device and what is to come."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scale import estimates
from scale.devices import free_bytes
from scale.plan import RESERVE


def find_cache_gb(policy, config, weights=None):
    """The cache's size in 1e9 bytes, of all processes the smallest; at least room for one episode.

    Args:
        policy: is loaded, and plays. config: the run's settings, with those of rollouts.
        weights: the MasterWeights of a run that trains: moments, gathered weights and features of a step's
            episodes will be on the device, too. None: the policy only plays."""
    s, item = estimates.sizes_of(policy.hf.config, 0), policy.dtype.itemsize
    env_config = policy.env_config
    frame = env_config.max_pixels // policy.frame_unit ** 2  # tokens
    beside = estimates.rollout_activations(s, frame, item) + estimates.decode_logits(s, config.max_rows, item) + RESERVE
    if weights is not None:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in weights.parameters]
        beside += 2 * sum(p.nbytes for p in local if p.device == policy.device)
        if any(isinstance(p, DTensor) for p in weights.parameters):
            beside += item * s.language
        processes = dist.get_world_size() if dist.is_initialized() else 1
        episodes = estimates.episodes_of(config, policy.hf.config, env_config, processes)
        if "features" not in config.offload:
            beside += episodes.all_frames * frame * s.hidden * item
    prompt = env_config.overview_max_frames * frame + estimates.PROMPT_TEXT
    row = estimates.cache_token(s, item) * (prompt + config.max_response_tokens)
    left = free_bytes(policy.device) - beside
    size = torch.tensor(estimates.auto_cache(s, item, left, row, config.max_rows) / 1e9, device=policy.device)
    if dist.is_initialized():
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return round(size.item(), 2) or size.item()
