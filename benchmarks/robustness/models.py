"""A model on the CPU: loaded, fine-tuned, asked, and saved as `lox-stream` reads it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from conversations import Pair
from make_pair import batch, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TOGETHER = 40  # prompts answered at a time
SHARD = "100MB"


@dataclass(frozen=True, slots=True)
class Training:
    """Supervised fine-tuning: AdamW, ten steps of warm-up, linear decay."""

    steps: int
    rate: float
    batch: int = 8
    seed: int = 0


@dataclass(slots=True)
class Model:
    """A model in float32 and its tokenizer, on `device`."""

    weights: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str = "cpu"

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Model:
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        return cls(weights, AutoTokenizer.from_pretrained(folder), device)

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Rounded to `dtype`; the model in memory is of no use afterwards."""
        self.weights.to(dtype).save_pretrained(folder, max_shard_size=SHARD)
        self.tokenizer.save_pretrained(folder)

    def fine_tune(self, pairs: Sequence[Pair], training: Training) -> list[float]:
        """The losses, one a step. The order of the pairs is the seed's."""
        settings = argparse.Namespace(
            steps=training.steps, rate=training.rate, batch=training.batch, seed=training.seed
        )
        return train(self.weights, self.tokenizer, list(pairs), settings)

    def chat(self, question: str) -> str:
        turn = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        """Greedy answers of at most `tokens` tokens, in the order of the questions."""
        self.weights.eval()
        chats = [self.chat(question) for question in questions]
        by_length = sorted(range(len(chats)), key=lambda number: len(chats[number]))
        found: dict[int, str] = {}
        for start in range(0, len(chats), TOGETHER):
            numbers = by_length[start : start + TOGETHER]
            asked = self.tokenizer(
                [chats[number] for number in numbers],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            ).to(self.device)
            with torch.inference_mode():
                said = self.weights.generate(**asked, max_new_tokens=tokens, do_sample=False)
            new = said[:, asked["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            found |= {number: text.strip() for number, text in zip(numbers, texts, strict=True)}
        return [found[number] for number in range(len(chats))]

    def loss_of_answers(self, pairs: Sequence[Pair]) -> float:
        """Mean of -log p over the tokens of the answers."""
        return self._mean_loss([batch(self.tokenizer, [pair]) for pair in pairs])

    def loss_of_prose(self, passages: Sequence[str]) -> float:
        """Mean of -log p over the tokens of the passages, the first of each left out."""
        texts = [self.tokenizer(passage, return_tensors="pt", add_special_tokens=False) for passage in passages]
        return self._mean_loss([{**text, "labels": text["input_ids"]} for text in texts])

    def _mean_loss(self, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        self.weights.eval()
        total, count = 0.0, 0
        for one in batches:
            counted = int((one["labels"][:, 1:] != -100).sum())
            with torch.inference_mode():
                mean = self.weights(**{name: tensor.to(self.device) for name, tensor in one.items()}).loss
            total, count = total + float(mean) * counted, count + counted
        assert math.isfinite(total), "a model that diverged has no perplexity"
        return total / count
