"""The only door to whatever runs the nodes: ComfyUI, or the headless runner.

The libraries take plain arguments and need no host; the nodes ask for one here. ``comfy`` and ``folder_paths``
are imported nowhere else, and only inside functions; so is torch, because the nodes load without it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from PIL.Image import Image
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from ..headless.host import HeadlessHost

# What a UNet of SDXL's kind computes beside its weights, per byte of a latent cell in one channel.
# Source: ComfyUI's model_base.py, memory_required, with SDXL's memory_usage_factor of 0.8.
BYTES_PER_CELL_BYTE = 0.01 * 0.8 * 2**20

# A line under a node makes it taller for good, over what is below it: not worth it for work that is done at once.
SECONDS_BEFORE_TEXT = 1.0

logger = logging.getLogger(__name__)


class Host(Protocol):
    """What a node may ask of its host."""

    def get_folders(self, kind: str) -> list[Path]:
        """Gives the folders of a kind of model files (``diffusers``, ``vae``, ``LLM``, ``loras``, …)."""

    def list_files(self, kind: str) -> list[str]:
        """Lists the model files of a kind, as names relative to their folder."""

    def resolve_file(self, kind: str, name: str) -> Path:
        """Gives the path of a listed file.

        Raises:
            FileNotFoundError: no folder of this kind has the file.
            ValueError: the name leads out of the folder.
        """

    def get_device(self) -> torch.device:
        """Gives the device that computes."""

    def get_intermediate_device(self) -> torch.device:
        """Gives the device for what a node returns."""

    def on_device(
        self, module: nn.Module, owner: object, cells: int = 0, offload: str = "none"
    ) -> AbstractContextManager[None]:
        """Gives a context in which a module is on the computing device. A wish to stop acts between its blocks.

        Args:
            module: the network that shall run.
            owner: the object on the socket that it belongs to; the host may remember the module as long as it lives.
            cells: latent cells that it will compute at once, of the whole batch, so that the host makes room.
            offload: one of ``OFFLOADS`` of ``kolors/offload.py``; "blocks": its weights stay on the CPU and visit the
                device layer by layer.
        """

    def report_step(self, step: int, total: int, latents: torch.Tensor | None = None) -> None:
        """Shows that ``step`` of ``total`` steps are done. Raises the host's own exception on a wish to stop."""

    def load_vae(self, path: Path) -> Any:
        """Loads a VAE that the host's VAEDecode and VAEEncode take."""

    def get_input_folder(self) -> Path:
        """Gives the folder of what users bring."""

    def get_output_folder(self) -> Path:
        """Gives the folder of what nodes write for users."""

    def make_room(self, size: int) -> None:
        """Frees ``size`` bytes on the computing device, for something that the host does not load itself."""

    def report_work(self, done: int, total: int, text: str, picture: Image | None = None) -> None:
        """Shows progress with a line of text and perhaps a picture. Raises the host's own exception as above.

        A call with the line that is shown already, and no picture, only looks for the wish to stop: loading calls
        after each of thousands of tensors.
        """


class RunnerHost:
    """The headless runner as a host.

    Args:
        services: folders, device and progress of the running Runner.
    """

    def __init__(self, services: HeadlessHost):
        self._services = services
        self._line = ""
        self.get_folders = services.get_folders
        self.list_files = services.list_files
        self.resolve_file = services.resolve_file

    def get_device(self) -> torch.device:
        import torch

        return torch.device(self._services.get_device())

    def get_intermediate_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    @contextmanager
    def on_device(self, module: nn.Module, owner: object, cells: int = 0, offload: str = "none") -> Iterator[None]:
        from ..kolors.offload import place

        with place(module, self.get_device(), offload):
            with stop_between_blocks(module, self._services.raise_if_interrupted):
                yield

    def report_step(self, step: int, total: int, latents: torch.Tensor | None = None) -> None:
        self._services.report_progress(step, total)
        self._services.raise_if_interrupted()

    def load_vae(self, path: Path) -> Any:
        from ..kolors.vae import load_vae

        return load_vae(path, device=self.get_device())

    def get_input_folder(self) -> Path:
        return self._services.input_dir

    def get_output_folder(self) -> Path:
        return self._services.output_dir

    def make_room(self, size: int) -> None:
        """Nothing to do: a model is on the device only while its node runs."""

    def report_work(self, done: int, total: int, text: str, picture: Image | None = None) -> None:
        if text != self._line or picture:
            self._line = text
            logger.info("%s", text)
            self._services.report_progress(done, total, picture)
        self._services.raise_if_interrupted()


