"""What measurements ask of a device: its name, that it has finished, the most memory that was taken. All that
only CUDA runs in bench/ stands here."""

import os
import re
from pathlib import Path

import torch


def device_of(name):
    """The torch.device of a name; of CUDA with its number."""
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def card(device):
    """Its name, for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def synchronize(device):
    """Waits for all that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_unused(device):
    """Gives memory back that nothing holds, as after a measurement that failed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device):
    """From now on `peak_bytes` is what is taken at most from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # where that is not allowed, the peak is the one since the process began
            pass


def peak_bytes(device):
    """The most that tensors took on CUDA, that this process had in memory on a CPU, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def largest_kernels(task, device, number=10):
    """What takes most of a task's time on the device, [(name, seconds, calls)], and the seconds of all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        task()
        synchronize(device)
    on_cuda = device.type == "cuda"
    taken = [(event.key, (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6,
              event.count) for event in profile.key_averages()]
    taken.sort(key=lambda kernel: -kernel[1])
    return taken[:number], sum(seconds for _, seconds, _ in taken)
