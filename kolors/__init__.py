"""The Kolors model as a library: tokenizer, text encoder, UNet, VAE, schedulers, sampling.

Knows no node, no host and no training. Shapes in the docstrings of this package:
B batch, L text rows (256), S text rows in compact form, D text width (4096), C latent channels (4),
H W picture size in pixels, h w latent size in cells (H/8, W/8).
"""
