# SPDX-License-Identifier: Apache-2.0
"""Which function runs a case, by the name of its folder and its kind."""

from __future__ import annotations

from collections.abc import Callable

from . import cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2
from .comparison import Case, Comparison

# A module's RUNNERS say how its kinds run; its NOT_BUILT are known and cannot run yet. Any other kind is a failure.
SYSTEMS = {
    "cogvideox": cogvideox,
    "opensora_plan_v1_3": opensora_plan_v1_3,
    "opensora_plan_v1_5": opensora_plan_v1_5,
    "opensora_v2": opensora_v2,
}
RUNNERS: dict[tuple[str, str], Callable[[Case, Comparison], None]] = {
    (system, kind): runner for system, module in SYSTEMS.items() for kind, runner in module.RUNNERS.items()
}
NOT_BUILT: dict[str, set[str]] = {system: module.NOT_BUILT for system, module in SYSTEMS.items()}
