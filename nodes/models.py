"""The models that a node can name, where they lie, and what travels on the sockets."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..kolors.options import EXACT, SpeedOptions
from .host import Host, get_host

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

    from ..kolors.text_encoder import Text, TextEncoder, TextEncoderFiles, TokenBatch
    from ..kolors.tokenizer import Tokenizer
    from ..lora.formats import Lora

KOLORS = "Kwai-Kolors/Kolors"
DEMO = "kolors-shapes (demo)"
MODEL_CHOICES = [KOLORS, DEMO]
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "kolors-shapes"
DEMO_LORAS = DEMO_FOLDER.with_name("loras")


@dataclass(frozen=True, eq=False)
class KolorsModel:
    """Socket KOLORSMODEL: a UNet, shared by everything that is connected and never changed, and LoRAs on it.

    Attributes:
        unet: the base.
        loras: each with its strength.
        offload: one of ``OFFLOADS`` of ``kolors/offload.py``.
        speed: how sampling may be faster.
    """

    unet: UNet2DConditionModel
    loras: tuple[tuple[Lora, float], ...] = ()
    offload: str = "none"
    speed: SpeedOptions = EXACT

    def with_lora(self, lora: Lora, strength: float) -> KolorsModel:
        """Gives a model with one more LoRA. At a strength of 0 it is this one."""
        return replace(self, loras=(*self.loras, (lora, strength))) if strength else self

    @cached_property
    def patched_unet(self) -> UNet2DConditionModel:
        """The UNet with the LoRAs merged in, computed when it is first used; without any the UNet itself."""
        from ..lora.apply import apply_loras

        return apply_loras(self.unet, self.loras)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatGLM3Model:
    """Socket CHATGLM3MODEL: a tokenizer, and a text encoder that is loaded when it is first needed.

    Attributes:
        files: the encoder's, looked at already.
        tokenizer: the encoder's.
        precision: one of ``TEXT_PRECISIONS``.
        device: that computes.
        embedding_on_cpu: see ``load_text_encoder``.
    """

    files: TextEncoderFiles
    tokenizer: Tokenizer
    precision: str
    device: torch.device
    embedding_on_cpu: bool = False

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The encoder, on the CPU."""
        from ..kolors.text_encoder import load_text_encoder

        return load_text_encoder(
            self.files.path, precision=self.precision, device=self.device, embedding_on_cpu=self.embedding_on_cpu,
            on_progress=get_host().report_work,
        )  # fmt: skip

    @cached_property
    def identity(self) -> str:
        """What the encoder's files hold, read here and there; see ``get_identity``."""
        from ..kolors.storage import get_identity

        return get_identity(self.files.iterate())

    @property
    def arithmetic(self) -> str:
        """What besides the files decides the numbers: the dtype, and how weights are quantised."""
        from ..kolors.quantised import QUANTISATIONS
        from ..kolors.text_encoder import get_compute_dtype

        dtype = str(get_compute_dtype(self.precision, self.device))
        return f"{self.precision} {dtype}" if self.precision in QUANTISATIONS else dtype

    def encode_texts(self, host: Host, texts: list[str], folder: Path | None = None) -> dict[str, Text]:
        """Encodes texts. Those encoded before come from memory, or from files in the folder, without the encoder."""
        from ..kolors.prompt_cache import PROMPTS

        def encode(batches: list[TokenBatch]) -> list[Text]:
            with host.on_device(self.text_encoder, self):
                return [text for batch in batches for text in self.text_encoder.encode_texts(batch)]

        encoder = (self.identity, self.arithmetic)
        return PROMPTS.encode(texts, self.tokenizer, encoder=encoder, encode=encode, folder=folder)


def find_model(host: Host, choice: str, part: str, source: str = "auto") -> Path:
    """Finds the folder of a model that has a part, and fetches what of the part is missing.

    Args:
        host: knows the model folders, shows the progress and stops the download on a wish to stop.
        choice: one of ``MODEL_CHOICES``.
        part: ``unet``, ``text_encoder`` or ``tokenizer``; another part being there does not make up for it.
        source: where to fetch from, one of ``SOURCES`` of ``kolors/download.py``.

    Raises:
        FileNotFoundError: the part is missing and the user allows no network; says where it would go and what
            fetches it.
        DownloadError: the part is missing and cannot be fetched.
        ValueError: no model has this name.
    """
    folder = locate_model(host, choice, part)
    if choice != DEMO:
        fetch_missing(host, folder, part, source)
    return folder


