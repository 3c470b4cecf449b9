"""The models that a node can name, where they lie, and what travels on the sockets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .host import Host

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ..kolors.text_encoder import TextEncoder
    from ..kolors.tokenizer import Tokenizer
    from ..lora.formats import Lora

KOLORS = "Kwai-Kolors/Kolors"
DEMO = "kolors-shapes (demo)"
MODEL_CHOICES = [KOLORS, DEMO]
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "kolors-shapes"
DEMO_LORAS = DEMO_FOLDER.with_name("loras")

# Names under models/diffusers that people and other packs give the same model, the preferred one first.
_FOLDER_NAMES = ("Kolors", "Kolors-diffusers", "Kwai-Kolors/Kolors", "Kwai-Kolors/Kolors-diffusers")
_DOWNLOADS = {  # part of the model: repository, files
    "unet": ("Kwai-Kolors/Kolors", "unet/*.json unet/*fp16.safetensors"),
    "text_encoder": ("Kwai-Kolors/Kolors", "text_encoder/*"),
}


@dataclass(frozen=True, eq=False)
class KolorsModel:
    """Socket KOLORSMODEL: a UNet, shared by everything that is connected and never changed, and LoRAs on it."""

    unet: UNet2DConditionModel
    loras: tuple[tuple[Lora, float], ...] = ()

    def with_lora(self, lora: Lora, strength: float) -> KolorsModel:
        """Gives a model with one more LoRA. At a strength of 0 it is this one."""
        return KolorsModel(self.unet, (*self.loras, (lora, strength))) if strength else self

    @cached_property
    def patched_unet(self) -> UNet2DConditionModel:
        """The UNet with the LoRAs merged in, computed when it is first used; without any the UNet itself."""
        from ..lora.apply import apply_loras

        return apply_loras(self.unet, self.loras)


@dataclass(frozen=True, eq=False)
class ChatGLM3Model:
    """Socket CHATGLM3MODEL: a text encoder and its tokenizer."""

    text_encoder: TextEncoder
    tokenizer: Tokenizer


def find_model(host: Host, choice: str, part: str) -> Path:
    """Finds the folder of a model that has a part (``unet`` or ``text_encoder``).

    Args:
        host: knows the model folders.
        choice: one of ``MODEL_CHOICES``.
        part: the sub-folder that is needed; another part being there does not make up for it.

    Raises:
        FileNotFoundError: the part is nowhere; says where it would go and what fetches it.
        ValueError: no model has this name.
    """
    if choice not in MODEL_CHOICES:
        raise ValueError(f"No model is called {choice!r}. Choose one of: {', '.join(MODEL_CHOICES)}.")
    if choice == DEMO:
        return DEMO_FOLDER
    roots = host.get_folders("diffusers")
    for root in roots:
        for name in _FOLDER_NAMES:
            if (root / name / part / "config.json").is_file():
                return root / name
    repository, files = _DOWNLOADS[part]
    target = roots[0] / _FOLDER_NAMES[0]
    patterns = " ".join(f'"{pattern}"' for pattern in files.split())
    raise FileNotFoundError(
        f"Kolors' {part} is not in {target / part}. Fetch it: "
        f'hf download {repository} --include {patterns} --local-dir "{target}"'
    )


def list_vae_folders(host: Host) -> dict[str, Path]:
    """Lists VAEs in the diffusers layout: the bundled one and ``diffusers/<model>/vae``, name → folder."""
    found = {DEMO: DEMO_FOLDER / "vae"}
    for root in host.get_folders("diffusers"):
        for config in sorted(root.glob("*/vae/config.json")):
            found.setdefault(f"diffusers/{config.parent.parent.name}/vae", config.parent)
    return found
