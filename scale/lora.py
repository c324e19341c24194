"""LoRA (arXiv 2106.09685): small trained matrices beside frozen weights.

    y = W x + (alpha / rank) * B A x        A: (rank, in), B: (out, rank), at first 0; alpha is 2 * rank

    rl.py --lora_rank 16 --lr 1e-5 ...      rank 0: all weights are trained

The base stays in the compute dtype, so the reference is the base without adapters and costs nothing, and only
the adapters have float32 master weights, gradients and moments. Rollouts run unmerged: merging into bfloat16,
whose spacing at 0.02 is 1.2e-4, would round the update away. What is exported has the adapters merged, in
float32 and then cast; beside it, in --out/adapter, they stand as the peft library reads them. Each process
has the whole base.

Departures from peft: none in the forward pass without dropout, nor in how A begins.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common import write_json
from model import Policy
from training.checkpoints import save_policy
from training.safe_files import set_mode
from training.weights import MasterWeights

ALPHA = 2.0  # alpha / rank: how often an adapter counts
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRAWeights(MasterWeights):
    """MasterWeights of a policy with adapters; its reference is the same without them.

    Args:
        name: of the base. config: a TrainConfig, with lora_rank above 0."""

    def __init__(self, policy, name, config, with_reference):
        self.name, self.config = name, config
        add_adapters(policy, config.lora_rank, ALPHA * config.lora_rank)
        super().__init__(policy, without_adapters(policy) if with_reference else None)

    def export(self, path):
        save_policy(merge(self.policy, self.master_weights), path)
        save_adapter(self.master_weights, self.name, self.config, Path(path) / "adapter")

    def describe(self):
        return f"{super().describe()}, adapters of rank {self.config.lora_rank}"


class LoRALinear(torch.nn.Module):
    """A frozen linear layer, `base`, with an adapter."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        like = dict(device=base.weight.device, dtype=base.weight.dtype)
        self.lora_A = torch.nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank, **like))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):  # (.., in) to (.., out)
        adapter = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        if self.base.bias is not None:
            adapter = adapter + self.base.bias
        # added within the base's product, which rounds the sum once: another rounding would widen the
        # train-inference mismatch
        return torch.addmm(adapter.flatten(0, -2), x.flatten(0, -2), self.base.weight.T).view(adapter.shape)


def add_adapters(policy, rank, alpha):
    """Freezes a policy and puts adapters beside the language model's linear layers, TARGETS, in place.
    Returns the policy."""
    policy.requires_grad_(False)
    for module in list(policy.language_model.modules()):
        for name, linear in list(module.named_children()):
            if name in TARGETS:
                setattr(module, name, LoRALinear(linear, rank, alpha))
    return policy


def without_adapters(policy):
    """The frozen policy beside which adapters were put: of the same tensors, so it takes no memory."""
    tensors = [*policy.hf.parameters(), *policy.hf.buffers()]
    memo = {id(tensor): tensor for tensor in tensors}  # deepcopy's own: what it names is not copied
    hf = copy.deepcopy(policy.hf, memo)
    for module in list(hf.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.base)
    return Policy(hf.eval(), policy.tokenizer, policy.image_processor, policy.env_config)


@torch.no_grad()
def merge(policy, master_weights):
    """A policy without adapters, whose weights do what they did, on the CPU where they differ.
    master_weights: {name of a parameter of the policy: its float32 master weight}."""
    merged = without_adapters(policy)
    for name, module in policy.hf.named_modules():
        if isinstance(module, LoRALinear):
            A, B = (master_weights[f"hf.{name}.lora_{letter}"] for letter in "AB")
            weight = (module.base.weight.float() + module.scale * (B @ A)).to(policy.dtype).cpu()
            merged.hf.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    return merged


def save_adapter(master_weights, name, config, path):
    """Writes the adapters as the peft library has them: `PeftModel.from_pretrained(base, path)`."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{key.removeprefix('hf.')}.weight": master.detach().cpu().contiguous()
               for key, master in master_weights.items()}
    temporary = path / "adapter_model.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    set_mode(temporary)
    temporary.rename(path / "adapter_model.safetensors")
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(name),
        "r": config.lora_rank, "lora_alpha": ALPHA * config.lora_rank, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        # the vision tower has layers of these names, too
        "target_modules": rf".*language_model.*\.({'|'.join(TARGETS)})"})