def find_vae(host: Host, name: str) -> Path:
    """Finds the file or folder of a VAE that ``list_vaes`` names, and fetches the published file if it is missing.

    Raises:
        FileNotFoundError: it is not there, and not to be fetched.
        DownloadError: the published file is missing and cannot be fetched.
        ValueError: the name leads out of the folder.
    """
    folder = list_vae_folders(host).get(name)
    if folder:
        return folder
    published = locate_published_vae(host, name)
    if published:
        fetch_missing(host, published.parent, "vae")
    return published or host.resolve_file("vae", name)


def fetch_missing(host: Host, folder: Path, part: str, source: str = "auto") -> None:
    """Fetches what of a part is missing in a folder, and shows how far it is.

    Raises:
        FileNotFoundError: something is missing and the user allows no network.
        DownloadError: it cannot be fetched.
    """
    from ..kolors.download import DownloadError, download, find_missing

    if not find_missing(folder, part):
        return
    reason = describe_offline(folder, part)
    if reason:
        raise FileNotFoundError(reason)
    try:
        download({part: folder}, source=source, verify=False, on_progress=host.report_work)
    except DownloadError as error:
        raise DownloadError(f"{error} The {part} of Kolors goes into {folder}; to fetch it by hand: "
                            f"{get_command(folder, part)}") from error  # fmt: skip


def locate_model(host: Host, choice: str, part: str) -> Path:
    """Gives the folder that has a part of a model, else the one that has most of it, else where it would go.

    Raises:
        ValueError: no model has this name.
    """
    from ..kolors.download import choose_folder, find_missing

    if choice not in MODEL_CHOICES:
        raise ValueError(f"No model is called {choice!r}. Choose one of: {', '.join(MODEL_CHOICES)}.")
    if choice == DEMO:
        return DEMO_FOLDER
    roots = host.get_folders("diffusers")
    folder = choose_folder(roots, part)
    if find_missing(folder, part):
        # A clone of the model itself in place of the model folders, or right in models/diffusers.
        clones = (clone for root in roots for clone in (root, root.parent) if not find_missing(clone, part))
        return next(clones, folder)
    return folder


def describe_missing(host: Host, choice: str, part: str) -> str:
    """Says what of a part is missing that will not be fetched, because the user allows no network; else nothing.

    Raises:
        ValueError: no model has this name.
    """
    folder = locate_model(host, choice, part)
    return "" if choice == DEMO else describe_offline(folder, part)


def describe_offline(folder: Path, part: str) -> str:
    """Says what of a part is missing in a folder if the user allows no network; else nothing."""
    from ..kolors.download import SIZES, find_missing
    from ..kolors.hubs import is_offline

    missing = find_missing(folder, part) if is_offline() else []
    if not missing:
        return ""
    return (
        f"Kolors' {part} is not in {folder}: {', '.join(missing)} is missing or incomplete. HF_HUB_OFFLINE is set, so "
        f"it is not fetched. Unset that, or fetch it by hand ({SIZES[part]}): {get_command(folder, part)}"
    )


def get_command(folder: Path, part: str) -> str:
    """Gives the command that fetches a part into a folder, as it works on this machine."""
    command = "kolors" if shutil.which("kolors") else f'"{sys.executable}" "{Path(__file__).parents[1]}"'
    what = "text_encoder" if part == "tokenizer" else part
    place = next((above.parent for above in (folder, *folder.parents) if above.name in ("diffusers", "vae")), None)
    return f"{command} download --what {what}" + (f' --models-dir "{place}"' if place else "")


def list_vaes(host: Host) -> list[str]:
    """Lists VAEs: in the diffusers layout, the files in ``models/vae``, and the published one, there or not."""
    from ..kolors.download import VAE_FILE

    return list(dict.fromkeys([*list_vae_folders(host), *host.list_files("vae"), VAE_FILE]))


def locate_published_vae(host: Host, name: str) -> Path | None:
    """Gives where the published VAE is, or would go, if it is the one that is named."""
    from ..kolors.download import VAE_FILE, choose_folder

    return choose_folder(host.get_folders("vae"), "vae") / VAE_FILE if name == VAE_FILE else None


def list_vae_folders(host: Host) -> dict[str, Path]:
    """Lists VAEs in the diffusers layout: the bundled one and ``diffusers/<model>/vae``, name → folder."""
    found = {DEMO: DEMO_FOLDER / "vae"}
    for root in host.get_folders("diffusers"):
        for config in sorted(root.glob("*/vae/config.json")):
            found.setdefault(f"diffusers/{config.parent.parent.name}/vae", config.parent)
    return found
