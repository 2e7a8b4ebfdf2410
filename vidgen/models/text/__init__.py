# SPDX-License-Identifier: Apache-2.0
"""Text encoders and what happens to a caption before them. Needs ``pip install 'vidgen[models]'``."""

from .captions import clean_caption, opensora_plan_v1_5_prompt, opensora_v2_prompt, opensora_v2_training_caption
from .clip import CLIPTextEncoder
from .t5 import T5TextEncoder
from .tiny import save_tiny_text_encoders

__all__ = [
    "CLIPTextEncoder",
    "T5TextEncoder",
    "clean_caption",
    "opensora_plan_v1_5_prompt",
    "opensora_v2_prompt",
    "opensora_v2_training_caption",
    "save_tiny_text_encoders",
]
