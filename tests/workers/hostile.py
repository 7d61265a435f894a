"""Scorers for responses that are programs, and what such programs may try."""

import os
import random
import signal
from textwrap import dedent

WORKER = random.random()  # tells worker processes apart: in a sandbox all have the same process id


def execute(response, reference):
    """Execute the response with the reference's values; 1 if it set ``succeeded``."""
    values = dict(reference)
    exec(response, values)
    return float(values["succeeded"])


def kill_worker(response, reference):
    """Kill this worker while there are responses to do so, each a file of the folder; then give its length."""
    left = sorted(os.listdir(reference["folder"]))
    if left:
        os.unlink(os.path.join(reference["folder"], left[0]))
        os.kill(os.getpid(), signal.SIGKILL)
    return len(response)


def which_worker(response, reference):
    return WORKER


# Each runs as a bare process to show that it works there. ``folder`` has ``run/key`` with a secret in it and a socket ``socket``;
# ``port`` is served on this machine; ``victim`` is a process of the test.
PAYLOADS = {
    "writes a file": """
        open(folder + "/fired", "w").write("x")
        succeeded = True
    """,
    "reads the environment": """
        import os
        succeeded = "MEGARL_TEST_SECRET" in os.environ
    """,
    "reads another process's environment": """
        succeeded = b"MEGARL_TEST_SECRET" in open(f"/proc/{victim}/environ", "rb").read()
    """,
    "reads a key": """
        succeeded = open(folder + "/run/key").read() == "secret"
    """,
    "reads a key through a link": """
        import os, tempfile
        link = os.path.join(tempfile.mkdtemp(), "link")
        os.symlink(folder + "/run", link)
        succeeded = open(link + "/key").read() == "secret"
    """,
    "replaces a file by a link": """
        import os
        os.symlink("/etc/passwd", folder + "/fired")
        succeeded = True
    """,
    "reads a key through another process's root": """
        succeeded = open(f"/proc/{victim}/root{folder}/run/key").read() == "secret"
    """,
    "writes to Python's packages": """
        import os, reasoning_gym
        path = os.path.join(os.path.dirname(reasoning_gym.__file__), "fired_by_a_test")
        open(path, "w").close()
        os.unlink(path)
        succeeded = True
    """,
    "connects to a port": """
        import socket
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        succeeded = True
    """,
    "connects to a socket": """
        import socket
        client = socket.socket(socket.AF_UNIX)
        client.connect(folder + "/socket")
        succeeded = True
    """,
    "connects to an abstract socket": """
        import socket
        client = socket.socket(socket.AF_UNIX)
        client.connect("\\0" + folder)
        succeeded = True
    """,
    "kills a process": """
        import os
        os.kill(victim, 9)
        succeeded = True
    """,
    "traces a process": """
        import ctypes
        succeeded = ctypes.CDLL(None).ptrace(16, victim, None, None) == 0
    """,
    "makes a namespace": """
        import ctypes
        succeeded = ctypes.CDLL(None).unshare(0x10000000) == 0
    """,
    "fork bomb": """
        import os, time
        for _ in range(40):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        time.sleep(3)  # of which the watch needs a tenth of a second
        succeeded = True
    """,
    "memory bomb": """
        held = bytearray(2 * 2**30)
        succeeded = True
    """,
    "memory bomb of several processes": """
        import os, time
        reader, writer = os.pipe()
        for _ in range(4):
            if os.fork() == 0:
                held = b"x" * (400 * 2**20)
                os.write(writer, b"x")
                time.sleep(60)
                os._exit(0)
        for _ in range(4):
            os.read(reader, 1)
        time.sleep(5)  # of which the watch needs a tenth of a second
        succeeded = True
    """,
    "memory bomb in shared memory": """
        import mmap
        held = mmap.mmap(-1, 2 * 2**30)
        succeeded = True
    """,
    "fills a disk": """
        with open("/dev/shm/fired_by_a_test", "wb") as file:
            import os
            os.unlink("/dev/shm/fired_by_a_test")
            for _ in range(512):
                file.write(bytes(2**20))
        succeeded = True
    """,
}

PROGRAMS = {name: dedent(program) for name, program in PAYLOADS.items()}
