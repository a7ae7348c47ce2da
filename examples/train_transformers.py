"""Hugging Face's Trainer: a small Llama learns to count.

The trainer makes the optimizer, from a class and its arguments. Its own clipping is switched off: the step
clips in the same pass. A script that cannot be changed: python -m fused_optim run train.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_optim import AdamW


class Counting(torch.utils.data.Dataset):
    """Sequences of tokens that count on from a first one."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) + index) % 16
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=60,
        max_grad_norm=0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2, "max_grad_norm": 1.0}),
    )
    trainer.train()

optimizer = trainer.optimizer.optimizer  # in Accelerate's wrapper
print(f"last gradient norm {optimizer.grad_norm:.3f}, tensors by {optimizer.last_step.tensors}")
