"""Node packs: folders and files of node classes, loaded as ComfyUI loads its custom nodes."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

HOST_MODULES = frozenset(
    "comfy comfy_api comfy_api_nodes comfy_config comfy_execution comfy_extras execution folder_paths "
    "latent_preview node_helpers nodes server".split()
)


class PackError(ValueError):
    """A node pack that cannot be loaded."""


class HostImportError(ModuleNotFoundError):
    """A pack asks for a module of ComfyUI, which is not here."""


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
        with explain_host_imports():
            spec.loader.exec_module(module)
    except Exception as error:  # a pack may raise anything while it is imported
        del sys.modules[name]
        raise PackError(f"{path}: {_describe_import_error(error)}") from error
    mappings = getattr(module, "NODE_CLASS_MAPPINGS", None)
    if not isinstance(mappings, dict) or not mappings:
        if hasattr(module, "comfy_entrypoint"):
            raise PackError(
                f"{path}: its nodes are written for ComfyUI's V3 API (comfy_entrypoint), which this runner does not "
                "support. It takes packs with NODE_CLASS_MAPPINGS."
            )
        raise PackError(f"{path}: defines no NODE_CLASS_MAPPINGS, so it holds no nodes.")
    return mappings


def _describe_import_error(error: Exception) -> str:
    if isinstance(error, HostImportError):
        return f"this pack needs ComfyUI itself, so it cannot run here. {error}"
    if isinstance(error, ModuleNotFoundError):
        return f"importing it failed: {error}. Install what it needs (see its requirements.txt)."
    return f"importing it failed with {type(error).__name__}: {error}"


@contextlib.contextmanager
def explain_host_imports() -> Iterator[None]:
    """Makes imports of ComfyUI's modules, where there are none, say inside the block what is called of them."""
    finder = _HostModuleFinder()
    sys.meta_path.append(finder)  # last: a module of such a name that is there is found before
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _HostModuleFinder:
    """The last finder of modules: what gets here is not there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if path is not None or fullname.split(".")[0] not in HOST_MODULES:
            return None
        frame = _find_importer()
        where, calls = "", []
        if frame is not None:
            where = f" ({frame.f_code.co_filename}, line {frame.f_lineno})"
            calls = find_uses(Path(frame.f_code.co_filename), fullname)
        asked = ", ".join(calls) if calls else fullname
        raise HostImportError(f"It asks for {asked} of ComfyUI{where}, which this runner does not have.", name=fullname)


def _find_importer() -> FrameType | None:
    """Returns the frame that imports, past those of the import system and this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(("<frozen", __file__)):
        frame = frame.f_back
    return frame


def find_uses(source: Path, module: str) -> list[str]:
    """Returns what a Python file uses of a module, as dotted names, in the order of the file."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    names: dict[str, str] = {}
    uses: dict[str, None] = {}
    root = module.split(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == root:
                    names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == root and not node.level:
            uses.update(dict.fromkeys(f"{node.module}.{alias.name}" for alias in node.names))
    parts_of_longer = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in parts_of_longer:
            first, _, rest = ast.unparse(node).partition(".")
            if first in names and rest.replace(".", "_").isidentifier():
                uses[f"{names[first]}.{rest}"] = None
    return list(uses)
