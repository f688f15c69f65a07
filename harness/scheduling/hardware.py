"""The hardware of this machine, read in ways that work on Linux, macOS and Windows."""

import os
import platform
from pathlib import Path

import psutil
import torch


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> int:
    """Return the size of the machine's memory in GiB."""
    return round(psutil.virtual_memory().total / 2**30)


def processor() -> str:
    """Return the processor's name, or its architecture if the system gives no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def own_device() -> str:
    """Return the kind of device that this machine computes with: `cuda`, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
