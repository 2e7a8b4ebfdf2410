# SPDX-License-Identifier: Apache-2.0
"""Short prompts to long ones by a language model, since video models are trained on long captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .folder import import_transformers, load_model, load_tokenizer

SYSTEM = "You are a caption refiner."
INSTRUCTION = (
    'Refine the sentence "{}" so that it describes a subject, its action and the scene, and optionally camera '
    "language, light and shadow, and atmosphere. Think of a few more actions that make it livelier. "
    "The result must be fluent and make sense."
)
MAX_NEW_TOKENS = 512


class PromptRefiner(nn.Module):
    """Prompt to a more detailed prompt, with any chat model that ``transformers`` loads as a causal language model.

    Open-Sora Plan v1.3 publishes one, ``prompt_refiner``: Llama 3.1 8B Instruct, fine-tuned for this.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        if not tokenizer.chat_template:
            raise ValueError("PromptRefiner: tokenizer must have a chat template, got none")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> PromptRefiner:
        """Load a local Hugging Face folder: ``config.json``, ``*.safetensors`` and the tokenizer's files.

        Raises:
            ImportError: transformers is not installed.
            FileNotFoundError: a part is missing; the message names it.
            ValueError: the weights do not fill the model, or the tokenizer has no chat template.
        """
        transformers = import_transformers(cls.__name__)
        model = load_model(transformers.AutoModelForCausalLM, Path(folder), cls.__name__)
        return cls(model.to(dtype), load_tokenizer(Path(folder), cls.__name__))

    def refine(self, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """See :func:`refine_prompt`."""
        return refine_prompt(self.model, self.tokenizer, prompt, max_new_tokens=max_new_tokens)


@torch.no_grad()
def refine_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    instruction: str = INSTRUCTION,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str:
    """What the model answers to the instruction, always its most likely words, so that a prompt has one answer.

    The original draws words at random where the model's settings say so, and begins the conversation twice.

    Args:
        model, tokenizer: a causal language model of ``transformers``, with a chat template.
        prompt: put into the instruction.
        instruction: with ``{}`` for the prompt.
        max_new_tokens: the answer is cut there.

    Raises:
        ValueError: an empty prompt, an instruction without a place for it, or an answer without a word.
    """
    if not prompt.strip():
        raise ValueError(f"refine_prompt: prompt must not be empty, got {prompt!r}")
    if "{}" not in instruction:
        raise ValueError(f"refine_prompt: instruction must have {{}} for the prompt, got {instruction!r}")
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": instruction.replace("{}", prompt, 1)},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # the template has all special tokens
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    given = tokens["input_ids"].shape[1]
    answer = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=padding,
    )[0, given:]
    refined = tokenizer.decode(answer, skip_special_tokens=True).strip()
    if not refined:
        raise ValueError(f"refine_prompt: the model answered nothing to prompt {prompt!r}")
    return refined
