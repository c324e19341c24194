"""Which of the ways to hold a model's weights a run takes. The only file of scale/ that the stages import;
what it picks is imported when it is picked, as some of it takes seconds to import.

    one process                        all weights in it (training/weights.py)
    several processes in bfloat16      weights in shards over all of them (scale/sharding.py)
    several processes in float32       all weights in each of them
    --shard none, all, node            as it says
    --offload optimizer                one process: master weights and AdamW's moments on the host
    --lora_rank R                      adapters beside frozen weights, all in each process
"""

import os

import torch

from common import UserError, choose_dtype
from training.checkpoints import load_policy
from training.weights import MasterWeights

SHARDS = "none", "all", "node"  # what --shard may be
OFFLOAD = "optimizer", "reference", "features"  # what --offload may name


def check_flags(config, processes):
    """Raises UserError for settings of which each says otherwise where the weights are."""
    if config.shard not in (None, *SHARDS):
        raise UserError(f"--shard must be one of {', '.join(SHARDS)}, not {config.shard}")
    unknown = [what for what in config.offload if what not in OFFLOAD]
    if unknown:
        raise UserError(f"--offload must be some of {' '.join(OFFLOAD)}, not {' '.join(unknown)}")
    shared = config.shard not in (None, "none")
    if config.lora_rank and shared:
        raise UserError("--lora_rank goes without --shard: each process has the whole base")
    if "optimizer" in config.offload and (processes > 1 or shared):
        raise UserError("--offload optimizer is for one process that has all weights; "
                        "of several each holds a part with --shard all")
    if "optimizer" in config.offload and config.lora_rank:
        raise UserError("--offload optimizer goes without --lora_rank: adapters have small master weights")
    if "reference" in config.offload and "optimizer" not in config.offload:
        raise UserError("--offload reference goes with optimizer: --offload optimizer reference")


def shard_of_run(config, processes, dtype):
    """What --shard is where it is not given."""
    plain = processes == 1 or dtype == torch.float32 or config.lora_rank
    return config.shard or ("none" if plain else "all")


def load_weights(name, config, env_config, device, with_reference=False):
    """Loads a checkpoint for training, the way that the settings say.

    Args:
        name: the checkpoint's folder or name. config: a TrainConfig. env_config: what the run plays.
        with_reference: whether to keep the policy as it is now, too, for the KL term.
    Returns MasterWeights: of all weights, of shards, of adapters, or with a part on the host.
    Raises UserError."""
    processes, dtype = int(os.environ.get("WORLD_SIZE", 1)), choose_dtype(config.dtype, device)
    shard = shard_of_run(config, processes, dtype)
    if shard != "none":
        from scale.sharding import load_shards
        return load_shards(name, config, env_config, device, dtype, shard, with_reference)
    policy = load_policy(name, device, dtype, env_config).freeze_vision()
    if config.gradient_checkpointing:
        policy.checkpoint_layers()
    if config.lora_rank:
        from scale.lora import LoRAWeights
        return LoRAWeights(policy, name, config, with_reference)
    if "optimizer" in config.offload:
        from scale.offload import offload_weights
        return offload_weights(policy, name, config, with_reference)
    return MasterWeights(policy, policy.frozen_copy() if with_reference else None)


def cache_gb(policy, config, weights=None):
    """The number that `--cache_gb` stands for where it is auto, see scale/memory.py."""
    if config.cache_gb != "auto":
        return config.cache_gb
    from scale.memory import find_cache_gb
    return find_cache_gb(policy, config, weights)


def show_plan(name, config):
    """What --plan asks for, see scale/plan.py. Ends the process with status 0 if the run fits, else 1."""
    from scale.plan import plan_main
    plan_main(name, config)
