"""What only CUDA executes, in common.py and scale/devices.py, with recorders in place of torch.cuda's calls:
that they are made, in which order, with what. That CUDA does then what is meant only the tests with --device
cuda can show."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import random_policy

import common
from common import UserError, capture_graph, choose_device, choose_dtype, on_own_stream, start_processes
from model import Dialogue, token_log_probs
from scale import offload
from scale.devices import Copies, free_bytes, pin_memory
from scale.offload import OffloadedWeights, reference_of

GPU = torch.device("cuda", 1)


class Stream:
    """Notes who waits for whom. What is given to it is done at once."""

    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.cuda.calls.append(f"{self.name} records an event")
        return SimpleNamespace(synchronize=lambda: self.cuda.calls.append("the host waits for the event"))


class Cuda:
    """In place of torch.cuda: `calls` are notes of what was called, in order. The main stream is called main,
    those that are made side1, side2, ..."""

    def __init__(self, monkeypatch):
        self.calls, self.made, self.pinned, self.error = [], [], {}, 0
        self.main = self.current = Stream(self, "main")
        self.generator = torch.Generator().manual_seed(7)  # CUDA's own one of the current device
        for name in ("Stream", "stream", "CUDAGraph", "graph", "cudart"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (self.generator,))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a new pool")

    def Stream(self, device=None):
        self.made.append(device)
        return Stream(self, f"side{len(self.made)}")

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    # graphs
    def CUDAGraph(self):
        def register(generator):
            which = "the default" if generator is self.generator else "a given"
            self.calls.append(f"the graph knows {which} generator")

        return SimpleNamespace(register_generator_state=register, replay="replay")

    @contextmanager
    def graph(self, graph, pool, stream):
        self.calls.append(f"capture into {pool}")
        with self.stream(stream):
            yield
        self.calls.append("captured")

    # pinned memory
    def cudart(self):
        def register(address, size, flags):
            assert address not in self.pinned and flags == 0
            if not self.error:
                self.pinned[address] = size
            return self.error

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=self.pinned.pop,
                               cudaGetErrorString=lambda status: f"error {status}")


@pytest.fixture
def cuda(monkeypatch):
    common.capture_stream.cache_clear()
    yield Cuda(monkeypatch)
    common.capture_stream.cache_clear()


class Noted:
    """A tensor of which a copy is noted, with the stream that makes it."""

    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.cuda.calls.append(f"{self.cuda.current.name} copies {source.name} to {self.name}")


# ------------------------------------------------------------------------------------- processes and devices
@pytest.fixture
def choosing(cuda, monkeypatch):
    """There is a GPU, and which one is set is noted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: cuda.calls.append(f"set {device}"))
    return cuda.calls


def test_each_process_takes_its_gpu(choosing, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device() == (torch.device("cuda", 0), "nccl")
    assert choose_device("cuda:2") == (torch.device("cuda", 2), "nccl")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("cuda") == (torch.device("cuda", 3), "nccl")
    assert choosing == ["set cuda:0", "set cuda:2", "set cuda:3"]
    assert choose_device("cpu") == (torch.device("cpu"), "gloo") and len(choosing) == 3
    assert choose_dtype(None, GPU) == torch.bfloat16 and choose_dtype("float32", GPU) == torch.float32


def test_nccl_is_told_the_gpu_that_was_set(choosing, monkeypatch):
    variables = dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, timeout, device_id: choosing.append((backend, timeout, device_id)))
    assert start_processes("cuda") == (1, 2, GPU)
    assert choosing == ["set cuda:1", ("nccl", common.TIMEOUT, GPU)]


def test_a_stream_of_the_device_for_who_must_not_wait(cuda):
    with on_own_stream(GPU):
        assert cuda.current.name == "side1" and cuda.made == [GPU]
    assert cuda.current is cuda.main
    with on_own_stream(torch.device("cpu")):
        assert cuda.current is cuda.main and len(cuda.made) == 1


# ----------------------------------------------------------------------------------------------- CUDA graphs
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("pool", [None, "a pool"])
def test_a_graph_is_captured_after_one_run_that_leaves_no_trace(cuda, given, pool):
    """Both on one stream, which waits and is waited for, and the random numbers are the same again."""
    own = torch.Generator().manual_seed(3)
    drawn, generator = [], own if given else cuda.generator

    def step():
        cuda.calls.append(f"{cuda.current.name} steps")
        drawn.append(torch.rand(3, generator=generator))
        return drawn[-1]

    replay, result, used = capture_graph(step, own if given else None, pool)
    known = ["the graph knows a given generator"] if given else []  # CUDA's own it knows
    assert cuda.calls == ["side1 waits for main", "side1 steps", "main waits for side1", *known,
                          f"capture into {used}", "side1 steps", "captured"]
    assert replay == "replay" and used == (pool or "a new pool")
    assert result is drawn[1] and torch.equal(*drawn)
    capture_graph(step, None, used)
    assert cuda.made == [0]  # the next one is captured on the same stream


