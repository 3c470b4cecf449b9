"""Validation: ComfyUI's error types, their conditions and structure, and the casts."""

from __future__ import annotations

import copy

import pytest

from kolors_nodes.headless.graph import Graph
from kolors_nodes.headless.stand_ins import with_stand_ins
from kolors_nodes.headless.validation import is_type_match, validate_prompt

NUMBER = {"class_type": "Number", "inputs": {"value": 3}}
SHOW = {"class_type": "Show", "inputs": {"value": ["1", 0]}}


def validate(stubs, prompt, outputs=None):
    graph = Graph(copy.deepcopy(prompt), with_stand_ins(stubs))
    return validate_prompt(graph, outputs), graph.prompt


def sampler(**inputs):
    """A graph whose sampler (node 2) has one thing wrong."""
    good = {"model": ["1", 0], "width": 512, "seed": 1, "cfg": 5.0, "scheduler": "Euler"}
    return {
        "1": {"class_type": "Model", "inputs": {"name": "small", "precise": True}},
        "2": {"class_type": "Sampler", "inputs": {**good, **inputs}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
    }


def test_a_sound_prompt_has_no_errors(stubs):
    found, _ = validate(stubs, sampler())
    assert (found.targets, found.error, found.node_errors) == (("3",), None, {})


@pytest.mark.parametrize(
    ("inputs", "type_", "message", "details", "extra"),
    [
        ({"width": 32}, "value_smaller_than_min", "Value 32 smaller than min of 64", "width", {"received_value": 32}),
        ({"cfg": 20.5}, "value_bigger_than_max", "Value 20.5 bigger than max of 20.0", "cfg",
         {"received_value": 20.5}),
        ({"scheduler": "LMS"}, "value_not_in_list", "Value not in list",
         "scheduler: 'LMS' not in ['Euler', 'DPM']", {"received_value": "LMS"}),
        ({"width": "wide"}, "invalid_input_type", "Failed to convert an input value to a INT value",
         "width, wide, invalid literal for int() with base 10: 'wide'", {"received_value": "wide"}),
        ({"width": None}, "invalid_input_type", "Failed to convert an input value to a INT value",
         "width, None, int() argument must be", {"received_value": None}),
        ({"model": ["1", 0, 0]}, "bad_linked_input",
         "Bad linked input, must be a length-2 list of [node_id, slot_index]", "model",
         {"received_value": ["1", 0, 0]}),
        ({"latent": ["1", 0]}, "return_type_mismatch", "Return type mismatch between linked nodes",
         "latent, received_type(MODEL) mismatch input_type(LATENT)", {"linked_node": ["1", 0]}),
    ],
)  # fmt: skip
def test_faulty_inputs(stubs, inputs, type_, message, details, extra):
    found, _ = validate(stubs, sampler(**inputs))
    assert found.targets == ()
    assert found.error["type"] == "prompt_outputs_failed_validation"
    entry = found.node_errors["2"]
    assert (entry["class_type"], entry["dependent_outputs"], len(entry["errors"])) == ("Sampler", ["3"], 1)
    error = entry["errors"][0]
    assert (error["type"], error["message"]) == (type_, message)
    assert error["details"].startswith(details)
    name = next(iter(inputs))
    assert error["extra_info"].items() >= {"input_name": name, **extra}.items()
    assert "input_config" in error["extra_info"]
    assert "3" not in found.node_errors  # only those at fault themselves


def test_a_missing_required_input_is_an_error_and_a_missing_optional_one_is_not(stubs):
    prompt = sampler()
    del prompt["2"]["inputs"]["model"]
    found, _ = validate(stubs, prompt)
    assert found.node_errors["2"]["errors"] == [
        {
            "type": "required_input_missing",
            "message": "Required input is missing",
            "details": "model",
            "extra_info": {"input_name": "model"},
        }
    ]


def test_all_faults_of_a_node_are_reported_together(stubs):
    found, _ = validate(stubs, sampler(width=1, cfg=99, scheduler="LMS"))
    types = [error["type"] for error in found.node_errors["2"]["errors"]]
    assert sorted(types) == ["value_bigger_than_max", "value_not_in_list", "value_smaller_than_min"]


def test_long_lists_are_not_quoted(stubs):
    class Many:
        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"name": ([str(index) for index in range(21)],)}}

        RETURN_TYPES = ("INT",)
        OUTPUT_NODE = True

    found, _ = validate({**stubs, "Many": Many}, {"1": {"class_type": "Many", "inputs": {"name": "x"}}})
    error = found.node_errors["1"]["errors"][0]
    assert error["details"] == "name: 'x' not in (list of length 21)"
    assert error["extra_info"]["input_config"] is None


def test_constants_are_cast_in_the_prompt(stubs):
    prompt = sampler(width="512", seed=2.7, cfg="3")
    prompt["1"]["inputs"]["precise"] = "false"
    prompt["4"] = {"class_type": "Fail", "inputs": {"value": ["5", 0], "text": None}}
    prompt["5"] = {"class_type": "Number", "inputs": {"value": {"__value__": 3}}}
    prompt["6"] = {"class_type": "Show", "inputs": {"value": ["4", 0]}}
    found, cast = validate(stubs, prompt)
    assert found.error is None
    assert cast["2"]["inputs"].items() >= {"width": 512, "seed": 2, "cfg": 3.0}.items()
    assert cast["1"]["inputs"]["precise"] is True  # bool("false"), as in ComfyUI
    assert cast["4"]["inputs"]["text"] == "None"
    assert cast["5"]["inputs"]["value"] == 3


