# SPDX-License-Identifier: Apache-2.0
"""How good a video is: PSNR and SSIM."""
