"""mistral.rs, by its Python package."""

import json
import sys

from mistralrs import ChatCompletionRequest, Runner, Which

asked, replies = json.load(sys.stdin), []
runner = Runner(which=Which.Plain(model_id=asked["sft"]))
for messages in asked["conversations"]:
    request = ChatCompletionRequest(
        model="default", messages=messages, max_tokens=asked["new"], temperature=0.0
    )
    replies.append(runner.send_chat_completion_request(request).choices[0].message.content or "")
print(json.dumps({"replies": replies}))
