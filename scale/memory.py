"""Memory in a run: who holds the weights, how large the rollouts' cache is, and what to do when it runs out.

All of it follows from the plan (scale/plan.py), which counts before anything is loaded.
"""

import gc
import re
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common import choose_dtype
from generation import KVCache
from model import Policy
from scale import estimates as of
from scale.devices import free_bytes, gpu_bytes, host_here
from scale.masters import MasterWeights
from scale.plan import RESERVE, as_flags, choose, make_plan, read_settings, remedies

RUNS = []  # what `plan_run` decided last: (device, arguments of `make_plan`)


def plan_run(name, config, model, world, device):
    """Leaves it to the plan who holds the weights, where the flags do; the first process decides for all.
    Returns (the changed config, a line that says what was chosen). A CPU, whose memory is the host's, is
    planned for only if --gpu_gb says what there is. Raises PolicyError."""
    there = config.gpu_gb * 1e9 if config.gpu_gb else gpu_bytes(device)
    if not there:
        return config, None
    host = config.host_gb * 1e9 if config.host_gb else host_here()
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    given = *read_settings(model, config), world, there, host
    box = [choose(name, replace(config, dtype=dtype), *given)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0, device=device)
    chosen, line = box[0]
    RUNS[:] = [(device, (name, chosen, *given))]
    return replace(chosen, dtype=config.dtype), line


# ------------------------------------------------------------------------------------------ the cache's size
def auto_cache_gb(policy, config, later=0):
    """`--cache_gb auto` of this process: what is free once the model is loaded, less what rollouts need
    beside the cache and `later` bytes. 1e9 bytes; at least room for one episode."""
    s = of.sizes_of(policy.hf.config, 0)
    item, frame = policy.dtype.itemsize, policy.env_config.max_pixels // policy.frame_unit ** 2
    beside = of.rollout_activations(s, frame, item) + of.decode_logits(s, config.max_rows, item) + RESERVE
    prompt = policy.env_config.overview_max_frames * frame + of.PROMPT_TEXT
    row = of.cache_token(s, item) * (prompt + config.max_response_tokens)
    return of.auto_cache(s, item, free_bytes(policy.device) - beside - later, row, config.max_rows) / 1e9


def auto_cache_of_run(weights, config):
    """The same of a run: of all its processes the smallest, beside what will be on the device and is not
    there yet: moments, features, gathered weights."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in weights.parameters]
    later = 2 * sum(p.nbytes for p in local if p.device == weights.policy.device)
    planned = make_plan(*RUNS[0][1]).rollout if RUNS else {}
    later += planned.get("features", 0) + planned.get("gathered weights", 0)
    size = torch.tensor(auto_cache_gb(weights.policy, config, later), device=weights.policy.device)
    if dist.is_initialized():
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return round(size.item(), 2) or size.item()


# ------------------------------------------------------------------------------------------ when it runs out
def ran_out(error):
    """Whether an exception says that memory did."""
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def when_of(error):
    """What the run did when an exception came: rollout, update, loading or exporting."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(frame.f_globals["__name__"] == "rollout" for frame in frames):
        return "rollout"
    names = {frame.f_code.co_name for frame in frames}
    return "loading" if "load_weights" in names else "exporting" if "_save" in names else "update"


def held(device):
    """{category of the plan: bytes} that this process has on a device, of what can be told apart."""
    def size(tensors):
        storages = [t.untyped_storage() for t in tensors if t.device == device]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    there = [o for o in gc.get_objects() if issubclass(type(o), (Policy, MasterWeights, KVCache))]
    weights = [o for o in there if isinstance(o, MasterWeights)]
    gradients = [p.grad for o in weights for p in o.parameters if p.grad is not None]
    gradients += [g for o in weights for g in getattr(o, "gradients", {}).values()]  # offloaded
    return {"features": size([f for o in there if isinstance(o, Policy) for f in o.features.values()]),
            "gradients": size(gradients),
            "cache": size([t for o in there if isinstance(o, KVCache) for t in o.tensors()])}


def above(planned, sizes, error):
    """{category: (bytes held, bytes planned)} of what is above the plan. Of passes (activations and logits,
    which cannot be told apart) what PyTorch says in its error that it has, less the rest."""
    said = re.search(r"allocated memory ([\d.]+) ([GM])iB is allocated by PyTorch", str(error))
    may = planned | {"activations": planned.get("activations", 0) + planned.get("logits", 0)}
    if said:
        rest = {category: size for category, size in planned.items()
                if category not in ("activations", "logits", "reserve")}
        used = float(said[1]) * 2 ** {"G": 30, "M": 20}[said[2]]
        sizes = sizes | {"activations": max(0, used - sum((rest | sizes).values()))}
    return {c: (size, may.get(c, 0)) for c, size in sizes.items() if size > may.get(c, 0)}


def explain(error):
    """One line for memory that ran out: what was above the plan, and what to lower first."""
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ [GMK]iB)", str(error))
    line = "out of memory" + (f", where {asked[1]} more were asked for," if asked else "")
    if not RUNS:
        return f"{line} lower --max_rows, --cache_gb or --max_tokens_per_pass; sft.py and rl.py have a --plan"
    device, (*run, there, host) = RUNS[0]
    plan, when = make_plan(*run, there, host), when_of(error)
    if device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
        largest = sorted(plan.host, key=plan.host.get, reverse=True)[:2]
        sizes = ", ".join(f"{part} {plan.host[part] / 1e9:.1f}" for part in largest)
        line += f" on the host at {when}: the plan has {sum(plan.host.values()) / 1e9:.1f} GB there ({sizes})"
        host = 0.95 * min(host, sum(plan.host.values()))
    else:
        planned = {"rollout": plan.rollout}.get(when, plan.update)
        over = above(planned, held(device), error) if when in ("rollout", "update") else {}
        line += f" at {when}: "
        if over:
            worst = max(over, key=lambda category: over[category][0] - over[category][1])
            size, may = over[worst]
            line += f"{worst} took {size / 1e9:.2f} GB where the plan had {may / 1e9:.2f}"
        else:
            line += "no category is above the plan; others, or gaps between tensors, take the rest"
        missing = max(sum(size - may for size, may in over.values()), 0.02 * there)
        there = max(1e9, min(there, sum(planned.values())) - missing)
    found = remedies(*run, there, host)  # flags for a plan with so much less
    first = (f"{as_flags(found[0][0])} ({'; '.join(found[0][1].values())})" if found
             else "--max_tokens_per_pass, --max_rows, --cache_gb")
    return f"{line}; lower first: {first}; {run[0]}.py --plan shows it all"
