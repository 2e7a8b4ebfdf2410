# SPDX-License-Identifier: Apache-2.0
"""Checkpoint file formats: reading, writing, converting and merging."""
