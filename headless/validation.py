"""Validation of an API prompt, with ComfyUI's rules, casts and error types.

Source: ComfyUI 0.3.64, `execution.validate_prompt`. Two things differ on purpose: a cycle is the error
`dependency_cycle` (as in later releases) where 0.3.64 runs into Python's recursion limit, and
`dependent_outputs` names the outputs that need the faulty node, where 0.3.64 names those that happen to be
checked after it.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .calling import call_over_lists, get_call_inputs
from .expansion import is_blocker
from .graph import Graph, InputSpec, UnsupportedNodeError, check_class

logger = logging.getLogger(__name__)

LISTED_CHOICES = 20
CASTS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}

Error = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What validation found.

    Attributes:
        targets: the nodes to execute for their own sake that are valid, in the prompt's order.
        error: None when there is at least one, else ``{"type", "message", "details", "extra_info"}``.
        node_errors: ``{node id: {"errors": [error], "dependent_outputs": [id], "class_type"}}``, of the nodes
            that are themselves at fault. Not empty also when only some of the targets are invalid.
    """

    targets: tuple[str, ...]
    error: Error | None
    node_errors: dict[str, dict[str, Any]]


def validate_prompt(graph: Graph, outputs: Iterable[str] | None = None) -> Validation:
    """Checks a prompt, and casts its constants in place to their declared types.

    Args:
        graph: the prompt and its classes.
        outputs: ids of the nodes wanted, output nodes or not; default: every output node.
    """
    error = _check_classes(graph)
    if error:
        return Validation(targets=(), error=error, node_errors={})
    wanted = (
        [str(node_id) for node_id in outputs]
        if outputs is not None
        else ([node_id for node_id in graph.prompt if graph.is_output(node_id)])
    )
    missing = [node_id for node_id in wanted if node_id not in graph.prompt]
    if missing or not wanted:
        details = f"not in the prompt: {', '.join(missing)}" if missing else ""
        error = _make_error("prompt_no_outputs", "Prompt has no outputs", details, {})
        return Validation(targets=(), error=error, node_errors={})
    checker = _Checker(graph)
    targets = [node_id for node_id in dict.fromkeys(wanted) if checker.check_target(node_id)]
    if targets:
        return Validation(targets=tuple(targets), error=None, node_errors=checker.node_errors)
    details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in checker.target_errors)
    error = _make_error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details, {})
    return Validation(targets=(), error=error, node_errors=checker.node_errors)


def _check_classes(graph: Graph) -> Error | None:
    for node_id, node in graph.prompt.items():
        problem = _find_malformed(node)
        if problem:
            return _make_error("invalid_prompt", f"Cannot execute because {problem}.", f"Node ID '#{node_id}'", {})
        if "class_type" not in node:
            message = "Cannot execute because a node is missing the class_type property."
            return _make_error("invalid_prompt", message, f"Node ID '#{node_id}'", {})
        if node["class_type"] not in graph.classes:
            message = f"Cannot execute because node {node['class_type']} does not exist."
            return _make_error("invalid_prompt", message, f"Node ID '#{node_id}'", {})
        try:
            check_class(node["class_type"], graph.classes[node["class_type"]])
        except UnsupportedNodeError as error:
            return _make_error("unsupported_node", str(error), f"Node ID '#{node_id}'", {})
    return None


def _find_malformed(node: Any) -> str:
    """Says what of a node is not as an API prompt has it, if anything; ComfyUI's server falls over such a node."""
    if not isinstance(node, dict):
        return f"a node is no object, but {str(node)[:80]}"
    if not isinstance(node.get("class_type", ""), str):
        return f"the class_type of a node is no text, but {str(node['class_type'])[:80]}"
    if not isinstance(node.get("inputs", {}), dict):
        return f"the inputs of a node are no object, but {str(node['inputs'])[:80]}"
    return ""


def _make_error(type_: str, message: str, details: str, extra_info: dict[str, Any]) -> Error:
    return {"type": type_, "message": message, "details": details, "extra_info": extra_info}


@dataclass(frozen=True)
class _Verdict:
    is_valid: bool
    errors: list[Error]


