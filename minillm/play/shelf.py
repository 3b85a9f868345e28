"""The runs in a folder and their models, opened when first asked for and anew once their weights change.

What is asked of a model: a reply to messages token by token (`reply`), and afterwards how probable each of
its tokens was and what the model would have said instead (`alternatives`).
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import regex
import torch

from minillm.errors import InputError
from minillm.generate import SamplingOptions
from minillm.io.disk import read_json
from minillm.io.huggingface import load_causal_model, load_scalar_model
from minillm.io.messages import check_messages, with_tools
from minillm.io.weights import weights_file
from minillm.model import LanguageModel
from minillm.play.worker import Event, Job
from minillm.preferences import ChatModel
from minillm.tokenizer import Tokenizer
from minillm.tools.calls import Tool, calculator, search, texts_of_run
from minillm.tools.chat import Chat
from minillm.tools.chat import Options as ChatOptions
from minillm.tools.folder import read_run

MOST_OPEN = 8
"""Models in memory; the one not asked for the longest goes first."""
DEEPEST = 4
"""Folders below the folder of runs in which runs are looked for."""


class NoSuchRun(InputError):
    """A name that no run here has."""

    status = 404


class Shelf:
    """The models of a folder of runs, by name: their paths in it, as in "sft" or "rlhf/ppo"."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def look(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The language models there are, by name and stage, in the order of their stages; and what is wrong
        with the runs that cannot be read, which are left out."""
        found, wrong, order = [], list[str](), ["train", "sft", "policy"]
        for depth in range(1, DEEPEST + 1):
            for path in sorted(self.folder.glob("*/" * depth + "config.json")):
                name = path.parent.relative_to(self.folder).as_posix()
                try:
                    if kind_of(path) == "language model" and weights_file(path.parent):
                        stage, options = read_run(path.parent)
                        # Of whose text or prompts it is.
                        world = options.get("seed") if options.get("data") == [] else None
                        found.append({"name": name, "stage": stage, "world": world})
                except InputError as error:
                    wrong.append(str(error))
        found.sort(key=lambda run: order.index(run["stage"]) if run["stage"] in order else 3)
        return found, wrong

    def folder_of(self, name: str) -> Path:
        """Where a run is. NoSuchRun where there is none of that name."""
        names = [run["name"] for run in self.look()[0]]
        if name not in names:
            there = ", ".join(names) or "none; make demo makes some"
            raise NoSuchRun(f"{name!r:.80}: no such run here; there are: {there}")
        return self.folder / name

    def model(self, name: str) -> tuple[LanguageModel, Tokenizer]:
        """NoSuchRun where there is none."""
        return self._open(load_causal_model, self.folder_of(name))

    def reward_model(self, name: str) -> Any:
        """A reward model and its tokenizer; None where there is none."""
        path = self.folder / name / "config.json"
        if not path.exists() or kind_of(path) == "language model":
            return None
        return self._open(load_scalar_model, path.parent)

    @cache  # noqa: B019  (one shelf a server)
    def tools(self, name: str) -> dict[str, Tool]:
        """What a model may call here: a calculator, and a search over the text it was trained on."""
        found = {"calculator": calculator()}
        with suppress(InputError):  # not known which
            found["search"] = search(texts_of_run(self.folder / name))
        return found

    def _open(self, load: Any, folder: Path) -> Any:
        weights, held = weights_file(folder), self._held(folder)
        changed = weights.stat().st_mtime_ns if weights else 0
        if changed not in held:
            held.clear()
            held[changed] = load(folder, self.device, torch.float32)
        return held[changed]

    @lru_cache(maxsize=MOST_OPEN)  # noqa: B019  (one shelf a server)
    def _held(self, folder: Path) -> dict[int, Any]:
        """The model of a folder, by the time of its weights: while it learns, no earlier one is kept."""
        return {}


def kind_of(config: Path) -> str:
    """What a config.json is of."""
    named = read_json(config).get("architectures") or [""]
    return "language model" if str(named[0]).endswith("CausalLM") else "another"


# ---- Replies


def reply(
    shelf: Shelf,
    name: str,
    messages: Any,
    tools: Any = (),
    top: int = 3,
    stop: Sequence[str] = (),
    calls_run: bool = False,
    **options: Any,
) -> Job:
    """A model's reply to messages of which the last is the user's or a tool's, as events:

    {"note": …} for each thing there is to say before, such as messages dropped from the context;
    {"piece": text} for each token, one that ends in the middle of a character with the next;
    {"end": "stop", "length" or "tool_calls", "message": as in OpenAI's API, "prompt_tokens": n,
     "tokens": [{"text", "p", "instead": [[text, p], …]}, …]};
    {"call": "name arguments", "result": message} where calls are run here, and then all of it again.

    It ends before the first of the `stop` texts. The model is told of `tools`, which are as in OpenAI's API;
    `options` are of `python -m minillm.chat`.
    """
    checked = check_messages(messages)
    if checked[-1]["role"] not in ("user", "tool") or not any(m["role"] == "user" for m in checked):
        raise InputError("messages: the last is not the user's or a tool's; add what is to be answered")
    chat = Chat(*shelf.model(name), ChatOptions(run=name, **options))
    if tools and chat.format.call_id is None:
        raise InputError(f"{name}: knows no calls of tools; ask an assistant that sft.py made")
    *before, last = with_tools(checked, tools)
    chat.messages = tuple(before)
    until = Until(stop)
    for event in chat.events(last):
        if "piece" in event:
            event["piece"], chat.stopped = until.feed(event["piece"]), until.found
        if "end" in event:
            if rest := until.feed("", last=True):
                yield {"piece": rest}
            prompt, said = event.pop("prompt"), event["tokens"]
            event["tokens"] = alternatives(chat.model, chat.tokenizer, prompt, said, top)
            event |= {"prompt_tokens": len(prompt)} | ({"end": "stop"} if until.found else {})
        yield event
        if event.get("end") == "tool_calls":
            if not calls_run:
                return
            chat.tools = shelf.tools(name)


class Until:
    """Text up to the first of the `stops`. What may be the beginning of one is held back until that is
    known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stop = regex.compile("|".join(map(regex.escape, stops)) or "(?!)")
        self.held, self.found = "", False

    def feed(self, text: str, last: bool = False) -> str:
        """What can be said now that this text has come."""
        self.held += text
        place = self.stop.search(self.held, partial=not last)
        self.found = place is not None and not place.partial
        said = self.held[: place.start()] if place else self.held
        self.held = self.held[len(said) :]
        return said