@pytest.mark.parametrize(
    ("prompt", "type_", "message", "details"),
    [
        ({"1": {"class_type": "Ghost", "inputs": {}}}, "invalid_prompt",
         "Cannot execute because node Ghost does not exist.", "Node ID '#1'"),
        ({"1": SHOW | {"class_type": "Show"}, "2": {"inputs": {}}}, "invalid_prompt",
         "Cannot execute because a node is missing the class_type property.", "Node ID '#2'"),
        ({"1": NUMBER}, "prompt_no_outputs", "Prompt has no outputs", ""),
    ],
)  # fmt: skip
def test_prompts_refused_as_a_whole(stubs, prompt, type_, message, details):
    found, _ = validate(stubs, prompt)
    expected = {"type": type_, "message": message, "details": details, "extra_info": {}}
    assert (found.targets, found.error, found.node_errors) == ((), expected, {})


def test_asked_for_nodes_need_not_be_outputs_but_must_exist(stubs):
    assert validate(stubs, {"1": NUMBER}, ["1"])[0].targets == ("1",)
    error = validate(stubs, {"1": NUMBER}, ["1", "9"])[0].error
    assert (error["type"], error["details"]) == ("prompt_no_outputs", "not in the prompt: 9")


def test_a_link_to_a_missing_node_is_an_exception_at_the_output_itself(stubs):
    found, _ = validate(stubs, {"2": {"class_type": "Show", "inputs": {"value": ["99", 0]}}})
    error = found.node_errors["2"]["errors"][0]
    assert (error["type"], error["details"]) == ("exception_during_validation", "'99'")
    assert error["extra_info"]["exception_type"] == "KeyError"
    assert found.error["details"] == "Exception when validating node: '99'"


def test_a_link_to_a_missing_node_further_up_is_an_inner_exception(stubs):
    prompt = {
        "1": {"class_type": "Add", "inputs": {"a": ["99", 0]}},
        "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
    }
    found, _ = validate(stubs, prompt)
    assert list(found.node_errors) == ["1"]
    error = found.node_errors["1"]["errors"][0]
    assert (error["type"], error["details"]) == ("exception_during_inner_validation", "'99'")
    assert error["extra_info"].items() >= {"input_name": "value", "linked_node": ["1", 0]}.items()


@pytest.mark.parametrize("link", [["1", 5], [1, 0], ["1", "x"], [["1"], 0]])
def test_links_of_a_wrong_kind(stubs, link):
    found, _ = validate(stubs, {"1": NUMBER, "2": {"class_type": "Show", "inputs": {"value": link}}})
    assert found.node_errors["2"]["errors"][0]["type"] == "exception_during_validation"


def test_a_node_without_inputs_key(stubs):
    found, _ = validate(stubs, {"1": {"class_type": "Number"}, "2": SHOW})
    assert found.node_errors["1"]["errors"][0]["type"] == "exception_during_inner_validation"


def test_a_cycle_is_named(stubs):
    prompt = {
        "1": {"class_type": "Add", "inputs": {"a": ["2", 0]}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0]}},
        "3": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
    }
    found, _ = validate(stubs, prompt)
    assert found.error["type"] == "prompt_outputs_failed_validation"
    error = found.node_errors["1"]["errors"][0]
    assert (error["type"], error["details"]) == ("dependency_cycle", "1 (Add) -> 2 (Add) -> 1 (Add)")
    assert set(found.node_errors) == {"1", "2"}


def test_a_long_chain_needs_no_recursion(stubs):
    prompt = {"0": NUMBER}
    for index in range(1, 3000):
        prompt[str(index)] = {"class_type": "Add", "inputs": {"a": [str(index - 1), 0]}}
    prompt["out"] = {"class_type": "Show", "inputs": {"value": ["2999", 0]}}
    assert validate(stubs, prompt)[0].targets == ("out",)


def test_the_valid_outputs_of_a_partly_valid_graph_run(stubs):
    prompt = {"1": NUMBER, "2": SHOW, "3": {"class_type": "Number", "inputs": {"value": 101}}}
    prompt["4"] = {"class_type": "Show", "inputs": {"value": ["3", 0]}}
    found, _ = validate(stubs, prompt)
    assert (found.targets, found.error, list(found.node_errors)) == (("2",), None, ["3"])
    assert found.node_errors["3"]["dependent_outputs"] == ["4"]


def test_validate_inputs_exempts_what_it_names_and_can_refuse(stubs):
    def check(**inputs):
        found, _ = validate(stubs, {"1": {"class_type": "Checked", "inputs": inputs}})
        return found.node_errors["1"]["errors"] if found.node_errors else []

    assert check(value=99, other=1) == []
    assert [error["type"] for error in check(value=99, other=99)] == ["value_bigger_than_max"]
    assert check(value=13, other=1) == [
        {
            "type": "custom_validation_failed",
            "message": "Custom validation failed for node",
            "details": "value - 13 brings bad luck",
            "extra_info": {"input_name": "value"},
        }
    ]
    assert [error["type"] for error in check(value=5000, other=1)] == ["exception_during_validation"]


def test_a_class_that_checks_types_itself_takes_any(stubs):
    prompt = {
        "1": {"class_type": "Model", "inputs": {"name": "small", "precise": False}},
        "2": {"class_type": "AnyType", "inputs": {"value": ["1", 0]}},
    }
    assert validate(stubs, prompt, ["2"])[0].error is None


class _Wildcard(str):
    def __ne__(self, other):
        return False


@pytest.mark.parametrize(
    ("received", "wanted", "expected"),
    [
        ("INT", "INT", True),
        ("INT", "FLOAT", False),
        ("INT", "FLOAT, INT", True),
        ("INT,STRING", "STRING", True),
        ("INT", "*", False),
        (_Wildcard("*"), "INT", True),
        (["a"], ["a"], True),
        (["a"], "COMBO", False),
    ],
)
def test_type_match(received, wanted, expected):
    assert is_type_match(received, wanted) is expected
