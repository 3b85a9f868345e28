"""What the tests of the page share: small runs, and a server of them."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from matplotlib.figure import Figure

from minillm.chat import with_chat_template
from minillm.io.disk import write_json
from minillm.io.huggingface import save_model, save_scalar_model
from minillm.model import LanguageModel, config_of_depth, initialize, scalar_from_language_model
from minillm.play import __main__ as play
from minillm.tokenizer import Tokenizer
from minillm.tools import chat
from minillm.world import World


def make_runs(folder: Path) -> Path:
    """What the demo leaves, in small: base model, assistant, reward model, all untrained, and responses."""
    world = World(0)
    prompts = world.prompts("reward", n=24)
    text = [prompt.messages[-1]["content"] for prompt in world.prompts("train", n=200)]
    plain = Tokenizer.train(text, 400)
    model = LanguageModel(config_of_depth(1, plain.vocab_size, 160))
    initialize(model, torch.Generator().manual_seed(0))
    save_model(folder / "base", model, plain)
    options = {"world_megabytes": 0.3, "val_fraction": 0.2, "seed": 0}
    write_json(folder / "base" / "run.json", {"stage": "train", "options": options})
    chatty = with_chat_template(plain)
    save_model(folder / "sft", model, chatty)
    write_json(folder / "sft" / "run.json", {"stage": "sft", "options": {}})
    reward = scalar_from_language_model(model, torch.Generator().manual_seed(1))
    save_scalar_model(folder / "rlhf" / "reward", reward, chatty)
    lines = [
        {
            "messages": p.messages,
            "kind": p.kind,
            "world": 0,
            "responses": ["No.", f"Yes {i}, of course.", "", "<b>hm</b>"],
        }
        for i, p in enumerate(prompts)
    ]
    (folder / "rlhf" / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = folder / "compare" / "compare.html"
    compared.parent.mkdir()
    compared.write_text("<!doctype html><html lang=en><title>Compared</title><p>Three models</p></html>")
    lesson = {"lesson": "06_a", "claim": "A <b>claim</b>.", "verdict": "holds", "sentence": "50% → 8%"}
    write_json(folder / "lessons" / "06_a.json", lesson)
    Figure().savefig(folder / "lessons" / "06_a.png")
    return folder


def serve(options: play.Options) -> Iterator[str]:
    """The server in a thread."""
    listening = play.bind(options)
    port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(play.build(options, port)[0], log_level="critical", lifespan="off")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = server.force_exit = True
    thread.join(20)


@contextmanager
def a_model_that_calls(tokenizer: Tokenizer) -> Iterator[None]:
    """Every reply is a call of the calculator, and after its result a sentence with that."""

    def stream(model: LanguageModel, prompt: list[int], sampling: Any, seed: int) -> Iterator[int]:
        result = re.search(r'"2\+3"\}\D*(\d+)', tokenizer.decode(prompt))
        yield from tokenizer.encode(f"It is {result[1]}." if result else "Let me see.")
        if result is None:
            yield tokenizer.special_tokens["<|system|>"]
            yield from tokenizer.encode('calculator {"expression": "2+3"}')
        yield sampling.stop_ids[0]

    before, chat.stream = chat.stream, stream
    try:
        yield
    finally:
        chat.stream = before
