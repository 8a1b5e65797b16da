"""What memory is free, and which errors say that it was not enough.

On Linux that is MemAvailable, or what the control groups of this process still grant, those that
hold its own included (versions 1 and 2; a group's file cache counts as free). Elsewhere psutil
tells, and where nobody does, nothing is refused.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_UNKNOWN = 1 << 62
#: Of a control group of each version: the limit, what is used, and the word for the file cache in
#: memory.stat.
_V2 = "memory.max", "memory.current", "inactive_file"
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"

Group = tuple[Path, tuple[str, str, str]]


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, or of the container if that is less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine_bytes(), *(_group_bytes(*group) for group in control_groups()), _UNKNOWN)


def _machine_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(
                int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):  # no Linux, or one that hides it
        pass
    try:
        import psutil
    except ImportError:
        return _UNKNOWN
    return int(psutil.virtual_memory().available)


@cache
def control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Group]:
    """The groups that limit the memory of this process, from its own up: their folders and the
    names of their files.
    """
    try:
        lines = own.read_text("ascii").splitlines()
    except (OSError, ValueError):
        lines = ["0::/"]
    found: list[Group] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, names = root, _V2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", _V1
        else:
            continue
        inner = top / path.strip("/")
        # In a container the path may be that of the host, which is not seen: then the top is the
        # container's own group.
        inner = inner if inner.is_dir() and ".." not in inner.parts else top
        found += [
            (folder, names) for folder in (inner, *inner.parents) if folder.is_relative_to(top)
        ]
    return [(folder, names) for folder, names in found if (folder / names[0]).exists()]


def _group_bytes(folder: Path, names: tuple[str, str, str]) -> int:
    limit, used, cached = names
    try:
        most = int((folder / limit).read_text("ascii"))
        if most >= _UNKNOWN:  # version 1's word for no limit
            return _UNKNOWN
        cache_line = re.search(
            rf"^{cached} (\d+)$", (folder / "memory.stat").read_text("ascii"), re.MULTILINE
        )
        return max(
            most
            - int((folder / used).read_text("ascii"))
            + (int(cache_line[1]) if cache_line else 0),
            0,
        )
    except (OSError, ValueError):  # no limit: the word "max"
        return _UNKNOWN


def begin_peak(device: torch.device) -> int:
    """Forget the peaks so far, where the machine can, and give the bytes that this process holds
    now; for ``peak_memory``.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        suppress(OSError),
        open("/proc/self/clear_refs", "w", encoding="ascii") as file,
    ):  # only Linux
        file.write("5")
    return _status("VmRSS") or _most()


def peak_memory(device: torch.device, before: int) -> dict[str, int]:
    """Bytes: the peak of the process, of it beyond what it held ``before``, and of the device's
    allocations (0 on the CPU).
    """
    peak = _status("VmHWM") or _most()
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "peak_bytes": peak,
        "peak_extra_bytes": max(peak - before, 0),
        "device_peak_bytes": int(on_device),
    }


def _status(name: str) -> int:
    """An entry of /proc/self/status in bytes; 0 where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return 0


def _most() -> int:
    """The largest resident set so far, where /proc does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of an allocation, on any device, says that memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in str(error)