class _Checker:
    """Checks targets one after another; a node that several of them need is checked once."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.verdicts: dict[str, _Verdict] = {}
        self.node_errors: dict[str, dict[str, Any]] = {}
        self.target_errors: list[Error] = []

    def check_target(self, target: str) -> bool:
        """Checks a node and all it depends on. Returns whether it can run."""
        cycle = self._find_cycle(target)
        if cycle:
            self._blame_cycle(cycle, target)
        else:
            for node_id, via in self._iterate_upstream_first(target):
                if node_id not in self.verdicts:
                    self.verdicts[node_id] = self._check(node_id, via)
        verdict = self.verdicts[target]
        if not verdict.is_valid:
            self.target_errors += verdict.errors
            self._record(target)
        return verdict.is_valid

    def _record(self, target: str) -> None:
        needed = {target, *self.graph.get_ancestors(target)}
        for node_id, verdict in self.verdicts.items():
            if verdict.errors and node_id in needed:
                entry = {
                    "errors": verdict.errors,
                    "dependent_outputs": [],
                    "class_type": self.graph.get_class_type(node_id),
                }
                self.node_errors.setdefault(node_id, entry)["dependent_outputs"].append(target)

    def _iterate_upstream_first(self, target: str) -> Iterator[tuple[str, tuple[str, str] | None]]:
        """Yields each needed node after those it is linked to, with the (node, input) that led to it."""
        stack = [(target, None, iter(self._get_followed_links(target)))]
        seen = {target}
        while stack:
            node_id, via, links = stack[-1]
            name, origin = next(links, (None, None))
            if origin is None:
                stack.pop()
                yield node_id, via
            elif origin not in seen:
                seen.add(origin)
                stack.append((origin, (node_id, name), iter(self._get_followed_links(origin))))

    def _find_cycle(self, target: str) -> list[str]:
        """Returns the node ids of a cycle that the target depends on, first and last equal, or nothing."""
        done: set[str] = set()
        path = {target: iter(self._get_followed_links(target))}
        while path:
            node_id = next(reversed(path))
            _, origin = next(path[node_id], (None, None))
            if origin is None:
                done.add(node_id)
                del path[node_id]
            elif origin in path:
                ids = list(path)
                return [*ids[ids.index(origin) :], origin]
            elif origin not in done:
                path[origin] = iter(self._get_followed_links(origin))
        return []

    def _blame_cycle(self, cycle: list[str], target: str) -> None:
        details = " -> ".join(f"{node_id} ({self.graph.get_class_type(node_id)})" for node_id in cycle)
        error = _make_error("dependency_cycle", "Dependency cycle detected", details, {"cycle_nodes": cycle[:-1]})
        self.verdicts.setdefault(target, _Verdict(False, []))
        for node_id in cycle[:-1]:
            self.verdicts[node_id] = _Verdict(False, [error])

    def _get_followed_links(self, node_id: str) -> list[tuple[str, str]]:
        """Returns (input name, linked node) of the declared inputs whose link is sound so far."""
        if node_id in self.verdicts:
            return []
        links = []
        for name, value in self.graph.prompt[node_id].get("inputs", {}).items():
            try:
                spec = self.graph.get_input_spec(node_id, name)
                is_declared = spec is not None and spec.category != "hidden"
                if is_declared and isinstance(value, list) and len(value) == 2 and value[0] in self.graph.prompt:
                    if self._check_link_type(node_id, name, spec, value) is None:
                        links.append((name, value[0]))
            except Exception as error:  # the check of this node asks the same again, and reports it
                logger.debug("node %s: the link of %s is not followed: %s", node_id, name, error)
        return links

    def _check(self, node_id: str, via: tuple[str, str] | None) -> _Verdict:
        try:
            return self._check_node(node_id)
        except Exception as error:  # whatever a node class raises is a finding, not a failure of ours
            info: dict[str, Any] = {
                "exception_type": get_type_name(type(error)),
                "traceback": traceback.format_tb(error.__traceback__),
            }
            if via is None:
                finding = ("exception_during_validation", "Exception when validating node")
            else:
                finding = ("exception_during_inner_validation", "Exception when validating inner node")
                consumer, name = via
                spec = self.graph.get_input_spec(consumer, name)
                info |= {
                    "input_name": name,
                    "input_config": (spec.type, spec.options) if spec else None,
                    "exception_message": str(error),
                    "linked_node": self.graph.get_inputs(consumer)[name],
                }
            return _Verdict(False, [_make_error(*finding, str(error), info)])

    def _check_node(self, node_id: str) -> _Verdict:
        validator = _Validator.of(self.graph.get_class(node_id))
        inputs = self.graph.get_inputs(node_id)
        errors: list[Error] = []
        received_types: dict[str, Any] = {}
        is_valid = True
        for name in _get_declared_names(self.graph, node_id):
            spec = self.graph.get_input_spec(node_id, name)
            assert spec is not None
            if name not in inputs:
                if spec.category == "required":
                    message = "Required input is missing"
                    errors.append(_make_error("required_input_missing", message, name, {"input_name": name}))
            elif isinstance(inputs[name], list):
                error = self._check_link(node_id, name, spec, received_types)
                errors += [error] if error else []
                is_valid = is_valid and (error is not None or self.verdicts[inputs[name][0]].is_valid)
            else:
                error = _check_constant(inputs, name, spec, is_exempt=validator.takes(name))
                errors += [error] if error else []
        errors += self._call_validator(node_id, validator, received_types)
        return _Verdict(is_valid and not errors, errors)

    def _check_link(self, node_id: str, name: str, spec: InputSpec, received_types: dict[str, Any]) -> Error | None:
        value = self.graph.get_inputs(node_id)[name]
        if len(value) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _make_error("bad_linked_input", message, name, _describe_input(name, spec, value))
        received_types[name] = self._get_received_type(value)
        return self._check_link_type(node_id, name, spec, value)

    def _get_received_type(self, link: list[Any]) -> Any:
        return self.graph.get_class(link[0]).RETURN_TYPES[link[1]]

    def _check_link_type(self, node_id: str, name: str, spec: InputSpec, link: list[Any]) -> Error | None:
        received = self._get_received_type(link)
        if "input_types" in _Validator.of(self.graph.get_class(node_id)).names or is_type_match(received, spec.type):
            return None
        details = f"{name}, received_type({received}) mismatch input_type({spec.type})"
        info = {
            "input_name": name,
            "input_config": (spec.type, spec.options),
            "received_type": received,
            "linked_node": link,
        }
        return _make_error("return_type_mismatch", "Return type mismatch between linked nodes", details, info)

    def _call_validator(self, node_id: str, validator: _Validator, received_types: dict[str, Any]) -> list[Error]:
        if not validator.is_called:
            return []
        inputs, _ = get_call_inputs(self.graph, node_id)
        given = {name: values for name, values in inputs.items() if validator.takes(name)}
        if "input_types" in validator.names:
            given["input_types"] = [received_types]
        answers = call_over_lists(self.graph.get_class(node_id), "VALIDATE_INPUTS", given)
        errors = []
        for name in given:
            for answer in answers:
                if answer is not True and not is_blocker(answer):
                    details = name if answer is False else f"{name} - {answer}"
                    message = "Custom validation failed for node"
                    errors.append(_make_error("custom_validation_failed", message, details, {"input_name": name}))
        return errors


@dataclass(frozen=True)
class _Validator:
    """The signature of a class's ``VALIDATE_INPUTS``: an input that it names is exempt from the range checks."""

    names: tuple[str, ...] = ()
    takes_all: bool = False

    @classmethod
    def of(cls, node_class: type) -> _Validator:
        function = getattr(node_class, "VALIDATE_INPUTS", None)
        if function is None:
            return cls()
        signature = inspect.getfullargspec(function)
        return cls(tuple(signature.args), signature.varkw is not None)

    @property
    def is_called(self) -> bool:
        return bool(self.names) or self.takes_all

    def takes(self, name: str) -> bool:
        return self.takes_all or name in self.names


