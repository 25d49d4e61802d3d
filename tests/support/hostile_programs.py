"""Programs that attack the sandbox. Each prints `held` where it was stopped and `through` where it was not, or is
ended.

ESCAPES: name -> (program, reasons that count as held). `ok` means that the program itself found the door shut and
printed `held`; so a program with a mistake in it does not pass for a shut door. {canary}, {port}, {marker}, {folder}
are
filled in by the test: a world-readable host file, a listening TCP port, a mark for command lines, a host folder.
Programs that forge a grade are in tests/graders/cases/forged.jsonl.
"""

ATTEMPT = """
def attempt(act, *expected):
    try:
        result = act()
    except (expected or (OSError,)):
        print("held")
    else:
        print("through", result)
"""

CTYPES = """
import ctypes, os
x86 = os.uname().machine == "x86_64"
libc = ctypes.CDLL(None, use_errno=True)
def system_call(*numbers):
    result = libc.syscall(*numbers)
    if result < 0:
        raise OSError(ctypes.get_errno(), "syscall")
    return result
"""


PIPES = "import os\nr, w = os.pipe()\nr2, w2 = os.pipe()\n"


def tries(expression, before="import os, socket, signal, resource", errors="OSError"):
    """A program that is held if `expression` raises."""
    return f"{ATTEMPT}\n{before}\nattempt(lambda: {expression}, {errors})\n"


def calls(expression, before=""):
    """A program that is held if `expression`, over raw system calls, fails."""
    return tries(expression, before + CTYPES)


SHUT, TIME, MEMORY, OUTPUT = {"ok"}, {"timeout"}, {"memory"}, {"output"}

