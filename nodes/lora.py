"""Nodes for LoRAs: loading files onto a model, applying one made in the graph, saving."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..lora.names import KOHYA, WRITABLE, get_unet_names
from .host import Host, get_host
from .models import DEMO, DEMO_LORAS, KolorsModel

if TYPE_CHECKING:
    from ..lora.formats import Lora

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin", ".pth", ".sft")

_STRENGTH = {
    "default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01,
    "tooltip": "How strongly, -10 to 10: times the file's alpha / rank. 0 is the model without it, 1 what was "
               "trained. Where a file has no alpha, as DiffSynth's, alpha = rank is assumed.",
}  # fmt: skip
_IGNORE = {
    "default": False,
    "advanced": True,
    "tooltip": "Use what fits and leave out the rest. Off: a file with tensors that fit nothing is an error.",
}


class _PutsLoraOnModel:
    """What comes out of the nodes that put a LoRA on a Kolors model."""

    RETURN_TYPES = ("KOLORSMODEL",)
    RETURN_NAMES = ("kolors_model",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA, for Kolors Sampler or another LoRA.",)
    CATEGORY = "Kolors/LoRA"


class LoadKolorsLoRA(_PutsLoraOnModel):
    """Puts a LoRA file, named by its path, on a Kolors model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kolors_model": ("KOLORSMODEL", {"tooltip": "The model; it is not changed."}),
                "lora_path": ("STRING", {"default": "", "tooltip": "An absolute path, or a file in models/loras: "
                              ".safetensors, or .ckpt as DiffSynth-Studio writes."}),
                "lora_alpha": ("FLOAT", {"default": 2.0, "min": 0.0, "max": 4.0, "step": 0.01, "tooltip": "The scale "
                               "is this number / rank, 0 to 4; an alpha in the file is not used. DiffSynth's files "
                               "store none: give the alpha that it was trained with."}),
            },
            "optional": {"ignore_unknown": ("BOOLEAN", _IGNORE)},
        }  # fmt: skip

    FUNCTION = "load_lora"
    DESCRIPTION = "Puts a LoRA on the model, scaled by lora_alpha / rank. Reads every format."
    SEARCH_ALIASES = ["lora path", "lora alpha", "diffsynth lora", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, lora_path: str | None) -> bool | str:
        return check_path(lora_path)

    @classmethod
    def IS_CHANGED(
        cls, lora_path: str, lora_alpha: float = 2.0, kolors_model: Any = None, ignore_unknown: bool = False
    ) -> str:
        return get_stamp(resolve_path(get_host(), lora_path))

    def load_lora(
        self, kolors_model: KolorsModel, lora_path: str, lora_alpha: float, ignore_unknown: bool = False
    ) -> tuple[KolorsModel]:
        if lora_alpha == 0:
            return (kolors_model,)
        lora = read_lora(resolve_path(get_host(), lora_path), kolors_model, ignore_unknown)
        return (kolors_model.with_lora(lora.with_alpha(lora_alpha), 1.0),)


class KolorsLoraLoader(_PutsLoraOnModel):
    """Puts a LoRA file from the LoRA folder on a Kolors model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = get_host()
        return {
            "required": {
                "kolors_model": ("KOLORSMODEL", {"tooltip": "The model; it is not changed."}),
                "lora_name": ([*list_bundled(), *host.list_files("loras")], {"tooltip": "A file in models/loras, of "
                              "any format: DiffSynth, diffusers, kohya, ComfyUI. The demo's are for its own model."}),
                "strength_model": ("FLOAT", _STRENGTH),
            },
            "optional": {"ignore_unknown": ("BOOLEAN", _IGNORE)},
        }  # fmt: skip

    FUNCTION = "load_lora"
    DESCRIPTION = "Puts a LoRA on the model. Reads every format. Chain several for several LoRAs."
    SEARCH_ALIASES = ["lora loader", "load lora", "model lora", "可图"]

    @classmethod
    def IS_CHANGED(
        cls, lora_name: str, strength_model: float = 1.0, kolors_model: Any = None, ignore_unknown: bool = False
    ) -> str:
        return get_stamp(resolve_name(get_host(), lora_name))

    def load_lora(
        self, kolors_model: KolorsModel, lora_name: str, strength_model: float, ignore_unknown: bool = False
    ) -> tuple[KolorsModel]:
        if strength_model == 0:
            return (kolors_model,)
        lora = read_lora(resolve_name(get_host(), lora_name), kolors_model, ignore_unknown)
        return (kolors_model.with_lora(lora, strength_model),)


class KolorsApplyLora(_PutsLoraOnModel):
    """Puts a LoRA that another node made on a Kolors model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kolors_model": ("KOLORSMODEL", {"tooltip": "The model; it is not changed."}),
                "lora": ("KOLORS_LORA", {"tooltip": "The LoRA, made for this model."}),
                "strength_model": ("FLOAT", _STRENGTH),
            }
        }

    FUNCTION = "apply_lora"
    DESCRIPTION = "Puts a LoRA from another node on the model, without a file."
    SEARCH_ALIASES = ["apply trained lora", "lora model", "可图"]

    def apply_lora(self, kolors_model: KolorsModel, lora: Lora, strength_model: float) -> tuple[KolorsModel]:
        return (kolors_model.with_lora(lora, strength_model),)


