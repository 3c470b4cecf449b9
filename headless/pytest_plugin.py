"""A pytest plugin: every workflow file becomes a test, and tests get a runner.

``pytest --comfy-workflows FOLDER --comfy-nodes PACK`` runs each workflow without ComfyUI. An expectation beside it,
``name.expect.json``, says what has to come out; ``--comfy-update`` writes it. The page README.md of this folder
describes its form.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .expectations import SUFFIX, Expectation, WorkflowFailure

if TYPE_CHECKING:
    from .runner import Runner, RunResult

ROOTS: pytest.StashKey[list[Path]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of this plugin."""
    group = parser.getgroup("comfy", "ComfyUI workflows")
    group.addoption("--comfy-workflows", action="append", default=[], metavar="DIR_OR_FILE",
                    help="run these workflows as tests (repeatable)")  # fmt: skip
    group.addoption("--comfy-nodes", action="append", default=[], metavar="PACK",
                    help="a node pack, a folder or a .py file, that the workflows need (repeatable)")  # fmt: skip
    group.addoption("--comfy-input-dir", metavar="DIR", help="where pictures to load are (default: ./input)")
    group.addoption("--comfy-models-dir", metavar="DIR", help="model folders as ComfyUI has them (default: ./models)")
    group.addoption("--comfy-update", action="store_true", help="write the expectations anew from what comes out")


def pytest_configure(config: pytest.Config) -> None:
    """Has the workflows collected beside whatever else was asked for."""
    roots = []
    for name in config.getoption("--comfy-workflows"):
        root = Path(name).absolute()
        if not root.exists():
            raise pytest.UsageError(f"--comfy-workflows {name}: there is no such file or folder.")
        roots.append(root)
    config.stash[ROOTS] = roots
    if roots and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []  # no test files were named: the workflows alone
    config.args += [str(root) for root in roots]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> WorkflowFile | None:
    """Takes the workflow files in the folders that were named; other JSON files only when named themselves."""
    if file_path.suffix != ".json" or file_path.name.endswith(SUFFIX):
        return None
    roots = parent.config.stash[ROOTS]
    if file_path in roots or (any(root in file_path.parents for root in roots) and _is_workflow(file_path)):
        return WorkflowFile.from_parent(parent, path=file_path)
    return None


def _is_workflow(path: Path) -> bool:
    from .workflow import WorkflowError, load_workflow

    try:
        load_workflow(path)
    except WorkflowError:
        return False
    return True


class WorkflowFile(pytest.File):
    """A workflow file, with one test."""

    def collect(self) -> Iterator[WorkflowItem]:
        yield WorkflowItem.from_parent(self, name="runs")


class WorkflowItem(pytest.Item):
    """The test of a workflow: it runs, and what comes out is as its expectation says."""

    def runtest(self) -> None:
        with tempfile.TemporaryDirectory(prefix="comfy-workflow-") as folder:
            runner = make_runner(self.config, Path(folder))
            result = runner.run(self.path)
            expectation = Expectation(self.path, runner, result)
            if self.config.getoption("--comfy-update"):
                expectation.write()
            rows = expectation.find_mismatches()
            if rows:
                raise WorkflowFailure(self.path, rows)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, WorkflowFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"workflow {self.path.name}"


def make_runner(config: pytest.Config, folder: Path, nodes: Mapping[str, type] | None = None) -> Runner:
    """Returns a runner whose files go under `folder`, over the node classes given or those of ``--comfy-nodes``."""
    from .packs import PackError, load_pack
    from .runner import Runner

    if nodes is None:
        nodes = {}
        for pack in config.getoption("--comfy-nodes"):
            try:
                nodes = {**nodes, **load_pack(pack)}
            except PackError as error:
                raise pytest.UsageError(f"--comfy-nodes {error}") from error
    return Runner(
        nodes,
        input_dir=config.getoption("--comfy-input-dir"),
        models_dir=config.getoption("--comfy-models-dir"),
        output_dir=folder,
    )


@pytest.fixture
def comfy_nodes(request: pytest.FixtureRequest) -> Mapping[str, type] | None:
    """The node classes of `comfy_runner`; override it with your NODE_CLASS_MAPPINGS. Default: ``--comfy-nodes``."""
    return None


@pytest.fixture
def comfy_runner(request: pytest.FixtureRequest, tmp_path: Path, comfy_nodes: Mapping[str, type] | None) -> Runner:
    """A runner of ComfyUI graphs, whose output folder is the test's own."""
    return make_runner(request.config, tmp_path / "output", comfy_nodes)


@pytest.fixture
def run_workflow(comfy_runner: Runner) -> Callable[..., RunResult]:
    """Runs a workflow file: ``run_workflow(path, **overrides)``.

    An override is ``{"NODE.INPUT": value}``, where NODE is an id, or a title or class that only one node has. As a
    keyword, ``NODE__INPUT=value`` or, where only one node has such an input, ``INPUT=value``.
    """

    def run(path: str | Path, **overrides: Any) -> RunResult:
        from .conversion import to_prompt
        from .graph import Graph
        from .host import use_host
        from .settings import set_inputs
        from .workflow import load_workflow

        with use_host(comfy_runner.host):
            prompt = to_prompt(load_workflow(path), comfy_runner.nodes)
            set_inputs(Graph(prompt, comfy_runner.nodes), overrides)
        return comfy_runner.run(prompt)

    return run
