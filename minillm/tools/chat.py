"""Talk to a model in the terminal.

    python -m minillm.chat out/sft                          /help lists what can be typed besides text
    python -m minillm.chat out/sft --system "Be brief."     with a system message
    python -m minillm.chat out/sft --prompt "Who are you?"  one answer and nothing else, for a script
    python -m minillm.chat out/base                         a base model goes on with the text it is given
    python -m minillm.chat out/base --prompt-file tale.txt --samples 5    in five ways

First the conversation, which knows no terminal: `Chat` holds the messages, drops the oldest when they
no longer fit, and gives replies piece by piece. Behind it the terminal: lines in, pieces out, Ctrl-C.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from minillm.chat import ChatTemplate, chat_format
from minillm.errors import InputError, one_line_errors, printable
from minillm.files import read_text
from minillm.generate import SamplingOptions, generate, stream, stream_text
from minillm.io.huggingface import load_causal_model
from minillm.model import LanguageModel
from minillm.options import parse_options
from minillm.tokenizer import Tokenizer
from minillm.tools.device import choose_device, choose_dtype

LONGEST_REPLY = 512
"""Tokens of a reply where the context leaves as many and --max-new-tokens says nothing."""

HINT = "/help lists the commands."
HELP = """\
/system TEXT   set the system message; without TEXT, remove it
/undo          take the last exchange back
/reset         forget all but the system message
/quit          end, as Ctrl-D does
/help          this

A line that ends in a backslash goes on in the next one. A message that begins with a slash is typed with
two. Ctrl-C stops a reply; what was said so far stays, marked [cut], as is a reply of the longest length."""


@dataclass(frozen=True)
class Options:
    """Talk to a model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = "out/sft"
    """A run folder, or a Hugging Face folder (Llama or Qwen3 layout)."""
    prompt: str | None = None
    """Print the answer to this and end, instead of a conversation."""
    prompt_file: str | None = None
    """The same with the text of a file."""
    samples: int = 1
    """How many answers to print, each drawn with the next seed."""
    system: str | None = None
    """The system message."""
    thinking: bool = False
    """Let a model that knows thoughts (Qwen3, DeepSeek-R1) think before it replies."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Sample among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest most probable tokens that together reach this probability."""
    max_new_tokens: int | None = None
    """Tokens of a reply at most. Default: what the context leaves, up to 512. A base model goes on past its
    context, each further token following as many of the last ones as it was trained on."""
    seed: int = 0
    """Of the first reply; each further one takes the next number."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation. auto: float32 on a CPU, where it samples faster, else bfloat16 if there is any."""

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("--prompt: is empty; give a text")
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("--prompt-file: --prompt gives a text already; leave one out")
        if self.samples < 1:
            raise InputError(f"--samples {self.samples}: give at least 1")
        if self.samples > 1 and self.prompt is None and self.prompt_file is None:
            raise InputError(f"--samples {self.samples}: say of what, with --prompt or --prompt-file")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: give 0 or more")
        longest = 1 if self.max_new_tokens is None else self.max_new_tokens
        SamplingOptions(longest, self.temperature, self.top_k, self.top_p)  # refuses before a model is loaded


# --- the conversation -----------------------------------------------------------------------------

Message = dict[str, Any]
"""role, content and, in a reply that did not come to its end, cut = True."""


@dataclass
class Reply:
    """A reply under way. Iterating gives its text piece by piece, and may stop at any of them."""

    asked: tuple[Message, ...]
    """The messages it replies to."""
    dropped: int
    """How many earlier messages there was no more room for."""
    tokens: Iterator[int]
    tokenizer: Tokenizer
    stop_ids: Sequence[int]
    cropped: bool = False
    """Whether it may go on past the model's positions."""
    text: str = ""
    """What was said so far."""
    cut: bool = True
    """Whether it has not, or not yet, come to its end token."""

    def __iter__(self) -> Iterator[str]:
        for piece in stream_text(self.tokenizer.decode_bytes, self._until_end()):
            self.text += piece
            yield piece

    def _until_end(self) -> Iterator[int]:
        for token in self.tokens:
            if token in self.stop_ids:
                self.cut = False
                return
            yield token


