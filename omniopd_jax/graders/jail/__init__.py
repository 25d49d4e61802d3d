"""Scripts that sandbox.py starts in a fresh interpreter with an empty environment; the grader imports none of them.

A server (server.py) forks for each program, and then there are three processes, so that the program can reach neither
its judge nor its keeper:

    outer    (outer.py) makes the namespaces, then drops its rights. It is outside the program's PID namespace: the
             program can neither see nor signal it. For assert tests it is the judge: it runs the tests (remote.py); it
             alone holds them, they never enter the program's process.
    keeper   (keeper.py) PID 1 of the namespace: builds the root folder, starts the program, watches time, output and
             memory, kills and reaps. Not dumpable, and PID 1 takes no signal from inside. When it dies, whatever is
             left in the namespace dies with it, and the mounts with the last process.
    program  nobody, without capabilities, with no_new_privs, a seccomp filter, rlimits, three descriptors and an empty
             environment, in a read-only root that holds the Python installation, and three small private tmpfs.
"""
