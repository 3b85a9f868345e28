"""Serves the page.

    python -m minillm.play                          on http://127.0.0.1:8017, with the runs in out/
    python -m minillm.play --runs elsewhere         with those of another folder
    python -m minillm.play --text tale.txt          guess the next word of a text of your own
    python -m minillm.play --host 0.0.0.0 --token 16lettersAndDigits    for other machines; make up your own

What is there after `make demo` suffices; with less, the page says what is missing and how to make it.
"""

import sys

if __name__ == "__main__":
    import minillm.tools.start  # noqa: F401  (first: Ctrl-C while torch loads ends in one word)

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from minillm.errors import InputError, Interrupted
from minillm.options import Count, Limit, check_limits
from minillm.tools.commandline import parse_options
from minillm.tools.ending import one_line_errors, signals


@dataclass(frozen=True)
class Options:
    """Guess the next word, pick the better response, watch a model change: a page on this machine."""

    runs: str = "out"
    """The folder of runs: base, sft, rlhf; what visitors make goes into play/ there."""
    text: tuple[str, ...] = ()
    """Text to guess the words of, read as train.py --data reads it. Default: what the run held out."""
    host: str = "127.0.0.1"
    """The address to serve on. Any but this machine's own needs a --token."""
    port: Annotated[int, Limit("0 to 65535", lambda value: 0 <= value < 2**16)] = 8017
    """The port; 0 takes a free one."""
    token: str | None = None
    """A secret that visitors from other machines must know, of 16 letters and digits or more."""
    auto: bool = False
    """Train after every tenth pick, without waiting for the button."""
    together: Count = 4
    """Replies under way at once; more wait in a queue."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.token is not None and (
            len(self.token) < 16 or not self.token.isascii() or not self.token.isalnum()
        ):
            raise InputError("--token: give 16 letters and digits or more")
        if not self.is_local and self.token is None:
            raise InputError(f"--host {self.host}: others could use this machine; give a --token as well")
        if not Path(self.runs).is_dir():
            raise InputError(f"--runs {self.runs}: no such folder; make demo makes out/")

    @property
    def is_local(self) -> bool:
        """Whether only this machine is served."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        listening = bind(options)
        port = listening.getsockname()[1]
        app, training = build(options, port)
        host = "127.0.0.1" if options.is_local else options.host
        query = f"?token={options.token}" if options.token else ""
        print(f"http://{host}:{port}/{query}    (Ctrl-C ends)", flush=True)
        asyncio.run(serve(app, training, listening))


async def serve(app: Any, training: Any, listening: socket.socket) -> None:
    """Until a signal, which ends a training as it ends one at the terminal; none is an exception here, which
    could strike in the middle of any answer."""
    import uvicorn

    # Errors are told by words_for(); else this server logs windows closed in the middle of an answer.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
    server, told = uvicorn.Server(config), list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        server.should_exit = True

    with signals(stop):  # uvicorn takes two of them itself, and hands them on at its end
        try:
            await server.serve([listening])
        finally:
            await training.close()
    raise Interrupted(*told)


def bind(options: Options) -> socket.socket:
    """A socket that listens. InputError where there is none to be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        place = f"--host {options.host} --port {options.port}"
        raise InputError(f"{place}: {error.strerror}; give another --port") from error


def build(options: Options, port: int) -> tuple[Any, Any]:
    """The application with all its parts, and of these the one that has to be closed."""
    from minillm.play.app import build_app
    from minillm.play.parts import Guessing, Picking
    from minillm.play.shelf import Shelf
    from minillm.play.training import Training
    from minillm.play.web import Door
    from minillm.play.worker import Worker
    from minillm.tools.device import choose_device

    shelf = Shelf(Path(options.runs), choose_device(options.device, 0))
    worker, picking = Worker(options.together), Picking(shelf)
    training = Training(picking, worker, options.device)
    app = build_app(shelf, worker, Guessing(shelf, options.text), picking, training, options.auto)
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
    return Door(app, hosts if options.is_local else set(), options.token), training


if __name__ == "__main__":
    main(sys.argv[1:])
