"""The addresses of the page, and what each does. What is no coroutine runs in a thread: it reads files."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from minillm.errors import InputError, reading
from minillm.io.disk import read_json
from minillm.play.api import openai_routes
from minillm.play.parts import Guessing, Picking
from minillm.play.shelf import Shelf, reply
from minillm.play.training import FEWEST_RANKINGS, Training, pack
from minillm.play.web import posted, status_of, stream_of, words_for
from minillm.play.worker import Event, Worker

STATIC = Path(__file__).parent / "static"
RESULTS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"


def build_app(
    shelf: Shelf, worker: Worker, guessing: Guessing, picking: Picking, training: Training, auto: bool
) -> Starlette:
    """The application; `auto` trains after every tenth pick, as the button does."""
    results, records = shelf.folder / "compare" / "compare.html", shelf.folder / "lessons"

    def state(request: Request) -> Response:
        runs, wrong = shelf.look()
        known = {"runs": runs, "ranked": picking.count(), "results": results.exists()}
        known["needed"] = FEWEST_RANKINGS
        known["note"] = "; ".join(filter(None, [*wrong, picking.doubt(runs)]))
        return JSONResponse(known | {"training": {"name": training.name, "running": training.running}})

    async def guess(run: str, number: int, temperature: float = 1.0) -> Event:
        return await worker.result(partial(guessing.ask, run, number, temperature))

    async def rank(name: str, key: str = "", action: str = "") -> Event:
        ranked = await run_in_threadpool(picking.act, name, key, action)
        told: Event = {}
        if ranked:  # it is on the disk; what the reward model says of it is an extra
            told = await worker.result(partial(picking.scores, *ranked))
            count = picking.count()
            if auto and not training.running and count % FEWEST_RANKINGS == 0:
                training.start(count)
        return told | await run_in_threadpool(picking.current, name)

    async def chat(run: str, messages: list[Any], temperature: float = 0.7, seed: int = 0) -> Response:
        how = partial(reply, shelf, run, messages, calls_run=True, temperature=temperature, seed=seed)
        return stream_of(worker.events(how))

    async def train(beside: bool = False, iterations: int = 20) -> Event:
        return {"run": training.start(picking.count(), beside, iterations)}

    async def train_events(request: Request) -> Response:
        return stream_of(training.follow())

    async def change(what: str, name: str = "", new: str = "") -> Event:
        match what:
            case "stop":
                training.stop()
            case "undo":
                await run_in_threadpool(training.undo, name)
            case "keep":
                training.keep(name, new)
            case _:
                raise InputError(f"what is {what!r:.40}; give stop, undo or keep")
        return {}

    def export(request: Request) -> Response:
        folder = shelf.folder_of(request.query_params.get("run", ""))
        with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
            pack(folder, path := Path(file.name))
        return FileResponse(path, filename=f"{folder.name}.zip", background=BackgroundTask(path.unlink))

    def compared(request: Request) -> Response:
        with reading(results, "make demo makes it, or python -m minillm.compare"):
            text = results.read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": RESULTS_POLICY})

    def lessons(request: Request) -> Response:
        read = [read_json(path) for path in sorted(records.glob("[0-9]*.json"))]
        shown = ("lesson", "claim", "verdict", "sentence")
        return JSONResponse({"lessons": [{name: str(one.get(name, "")) for name in shown} for one in read]})

    def picture(request: Request) -> Response:
        path = records / f"{request.path_params['lesson']}.png"
        if not path.is_file():
            raise InputError(f"{path.name}: no such picture; make lessons makes them")
        return FileResponse(path)

    def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": words_for(error)}, status_of(error))

    return Starlette(
        routes=[
            Route("/", page),
            Route("/results", compared),
            Route("/lessons/{lesson}.png", picture),
            Route("/api/lessons", lessons),
            Route("/api/state", state),
            Route("/api/train", train_events),
            Route("/api/export", export),
            posted("/api/guess", guess),
            posted("/api/rank", rank),
            posted("/api/chat", chat),
            posted("/api/train", train),
            posted("/api/change", change),
            *openai_routes(shelf, worker),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={Exception: refused, InputError: refused},
    )
