"""mlx-lm, on a CPU."""

import json
import sys

import mlx.core
from mlx_lm import generate, load

mlx.core.set_default_device(mlx.core.cpu)
asked = json.load(sys.stdin)
model, tokenizer = load(asked["sft"])
prompts = [
    tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in asked["conversations"]
]
replies = [generate(model, tokenizer, prompt=prompt, max_tokens=asked["new"]) for prompt in prompts]
print(json.dumps({"prompts": prompts, "replies": replies}))
