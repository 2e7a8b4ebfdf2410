# SPDX-License-Identifier: Apache-2.0
"""Clips and captions: reading and writing video, transforms, datasets, samplers."""
