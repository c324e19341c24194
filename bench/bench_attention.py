"""A decode step's attention in other forms, beside the one that the step has. Nothing of this is in use.

    python bench/bench_attention.py                            a layer of 3B: 16 rows, prompt 8,192, own 500
    python bench/bench_attention.py --shape tiny --device cpu  tries the script

One layer of one group: a prompt's keys and values that all rows share, and each row's own. Compute in
bfloat16 on CUDA, each form captured as a CUDA graph there, as the step is.

    two parts     what generation.py: decode_hidden does, compiled: scores from float32 copies of the keys
    own by sums   the same, but scores of own tokens are sums of products of numbers, which need no copy of the
                  keys in float32; uncompiled they would need eight of them
    tuned         the first once more, with the best of the products that Inductor knows (max-autotune), which
                  may read the keys as they are
    bmm           the first, but the scores are a product of bfloat16 that gives float32
                  (torch.bmm(out_dtype=)), and so is the sum of values; compiled, and plain
    varlen_attn   two calls of torch.nn.attention.varlen, joined by their log-sum-exp
    flex          one compiled call of flex_attention with a block mask, over prompt and own tokens in one
                  tensor, all rows as queries

"ours" is a form's time, "peer" that of reading keys and values once, as fast as the fastest copy; the error
is the largest difference from float64. A form that does not run here is a row that says why.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import bench_gpu  # noqa: E402
from common import capture_graph, first_line, has_graphs  # noqa: E402
from on_device import card, device_of, free_unused  # noqa: E402

# rows, heads of keys, queries of each, numbers of a head, tokens of the prompt and of a row
SHAPES = {"3B": (16, 2, 8, 128, 8192, 500), "7B": (16, 4, 7, 128, 8192, 500), "tiny": (4, 2, 2, 32, 64, 12)}


class Layer:
    """A layer's query (B, heads, n, D), prompt (heads, P, D) and own (B, heads, L, D) keys and values."""

    def __init__(self, shape, device, dtype):
        self.sizes = B, heads, n, D, P, L = SHAPES[shape]
        make = lambda *size: torch.randn(*size, device=device, dtype=dtype)
        self.query, self.scale = make(B, heads, n, D), D**-0.5
        self.prompt = make(heads, P, D), make(heads, P, D)
        self.own = make(B, heads, L, D), make(B, heads, L, D)

    def nbytes(self):
        return sum(tensor.nbytes for tensor in (*self.prompt, *self.own))

    def exact(self):
        """In float64, row by row, (B, heads, n, D)."""
        rows = []
        for row, query in enumerate(self.query.double()):
            keys, values = (torch.cat([p, o[row]], dim=1).double() for p, o in zip(self.prompt, self.own))
            rows.append((query @ keys.transpose(1, 2) * self.scale).softmax(-1) @ values)
        return torch.stack(rows)

    def folded(self):
        """The query as the prompt's part has it: all rows' queries of a head, (heads, B * n, D)."""
        return self.query.transpose(0, 1).flatten(1, 2)

    def unfolded(self, of_prompt):
        B, heads, n, _, _, _ = self.sizes
        return of_prompt.view(heads, B, n, -1).transpose(0, 1)


def merge(first, second):
    """Two parts (.., D + 2): sums of values, sum of weights, and what they are relative to."""
    m = torch.maximum(first[..., -1:], second[..., -1:])
    merged = sum(x[..., :-1] * (x[..., -1:] - m).exp() for x in (first, second))
    return merged[..., :-1] / merged[..., -1:]


def two_parts(layer, by_sums=False):
    def part(query, keys, values, by_sums=False):
        if by_sums:
            products = query.float()[..., None, :, :] * keys.float()[..., None, :]  # (.., keys, queries, D)
            scores = products.sum(-1).transpose(-1, -2) * layer.scale
        else:
            scores = query.float() @ keys.float().transpose(-1, -2) * layer.scale
        m = scores.amax(-1, keepdim=True)
        p = (scores - m).exp().to(values.dtype)
        return torch.cat([(p @ values).float(), p.float().sum(-1, keepdim=True), m], dim=-1)

    of_prompt = layer.unfolded(part(layer.folded(), *layer.prompt))
    return merge(of_prompt, part(layer.query, *layer.own, by_sums))


