"""What ComfyUI and saved workflows rely on, checked over every registered node class."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest

import kolors_nodes
from kolors_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from kolors_nodes.headless.host import HeadlessHost

SURFACE = Path(__file__).parent / "node_surface.json"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN"}
nodes = pytest.mark.parametrize(("name", "node"), NODE_CLASS_MAPPINGS.items(), ids=list(NODE_CLASS_MAPPINGS))


def get_inputs(node) -> dict[str, tuple]:
    """Name → (type or choices, options, is optional), in widget order."""
    declared = node.INPUT_TYPES()
    assert set(declared) <= {"required", "optional", "hidden"}
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in declared.get(group, {}).items():
            found[name] = (kind, options[0] if options else {}, group == "optional")
    return found


@nodes
def test_inputs_are_the_method_s_parameters(name, node):
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    inputs = get_inputs(node)
    assert list(inputs) == [name for name in parameters if name != "self"]
    for input_name, (_, options, is_optional) in inputs.items():
        default = parameters[input_name].default
        assert (default is not inspect.Parameter.empty) == is_optional, input_name
        if is_optional and "default" in options:
            assert default == options["default"], input_name


@nodes
def test_outputs_agree_in_number(name, node):
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS) > 0


@nodes
def test_everything_is_explained(name, node):
    assert node.DESCRIPTION
    assert node.CATEGORY
    assert node.__doc__
    assert NODE_DISPLAY_NAME_MAPPINGS[name]
    for input_name, (kind, options, _) in get_inputs(node).items():
        assert options.get("tooltip"), input_name
        if kind in ("INT", "FLOAT"):
            assert {"default", "min", "max"} <= set(options), input_name
            assert options["min"] <= options["default"] <= options["max"]
        if isinstance(kind, list) and "default" in options:
            assert options["default"] in kind, input_name


@pytest.mark.parametrize(
    "name", [name for name, node in NODE_CLASS_MAPPINGS.items() if hasattr(node, "VALIDATE_INPUTS")]
)
def test_validation_takes_declared_inputs_and_defaults(name):
    """The host leaves absent optional inputs out and calls with what is declared; anything else is an exception."""
    node = NODE_CLASS_MAPPINGS[name]
    parameters = inspect.signature(node.VALIDATE_INPUTS).parameters
    inputs = get_inputs(node)
    for input_name, parameter in parameters.items():
        assert input_name in inputs
        assert inputs[input_name][2] == (parameter.default is not inspect.Parameter.empty)


def test_descriptions_are_json():
    json.dumps([node.INPUT_TYPES() for node in NODE_CLASS_MAPPINGS.values()])


def get_surface() -> dict:
    """Ids, inputs in widget order with types, ranges and defaults, outputs: what old workflows depend on."""
    surface = {}
    for name, node in NODE_CLASS_MAPPINGS.items():
        inputs = []
        for input_name, (kind, options, is_optional) in get_inputs(node).items():
            limits = {key: options[key] for key in ("default", "min", "max", "step") if key in options}
            inputs.append([input_name, kind, limits, "optional" if is_optional else "required"])
        surface[name] = {"inputs": inputs, "returns": list(zip(node.RETURN_TYPES, node.RETURN_NAMES, strict=True))}
    return json.loads(json.dumps(surface))


def test_the_surface_changes_only_on_purpose(monkeypatch, tmp_path):
    """To change it on purpose: ``python tests/nodes/test_contract.py`` writes the snapshot anew."""
    monkeypatch.chdir(tmp_path)  # no model folders, so that choice lists hold no local file
    assert get_surface() == json.loads(SURFACE.read_text(encoding="utf-8"))


# Source: nodes.py of kijai/ComfyUI-KwaiKolorsWrapper and the tutorial's workflow; inputs by position, as saved
# workflows store them.
EXISTING = {
    "DownloadAndLoadKolorsModel": (["model", "precision"], ["KOLORSMODEL"]),
    "DownloadAndLoadChatGLM3": (["precision"], ["CHATGLM3MODEL"]),
    "LoadChatGLM3": (["chatglm3_checkpoint"], ["CHATGLM3MODEL"]),
    "KolorsTextEncode": (
        ["chatglm3_model", "prompt", "negative_prompt", "num_images_per_prompt"],
        ["KOLORS_EMBEDS"],
    ),
    "KolorsSampler": (
        ["kolors_model", "kolors_embeds", "width", "height", "seed", "steps", "cfg", "scheduler", "latent",
         "denoise_strength"],
        ["LATENT"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXISTING)
def test_existing_inputs_come_first_and_additions_are_optional(name):
    expected, returns = EXISTING[name]
    inputs = get_inputs(NODE_CLASS_MAPPINGS[name])
    assert list(inputs)[: len(expected)] == expected
    assert all(inputs[added][2] for added in list(inputs)[len(expected) :])
    assert list(NODE_CLASS_MAPPINGS[name].RETURN_TYPES) == returns


def test_existing_choices_come_first():
    sampler = get_inputs(NODE_CLASS_MAPPINGS["KolorsSampler"])
    assert sampler["scheduler"][0][:6] == [
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverMultistepScheduler_SDE_karras", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    ]  # fmt: skip
    assert get_inputs(NODE_CLASS_MAPPINGS["DownloadAndLoadKolorsModel"])["model"][0][0] == "Kwai-Kolors/Kolors"
    precisions = get_inputs(NODE_CLASS_MAPPINGS["DownloadAndLoadChatGLM3"])["precision"][0]
    assert precisions[:3] == ["fp16", "quant4", "quant8"]


def test_the_mappings_are_a_literal_that_a_scanner_finds():
    """ComfyUI-Manager's scanner reads ``NODE_CLASS_MAPPINGS = {...}`` with a regular expression."""
    import re

    source = (Path(kolors_nodes.__file__)).read_text(encoding="utf-8")
    literal = re.search(r"NODE_CLASS_MAPPINGS\s*=\s*{([^}]*)}", source)
    assert literal
    assert set(re.findall(r'"([^"]+)"\s*:', literal[1])) == set(NODE_CLASS_MAPPINGS)


def test_the_headless_host_is_what_nodes_get_without_comfyui():
    from kolors_nodes.nodes.host import RunnerHost, get_host

    assert isinstance(get_host(), RunnerHost)
    assert get_host().get_folders("vae") == HeadlessHost().get_folders("vae")


def test_nodes_loaded_from_a_folder_find_the_installed_runner(tmp_path):
    """As with ``kolors run --nodes FOLDER``: the pack's own copy of the runner runs nothing, the installed one does."""
    from kolors_nodes.headless.host import use_host
    from kolors_nodes.headless.packs import load_pack

    classes = load_pack(Path(kolors_nodes.__file__).parent)
    host_module = sys.modules[classes["KolorsSampler"].__module__.rpartition(".")[0] + ".host"]
    assert host_module.__name__ != "kolors_nodes.nodes.host"
    with use_host(HeadlessHost(models_dir=tmp_path)):
        assert host_module.get_host().get_folders("vae") == [tmp_path / "vae"]


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(get_surface(), indent=1) + "\n", encoding="utf-8")
