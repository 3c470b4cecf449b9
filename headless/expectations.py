"""What is expected of a workflow: ``name.expect.json`` beside ``name.json``, compared with what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runner import Runner, RunResult

SUFFIX = ".expect.json"
DISTANCE = 0.02  # of pictures, mean over all channels with white as 1; written where none is stated
LONGEST_CELL = 90
COLUMNS = ("node", "class", "input", "error")


@dataclass(frozen=True)
class Row:
    """A line of the table about a failure."""

    node: str = ""
    class_type: str = ""
    input: str = ""
    error: str = ""


class WorkflowFailure(Exception):
    """A workflow that did not do what it should."""

    def __init__(self, path: Path, rows: list[Row]):
        super().__init__(path, rows)
        self.path = path
        self.rows = rows

    def __str__(self) -> str:
        cells = [COLUMNS, *((row.node, row.class_type, row.input, row.error) for row in self.rows)]
        cut = [[_shorten(cell) if index < 3 else cell for index, cell in enumerate(line)] for line in cells]
        widths = [max(len(line[index]) for line in cut) for index in range(3)]
        lines = []
        for line in cut:
            start = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))
            lines.append(f"{start}  {' '.join(line[3].split())}".rstrip())
        return "\n".join([f"{self.path.name} did not run as expected:", "", *lines])


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"


class Expectation:
    """What is expected of a workflow, in the file beside it, and what came out."""

    def __init__(self, path: Path, runner: Runner, result: RunResult):
        self.file = path.with_name(path.stem + SUFFIX)
        self.runner = runner
        self.result = result
        self.expected: dict[str, Any] = {"status": "success"}
        if self.file.exists():
            self.expected |= self._read()

    def _read(self) -> dict[str, Any]:
        try:
            expected = json.loads(self.file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkflowFailure(self.file, [Row(error=f"not valid JSON: {error}")]) from error
        if not isinstance(expected, dict) or not isinstance(expected.get("outputs", {}), dict):
            raise WorkflowFailure(self.file, [Row(error="expected an object with `status`, `error` and `outputs`")])
        return expected

    def write(self) -> None:
        """Writes what came out, pictures too, and makes it what is expected. Stated distances stay."""
        described: dict[str, Any] = {"status": self.result.status, "outputs": {}}
        if self.result.status != "success" and self.result.error:
            described["error"] = self.result.error.get("exception_type") or self.result.error.get("type")
        for node_id in self.result.outputs:
            entry = self._describe(node_id)
            pictures = self._list_pictures(node_id)
            if pictures:
                before = self.expected.get("outputs", {}).get(node_id, {}).get("picture", {})
                name = before.get("file", f"{self.file.name.removesuffix(SUFFIX)}.{node_id.replace(':', '_')}.png")
                self._open(pictures[0]).save(self.file.with_name(Path(name).name))
                entry["picture"] = {"file": name, "distance": before.get("distance", DISTANCE)}
            described["outputs"][node_id] = entry
        self.file.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.expected = described

    def find_mismatches(self) -> list[Row]:
        """Returns one row per difference between what was expected and what came out."""
        if self.result.status != self.expected["status"]:
            rows = self._describe_errors()
            if self.expected["status"] != "success" or not rows:
                rows.insert(0, Row(error=f"status is {self.result.status}, expected {self.expected['status']}"))
            return rows
        rows = []
        kind = self.expected.get("error")
        found = (self.result.error or {}).get("exception_type") or (self.result.error or {}).get("type")
        if kind and kind not in (found, str(found).rsplit(".", 1)[-1]):
            rows.append(Row(error=f"the error is {found}, expected {kind}"))
        for node_id, wanted in self.expected.get("outputs", {}).items():
            class_type = self.result.prompt.get(node_id, {}).get("class_type", "")
            if node_id not in self.result.outputs:
                rows.append(Row(node_id, class_type, "", "showed nothing"))
                continue
            shown = self._describe(node_id)
            for key in ("count", "shape", "text"):
                if key in wanted and wanted[key] != shown.get(key):
                    error = f"{key} is {shown.get(key)}, expected {wanted[key]}"
                    rows.append(Row(node_id, class_type, "", error))
            if "picture" in wanted:
                rows += [Row(node_id, class_type, "", text) for text in self._compare(node_id, wanted["picture"])]
        return rows

    def _describe_errors(self) -> list[Row]:
        prompt = self.result.prompt
        rows = []
        for node_id, entry in self.result.node_errors.items():
            for error in entry["errors"]:
                name = error["extra_info"].get("input_name", "")
                details = error["details"]
                text = error["message"] if details in ("", name) else f"{error['message']}: {details}"
                rows.append(Row(node_id, entry["class_type"], name, text))
        error = self.result.error
        if error and "node_id" in error:
            inputs = ", ".join(f"{name}={values[0]!r}" for name, values in error["current_inputs"].items() if values)
            text = f"{error['exception_type']}: {error['exception_message']}"
            rows.insert(0, Row(error["node_id"], error["node_type"], inputs, text))
        elif error and not rows:
            found = [node_id for node_id in prompt if f"'#{node_id}'" in error["details"]]
            node_id = found[0] if found else ""
            class_type = str(prompt.get(node_id, {}).get("class_type", ""))
            rows.append(Row(node_id, class_type, "", error["message"]))
        return rows

    def _list_pictures(self, node_id: str) -> list[Path]:
        folders = {"output": self.runner.host.output_dir, "temp": self.runner.host.temp_dir}
        return [
            folders[item["type"]] / (item.get("subfolder") or "") / item["filename"]
            for item in self._list_items(node_id)
            if isinstance(item, Mapping) and item.get("type") in folders and str(item.get("filename")).endswith(".png")
        ]

    def _list_items(self, node_id: str) -> list[Any]:
        ui = self.result.outputs[node_id]
        return [item for items in ui.values() if isinstance(items, (list, tuple)) for item in items]

    def _describe(self, node_id: str) -> dict[str, Any]:
        """Returns how many things a node showed, the shape of its pictures (height, width, channels), its texts."""
        entry: dict[str, Any] = {"count": len(self._list_items(node_id))}
        pictures = self._list_pictures(node_id)
        if pictures:
            picture = self._open(pictures[0])
            entry["shape"] = [picture.height, picture.width, len(picture.getbands())]
        texts = [item for item in self._list_items(node_id) if isinstance(item, str)]
        if texts:
            entry["text"] = texts
        return entry

    def _open(self, path: Path) -> Any:
        from PIL import Image

        with Image.open(path) as picture:
            picture.load()
            return picture

    def _compare(self, node_id: str, wanted: Mapping[str, Any]) -> list[str]:
        from PIL import ImageChops, ImageStat

        stored = self.file.with_name(Path(str(wanted.get("file"))).name)
        if not stored.is_file():
            return [f"the stored picture {stored.name} is not there: --comfy-update writes it"]
        pictures = self._list_pictures(node_id)
        if not pictures:
            return ["showed no picture"]
        picture, expected = self._open(pictures[0]).convert("RGB"), self._open(stored).convert("RGB")
        if picture.size != expected.size:
            return [f"the picture has {picture.size} pixels, {stored.name} has {expected.size}"]
        mean = ImageStat.Stat(ImageChops.difference(picture, expected)).mean
        distance = sum(mean) / len(mean) / 255
        limit = wanted.get("distance", DISTANCE)
        if distance <= limit:
            return []
        return [f"the picture is {distance:.4f} away from {stored.name}, expected at most {limit}"]
