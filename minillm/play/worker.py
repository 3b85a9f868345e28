"""One thread computes for everybody: a step of each job in turn, the others waiting in a queue.

A job is a generator of events, as a reply is of its tokens. Each asks for its next step once it has been
given the one before, and the thread does what it is asked in order: so jobs take turns. At most `together` of
them are under way; who has to wait is told how many are before them. Whoever stops listening (a closed tab)
ends their job.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from minillm.errors import InputError

Event = dict[str, Any]
Job = Generator[Event, None, None]
MOST_WAITING = 256
"""Jobs in the queue; one more is refused."""


class Busy(InputError):
    """Too many wait already."""

    status = 429


class Worker:
    """The thread. Models are used here and nowhere else."""

    def __init__(self, together: int = 4) -> None:
        self.together, self.thread = together, ThreadPoolExecutor(1, "worker")
        self.jobs = list[asyncio.Event]()
        """Those under way and, behind them, those that wait: each is woken when another leaves."""

    async def events(self, begin: Callable[[], Job]) -> AsyncGenerator[Event]:
        """The events of a job as they come, {"waiting": n} before them while n others are served first.

        What the job raises is raised here. To stop listening is to end the job.
        """
        if len(self.jobs) >= self.together + MOST_WAITING:
            raise Busy(f"{MOST_WAITING} others are waiting; try again in a minute")
        turn, steps, loop = asyncio.Event(), begin(), asyncio.get_running_loop()
        self.jobs.append(turn)
        try:
            while (place := self.jobs.index(turn) + 1 - self.together) > 0:
                turn.clear()
                yield {"waiting": place}
                await turn.wait()
            while (event := await loop.run_in_executor(self.thread, next, steps, None)) is not None:
                yield event
        finally:
            self.jobs.remove(turn)
            for other in self.jobs:
                other.set()
            self.thread.submit(steps.close)  # behind a step that is still being taken

    async def result(self, compute: Callable[[], Event]) -> Event:
        """The one event of a job without steps."""
        async with aclosing(self.events(lambda: (step() for step in [compute]))) as events:
            return [event async for event in events][-1]
