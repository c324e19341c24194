"""What scale/plan.py counts, against PyTorch's memory trackers.

    python bench/bench_plan.py           a table of plan and tracker, and the largest difference of each part

The rows are 3B and 7B, SFT and RL, plain, in shards, with a part on the host and with adapters. No weights
and no GPU: tensors are fake, they have shapes and no memory. The pass is the project's own; the tracker's
known limits are worked around here:

- It cannot hook a module that autograd calls again (the head, in chunks): the head is called without hooks.
- PyTorch's lower-right causal mask is no fake tensor: a stand-in calls the same flash attention as CUDA does.
- It looks for the peak of each module after each operation (minutes): here for the one of all.
"""

import argparse
import itertools
import os
import sys
import warnings
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as model_module
import rl
import sft
from demo.tiny_base import make_tokenizer
from model import Dialogue, Policy, token_log_probs
from scale import sharding
from scale.lora import LoRAWeights
from scale.offload import OffloadedWeights, reference_of
from scale.plan import make_plan
from training.weights import MasterWeights
from video import Frame
from zoom_env import EnvConfig

CONFIGS = Path(__file__).parent.parent / "tests" / "configs"
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ models of no memory
class HeadWithoutHooks(torch.nn.Linear):
    def __call__(self, hidden):
        return self.forward(hidden)


class LowerRight:
    """A causal mask, lower right, that exists by what attention does with it."""

    def __init__(self, *lengths):
        pass

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, 0.0, True)[0]


def read_config(name, layers=None):
    """A model's configuration, cut to its first layers."""
    config = AutoConfig.from_pretrained(CONFIGS / name)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def make_policy(model_config, dtype, trained_dtype):
    """A policy of fake tensors; its language model and head in `trained_dtype`."""
    with no_init_weights():
        hf = Qwen2_5_VLForConditionalGeneration._from_config(deepcopy(model_config), dtype=dtype,
                                                             attn_implementation="sdpa")
    if model_config.tie_word_embeddings:
        hf.lm_head.weight = hf.model.language_model.embed_tokens.weight
    if trained_dtype != dtype:
        new = {}  # a tied weight once
        for module in [*hf.model.language_model.modules(), hf.lm_head]:
            for name, p in [*module.named_parameters(recurse=False)]:
                new.setdefault(p, torch.nn.Parameter(torch.empty(p.shape, dtype=trained_dtype)))
                module.register_parameter(name, new[p])
    hf.lm_head.__class__ = HeadWithoutHooks
    return Policy(hf.eval(), make_tokenizer(["a b"], vocab_size=300), None, EnvConfig())


