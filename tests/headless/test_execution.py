"""Execution: what runs, in which order, with what, what is reused, and who is blamed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from kolors_nodes.headless import Runner, get_running_host


def number(value):
    return {"class_type": "Number", "inputs": {"value": value}}


def add(a, b=1):
    return {"class_type": "Add", "inputs": {"a": a, "b": b}}


def show(value):
    return {"class_type": "Show", "inputs": {"value": value}}


def names(calls):
    return [name for name, _ in calls]


def test_only_what_the_outputs_need_runs(runner, calls):
    result = runner.run({"1": number(3), "2": add(["1", 0]), "3": show(["2", 0]), "4": number(9)})
    assert result.status == "success"
    assert result.outputs == {"3": {"text": ["4"]}}
    assert result.executed == ("1", "2", "3")
    assert (result.cached, result.error, result.node_errors) == ((), None, {})
    assert names(calls) == ["Number", "Add", "Show"]


def test_any_node_may_be_asked_for(runner, calls):
    prompt = {"1": number(3), "2": add(["1", 0], 5), "3": show(["2", 0])}
    result = runner.run(prompt, outputs=["2", "1"])
    assert result.values == {"2": (8,), "1": (3,)}
    assert result.executed == ("1", "2")
    assert result.outputs == {}


def test_the_callers_prompt_is_not_changed(runner):
    prompt = {"1": number("3"), "2": show(["1", 0])}
    runner.run(prompt)
    assert prompt == {"1": number("3"), "2": show(["1", 0])}


def test_a_second_run_executes_nothing(runner, calls):
    prompt = {"1": number(3), "2": add(["1", 0]), "3": show(["2", 0])}
    first = runner.run(prompt, outputs=["2", "3"])
    calls.clear()
    second = runner.run(prompt, outputs=["2", "3"])
    assert (second.executed, second.cached, calls) == ((), ("1", "2", "3"), [])
    assert (second.outputs, second.values) == (first.outputs, first.values)


def test_a_changed_constant_reruns_the_node_and_what_follows(runner):
    prompt = {"1": number(3), "2": number(4), "3": add(["1", 0], ["2", 0]), "4": show(["3", 0])}
    runner.run(prompt)
    prompt["2"] = number(5)
    result = runner.run(prompt)
    assert result.executed == ("2", "3", "4")
    assert result.cached == ("1",)
    assert result.outputs["4"] == {"text": ["8"]}


def test_keys_are_made_after_the_casts_and_without_ids(runner):
    runner.run({"1": number(3), "2": show(["1", 0])})
    result = runner.run({"7": number("3"), "8": show(["7", 0])})
    assert result.executed == ()
    assert result.outputs == {"8": {"text": ["3"]}}


def test_equal_branches_run_once(runner, calls):
    result = runner.run({"1": number(3), "2": number(3), "3": add(["1", 0], ["2", 0])}, outputs=["3"])
    assert result.values["3"] == (6,)
    assert names(calls).count("Number") == 1


def test_wiring_is_part_of_the_key(runner):
    runner.run({"1": number(3), "2": number(4), "3": add(["1", 0], ["2", 0]), "4": show(["3", 0])})
    swapped = {"1": number(3), "2": number(4), "3": add(["2", 0], ["1", 0]), "4": show(["3", 0])}
    assert runner.run(swapped).executed == ("3", "4")


def test_only_the_last_runs_results_are_kept(runner):
    first, second = ({"1": number(value), "2": show(["1", 0])} for value in (1, 2))
    runner.run(first)
    runner.run(second)
    assert runner.run(first).executed == ("1", "2")


def test_is_changed_decides_about_reuse(runner, stubs):
    prompt = {"1": {"class_type": "Changing", "inputs": {"value": 1}}, "2": show(["1", 0])}
    changing = stubs["Changing"]
    runner.run(prompt)
    assert runner.run(prompt).executed == ()
    changing.MARK = 2
    assert runner.run(prompt).executed == ("1", "2")
    changing.MARK = float("nan")
    assert runner.run(prompt).executed == ("1", "2")
    assert runner.run(prompt).executed == ("1", "2")  # NaN never equals the last one
    changing.MARK = RuntimeError("cannot tell")
    assert runner.run(prompt).executed == ("1", "2")


def test_nodes_that_ask_for_their_id_are_not_shared(runner):
    hidden = {"class_type": "Hidden", "inputs": {"value": 1}}
    runner.run({"1": hidden})
    assert runner.run({"1": hidden}).executed == ()
    assert runner.run({"2": hidden}).executed == ("2",)


def test_a_node_keeps_its_instance_while_it_stays_in_the_graph(runner):
    def count(salt, id_="1"):
        prompt = {id_: {"class_type": "Counter", "inputs": {"salt": salt}}}
        return runner.run(prompt, outputs=[id_]).values[id_]

    assert [count(1), count(2), count(3, id_="9"), count(4)] == [(1,), (2,), (1,), (1,)]


def test_a_failed_run_keeps_what_was_done(runner):
    prompt = {"1": number(3), "2": {"class_type": "Fail", "inputs": {"value": ["1", 0]}}, "3": show(["2", 0])}
    assert runner.run(prompt).status == "error"
    prompt["2"] = add(["1", 0])
    assert runner.run(prompt).cached == ("1",)


def test_lists_run_what_follows_item_by_item(runner, calls):
    prompt = {
        "1": {"class_type": "Spread", "inputs": {"count": 3}},
        "2": add(["1", 0], ["1", 1]),
        "3": show(["2", 0]),
        "4": {"class_type": "Gather", "inputs": {"items": ["2", 0], "sep": "-"}},
    }
    result = runner.run(prompt, outputs=["1", "2", "3", "4"])
    assert result.values["1"] == ([0, 1, 2], 3)
    assert result.values["2"] == ([3, 4, 5],)  # the short list repeats its last item
    assert result.outputs["3"] == {"text": ["3", "4", "5"]}
    assert result.values["4"] == ("3-4-5",)
    assert ("Gather", {"items": [3, 4, 5], "sep": ["-"]}) in calls


def test_empty_lists_call_once_without_arguments(runner):
    prompt = {"1": {"class_type": "Spread", "inputs": {"count": 0}}, "2": show(["1", 0])}
    error = runner.run(prompt).error
    assert error["exception_type"] == "TypeError"
    assert "value" in error["exception_message"]


def test_hidden_inputs(runner):
    prompt = {"5": {"class_type": "Hidden", "inputs": {"value": "2"}}}
    info = {"workflow": {"nodes": []}}
    seen = runner.run(prompt, extra_data={"extra_pnginfo": info}).outputs["5"]["seen"][0]
    assert seen["prompt"]["5"]["inputs"] == {"value": 2}
    assert (seen["info"], seen["node_id"]) == (info, "5")


def test_a_ui_workflow_is_handed_on_for_the_metadata(runner):
    workflow = {"nodes": [{"id": 5, "type": "Hidden", "widgets_values": [2]}], "links": [], "version": 0.4}
    seen = runner.run(workflow).outputs["5"]["seen"][0]
    assert seen["info"] == {"workflow": workflow}


def test_lazy_inputs_are_computed_only_when_asked_for(runner, calls):
    prompt = {
        "1": number(1),
        "2": number(2),
        "3": {"class_type": "LazyChoice", "inputs": {"first": False, "a": ["1", 0], "b": ["2", 0]}},
    }
    result = runner.run(prompt, outputs=["3"])
    assert result.values["3"] == (2,)
    assert result.executed == ("2", "3")
    assert ("LazyChoice", {"a": None, "b": 2}) in calls


def test_asking_for_an_input_that_is_not_linked_is_the_nodes_fault(runner):
    result = runner.run({"1": {"class_type": "Greedy", "inputs": {"a": 1}}}, outputs=["1"])
    assert result.error["node_id"] == "1"
    assert "'ghost'" in result.error["exception_message"]


def test_asking_for_what_a_node_did_not_give_is_no_endless_loop(runner):
    prompt = {
        "1": number(1),
        "2": {"class_type": "ShowOnly", "inputs": {"value": ["1", 0]}},
        "3": {"class_type": "LazyChoice", "inputs": {"first": True, "a": ["2", 0], "b": ["2", 0]}},
    }
    error = runner.run(prompt, outputs=["3"]).error
    assert (error["node_id"], error["exception_type"].split(".")[-1]) == ("3", "NodeInputError")


def test_a_failing_node_is_named_with_its_inputs(runner):
    prompt = {"1": number(3), "2": {"class_type": "Fail", "inputs": {"value": ["1", 0]}}, "3": show(["2", 0])}
    result = runner.run(prompt)
    assert result.status == "error"
    error = result.error
    assert (
        error.items()
        >= {
            "node_id": "2",
            "node_type": "Fail",
            "exception_type": "ValueError",
            "exception_message": "broken",
            "current_inputs": {"value": [3]},
        }.items()
    )
    assert "raise ValueError(text)" in "".join(error["traceback"])
    assert result.executed == ("1",)
    assert result.outputs == {}


def test_a_refused_run_executes_nothing(runner, calls):
    result = runner.run({"1": number(300), "2": show(["1", 0])})
    assert (result.status, result.executed, calls) == ("invalid", (), [])
    assert result.error["type"] == "prompt_outputs_failed_validation"
    assert result.node_errors["1"]["errors"][0]["type"] == "value_bigger_than_max"


def test_a_workflow_that_cannot_be_read_is_refused(runner, tmp_path):
    result = runner.run(tmp_path / "absent.json")
    assert (result.status, result.error["type"]) == ("invalid", "invalid_workflow")
    assert "absent.json" in result.error["message"]


def test_valid_outputs_of_a_partly_valid_graph_run(runner):
    result = runner.run({"1": number(3), "2": show(["1", 0]), "3": show(["1", 7])})
    assert (result.status, result.outputs) == ("success", {"2": {"text": ["3"]}})
    assert list(result.node_errors) == ["3"]


def test_asynchronous_nodes_are_waited_for(runner):
    prompt = {"1": {"class_type": "Async", "inputs": {"value": 1}}}
    assert runner.run(prompt, outputs=["1"]).values == {"1": (2,)}


def expand(value, count=2, **more):
    return {"class_type": "Expand", "inputs": {"value": value, "count": count, **more}}


def test_a_node_may_expand_into_further_nodes(runner, calls):
    prompt = {"1": number(3), "2": expand(["1", 0]), "3": show(["2", 0]), "4": show(["2", 1])}
    result = runner.run(prompt)
    assert (result.outputs, result.status) == ({"3": {"text": ["5"]}, "4": {"text": ["text"]}}, "success")
    assert set(result.executed) == {"1", "2", "2.0.0.1", "2.0.0.2", "3", "4"}
    calls.clear()
    prompt["2"]["inputs"]["count"] = 3
    result = runner.run(prompt)
    assert result.outputs["3"] == {"text": ["6"]}
    assert names(calls) == ["Expand", "Add", "Show", "Show"]  # of the three further nodes, two were still there
    assert runner.run(prompt).executed == ()


def test_expansion_goes_on_within_expansion(runner):
    prompt = {"1": number(3), "2": {"class_type": "ExpandAgain", "inputs": {"value": ["1", 0], "depth": 3}}}
    assert runner.run(prompt, outputs=["2"]).values == {"2": (3 + 3 + 2 + 1,)}


def test_a_list_expands_once_per_item(runner):
    prompt = {"1": {"class_type": "Spread", "inputs": {"count": 3}}, "2": expand(["1", 0], 1), "3": show(["2", 0])}
    assert runner.run(prompt).outputs["3"] == {"text": ["1", "2", "3"]}


def test_further_nodes_may_show_something(runner):
    prompt = {"1": number(3), "2": expand(["1", 0], 1, fault="show"), "3": show(["2", 0])}
    assert runner.run(prompt).outputs == {"3": {"text": ["4"]}, "2.0.0.2": {"text": ["4"]}}


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("node", "ValueError", ["broken"]),
        ("double id", "DuplicateNodeError", ["node 1", "taken"]),
        ("unknown class", "UnknownClassError", ["NeverHeardOf"]),
    ],
)
def test_a_faulty_expansion_is_told_at_the_node_of_the_prompt(runner, fault, kind, words):
    error = runner.run({"1": number(3), "2": expand(["1", 0], fault=fault), "3": show(["2", 0])}).error
    assert (error["node_id"], error["node_type"]) == ("2", "Expand")
    assert error["exception_type"].endswith(kind)
    for word in words:
        assert word in error["exception_message"]
    assert error.get("expanded_node_type") == ("Fail" if fault == "node" else None)


@pytest.mark.parametrize(("how", "runs"), [("silent", ["4"]), ("message", ["4"]), ("all", []), ("result", [])])
def test_a_blocker_keeps_what_follows_from_running(runner, calls, how, runs):
    prompt = {
        "1": number(3),
        "2": {"class_type": "Block", "inputs": {"value": ["1", 0], "how": how}},
        "3": add(["2", 0]),
        "4": show(["2", 1]),
        "5": show(["3", 0]),
    }
    result = runner.run(prompt)
    assert (result.status, list(result.outputs)) == ("success", runs)
    assert result.blocked == ({"3": "odd numbers are not welcome"} if how == "message" else {})
    assert "Add" not in names(calls)


def test_blocked_items_of_a_list_stay_in_their_place(runner):
    prompt = {"1": {"class_type": "BlockList", "inputs": {"count": 4, "whole": False}}, "2": show(["1", 0])}
    assert runner.run(prompt).outputs == {"2": {"text": ["0", "2"]}}


def test_coroutines_run_side_by_side(runner, calls):
    def wait(value):
        return {"class_type": "AsyncWait", "inputs": {"value": value, "milliseconds": 50}}

    prompt = {"1": wait(1), "2": wait(2), "3": add(["1", 0], ["2", 0]), "4": show(["3", 0])}
    result = runner.run(prompt)
    assert result.outputs["4"] == {"text": ["3"]}
    assert [name.split()[-1] for name, _ in calls[:4]] == ["begins", "begins", "ends", "ends"]
    prompt["1"]["inputs"]["value"] = -1
    result = runner.run(prompt)
    assert (result.error["node_id"], result.error["exception_message"]) == ("1", "a negative number")


def test_every_method_may_be_a_coroutine(runner):
    prompt = {"1": number(9), "2": {"class_type": "AsyncLazy", "inputs": {"a": ["1", 0], "limit": 5}}}
    assert runner.run(prompt, outputs=["2"]).values == {"2": (5,)}
    prompt["2"]["inputs"]["limit"] = 11
    result = runner.run(prompt, outputs=["2"])
    assert result.node_errors["2"]["errors"][0]["details"] == "limit - the limit is too high"


def test_an_interrupt_stops_waiting_for_a_coroutine(stubs):
    def stop(name, data):
        if name == "executing":
            threading.Timer(0.02, runner.interrupt).start()

    runner = Runner(stubs, on_event=stop)
    prompt = {"1": {"class_type": "AsyncWait", "inputs": {"value": 1, "milliseconds": 200}}}
    result = runner.run(prompt, outputs=["1"])
    assert result.error["exception_type"].endswith("Interrupted")


def test_a_graph_runs_inside_an_event_loop(runner):
    async def main():
        return runner.run({"1": {"class_type": "AsyncWait", "inputs": {"value": 4, "milliseconds": 1}}}, outputs=["1"])

    assert asyncio.run(main()).values == {"1": (4,)}


def test_a_class_of_the_v3_api_is_refused_clearly(stubs):
    class V3:
        @classmethod
        def define_schema(cls):
            raise AssertionError("never asked")

    result = Runner({**stubs, "V3": V3}).run({"1": {"class_type": "V3", "inputs": {}}, "2": show(["1", 0])})
    assert (result.status, result.error["type"]) == ("invalid", "unsupported_node")
    assert "V3 API" in result.error["message"]


def test_a_memory_limit_keeps_the_results_of_earlier_runs(stubs):
    class Big(stubs["Number"]):
        def get(self, value):
            return (bytearray(100_000),)

    runner = Runner({**stubs, "Number": Big}, cache_limit=250_000)
    prompts = [{"1": number(value)} for value in range(3)]
    for prompt in [prompts[0], prompts[1], prompts[0]]:
        executed = runner.run(prompt, outputs=["1"]).executed
    assert executed == ()
    runner.run(prompts[2], outputs=["1"])
    assert runner.run(prompts[0], outputs=["1"]).executed == ()  # the second was unused for longest
    assert runner.run(prompts[1], outputs=["1"]).executed == ("1",)


def test_a_node_that_returns_no_tuple_is_told(runner, stubs):
    class Bare(stubs["Number"]):
        def get(self, value):
            return value

    result = Runner({**stubs, "Number": Bare}).run({"1": number(1)}, outputs=["1"])
    assert "must return a tuple" in result.error["exception_message"]


def test_outputs_come_as_early_as_they_can(runner):
    prompt = {"1": number(1), "2": number(2), "3": number(3), "9": show(["3", 0]), "8": add(["1", 0], ["2", 0])}
    prompt["7"] = show(["8", 0])
    assert runner.run(prompt).executed[:2] == ("3", "9")


def test_events_tell_the_whole_story(stubs):
    events = []

    class Stepping(stubs["Number"]):
        def get(self, value):
            get_running_host().report_progress(1, 4)
            return (value,)

    runner = Runner({**stubs, "Number": Stepping}, on_event=lambda name, data: events.append((name, data)))
    runner.run({"1": number(3), "2": show(["1", 0])})
    assert [name for name, _ in events] == [
        "execution_start", "execution_cached", "executing", "progress", "executed", "executing", "executed",
        "execution_success",
    ]  # fmt: skip
    progress = dict(events)["progress"]
    assert progress.items() >= {"node": "1", "value": 1, "max": 4, "preview": None}.items()
    events.clear()
    runner.run({"1": number(3), "2": show(["1", 0])})
    assert dict(events)["execution_cached"]["nodes"] == ["1", "2"]
    assert [data["node"] for name, data in events if name == "executed"] == ["2"]  # shown again, not run again
    assert get_running_host() is None


def test_an_interrupt_stops_the_run_inside_a_node(stubs):
    class Endless(stubs["Number"]):
        def get(self, value):
            host = get_running_host()
            while True:
                host.report_progress(1, 2)
                host.raise_if_interrupted()

    def stop(name, data):
        if name == "progress":
            threading.Thread(target=runner.interrupt).start()

    runner = Runner({**stubs, "Number": Endless}, on_event=stop)
    result = runner.run({"1": number(1), "2": show(["1", 0])})
    assert result.status == "error"
    assert result.error["exception_type"].endswith("Interrupted")
    assert result.error["node_id"] == "1"


def test_an_interrupt_stops_the_run_between_nodes_and_is_then_forgotten(stubs):
    runner = Runner(stubs, on_event=lambda name, _: name == "executed" and runner.interrupt())
    prompt = {"1": number(1), "2": show(["1", 0])}
    assert runner.run(prompt).executed == ("1",)
    runner.on_event = None
    assert runner.run(prompt).status == "success"


def test_nodes_run_in_inference_mode_where_torch_is_loaded(stubs):
    import torch

    class Torch(stubs["Number"]):
        def get(self, value):
            return (torch.is_inference_mode_enabled(),)

    assert Runner({**stubs, "Number": Torch}).run({"1": number(1)}, outputs=["1"]).values == {"1": (True,)}


def test_importing_the_runner_loads_nothing_heavy():
    # The package root may load torch for its nodes; the runner itself must not, so it is imported beside it.
    code = (
        "import importlib.util, pathlib, sys, types\n"
        "root = pathlib.Path(importlib.util.find_spec('kolors_nodes').origin).parent\n"
        "package = types.ModuleType('kolors_nodes')\n"
        "package.__path__ = [str(root)]\n"
        "sys.modules['kolors_nodes'] = package\n"
        "import kolors_nodes.headless, kolors_nodes.headless.command\n"
        "heavy = ('torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'safetensors')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print([name for name in sys.modules if name.startswith(('kolors_nodes.nodes', 'kolors_nodes.kolors'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_a_device_of_no_known_name_is_refused(stubs, device):
    with pytest.raises(ValueError, match="device is"):
        Runner(stubs, device=device)
