"""A model on a CPU or GPU: loaded, fine-tuned, asked, and saved as `lox-stream` reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from compare import say
from conversations import Pair
from make_pair import Training, batch, chat, save, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TOGETHER = 40  # prompts answered at a time
SHARD = "100MB"


@dataclass(slots=True)
class Model:
    """A model in float32 and its tokenizer, on `device`."""

    weights: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str = "cpu"

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Model:
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama-2 has none of its own
        return cls(weights, tokenizer, device)

    def save(self, folder: Path) -> None:
        """Rounded to bf16."""
        save(self.weights, self.tokenizer, folder, SHARD)

    def fine_tune(self, pairs: Sequence[Pair], training: Training) -> list[float]:
        """The losses, one a step. The order of the pairs is the seed's.

        On a GPU what backward needs of a layer is computed again: forty conversations of a 7B model fill a card else.
        """
        if self.device != "cpu":
            self.weights.gradient_checkpointing_enable()
        return train(self.weights, self.tokenizer, list(pairs), training)

    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        """Greedy answers of at most `tokens` tokens, in the order of the questions."""
        self.weights.eval()
        by_length = sorted(range(len(questions)), key=lambda number: len(chat(self.tokenizer, questions[number])))
        said = say(self.weights, self.tokenizer, [questions[number] for number in by_length], tokens, TOGETHER)
        found = dict(zip(by_length, said, strict=True))
        return [found[number] for number in range(len(questions))]

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
