"""A base model and its assistant in other people's tools: what they answer is held to what minillm answers.

    python tests/readers/run.py out/base out/sft --work /tmp/readers --json benchmarks/readers.json
    python tests/readers/run.py out/base out/sft --work /tmp/readers --tools mlx-lm lm-eval

Each tool is installed from its registry into an environment of its own below --work (torch is this one's; it
takes half an hour, mostly to compile llama.cpp), and runs a program of this folder: that gets the folders
and some conversations as JSON, and prints what it made of them under the names that `own_answers` has:

    prompts                the tokens of each conversation up to where the reply begins
    replies                the likeliest reply, token by token, to each; in a batch, by another runtime
    loss of the replies    the mean over the tokens that are learned, in nats
    nats of a text         -log p of a text under the base model

Lists are compared item by item, numbers to a thousandth. A tool that rounds otherwise may choose another word
where two are as likely, so it passes with nine replies of ten; of prompts all must be equal.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from math import isclose
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from harness import parser, write  # which finds the minillm beside it

# isort: split

import torch

from minillm.generate import SamplingOptions
from minillm.io.huggingface import load_causal_model
from minillm.preferences import ChatModel
from minillm.tools.evaluate import token_values
from minillm.tools.stage import ROOT
from minillm.world import World

HERE = Path(__file__).parent
COUNT, NEW = 20, 40  # conversations, and tokens of a reply
TOOLS: dict[str, tuple[str, list[str]]] = {
    "transformers 5": ("ask_transformers.py", ["transformers>=5", "torch", "jinja2"]),
    "transformers 4": ("ask_transformers.py", ["transformers<5", "torch", "jinja2"]),
    "TRL": ("ask_trl.py", ["trl", "torch"]),
    "mlx-lm": ("ask_mlx.py", ["mlx-lm", "mlx[cpu]"]),
    "CTranslate2": ("ask_ctranslate2.py", ["ctranslate2", "transformers<5", "torch", "jinja2"]),
    "mistral.rs": ("ask_mistralrs.py", ["mistralrs"]),
    "lm-eval": ("ask_lm_eval.py", ["lm-eval[hf]", "torch"]),
    "transformers.js": ("ask_transformers_js.py", ["optimum-onnx[onnxruntime]", "torch", "jinja2"]),
    "llama.cpp": ("ask_llama_cpp.py", ["llama-cpp-python", "transformers>=5", "sentencepiece", "jinja2"]),
}  # fmt: skip
"""Of each tool its program, and what it needs from PyPI."""


def own_answers(asked: dict[str, Any]) -> dict[str, Any]:
    """What every tool should say."""
    cpu = torch.device("cpu")
    model, base = (ChatModel(name, *load_causal_model(Path(asked[name]), cpu, torch.float32))
                   for name in ("sft", "base"))  # fmt: skip
    greedy = SamplingOptions(asked["new"], temperature=0)
    replies, _ = model.replies(asked["conversations"], greedy, [0] * len(asked["conversations"]))
    learned, losses = 0, 0.0
    for messages in asked["answered"]:
        dialogue = model.form.encode(messages)
        (logprobs,) = token_values(model.model, [(dialogue.tokens[:1], dialogue.tokens[1:])])
        mask = dialogue.loss_mask[1:]
        learned, losses = learned + sum(mask), losses - sum(logprobs[mask])
    tokens = base.form.prompt([{"role": "user", "content": asked["text"]}])
    (logprobs,) = token_values(base.model, [(tokens[:1], tokens[1:])])
    return {
        "prompts": [model.prompt(messages) for messages in asked["conversations"]],
        **dict.fromkeys(("replies", "replies in a batch", "replies by ONNX Runtime"), replies),
        "loss of the replies": losses / learned, "nats of a text": -sum(logprobs),
    }  # fmt: skip


def alike(name: str, found: Any, own: Any) -> tuple[str, bool]:
    """How far an answer is ours, in words, and whether that is enough."""
    if isinstance(own, float):
        return f"{name} {found:.4f} (here {own:.4f})", isclose(found, own, rel_tol=1e-3)
    equal = sum(a == b for a, b in zip(found, own, strict=True))
    return f"{equal} of {len(own)} {name}", equal >= (1.0 if name == "prompts" else 0.9) * len(own)


def ask(tool: str, work: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What a tool answers, and its versions; it is installed first if it is not there."""
    program, packages = TOOLS[tool]
    folder = work.resolve() / tool.replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        install(tool, packages, folder)
    if tool == "llama.cpp":
        asked = asked | {"gguf": str(folder / "sft.gguf")}
        source = next(folder.glob("*/vendor/llama.cpp"))
        words = [asked["sft"], "--gguf", asked["gguf"], "--llama-cpp", source]
        subprocess.run([python, "-m", "minillm.export", *words], check=True, cwd=ROOT)
    command, given = [python, HERE / program], json.dumps(asked)
    said = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, cwd=folder, check=True)
    return {"found": json.loads(said.stdout.splitlines()[-1]), "versions": versions(packages, folder)}


