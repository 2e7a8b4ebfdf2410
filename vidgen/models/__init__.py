# SPDX-License-Identifier: Apache-2.0
"""Models: one folder each, with ``config.py``, ``model.py`` and ``checkpoint.py`` (key tables)."""
