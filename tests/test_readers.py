"""Other people's tools open a run folder and answer as minillm does (tests/readers/run.py asks them all)."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from runs import ROOT, tiny_model

from minillm.chat import with_chat_template
from minillm.io.huggingface import save_model

READERS = runpy.run_path(str(ROOT / "tests" / "readers" / "run.py"))
RECORD = json.loads((ROOT / "benchmarks" / "readers.json").read_text())


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict:
    """Of a base model and an assistant of random weights, that say bytes and no special token."""
    folder = tmp_path_factory.mktemp("read")
    model, tokenizer = tiny_model(longest=256)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 * (weight.ndim == 1), 0.3)
        model.lm_head.weight[[*tokenizer.special_tokens.values()]] = 0
    save_model(folder / "base", model, tokenizer)
    save_model(folder / "sft", model, with_chat_template(tokenizer))
    return READERS["questions"](str(folder / "base"), str(folder / "sft"))


def test_transformers_gives_the_same_prompts_replies_and_losses_one_by_one_and_in_a_batch(asked):
    command = [sys.executable, str(ROOT / "tests" / "readers" / "ask_transformers.py")]
    said = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    found, own = json.loads(said.stdout.splitlines()[-1]), READERS["own_answers"](asked)
    assert len(found) == 4 and len({*own["replies"]}) > 10
    for name in found:
        words, enough = READERS["alike"](name, found[name], own[name])
        assert enough, words


def test_an_answer_is_alike_by_all_prompts_nine_replies_of_ten_and_a_thousandth():
    alike, some = READERS["alike"], [*range(10)]
    assert alike("prompts", some, some)[1] and not alike("prompts", some, [*some[:9], 0])[1]
    assert alike("replies", some, [*some[:9], 0])[1] and not alike("replies", some, [*some[:8], 0, 0])[1]
    assert alike("loss", 1.0, 1.0009)[1] and not alike("loss", 1.0, 1.002)[1]


def test_the_documented_table_is_that_of_the_record_and_every_tool_is_in_it():
    text = (ROOT / "docs" / "measured.md").read_text()
    assert [*RECORD["tools"]] == [*READERS["TOOLS"]]
    for tool, record in RECORD["tools"].items():
        assert READERS["row"](tool, record) in text, tool
