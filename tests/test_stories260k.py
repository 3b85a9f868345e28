"""A model trained elsewhere, in another program's file layout, tells its known story word for word."""

from pathlib import Path

import numpy as np
import torch

from minillm.generate import SamplingOptions, generate
from minillm.model import LanguageModel, ModelConfig

BOS = 1
BLOCK = "model.layers.*."
LAYOUT = ("model.embed_tokens.", BLOCK + "input_layernorm.",
          *(f"{BLOCK}self_attn.{name}_proj." for name in "qkvo"), BLOCK + "post_attention_layernorm.",
          *(f"{BLOCK}mlp.{name}_proj." for name in ("gate", "down", "up")), "model.norm.")  # fmt: skip
"""The order of the weights, each kind for all layers at once."""


def read_llama2c(path: Path) -> LanguageModel:
    """The flat file of llama2.c: seven int32 (dim, hidden_dim, layers, heads, kv heads, vocabulary, longest
    row; the output matrix is the embedding), then every weight as float32."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, longest = np.frombuffer(data, "<i4", 7).tolist()
    config = ModelConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim // heads,
        max_position_embeddings=longest, rms_norm_eps=1e-5, tie_word_embeddings=True, qk_norm=False,
    )  # fmt: skip
    model, offset = LanguageModel(config), 28
    weights = model.state_dict()
    for name in LAYOUT:
        for layer in range(layers if "*" in name else 1):
            weight = weights[name.replace("*", str(layer)) + "weight"]
            flat = torch.from_numpy(np.frombuffer(data, "<f4", weight.numel(), offset).copy())
            # llama2.c turns neighbours (2i, 2i + 1); here they are (i, i + half) of a head.
            if name.endswith(("q_proj.", "k_proj.")):
                flat = flat.view(-1, config.head_dim // 2, 2, dim).transpose(1, 2)
            weight.copy_(flat.reshape(weight.shape))
            offset += 4 * weight.numel()
    assert offset + 4 * longest * config.head_dim == len(data)  # tables of cosines and sines, computed here
    return model


def read_pieces(path: Path, count: int) -> list[bytes]:
    """tok512.bin: an int32, then for each token a float32 score, an int32 length and its bytes."""
    data, offset, pieces = path.read_bytes(), 4, []
    for _ in range(count):
        length = int.from_bytes(data[offset + 4 : offset + 8], "little")
        pieces.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    return pieces


def test_greedy_decoding_tells_the_story_of_the_reference_program(shared_data: Path):
    folder = shared_data / "interop" / "stories260K"
    model = read_llama2c(folder / "stories260K.bin")
    pieces = read_pieces(folder / "tok512.bin", model.config.vocab_size)
    (tokens,) = generate(model, [[BOS]], SamplingOptions(200, temperature=0, stop_ids=(BOS,)), [0]).responses
    # <0xNN> is a byte, and the space that opens the text is not printed.
    said = (bytes([int(p[3:5], 16)]) if len(p) == 6 and p.startswith(b"<0x") else p
            for p in (pieces[t] for t in tokens))  # fmt: skip
    assert b"".join(said).removeprefix(b" ") == (folder / "expected_greedy_200.txt").read_bytes()