ESCAPES = {
    # network
    "connect_host": (tries("socket.create_connection(('127.0.0.1', {port}), 2)"), SHUT),
    "connect_out": (tries("socket.create_connection(('1.1.1.1', 53), 2)"), SHUT),
    "bind": (tries("socket.socket().bind(('0.0.0.0', 0))"), SHUT),
    "dns": (tries("socket.getaddrinfo('example.com', 80)"), SHUT),
    "udp": (tries("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))"), SHUT),
    "raw_socket": (tries("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"), SHUT),
    "vsock": (tries("socket.socket(40, socket.SOCK_STREAM).connect((2, 2024))"), SHUT),
    "netlink": (tries("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"), SHUT),
    "abstract_socket": (tries("socket.socket(socket.AF_UNIX).connect('\\0{marker}')"), SHUT),
    # processes, memory, time, output
    "fork_bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        TIME | MEMORY,
    ),
    "forks_counted": (
        "import os, time\nn = 0\ntry:\n    while n < 200:\n        if not os.fork():\n            time.sleep(60)\n"
        "        n += 1\nexcept OSError:\n    print('held' if n <= 16 else n)\n",
        SHUT,
    ),
    "thread_bomb": (
        "import threading, time\nn = 0\ntry:\n    while n < 500:\n        threading.Thread(target=time.sleep, "
        "args=(60,), "
        "daemon=True).start()\n        n += 1\nexcept RuntimeError:\n    print('held' if n <= 16 else n)\n",
        SHUT,
    ),
    "memory_bomb": ("x = [bytearray(1 << 20) for _ in range(100000)]\nprint('through')\n", MEMORY),
    "memory_by_forks": (
        "import os, time\nfor _ in range(8):\n    if not os.fork():\n        break\n"
        "x = bytearray(b'x') * (100 << 20)\ntime.sleep(60)\n",
        MEMORY,
    ),
    "memory_by_mmap": (
        "import mmap\nx = []\nfor _ in range(1000):\n    m = mmap.mmap(-1, 64 << 20)\n    m.write(b'x' * (64 << 20))\n"
        "    x.append(m)\nprint('through')\n",
        MEMORY | {"error"},
    ),
    "memory_by_memfd": (tries("os.memfd_create('x')"), SHUT),
    "memory_by_shm_files": (
        "f = open('/dev/shm/x', 'wb')\ntry:\n    for _ in range(1000):\n        f.write(b'x' * (1 << 20))\n        "
        "f.flush()\n"
        "    print('through')\nexcept OSError:\n    print('held')\n    import os\n    os._exit(0)\n",
        {"ok", "wrong_answer"},
    ),
    "endless_stdout": ("while True:\n    print('x' * 1000)\n", OUTPUT),
    "endless_stderr": ("import sys\nwhile True:\n    sys.stderr.write('x' * 1000)\n", OUTPUT),
    "endless_stdout_from_child": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        os.write(1, b'x' * "
        "1000)\nos.wait()\n",
        OUTPUT,
    ),
    "giant_file": (
        "import os\ntry:\n    f = open('big', 'wb')\n    for _ in range(10000):\n        f.write(b'x' * (1 << 20))\n"
        "    print('through')\nexcept OSError:\n    print('held', flush=True)\n    os._exit(0)\n",
        SHUT,
    ),
    "giant_sparse_file": (tries("os.truncate(os.open('s', os.O_CREAT | os.O_RDWR), 1 << 40)"), SHUT),
    "disk_full_of_files": (
        "try:\n    for i in range(100000):\n        with open(str(i), 'wb') as f:\n            f.write(b'x' * (1 << "
        "20))\n"
        "    print('through')\nexcept OSError:\n    print('held')\n",
        SHUT,
    ),
    "many_files": (
        "try:\n    for i in range(100000):\n        open(str(i), 'w').close()\n    print('through')\n"
        "except OSError:\n    print('held' if i <= 1024 else i)\n",
        SHUT,
    ),
    "many_descriptors": (
        "x = []\ntry:\n    for i in range(100000):\n        x.append(open('/dev/null'))\n    print('through')\n"
        "except OSError:\n    print('held' if i < 64 else i)\n",
        SHUT,
    ),
    "sleep_forever": ("import time\ntime.sleep(10 ** 6)\n", TIME),
    "busy_forever": ("while True:\n    pass\n", TIME),
    "ignore_signals": (
        "import signal, time\nfor s in range(1, 64):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass\n",
        TIME,
    ),
    "stop_itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('through')\n", TIME),
    "infinite_recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n):\n    return f(n + 1) + 1\nprint('through', f(0))\n",
        MEMORY | {"error", "timeout"},
    ),
    "native_recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6):\n    x = [x]\nrepr(x)\n"
        "print('through')\n",
        MEMORY | {"error", "timeout"},
    ),
    "huge_integer": ("x = 10 ** 10 ** 10\nprint('through')\n", MEMORY | TIME),
    "regex_blowup": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')\nprint('through')\n", TIME),
    "stdin_hog": ("import sys\nsys.stdin.read()\nwhile True:\n    sys.stdin.read()\n", TIME),
    "raise_limits": (
        tries(
            "[resource.setrlimit(k, (resource.RLIM_INFINITY,) * 2) for k in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]",
            errors="ValueError",
        ),
        SHUT,
    ),
    "raise_process_limit": (
        tries("resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))", errors="ValueError"),
        SHUT,
    ),
    "higher_priority": (tries("os.nice(-5)"), SHUT),
    # files of others
    "read_root": (tries("os.listdir('/root')"), SHUT),
    "read_home": (tries("os.listdir('/home')"), SHUT),
    "read_shadow": (tries("open('/etc/shadow').read()"), SHUT),
    "read_host_file": (tries("open({canary!r}).read()"), SHUT),
    "write_host_file": (tries("open({canary!r}, 'w').write('x')"), SHUT),
    "read_host_by_dotdot": (tries("open('../' * 20 + {canary!r}).read()"), SHUT),
    "read_host_by_proc_root": (tries("open('/proc/1/root' + {canary!r}).read()"), SHUT),
    "read_host_by_proc_cwd": (tries("os.listdir('/proc/1/cwd/')"), SHUT),
    "symlink_out": (tries("(os.symlink({canary!r}, 'link'), open('link').read())"), SHUT),
    "hardlink_out": (tries("os.link('/python/bin/' + os.listdir('/python/bin')[0], 'link')"), SHUT),
    "write_python": (tries("open(os.__file__, 'a')"), SHUT),
    "write_root_folder": (tries("open('/x', 'w')"), SHUT),
    "write_usr": (tries("open('/usr/lib/x', 'w')"), SHUT),
    "replace_program": (tries("os.unlink('/program.py')"), SHUT),
    "host_devices": (tries("[open(p) for p in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda')]"), SHUT),
    "make_device": (tries("os.mknod('/work/disk', 0o60600, os.makedev(254, 0))"), SHUT),
    "terminal": (tries("open('/dev/tty')"), SHUT),
    "sys_folder": (tries("os.listdir('/sys')"), SHUT),
    "kernel_settings": (tries("open('/proc/sys/kernel/core_pattern', 'w')"), SHUT),
    "out_of_memory_score": (tries("os.open('/proc/self/oom_score_adj', os.O_WRONLY)"), SHUT),
    "deep_folders": (
        "import os\ntry:\n    for _ in range(100000):\n        os.mkdir('d')\n        os.chdir('d')\n    "
        "print('through')\n"
        "except OSError:\n    print('held')\n",
        SHUT,
    ),
    "full_pipes": (
        "import os\nn = 0\ntry:\n    while n < 1000:\n        r, w = os.pipe()\n        os.set_blocking(w, False)\n"
        "        n += 1\n"
        "        try:\n            while True:\n                os.write(w, b'x' * 4096)\n        except "
        "BlockingIOError:\n"
        "            pass\nexcept OSError:\n    print('held' if n < 32 else n)\n",
        SHUT,
    ),
    "wait_for_fifo": ("import os\nos.mkfifo('f')\nopen('f')\nprint('through')\n", TIME),
    "end_keeper_by_limit": (
        "import resource, time\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\ntime.sleep(2)\nprint('held')\n",
        {"ok", "error"},
    ),
    "sysrq": (tries("open('/proc/sysrq-trigger', 'w')"), SHUT),
    "delete_work_folder": (
        "import os, shutil\nshutil.rmtree('/work', ignore_errors=True)\ntry:\n    os.rmdir('/work')\n    "
        "print('through')\n"
        "except OSError:\n    print('held')\n",
        SHUT,
    ),
    "chmod_work_folder": ("import os\nos.chmod('/work', 0)\nos.chdir('/')\nprint('held')\n", SHUT),
    "rename_work_folder": (tries("os.rename('/work', '/gone')"), SHUT),
    "setuid_file": ("import os\nopen('s', 'w').close()\nos.chmod('s', 0o6777)\n" + tries("os.setuid(0)"), SHUT),
    # environment and descriptors
    "environment": ("import os\nprint('through' if '{marker}' in str(dict(os.environ)) else 'held')\n", SHUT),
    "parent_environment": (
        "import os, glob\nfound = False\nfor p in glob.glob('/proc/[0-9]*/environ'):\n    try:\n"
        "        found |= b'{marker}' in open(p, 'rb').read()\n    except OSError:\n        pass\n"
        "print('through' if found else 'held')\n",
        SHUT,
    ),
    "keeper_environment": (tries("open('/proc/1/environ').read()"), SHUT),
    "keeper_memory": (tries("open('/proc/1/mem', 'rb').read(1)"), SHUT),
    "keeper_descriptors": (tries("os.listdir('/proc/1/fd')"), SHUT),
    "inherited_descriptors": (
        "import os\nopen_ones = []\nfor fd in range(3, 4096):\n    try:\n        os.fstat(fd)\n        "
        "open_ones.append(fd)\n"
        "    except OSError:\n        pass\nprint('through' if open_ones else 'held')\n",
        SHUT,
    ),
    "close_descriptors": ("import os\nprint('held', flush=True)\nos.closerange(0, 4096)\n", SHUT),
    "close_and_run": ("import os\nos.closerange(0, 4096)\nwhile True:\n    pass\n", TIME),
    # other processes
    "kill_parent": (
        "import os, signal, time\nfor s in (2, 9, 15, 19):\n    os.kill(os.getppid(), s)\nprint('held')\n",
        SHUT,
    ),
    "kill_everyone": (
        "import os\ntry:\n    os.kill(-1, 9)\nexcept ProcessLookupError:\n    pass\nprint('held')\n",
        SHUT,
    ),
    "kill_by_number": (
        "import os\nfor pid in range(3, 40000):\n    try:\n        os.kill(pid, 9)\n        print('through')\n"
        "    except OSError:\n        pass\nprint('held')\n",
        SHUT,
    ),
    "limit_keeper": (
        "import os, resource\nfor k in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):\n    try:\n"
        "        resource.prlimit(1, k, (0, 0))\n    except OSError:\n        pass\nprint('held')\n",
        {"ok", "error"},
    ),
    "ptrace_keeper": (calls("system_call(101 if os.uname().machine == 'x86_64' else 117, 16, 1, 0, 0)"), SHUT),
    "see_other_processes": (
        "import os\npids = [p for p in os.listdir('/proc') if p.isdigit()]\n"
        "print('held' if len(pids) <= 2 else pids)\n",
        SHUT,
    ),
    "leave_child": (
        "import os, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execv(sys.executable, "
        "[sys.executable, '-c', 'import time; time.sleep(1000)', '{marker}'])\n    os._exit(0)\nprint('held')\n",
        SHUT,
    ),
    "leave_threads": (
        "import threading, time, os\nfor _ in range(5):\n    threading.Thread(target=time.sleep, "
        "args=(1000,)).start()\n"
        "print('held', flush=True)\nos._exit(0)\n",
        SHUT,
    ),
    # the kernel's doors
    "mount": (calls("libc.mount(b'none', b'/work', b'tmpfs', 0, None) and system_call(-1)"), SHUT),
    "umount": (calls("libc.umount2(b'/proc', 2) and system_call(-1)"), SHUT),
    "remount_writable": (calls("libc.mount(b'none', b'/', None, 32 | 4096, None) and system_call(-1)"), SHUT),
    "chroot": (tries("os.chroot('/work')"), SHUT),
    "unshare_user": (calls("libc.unshare(0x10000000) and system_call(-1)"), SHUT),
    "unshare_mount": (calls("libc.unshare(0x00020000) and system_call(-1)"), SHUT),
    "clone_user_namespace": (
        calls("system_call(56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0)"),
        SHUT,
    ),
    "setns": (calls("libc.setns(os.open('/proc/1/ns/mnt', 0), 0) and system_call(-1)"), SHUT),
    "set_hostname": (calls("libc.sethostname(b'x', 1) and system_call(-1)"), SHUT),
    "shared_memory": (calls("libc.shmget(0x1234, 1 << 20, 0o1666) and system_call(-1)"), SHUT),
    "semaphores": (calls("libc.semget(0x1234, 1, 0o1666) and system_call(-1)"), SHUT),
    "message_queue": (calls("libc.msgget(0x1234, 0o1666) and system_call(-1)"), SHUT),
    "key_ring": (
        calls("system_call(248 if os.uname().machine == 'x86_64' else 217, b'user', b'k', b'v', 1, -4)"),
        SHUT,
    ),
    "io_uring": (calls("system_call(425, 8, ctypes.create_string_buffer(256))"), SHUT),
    "bpf": (calls("system_call(321 if os.uname().machine == 'x86_64' else 280, 0, None, 0)"), SHUT),
    "module": (calls("system_call(175 if os.uname().machine == 'x86_64' else 105, None, 0, b'')"), SHUT),
    "reboot": (calls("libc.reboot(0) and system_call(-1)"), SHUT),
    "set_clock": (calls("libc.settimeofday(ctypes.create_string_buffer(16), None) and system_call(-1)"), SHUT),
    "become_root": (tries("os.setresuid(0, 0, 0)"), SHUT),
    "core_dump": ("import os\nos.abort()\n", {"error"}),
    "null_pointer": ("import ctypes\nctypes.string_at(0)\n", {"error"}),
    # memory that no limit of a process counts, and what else of the kernel no program needs
    "vmsplice": (calls("system_call(278 if x86 else 75, 1, None, 0, 0)"), SHUT),
    "splice": (tries("(os.write(w, b'x'), os.splice(r, w2, 1))", PIPES), SHUT),
    "tee": (calls("(os.write(w, b'x'), system_call(276 if x86 else 77, r, w2, 1, 2))", PIPES), SHUT),
    "aio_slots": (calls("system_call(206 if x86 else 0, 128, ctypes.byref(ctypes.c_ulong(0)))"), SHUT),
    "shared_anonymous_memory": (tries("mmap.mmap(-1, 1 << 20)", "import mmap"), SHUT),
    "shared_zero_memory": (tries("mmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20)", "import mmap, os"), SHUT),
    "huge_pages_pool": (calls("system_call(9 if x86 else 222, None, 1 << 21, 3, 0x40022, -1, 0)"), SHUT),
    "huge_pages_on": (calls("libc.prctl(41, 0, 0, 0, 0) and system_call(-1)"), SHUT),
    "huge_pages": (CTYPES + "print('held' if libc.prctl(42, 0, 0, 0, 0) == 1 else 'through')\n", SHUT),
    "larger_pipes": (tries("fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)", "import fcntl, os"), SHUT),
    "larger_queues": (tries("socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)"), SHUT),
    "larger_receive_queues": (
        tries("socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)"),
        SHUT,
    ),
    "descriptors_in_flight": (
        tries(
            "a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])",
            "import array, socket\na, b = socket.socketpair()",
        ),
        SHUT,
    ),
    "unix_sockets": (tries("socket.socket(socket.AF_UNIX).bind('s')"), SHUT),
    "extended_attributes": (tries("(open('f', 'w').close(), os.setxattr('f', 'user.x', b'v' * 60000))"), SHUT),
    "inotify": (calls("libc.inotify_init1(0) >= 0 or system_call(-1)"), SHUT),
    "landlock": (calls("system_call(444, None, 0, 1)"), SHUT),
    "seccomp_filter": (calls("system_call(317 if x86 else 277, 2, 0, None)"), SHUT),
    "clone3_namespace": (
        calls(
            "os._exit(0) if system_call(435, ctypes.create_string_buffer(bytes([0, 0, 0, 0x10]) + bytes(84)), 88) == 0 "
            "else 1"
        ),
        SHUT,
    ),
    "mountinfo": (tries("open('/proc/self/mountinfo').read()"), SHUT),
    "mounts": (tries("open('/proc/self/mounts').read()"), SHUT),
    "listmount": (
        calls(
            "system_call(458, ctypes.create_string_buffer(bytes([24]) + bytes(7) + b'\\xff' * 8 + bytes(8)), "
            "ctypes.create_string_buffer(800), 100, 0)"
        ),
        SHUT,
    ),
    "host_paths_in_maps": (
        "import sys\ntry:\n    text = open('/proc/self/maps').read()\nexcept OSError:\n    text = ''\n"
        "print('through' if '/root' in text or '/home' in text else 'held')\n",
        SHUT,
    ),
    "files_of_the_judge": (tries("open('/files/outer.py', 'a')"), SHUT),
    "sockets_hold_memory": (
        "import os, socket\nheld, pairs = 0, []\ntry:\n    while True:\n        a, b = socket.socketpair()\n"
        "        pairs += [a, b]\n        a.setblocking(False)\n        try:\n            while True:\n"
        "                held += a.send(b'x' * 65536)\n        except BlockingIOError:\n            pass\n"
        "except OSError:\n    print('held' if held < 16 << 20 else held)\n",
        SHUT,
    ),
    # exits
    "exit_code": ("print('held')\nimport sys\nsys.exit(3)\n", {"error"}),
    "quit_early": ("import os\nos._exit(0)\n", {"wrong_answer"}),
    "at_exit_forever": ("import atexit\natexit.register(lambda: all(n == 0 for n in iter(int, 1)))\n", TIME),
    "fake_verdict": ('print(\'{{"reason": "ok", "passed": true, "code": 0, "stdout": "held"}}\')\n', {"wrong_answer"}),
    "broken_text": ("import sys\nsys.stdout.buffer.write(bytes(range(256)))\n", {"wrong_answer"}),
    "null_in_source": ("print('held')\0", {"error"}),
    "surrogate_in_source": ("print('\ud800')", {"error", "wrong_answer"}),
}
