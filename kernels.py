"""The decoder layers in Triton: what generation runs on CUDA, for prompts, replies and single tokens (not with
--no-cuda_graphs, and not in training).

With transformers' layers and plain attention, a decode step of Qwen2.5-VL-3B with 16 rows is some 2,400 launches, and the
scores of attention, which are written and read again several times, move as many bytes as the weights and the cache. Here
a layer is 12 launches and moves little besides its weights and its part of the cache:

    add_norm -> q, k, v in one product -> rotate, store -> attend to prompts, attend to own -> combine -> product
    add_norm -> gate and up in one product -> silu_times -> product

In decoding, attention is over two caches (see model.KVCache), so it is computed in parts, each with the logarithm of its
softmax's denominator, which `combine` joins (flash decoding, arXiv 2311.01282; prompts that rows share, arXiv 2402.05099).
A part of a prompt is read once for all rows that share it.

Equal to the plain layers up to rounding; tests/test_kernels.py compares them in Triton's interpreter, without a GPU.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what has always been; unset, Triton 3.9 warns of a change
import triton
import triton.language as tl

PROGRAMS = 512  # about as many as attention is divided into: several for each multiprocessor of a large GPU
TILE = 64  # keys that a program reads at a time


@triton.jit
def add_norm_kernel(hidden, delta, weight, out, H, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """hidden += delta; out = RMSNorm(hidden) * weight. One program a row of (N, H)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(hidden + row * H + i, mask=i < H, other=0.0)
    if HAS_DELTA:
        x = (x.to(tl.float32) + tl.load(delta + row * H + i, mask=i < H, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(hidden + row * H + i, x, mask=i < H)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)).to(x.dtype)
    y = tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32) * normed.to(tl.float32)
    tl.store(out + row * H + i, y.to(out.dtype.element_ty), mask=i < H)


