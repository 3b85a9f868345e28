"""transformers.js under Node, on the ONNX file that Optimum makes of the folder; and ONNX Runtime here."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

PROGRAM = """
import { env, pipeline } from "@huggingface/transformers";
const asked = JSON.parse(process.env.ASKED);
env.allowRemoteModels = false;
env.localModelPath = process.env.FOLDER;
const model = await pipeline("text-generation", "sft", { dtype: "fp32" });
const prompts = [], replies = [];
for (const messages of asked.conversations) {
  const how = { add_generation_prompt: true, return_tensor: false, return_dict: false };
  const said = await model(messages, { max_new_tokens: asked.new, do_sample: false });
  prompts.push(model.tokenizer.apply_chat_template(messages, how));
  replies.push(said[0].generated_text.at(-1).content);
}
console.log(JSON.stringify({ prompts, replies }));
"""

asked = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(asked["sft"])
with tempfile.TemporaryDirectory() as folder:
    made = Path(folder, "sft")
    model = ORTModelForCausalLM.from_pretrained(asked["sft"], export=True)
    model.save_pretrained(made / "onnx")
    for file in Path(asked["sft"]).glob("*.json"):
        shutil.copy(file, made)
    if (template := Path(asked["sft"], "chat_template.jinja")).exists():
        shutil.copy(template, made)
    here = []
    for messages in asked["conversations"]:
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**given, do_sample=False, max_new_tokens=asked["new"])
        here.append(tokenizer.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    program = Path("ask.mjs")  # here, beside node_modules
    program.write_text(PROGRAM)
    env = {**os.environ, "ASKED": json.dumps(asked), "FOLDER": folder}
    node = subprocess.run(["node", program], env=env, capture_output=True, text=True)
    if node.returncode:
        sys.exit(node.stderr)
found = json.loads(node.stdout.splitlines()[-1])
print(json.dumps({**found, "replies by ONNX Runtime": here}))
