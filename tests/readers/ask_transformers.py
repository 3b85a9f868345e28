"""Transformers, version 4 or 5: replies one by one, and in one batch that is padded on the left."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(asked["sft"])
tokenizer = AutoTokenizer.from_pretrained(asked["sft"], padding_side="left")
how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
plain = {"do_sample": False, "max_new_tokens": asked["new"]}
prompts, replies = [], []
for messages in asked["conversations"]:
    given = tokenizer.apply_chat_template(messages, **how)
    said = model.generate(**given, **plain)[0, given["input_ids"].shape[1] :]
    prompts.append(given["input_ids"][0].tolist())
    replies.append(tokenizer.decode(said, skip_special_tokens=True))
given = tokenizer.apply_chat_template(asked["conversations"], padding=True, **how)
said = model.generate(**given, **plain)[:, given["input_ids"].shape[1] :]
together = tokenizer.batch_decode(said, skip_special_tokens=True)

base, tokenizer = (
    AutoModelForCausalLM.from_pretrained(asked["base"]),
    AutoTokenizer.from_pretrained(asked["base"]),
)
tokens = tokenizer(asked["text"], return_tensors="pt")["input_ids"]
with torch.no_grad():
    nats = base(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
print(
    json.dumps(
        {"prompts": prompts, "replies": replies, "replies in a batch": together, "nats of a text": nats}
    )
)
