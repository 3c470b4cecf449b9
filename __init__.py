"""Kolors Nodes."""
