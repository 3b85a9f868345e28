"""The addresses of the page, and what each does."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from minillm.errors import InputError, reading
from minillm.files import read_json
from minillm.play.api import openai_routes
from minillm.play.parts import Guessing, Picking
from minillm.play.shelf import Shelf, reply
from minillm.play.training import Training, pack
from minillm.play.web import Fields, fields_of, status_of, stream_of, words_for
from minillm.play.worker import Event, Worker

STATIC = Path(__file__).parent / "static"
RESULTS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"


def build_app(
    shelf: Shelf, worker: Worker, guessing: Guessing, picking: Picking, training: Training, runs: Path
) -> Starlette:
    """The application; in `runs` are also the page of minillm.compare and the records of lessons/."""
    results, records = runs / "compare" / "compare.html", runs / "lessons"

    async def computed(compute: Callable[[], Event]) -> Response:
        return JSONResponse(await worker.result(compute))

    async def state(request: Request) -> Response:
        def found() -> Event:
            known = {"runs": shelf.runs(), "ranked": picking.count(), "results": results.exists()}
            return known | {"training": {"name": training.name, "running": training.running}}

        return JSONResponse(await run_in_threadpool(found))

    async def question(request: Request) -> Response:
        run, number = request.query_params.get("run", ""), request.query_params.get("number", "")
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            raise InputError(f"number {number!r:.40}: give a whole number")
        return await computed(lambda: guessing.question(run, int(number)))

    async def guess(request: Request) -> Response:
        fields: Fields = {"run": (str, ...), "number": (int, ...), "temperature": (float, 1.0)}
        asked = await fields_of(request, fields)
        return await computed(lambda: guessing.answer(**asked))

    async def ranking(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(picking.current, request.query_params.get("name", "")))

    async def rank(request: Request) -> Response:
        asked = await fields_of(request, {"name": (str, ...), "key": (str, ""), "action": (str, ...)})
        ranked = await run_in_threadpool(picking.act, **asked)
        # It is on the disk; what the reward model says of it is an extra.
        return await computed(lambda: picking.scores(*ranked)) if ranked else JSONResponse({})

    async def chat(request: Request) -> Response:
        own: Fields = {"run": (str, ...), "messages": (list, ...)}
        asked = await fields_of(request, {**own, "temperature": (float, 0.7), "seed": (int, 0)})
        run, messages = asked.pop("run"), asked.pop("messages")
        return stream_of(worker.events(lambda: reply(shelf, run, messages, **asked)))

    async def train(request: Request) -> Response:
        asked = await fields_of(request, {"beside": (bool, False), "iterations": (int, 20)})
        count = await run_in_threadpool(picking.count)
        return JSONResponse({"run": training.start(count, **asked)})

    async def train_events(request: Request) -> Response:
        return stream_of(training.follow())

    async def change(request: Request) -> Response:
        asked = await fields_of(request, {"what": (str, ...), "name": (str, ""), "new": (str, "")})
        match asked["what"]:
            case "stop":
                training.stop()
            case "undo":
                await run_in_threadpool(training.undo, asked["name"])
            case "keep":
                training.keep(asked["name"], asked["new"])
            case what:
                raise InputError(f"what is {what!r:.40}; give stop, undo or keep")
        return JSONResponse({})

    async def export(request: Request) -> Response:
        folder = shelf.folder_of(request.query_params.get("run", ""))
        with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
            path = Path(file.name)
        await run_in_threadpool(pack, folder, path)
        return FileResponse(path, filename=f"{folder.name}.zip", background=BackgroundTask(path.unlink))

    async def compared(request: Request) -> Response:
        with reading(results, "make demo makes it, or python -m minillm.compare"):
            text = await run_in_threadpool(results.read_text, encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": RESULTS_POLICY})

    async def lessons(request: Request) -> Response:
        def found() -> Event:
            read = [read_json(path) for path in sorted(records.glob("[0-9]*.json"))]
            shown = ("lesson", "claim", "verdict", "sentence")
            return {"lessons": [{name: str(one.get(name, "")) for name in shown} for one in read]}

        return JSONResponse(await run_in_threadpool(found))

    async def picture(request: Request) -> Response:
        path = records / f"{request.path_params['lesson']}.png"
        if not path.is_file():
            raise InputError(f"{path.name}: no such picture; make lessons makes them")
        return FileResponse(path)

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": words_for(error)}, status_of(error))

    return Starlette(
        routes=[
            Route("/", page),
            Route("/results", compared),
            Route("/lessons/{lesson}.png", picture),
            Route("/api/lessons", lessons),
            Route("/api/state", state),
            Route("/api/guess", question),
            Route("/api/guess", guess, methods=["POST"]),
            Route("/api/rank", ranking),
            Route("/api/rank", rank, methods=["POST"]),
            Route("/api/chat", chat, methods=["POST"]),
            Route("/api/train", train_events),
            Route("/api/train", train, methods=["POST"]),
            Route("/api/change", change, methods=["POST"]),
            Route("/api/export", export),
            *openai_routes(shelf, worker),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={Exception: refused, InputError: refused},
    )
