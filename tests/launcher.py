"""Processes of the program, forked from one that has imported it: a tenth of a second each instead of a whole one.

    subprocess.run([*launcher.program(), "say", "Hello."], ...)      # as sys.executable organism.py say Hello.

What runs is a process of its own, with the caller's arguments, folder, environment and open files, and its exit code comes
back. Signals do not reach it, and variables that are read when kernels are loaded have been read: tests of those start
the program itself.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CRASHED = 70  # without a word

# What stands for the program: hands its open files over, and waits for the exit code.
CLIENT = f"""
import json, os, socket, sys
launcher = socket.socket(socket.AF_UNIX)
launcher.connect(sys.argv[1])
request = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(launcher, [len(request).to_bytes(4, "big")], [0, 1, 2])
launcher.sendall(request)
sys.exit(int(launcher.recv(16) or {CRASHED}))
"""


_kept: list[subprocess.Popen] = []


@functools.cache
def program() -> list[str]:
    """The command line that stands for the program. The launcher ends with the process that first asked."""
    server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _kept.append(server)  # and with it our end of its stdin
    assert server.stdout
    return [sys.executable, "-I", "-S", "-c", CLIENT, server.stdout.readline().decode().strip()]


def serve() -> None:
    """Fork for each client, until nobody holds the other end of stdin."""
    sys.path.insert(0, str(ROOT))
    import organism
    from swarm.nursery import preload

    organism.command_line()
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := f"{folder}/socket")
        listener.listen()
        print(address, flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                live(client)
            client.close()


def live(client: socket.socket) -> None:
    """Become the process that the client asks for."""
    import organism

    code = CRASHED
    try:
        size, files, _, _ = socket.recv_fds(client, 4, 3)
        request = b""
        while len(request) < int.from_bytes(size, "big"):
            request += client.recv(1 << 16)
        arguments, folder, environment = json.loads(request)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.stdin, sys.stdout, sys.stderr = (open(n, mode, encoding="utf-8") for n, mode in enumerate(("r", "w", "w")))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code = organism.main(arguments)
        sys.stdout.flush()
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        client.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    serve()
