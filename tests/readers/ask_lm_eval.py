"""lm-eval: the log-likelihood of a text under the base model. It begins a text with bos itself, so that the
tokenizer, which does so too, must not."""

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

asked = json.load(sys.stdin)
model = HFLM(pretrained=asked["base"], device="cpu", dtype="float32", add_bos_token=False)
request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(asked["text"],), idx=0)
print(json.dumps({"nats of a text": -model.loglikelihood_rolling([request])[0]}))
