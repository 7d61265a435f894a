"""Episodes that take their turns together, so that what an engine decodes together does not depend on environments' speed."""

import asyncio
from collections.abc import Iterable

EpisodeKey = tuple[int, int]  # seed of the prompt's request, sample index


class LockStep:
    """The episodes of one wave of prompts, of which ``num_slots`` are in flight at a time.

    A turn begins when every episode in flight waits for it and no other prompt could be in flight: which requests an engine gets
    together, and in which order, then follows from the prompts alone.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._num_queued = 0
        self._playing: set[EpisodeKey] = set()
        self._waiting: dict[EpisodeKey, asyncio.Future[None]] = {}

    def enqueue(self) -> None:
        """Count a prompt that waits for a slot."""
        self._num_queued += 1

    def admit(self, episodes: Iterable[EpisodeKey]) -> None:
        """Count its episodes as played: it has a slot."""
        self._num_queued -= 1
        self._playing.update(episodes)

    def give_up(self) -> None:
        """Forget a prompt that waits no longer."""
        self._num_queued -= 1
        self._advance()

    def leave(self, episodes: Iterable[EpisodeKey]) -> None:
        """Forget its episodes: it gave its slot back."""
        self._playing.difference_update(episodes)
        self._advance()

    def finish(self, episode: EpisodeKey) -> None:
        """Forget an episode that has no more turns."""
        self._playing.discard(episode)
        self._advance()

    async def turn(self, episode: EpisodeKey) -> None:
        """Wait until all others wait too."""
        waiting = self._waiting[episode] = asyncio.get_running_loop().create_future()
        self._advance()
        try:
            await waiting
        finally:
            if self._waiting.get(episode) is waiting:
                del self._waiting[episode]

    def _advance(self) -> None:
        # a prompt whose episodes are over is about to make room for the next one
        is_full = self._num_queued == 0 or len({seed for seed, _ in self._playing}) >= self._num_slots
        if is_full and self._waiting and self._waiting.keys() >= self._playing:
            # not here: the last to come would go on at once, before those that wait
            asyncio.get_running_loop().call_soon(self._begin, list(self._waiting.items()))
            self._waiting.clear()

    def _begin(self, waiting: list[tuple[EpisodeKey, asyncio.Future[None]]]) -> None:
        for _, future in sorted(waiting, key=lambda item: item[0]):
            if not future.done():
                future.set_result(None)
