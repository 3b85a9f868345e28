"""llama.cpp, on the file that `python -m minillm.export` made of the folder."""

import json
import sys

from llama_cpp import Llama
from transformers import AutoTokenizer

asked = json.load(sys.stdin)
model = Llama(asked["gguf"], n_ctx=0, verbose=False)
tokenizer, prompts, replies = AutoTokenizer.from_pretrained(asked["sft"]), [], []
for messages in asked["conversations"]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts.append(model.tokenize(text.encode(), add_bos=False, special=True))
    said = model.create_chat_completion(messages, temperature=0.0, max_tokens=asked["new"])
    replies.append(said["choices"][0]["message"]["content"])
print(json.dumps({"prompts": prompts, "replies": replies}))
