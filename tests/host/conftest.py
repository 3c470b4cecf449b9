"""A real ComfyUI with a copy of this pack in it. Set ``COMFYUI_PATH`` to a checkout of ComfyUI to run these tests.

``COMFYUI_PYTHON`` is the Python that has ComfyUI's requirements and the pack's; by default the one running the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 180  # a cold start on a busy machine
RUN_SECONDS = 300
# Comma and space, Chinese characters: a folder name as people have them.
BASE_NAME = "Comfy UI 测试"
PACK_NAME = "Kolors-Nodes_1"  # ComfyUI serves no files from a folder with spaces or Chinese characters


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """ComfyUI on the disk."""

    path: Path
    python: str


def copy_pack(destination: Path) -> None:
    """Copies what a clone of the repository would hold, with the changes of the working tree."""
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True,
    ).stdout.decode().split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)


def get_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A running ComfyUI.

    Args:
        checkout: which.
        base: its base folder, with ``custom_nodes``, ``models``, ``input`` and so on.
        flags: for its command line.
    """

    def __init__(self, checkout: Checkout, base: Path, flags: tuple[str, ...] = ("--cpu",)):
        self.base, self.checkout = base, checkout
        self.address = f"127.0.0.1:{get_free_port()}"
        self.log_path = base / f"{self.address.partition(':')[2]}.log"
        command = [checkout.python, str(checkout.path / "main.py"), *flags, "--listen", "127.0.0.1"]
        command += ["--port", self.address.partition(":")[2], "--base-directory", str(base), "--disable-auto-launch"]
        command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=checkout.path, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"ComfyUI ended with status {self.process.returncode}:\n{self.log[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except urllib.error.URLError:
                time.sleep(0.3)
        pytest.fail(f"ComfyUI did not answer in {START_SECONDS} s:\n{self.log[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def post(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}", data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def queue(self, prompt: dict[str, Any], client_id: str = "") -> str:
        """Queues an API prompt and gives its id."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"ComfyUI refused the prompt: {error.read().decode()}")

    def wait_for(self, prompt_id: str) -> dict[str, Any]:
        """Waits for a queued prompt and gives its entry of the history."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        pytest.fail(f"the prompt did not end in {RUN_SECONDS} s:\n{self.log[-3000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Runs an API prompt to its end, which must be a good one; gives its outputs."""
        entry = self.wait_for(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
        return entry["outputs"]

    def get_resident_bytes(self) -> int:
        size = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], check=True, capture_output=True)
        return int(size.stdout) * 1024

    @contextmanager
    def listen(self) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
        """Gives a client id and the messages that ComfyUI sends it; pictures arrive as ``{"type": "preview"}``."""
        websockets = pytest.importorskip("websockets.sync.client", reason="pip install -e '.[host]' for websockets")
        client_id = uuid.uuid4().hex
        address = f"ws://{self.address}/ws?clientId={client_id}"
        with websockets.connect(address, max_size=None, proxy=None) as socket:
            yield client_id, iterate_messages(socket)


def iterate_messages(socket: Any) -> Iterator[dict[str, Any]]:
    while True:
        message = socket.recv(timeout=RUN_SECONDS)
        yield json.loads(message) if isinstance(message, str) else {"type": "preview", "data": message}


@pytest.fixture(scope="session")
def checkout() -> Checkout:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("tests against a real ComfyUI: set COMFYUI_PATH to a checkout of it")
    return Checkout(path=Path(path).absolute(), python=os.environ.get("COMFYUI_PYTHON", sys.executable))


@pytest.fixture(scope="session")
def base(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder for ComfyUI with a copy of this pack, the probe nodes beside it, and a picture to load."""
    base = tmp_path_factory.mktemp("host") / BASE_NAME
    copy_pack(base / "custom_nodes" / PACK_NAME)
    probe = base / "custom_nodes" / "probe"
    probe.mkdir()
    shutil.copy2(Path(__file__).with_name("probe_nodes.py"), probe / "__init__.py")
    (base / "input").mkdir()
    shutil.copy2(ROOT / "example_workflows" / "demo_text_to_image.jpg", base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def make_server(checkout: Checkout, base: Path) -> Iterator[Callable[..., Server]]:
    """Starts ComfyUI with flags; every one is stopped at the end."""
    servers: list[Server] = []

    def make(*flags: str, base: Path = base) -> Server:
        servers.append(Server(checkout, base, flags))
        servers[-1].wait()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Server]) -> Server:
    """The one that most tests share: on the CPU, with previews."""
    return make_server("--cpu", "--preview-method", "latent2rgb")


@pytest.fixture(scope="session")
def pack_name() -> str:
    return PACK_NAME


@pytest.fixture
def demo_prompt() -> dict[str, Any]:
    """The demo workflow in API format, with four steps instead of 25."""
    from kolors_nodes import NODE_CLASS_MAPPINGS
    from kolors_nodes.headless import load_workflow, to_prompt
    from kolors_nodes.headless.stand_ins import with_stand_ins

    workflow = load_workflow(ROOT / "example_workflows" / "demo_text_to_image.json")
    prompt = to_prompt(workflow, with_stand_ins(NODE_CLASS_MAPPINGS))
    find_inputs(prompt, "KolorsSampler")["steps"] = 4
    return prompt


def find_inputs(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """Gives the inputs of a prompt's only node of a class."""
    (node,) = (node for node in prompt.values() if node["class_type"] == class_type)
    return node["inputs"]


@pytest.fixture(scope="session", name="find_inputs")
def _find_inputs() -> Callable[[dict[str, Any], str], dict[str, Any]]:
    return find_inputs