class Chat:
    """A conversation with a model: its messages so far, and the next reply.

    A model whose tokenizer has no chat template is a base model: it goes on with each text by itself.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, options: Options) -> None:
        """InputError for options that cannot work with this model, before the first message."""
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.format = chat_format(tokenizer)
        self.is_base = not isinstance(self.format, ChatTemplate)
        self.positions = model.config.max_position_embeddings
        reserved = options.max_new_tokens
        if reserved is None:
            reserved = max(1, min(LONGEST_REPLY, self.positions // 4))
        self.sampling = SamplingOptions(
            reserved, options.temperature, options.top_k, options.top_p, stop_ids=self.format.stop_ids,
            crop=self.is_base,
        )  # fmt: skip
        self.room = self.positions - reserved
        """The longest prompt, in tokens."""
        if self.room < 1 and not self.is_base:
            raise InputError(
                f"--max-new-tokens {reserved}: the model has {self.positions} positions; give less"
            )
        self.messages: tuple[Message, ...] = ()
        self.replies, self.cropping_said = 0, False
        self.set_system(options.system or "")

    def ask(self, text: str) -> tuple[tuple[Message, ...], list[int], SamplingOptions]:
        """The messages with a text of the user's, the oldest dropped; their tokens; and how to reply."""
        said = (*self.messages, {"role": "user", "content": text})
        asked: tuple[Message, ...] | None = said
        if not self.is_base:
            asked = drop_oldest(said, lambda messages: len(self.prompt(messages)) <= self.room)
        if asked is None:
            raise InputError(
                f"too long: of the model's {self.positions} tokens {self.positions - self.room} are kept for "
                "the reply; shorten the message, the system message or --max-new-tokens"
            )
        prompt = self.prompt(asked)
        sampling = self.sampling
        if self.options.max_new_tokens is None:
            left = max(self.positions - len(prompt), sampling.max_new_tokens)
            sampling = replace(sampling, max_new_tokens=min(LONGEST_REPLY, left))
        return asked, prompt, sampling

    def hear(self, text: str) -> Reply:
        """Begins a reply to a text of the user's. The conversation changes only when it is kept."""
        asked, prompt, sampling = self.ask(text)
        tokens = stream(self.model, prompt, sampling, self.options.seed + self.replies)
        self.replies += 1
        dropped = len(self.messages) + 1 - len(asked)
        cropped = len(prompt) + sampling.max_new_tokens > self.positions
        return Reply(asked, dropped, tokens, self.tokenizer, sampling.stop_ids, cropped)

    def samples(self, text: str, count: int) -> list[tuple[str, bool]]:
        """Several replies to one text, and whether each came to its end; the first is what `hear` gives."""
        _, prompt, sampling = self.ask(text)
        seeds = range(self.options.seed, self.options.seed + count)
        responses = generate(self.model, [prompt] * count, sampling, seeds).responses
        ended = [response[-1] in sampling.stop_ids for response in responses]
        texts = [self.tokenizer.decode(r[: len(r) - e]) for r, e in zip(responses, ended, strict=True)]
        return list(zip(texts, ended, strict=True))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens behind which the model is to reply."""
        return self.format.prompt(messages, self.options.thinking)

    def keep(self, reply: Reply) -> None:
        """Makes a reply part of the conversation, unless it was cut before its first word."""
        if not self.is_base and not (reply.cut and not reply.text):
            mark = {"cut": True} if reply.cut else {}
            self.messages = (*reply.asked, {"role": "assistant", "content": reply.text, **mark})

    def set_system(self, text: str) -> None:
        """Sets, or with an empty text removes, the system message."""
        turns = tuple(message for message in self.messages if message["role"] != "system")
        if text and self.is_base:
            raise InputError("a base model takes no system message; it only goes on with a text")
        system = ({"role": "system", "content": text},) if text else ()
        if system:  # some templates have no place for it
            self.format.prompt([*system, {"role": "user", "content": "Hello"}])
        self.messages = system + turns

    def undo(self) -> int:
        """Takes the last message of the user's back with what follows it. Returns how many went."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        kept = self.messages[: users[-1]] if users else self.messages
        self.messages, gone = kept, len(self.messages) - len(kept)
        return gone

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = tuple(message for message in self.messages if message["role"] == "system")


