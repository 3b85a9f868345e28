"""A model trained elsewhere, in another program's file layout, tells its known story word for word."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.generate import SamplingOptions, generate
from minillm.model import LanguageModel, ModelConfig

BOS = 1


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "interop" / "stories260K"


def read_llama2c(path: Path) -> LanguageModel:
    """The flat file of llama2.c: seven int32 (dim, hidden_dim, layers, heads, kv heads, vocabulary,
    longest row; a negative vocabulary means a separate output matrix), then every weight as float32,
    each kind for all layers at once."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, longest = np.frombuffer(data, "<i4", 7).tolist()
    config = ModelConfig(
        vocab_size=abs(vocab), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim // heads,
        max_position_embeddings=longest, rms_norm_eps=1e-5, tie_word_embeddings=vocab > 0, qk_norm=False,
    )  # fmt: skip
    model = LanguageModel(config)
    weights, offset = model.state_dict(), 28

    def take(name: str, pairs: int = 0) -> None:
        nonlocal offset
        for key in [name.replace("*", str(i)) for i in range(layers)] if "*" in name else [name]:
            count, shape = weights[key].numel(), weights[key].shape
            flat = torch.from_numpy(np.frombuffer(data, "<f4", count, offset).copy())
            # llama2.c turns neighbours (2i, 2i + 1); here they are (i, i + half) of a head.
            if pairs:
                flat = flat.view(pairs, -1, 2, shape[1]).transpose(1, 2)
            weights[key], offset = flat.reshape(shape), offset + 4 * count

    block = "model.layers.*."
    take("model.embed_tokens.weight")
    take(block + "input_layernorm.weight")
    take(block + "self_attn.q_proj.weight", heads)
    take(block + "self_attn.k_proj.weight", kv_heads)
    take(block + "self_attn.v_proj.weight")
    take(block + "self_attn.o_proj.weight")
    take(block + "post_attention_layernorm.weight")
    for name in ("gate_proj", "down_proj", "up_proj"):
        take(f"{block}mlp.{name}.weight")
    take("model.norm.weight")
    offset += 4 * longest * config.head_dim  # tables of cosines and sines, computed here
    if vocab < 0:
        take("lm_head.weight")
    else:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert offset == len(data)
    model.load_state_dict(weights)
    return model


def read_pieces(path: Path, count: int) -> list[bytes]:
    """tok512.bin: an int32, then for each token a float32 score, an int32 length and its bytes."""
    data, offset, pieces = path.read_bytes(), 4, []
    for _ in range(count):
        length = int.from_bytes(data[offset + 4 : offset + 8], "little")
        pieces.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    return pieces


def text_of(tokens: list[int], pieces: list[bytes]) -> bytes:
    """Pieces joined: `<0xNN>` is a byte, and the space that opens the text is not printed."""
    joined = b"".join(
        bytes([int(p[3:5], 16)]) if len(p) == 6 and p.startswith(b"<0x") else p
        for p in (pieces[t] for t in tokens)
    )
    return joined.removeprefix(b" ")


def test_greedy_decoding_tells_the_story_of_the_reference_program(folder: Path):
    model = read_llama2c(folder / "stories260K.bin")
    pieces = read_pieces(folder / "tok512.bin", model.config.vocab_size)
    options = SamplingOptions(200, temperature=0, stop_ids=(BOS,))
    (tokens,) = generate(model, [[BOS]], options, [0]).responses
    expected = (folder / "expected_greedy_200.txt").read_bytes()
    assert text_of(tokens, pieces) == expected
