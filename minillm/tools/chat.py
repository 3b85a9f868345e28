"""Talk to a model in the terminal.

    python -m minillm.chat out/sft                          /help lists what can be typed besides text
    python -m minillm.chat out/sft --system "Be brief."     with a system message
    python -m minillm.chat out/sft --prompt "Who are you?"  one answer and nothing else, for a script
    python -m minillm.chat out/base                         a base model goes on with the text it is given
    python -m minillm.chat out/base --prompt-file tale.txt --samples 5    in five ways
    python -m minillm.chat out/tools --tools calculator search    runs what the model calls, and shows it

First the conversation, which knows no terminal; after it the terminal: lines in, pieces out, Ctrl-C.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from minillm.chat import ChatTemplate, Message, chat_format
from minillm.errors import InputError
from minillm.generate import SamplingOptions, stream
from minillm.io.disk import read_text
from minillm.io.huggingface import load_causal_model
from minillm.io.messages import with_tools
from minillm.model import LanguageModel
from minillm.options import Count, Mass, NotNegative, Seed, Text, Whole, check_limits
from minillm.tokenizer import Tokenizer
from minillm.tools.calls import MOST_CALLS, open_tools, run_call
from minillm.tools.commandline import parse_options
from minillm.tools.device import choose_device, choose_dtype
from minillm.tools.ending import one_line_errors
from minillm.tools.streams import stream_text

LONGEST_REPLY = 512
"""Tokens of a reply where the context leaves as many and --max-new-tokens says nothing."""

HELP = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").rstrip()


@dataclass(frozen=True)
class Options:
    """Talk to a model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = "out/sft"
    """A run folder, or a Hugging Face folder (Llama, Qwen, Mistral)."""
    prompt: Text | None = None
    """Print the answer to this and end, instead of a conversation."""
    prompt_file: str | None = None
    """The same with the text of a file."""
    samples: Count = 1
    """How many answers to print, each drawn with the next seed."""
    system: str | None = None
    """The system message."""
    tools: tuple[Literal["calculator", "search"], ...] = ()
    """What the model may call, if it has learned to (lessons/15_tools.py)."""
    search_in: tuple[str, ...] = ()
    """Files, folders or globs of text for the search. Nothing: what the run's base was trained on."""
    describe_tools: bool = False
    """Tell the model of its tools in the system message, as conversations with a field `tools` do."""
    thinking: bool = False
    """Let a model that knows thoughts (Qwen3, DeepSeek-R1) think before it replies."""
    temperature: NotNegative = 0.7
    """Divides the logits; 0 takes the most probable token."""
    top_k: Whole = 0
    """Sample among this many most probable tokens; 0 for all."""
    top_p: Mass = 1.0
    """Sample among the fewest most probable tokens that together reach this probability."""
    max_new_tokens: Count | None = None
    """Tokens of a reply at most. Default: what the context leaves, up to 512. A base model goes on past its
    context, each further token following as many of the last ones as it was trained on."""
    seed: Seed = 0
    """Of the first reply; each further one takes the next number."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation. auto: float32 on a CPU, where it samples faster, else bfloat16 if there is any."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("--prompt-file: --prompt gives a text already; leave one out")
        if self.samples > 1 and self.prompt is None and self.prompt_file is None:
            raise InputError(f"--samples {self.samples}: say of what, with --prompt or --prompt-file")
        if self.search_in and "search" not in self.tools:
            raise InputError("--search-in: nothing searches there; add --tools search")


# --- the conversation -----------------------------------------------------------------------------

Event = dict[str, Any]
"""Of a reply: {"piece": text}; {"note": line} of what there is to say, of a call with "call" and "result", a
message; and at a turn's end {"end": "stop", "length" or "tool_calls", "message", "prompt", "tokens"}."""


