"""What the sandbox asks of the Linux kernel: namespaces, a root folder, no rights, limits. Standard library only."""

import ctypes
import os
import resource
import struct
import sys
from contextlib import suppress

ALLOW, REFUSE, UNKNOWN, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # what a filter answers: EPERM, ENOSYS
NOBODY = 65534
NEW_MOUNTS = 0x00020000
NEW_NAMESPACES = 0x7E020000  # user, mount, pid, net, ipc, uts, cgroup
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = 2, -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_SET_CHILD_SUBREAPER, PR_SET_THP_DISABLE = 36, 41
ROOT = "/tmp"  # where the new root is put together; the mount is private, the host's /tmp stays as it is
SCRATCH = ("/work", "/tmp", "/dev/shm")

# Refused with EPERM: what reaches memory that no rlimit counts (System V shm, memfd, io_uring, AIO, key rings, splice
# and its kin, which pin pages in pipes, descriptors in flight, extended attributes, watches), other processes (ptrace,
# process_vm_*), or more kernel than a program needs. Of `socket` nothing is left: AF_VSOCK would pass through a network
# namespace; a `socketpair`, which asyncio wants, is granted. Numbers past LAST are unknown here, and to the program.
# fmt: off
SINCE_424 = (425, 426, 427, 428, 429, 430, 431, 432, 438, 442, 444, 445, 446, 447)  # one number on every machine
DENIED = {
    "x86_64": (0xC000003E, (
        29, 30, 31, 41, 46, 64, 65, 66, 68, 69, 70, 71, 101, 103, 155, 161, 165, 166, 188, 189, 190, 206, 207, 208,
        209, 210, 237, 238, 240, 248, 249, 250, 253, 254, 256, 272, 275, 276, 278, 279, 294, 298, 300, 301, 303, 304,
        307, 308, 310, 311, 312, 317, 319, 321, 323, 333,
        *SINCE_424,
    )),
    "aarch64": (0xC00000B7, (
        0, 1, 2, 3, 4, 5, 6, 7, 26, 27, 39, 40, 41, 51, 75, 76, 77, 97, 116, 117, 180, 186, 187, 188, 189, 190, 191,
        192, 193, 194, 195, 196, 197, 198, 211, 217, 218, 219, 235, 237, 238, 239, 241, 262, 263, 264, 265, 268, 269,
        270, 271, 272, 277, 279, 280, 282, 292,
        *SINCE_424,
    )),
}
# fmt: on
LAST, CLONE3 = 448, 435  # clone3 hides its flags from a filter: ENOSYS, and the library takes clone

# By argument: (call, number of the argument, bits, value), refused where the argument's bits have that value.
MMAP, CLONE, FCNTL, SETSOCKOPT, PRCTL = range(5)
NUMBERS = {"x86_64": (9, 56, 72, 54, 157), "aarch64": (222, 220, 25, 208, 167)}
ALL = 0xFFFFFFFF
DENIED_ARGUMENTS = (
    (MMAP, 3, 0x21, 0x21),  # shared and anonymous: what is taken out of the mapping is held and counts for no process
    (MMAP, 3, 0x40000, 0x40000),  # the host's huge pages
    *((CLONE, 0, 1 << bit, 1 << bit) for bit in (17, 25, 26, 27, 28, 29, 30)),  # new namespaces
    (FCNTL, 1, ALL, 1031),  # larger pipes
    *((SETSOCKOPT, 2, ALL, option) for option in (7, 8, 32, 33)),  # larger queues
    (PRCTL, 0, ALL, PR_SET_THP_DISABLE),  # it is on: a huge page is 512 times what was touched
)

# The judge runs the tests outside the PID namespace: no signal, no limit on another process, no new program from there.
DENIED_TO_JUDGE = {
    "x86_64": (59, 62, 129, 200, 234, 297, 302, 322, 424),
    "aarch64": (129, 130, 131, 138, 221, 240, 261, 281, 424),
}

