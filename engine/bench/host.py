"""The conditions of a figure: processor, memory, kernel, file system, device, versions.  No names and no paths.

Theory of operation.  Everything is read from /proc, /sys and os, which needs no privilege.  A host is described and not
named, because the record is committed and published.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

# Packages that affect the figures of peers, besides the peers themselves.
PACKAGES = ("torch", "safetensors", "torch_checkpointing", "tensorstore", "deepspeed", "fastsafetensors")
PACKAGES_READING = ("runai_model_streamer",)


def describe(directory: Path) -> dict[str, str]:
    """The host, as it matters to a checkpoint written into the directory."""
    versions = {name: _version(name) for name in (*PACKAGES, *PACKAGES_READING)}
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "file system": file_system(directory),
        "device": _device(directory),
        "user": "root" if os.geteuid() == 0 else "ordinary",
        "python": platform.python_version(),
        "torch threads": str(torch.get_num_threads()),
        "fio": _output(["fio", "--version"]).removeprefix("fio-") or "not installed",
        **{name.replace("_", "-"): version for name, version in versions.items()},
    }


def one_line(host: dict[str, str] | None) -> str:
    """The host in a line, for the foot of a chart."""
    host = host or {}
    names = ("processor", "cores", "memory", "kernel", "file system", "device")
    parts = [host.get(name, "?") + {"cores": " cores"}.get(name, "") for name in names]
    return ", ".join(parts) + f", torch {host.get('torch', '?')}, fio {host.get('fio', '?')}"


def commit() -> str:
    """The checked-out commit, with "+" after it if files have changed; "unknown" without git."""
    root = Path(__file__).resolve().parents[2]
    revision = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return revision + ("+" if changed else "") if revision else "unknown"


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on."""
    best, found = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mounted, kind, *_ = line.split()
        path = mounted.encode().decode("unicode_escape")
        if directory.resolve().is_relative_to(path) and len(path) >= len(best):
            best, found = path, kind
    return found


def _processor() -> str:
    """Its name, and the family and model that distinguish two of that name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = "".join(f" {name} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return fields.get("model name", platform.machine()) + numbers.replace("cpu ", "")


def _device(directory: Path) -> str:
    number = os.stat(directory).st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not block.exists():
        return "none of its own"
    whole = block if (block / "queue").is_dir() else block.resolve().parent
    size = int((whole / "size").read_text(encoding="utf-8")) * 512  # sectors of 512 bytes, for every drive
    # All that there are, and the one in use in brackets.
    schedulers = (whole / "queue/scheduler").read_text(encoding="utf-8")
    scheduler = schedulers.partition("[")[2].partition("]")[0] or "none"
    return f"{whole.resolve().name} {size / 1e9:.0f} GB, scheduler {scheduler}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
