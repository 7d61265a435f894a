"""What a worker process takes from itself before it runs code of others, and one call in a fork of it. Imports nothing heavy.

The fork is for code that takes a response for a program.
"""

import ctypes
import gc
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

from megarl.errors import one_line

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 4, 36, 38, 22  # prctl(2)
SECCOMP_MODE_FILTER = 2
_MAX_ISOLATED_BYTES = 2**20  # of the answer of an isolated call
MAX_FILES = 256
_MAX_THREADS = 256

# Numbers of system calls, by machine: clone, clone3, those that are refused.
_CALLS = {
    "x86_64": (0xC000003E, 56, 435, (57, 58, 59, 322, 101, 310, 311)),  # fork, vfork, execve, execveat, ptrace, process_vm_*
    "aarch64": (0xC00000B7, 220, 435, (221, 281, 117, 270, 271)),
}
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # classic BPF
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # the other calling convention of x86_64, with numbers of its own


def limit_this_process(memory: int, processes: int, *, is_apart: bool) -> None:
    """Bound this process and all that it starts.

    Args:
        memory: bytes of address space of each process.
        processes: that it may start at a time; the kernel counts them only for a user of the sandbox's own, and not for root, so
            the trainer watches them too.
        is_apart: whether it is in a user namespace of its own.
    """
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_FILES,
    }
    if is_apart and _counts_by_namespace():
        limits[resource.RLIMIT_NPROC] = processes + _MAX_THREADS
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))
    if sys.platform == "linux":
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # its orphans stay below it, where they are found and killed with it


def refuse_new_processes() -> None:
    """Have the kernel refuse this process to start another one, a program, or to trace one; threads are left."""
    calls = _CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return
    program = ctypes.create_string_buffer(_process_filter(*calls))
    length = ctypes.c_ushort((len(program) - 1) // 8)
    header = struct.pack("@HP", length.value, ctypes.addressof(program))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)


def hide_from_other_processes() -> None:
    """Let no other process of this user trace this one or open its files."""
    if sys.platform == "linux":
        _prctl(PR_SET_DUMPABLE, 0)


def _process_filter(architecture: int, clone: int, clone3: int, refused: tuple[int, ...]) -> bytes:
    """Write the filter program: eight bytes an instruction, jumps counted from the next one."""
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, 0, 1, _X32),
        refuse,
        (_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),  # its flags are behind a pointer; the C library takes clone instead
    ]
    for number in refused:
        program += [(_EQUAL, 0, 1, number), refuse]
    program += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, 16),  # its flags
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        refuse,
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _counts_by_namespace() -> bool:
    """Return whether the kernel counts a user's processes in each user namespace apart (Linux 5.14)."""
    major, minor = (int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return (major, minor) >= (5, 14)


def _prctl(option: int, *arguments: object) -> None:
    values = [argument if isinstance(argument, bytes) else ctypes.c_ulong(argument) for argument in arguments]  # type: ignore[arg-type]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *values, *[ctypes.c_ulong(0)] * (4 - len(values))) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")


def isolated(function: Callable[..., object], *arguments: object) -> Any:
    """Call the function in a fork of this process that can start no other, and return its answer, a JSON value.

    Whatever the call changes is gone after it, so that one response cannot change the score of the next. The worker's own files are
    closed in the fork.

    Raises:
        RuntimeError: the function raised, or answered with too much or nothing.
    """
    hide_from_other_processes()
    gc.freeze()  # a collection in the fork would copy all memory of the worker
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        _answer_and_exit(writer, function, arguments)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        payload = stream.read(_MAX_ISOLATED_BYTES + 1)
    if len(payload) > _MAX_ISOLATED_BYTES:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise RuntimeError(f"the process that read the answer gave more than {_MAX_ISOLATED_BYTES} bytes")
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        os._exit(1)  # killed, perhaps for memory: the worker is replaced and asked again
    try:
        reply = json.loads(payload)
        answer, failure = reply["answer"], reply["failure"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise RuntimeError("the process that read the answer gave no score") from None
    if failure is not None:
        raise RuntimeError(failure)
    return answer


def _answer_and_exit(writer: int, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    try:
        os.closerange(3, writer)
        os.closerange(writer + 1, MAX_FILES)
        refuse_new_processes()
        try:
            reply = {"answer": function(*arguments), "failure": None}
        except BaseException as error:
            reply = {"answer": None, "failure": one_line(error)}
        with os.fdopen(writer, "wb") as stream:
            stream.write(json.dumps(reply).encode())
    finally:
        os._exit(0)