class Chat:
    """A conversation with a model: its messages, the oldest dropped where they no longer fit, and the next
    reply, for which calls of the options' tools are run. A base model, which has no chat template, goes on
    with each text by itself."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, options: Options) -> None:
        """InputError for options that cannot work with this model, before the first message."""
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.format = chat_format(tokenizer)
        self.is_base = not isinstance(self.format, ChatTemplate)
        self.positions = model.config.max_position_embeddings
        self.reserved = options.max_new_tokens or max(1, min(LONGEST_REPLY, self.positions // 4))
        """Tokens of the context that a prompt leaves to the reply."""
        if self.reserved >= self.positions and not self.is_base:
            raise InputError(
                f"--max-new-tokens {self.reserved}: the model has {self.positions} positions; give less"
            )
        if options.tools and self.format.call_id is None:
            raise InputError(f"--tools: {options.run} has no chat template that knows calls; leave it out")
        self.tools = open_tools(options.tools, Path(options.run), options.search_in)
        self.messages: tuple[Message, ...] = ()
        self.seeds, self.end, self.stopped = count(options.seed), "", False
        self.set_system(options.system or "")

    def ask(self, said: Sequence[Message]) -> tuple[list[Message], list[int], SamplingOptions, list[str]]:
        """The messages, the oldest exchanges dropped where they have no room; their tokens; how to reply; and
        what there is to say about that. The reply to a tool's result takes what room is left."""
        system, o = said[: said[0]["role"] == "system"], self.options
        for first in (i for i, message in enumerate(said) if message["role"] == "user"):
            asked = [*system, *said[first:]]
            prompt = self.format.prompt(asked, o.thinking)
            room = max(self.positions - len(prompt), self.reserved if self.is_base else 0)
            if room >= self.reserved:
                break
        if room < (least := 1 if said[-1]["role"] == "tool" else self.reserved):
            raise InputError(
                f"too long: of the model's {self.positions} tokens {least} are kept for "
                "the reply; shorten the message, the system message or --max-new-tokens"
            )
        longest, notes = min(o.max_new_tokens or LONGEST_REPLY, room), []
        if dropped := len(said) - len(asked):
            notes.append(f"(no room for the {dropped} oldest messages: dropped)")
        if len(prompt) + longest > self.positions:
            past = f"past them, each follows the last {self.positions}"
            notes.append(f"(trained on {self.positions} tokens: {past})")
        how = longest, o.temperature, o.top_k, o.top_p, self.format.stop_ids, self.is_base
        return asked, prompt, SamplingOptions(*how), notes

    def reply(self, text: str, note: Callable[[str], None] = print) -> Iterator[str]:
        """The reply to a text of the user's, piece by piece; `note` is told what else there is to say."""
        for event in self.events({"role": "user", "content": text}):
            if "piece" in event:
                yield event["piece"]
            elif "note" in event:
                note(event["note"])

    def events(self, last: Message) -> Iterator[Event]:
        """The reply to a message of the user's or a tool's, until it ends or is to be `stopped`; then it is
        part of the conversation. Calls in it are run, and another turn answers to their results."""
        said, seed, called, self.stopped = [*self.messages, last], -1, 0, False
        while True:
            said, prompt, sampling, notes = self.ask(said)
            yield from ({"note": line} for line in notes)
            seed = seed if called else next(self.seeds)  # one a reply; what has no room takes none
            content, tokens, self.end = "", list[int](), "length"
            for piece in self._pieces(prompt, sampling, seed, tokens):
                content += piece
                yield {"piece": piece}
                if self.stopped:
                    break
            message: Message = {"role": "assistant", "content": content}
            if tokens and tokens[-1] in sampling.stop_ids:
                self.end, _ = "stop", tokens.pop()
                if isinstance(self.format, ChatTemplate):
                    message = self.format.message(tokens)
            if calls := message.get("tool_calls", []):
                self.end = "tool_calls"
            said.append(message)
            if not self.is_base:
                self.messages = tuple(said)
            yield {"end": self.end, "message": message, "prompt": prompt, "tokens": tokens}
            if not calls:
                return
            called, most = called + len(calls), MOST_CALLS if self.tools else 0
            for call in calls:
                told = "{name} {arguments}".format_map(call["function"])
                if called > most:
                    yield {"note": f"({told}: not run; {most} calls are the most in a reply)"}
                    return
                found = run_call(self.tools, call)
                said.append({"role": "tool", "tool_call_id": call["id"], "content": found})
                yield {"note": f"[{told} → {found}]", "call": told, "result": said[-1]}
            self.messages = tuple(said)

    def _pieces(
        self, prompt: list[int], sampling: SamplingOptions, seed: int, tokens: list[int]
    ) -> Iterator[str]:
        """The text of one turn of the model, up to its first call; `tokens` get all."""
        ends = {*sampling.stop_ids, self.format.call_id}

        def spoken() -> Iterator[int]:
            for token in (coming := stream(self.model, prompt, sampling, seed)):
                tokens.append(token)
                if token in ends:
                    break
                yield token
            tokens.extend(coming)

        return stream_text(self.tokenizer.decode_bytes, spoken())

    def set_system(self, text: str) -> None:
        """Sets, or with an empty text removes, the system message, all but what it tells of tools."""
        if text and self.is_base:
            raise InputError("a base model takes no system message; it only goes on with a text")
        told = [tool.schema() for tool in self.tools.values() if self.options.describe_tools]
        system = with_tools([{"role": "system", "content": text}] if text else [], told)
        if system:  # some templates have no place for it
            self.format.prompt([*system, {"role": "user", "content": "Hello"}])
        self.messages = (*system, *(message for message in self.messages if message["role"] != "system"))