def by_bmm(layer):
    def part(query, keys, values):
        scores = torch.bmm(query, keys.transpose(1, 2), out_dtype=torch.float32) * layer.scale
        m = scores.amax(-1, keepdim=True)
        p = (scores - m).exp().to(values.dtype)
        sums = torch.bmm(p, values, out_dtype=torch.float32)
        return torch.cat([sums, p.float().sum(-1, keepdim=True), m], dim=-1)

    of_own = part(layer.query.flatten(0, 1), *(x.flatten(0, 1) for x in layer.own))
    return merge(layer.unfolded(part(layer.folded(), *layer.prompt)), of_own.unflatten(0, layer.sizes[:2]))


def by_varlen(layer):
    """A function without arguments. Tokens come first there: keys and values are laid out so beforehand."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    B, heads, n, D, P, L = layer.sizes
    numbers = lambda *values: torch.tensor(values, dtype=torch.int32, device=layer.query.device)
    prompt = [x.transpose(0, 1).contiguous() for x in layer.prompt]  # (P, heads, D)
    own = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in layer.own]  # (B * L, heads, D)
    of_prompt = numbers(0, B * n), numbers(0, P), B * n, P
    of_own = numbers(*range(0, B * n + 1, n)), numbers(*range(0, B * L + 1, L)), n, L
    query = layer.query.transpose(1, 2).flatten(0, 1).contiguous()  # (B * n, heads, D)

    def run():
        parts = []
        for keys_values, where in ((prompt, of_prompt), (own, of_own)):
            out, lse = varlen_attn(query, *keys_values, *where, return_aux=AuxRequest(lse=True))
            lse = lse.transpose(0, 1)[..., None]  # (B * n, heads, 1)
            parts.append(torch.cat([out.float(), torch.ones_like(lse), lse], dim=-1))
        return merge(*parts).view(B, n, heads, D).transpose(1, 2)

    return run


def by_flex(layer):
    """A function without arguments. Prompt and own tokens are in one tensor beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, heads, n, D, P, L = layer.sizes
    # own tokens of all rows behind the prompt, (1, heads, P + B * L, D)
    keys, values = (
        torch.cat([p, o.transpose(0, 1).flatten(1, 2)], dim=1)[None] for p, o in zip(layer.prompt, layer.own)
    )

    def sees(batch, head, query, key):
        return (key < P) | ((key - P) // L == query // n)

    mask = create_block_mask(sees, None, None, B * n, P + B * L, device=layer.query.device)
    flex = torch.compile(flex_attention)
    return lambda: layer.unfolded(flex(layer.folded()[None], keys, values, block_mask=mask)[0])


FORMS = {  # a function without arguments, made of a Layer
    "two parts, compiled": lambda layer: torch.compile(lambda: two_parts(layer)),
    "two parts, plain": lambda layer: lambda: two_parts(layer),
    "own by sums, compiled": lambda layer: torch.compile(lambda: two_parts(layer, by_sums=True)),
    "tuned": lambda layer: torch.compile(lambda: two_parts(layer), mode="max-autotune-no-cudagraphs"),
    "bmm, compiled": lambda layer: torch.compile(lambda: by_bmm(layer)),
    "bmm, plain": lambda layer: lambda: by_bmm(layer),
    "varlen_attn": by_varlen,
    "flex, compiled": by_flex,
}


@torch.no_grad()
def measure(name, layer, exact, read_s, args, rows):
    device, form = layer.query.device, FORMS[name](layer)
    error = (form().double() - exact).abs().max().item()
    if has_graphs(device):
        form, result, _ = capture_graph(form, None, None)
        form()
        error = max(error, (result.double() - exact).abs().max().item())
    taken = bench_gpu.seconds(lambda: [form() for _ in range(args.repeat)], device, args.trials) / args.repeat
    rows.append(
        {
            "name": f"attention of a layer, {args.shape}, {name} (error {error:.0e})",
            "ours": taken,
            "peer": read_s,
            "ratio": read_s / taken,
            "goal": None,
            "met": None,
        }
    )
    print(
        f"{name:24}{taken * 1e6:10.0f} us, reading once {read_s * 1e6:.0f} us; error {error:.1e}", flush=True
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=20, help="calls that are timed together")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    device, rows = device_of(args.device), []
    torch.manual_seed(0)
    bandwidth, _ = bench_gpu.limits(device, args.shape == "tiny")
    print(f"{card(device)}: copy {bandwidth / 1e9:.0f} GB/s")
    layer = Layer(args.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    exact = layer.exact()
    for name in args.only:
        try:
            measure(name, layer, exact, layer.nbytes() / bandwidth, args, rows)
        except Exception as error:  # the others are measured all the same
            reason = first_line(error)[:200]
            print(f"{name:24} failed: {reason}", flush=True)
            rows.append({"name": f"attention of a layer, {args.shape}, {name}", "failed": reason})
            del error
            free_unused(device)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
