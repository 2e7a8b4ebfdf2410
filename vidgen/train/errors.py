# SPDX-License-Identifier: Apache-2.0
"""Why a run ends before its last step."""


class TrainingStopped(RuntimeError):
    """The run cannot go on; the last good checkpoint is intact."""
