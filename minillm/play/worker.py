"""One thread computes for everybody: a step of each job in turn, the others waiting in a queue.

A job is an iterator of events, as a reply is of its tokens. At most `together` of them are under way; who has
to wait is told how many are before them. Whoever stops listening (a closed tab) ends their job.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from minillm.errors import InputError

Event = dict[str, Any]
MOST_WAITING = 256
"""Jobs in the queue; one more is refused."""


class Busy(InputError):
    """Too many wait already."""


@dataclass(eq=False)
class Job:
    """Somebody's computation: its steps, and where its events go."""

    steps: Callable[[], Iterator[Event]]
    deliver: Callable[[Event | BaseException | None], None]
    """Takes each event, then None at the end, or what went wrong."""
    left: bool = False
    """Nobody listens any more."""
    iterator: Iterator[Event] | None = None
    told: int = 0
    """The place in the queue that was said last."""


class Worker:
    """The thread. Models are used here and nowhere else."""

    def __init__(self, together: int = 4) -> None:
        self.together, self.running = together, deque[Job]()
        self.waiting, self.changed = deque[Job](), threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="worker").start()

    async def events(self, steps: Callable[[], Iterator[Event]]) -> AsyncGenerator[Event]:
        """The events of a job as they come, {"waiting": n} before them while n others are served first.

        What the job raises is raised here. To stop listening is to end the job.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException | None]()

        def deliver(event: Event | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        job = Job(steps, deliver)
        with self.changed:
            if len(self.waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} others are waiting; try again in a minute")
            self.waiting.append(job)
            self.changed.notify()
        try:
            while (event := await queue.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            job.left = True

    async def result(self, compute: Callable[[], Event]) -> Event:
        """The one event of a job without steps."""
        found: Event = {}
        async with aclosing(self.events(lambda: iter([compute()]))) as events:
            async for event in events:
                found |= event if "waiting" not in event else {}
        return found

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.running and not self.waiting:
                    self.changed.wait()
                while self.waiting and len(self.running) < self.together:
                    self.running.append(self.waiting.popleft())
                waiting = list(self.waiting)
            for place, job in enumerate(waiting, start=1):
                if job.told != place:
                    job.told = place
                    job.deliver({"waiting": place})
            for job in list(self.running):
                if not self._step(job):
                    self.running.remove(job)

    def _step(self, job: Job) -> bool:
        """Whether there is more to do."""
        if job.left:
            if job.iterator is not None and hasattr(job.iterator, "close"):
                job.iterator.close()
            return False
        try:
            if job.iterator is None:
                job.iterator = job.steps()
            event = next(job.iterator, None)
        except Exception as error:  # of this job alone: it is raised where somebody waits for it
            job.deliver(error)
            return False
        job.deliver(event)
        return event is not None
