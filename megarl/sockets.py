"""Which of this machine's addresses a job listens on: only the one that its other processes reach it by.

Neither torch's stores nor gloo ask who connects. torch's own store listens on every interface; gloo on the one that the host's
name resolves to.
"""

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import psutil
from torch.distributed import TCPStore

LOCALHOST = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # read by gloo for every group; a user's own value is kept


def listen(address: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens on one address of this machine.

    Args:
        address: IP address, or a name that resolves to one.
        port: 0 takes a free one.
        backlog: connections that may wait to be accepted.

    Raises:
        OSError: the address is not one of this machine, or the port is in use.
    """
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(place[:2], family=family, backlog=backlog)


def serve_store(address: str, port: int, world_size: int, timeout: datetime.timedelta, *, waits: bool = False) -> TCPStore:
    """Return a store that this process serves, on ``address`` alone.

    Args:
        address, port: as ``listen`` takes them.
        world_size: processes that will use it.
        timeout: of the store's requests.
        waits: return only when all of them have connected.

    Raises:
        OSError: as ``listen``.
    """
    listener = listen(address, port, backlog=max(world_size, 16))
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store closes it
    return TCPStore(address, port, world_size, True, timeout, wait_for_workers=waits, master_listen_fd=descriptor)


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine by which packets to ``host`` leave; OSError where there is no way to it."""
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
        probe.connect(place)
        return str(probe.getsockname()[0])


def keep_gloo_to(address: str) -> None:
    """Let later gloo groups of this process, and of those that it starts, listen on the interface that has this address."""
    if GLOO_INTERFACE in os.environ:
        return
    for interface, addresses in psutil.net_if_addrs().items():
        if address in (one.address.partition("%")[0] for one in addresses):
            os.environ[GLOO_INTERFACE] = interface


@contextmanager
def gloo_kept_to(address: str) -> Iterator[None]:
    """Keep the groups that are made in the block to the same address."""
    before = os.environ.get(GLOO_INTERFACE)
    keep_gloo_to(address)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(GLOO_INTERFACE, None)


def is_loopback(address: str) -> bool:
    """Return whether an address, or what a name resolves to, is reached from this machine alone."""
    return ip_address(socket.getaddrinfo(address, None)[0][4][0]).is_loopback
