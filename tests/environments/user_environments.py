"""Environments as a user would write them, good and bad."""

import os
import random
import threading
import time

WORKER = random.random()  # tells worker processes apart: in a sandbox all have the same process id


class Counting:
    """Done when the policy has said "stop"; the reward of a turn is its number plus ``bonus``."""

    def __init__(self, bonus=0.0):
        self.bonus = bonus
        self.turns = 0

    def reset(self, prompt, reference, seed):
        print("a print must not break the worker's answers")
        self.prompt, self.answer, self.seed = prompt, reference["answer"], seed
        return f"{prompt} {self.answer} {seed}"

    def step(self, response):
        self.turns += 1
        return f"{self.turns}: {response}", self.turns + self.bonus, response == "stop"


class AsyncCounting(Counting):
    async def reset(self, prompt, reference, seed):
        return super().reset(prompt, reference, seed)

    async def step(self, response):
        return super().step(response)


class Bad:
    """Misbehaves at a step as ``how`` says, once the policy says "now"."""

    def __init__(self, how):
        self.how = how

    def reset(self, prompt, reference, seed):
        if self.how == "reset_number":
            return 3
        if self.how == "unpicklable":
            self.lock = threading.Lock()
        return None

    def step(self, response):
        if response != "now":
            return str(WORKER), None, False
        if self.how == "raises":
            raise KeyError("two\nlines")
        if self.how == "exits":
            os._exit(3)
        if self.how == "hangs":
            while True:
                time.sleep(1)
        return {
            "nan": ("x", float("nan"), False),
            "text_reward": ("x", "1", False),
            "number": (3, 1.0, False),
            "pair": ("x", 1.0),
            "done_is_text": ("x", 1.0, "yes"),
            "nothing": (None, 1.0, False),
        }[self.how]


class AsyncHanging:
    def reset(self, prompt, reference, seed):
        return None

    async def step(self, response):
        import asyncio

        await asyncio.Event().wait()


class AsyncCancelled(AsyncHanging):
    async def step(self, response):
        import asyncio

        raise asyncio.CancelledError


class AsyncExits(AsyncHanging):
    async def step(self, response):
        raise SystemExit(3)


class NoStep:
    def reset(self, prompt, reference, seed):
        return None
