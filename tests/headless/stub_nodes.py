"""A small node pack for tests of the runner: numbers instead of pictures, and every odd habit a node may have.

Calls are recorded in `CALLS` as (class name, arguments), so that a test can tell what ran.
"""

from __future__ import annotations

import asyncio
from typing import Any

try:  # the same file serves ComfyUI as a pack, where only its own classes count
    from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder
except ImportError:
    from kolors_nodes.headless import ExecutionBlocker, GraphBuilder

CALLS: list[tuple[str, dict[str, Any]]] = []


class Number:
    """Gives a number."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 7, "min": 0, "max": 100})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "get"

    def get(self, value):
        CALLS.append(("Number", {"value": value}))
        return (value,)


class Add:
    """Adds two numbers; the second is a widget that may be linked."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"a": ("INT", {"forceInput": True})},
            "optional": {"b": ("INT", {"default": 1})},
        }

    RETURN_TYPES = ("INT",)
    FUNCTION = "add"

    def add(self, a, b=1):
        CALLS.append(("Add", {"a": a, "b": b}))
        return (a + b,)


class Sampler:
    """The widget layout of KolorsSampler: two sockets, numbers, a seed with its control value, a list."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "width": ("INT", {"default": 1024, "min": 64, "max": 2048, "step": 64}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}),
                "cfg": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 20.0}),
                "scheduler": (["Euler", "DPM"], {"default": "Euler"}),
            },
            "optional": {
                "latent": ("LATENT",),
                "noise_device": (["gpu", "cpu"],),
            },
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    def sample(self, model, width, seed, cfg, scheduler, latent=None, noise_device="gpu"):
        CALLS.append(("Sampler", {"width": width, "seed": seed, "cfg": cfg, "scheduler": scheduler}))
        return ({"width": width, "seed": seed},)


class Model:
    """Gives a model that is only a name."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (["small", "large"],), "precise": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, name, precise):
        CALLS.append(("Model", {"name": name, "precise": precise}))
        return (name,)


class Show:
    """An output node that shows whatever it is given."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT,LATENT,STRING,LIST", {"forceInput": True})}}

    RETURN_TYPES = ()
    FUNCTION = "show"
    OUTPUT_NODE = True

    def show(self, value):
        CALLS.append(("Show", {"value": value}))
        return {"ui": {"text": [str(value)]}}


class Spread:
    """Gives a list whose items go on one by one."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {"default": 3, "min": 0, "max": 300})}}

    RETURN_TYPES = ("INT", "INT")
    OUTPUT_IS_LIST = (True, False)
    FUNCTION = "spread"

    def spread(self, count):
        return (list(range(count)), count)


class Gather:
    """Takes whole lists, its widget included."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"items": ("INT", {"forceInput": True}), "sep": ("STRING", {"default": "+"})}}

    RETURN_TYPES = ("STRING",)
    INPUT_IS_LIST = True
    FUNCTION = "gather"

    def gather(self, items, sep):
        CALLS.append(("Gather", {"items": items, "sep": sep}))
        return (sep[0].join(str(item) for item in items),)


class LazyChoice:
    """Computes only the one of its inputs that it passes on."""

    @classmethod
    def INPUT_TYPES(cls):
        lazy = {"lazy": True, "forceInput": True}
        return {"required": {"first": ("BOOLEAN", {"default": True}), "a": ("INT", lazy), "b": ("INT", lazy)}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "choose"

    def check_lazy_status(self, first, a, b):
        wanted = "a" if first else "b"
        return [wanted] if {"a": a, "b": b}[wanted] is None else []

    def choose(self, first, a, b):
        CALLS.append(("LazyChoice", {"a": a, "b": b}))
        return (a if first else b,)


class Greedy:
    """Asks for an input that nothing is linked to."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {"default": 0, "lazy": True})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    def check_lazy_status(self, a):
        return ["ghost"]

    def run(self, a):
        return (a,)


class Fail:
    """Raises."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"forceInput": True})},
            "optional": {"text": ("STRING", {"default": "broken"})},
        }

    RETURN_TYPES = ("INT",)
    FUNCTION = "fail"

    def fail(self, value, text="broken"):
        raise ValueError(text)


class Changing:
    """Runs again whenever `MARK` changes."""

    MARK: Any = 1

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def IS_CHANGED(cls, value):
        if isinstance(cls.MARK, Exception):
            raise cls.MARK
        return cls.MARK

    def run(self, value):
        CALLS.append(("Changing", {"value": value}))
        return (value,)


class Hidden:
    """Shows what it gets as hidden inputs."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"default": 1})},
            "hidden": {"prompt": "PROMPT", "info": "EXTRA_PNGINFO", "node_id": "UNIQUE_ID", "graph": "DYNPROMPT"},
        }

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, value, prompt, info, node_id, graph):
        assert graph.get_node(node_id)["class_type"] == "Hidden"
        return {"ui": {"seen": [{"prompt": prompt, "info": info, "node_id": node_id}]}, "result": (value,)}


