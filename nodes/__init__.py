"""Thin ComfyUI node classes: inputs and tooltips, one call into the libraries."""
