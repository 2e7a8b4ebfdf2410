# SPDX-License-Identifier: Apache-2.0
"""Text encoders and what happens to a caption before them. Needs ``pip install 'vidgen[models]'``."""

from .captions import (
    OPENSORA_PLAN_V1_3_NEGATIVE_PROMPT,
    clean_caption,
    drop_caption,
    opensora_plan_v1_3_prompt,
    opensora_plan_v1_3_training_caption,
    opensora_plan_v1_5_prompt,
    opensora_v2_prompt,
    opensora_v2_training_caption,
)
from .clip import CLIPTextEncoder
from .refiner import PromptRefiner
from .t5 import T5TextEncoder
from .tiny import save_tiny_text_encoders

__all__ = [
    "CLIPTextEncoder",
    "OPENSORA_PLAN_V1_3_NEGATIVE_PROMPT",
    "PromptRefiner",
    "T5TextEncoder",
    "clean_caption",
    "drop_caption",
    "opensora_plan_v1_3_prompt",
    "opensora_plan_v1_3_training_caption",
    "opensora_plan_v1_5_prompt",
    "opensora_v2_prompt",
    "opensora_v2_training_caption",
    "save_tiny_text_encoders",
]