def _get_declared_names(graph: Graph, node_id: str) -> list[str]:
    input_types = graph.get_input_types(node_id)
    return list(dict.fromkeys([*input_types.get("required", {}), *input_types.get("optional", {})]))


def _describe_input(name: str, spec: InputSpec, value: Any) -> dict[str, Any]:
    return {"input_name": name, "input_config": (spec.type, spec.options), "received_value": value}


def _check_constant(inputs: dict[str, Any], name: str, spec: InputSpec, is_exempt: bool) -> Error | None:
    """Casts a constant in place, and checks its range or list unless the class checks it itself."""
    value = inputs[name]
    try:
        if isinstance(value, dict) and "__value__" in value:
            value = inputs[name] = value["__value__"]
        if isinstance(spec.type, str) and spec.type in CASTS:
            value = inputs[name] = CASTS[spec.type](value)
    except Exception as error:  # int() and float() of what a file may hold, and classes that override them
        message = f"Failed to convert an input value to a {spec.type} value"
        info = {**_describe_input(name, spec, value), "exception_message": str(error)}
        return _make_error("invalid_input_type", message, f"{name}, {value}, {error}", info)
    if is_exempt:
        return None
    info = _describe_input(name, spec, value)
    if "min" in spec.options and value < spec.options["min"]:
        message = f"Value {value} smaller than min of {spec.options['min']}"
        return _make_error("value_smaller_than_min", message, name, info)
    if "max" in spec.options and value > spec.options["max"]:
        message = f"Value {value} bigger than max of {spec.options['max']}"
        return _make_error("value_bigger_than_max", message, name, info)
    if isinstance(spec.type, list) and value not in spec.type:
        listed = str(spec.type)
        if len(spec.type) > LISTED_CHOICES:
            listed = f"(list of length {len(spec.type)})"
            info["input_config"] = None
        return _make_error("value_not_in_list", "Value not in list", f"{name}: '{value}' not in {listed}", info)
    return None


def is_type_match(received: Any, wanted: Any) -> bool:
    """Tells whether an output type may feed an input type: equal, or comma lists that share a name."""
    if not received != wanted:  # packs make wildcards by overriding `!=`
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    return not {t.strip() for t in received.split(",")}.isdisjoint(t.strip() for t in wanted.split(","))


def get_type_name(kind: type) -> str:
    """Returns the name of an exception class as ComfyUI reports it: with its module unless built in."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
