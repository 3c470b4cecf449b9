"""Node packs: folders and files of node classes, loaded as ComfyUI loads its custom nodes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


class PackError(ValueError):
    """A node pack that cannot be loaded."""


def load_pack(path: str | Path) -> dict[str, type]:
    """Imports a pack and returns its ``NODE_CLASS_MAPPINGS``.

    Args:
        path: a ``.py`` file, or a folder with an ``__init__.py``. The pack must not need ComfyUI itself.

    Raises:
        PackError: nothing there, the import fails, or it defines no nodes.
    """
    path = Path(path).absolute()
    source = path / "__init__.py" if path.is_dir() else path
    if not source.is_file() or source.suffix != ".py":
        raise PackError(f"{path}: no node pack. Give a .py file, or a folder with an __init__.py.")
    # Like ComfyUI, the path is the module's name: relative imports work, and no other module is hidden.
    name = str(path if path.is_dir() else path.with_suffix("")).replace(".", "_x_")
    locations = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=locations)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a pack may raise anything while it is imported
        del sys.modules[name]
        raise PackError(f"{path}: {_describe_import_error(error)}") from error
    mappings = getattr(module, "NODE_CLASS_MAPPINGS", None)
    if not isinstance(mappings, dict) or not mappings:
        raise PackError(f"{path}: defines no NODE_CLASS_MAPPINGS, so it holds no nodes.")
    return mappings


def _describe_import_error(error: Exception) -> str:
    hosts = ("comfy", "comfy_execution", "comfy_api", "folder_paths", "nodes", "server", "execution")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in hosts:
        return f"this pack needs ComfyUI itself (it imports {error.name}), so it cannot run here."
    if isinstance(error, ModuleNotFoundError):
        return f"importing it failed: {error}. Install what it needs (see its requirements.txt)."
    return f"importing it failed with {type(error).__name__}: {error}"