# A grader's worker reads files that it imports and changes none: no new name, no descriptor that writes.
DENIED_TO_READER = {
    "x86_64": (76, 77, *range(82, 96), 133, 258, 259, 260, 263, 264, 265, 266, 268, 280, 285, 316, 437),
    "aarch64": (33, 34, 35, 36, 37, 38, 45, 46, 47, 52, 53, 54, 55, 88, 276, 437),
}
OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # the number of the call, of the argument with its flags
WRITES = ((3, 1), (3, 2), (0x40, 0x40))  # O_WRONLY, O_RDWR, O_CREAT as bits and value

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """Calls libc's `name`; raises OSError with that name where it fails."""
    if getattr(libc, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source, target, kind, flags, data=""):
    """mount(2)."""
    try:
        call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    except OSError as error:
        raise OSError(error.errno, f"mount of {kind or source} on {target}: {os.strerror(error.errno)}") from None


def write(path, text):
    """Writes `text` to `path` in one call, as /proc's maps want it."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def enter_namespaces():
    """Becomes nobody in new namespaces, with capabilities there and none outside."""
    if os.geteuid() == 0:  # leave root first: uid 0 would own the host's files and escape RLIMIT_NPROC
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # the change of uid cleared it, and /proc/self/uid_map went to root
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NEW_NAMESPACES)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    call("sethostname", b"sandbox", 7)


def build_root(spec, remote):
    """The keeper's first work: a read-only root from the Python installation and the system's libraries; moves into it.

    The current folder is the Python installation: unshare(2) carried it over, so that nobody need walk the path to it.
    """
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    programs = [text.encode("utf-8", "replace") for text in spec["programs"]]
    size = sum(map(len, programs)) + (1 << 20)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=256,mode=755")
    box = f"{ROOT}/box"
    os.mkdir(box)
    for folder in ("/python", "/python/bin", "/usr", "/usr/share", "/etc", "/dev", "/proc", *SCRATCH):
        os.mkdir(box + folder)
    python = f"bin/{spec['python']}"
    binds = [(python, f"/python/{python}"), ("lib", "/python/lib"), ("lib64", "/python/lib64")]
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"):
        if os.path.islink(path):
            os.symlink(os.readlink(path), box + path)
        else:
            binds.append((path, path))
    for source, target in binds:
        if os.path.isdir(source):
            os.mkdir(box + target)
        elif os.path.isfile(source):
            os.close(os.open(box + target, os.O_CREAT | os.O_WRONLY))
        else:
            continue
        mount(source, box + target, "", MS_BIND | MS_REC)
    for path in (f"/python/lib/{spec['python']}/site-packages", "/usr/lib/python3/dist-packages"):
        if os.path.isdir(box + path):  # the standard library alone: no one's packages, no .pth files
            mount("tmpfs", box + path, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
    passwd = b"nobody:x:65534:65534::/work:\n"
    files = {f"/program.py.{i}" if i else "/program.py": text for i, text in enumerate(programs)}
    for path, data in (files | {spec["paths"]["remote"]: remote, "/etc/passwd": passwd}).items():
        with open(box + path, "wb") as f:
            f.write(data)
    devices = ("null", "full", "random", "urandom")  # no /dev/zero: mapped, it is memory that counts for no process
    for device in devices:
        os.close(os.open(f"{box}/dev/{device}", os.O_CREAT | os.O_WRONLY))
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, size)
    for device in devices:  # after the read-only pass, which would have made the nodes unusable
        mount(f"/dev/{device}", f"{box}/dev/{device}", "", MS_BIND)
    # From in here, for it shows this PID namespace; and before the host's is gone, or the kernel refuses. Where a
    # container hides parts of its /proc programs do without: their sum of memory goes unwatched, each limit holds.
    with suppress(OSError):
        mount("proc", f"{box}/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    enter_box()


def add_scratch(limits):
    """Mounts what a program may write, in a mount namespace of its own, which ends with its last process.

    Neither judge nor keeper is in it, so that no file of a program is ever under a name that they import. It has no
    /proc: mountinfo would show where the host stores what is mounted here, and no program needs one.
    """
    call("unshare", NEW_MOUNTS)
    options = f"size={limits['disk_mb']}m,nr_inodes={limits['num_files']},mode=700"
    for path in SCRATCH:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)
    with suppress(OSError):  # where it could not be mounted
        call("umount2", b"/proc", MNT_DETACH)


def enter_box():
    """Besides the pivot: the kernel lets no process in a chroot make another user namespace."""
    os.chroot("/box")
    os.chdir("/")


def import_from(prefix):
    """From here on this process imports from the Python installation at `prefix` alone, which is mounted read-only.

    Every name of a folder that was taken up outside is changed or dropped: sys.path, the packages' own search paths and
    the importers that are cached for folders. A program could create any of the others.
    """

    def moved(paths):
        roots = tuple(f"{sys.base_prefix.rstrip('/')}/{lib}/" for lib in ("lib", "lib64"))
        return [prefix + path[len(sys.base_prefix.rstrip("/")) :] for path in paths if f"{path}/".startswith(roots)]

    sys.path[:] = [path for path in moved(sys.path) if "-packages" not in path]
    for module in list(sys.modules.values()):
        if getattr(module, "__path__", None) is not None:
            module.__path__ = moved(module.__path__)
            if module.__spec__ is not None:
                module.__spec__.submodule_search_locations = module.__path__
    sys.path_importer_cache.clear()


def seccomp_filter(judge=False, read_only=False):
    """The BPF program for `DENIED` (and `DENIED_TO_JUDGE`, `DENIED_TO_READER`), or None on a machine whose call numbers
    are not listed."""
    machine = os.uname().machine
    if machine not in DENIED:
        return None
    arch, denied = DENIED[machine]
    denied += DENIED_TO_JUDGE[machine] if judge else ()
    denied += DENIED_TO_READER[machine] if read_only else ()
    arguments = [(NUMBERS[machine][call_], *rest) for call_, *rest in DENIED_ARGUMENTS]
    arguments += [(*opens, *flags) for opens in OPENS[machine] for flags in WRITES] if read_only else []
    load, and_, jump_equal, jump_ge, answer = 0x20, 0x54, 0x15, 0x35, 0x06  # BPF instructions
    code = [(load, 0, 0, 4), (jump_equal, 1, 0, arch), (answer, 0, 0, KILL), (load, 0, 0, 0)]
    code += [(jump_ge, 0, 1, LAST + 1), (answer, 0, 0, UNKNOWN), (jump_equal, 0, 1, CLONE3), (answer, 0, 0, UNKNOWN)]
    for number in denied:
        code += [(jump_equal, 0, 1, number), (answer, 0, 0, REFUSE)]
    for number, argument, bits, value in arguments:
        code += [(jump_equal, 0, 5, number), (load, 0, 0, 16 + 8 * argument), (and_, 0, 0, bits)]
        code += [(jump_equal, 0, 1, value), (answer, 0, 0, REFUSE), (load, 0, 0, 0)]
    code += [(answer, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in code)


def drop_rights(code):
    """No capability, no way back to one, and the seccomp filter. Not to be undone."""
    for number in range(64):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if code:
        buffer = ctypes.create_string_buffer(code, len(code))
        head = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        call("prctl", PR_SET_SECCOMP, 2, head, 0, 0)


def set_limits(limits, isolated):
    """The rlimits of the program, soft and hard."""
    mib = 1 << 20
    # 1 and not 0: the kernel asks no limit of a core dump into a pipe but this one
    table = {
        "AS": limits["memory_mb"] * mib, "CORE": 1, "FSIZE": limits["file_mb"] * mib,
        "NOFILE": limits["open_files"], "MSGQUEUE": 0, "MEMLOCK": 0, "NICE": 0, "RTPRIO": 0, "SIGPENDING": 256,
    }  # fmt: skip
    if isolated:  # counted in the user namespace, with the outer process and the keeper; outside, over the whole user
        table["NPROC"] = limits["processes"] + 2
    for name, value in table.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
    seconds = max(1, int(-(-limits["cpu_seconds"] // 1)))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def socket_pair():
    """Two ends of a local stream, made without the import of `socket`'s Python half."""
    ends = (ctypes.c_int * 2)()
    call("socketpair", 1, 1 | 0x80000, 0, ends)
    return ends[0], ends[1]
