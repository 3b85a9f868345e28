"""TRL's SFTTrainer with assistant_only_loss: the loss of the conversations before the first step."""

import json
import sys
import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

asked = json.load(sys.stdin)
talks = Dataset.from_list([{"messages": messages} for messages in asked["answered"]])
with tempfile.TemporaryDirectory() as folder:
    config = SFTConfig(
        output_dir=folder, assistant_only_loss=True, max_steps=1, logging_steps=1, report_to="none",
        per_device_train_batch_size=len(talks), use_cpu=True, bf16=False, save_strategy="no", max_length=None,
    )  # fmt: skip
    trainer = SFTTrainer(asked["sft"], config, train_dataset=talks)
    trainer.train()
    print(json.dumps({"loss of the replies": trainer.state.log_history[0]["loss"]}))
