"""Reward functions as a user would write them, good and bad."""

import asyncio
import contextlib
import os
import random
import subprocess

WORKER = random.random()  # tells worker processes apart: in a sandbox all have the same process id


def length(response, reference):
    return len(response)


def noisy_length(response, reference):
    print("a print must not break the worker's answers")
    return len(response)


def loops_on_request(response, reference):
    """Loops for ever after opening the pipe ``reference["started"]``, for the response "loop"; else gives its worker."""
    if response == "loop":
        with open(reference["started"], "w"):
            pass
        while True:
            pass
    return WORKER


def raises(response, reference):
    raise KeyError("two\nlines")


def exits(response, reference):
    os._exit(3)


def returns_text(response, reference):
    return "1.0"


def returns_nan(response, reference):
    return float("nan")


def reads_level(response, reference):
    return reference["level"]


async def async_length(response, reference):
    await asyncio.sleep(0)
    return len(response)


async def async_never(response, reference):
    await asyncio.Event().wait()


async def async_raises(response, reference):
    raise TimeoutError("the judge is away")


async def async_lets_cancellation_out(response, reference):
    raise asyncio.CancelledError


async def async_cancels_itself(response, reference):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def async_exits(response, reference):
    raise SystemExit(3)


async def async_interrupts(response, reference):
    raise KeyboardInterrupt


async def async_takes_no_reference(response):
    return 1.0


async def async_swallows_cancellation(response, reference):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def async_leaves_processes(response, reference):
    process = await asyncio.create_subprocess_exec("sh", "-c", "sleep 65432 & sleep 65432")
    await process.wait()


async def async_fails_and_leaves_processes(response, reference):
    subprocess.Popen(["sleep", "65432"])
    raise ValueError("no score")


def exits_by_exception(response, reference):
    raise SystemExit(3)


def is_cancelled(response, reference):
    raise asyncio.CancelledError


def interrupts(response, reference):
    raise KeyboardInterrupt


def step_lengths(steps, reference):
    return [len(step) for step in steps]


async def async_step_lengths(steps, reference):
    return tuple(len(step) for step in steps)


def one_step_too_few(steps, reference):
    return [1.0] * (len(steps) - 1)


def nan_of_a_step(steps, reference):
    return [1.0] * (len(steps) - 1) + [float("nan")]


class AsyncJudge:
    async def __call__(self, response, reference):
        return 2


judge = AsyncJudge()