class Counter:
    """Counts its own calls: its instance lives as long as the node stays in the graph."""

    def __init__(self):
        self.count = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"salt": ("INT", {"default": 0})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    def run(self, salt):
        self.count += 1
        return (self.count,)


class Checked:
    """Checks its own inputs, which exempts those it names from the checks of range and list."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "value": ("INT", {"default": 1, "min": 0, "max": 10}),
                "other": ("INT", {"default": 1, "min": 0, "max": 10}),
            }
        }

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def VALIDATE_INPUTS(cls, value=None):
        if value is None:
            return True
        if value > 1000:
            raise RuntimeError("too much to bear")
        return True if value != 13 else "13 brings bad luck"

    def run(self, value, other):
        return {"ui": {"text": [str(value)]}, "result": (value,)}


class AnyType:
    """Takes any type, as wildcards do on hosts without a wildcard of their own."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    RETURN_TYPES = ("*",)
    FUNCTION = "run"

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value):
        return (value,)


class Async:
    """Adds one, asynchronously."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    async def run(self, value):
        return (value + 1,)


class Expand:
    """Adds `count` ones to a number by a chain of further nodes; with a faulty number, the last of them fails."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"forceInput": True}), "count": ("INT", {"default": 2, "min": 0, "max": 20})},
            "optional": {"fault": (["none", "node", "double id", "unknown class", "show"],)},
        }

    RETURN_TYPES = ("INT", "STRING")
    FUNCTION = "run"

    def run(self, value, count, fault="none"):
        CALLS.append(("Expand", {"value": value, "count": count}))
        graph = GraphBuilder()
        last = value
        for _ in range(count):
            last = graph.node("Add", a=last, b=1).out(0)
        if fault == "node":
            last = graph.node("Fail", value=last).out(0)
        if fault == "unknown class":
            last = graph.node("NeverHeardOf", value=last).out(0)
        if fault == "show":
            graph.node("Show", value=last)
        expansion = graph.finalize()
        if fault == "double id":
            expansion = {"1": {"class_type": "Number", "inputs": {"value": 1}}}
        return {"expand": expansion, "result": (last, "text")}


class ExpandAgain:
    """Expands into a graph whose node expands again, and shows the same graph twice for its list input."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"forceInput": True}), "depth": ("INT", {"default": 2, "max": 9})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    def run(self, value, depth):
        if depth <= 0:
            return (value,)
        graph = GraphBuilder()
        node = graph.node("ExpandAgain", value=graph.node("Add", a=value, b=depth).out(0), depth=depth - 1)
        return {"expand": graph.finalize(), "result": (node.out(0),)}


class Block:
    """Blocks what follows when the number is odd: silently, with a message, or both of its outputs."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "value": ("INT", {"forceInput": True}),
                "how": (["silent", "message", "all", "result", "list"],),
            }
        }

    RETURN_TYPES = ("INT", "INT")
    FUNCTION = "run"

    def run(self, value, how):
        if value % 2 == 0:
            return (value, value + 100)
        blocker = ExecutionBlocker("odd numbers are not welcome" if how == "message" else None)
        if how == "all":
            return blocker
        if how == "result":
            return {"result": blocker}
        return (blocker, value + 100)


