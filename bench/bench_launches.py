"""Predicts what a compiled decode step launches and moves, from what Inductor says of the code that it generates. It
needs no GPU and measures no time.

    python bench/bench_launches.py                   both shapes of Qwen2.5-VL
    python bench/bench_launches.py --shape 3B        one of them
    python bench/bench_launches.py --list            besides, the launches from one layer on: MB, operations

16 rows after 64 + 2 x 16 frames, as in bench_gpu.py, in bfloat16. A step with one decoder layer and one with two are
compiled on the CPU; the difference is a layer's, and the whole model is the first and as many more layers as it has. A
launch is a node of Inductor's schedule: a fused kernel or a library's product. Bytes are those of the buffers that each
node reads and writes, once each, as Inductor counts them; but of a scatter that is part of a fused kernel only the
places that it writes, where Inductor counts the whole buffer. "Once" is all weights and cached keys and values, in the
compute dtype. On a GPU, Inductor may fuse otherwise, and the sampling, some ten launches on the logits, is not in it.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch._inductor.scheduler import (
    ExternKernelSchedulerNode,
    FusedSchedulerNode,
    NopKernelSchedulerNode,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]
import bench_gpu  # noqa: E402
from generation import ROW_UNIT, KVCache, decode_hidden  # noqa: E402

PROMPT, OWN = 64 * 120 + 800, 2 * (16 * 120 + bench_gpu.TURN + 200)  # tokens of the prompt, and after it in each row


@torch.no_grad()
def count(shape, layers):
    """Of a step with so many layers: its launches, each (bytes, what it does), and the bytes of weights and
    cache once."""
    policy = bench_gpu.make_policy(shape, "cpu", torch.bfloat16, layers)
    lm = policy.language_model  # of the embedding 16 rows are read, but it would be counted whole
    head, lm.embed_tokens = policy.head.weight, torch.nn.Embedding(1, policy.head.in_features, dtype=torch.bfloat16)
    policy.hf.lm_head.weight = head
    cache = KVCache(policy, bench_gpu.GROUP, 1e18, ROW_UNIT)
    cache.add_prompt(PROMPT, bench_gpu.GROUP)
    cache.reserve(bench_gpu.GROUP, OWN + 1)
    state = {name: torch.zeros(bench_gpu.GROUP, dtype=torch.long)
             for name in ("tokens", "positions", "own_lengths", "group_rows")}
    state["prompt_lengths"] = torch.ones(len(cache.prompts[0][0]), dtype=torch.long)
    state["group_rows"] += torch.arange(bench_gpu.GROUP)

    def step(prompts, own, state):
        hidden = decode_hidden(policy, prompts, own, state, PROMPT, OWN, bench_gpu.GROUP)
        return policy.logits(hidden, transposed=True)  # as in sampling

    launches = []

    def look(nodes):
        kernels = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        launches.extend((moved_bytes(node), operations(node)) for node in kernels)
        return nodes

    torch._dynamo.reset()
    torch._inductor.config._post_fusion_custom_pass = look
    torch.compile(step)(cache.prompts, cache.own, state)
    weights = [m.weight for m in policy.language_model.modules() if isinstance(m, torch.nn.Linear)]
    token = sum(t[0, :, 0].nbytes for pair in cache.own for t in pair)
    once = sum(w.nbytes for w in (*weights, policy.head.weight)) + token * (PROMPT + bench_gpu.GROUP * OWN)
    return launches, once


def operations(node):
    """Of a node of Inductor's schedule: the library's product with its sizes, or what is fused."""
    if isinstance(node, ExternKernelSchedulerNode):
        sizes = [" x ".join(map(str, value.get_size())) for value in node.node.inputs]
        return f"{node.node.python_kernel_name}: {', '.join(sizes)}"
    names = {str(origin.target) for part in node.get_nodes() for origin in part.node.origins}
    return " ".join(sorted(name.split(".")[1] for name in names))


def moved_bytes(node):
    """Of a node of Inductor's schedule, once for each buffer."""
    if not isinstance(node, FusedSchedulerNode):
        return node.get_read_write_buffers_sizes()
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    total = sum(accesses.values())
    for part in node.snodes:
        if changed := [name for buffer in part.get_outputs() for name in buffer.get_mutations()]:
            # a scatter: what it writes in place has two names
            inside = part.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
            for name in {*changed, *part.get_buffer_names()} & accesses.keys():
                total += min(0, inside.get(name, 0) - accesses[name])
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=bench_gpu.SHAPES, default=["3B", "7B"])
    parser.add_argument("--list", action="store_true", help="show the launches of the last layer and the head")
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True  # what comes from a cache is not counted
    print(f"{'':8}{'launches':>10}{'moved GB':>10}{'once GB':>10}{'ratio':>8}")
    for shape in args.shape:
        (one, once_one), (two, once_two) = count(shape, 1), count(shape, 2)
        more = bench_gpu.SHAPES[shape]["num_hidden_layers"] - 1
        of_model = lambda a, b: a + more * (b - a)
        moved = of_model(*(sum(nbytes for nbytes, _ in launches) for launches in (one, two)))
        launches, once = of_model(len(one), len(two)), of_model(once_one, once_two)
        print(f"{shape:8}{launches:10,}{moved / 1e9:10.2f}{once / 1e9:10.2f}{moved / once:8.2f}", flush=True)
        for nbytes, what in two[len(one) - len(two):] if args.list else []:
            print(f"{nbytes / 1e6:18.1f} MB  {what}")


if __name__ == "__main__":
    main()