@triton.jit
def rotate_kernel(qkv, cos, sin, stride, ROTATED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rotary embedding of the first ROTATED heads of qkv (N, all heads, D), in place; cos and sin (N, D). One program a
    token."""
    row = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, BLOCK)[:, None], tl.arange(0, D // 2)[None, :]
    at = qkv + row * stride + head * D + i
    a = tl.load(at, mask=head < ROTATED, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=head < ROTATED, other=0.0).to(tl.float32)
    cos_a, sin_a = tl.load(cos + row * D + i).to(tl.float32), tl.load(sin + row * D + i).to(tl.float32)
    cos_b, sin_b = tl.load(cos + row * D + D // 2 + i).to(tl.float32), tl.load(sin + row * D + D // 2 + i).to(tl.float32)
    tl.store(at, (a * cos_a - b * sin_a).to(qkv.dtype.element_ty), mask=head < ROTATED)
    tl.store(at + D // 2, (b * cos_b + a * sin_b).to(qkv.dtype.element_ty), mask=head < ROTATED)


@triton.jit
def store_kernel(key, value, lengths, key_cache, value_cache, stride, row_stride, head_stride, D: tl.constexpr):
    """One token's key and value of each row, (B, kv heads, D) with stride, to the place lengths[row] of the caches
    (rows, kv heads, capacity, D). One program a row and head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    to = row * row_stride + head * head_stride + tl.load(lengths + row) * D + d
    tl.store(key_cache + to, tl.load(key + row * stride + head * D + d).to(key_cache.dtype.element_ty))
    tl.store(value_cache + to, tl.load(value + row * stride + head * D + d).to(value_cache.dtype.element_ty))


@triton.jit
def attend_kernel(query, key_cache, value_cache, members, lengths, out, log_sums, query_stride, place_stride, head_stride,
                  group_size, chunk, first_part, num_parts, scale, PER_KEY: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Attention of query (B, heads, D) to one chunk of a cache (places, kv heads, capacity, D) by the rows that share a place.

    members (places, group_size): those rows, -1 for none; lengths (B,): how many positions a row sees; PER_KEY queries of a
    row share a key; ROWS: rows that a program takes. Writes its part of out (B, heads, parts, D), normalised, and of
    log_sums (B, heads, parts), the logarithms of the sums that it was divided by, -inf for a chunk that is beyond the length."""
    tiles = tl.cdiv(group_size, ROWS)
    place, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, part = tl.program_id(1), tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    member = tile * ROWS + m // PER_KEY
    mine = (m < ROWS * PER_KEY) & (member < group_size)
    row = tl.load(members + place * group_size + member, mask=mine, other=-1)
    mine = mine & (row >= 0)
    length = tl.max(tl.load(lengths + row, mask=mine, other=0), 0).to(tl.int32)
    if length == 0:  # nobody is here
        return
    at = (row * HEADS + head * PER_KEY + m % PER_KEY) * num_parts + first_part + part
    begin = part * chunk
    if begin >= length:
        tl.store(log_sums + at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=mine)
        return
    end = tl.minimum(begin + chunk, length)
    d, n = tl.arange(0, D), tl.arange(0, BLOCK_N)
    q = tl.load(query + (row * query_stride + (head * PER_KEY + m % PER_KEY) * D)[:, None] + d[None, :], mask=mine[:, None],
                other=0.0).to(key_cache.dtype.element_ty)
    base = place.to(tl.int64) * place_stride + head.to(tl.int64) * head_stride
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        seen = start + n < end
        offsets = base + (start + n)[:, None] * D + d[None, :]
        k = tl.load(key_cache + offsets, mask=seen[:, None], other=0.0)
        v = tl.load(value_cache + offsets, mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        p, shrink = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        most = higher
    tl.store(out + at[:, None] * D + d[None, :], result / total[:, None], mask=mine[:, None])
    tl.store(log_sums + at, most + tl.log(total), mask=mine)


@triton.jit
def combine_kernel(parts, log_sums, out, num_parts, D: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over parts p of parts[i, p] * softmax(log_sums[i])[p], (B * heads, D). One program a row and head."""
    i = tl.program_id(0)
    s, d = tl.arange(0, BLOCK), tl.arange(0, D)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, num_parts, BLOCK):
        most = tl.maximum(most, tl.load(log_sums + i * num_parts + start + s, mask=start + s < num_parts, other=float("-inf")))
    highest = tl.max(most, 0)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([D], tl.float32)
    for start in range(0, num_parts, BLOCK):
        log_sum = tl.load(log_sums + i * num_parts + start + s, mask=start + s < num_parts, other=float("-inf"))
        weight = tl.exp(log_sum - highest)
        part = tl.load(parts + (i * num_parts + start + s)[:, None] * D + d[None, :], mask=(weight > 0)[:, None], other=0.0)
        total += weight
        result += tl.sum(part * weight[:, None], 0)
    tl.store(out + i * D + d, (result / tl.sum(total, 0)).to(out.dtype.element_ty))


@triton.jit
def silu_times_kernel(gate_up, out, SIZE, BLOCK: tl.constexpr):
    """out = silu(gate) * up; gate_up (N, 2 * SIZE)."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * SIZE + i, mask=i < SIZE, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, mask=i < SIZE, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * SIZE + i, (silu.to(tl.float32) * up.to(tl.float32)).to(out.dtype.element_ty), mask=i < SIZE)


def run_layers(policy, ids, is_image, features, positions, attend):
    """`model.run_layers` without gradients, for a policy as `model.generation_copy` makes it: the same arguments and result.
    B = 1 or T = 1."""
    lm = policy.language_model
    hidden = lm.embed_tokens(ids)
    if features is not None:
        hidden = hidden.masked_scatter(is_image[..., None], features.to(hidden.dtype))
    (B, T), N, H = ids.shape, ids.numel(), hidden.shape[2]
    cos, sin = (x.reshape(N, -1).contiguous() for x in lm.rotary_emb(hidden, positions))
    D, heads, kv_heads = cos.shape[1], lm.config.num_attention_heads, lm.config.num_key_value_heads
    dtype, hidden, delta = lm.layers[0].self_attn.qkv[0].dtype, hidden.view(N, H), None

    def add_norm(norm):
        out = torch.empty(N, H, dtype=dtype, device=hidden.device)
        add_norm_kernel[(N,)](hidden, hidden if delta is None else delta, norm.weight, out, H, norm.variance_epsilon,
                              HAS_DELTA=delta is not None, BLOCK=triton.next_power_of_2(H), num_warps=8)
        return out

    for layer in lm.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = F.linear(add_norm(layer.input_layernorm), *attention.qkv)  # (N, (heads + 2 kv heads) * D)
        rotate_kernel[(N,)](qkv, cos, sin, qkv.stride(0), ROTATED=heads + kv_heads,
                            BLOCK=triton.next_power_of_2(heads + kv_heads), D=D)
        q, k, v = (x.view(B, T, -1, D).transpose(1, 2) for x in qkv.split([heads * D, kv_heads * D, kv_heads * D], dim=1))
        out = attend(attention.layer_idx, q, k, v).reshape(N, heads * D)
        delta = F.linear(out.to(dtype), attention.o_proj.weight, attention.o_proj.bias)

        gate_up = F.linear(add_norm(layer.post_attention_layernorm), *mlp.gate_up)
        size = gate_up.shape[1] // 2
        out = torch.empty(N, size, dtype=dtype, device=hidden.device)
        silu_times_kernel[(N, triton.cdiv(size, 1024))](gate_up, out, size, BLOCK=1024)
        delta = F.linear(out, mlp.down_proj.weight, mlp.down_proj.bias)
    return lm.norm(hidden + delta).view(B, T, H)


@dataclass
class Plan:
    """How attention to one of the caches is divided."""

    rows: int  # that a program takes
    block: int  # queries of a program, with padding: a power of two, at least 16
    programs: int  # for each head and part
    chunk: int  # positions of a part
    parts: int


def plan(places, group_size, capacity, per_key, kv_heads):
    block = max(16, triton.next_power_of_2(min(group_size * per_key, 128)))
    rows = max(1, block // per_key)
    programs = places * triton.cdiv(group_size, rows)
    chunk = max(256, triton.cdiv(capacity * programs * kv_heads, PROGRAMS * TILE) * TILE)
    return Plan(rows, block, programs, chunk, triton.cdiv(capacity, chunk))


def decode_layers(policy, cache, state, P, L):
    """`model.decode_layers` for a policy as `model.generation_copy` makes it."""
    slots, group_size = state["slots"], cache.group_size
    B, device = len(slots), slots.device
    _, places, kv_heads, _, D = cache.prompts[0].shape
    heads = policy.language_model.config.num_attention_heads
    per_key = heads // kv_heads
    rows = torch.arange(B, device=device)
    members = torch.full((places * group_size + 1,), -1, device=device)
    members.scatter_(0, slots.masked_fill(slots < 0, places * group_size), rows)  # a surplus row goes to the last place
    own_seen = (state["own_lengths"] + 1).masked_fill(slots < 0, 1)
    of_prompts, of_own = plan(places, group_size, P, per_key, kv_heads), plan(B, 1, L, per_key, kv_heads)
    num_parts = of_prompts.parts + of_own.parts
    parts = torch.empty(B * heads, num_parts, D, device=device)
    log_sums = torch.full((B * heads, num_parts), float("-inf"), device=device)  # a surplus row has no prompt

    def attend_part(plan, query, key_value, members, lengths, group_size, first_part):
        attend_kernel[(plan.programs, kv_heads, plan.parts)](
            query, key_value[0], key_value[1], members, lengths, parts, log_sums, query.stride(0), key_value.stride(1),
            key_value.stride(2), group_size, plan.chunk, first_part, num_parts, D ** -0.5, PER_KEY=per_key, HEADS=heads, D=D,
            ROWS=plan.rows, BLOCK_M=plan.block, BLOCK_N=TILE, num_warps=8 if plan.block > 64 else 4, num_stages=2)

    def attend(layer, query, key, value):
        prompts, own = cache.prompts[layer], cache.own[layer]
        store_kernel[(B, kv_heads)](key, value, state["own_lengths"], own[0], own[1], key.stride(0), own.stride(1),
                                    own.stride(2), D=D, num_warps=1)
        attend_part(of_prompts, query, prompts, members, state["prompt_lengths"], group_size, 0)
        attend_part(of_own, query, own, rows, own_seen, 1, of_prompts.parts)
        out = torch.empty(B, 1, heads, D, dtype=own.dtype, device=device)
        combine_kernel[(B * heads,)](parts, log_sums, out, num_parts, D=D, BLOCK=16)
        return out

    return run_layers(policy, state["tokens"][:, None], None, None, state["positions"].expand(3, B)[..., None], attend)[:, 0]
