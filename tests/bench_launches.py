"""Counts what a decode step on a GPU launches and moves, from the shapes alone: it needs no GPU, and measures no time.

    python tests/bench_launches.py                   both shapes of Qwen2.5-VL; the table that the README shows
    python tests/bench_launches.py --shape 3B        one of them

16 rows after 64 + 2 x 16 frames, as in bench_gpu.py. The step runs on PyTorch's fake tensors, which have a device and a
shape and no data. Each operation but a view is one launch that reads its inputs and writes its outputs once; a kernel is
one launch; attention reads the parts of the caches that it looks at. "Once" is all weights and cached keys and values.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import bench_gpu  # noqa: E402
import bench_rollout  # noqa: E402
import rollout as engine  # noqa: E402

WITHOUT_LAUNCH = {"view", "_unsafe_view", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "permute", "t",
                  "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "empty", "new_empty",
                  "empty_like", "device"}
ONLY_THE_CHOSEN = {"index", "embedding", "index_copy"}  # operations that do not read all of their input


def size(tensor):
    """Bytes, those of an expanded dimension once."""
    number = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        number *= length if stride else 1
    return number * tensor.element_size()


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[1]
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.is_cuda}
        if tensors and name not in WITHOUT_LAUNCH:
            self.launches += 1
            if name == "index_put_":  # the values, read and written
                self.bytes += 2 * size(args[2])
            else:
                self.bytes += 2 * size(out) if name in ONLY_THE_CHOSEN else sum(map(size, tensors.values()))
        return out


class CountedKernel:
    """Stands for a kernel of kernels.py."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launch(grid, [size(a) for a in args if isinstance(a, torch.Tensor)], args)

    def launch(self, grid, sizes, args):
        self.count.launches += 1
        if self.name == "attend_kernel":  # each part reads the queries, and writes its share of what the parts give
            query, keys, values, _, _, out, log_sums = sizes
            self.count.bytes += query * grid[2] + keys + values + (out + log_sums) * grid[2] // args[5].shape[1]
        elif self.name == "store_kernel":
            self.count.bytes += 2 * (sizes[0] + sizes[1])
        else:  # the first argument of add_norm and rotate is written, too
            self.count.bytes += sum(sizes) + (sizes[0] if self.name in ("add_norm_kernel", "rotate_kernel") else 0)


def count(shape, small, group):
    """[(launches, bytes) of the plain layers, of the kernels], bytes of all weights and cached keys and values."""
    import kernels
    prompt, own = group[0].dialogue.prompt_length, len(group[0].dialogue.ids) - group[0].dialogue.prompt_length
    bench_gpu.bench_rollout.make_policy = lambda: small
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        policy = engine.generation_copy(bench_gpu.make_policy(shape, "cuda", torch.float32))
        body, head = bench_gpu.linear_weights(policy)
        cache = engine.KVCache(policy, bench_gpu.GROUP, 10 ** 12)
        cache.add_prompt(group, 0, 0)
        cache.reserve(bench_gpu.GROUP, own + 1)
        new = lambda: {name: torch.zeros(bench_gpu.GROUP, dtype=torch.long, device="cuda")
                       for name in ("tokens", "positions", "own_lengths", "prompt_lengths", "slots")}
        counts = []
        for layers in (None, kernels):
            state, counted = new(), Count()
            for name in dir(kernels):
                if layers and name.endswith("_kernel"):
                    setattr(kernels, name, CountedKernel(name, counted))
            with counted:
                engine.decode_step(policy, cache, state, prompt, own + 1, 1.0, None, layers)
            counts.append((counted.launches, counted.bytes))
        token = sum(t[:, :, :, 0].nbytes // t.shape[1] for t in cache.own)
        return counts, 2 * (body + head) + token * (prompt + bench_gpu.GROUP * own)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=bench_gpu.SHAPES, default=["3B", "7B"])
    args = parser.parse_args()
    if not torch.cuda.is_available():  # autocast would do nothing
        torch.cuda.amp.common.amp_definitely_not_available = lambda: False
        torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    small = bench_rollout.make_policy()
    bench_gpu.fill_features = lambda *args: None  # not needed for a step
    group = bench_gpu.make_group(small)
    print(f"{'':8}{'launches, plain':>18}{'kernels':>10}{'moved / once, plain':>22}{'kernels':>10}")
    for shape in args.shape:
        (plain, ours), once = count(shape, small, group)
        print(f"{shape:8}{plain[0]:18,}{ours[0]:10,}{plain[1] / once:22.2f}{ours[1] / once:10.2f}")


if __name__ == "__main__":
    main()
