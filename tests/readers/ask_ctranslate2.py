"""CTranslate2: its converter, then its generator, in float32."""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
from transformers import AutoTokenizer

asked = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(asked["sft"])
prompts = [
    tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in asked["conversations"]
]
with tempfile.TemporaryDirectory() as folder:
    made = ctranslate2.converters.TransformersConverter(asked["sft"]).convert(str(Path(folder, "made")))
    generator = ctranslate2.Generator(made, compute_type="float32")
    found = [
        generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt)], max_length=asked["new"], include_prompt_in_result=False
        )[0].sequences_ids[0]
        for prompt in prompts
    ]
replies = [tokenizer.decode(said, skip_special_tokens=True) for said in found]
print(json.dumps({"prompts": prompts, "replies": replies}))
