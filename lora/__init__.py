"""LoRA as a library: every file format, exact application, writing. Uses kolors/ and knows no node."""
