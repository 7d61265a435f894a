"""Keeps strangers away from an engine's server: requests need the run's key, and stores listen on their own address alone.

Runs in every process of an engine, in the engine's own environment: imports only the standard library and, where a store is made,
torch.
"""

import functools
import hmac
import importlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "MEGARL_API_KEY"  # the trainer's word too: megarl/engines/server_launch.py
OPEN = ("GET", "/health")  # says nothing but that the server lives

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware: answers 401 to every request that does not carry the key, whatever its route and method.

    The engines' own keys leave routes open: vLLM's all but /v1, /v2, /inference and /cohere, which leaves those that pause it, load
    weights and call methods of its workers; SGLang's /health_generate and /metrics.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set; set it to the key that requests must carry")
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or answer it."""
        if scope["type"] == "lifespan" or self._is_welcome(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the client gets 403
        else:
            body = json.dumps({"error": {"message": "this server wants the key of its run"}}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _is_welcome(self, scope: Scope) -> bool:
        if (scope.get("method"), scope["path"]) == OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def keep_stores_to_their_address() -> None:
    """Make the stores by which an engine's processes find each other listen on the address that they are given alone.

    torch's own listens on every interface, and asks nobody who connects.
    """
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # its package has a function of the same name
    if not isinstance(rendezvous.TCPStore, functools.partial):
        rendezvous.TCPStore = functools.partial(_store, rendezvous.TCPStore)


def _store(original: Callable[..., object], *, host_name: str, port: int, is_master: bool, **others: object) -> Any:
    """Open torch's store, as torch.distributed.rendezvous makes one."""
    if is_master:
        family, _, _, _, place = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family, backlog=1024)
        others |= {"master_listen_fd": listener.detach()}
    return original(host_name=host_name, port=port, is_master=is_master, **others)