@torch.inference_mode()
def alternatives(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], said: list[int], top: int
) -> list[Event]:
    """Of each token said: its text, its probability at temperature 1, and the `top` most probable there.

    Where the context was cropped in between, nothing but the texts.
    """
    texts = [tokenizer.decode([token]) for token in said]
    if not said or len(prompt) + len(said) > model.config.max_position_embeddings:
        return [{"text": text} for text in texts]
    tokens = torch.tensor([prompt + said], device=model.lm_head.weight.device)
    hidden = model.model(tokens)[0, len(prompt) - 1 : -1]
    probabilities = model.logits(hidden).softmax(1)
    best = probabilities.topk(max(1, min(top, probabilities.shape[1])), dim=1)
    chosen = probabilities[torch.arange(len(said)), said].tolist()
    told = []
    for text, p, ids, values in zip(texts, chosen, best.indices.tolist(), best.values.tolist(), strict=True):
        instead = [[tokenizer.decode([i]), q] for i, q in zip(ids, values, strict=True)]
        told.append({"text": text, "p": p, "instead": instead[:top]})
    return told


def answers(shelf: Shelf, name: str, prompts: Sequence[Any]) -> list[Event]:
    """A model's most probable reply to each of some prompts (messages)."""
    asked = ChatModel(name, *shelf.model(name))
    room = asked.model.config.max_position_embeddings - max(len(asked.prompt(one)) for one in prompts)
    texts, _ = asked.replies(prompts, SamplingOptions(min(64, room), temperature=0), [0] * len(prompts))
    told = zip(prompts, texts, strict=True)
    return [{"prompt": messages[-1]["content"], "text": text} for messages, text in told]