class KolorsSaveLora:
    """Saves a LoRA where the LoRA loaders find it."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora": ("KOLORS_LORA", {"tooltip": "The LoRA."}),
                "name": ("STRING", {"default": "kolors_lora", "tooltip": "File name in models/loras, with sub-folders "
                         "if it has slashes. Where a file is there already, a number is appended."}),
                "format": (list(WRITABLE), {"default": KOHYA, "tooltip": "kohya: read by ComfyUI, diffusers and "
                           "WebUIs. diffusers: by diffusers, and by ComfyUI but for its alpha. diffsynth: by "
                           "DiffSynth-Studio."}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_name",)
    OUTPUT_TOOLTIPS = ("The file's name in models/loras.",)
    FUNCTION = "save_lora"
    CATEGORY = "Kolors/LoRA"
    DESCRIPTION = "Saves a LoRA into models/loras as safetensors, in a format that others read."
    SEARCH_ALIASES = ["save lora", "export lora", "convert lora", "可图"]
    OUTPUT_NODE = True

    def save_lora(self, lora: Lora, name: str, format: str) -> dict[str, Any]:
        from ..lora.files import save_lora

        folder = get_host().get_folders("loras")[0]
        path = save_lora(lora, get_free_path(folder, name), format)
        lora_name = path.relative_to(folder).as_posix()
        return {"ui": {"text": [lora_name]}, "result": (lora_name,)}


def list_bundled() -> dict[str, Path]:
    """Lists the LoRAs that come with the bundled model, name → path."""
    return {f"{DEMO}/{path.name}": path for path in sorted(DEMO_LORAS.glob("*.safetensors"))}


def resolve_name(host: Host, lora_name: str) -> Path:
    """Gives the path of a listed LoRA.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: the name leads out of the LoRA folders.
    """
    return list_bundled().get(lora_name) or host.resolve_file("loras", lora_name)


def resolve_path(host: Host, lora_path: str) -> Path:
    """Gives the path that a user typed: absolute, or a listed name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a relative path leads out of the LoRA folders, or the file cannot be a LoRA.
    """
    lora_path = lora_path.strip().strip('"')  # Windows copies paths with quotation marks
    if not lora_path:
        raise ValueError(f"lora_path is empty. Give an absolute path, or a file in {host.get_folders('loras')[0]}.")
    path = Path(lora_path)
    if not path.is_absolute():
        path = resolve_name(host, lora_path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"lora_path is {lora_path!r}, expected a file ending with {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise FileNotFoundError(f"lora_path is {lora_path!r}, and there is no such file.")
    return path


def check_path(lora_path: str | None) -> bool | str:
    """Says for VALIDATE_INPUTS whether a typed path is there: True, or what is wrong. None comes from a link."""
    try:
        if lora_path is not None:
            resolve_path(get_host(), lora_path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return True


def read_lora(path: Path, kolors_model: KolorsModel, ignore_unknown: bool) -> Lora:
    """Reads a file of any format for a model."""
    from ..lora.files import load_lora

    return load_lora(path, get_unet_names(kolors_model.unet), ignore_unknown=ignore_unknown)


def get_stamp(path: Path) -> str:
    """Says for IS_CHANGED whether a file is still the same."""
    stat = path.stat()
    return f"{stat.st_mtime_ns}:{stat.st_size}"


def get_free_path(folder: Path, name: str) -> Path:
    """Gives the path of a new file in a folder, with a number where the name is taken.

    Raises:
        ValueError: the name is empty or leads out of the folder.
    """
    relative = PurePosixPath(name.strip().replace("\\", "/").removesuffix(".safetensors"))
    if relative.is_absolute() or ".." in relative.parts or not relative.name or any(sign in name for sign in ":\0"):
        raise ValueError(f"The name is {name!r}, which is empty or outside of {folder}. Give a name inside it.")
    for number in range(1, 10**6):
        ending = "" if number == 1 else f"_{number}"
        path = folder / relative.parent / f"{relative.name}{ending}.safetensors"
        if not path.exists():
            return path
    raise ValueError(f"{folder / relative} has a million versions already. Choose another name.")
