"""A judge's server as vLLM and SGLang are seen from outside: it answers, refuses, hangs or answers nonsense, as a test wants."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[int, dict[str, Any]], web.Response | str | None]


class JudgeServer:
    """Records the bodies of all requests; ``answer(index, body)`` gives a reply's text, a whole response, or None to hang."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        answer = self.answer(len(self.bodies) - 1, self.bodies[-1])
        if answer is None:
            await asyncio.Event().wait()
        return answer if isinstance(answer, web.Response) else completion(str(answer))

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


def completion(content: str | None, finish_reason: str = "stop") -> web.Response:
    message = {"role": "assistant", "content": content}
    return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]})


@asynccontextmanager
async def serve(answer: Answer) -> AsyncIterator[JudgeServer]:
    server = JudgeServer(answer)
    application = web.Application()
    application.router.add_post("/v1/chat/completions", server.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield server
    finally:
        await runner.cleanup()
