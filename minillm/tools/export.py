"""A run folder as a GGUF file, for llama.cpp, Ollama and LM Studio.

    git clone https://github.com/ggml-org/llama.cpp && pip install transformers sentencepiece
    python -m minillm.export out/sft --gguf sft.gguf --llama-cpp llama.cpp
    ollama create sft -f sft.gguf.Modelfile && ollama run sft        or: llama-cli -m sft.gguf

llama.cpp's own converter does the work. It knows how a tokenizer splits text by a list of tokenizers that it
has met, and none trained here is in it: this tells it the name under which the same pattern goes there. Its
requirements.txt asks for other versions of torch and transformers than are installed; it works with these.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minillm.errors import InputError
from minillm.io.disk import write_text
from minillm.io.vocabulary import LibraryVocabulary, load_tokenizer
from minillm.tokenizer import GPT2_PATTERN, PATTERN, Vocabulary
from minillm.tools.commandline import parse_options
from minillm.tools.ending import one_line_errors

FIRST_EDITION = PATTERN.replace(r"\p{L}[\p{L}\p{M}\u200c\u200d]*", r"\p{L}+")
QWEN2_PATTERN = FIRST_EDITION.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS: dict[str | None, str] = {
    **dict.fromkeys((PATTERN, FIRST_EDITION), "smaug-bpe"), GPT2_PATTERN: "gpt-2", QWEN2_PATTERN: "qwen2",
}  # fmt: skip
"""By its patterns, the name that llama.cpp gives a way to split text. Llama 3's is the first, too, but puts
bos before every text, which the chat template does already. Words with combining marks (Hindi, Thai) are
split at them there and not here: their tokens differ."""


@dataclass(frozen=True)
class Options:
    """Write a run folder as a GGUF file."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run folder, or a Hugging Face folder."""
    gguf: str
    """The file to write."""
    llama_cpp: str = "llama.cpp"
    """A checkout of llama.cpp, which has the converter."""


def export(options: Options) -> None:
    """Runs the converter in a process of its own, and writes a Modelfile for Ollama beside the file."""
    converter = Path(options.llama_cpp) / "convert_hf_to_gguf.py"
    if not converter.is_file():
        raise InputError(
            f"{converter}: missing; git clone https://github.com/ggml-org/llama.cpp, name it with "
            "--llama-cpp, and pip install transformers sentencepiece, which it needs"
        )
    name = PRE_TOKENIZERS.get(
        pattern_of(load_tokenizer(Path(options.run)).vocabulary), ""
    )  # others: in the list
    code = "import sys; from minillm.tools.export import convert; convert(*sys.argv[1:])"
    words = [str(converter), name, options.run, "--outfile", options.gguf]
    if subprocess.run([sys.executable, "-c", code, *words], check=False).returncode:
        raise InputError(f"{options.run}: llama.cpp's converter refused it, for the reason above")
    write_text(Path(f"{options.gguf}.Modelfile"), f"FROM {os.path.abspath(options.gguf)}\n")
    print(f"{options.gguf} and {options.gguf}.Modelfile are written")


def pattern_of(vocabulary: Vocabulary | LibraryVocabulary) -> str | None:
    """The pattern by which text is split; of others' only GPT-2's and Qwen2's: it says all."""
    if isinstance(vocabulary, Vocabulary):
        return vocabulary.pattern
    match json.loads(vocabulary.json).get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {"pretokenizers": [{"pattern": {"Regex": str(pattern)}}, {"type": "ByteLevel"}]}:
            return pattern if pattern == QWEN2_PATTERN else None
    return None


def convert(converter: str, name: str, *arguments: str) -> None:
    """Runs the converter as a program whose models answer `name` when they are asked how text is split.

    Without a name it looks the tokenizer up in its own list.
    """
    sys.argv, sys.path[:0] = [converter, *arguments], [str(Path(converter).parent)]
    program = importlib.import_module(Path(converter).stem)
    # Newer versions keep the models in a package beside the program.
    places = [program, *(module for at, module in sys.modules.items() if at.startswith("conversion."))]
    kinds = [kind for place in places for kind in vars(place).values() if isinstance(kind, type)]
    asked = [kind for kind in kinds if "get_vocab_base_pre" in vars(kind)]
    if name and not asked:
        sys.exit(f"{converter}: has no get_vocab_base_pre; take another version of llama.cpp")
    for kind in asked if name else []:
        setattr(kind, "get_vocab_base_pre", lambda self, tokenizer: name)  # noqa: B010
    program.main()


def main(arguments: list[str]) -> None:
    with one_line_errors():
        export(parse_options(Options, arguments))
