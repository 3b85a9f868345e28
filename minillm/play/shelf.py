"""The runs in a folder and their models, opened when first asked for and anew once their weights change.

What is asked of a model: a reply to messages token by token (`reply`), and afterwards how probable each of
its tokens was and what the model would have said instead (`alternatives`).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from minillm.chat import ChatTemplate
from minillm.errors import InputError
from minillm.generate import SamplingOptions, stream
from minillm.io.disk import read_json
from minillm.io.huggingface import load_causal_model, load_scalar_model
from minillm.io.messages import check_messages, with_tools
from minillm.io.weights import weights_file
from minillm.model import LanguageModel
from minillm.play.worker import Event, Job
from minillm.preferences import ChatModel
from minillm.tokenizer import Tokenizer
from minillm.tools.calls import MOST_CALLS, Tool, calculator, results_of, search, texts_of_run
from minillm.tools.chat import Chat
from minillm.tools.chat import Options as ChatOptions
from minillm.tools.folder import read_run
from minillm.tools.streams import stream_text

MOST_OPEN = 8
"""Models in memory; the one not asked for the longest goes first."""
DEEPEST = 4
"""Folders below the folder of runs in which runs are looked for."""


class NoSuchRun(InputError):
    """A name that no run here has."""


class Shelf:
    """The models of a folder of runs, by name: their paths in it, as in "sft" or "rlhf/ppo"."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.opened = folder, device, OrderedDict[tuple[str, int], Any]()

    def runs(self) -> list[dict[str, Any]]:
        """The language models there are, by name and stage, in the order of their stages."""
        return self.look()[0]

    def look(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The same, and what is wrong with the runs that cannot be read, which are left out."""
        found, wrong = [], list[str]()
        for depth in range(1, DEEPEST + 1):
            for path in sorted(self.folder.glob("*/" * depth + "config.json")):
                try:
                    if kind_of(path) == "language model" and weights_file(path.parent):
                        found.append(self._describe(path.parent))
                except InputError as error:
                    wrong.append(str(error))
        order = ["train", "sft", "policy"]
        found.sort(key=lambda run: order.index(run["stage"]) if run["stage"] in order else 3)
        return found, wrong

    def _describe(self, folder: Path) -> dict[str, Any]:
        stage, options = read_run(folder)
        world = options.get("seed") if options.get("data") == [] else None  # of whose text or prompts it is
        return {"name": folder.relative_to(self.folder).as_posix(), "stage": stage, "world": world}

    def folder_of(self, name: str) -> Path:
        """Where a run is. NoSuchRun where there is none of that name."""
        names = [run["name"] for run in self.runs()]
        if name not in names:
            there = ", ".join(names) or "none; make demo makes some"
            raise NoSuchRun(f"{name!r:.80}: no such run here; there are: {there}")
        return self.folder / name

    def model(self, name: str) -> tuple[LanguageModel, Tokenizer]:
        """NoSuchRun where there is none."""
        self.folder_of(name)
        return self._open(name, load_causal_model)

    def reward_model(self, name: str) -> Any:
        """A reward model and its tokenizer; None where there is none."""
        path = self.folder / name / "config.json"
        if not path.exists() or kind_of(path) == "language model":
            return None
        return self._open(name, load_scalar_model)

    @cache  # noqa: B019  (one shelf a server)
    def tools(self, name: str) -> dict[str, Tool]:
        """What a model may call here: a calculator, and a search over the text it was trained on."""
        found = {"calculator": calculator()}
        with suppress(InputError):  # not known which
            found["search"] = search(texts_of_run(self.folder / name))
        return found

    def _open(self, name: str, load: Any) -> Any:
        weights = weights_file(self.folder / name)
        key = name, weights.stat().st_mtime_ns if weights else 0
        if key not in self.opened:
            for old in [old for old in self.opened if old[0] == name]:
                del self.opened[old]
            self.opened[key] = load(self.folder / name, self.device, torch.float32)
        self.opened.move_to_end(key)
        while len(self.opened) > MOST_OPEN:
            self.opened.popitem(last=False)
        return self.opened[key]


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
    **options: Any,
) -> Job:
    """A model's reply to messages of which the last is the user's or a tool's, as events:

    {"note": …} for each thing there is to say before, such as messages dropped from the context;
    {"piece": text} for each token, one that ends in the middle of a character with the next;
    {"end": "stop", "length" or "tool_calls", "prompt_tokens": n, "calls": as in OpenAI's API,
     "tokens": [{"text", "p", "instead": [[text, p], …]}, …]}.

    It ends before the first of the `stop` texts. The model is told of `tools`, which are as in OpenAI's API;
    `options` are of `python -m minillm.chat`.
    """
    checked = check_messages(messages)
    if checked[-1]["role"] not in ("user", "tool") or not any(m["role"] == "user" for m in checked):
        raise InputError("messages: the last is not the user's or a tool's; add what is to be answered")
    model, tokenizer = shelf.model(name)
    chat, notes = Chat(model, tokenizer, ChatOptions(run=name, **options)), list[str]()
    call_id = getattr(chat.format, "call_id", None)
    if tools and call_id is None:
        raise InputError(f"{name}: knows no calls of tools; ask an assistant that sft.py made")
    *before, last = with_tools(checked, tools)
    chat.messages, said, ended = tuple(before), list[int](), False
    _, prompt, sampling = chat.ask(last, notes.append)
    yield from ({"note": note} for note in notes)

    def spoken() -> Iterator[int]:
        """The tokens of the text: those before the first call."""
        nonlocal ended
        for token in stream(model, prompt, sampling, chat.options.seed):
            if ended := token in sampling.stop_ids:
                return
            said.append(token)
            if call_id not in said:
                yield token

    for piece, stopped in until(stream_text(tokenizer.decode_bytes, spoken()), stop):
        yield {"piece": piece}
        ended = ended or stopped
    told = alternatives(model, tokenizer, prompt, said, top)
    calls = calls_in(chat.format, said) if ended else []
    end = "tool_calls" if calls else "stop" if ended else "length"
    yield {"end": end, "prompt_tokens": len(prompt), "calls": calls, "tokens": told}


def calls_in(form: Any, said: list[int]) -> list[dict[str, Any]]:
    """The calls of tools in a reply's tokens, each with a name of its own."""
    message = form.message(said) if isinstance(form, ChatTemplate) else {}
    return [call | {"id": f"call_{uuid4().hex}"} for call in message.get("tool_calls", [])]


def talk(shelf: Shelf, name: str, messages: list[Any], **options: Any) -> Job:
    """A reply whose calls of tools are run: after each call {"called": "name arguments", "result": text} and
    the reply to that; at the end {"messages": …}, all that was said, to go on with."""
    said, tools = list(messages), None
    for turn in range(MOST_CALLS + 1):
        text, event = "", Event()
        for event in reply(shelf, name, said, **options):
            text += event.get("piece", "")
            yield event
        said.append({"role": "assistant", "content": text, "tool_calls": event["calls"]})
        if not event["calls"] or turn == MOST_CALLS:
            break
        tools = tools or shelf.tools(name)
        for call, result in zip(event["calls"], results_of(tools, event["calls"]), strict=True):
            said.append(result)
            yield {"called": "{name} {arguments}".format_map(call["function"]), "result": result["content"]}
    yield {"messages": said}


def until(texts: Iterable[str], stops: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The texts up to the first of `stops`, and with the last whether there was one.

    What may be the beginning of a stop is held back until it is known not to be.
    """
    held = ""
    for text in texts:
        held += text
        if found := [place for one in stops if (place := held.find(one)) >= 0]:
            yield held[: min(found)], True
            return
        keep = max((n for one in stops for n in range(1, len(one)) if held.endswith(one[:n])), default=0)
        if not keep or len(held) > keep:
            yield held[: len(held) - keep], False
            held = held[len(held) - keep :]
    if held:
        yield held, False


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
    return [
        {
            "text": text,
            "p": p,
            "instead": [[tokenizer.decode([i]), q] for i, q in zip(ids, values, strict=True)][:top],
        }
        for text, p, ids, values in zip(
            texts, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def answers(shelf: Shelf, name: str, prompts: Sequence[Any]) -> list[Event]:
    """A model's most probable reply to each of some prompts (messages)."""
    asked = ChatModel(name, *shelf.model(name))
    room = asked.model.config.max_position_embeddings - max(len(asked.prompt(one)) for one in prompts)
    said = asked.replies(prompts, SamplingOptions(min(64, room), temperature=0), [0] * len(prompts))
    told = zip(prompts, said, strict=True)
    return [{"prompt": messages[-1]["content"], "text": text} for messages, (text, _) in told]
