"""Reading workflow files, and their conversion into prompts by the rules of ComfyUI's frontend."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless import Runner, WorkflowError, load_workflow, to_prompt

EXAMPLES = Path(__file__).parents[2] / "example_workflows"
NOW = datetime(2024, 3, 7, 9, 5, 2)


def node(id_, type_, values=None, inputs=(), outputs=("INT",), mode=0, **more):
    """A node as the UI saves it; `inputs` are (name, type, link) or (name, type, link, is a widget)."""
    slots = [
        {"name": name, "type": kind, "link": link, **({"widget": {"name": name}} if rest else {})}
        for name, kind, link, *rest in inputs
    ]
    saved = {"id": id_, "type": type_, "mode": mode, "inputs": slots, "properties": {}, **more}
    saved["outputs"] = [{"name": kind, "type": kind, "links": []} for kind in outputs]
    if values is not None:
        saved["widgets_values"] = values
    return saved


def workflow(nodes, links=(), **more):
    """A UI workflow; `links` are (id, origin, origin output, target)."""
    rows = [[id_, origin, slot, target, 0, "*"] for id_, origin, slot, target in links]
    return {"nodes": nodes, "links": rows, "version": 0.4, **more}


def convert(stubs, nodes, links=(), **more):
    return to_prompt(workflow(nodes, links), stubs, now=NOW, **more)


MODEL = node(1, "Model", ["small", True], outputs=("MODEL",))
SAMPLER_INPUTS = [("model", "MODEL", 1)]
MODEL_LINK = (1, 1, 0, 2)


def sampler_inputs(stubs, values, inputs=SAMPLER_INPUTS, extra_nodes=(), links=()):
    prompt = convert(stubs, [MODEL, node(2, "Sampler", values, inputs), *extra_nodes], [MODEL_LINK, *links])
    return prompt["2"]["inputs"]


def test_widgets_are_read_by_position_and_skip_the_control_value_of_the_seed(stubs):
    inputs = sampler_inputs(stubs, [512, 42, "randomize", 4.5, "DPM", "cpu"])
    assert inputs == {
        "model": ["1", 0], "width": 512, "seed": 42, "cfg": 4.5, "scheduler": "DPM", "noise_device": "cpu"
    }  # fmt: skip


def test_missing_widget_values_keep_the_defaults_of_the_class(stubs):
    assert sampler_inputs(stubs, [512])["cfg"] == 5.0
    inputs = sampler_inputs(stubs, None)
    assert (inputs["width"], inputs["scheduler"], inputs["noise_device"]) == (1024, "Euler", "gpu")


def test_widget_values_may_be_a_dictionary(stubs):
    inputs = sampler_inputs(stubs, {"cfg": 2.0, "seed": 3})
    assert (inputs["cfg"], inputs["seed"], inputs["width"]) == (2.0, 3, 1024)


def test_control_after_generate_follows_any_input_that_asks_for_it(stubs):
    values = ["b.png", "y", "fixed", "filter", "hello", "q", "some"]
    prompt = convert(stubs, [node(1, "Options", values, [("forced", "INT", None)])])
    assert prompt["1"]["inputs"] == {"image": "b.png", "mode": "y", "text": "hello", "choice": "q", "items": "some"}


def test_the_upload_button_of_load_image_takes_a_value(stubs):
    values = ["picture.png", "image"]
    prompt = convert(stubs, [node(1, "LoadImage", values)])
    assert prompt["1"]["inputs"] == {"image": "picture.png"}


def test_files_from_before_frontend_1_16_hold_a_value_for_forced_sockets(stubs):
    prompt = convert(stubs, [node(1, "Add", [99, 5], [("a", "INT", None)])])
    assert prompt["1"]["inputs"] == {"b": 5}


def test_a_linked_widget_still_takes_its_place_and_the_link_wins(stubs):
    inputs = sampler_inputs(
        stubs,
        [512, 42, "fixed", 4.5, "DPM"],
        [*SAMPLER_INPUTS, ("width", "INT", 7, True)],
        [node(3, "Number", [64])],
        [(7, 3, 0, 2)],
    )
    assert inputs["width"] == ["3", 0]
    assert (inputs["seed"], inputs["cfg"]) == (42, 4.5)


def test_list_values_are_wrapped_so_that_they_are_no_links(stubs):
    prompt = convert(stubs, [node(1, "Options", ["a.png", "x", "fixed", "", ["1", 0]])])
    assert prompt["1"]["inputs"]["text"] == {"__value__": ["1", 0]}


def test_both_link_formats_give_the_same_prompt(stubs):
    nodes = [MODEL, node(2, "Sampler", [512], SAMPLER_INPUTS)]
    new = workflow(nodes)
    new["version"] = 1
    new["links"] = [{"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}]
    assert to_prompt(new, stubs) == convert(stubs, nodes, [MODEL_LINK])


def test_nodes_come_after_what_they_depend_on(stubs):
    nodes = [node(2, "Show", None, [("value", "INT", 9)]), node(5, "Number", [3])]
    assert list(convert(stubs, nodes, [(9, 5, 0, 2)])) == ["5", "2"]


def test_titles_are_kept_for_messages(stubs):
    prompt = convert(stubs, [node(1, "Number", [1], title="How many"), node(2, "EmptyLatentImage")])
    assert prompt["1"]["_meta"] == {"title": "How many"}
    assert prompt["2"]["_meta"] == {"title": "Empty Latent Image"}


def test_notes_and_muted_nodes_are_left_out(stubs):
    nodes = [node(1, "Note", ["text"]), node(2, "MarkdownNote", ["text"]), node(3, "Number", [1], mode=2)]
    assert convert(stubs, nodes) == {}


def test_a_link_to_a_muted_node_takes_the_widget_value_away_too(stubs):
    nodes = [
        node(1, "Number", [1]),
        node(2, "Number", [2], mode=2),
        node(3, "Add", [5], [("a", "INT", 1), ("b", "INT", 2, True)]),
    ]
    assert convert(stubs, nodes, [(1, 1, 0, 3), (2, 2, 0, 3)])["3"]["inputs"] == {"a": ["1", 0]}


def test_a_bypassed_node_passes_on_the_input_of_the_same_type(stubs):
    nodes = [
        MODEL,
        node(2, "Sampler", [512], [("model", "MODEL", 1), ("latent", "LATENT", 2)], outputs=("LATENT",), mode=4),
        node(3, "EmptyLatentImage", [64, 64, 1], outputs=("LATENT",)),
        node(4, "Show", None, [("value", "LATENT", 3)]),
    ]
    prompt = convert(stubs, nodes, [(1, 1, 0, 2), (2, 3, 0, 2), (3, 2, 0, 4)])
    assert prompt["4"]["inputs"] == {"value": ["3", 0]}
    assert "2" not in prompt


def test_a_bypassed_node_prefers_the_input_at_the_place_of_the_output(stubs):
    class TwoWay:
        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"x": ("INT", {"forceInput": True}), "y": ("INT", {"forceInput": True})}}

        RETURN_TYPES = ("INT", "INT")

    nodes = [
        node(1, "Number", [1]),
        node(2, "Number", [2]),
        node(3, "TwoWay", None, [("x", "INT", 1), ("y", "INT", 2)], outputs=("INT", "INT"), mode=4),
        node(4, "Add", [0], [("a", "INT", 3)]),
    ]
    links = [(1, 1, 0, 3), (2, 2, 0, 3), (3, 3, 1, 4)]
    assert convert({**stubs, "TwoWay": TwoWay}, nodes, links)["4"]["inputs"]["a"] == ["2", 0]


def test_a_bypassed_node_without_a_fitting_input_leaves_the_widget_value(stubs):
    nodes = [
        node(1, "Spread", [3], outputs=("INT", "INT"), mode=4),
        node(2, "Number", [8]),
        node(3, "Add", [5], [("a", "INT", 1), ("b", "INT", 2, True)]),
    ]
    # Spread's only input is its own widget, which nothing is linked to: nothing can pass through.
    prompt = convert(stubs, nodes, [(1, 2, 0, 3), (2, 1, 0, 3)])
    assert prompt["3"]["inputs"] == {"a": ["2", 0], "b": 5}


def test_bypassed_nodes_of_unknown_packs_use_the_saved_types(stubs):
    nodes = [
        MODEL,
        node(9, "SomeoneElsesLoader", ["x"], [("m", "MODEL", 1)], outputs=("MODEL",), mode=4),
        node(2, "Sampler", [512], [("model", "MODEL", 2)]),
    ]
    assert convert(stubs, nodes, [(1, 1, 0, 9), (2, 9, 0, 2)])["2"]["inputs"]["model"] == ["1", 0]


def test_reroutes_are_followed_through_each_other_and_bypassed_nodes(stubs):
    nodes = [
        MODEL,
        node(5, "Reroute", None, [("", "*", 1)], outputs=("*",)),
        node(6, "Reroute", None, [("", "*", 2)], outputs=("*",)),
        node(2, "Sampler", [512], [("model", "MODEL", 3)]),
    ]
    assert convert(stubs, nodes, [(1, 1, 0, 5), (2, 5, 0, 6), (3, 6, 0, 2)])["2"]["inputs"]["model"] == ["1", 0]


def test_an_unconnected_reroute_is_no_connection(stubs):
    nodes = [
        node(5, "Reroute", None, [("", "*", None)], outputs=("*",)),
        node(2, "Add", [3], [("a", "INT", None), ("b", "INT", 2, True)]),
    ]
    assert convert(stubs, nodes, [(2, 5, 0, 2)])["2"]["inputs"] == {"b": 3}


def test_a_primitive_puts_its_value_into_the_widgets_it_is_linked_to(stubs):
    nodes = [
        MODEL,
        node(2, "Sampler", [512, 1, "fixed"], [("model", "MODEL", 1), ("seed", "INT", 2, True)]),
        node(3, "PrimitiveNode", [77, "fixed"]),
    ]
    prompt = convert(stubs, nodes, [MODEL_LINK, (2, 3, 0, 2)])
    assert prompt["2"]["inputs"]["seed"] == 77
    assert set(prompt) == {"1", "2"}


def test_unknown_nodes_are_emitted_for_the_validation_to_name(stubs):
    prompt = convert(stubs, [node(1, "NeverHeardOf", [1], [("x", "INT", None)])])
    assert prompt == {"1": {"inputs": {}, "class_type": "NeverHeardOf", "_meta": {"title": "NeverHeardOf"}}}


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("%date:yyyy-MM-dd%/pic", "2024-03-07/pic"),
        ("%date:yy.M%", "%date:yy.M%"),  # one dot makes it the widget of a node, as in ComfyUI
        ("%date:yy.M.d%", "24"),  # and of more, it takes the part before the first
        ("%date:yyMd_hms%", "2437_952"),
        ("%date:hh-mm-ss%", "09-05-02"),
        ("%How many.value%_x", "3_x"),
        ("%Number.value%", "3"),
        ("%Model.name%", "a_b"),
        ("%Nobody.value% %width% 100%", "%Nobody.value% %width% 100%"),
    ],
)
def test_file_names_may_name_dates_and_widgets(stubs, prefix, expected):
    nodes = [
        node(1, "Number", [3], title="How many"),
        node(2, "Model", ["a/b", False]),
        node(3, "SaveImage", [prefix]),
        node(4, "Options", ["a.png", "x", "fixed", "", prefix]),
    ]
    prompt = convert(stubs, nodes)
    assert prompt["3"]["inputs"]["filename_prefix"] == expected
    assert prompt["4"]["inputs"]["text"] == prefix  # only what saves files gets this


def test_dynamic_prompts_are_resolved_the_same_way_every_time(stubs):
    text = "a {red|green|{blue|cyan}} thing // note\n/* long\nnote */ \\{kept\\}"
    results = set()
    for seed in range(20):
        one = convert(stubs, [node(1, "Options", ["a.png", "x", "fixed", "", text])], seed=seed)
        same = convert(stubs, [node(1, "Options", ["a.png", "x", "fixed", "", text])], seed=seed)
        assert one == same
        results.add(one["1"]["inputs"]["text"])
    assert results == {f"a {colour} thing \n {{kept}}" for colour in ("red", "green", "blue", "cyan")}


@pytest.mark.parametrize(
    ("nodes", "links", "words"),
    [
        ([node(2, "Add", [1], [("a", "INT", 7)])], [], ["Add (node 2)", "'a'", "link 7"]),
        ([node(2, "Add", [1], [("a", "INT", 7)])], [(7, 4, 0, 2)], ["Add (node 2)", "'a'", "node 4"]),
        (
            [
                node(5, "Reroute", None, [("", "*", 1)]),
                node(6, "Reroute", None, [("", "*", 2)]),
                node(2, "Add", [1], [("a", "INT", 3)]),
            ],
            [(1, 6, 0, 5), (2, 5, 0, 6), (3, 6, 0, 2)],
            ["circle"],
        ),
        ([node(2, "workflow>My group", [])], [], ["Node 2", "group node 'My group'"]),
        ([{"id": 3}], [], ["no `type`"]),
        ([node(2, "bb0a0a8d-1a2b-4c3d-8e9f-001122334455", title="Fine")], [], ["Node 2", "subgraph 'Fine'"]),
        ([node(2, "ab0a0a8d-1a2b-4c3d-8e9f-001122334455")], [], ["node 2:5", "'Fine details'", "contains itself"]),
    ],
)
def test_what_cannot_be_converted_is_told_with_its_node(stubs, nodes, links, words):
    subgraph = {"id": "ab0a0a8d-1a2b-4c3d-8e9f-001122334455", "name": "Fine details", "links": []}
    subgraph["nodes"] = [node(5, subgraph["id"], title="Fine details")]
    with pytest.raises(WorkflowError) as caught:
        to_prompt(workflow(nodes, links, definitions={"subgraphs": [subgraph]}), stubs)
    for word in words:
        assert word in str(caught.value)


def test_an_api_prompt_comes_back_as_a_copy(stubs):
    prompt = {"1": {"class_type": "Number", "inputs": {"value": 3}}}
    converted = to_prompt(prompt, stubs)
    assert converted == prompt
    converted["1"]["inputs"]["value"] = 4
    assert prompt["1"]["inputs"]["value"] == 3


def test_a_png_is_read_like_its_workflow(tmp_path):
    saved = workflow([node(1, "Number", [1])])
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps({"1": {"class_type": "Number", "inputs": {}}}))
    chunks.add_text("workflow", json.dumps(saved))
    Image.new("RGB", (4, 4)).save(tmp_path / "both.png", pnginfo=chunks)
    assert load_workflow(tmp_path / "both.png") == saved

    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps({"1": {"class_type": "Number", "inputs": {}}}))
    Image.new("RGB", (4, 4)).save(tmp_path / "prompt.png", pnginfo=chunks)
    assert load_workflow(tmp_path / "prompt.png") == {"1": {"class_type": "Number", "inputs": {}}}


def test_unreadable_files_are_told_with_their_path(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "bare.png").read_bytes()[:30])
    (tmp_path / "broken.json").write_text('{"nodes": [')
    (tmp_path / "other.json").write_text('{"name": "kolors"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01\x80")
    expected = {
        "bare.png": "carries no workflow",
        "cut.png": "damaged PNG",
        "broken.json": "not valid JSON (line 1, column 12",
        "other.json": "not a ComfyUI workflow",
        "list.json": "not a ComfyUI workflow",
        "binary.json": "neither JSON text nor a PNG",
        "absent.json": "cannot be read",
    }
    for name, text in expected.items():
        with pytest.raises(WorkflowError) as caught:
            load_workflow(tmp_path / name)
        assert text in str(caught.value)
        assert name in str(caught.value)


def test_the_tutorial_workflow_converts_as_comfyui_does(reference):
    prompt = to_prompt(load_workflow(reference / "seed" / "kolors_text_to_image.json"), NODE_CLASS_MAPPINGS)
    assert sorted(prompt, key=int) == ["3", "6", "10", "11", "12", "13", "14"]
    sampler = prompt["14"]["inputs"]
    seen = {name: sampler[name] for name in ("width", "height", "seed", "steps", "cfg", "scheduler")}
    assert seen == {
        "width": 1024, "height": 1024, "seed": 1000102404233412, "steps": 25, "cfg": 5,
        "scheduler": "EulerDiscreteScheduler",
    }  # fmt: skip
    assert (sampler["kolors_model"], sampler["kolors_embeds"]) == (["6", 0], ["12", 0])
    assert prompt["10"]["inputs"] == {"samples": ["14", 0], "vae": ["11", 0]}
    assert prompt["11"]["inputs"] == {"vae_name": "sdxl.vae.safetensors"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_the_example_workflows_use_only_nodes_that_this_pack_and_the_runner_have(path):
    prompt = to_prompt(load_workflow(path), NODE_CLASS_MAPPINGS)
    assert {node["class_type"] for node in prompt.values()} <= set(Runner(NODE_CLASS_MAPPINGS).nodes)
