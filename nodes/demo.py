"""Any Kolors graph on the bundled model: a pure change of the API prompt."""

from __future__ import annotations

import copy
from typing import Any

from .lora import list_bundled
from .models import DEMO

NATIVE_SIZE = 128  # pixels; Kolors' own is 1024
_SHRINK = 1024 // NATIVE_SIZE
_CELL = 32  # pixels; the bundled UNet halves its latents twice
_SIZED = ("KolorsSampler", "EmptyLatentImage", "LatentUpscale", "ImageScale")


def to_demo_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """Points a graph at the bundled model and scales its sizes from 1024 to 128 pixels.

    Every loader of a UNet, a text encoder or a VAE becomes one of the bundled model's; widths and heights are
    divided by 8 (to a multiple of 32, at least 64 pixels). LoRAs of Kolors do not fit and are switched off. Links,
    prompts, seeds and steps stay.

    Args:
        prompt: API format, node id → ``class_type`` and ``inputs``; not changed.

    Returns:
        A new prompt.
    """
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        node.setdefault("inputs", {})
    models = [node["inputs"].get("model") for node in prompt.values()
              if node.get("class_type") in ("DownloadAndLoadKolorsModel", "LoadKolorsUNet")]  # fmt: skip
    has_foreign_loras = any(model != DEMO for model in models)
    unused_lora = next(iter(list_bundled()), "")
    for node in prompt.values():
        inputs = node["inputs"]
        match node.get("class_type"):
            case "DownloadAndLoadKolorsModel":
                inputs["model"] = DEMO
            case "DownloadAndLoadChatGLM3":
                inputs.update(model=DEMO, precision="fp16")
            case "LoadKolorsUNet":
                node["class_type"] = "DownloadAndLoadKolorsModel"
                node["inputs"] = {"model": DEMO, "precision": "fp16"}
            case "LoadChatGLM3":
                node["class_type"] = "DownloadAndLoadChatGLM3"
                node["inputs"] = {"model": DEMO, "precision": "fp16"}
            case "VAELoader" | "KolorsVAELoader":
                node["class_type"] = "KolorsVAELoader"
                node["inputs"] = {"vae_name": DEMO}
            case "KolorsLoraLoader" if has_foreign_loras:
                inputs.update(lora_name=unused_lora, strength_model=0.0)
            case "LoadKolorsLoRA" if has_foreign_loras:
                inputs.update(lora_path=unused_lora, lora_alpha=0.0)
            case class_type if class_type in _SIZED:
                inputs.update({side: shrink(inputs[side]) for side in ("width", "height") if side in inputs})
    return prompt


def shrink(size: Any) -> Any:
    """Scales a size in pixels; what is no size (a link, a wrong type) stays for validation to judge.

    Sizes the bundled model draws natively already, 256 pixels and below, stay as well.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size <= 2 * NATIVE_SIZE:
        return size
    return max(2 * _CELL, round(size / _SHRINK / _CELL) * _CELL)
