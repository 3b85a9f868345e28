"""To GGUF: llama.cpp's converter is run as it is, and told how a tokenizer of ours splits text."""

import json

import pytest
import torch

from minillm.io.huggingface import save_model
from minillm.io.vocabulary import LibraryVocabulary
from minillm.model import LanguageModel, config_of_depth
from minillm.tokenizer import GPT2_PATTERN, PATTERN, Tokenizer
from minillm.tools.export import QWEN2_PATTERN, main, pattern_of

# Stands for llama.cpp's: a class of models that looks the tokenizer up, and a main.
CONVERTER = """
import argparse, json, sys
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")
class LlamaModel(TextModel):
    pass
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--outfile")
    given = parser.parse_args()
    with open(given.outfile, "w") as file:
        json.dump({"model": given.model, "pre": LlamaModel().get_vocab_base_pre(None)}, file)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(PATTERN, "smaug-bpe"), (GPT2_PATTERN, "gpt-2"), (QWEN2_PATTERN, "qwen2"), (r"\s+", None)],
)
def test_the_converter_is_told_the_name_of_a_known_pattern_alone(tmp_path, pattern, name, capfd):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a little world"], 262, pattern=pattern)
    save_model(tmp_path / "run", LanguageModel(config_of_depth(1, tokenizer.vocab_size, 16)), tokenizer)
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    arguments = [str(tmp_path / "run"), "--gguf", str(tmp_path / "a.gguf"), "--llama-cpp", str(tmp_path)]
    if name is None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert "not recognized" in capfd.readouterr().err
    else:
        main(arguments)
        made = json.loads((tmp_path / "a.gguf").read_text())
        assert made == {"model": str(tmp_path / "run"), "pre": name}
        assert str(tmp_path / "a.gguf") in (tmp_path / "a.gguf.Modelfile").read_text()


def test_gpt2s_and_qwen2s_patterns_are_known_in_files_of_others_too():
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    for other, pattern in ((r"\d", None), (PATTERN, None), (QWEN2_PATTERN, QWEN2_PATTERN)):
        split = {
            "pretokenizers": [{"type": "Split", "pattern": {"Regex": other}}, {**step, "use_regex": False}]
        }
        assert pattern_of(LibraryVocabulary(json.dumps({"pre_tokenizer": split}))) == pattern
    assert pattern_of(LibraryVocabulary(json.dumps({"pre_tokenizer": step}))) == GPT2_PATTERN


def test_without_a_checkout_the_way_to_one_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--gguf", "a.gguf", "--llama-cpp", str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert "git clone" in error and len(error.splitlines()) == 1
