"""A small node pack for tests of the runner: numbers instead of pictures, and every odd habit a node may have.

Calls are recorded in `CALLS` as (class name, arguments), so that a test can tell what ran.
"""

from __future__ import annotations

from typing import Any

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
        return {"required": {"count": ("INT", {"default": 3, "min": 0})}}

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
    """Returns a graph instead of values."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self):
        return {"expand": {}, "result": (["1", 0],)}


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
        Number, Add, Sampler, Model, Show, Spread, Gather, LazyChoice, Greedy, Fail, Changing, Hidden, Counter,
        Checked, AnyType, Async, Expand, Options, Printer,
    )
}