class ComfyHost:
    """ComfyUI as a host, for the length of one node's run."""

    def __init__(self) -> None:
        self._progress_bar: Any = None
        self._line = ""
        self._work_start = 0.0
        self._previewer: Any = None

    def get_folders(self, kind: str) -> list[Path]:
        import folder_paths

        registered = folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]
        folders = [Path(folder) for folder in registered]
        default = Path(folder_paths.models_dir) / kind
        return folders if default in folders else [*folders, default]

    def list_files(self, kind: str) -> list[str]:
        import folder_paths

        folders = self.get_folders(kind)
        # A kind that only extra_model_paths.yaml registers lacks the folder in the models folder.
        if len(folder_paths.folder_names_and_paths.get(kind, ([],))[0]) == len(folders):
            return folder_paths.get_filename_list(kind)
        names: set[str] = set()
        for folder in folders:
            files, _ = folder_paths.recursive_search(str(folder), excluded_dir_names=[".git"])
            names.update(folder_paths.filter_files_extensions(files, folder_paths.supported_pt_extensions))
        return sorted(names)

    def resolve_file(self, kind: str, name: str) -> Path:
        folders = self.get_folders(kind)
        for folder in folders:
            path = Path(os.path.abspath(folder / name))
            if not path.is_relative_to(os.path.abspath(folder)):
                raise ValueError(f"The file name {name!r} leads out of {folder}.")
            if path.is_file():
                return path
        raise FileNotFoundError(f"No file {name!r} in {', '.join(str(folder) for folder in folders)}.")

    def get_device(self) -> torch.device:
        import comfy.model_management

        return comfy.model_management.get_torch_device()

    def get_intermediate_device(self) -> torch.device:
        import comfy.model_management

        return comfy.model_management.intermediate_device()

    @contextmanager
    def on_device(self, module: nn.Module, owner: object, cells: int = 0, offload: str = "none") -> Iterator[None]:
        import comfy.model_management

        from ..kolors.offload import get_device_bytes, is_streamed, place

        device, needed = self.get_device(), cells * module.dtype.itemsize * BYTES_PER_CELL_BYTE
        if is_streamed(device, offload):
            comfy.model_management.free_memory(needed + get_device_bytes(module, offload), device)
            with place(module, device, offload):
                with stop_between_blocks(module, comfy.model_management.throw_exception_if_processing_interrupted):
                    yield
            return
        patcher = _patchers.get(owner)
        if patcher is None or patcher.model[0] is not module:
            patcher = _patchers[owner] = build_patcher(module)
        # The host makes room, and moves the module off again when something else needs the room. In full: it can
        # stream only its own layer classes part by part.
        comfy.model_management.load_models_gpu([patcher], memory_required=needed, force_full_load=True)
        module.to(device)  # a model with a LoRA shares weights that may have left with its base
        with stop_between_blocks(module, comfy.model_management.throw_exception_if_processing_interrupted):
            yield

    def report_step(self, step: int, total: int, latents: torch.Tensor | None = None) -> None:
        import comfy.model_management
        import comfy.utils

        # ProgressBar checks for interruption too, but newer hosts skip updates that follow each other closely.
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._progress_bar is None:
            self._progress_bar = comfy.utils.ProgressBar(total)
        if self._previewer is None and latents is not None:
            self._previewer = build_previewer(latents.device)
        preview = self._previewer.decode_latent_to_preview_image("JPEG", latents) if self._previewer else None
        self._progress_bar.update_absolute(step, total, preview)

    def load_vae(self, path: Path) -> Any:
        return load_comfy_vae(path)

    def get_input_folder(self) -> Path:
        import folder_paths

        return Path(folder_paths.get_input_directory())

    def get_output_folder(self) -> Path:
        import folder_paths

        return Path(folder_paths.get_output_directory())

    def make_room(self, size: int) -> None:
        import comfy.model_management

        comfy.model_management.free_memory(size, self.get_device())

    def report_work(self, done: int, total: int, text: str, picture: Image | None = None) -> None:
        import comfy.model_management
        import comfy.utils

        comfy.model_management.throw_exception_if_processing_interrupted()
        if text == self._line and picture is None:
            return
        self._line = text
        if self._progress_bar is None:
            self._progress_bar = comfy.utils.ProgressBar(total)
            self._work_start = time.monotonic()
        preview = None if picture is None else ("JPEG", picture, 512)
        self._progress_bar.update_absolute(done, total, preview)
        if time.monotonic() - self._work_start > SECONDS_BEFORE_TEXT:
            send_text(text)


# The host's handle on each model that a node has run, as long as the model lives. Models are told apart by identity.
_patchers: WeakKeyDictionary[object, Any] = WeakKeyDictionary()


