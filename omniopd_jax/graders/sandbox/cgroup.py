"""A memory limit over a program's processes together, files and kernel memory included, where this user may set one.

That is root in most containers with control groups of version 1, and whoever was given a group of version 2. Elsewhere
the limits of kernel.py hold for each process, and the keeper adds up what is resident.
"""

import contextlib
import os

V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


def parent() -> str | None:
    """The folder in which groups with a memory limit can be made; None where there is none."""
    paths = {}
    with contextlib.suppress(OSError, ValueError), open("/proc/self/cgroup") as f:
        for line in f:
            _, kinds, path = line.rstrip("\n").split(":", 2)
            paths |= dict.fromkeys(kinds.split(","), path)
    for kind, root, limit in (("memory", V1, "memory.limit_in_bytes"), ("", V2, "memory.max")):
        for folder in dict.fromkeys((root + paths.get(kind, "/").rstrip("/"), root)) if kind in paths else ():
            group = f"{folder}/omniopd-{os.getpid()}-0"
            try:
                os.mkdir(group)
            except OSError:
                continue
            usable = os.path.exists(f"{group}/{limit}") and os.access(f"{group}/cgroup.procs", os.W_OK)
            with contextlib.suppress(OSError):
                os.rmdir(group)
            if usable:
                return folder
    return None


def make(folder: str, number: int, most: int) -> str | None:
    """A new group of at most `most` bytes, without swap; None where it can't be made."""
    group = f"{folder}/omniopd-{os.getpid()}-{number}"
    try:
        os.mkdir(group)
        for name, value in (
            ("memory.limit_in_bytes", most),
            ("memory.memsw.limit_in_bytes", most),
            ("memory.max", most),
            ("memory.swap.max", 0),
        ):
            if os.path.exists(f"{group}/{name}"):
                with open(f"{group}/{name}", "w") as f:
                    f.write(str(value))
    except OSError:
        remove(group)
        return None
    return group


def remove(group: str) -> bool:
    """Whether the group is gone: it can be once its processes are."""
    try:
        os.rmdir(group)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
