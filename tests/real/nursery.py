"""Starts agent workers by a fork. The imports of livekit-agents take some ten seconds of CPU time per worker, and on two cores the
audio of other calls has to wait for them. Here they happen once.

  nursery.py SOCKET            imports everything, and then forks a worker for each client
  nursery.py SOCKET PROGRAM    is such a client: asks for a worker that runs PROGRAM, and waits for its end

The worker gets the environment, the output, the process group and the network namespace of its client, so that whoever starts
the client sees no difference. A signal has to go to the process group.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback

# How long a client waits for the imports of the nursery, in seconds.
PATIENCE = 120
PR_SET_PDEATHSIG = 1


def request(path: str, program: str) -> None:
    """Asks for a worker, and returns after its end."""
    client = connect(path)
    order = {"program": program, "environ": dict(os.environ), "group": os.getpgrp()}
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    socket.send_fds(client, [b"\n"], [1, 2, namespace])
    client.sendall(json.dumps(order).encode())
    client.shutdown(socket.SHUT_WR)
    client.recv(1)


def connect(path: str) -> socket.socket:
    deadline = time.monotonic() + PATIENCE
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
            return client
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def serve(path: str) -> None:
    """Forks a worker for each client, until this process is killed."""
    import livekit.agents.beta.tools  # noqa: F401
    import livekit.agents.ipc._preload  # noqa: F401
    import livekit.agents.voice.room_io  # noqa: F401
    import numpy.random  # noqa: F401

    gc.freeze()
    # The kernel reaps the workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            work(client)
        client.close()


def work(client: socket.socket) -> None:
    """Becomes a worker. The client sees its end when the connection closes."""
    status = 1
    try:
        _, fds, _, _ = socket.recv_fds(client, 1, 3)
        order = json.loads(read_all(client))
        settle(order["group"], *fds)
        os.environ.clear()
        os.environ.update(order["environ"])
        program = order["program"]
        sys.argv = [program]
        sys.path[0] = os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")
        status = 0
    except BaseException:
        # Nothing above this frame may go on in a copy of the nursery.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def read_all(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def settle(group: int, out: int, err: int, namespace: int) -> None:
    """Moves this process to where its client is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, group)
    os.dup2(out, 1)
    os.dup2(err, 2)
    libc = ctypes.CDLL(None, use_errno=True)
    # The worker ends with the nursery, and so with the test run.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.setns(namespace, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


if __name__ == "__main__":
    (serve if len(sys.argv) == 2 else request)(*sys.argv[1:])
