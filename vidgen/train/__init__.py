# SPDX-License-Identifier: Apache-2.0
"""Training: the optimizer, gradient clipping and the loop around them."""