# -------------------------------------------------------------------------------------------- copies, memory
def test_copies_begin_after_what_the_device_was_given_and_are_waited_for(cuda):
    copies = Copies(GPU)
    assert cuda.made == [GPU]
    a, b, c, d = (Noted(cuda, name) for name in "abcd")
    wait = copies.begin([a, b], [c, d])
    began = ["side1 waits for main", "side1 copies c to a", "side1 copies d to b", "side1 records an event"]
    assert cuda.calls == began and cuda.current is cuda.main
    wait()
    copies.join()
    assert cuda.calls[len(began):] == ["the host waits for the event", "main waits for side1"]


def test_free_is_what_the_device_has_and_what_pytorch_keeps_unused(monkeypatch):
    for name, value in dict(memory_reserved=70, memory_allocated=50, mem_get_info=(1000, 9999)).items():
        def ask(device, value=value):
            assert device == GPU
            return value
        monkeypatch.setattr(torch.cuda, name, ask)
    assert free_bytes(GPU) == 1020


def test_memory_is_pinned_until_its_tensor_is_gone(cuda):
    tensor = torch.zeros(10, 3)
    address = tensor.data_ptr()
    assert pin_memory(tensor, GPU) is tensor and cuda.pinned == {address: 120}
    part = tensor[2:]
    del part
    assert cuda.pinned
    del tensor
    assert not cuda.pinned
    assert pin_memory(torch.zeros(3), torch.device("cpu")).sum() == 0 and not cuda.pinned
    # what cannot be pinned
    cuda.error = 2
    words = re.escape("0.00 GB of host memory could not be pinned (error 2)")
    with pytest.raises(UserError, match=words) as error:
        pin_memory(torch.zeros(3), GPU)
    assert "--offload" in str(error.value) and not cuda.pinned


# --------------------------------------------------------------------------------------------------- offload
@pytest.fixture
def on_gpu(cuda, monkeypatch):
    """scale/offload.py pins and copies as for a GPU."""
    monkeypatch.setattr(offload, "Copies", lambda device: Copies(GPU))
    monkeypatch.setattr(offload, "pin_memory", lambda tensor, device: pin_memory(tensor, GPU))
    return cuda


def test_gradients_come_while_the_cpu_steps(on_gpu):
    """Copies begin once the device has the gradients; before the CPU steps it waits for the group's, with the
    next group's on their way; at last the device waits for the weights that go back."""
    policy = random_policy(layers=2).to("cpu").freeze_vision()
    weights = OffloadedWeights(policy, lambda name: policy.get_parameter(name).detach())
    sizes = sorted(on_gpu.pinned.values())
    total = 4 * sum(p.numel() for p in weights.compute.values())
    assert sizes[-3:] == [total] * 3 and len(sizes) == 5  # and twice the largest group's
    optimizer = torch.optim.AdamW(weights.parameters, lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: on_gpu.calls.append("the CPU steps"))
    sum(p.sum() for p in weights.compute.values()).backward()
    weights.step(optimizer, 1.0)
    begin = ["side1 waits for main", "side1 records an event"]
    group = ["the host waits for the event", "the CPU steps"]
    expected, groups = [*begin], len(weights.groups)
    for number in range(groups):
        coming = begin if number + 1 < groups else []
        expected += [*coming, *group, *begin]  # the last ones: the weights go back
    assert groups == 4 and on_gpu.calls == [*expected, "main waits for side1"]
    for name, master in weights.master_weights.items():
        assert torch.equal(weights.compute[name], master)


def test_a_layers_weights_come_while_the_one_before_computes(on_gpu):
    """Before each layer the device waits for its weights, and the next one's begin to come."""
    policy = random_policy(layers=3).to("cpu")
    reference = reference_of(policy, on_host=True)
    layers = reference.language_model.layers
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: on_gpu.calls.append(f"layer {number}"))
    dialogue = Dialogue()
    dialogue.add([policy.im_end] * 3)
    dialogue.add([policy.im_end] * 2, trained=True)
    with torch.no_grad():
        token_log_probs(reference, [[dialogue]])
    begin = ["side1 waits for main", "side1 records an event"]
    there = "main waits for side1"
    assert on_gpu.calls == [*begin, there, *begin, "layer 0", there, *begin, "layer 1", there, "layer 2"]
    assert len(on_gpu.pinned) == 3  # a layer's weights each