@contextmanager
def stop_between_blocks(module: nn.Module, raise_if_interrupted: Callable[[], None]) -> Iterator[None]:
    """Lets a forward pass end between two blocks while the context lasts."""
    hooks = add_stop_hooks(module, raise_if_interrupted)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def add_stop_hooks(module: nn.Module, raise_if_interrupted: Callable[[], None]) -> list[RemovableHandle]:
    """Lets a forward pass end between two blocks: one of a large model on the CPU takes minutes.

    Training is left to end after a step, with its checkpoint.
    """
    import torch

    def stop(*_: Any) -> None:
        if not torch.is_grad_enabled():
            raise_if_interrupted()

    blocks = [block for part in module.modules() if isinstance(part, torch.nn.ModuleList) for block in part]
    return [block.register_forward_pre_hook(stop) for block in blocks]


def build_patcher(module: nn.Module) -> Any:
    """Makes the handle by which ComfyUI counts, loads and evicts a module."""
    import comfy.model_management
    import comfy.model_patcher
    from torch import nn

    # Wrapped: the host writes the attribute ``device``, which diffusers' and our models only let read. The wrapper
    # has the module's name, because the host's log says which class it loads.
    wrapper = type(type(module).__name__, (nn.Sequential,), {})
    return comfy.model_patcher.ModelPatcher(
        wrapper(module),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def send_text(text: str) -> None:
    """Shows a line on the running node, where a browser is connected."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context and server:
        server.send_progress_text(text, context.node_id)


def build_previewer(device: torch.device) -> Any:
    """Makes what turns latents into previews, as chosen by ``--preview-method``; None for none."""
    import comfy.latent_formats
    import latent_preview

    return latent_preview.get_previewer(device, comfy.latent_formats.SDXL())


def load_comfy_vae(path: Path) -> Any:
    """Loads a VAE as ComfyUI's own VAE object, which a wish to stop ends between two blocks.

    Raises:
        CheckpointError: nothing there, a damaged file, or no VAE of SDXL's kind.
    """
    import comfy.model_management
    import comfy.sd

    from ..kolors.vae import SDXL_VAE_CONFIG, load_vae

    autoencoder = load_vae(path).autoencoder
    if tuple(autoencoder.config.block_out_channels) == SDXL_VAE_CONFIG["block_out_channels"]:
        vae = comfy.sd.VAE(sd=dict(autoencoder.state_dict()))
    else:
        vae = build_small_comfy_vae(autoencoder)
    add_stop_hooks(vae.first_stage_model, comfy.model_management.throw_exception_if_processing_interrupted)
    return vae


def build_small_comfy_vae(autoencoder: AutoencoderKL) -> Any:
    """Makes ComfyUI's VAE object of a VAE that is smaller than SDXL's.

    The host builds every VAE with SDXL's widths and 32 groups per norm. So the object is built around a small
    stand-in network, which is then replaced by diffusers' network.
    """
    import comfy.ldm.models.autoencoder
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd

    from ..kolors.vae import PlainAutoencoder

    sizes = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
    sizes |= {"ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"ddconfig": sizes, "embed_dim": 4}
    stand_in = comfy.ldm.models.autoencoder.AutoencoderKL(**params).state_dict()
    vae = comfy.sd.VAE(sd=stand_in, config={"params": params})
    vae.first_stage_model = PlainAutoencoder(autoencoder).to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae


def get_host() -> Host:
    """Gives the host of the running graph: a headless Runner if one runs it, else ComfyUI, else local folders."""
    runner = find_runner()
    if runner is None and "folder_paths" in sys.modules:
        report_rivals()
        return ComfyHost()
    from ..headless.host import HeadlessHost

    return RunnerHost(runner or HeadlessHost())


@cache
def report_rivals() -> None:
    """Logs once, when all packs have loaded, which other pack has nodes of the same ids, and whose are used."""
    import nodes

    from .. import NODE_CLASS_MAPPINGS as ours

    for folder in nodes.LOADED_MODULE_DIRS.values():
        pack = sys.modules.get(folder.replace(".", "_x_"))
        theirs = getattr(pack, "NODE_CLASS_MAPPINGS", None) or {}
        shared = sorted(name for name in ours if name in theirs and theirs[name] is not ours[name])
        if shared:
            is_ours = nodes.NODE_CLASS_MAPPINGS.get(shared[0]) is ours[shared[0]]
            winner = "Kolors Nodes" if is_ours else os.path.basename(folder)
            logger.warning(
                "Kolors Nodes and %s both have the nodes %s; those of %s are used. Disable one of the packs: their "
                "models do not fit each other's nodes.", os.path.basename(folder), ", ".join(shared), winner,
            )  # fmt: skip


def find_runner() -> HeadlessHost | None:
    """Finds the headless host that runs now. One that runs has been imported, so ComfyUI never loads the runner.

    The runner may be the installed ``kolors_nodes`` while these nodes were loaded from a folder, under its path.
    """
    for package in (__package__.rpartition(".")[0], "kolors_nodes"):
        module = sys.modules.get(f"{package}.headless.host")
        if module and (runner := module.get_running_host()):
            return runner
    return None