def make_dialogue(policy, tokens):
    """Half of it frames of 128 tokens, half of it trained."""
    dialogue, hidden = Dialogue(), policy.language_model.config.hidden_size
    for _ in range(tokens // 256):
        image = torch.empty(3, 8 * policy.frame_unit, 16 * policy.frame_unit)
        dialogue.add_frame(Frame(0.0, image), policy.image_pad, policy.frame_unit)
        dialogue.features.append(torch.empty(128, hidden, dtype=policy.dtype))
    dialogue.prompt_length = len(dialogue.ids)
    dialogue.add([policy.im_end] * (tokens - len(dialogue.ids)), trained=True)
    return dialogue


# ------------------------------------------------------------------------------------ one update
def quick(tracker_class):
    """The tracker without peaks of single modules."""
    class Tracker(tracker_class):
        def _update_peak_stats(self, state):
            for device, now in self._curr_mem_snap.items():
                if self._peak_mem.get(device, 0) < now["Total"]:
                    self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

        def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
            nothing = torch.nn.Module().register_forward_hook(lambda *_: None)
            for p in module.parameters():  # it would hook those that have no gradients
                if not p.requires_grad:
                    self._param_to_grad_hook_handles[p] = nothing, nothing
            return super()._track_module_params_and_buffers(module, install_grad_hooks)

        def begin(self):
            """From here on the peak counts; returns what there is."""
            self.reset_mod_stats()
            self._peak_mem.clear(), self._peak_mem_snap.clear()
            return self.numbers("current")

        def numbers(self, which):
            snapshot = self.get_tracker_snapshot(which).get(CPU, {})
            return {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}

    return Tracker


def track(name, config, processes, tokens, layers=None):
    """(what is there before a pass of `tokens`, what is there at the peak of the pass), dicts of bytes by the
    tracker's names: after an update, with the gradients of another pass there, as in the second pass of a
    later update."""
    model_config = read_config(name, layers)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    is_rl = hasattr(config, "kl_weight")
    if in_shards := config.shard in ("all", "node"):
        from torch.testing._internal.distributed.fake_pg import FakeStore
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        os.environ["LOCAL_WORLD_SIZE"] = str(min(processes, 8))
        mesh = sharding.make_mesh(config.shard, CPU)
    mask, model_module.causal_lower_right = model_module.causal_lower_right, LowerRight
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy = make_policy(model_config, dtype, torch.float32 if in_shards else dtype)
            if config.gradient_checkpointing:
                policy.checkpoint_layers()
            reference = None
            if in_shards:
                if is_rl and config.kl_weight:
                    reference = make_policy(model_config, dtype, dtype)
                    reference.hf.model.visual = policy.visual
                    sharding.wrap(reference.requires_grad_(False), mesh, dtype)
                sharding.wrap(policy.freeze_vision(), mesh, dtype)
                weights = sharding.ShardedWeights(policy, policy, reference, mesh)
            elif "optimizer" in config.offload:
                if is_rl and config.kl_weight:
                    reference = reference_of(policy, "reference" in config.offload)
                policy.freeze_vision()

                def read(name):
                    return policy.get_parameter(name).detach()

                weights = OffloadedWeights(policy, read, reference)
            elif config.lora_rank:
                weights = LoRAWeights(policy, name, config, is_rl and config.kl_weight > 0)
            else:
                if is_rl and config.kl_weight:
                    reference = policy.frozen_copy()
                weights = MasterWeights(policy.freeze_vision(), reference)
            optimizer = torch.optim.AdamW(weights.parameters, lr=1e-6, fused=True)
            policy.train()
            if in_shards:
                tracker = quick(FSDPMemTracker)(policy, optimizer)
            else:
                tracker = quick(MemTracker)()
                on_device = not isinstance(weights, OffloadedWeights)
                master_weights = torch.nn.ParameterList(weights.parameters if on_device else [])
                references = [weights.reference] if weights.reference else []
                tracker.track_external(policy, master_weights, *references)

            def one_pass(length):
                batch, entropy = [[make_dialogue(policy, length)]], is_rl and config.entropy_weight != 0
                log_probs, entropies = token_log_probs(policy, batch, 1.0, entropy)
                if weights.reference is not None:
                    with torch.no_grad():
                        token_log_probs(weights.reference, batch)
                (log_probs.sum() + (entropies.sum() if entropy else 0)).backward()

            with tracker:
                one_pass(256)
                if not isinstance(weights, OffloadedWeights):
                    optimizer.step()
                    weights.cast()
                if not in_shards:  # it takes the master weights' gradients for something passing
                    tracker.track_external(master_weights, *getattr(weights, "gradients", {}).values())
                before = tracker.begin()
                one_pass(tokens)
                on_host = [*getattr(weights, "slabs", ()), *getattr(weights, "staging", ())]
                before["Host"] = sum(tensor.nbytes for tensor in on_host)
                return before, tracker.numbers("peak")
    finally:
        model_module.causal_lower_right = mask
        if in_shards:
            dist.destroy_process_group()
            del os.environ["LOCAL_WORLD_SIZE"]


# ------------------------------------------------------------------------------------ plan and tracker
def compare(name, config, processes, tokens, layers=None):
    """{what: (bytes of the plan, bytes of the tracker)} of an update with passes of `tokens`."""
    config = replace(config, max_tokens_per_pass=tokens)
    stage = "rl" if hasattr(config, "kl_weight") else "sft"
    whole = make_plan(stage, config, read_config(name, layers), EnvConfig(), processes, 1e15, 1e15)
    plan = whole.update
    before, peak = (defaultdict(int, numbers) for numbers in track(name, config, processes, tokens, layers))

    def of(*names):
        return sum(plan.get(name, 0) for name in names)

    above = peak["Total"] - before["Total"]
    if config.shard in ("all", "node"):
        gathered = peak["Unsharded Param"] + peak["All Gather"]
        return {"master weights": (of("master weights"), before["Sharded Param"]),
                "gradients": (of("gradients"), before["Sharded Grad"]),
                "moments": (of("moments"), before["OptState"]),
                "reference": (of("reference"), before["Activation"]),  # FSDP's tracker knows no other name
                "gathered": (of("gathered weights"), gathered),
                "activations": (of("activations", "logits", "passing gradients"), above - gathered)}
    if "optimizer" in config.offload:
        return {"weights": (of("compute weights", "reference"), before["Parameter"]),
                "gradients": (of("gradients"), before["Other"]),
                "host": (whole.host["master weights and moments on the host"], before["Host"]),
                "activations": (of("activations", "logits", "passing gradients"), above)}
    return {"weights": (of("compute weights", "master weights", "reference"), before["Parameter"]),
            "gradients": (of("gradients"), before["Gradient"]),
            "moments": (of("moments"), before["Optstate"]),
            "activations": (of("activations", "logits", "passing gradients"), above)}


def settings():
    """(model, Config, its flags, processes, tokens of a pass) of the table."""
    for name, stage, tokens in itertools.product(("3b", "7b"), (sft, rl), (4096, 32_768)):
        for processes, flags in ((1, {"shard": "none"}), (8, {"shard": "all"}), (16, {"shard": "all"}),
                                 (16, {"shard": "node"}), (1, {"offload": ["optimizer"]}),
                                 (1, {"offload": ["optimizer", "reference"]}), (1, {"lora_rank": 16})):
            if stage is rl or "reference" not in flags.get("offload", ()):
                yield name, stage, flags, processes, tokens


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--layers", type=int, help="only so many layers: quicker")
    layers = parser.parse_args().layers
    print("| model | stage | flags | GPUs | tokens | what: plan / tracker, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = defaultdict(float)
    for name, stage, flags, processes, tokens in settings():
        found = compare(f"qwen2.5-vl-{name}", stage.Config(**flags), processes, tokens, layers)
        cells = [f"{what} {plan / 1e9:.2f} / {seen / 1e9:.2f}" for what, (plan, seen) in found.items()
                 if plan or seen]
        # between moments that are about as high, what is gathered and what is passing differ in their shares
        both = [found.pop(what) for what in ("gathered", "activations") if what in found]
        for what, (plan, seen) in (found | {"a pass": [*map(sum, zip(*both))]}).items():
            if seen > 1e6:
                worst[what] = max(worst[what], abs(plan / seen - 1))
        words = " ".join(f"--{flag} {' '.join(value) if isinstance(value, list) else value}"
                         for flag, value in flags.items())
        print(f"| {name} | {stage.__name__} | {words} | {processes} | {tokens:,} | {', '.join(cells)} |",
              flush=True)
    print("\nfarthest off: " + ", ".join(f"{what} {off:.1%}" for what, off in worst.items()))


if __name__ == "__main__":
    main()
