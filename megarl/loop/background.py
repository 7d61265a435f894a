"""An asyncio event loop that runs beside the training loop."""

import asyncio
from collections.abc import Coroutine
from threading import Thread
from typing import Any, TypeVar

import torch

T = TypeVar("T")

NAME = "rollout"  # of the thread


class BackgroundLoop:
    """An event loop in a thread of its own. It takes coroutines as asyncio.Runner does, and goes on between them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = Thread(target=self._serve, daemon=True, name=NAME)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it to its end while the calling thread waits; its exception is raised here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # when it was the wait that was interrupted
            raise

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # every thread begins with device 0
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