def install(tool: str, packages: list[str], folder: Path) -> None:
    """An environment that sees this one's packages behind its own."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    own, *_ = folder.glob("lib/python*/site-packages")
    (own / "behind.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    if tool == "transformers.js":
        # Without scripts, which would fetch ONNX Runtime's libraries for GPUs from elsewhere.
        words = ["--silent", "--ignore-scripts", "@huggingface/transformers"]
        subprocess.run(["npm", "install", *words], cwd=folder, check=True)
    if tool == "llama.cpp":  # whose converter comes with its source
        words = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder, "llama-cpp-python"]
        subprocess.run([python, "-m", "pip", "download", *words], check=True)
        shutil.unpack_archive(next(folder.glob("llama_cpp_python-*.tar.gz")), folder)
    (folder / "installed").touch()


def versions(packages: list[str], folder: Path) -> dict[str, str]:
    """Of what was asked for, by name."""
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    names = [re.split(r"[\[<>=]", package)[0] for package in packages]
    said = subprocess.check_output([folder / "bin" / "python", "-c", code, *names], text=True)
    found = dict(zip(names, said.split(), strict=True))
    for held in folder.glob("node_modules/@huggingface/transformers/package.json"):
        found["transformers.js"] = json.loads(held.read_text())["version"]
    return found


def questions(base: str, sft: str) -> dict[str, Any]:
    """What every tool is asked: replies to prompts that no demonstration had, and losses."""
    world = World(0)
    shown = world.conversations("train", COUNT)
    return {
        "base": str(Path(base).resolve()), "sft": str(Path(sft).resolve()), "new": NEW,
        "conversations": [prompt.messages for prompt in world.prompts("test", n=COUNT)],
        "answered": [one.messages for one in shown],
        "text": " ".join(one.messages[-1]["content"] for one in shown[:6]),
    }  # fmt: skip


def row(tool: str, record: dict[str, Any]) -> str:
    """A line of the table in docs/measured.md."""
    named = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if name != "torch")
    return f"| {tool} | {named} | {'; '.join(record['answers'])} |"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("base", help="a base model")
    options.add_argument("sft", help="the assistant made of it")
    options.add_argument("--work", type=Path, required=True, help="where the tools are installed")
    options.add_argument("--tools", nargs="+", choices=TOOLS, default=[*TOOLS], help="all by default")
    given = options.parse_args()
    asked = questions(given.base, given.sft)
    own, record, failed = own_answers(asked), dict[str, Any](), list[str]()
    print("| tool | versions | as here |\n|---|---|---|")
    for tool in given.tools:
        said = ask(tool, given.work, asked)
        judged = [alike(name, found, own[name]) for name, found in said["found"].items()]
        record[tool] = {"versions": said["versions"], "answers": [words for words, _ in judged]}
        print(row(tool, record[tool]), flush=True)
        failed += [tool] * (not all(enough for _, enough in judged))
    write(given.json, {"tools": record})
    if failed:
        sys.exit(f"not alike: {', '.join(failed)}")


if __name__ == "__main__":
    main()
