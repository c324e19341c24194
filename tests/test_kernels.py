"""The kernels of the decode step against the plain layers. Without a GPU they run in Triton's interpreter."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import rollout as engine  # noqa: E402

DEVICE, HALF = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)  # the interpreter's dot has no bfloat16


def make_policy(heads, kv_heads, D, dtype):
    """The decoder alone, with random weights (norms and biases, too), as generation_copy makes it."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [D // 8, D // 4 - D // 8, D // 4]}
    hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(vocab_size=50, hidden_size=heads * D, intermediate_size=72, num_hidden_layers=2, rope_parameters=rope,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=0.3),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, out_hidden_size=heads * D, intermediate_size=32)))
    for name, p in hf.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    hf.to(DEVICE)
    hf.model.language_model.config._attn_implementation = "zoom"
    policy = types.SimpleNamespace(hf=hf, device=torch.device(DEVICE), language_model=hf.model.language_model,
                                   visual=hf.model.visual, autocast=lambda: torch.autocast(DEVICE, dtype, dtype != torch.float32))
    return engine.generation_copy(policy, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.no_grad()
def test_a_prefill_equals_the_plain_layers(kernels, dtype):
    """Several tokens, some of them of an image, with positions in time, height and width."""
    policy = make_policy(14, 2, 16, dtype)
    generator, T = torch.Generator().manual_seed(1), 37
    ids, positions = torch.randint(50, (1, T), generator=generator), torch.randint(1000, (3, 1, T), generator=generator)
    is_image, features = torch.arange(T)[None] % 3 == 1, torch.randn(12, 224, generator=generator)
    values, seen = [], []

    def attend(layer, query, key, value):
        seen.append([layer, key.clone(), value.clone()])
        return model.causal_attention(query, key, value).transpose(1, 2)

    for layers in (engine.run_layers, kernels.run_layers):
        values.append(layers(policy, *(x.to(DEVICE) for x in (ids, is_image, features, positions)), attend))
    check_close(values, dtype)
    for (layer, *plain), (ours_layer, *ours) in zip(seen[:2], seen[2:], strict=True):
        assert layer == ours_layer
        for pair in zip(plain, ours):
            check_close(pair, dtype)


def check_close(pair, dtype):
    plain, ours = (x.float() for x in pair)
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    assert plain.shape == ours.shape and (plain - ours).norm() < tolerance * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("heads,kv_heads,D,group_size", [(4, 2, 32, 3), (14, 2, 16, 20), (2, 2, 16, 1)])
@torch.no_grad()
def test_a_decode_step_equals_the_plain_layers(kernels, heads, kv_heads, D, group_size, dtype):
    """Rows in any order and of any length, some of a group gone, an empty place, a surplus row; prompts and own tokens of
    several chunks; 14 heads to 2 keys, 20 rows to a prompt: more queries than a program takes."""
    policy = make_policy(heads, kv_heads, D, dtype)
    generator = torch.Generator().manual_seed(1)
    P, L, places = 530, 300, 3
    slots = torch.cat([torch.randperm(group_size, generator=generator)[:17], 2 * group_size + torch.arange(group_size)[:3]])
    slots = torch.cat([slots, torch.tensor([-1])])
    B = len(slots)
    prompt_length = torch.tensor([530, 1, 200])
    state = {"tokens": torch.randint(50, (B,), generator=generator),
             "positions": torch.randint(1000, (B,), generator=generator),
             "own_lengths": torch.randint(L - 1, (B,), generator=generator),
             "prompt_lengths": prompt_length[slots.clamp(min=0) // group_size], "slots": slots}
    state["own_lengths"][:2] = torch.tensor([0, L - 2])
    state["own_lengths"][-1], state["prompt_lengths"][-1] = L - 1, 1
    state = {name: value.to(DEVICE) for name, value in state.items()}
    results = []
    for layers in (engine.decode_layers, kernels.decode_layers):
        cache = engine.KVCache.__new__(engine.KVCache)
        cache.group_size = group_size
        generator.manual_seed(2)
        random = lambda *shape: [torch.randn(2, *shape, D, generator=generator).to(DEVICE, dtype) for _ in range(2)]
        cache.prompts, cache.own = random(places, kv_heads, P), random(B, kv_heads, L)
        hidden = layers(policy, cache, {name: value.clone() for name, value in state.items()}, P, L)
        assert hidden.isfinite().all()
        results.append([hidden[:-1], *(own[:, :-1] for own in cache.own)])
    for pair in zip(*results):
        check_close(pair, dtype)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile_for_gpus(capability):
    """Down to machine code, for the shapes of Qwen2.5-VL-7B, with no more shared memory than such GPUs have."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, str(capability)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 10 and max(shared) < {80: 163, 90: 227, 120: 99}[capability] * 1024


def compile_kernels(capability):
    import triton

    import kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def build(kernel, pointers, sizes, constants, **options):
        names = kernel.arg_names
        types = {name: "constexpr" for name in constants} | pointers | {name: "i32" for name in sizes}
        types |= {name: "fp32" for name in names if name not in types}
        source = ASTSource(kernel, {name: types[name] for name in names}, {(names.index(n),): v for n, v in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert built.asm["cubin"]
        print(kernel.fn.__name__, built.metadata.shared)

    half, single, whole = "*bf16", "*fp32", "*i64"
    for residual in (half, single):
        build(kernels.add_norm_kernel, dict(hidden=residual, delta=half, weight=residual, out=half), ["H"],
              dict(HAS_DELTA=True, BLOCK=4096), num_warps=8)
        build(kernels.rotate_kernel, dict(qkv=half, cos=residual, sin=residual), ["stride"], dict(ROTATED=32, BLOCK=32, D=128))
    build(kernels.store_kernel, dict(key=half, value=half, lengths=whole, key_cache=half, value_cache=half),
          ["stride", "row_stride", "head_stride"], dict(D=128), num_warps=1)
    for group_size in (1, 4, 16):
        plan = kernels.plan(1, group_size, 8000, 7, 4)
        build(kernels.attend_kernel, dict(query=half, key_cache=half, value_cache=half, members=whole, lengths=whole, out=single,
              log_sums=single), ["query_stride", "place_stride", "head_stride", "group_size", "chunk", "first_part", "num_parts"],
              dict(PER_KEY=7, HEADS=28, D=128, ROWS=plan.rows, BLOCK_M=plan.block, BLOCK_N=kernels.TILE),
              num_warps=8 if plan.block > 64 else 4, num_stages=2)
    build(kernels.combine_kernel, dict(parts=single, log_sums=single, out=half), ["num_parts"], dict(D=128, BLOCK=16))
    build(kernels.silu_times_kernel, dict(gate_up=half, out=half), ["SIZE"], dict(BLOCK=1024))


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]))
