"""Memory in a run: who holds the weights, how large the rollouts' cache is, and what to do when it runs out.

All of it follows from the plan (scale/plan.py), which counts before anything is loaded.
"""

import gc
import os
import re
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist

from common import choose_dtype
from generation import PREFILL_TOKENS, KVCache
from model import Policy
from scale import estimates as of
from scale.masters import MasterWeights
from scale.plan import RESERVE, as_flags, choose, host_here, make_plan, read_settings, remedies

RUNS = []  # what `plan_run` was asked for last: arguments of `make_plan`


def plan_run(name, config, model, world, device):
    """Leaves it to the plan who holds the weights, where the flags do. Returns (the changed config, a line
    that says what was chosen). A CPU, whose memory is the host's, is planned for only if --gpu_gb says what
    there is. Raises PolicyError."""
    if device.type == "cpu" and not config.gpu_gb:
        return config, None
    there = config.gpu_gb * 1e9 if config.gpu_gb else torch.cuda.get_device_properties(device).total_memory
    host = config.host_gb * 1e9 if config.host_gb else host_here()
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    given = *read_settings(model), world, there, host
    chosen, line = choose(name, replace(config, dtype=dtype), *given)
    RUNS[:] = [(name, chosen, *given)]
    return replace(chosen, dtype=config.dtype), line


def free_bytes(device):
    """What this process can still have on a device; on a CPU its share of what the machine has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with open("/proc/meminfo", encoding="ascii") as file:
        available = int(re.search(r"MemAvailable: +(\d+) kB", file.read())[1]) * 1024
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def auto_cache_gb(policy, config, later=0):
    """`--cache_gb auto`: what is free once the model is loaded, less what rollouts need beside the cache and
    `later` bytes; of all processes the smallest. 1e9 bytes; at least room for one episode."""
    s = of.sizes_of(policy.hf.config, 0)
    item, frame = policy.dtype.itemsize, policy.env_config.max_pixels // policy.frame_unit ** 2
    beside = max(of.forward_activations(s, PREFILL_TOKENS, item), of.vision_activations(s, frame, item))
    beside += of.decode_logits(s, config.max_rows, item) + RESERVE
    longest = config.max_response_tokens + policy.env_config.overview_max_frames * frame
    row = of.cache_token(s, item) * longest
    left = (free_bytes(policy.device) - beside - later) / (1 + of.decode_activations(s, item))
    size = torch.tensor(min(max(left, row), config.max_rows * row) / 1e9, device=policy.device)
    if dist.is_initialized():
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return round(size.item(), 2) or size.item()


def later_bytes(weights):
    """What rollouts will have on the device that is not there yet: moments, features, gathered weights."""
    moments = 2 * sum(p.nbytes for p in weights.parameters if p.device == weights.policy.device)
    planned = make_plan(*RUNS[0]).rollout if RUNS else {}
    return moments + planned.get("features", 0) + planned.get("gathered weights", 0)


# ------------------------------------------------------------------------------------------ when it runs out
def ran_out(error):
    """Whether an exception says that memory did."""
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def nbytes(tensors, device):
    """Of distinct memory on a device."""
    storages = [t.untyped_storage() for t in tensors if t.device == device]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(device):
    """{category of the plan: bytes} that this process has on a device, of what can be told apart."""
    there = [o for o in gc.get_objects() if issubclass(type(o), (Policy, MasterWeights, KVCache))]
    weights = [o for o in there if isinstance(o, MasterWeights)]
    gradients = [p.grad for o in weights for p in o.parameters if p.grad is not None]
    gradients += [g for o in weights for g in getattr(o, "gradients", {}).values()]  # offloaded
    features = [f for o in there if isinstance(o, Policy) for f in o.features.values()]
    return {"features": nbytes(features, device), "gradients": nbytes(gradients, device),
            "cache": nbytes([t for o in there if isinstance(o, KVCache) for t in o.tensors()], device)}


def explain(error):
    """One line for memory that ran out: what was above the plan, and what to lower first."""
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ [GMK]iB)", str(error))
    line = "out of memory" + (f", where {asked[1]} more were asked for" if asked else "")
    if not RUNS:
        return (f"{line}; lower --max_rows, --cache_gb or --max_tokens_per_pass, or see --plan of sft.py and "
                "rl.py")
    name, config, model_config, env_config, world, there, host = RUNS[0]
    plan = make_plan(*RUNS[0])
    device = torch.device("cpu")
    if torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    sizes = held(device)
    plays = any(f.f_globals["__name__"] == "rollout" for f, _ in traceback.walk_tb(error.__traceback__))
    when, planned = ("rollout", plan.rollout) if plays else ("update", plan.update)
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    # what cannot be told apart is of passes: activations and logits
    apart = *sizes, "activations", "logits", "reserve"
    fixed = sum(size for category, size in planned.items() if category not in apart)
    sizes["activations"] = max(0, used - fixed - sum(sizes.values()))
    may = planned | {"activations": planned.get("activations", 0) + planned.get("logits", 0)}
    over = {c: size - may.get(c, 0) for c, size in sizes.items() if size > may.get(c, 0)}
    if over:
        worst = max(over, key=over.get)
        what = f"{worst} took {sizes[worst] / 1e9:.2f} GB where the plan had {may.get(worst, 0) / 1e9:.2f}"
    else:
        what = "no category is above the plan: other processes, or gaps between tensors, take the rest"
    # flags with which the plan has as much room more as was missing
    missing = max(sum(over.values()), 0.02 * there)
    smaller = max(1e9, min(there, sum(planned.values())) - missing)
    found = remedies(name, config, model_config, env_config, world, smaller, host)
    first = (f"{as_flags(found[0][0])} ({'; '.join(found[0][1].values())})" if found
             else "--max_tokens_per_pass, --max_rows, --cache_gb")
    return f"{line} at the {when}: {what}; lower first: {first}; {name}.py --plan shows it all"