class BlockList:
    """Blocks some items of a list."""

    @classmethod
    def INPUT_TYPES(cls):
        count = ("INT", {"default": 3, "min": 0, "max": 300})
        return {"required": {"count": count, "whole": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("INT",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "run"

    def run(self, count, whole):
        if whole:
            return (ExecutionBlocker(None),)
        return ([ExecutionBlocker(None) if index % 2 else index for index in range(count)],)


class AsyncWait:
    """Waits, notes when it began and ended, and gives its number back; it fails on a negative one."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1}), "milliseconds": ("INT", {"default": 1, "max": 200})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    async def run(self, value, milliseconds):
        CALLS.append(("AsyncWait begins", {"value": value}))
        await asyncio.sleep(milliseconds / 1000)
        if value < 0:
            raise ValueError("a negative number")
        CALLS.append(("AsyncWait ends", {"value": value}))
        return (value,)


class AsyncLazy:
    """Asks for its lazy input, and checks its inputs and whether it changed, all in coroutines."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {"lazy": True, "forceInput": True}), "limit": ("INT", {"default": 5})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    async def VALIDATE_INPUTS(cls, limit):
        await asyncio.sleep(0)
        return True if limit < 10 else "the limit is too high"

    @classmethod
    async def IS_CHANGED(cls, limit, a):
        await asyncio.sleep(0)
        return limit

    async def check_lazy_status(self, a, limit):
        await asyncio.sleep(0)
        return ["a"] if a is None else []

    async def run(self, a, limit):
        await asyncio.sleep(0)
        return (min(a, limit),)


class RawLink:
    """Shows the link itself instead of what it leads to."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"rawLink": True, "forceInput": True})}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, value):
        return {"ui": {"text": [str(value)]}}


class AllChecked:
    """Checks all of its inputs by keywords, which exempts all of them from the checks of range and list."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"default": 1, "max": 10}), "kind": (["x", "y"],)},
            "optional": {"more": ("FLOAT", {"min": 0.0})},
        }

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs):
        return {"z": False, "w": "w is not for this node"}.get(inputs.get("kind"), True)

    def run(self, value, kind, more=0.0):
        return {"ui": {"text": [f"{value} {kind} {more}"]}, "result": (value,)}


class OnlyTypes:
    """Takes numbers of either type, by looking at the types of its links."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("NUMBER", {"forceInput": True})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        kind = input_types.get("value")
        return True if kind in ("INT", "FLOAT") else f"a {kind} is no number"

    def run(self, value):
        return (int(value),)


class NotIdempotent:
    """Runs once for each of its ids."""

    NOT_IDEMPOTENT = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    def run(self, value):
        return (value,)


class ShowOnly:
    """Shows without giving anything, though it declares an output: what follows gets None."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"forceInput": True})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, value):
        return {"ui": {"text": [str(value)]}}


class TwoModels:
    """Two sockets and two outputs of one type, and a text that may pass through."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "note": ("STRING", {"default": "merged", "multiline": True}),
                "first": ("MODEL",),
                "second": ("MODEL",),
                "ratio": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }

    RETURN_TYPES = ("MODEL", "MODEL", "STRING")
    FUNCTION = "merge"

    def merge(self, note, first, second, ratio):
        return (first, second, note)


class Widgets:
    """One widget of every kind that the editor knows."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "optional": {
                "late": ("INT", {"default": 5, "min": 0, "max": 9}),
                "noise_seed": ("INT", {"default": 1, "control_after_generate": False}),
            },
            "required": {
                "whole": ("INT", {"max": 10**6}),
                "real": ("FLOAT", {"default": 0.25}),
                "flag": ("BOOLEAN", {"label_on": "yes", "label_off": "no"}),
                "line": ("STRING", {}),
                "text": ("STRING", {"multiline": True, "default": "many\nlines"}),
                "dynamic": ("STRING", {"dynamicPrompts": False, "default": "{kept}"}),
                "combo": ("COMBO", {"options": ["one", "two"], "control_after_generate": True}),
                "several": ("COMBO", {"options": ["p", "q", "r"], "multi_select": {"placeholder": "some"}}),
                "counted": ("INT", {"default": 3, "control_after_generate": "increment", "max": 99}),
                "wide": ("FLOAT,INT", {"widgetType": "FLOAT", "default": 1.5}),
                "numbers": ([1, 2, 3], {"default": 2}),
                "empty": ([],),
                "hidden_one": ("STRING", {"default": "unseen", "hidden": True, "advanced": True}),
                "alone": ("STRING", {"default": "no socket", "socketless": True}),
            },
        }

    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    def run(self, **inputs):
        return (str(inputs),)


class Options:
    """Inputs for the conversion: upload button, dynamic prompt, control after a list, forced socket."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": (["a.png", "b.png"], {"image_upload": True}),
                "forced": ("INT", {"forceInput": True}),
                "mode": (["x", "y"], {"control_after_generate": True}),
            },
            "optional": {
                "text": ("STRING", {"default": "none", "dynamicPrompts": True}),
                "choice": ("COMBO", {"options": ["p", "q"]}),
                "items": ("STRING", {"default": ""}),
            },
        }

    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    def run(self, **inputs):
        return (str(inputs),)


class LoadAudio:
    """A name that the editor knows: it adds a player and an upload button."""

    DISPLAY_NAME = "Load Audio"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"audio": (["a.wav", "b.wav"], {"audio_upload": True})}}

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "run"

    def run(self, audio, **_):
        return (audio,)


class SaveAudio:
    """The other side of it."""

    DISPLAY_NAME = "Save Audio (FLAC)"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"audio": ("AUDIO",), "filename_prefix": ("STRING", {"default": "audio/ComfyUI"})}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, audio, filename_prefix):
        return {"ui": {"text": [f"{filename_prefix} {audio}"]}}


class Printer:
    """Prints, shows a progress and returns."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": ("INT", {"default": 2, "min": 1, "max": 200})}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, steps):
        import os

        print("printed by a node")  # what the runner must keep out of its own output
        os.write(1, b"written by a library\n")
        return {"ui": {"text": [str(steps)]}}


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind
    for kind in (
        Number,
        Add,
        Sampler,
        Model,
        Show,
        Spread,
        Gather,
        LazyChoice,
        Greedy,
        Fail,
        Changing,
        Hidden,
        Counter,
        Checked,
        AnyType,
        Async,
        Expand,
        Options,
        Printer,
        ExpandAgain,
        Block,
        BlockList,
        AsyncWait,
        AsyncLazy,
        RawLink,
        AllChecked,
        OnlyTypes,
        NotIdempotent,
        ShowOnly,
        TwoModels,
        Widgets,
        LoadAudio,
        SaveAudio,
    )
}
