"""On a device that claims not to be the CPU (pretend.py), a step stays there and waits for it once.

Whole stages run on it. Between two steps every tensor must be there, or come to it in the one batch of data
that the step is of; and only the reading of the step's metrics may wait.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import DEVICE, Pretend
from runs import tiny_model

import rlhf
import sft
import train
from kernels import dispatch, losses
from minillm.chat import with_chat_template
from minillm.io.huggingface import save_model, save_scalar_model
from minillm.model import scalar_from_language_model
from minillm.ppo import Aligner
from minillm.run import Run, Runtime
from minillm.tools.commandline import parse_options

RUN = "--warmup 0 --precision float32 --val-every 9 --save-every 9".split()


@pytest.fixture
def device(monkeypatch):
    """The device, with the ways that attention and losses go on a GPU which Triton does not know."""
    monkeypatch.setattr(dispatch, "runs_triton", lambda x: False)
    monkeypatch.setitem(losses.PLANS, DEVICE.type, losses.PLANS["cuda"])
    with Pretend() as entered:
        yield entered


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A text, conversations, rankings, an assistant and a reward model."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("places"), tiny_model()
    tale = [f"On day {i} the {i % 7} cats met {i % 5} dogs.\n" for i in range(60)]
    (folder / "tale.txt").write_text("".join(tale))
    asked = [{"role": "user", "content": line} for line in tale]
    chats = [{"messages": [one, {"role": "assistant", "content": "I saw."}]} for one in asked]
    pairs = [{"prompt": line, "chosen": "I saw them.", "rejected": "No."} for line in tale]
    for name, records in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chatty = with_chat_template(tokenizer)
    save_model(folder / "sft", model, chatty)
    save_scalar_model(folder / "reward", scalar_from_language_model(model, torch.Generator()), chatty)
    return folder


class Enough(Exception):
    """The steps that are looked at are done."""


def step_of(
    device: Pretend, case: tuple[Any, ...], places: Path, out: Path, each: Any = (Run, "goes_on")
) -> tuple[list[str], list[str]]:
    """The waits and the uploads of the second step of a stage; a step begins where `each` is called."""
    script, stage, text, *_ = case
    words = [*f"{text} --out {out}".replace("@", f"{places}/").split(), *RUN]
    marks, (owner, name) = list[tuple[int, int]](), each
    real = getattr(owner, name)

    def marked(self, *args: Any) -> Any:
        marks.append((len(device.waits), len(device.uploads)))
        if len(marks) == 3:
            raise Enough
        return real(self, *args)

    runtime = Runtime(DEVICE, torch.float32)
    with pytest.MonkeyPatch.context() as patch, suppress(Enough), runtime.closing:
        patch.setattr(owner, name, marked)
        getattr(script, stage)(parse_options(script.Options, words), runtime)
    _, (waits, uploads), (end, last) = marks
    return device.waits[waits:end], device.uploads[uploads:last]


NEW = "--data @tale.txt --cache @cache --depth 1 --vocab-size 290 --block-size 32"
TEXT = "--steps 5 --batch-tokens 256 --micro-tokens 128"
RL = "--init @sft --micro-tokens 160 --max-new-tokens 6"
RANKED = f"{RL} --rankings @pairs.jsonl --batch-sets 8 --epochs 2"
DPO = f"--stage policy --algorithm dpo {RANKED} --data @chats.jsonl"
STEPS = {
    "train": (train, "train", f"{NEW} {TEXT}", 3),
    "train by AdamW alone": (train, "train", f"{NEW} --optimizer adamw {TEXT}", 3),
    "sft": (sft, "train", f"--init @sft --data @chats.jsonl --text @tale.txt --cache @cache {TEXT}", 3),
    "reward": (rlhf, "train_reward_model", f"--stage reward {RANKED}", 40),
    "dpo": (rlhf, "align", DPO, 40),
}
"""Of each the script, its function, its options, and the most tensors that a step's batch has."""
ROLLOUTS = (
    f"{RL} --stage policy --data @chats.jsonl --reward @reward --iterations 3 --rollout-batch 16 "
    "--minibatches 4 --max-kl 1e9 --prompts 24 --val-prompts 4 --critic-warmup 0"
)
UPDATES = {
    "ppo": (rlhf, "align", f"{ROLLOUTS} --ptx 0.5 --ptx-tokens 64 --text @tale.txt --cache @cache", 3),
    "grpo": (
        rlhf, "align", f"{ROLLOUTS} --algorithm grpo --group-size 2 --kl-estimator exact --top-k 9", 0
    ),
}  # fmt: skip


def read_by_the_optimizers(waits: list[str]) -> bool:
    return len(waits) == 1 and waits[0].startswith("minillm/optim.py") and "*metrics" in waits[0]


@pytest.mark.parametrize("case", STEPS)
def test_a_training_step_waits_for_its_device_once_and_takes_nothing_but_its_batch_there(
    case, device, places, tmp_path
):
    waits, uploads = step_of(device, STEPS[case], places, tmp_path)
    assert read_by_the_optimizers(waits), waits
    assert 0 < len(uploads) <= STEPS[case][-1], uploads


@pytest.mark.parametrize("case", UPDATES)
def test_an_update_on_a_rollout_waits_once_and_takes_nothing_but_text_there(case, device, places, tmp_path):
    waits, uploads = step_of(device, UPDATES[case], places, tmp_path, (Aligner, "update"))
    assert read_by_the_optimizers(waits), waits
    assert len(uploads) == UPDATES[case][-1], uploads


def test_a_rollout_waits_once_for_each_token_and_a_few_times_for_all(device, places, tmp_path):
    """Six tokens, and eight updates: four minibatches, twice. The rest are texts, scores and metrics."""
    waits, uploads = step_of(device, (rlhf, "align", ROLLOUTS), places, tmp_path)
    sampled = [line for line in waits if line.startswith("minillm/generate.py") and "chosen = " in line]
    assert len(sampled) == 6 and sum("*metrics" in line for line in waits) == 8
    assert len(waits) <= 6 + 8 + 14, waits
    assert len(uploads) <= 26, uploads


def test_a_tensor_of_the_cpu_is_refused_and_whatever_waits_is_seen(device):
    """Also in inference mode, where torch takes operations apart elsewhere."""
    there = torch.arange(4.0).to(DEVICE)
    assert there.device == DEVICE and there.is_cuda and len(device.uploads) == 1
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            with pytest.raises(RuntimeError, match="some are not"):
                there + torch.ones(4)
            for wait in (
                lambda: there.sum().item(), lambda: float(there[0]), lambda: bool(there.any()), there.tolist,
                there.cpu, there.nonzero, lambda: there[there > 1], lambda: there.to("cpu"),
                lambda: torch.empty(4).copy_(there), lambda: there.masked_select(there > 1),
            ):  # fmt: skip
                before = len(device.waits)
                wait()
                assert len(device.waits) > before