def run_command(chat: Chat, command: str) -> str | None:
    """Carries out a command such as "/undo". Returns what to say about it; None to end."""
    name, *rest = command.split(maxsplit=1)
    text = "".join(rest).strip()
    if text and name in ("/undo", "/reset", "/quit", "/help"):
        return f"{name} takes no text"
    match name:
        case "/system":
            chat.set_system(text)
            return "system message set" if text else "system message removed"
        case "/undo":
            users = [i for i, message in enumerate(chat.messages) if message["role"] == "user"]
            chat.messages = chat.messages[: users[-1]] if users else chat.messages
            return "last exchange taken back" if users else "nothing to take back"
        case "/reset":
            chat.messages = tuple(message for message in chat.messages if message["role"] == "system")
            return "conversation forgotten"
        case "/quit":
            return None
        case "/help":
            return HELP
    return f"{name}: no such command; /help lists them"


# --- the terminal ---------------------------------------------------------------------------------


def converse(chat: Chat) -> None:
    """Reads, replies and runs commands until /quit or the end of the input."""
    with suppress(ImportError):  # not everywhere; with it, input() can edit its line
        import readline  # noqa: F401
    print(greeting(chat))
    while True:
        try:
            entry = read_entry()
            if entry.startswith("/") and not entry.startswith("//"):
                if (said := run_command(chat, entry)) is None:
                    return
                print(said)
            elif entry.strip():
                show_reply(chat, entry.removeprefix("/"))
        except InputError as error:
            print(f"error: {error}")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")


def greeting(chat: Chat) -> str:
    what = f", {chat.positions} tokens of memory"
    if chat.is_base:
        what = " is a base model (no chat template): it goes on with your text"
    return f"{chat.options.run}{what}. /help lists the commands."


def read_entry() -> str:
    """One line, or several of which all but the last end in a backslash."""
    entry = input(">>> ")
    with suppress(EOFError):
        while entry.endswith("\\"):
            entry = entry[:-1] + "\n"
            entry += input("... ")
    return entry


def show_reply(chat: Chat, text: str) -> None:
    """Prints a reply as it comes. Ctrl-C stops it, but raises nothing, which could strike in the middle of
    any operation."""
    previous = signal.signal(signal.SIGINT, lambda *_: setattr(chat, "stopped", True))
    try:
        for piece in chat.reply(text):
            print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, previous)
    print(" [cut]" if chat.end == "length" else "")


def answer(chat: Chat, text: str) -> None:
    """The reply alone, or several; what there is to say about them goes to standard error."""
    note, before = partial(print, file=sys.stderr), chat.messages
    note_once = cache(note)  # what there is to say of the prompt is the same for all
    if chat.is_base:
        note(greeting(chat))
    for number in range(chat.options.samples):
        if chat.options.samples > 1:
            print(f"--- sample {number} ---")
        for piece in chat.reply(text, note_once):
            print(piece, end="", flush=True)
        print()
        if chat.end == "length":
            note("[cut]")
        chat.messages = before


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        text = options.prompt
        if options.prompt_file is not None:
            text = read_text(Path(options.prompt_file))
            if not text:
                raise InputError(f"--prompt-file {options.prompt_file}: is empty; write a text in it")
        device = choose_device(options.device, 0)
        auto = torch.float32 if device.type == "cpu" else choose_dtype(device)
        dtype = getattr(torch, options.precision, auto)
        chat = Chat(*load_causal_model(Path(options.run), device, dtype), options)
        if text is None:
            converse(chat)
        else:
            answer(chat, text)


if __name__ == "__main__":
    main(sys.argv[1:])