def drop_oldest(
    messages: tuple[Message, ...], fits: Callable[[tuple[Message, ...]], bool]
) -> tuple[Message, ...] | None:
    """The system message and as many of the last exchanges as fit; None if not even the last one does.

    An exchange begins with a message of the user's.
    """
    first = int(messages[0]["role"] == "system")
    for start, message in enumerate(messages):
        kept = messages[:first] + messages[start:]
        if message["role"] == "user" and fits(kept):
            return kept
    return None


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
            return "last exchange taken back" if chat.undo() else "nothing to take back"
        case "/reset":
            chat.reset()
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
            if not take_turn(chat, read_entry()):
                return
        except InputError as error:
            print(f"error: {error}")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")


def greeting(chat: Chat) -> str:
    if chat.is_base:
        return f"{chat.options.run} is a base model (no chat template): it goes on with your text. {HINT}"
    return f"{chat.options.run}, {chat.positions} tokens of memory. {HINT}"


def read_entry() -> str:
    """One line, or several of which all but the last end in a backslash."""
    entry = input(">>> ")
    with suppress(EOFError):
        while entry.endswith("\\"):
            entry = entry[:-1] + "\n"
            entry += input("... ")
    return entry


def take_turn(chat: Chat, entry: str) -> bool:
    """One command or message. False to end."""
    if entry.startswith("/") and not entry.startswith("//"):
        answer = run_command(chat, entry)
        if answer is not None:
            print(answer)
        return answer is not None
    if entry.strip():
        reply = chat.hear(entry.removeprefix("/"))
        if reply.dropped:
            print(f"(no room for the {reply.dropped} oldest messages: dropped)")
        if reply.cropped and not chat.cropping_said:
            print(cropping_note(chat))
        with interrupts() as interrupted:
            show(reply, interrupted)
        print(" [cut]" if reply.cut else "")
        chat.keep(reply)
    return True


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Lets Ctrl-C ask instead of raise, which could strike in the middle of any operation."""
    asked: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)


def show(reply: Reply, interrupted: Callable[[], bool] = lambda: False) -> None:
    for piece in reply:
        print(printable(piece), end="", flush=True)
        if interrupted():
            return


def answer(chat: Chat, text: str) -> None:
    """The reply alone on standard output; what there is to say about it on standard error."""
    if chat.is_base:
        print(printable(greeting(chat)), file=sys.stderr)
    reply = chat.hear(text)
    if reply.cropped:
        print(cropping_note(chat), file=sys.stderr)
    if chat.options.samples == 1:
        show(reply)
        print()
        if reply.cut:
            print("[cut]", file=sys.stderr)
        return
    for number, (sample, ended) in enumerate(chat.samples(text, chat.options.samples)):
        print(f"--- sample {number} ---\n{printable(sample)}")
        if not ended:
            print(f"[sample {number} cut]", file=sys.stderr)


def cropping_note(chat: Chat) -> str:
    """What is to be said, once, of replies that go on past the model's positions."""
    chat.cropping_said = True
    return f"(trained on {chat.positions} tokens: past them, each one follows the last {chat.positions})"


def open_chat(options: Options) -> Chat:
    """Loads the model of a run folder."""
    device = choose_device(options.device, 0)
    dtype = getattr(torch, options.precision, None)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else choose_dtype(device)
    return Chat(*load_causal_model(Path(options.run), device, dtype), options)


def main(arguments: list[str]) -> None:
    with one_line_errors():
        options = parse_options(Options, arguments)
        text = options.prompt
        if options.prompt_file is not None:
            text = read_text(Path(options.prompt_file))
            if not text:
                raise InputError(f"--prompt-file {options.prompt_file}: is empty; write a text in it")
        chat = open_chat(options)
        if text is None:
            converse(chat)
        else:
            answer(chat, text)


if __name__ == "__main__":
    main(sys.argv[1:])
