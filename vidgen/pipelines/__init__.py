# SPDX-License-Identifier: Apache-2.0
"""From prompts and clips to videos on disk: encode, sample, decode, write."""
