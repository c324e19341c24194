"""What only CUDA does at true size: free memory, pinned memory, and copies beside other work."""

import os
import re
import weakref
from contextlib import nullcontext

import torch

from common import UserError


def free_bytes(device):
    """What this process can still have on a device; on a CPU its share of what the machine has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with open("/proc/meminfo", encoding="ascii") as file:
        available = int(re.search(r"MemAvailable: +(\d+) kB", file.read())[1]) * 1024
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def pin_memory(tensor, device):
    """Registers a host tensor's memory with CUDA, so that copies go beside other work. (PyTorch's own pinned
    memory is rounded up to a power of two.) On a CPU nothing. Returns the tensor. Raises UserError."""
    if device.type == "cuda":
        cudart = torch.cuda.cudart()
        status = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(status) != 0:
            raise UserError(f"{tensor.nbytes / 1e9:.2f} GB of host memory could not be pinned "
                            f"({cudart.cudaGetErrorString(status)}); free some, --offload less, "
                            "or train adapters (--lora_rank)")
        weakref.finalize(tensor, cudart.cudaHostUnregister, tensor.data_ptr()).atexit = False
    return tensor


class Copies:
    """Copies between host and device, one after the other, beside other work; on a CPU at once."""

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, targets, sources):
        """They begin once the device has done what it was given. Returns what waits for them on the host."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return (lambda: None) if self.stream is None else self.stream.record_event().synchronize

    def join(self):
        """What the device is given from now on waits for all copies so far."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
