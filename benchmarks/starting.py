"""Starting: what a host pays to import the pack, and a command from nothing to pictures on the disk.

Each run is a process of its own, beside a script that does the same with diffusers' classes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from pairs import Case, Outputs, Pair
from PIL import Image
from trial_models import DEMO_MODEL

EXAMPLE = Path(__file__).parents[1] / "example_workflows" / "demo_text_to_image.json"
# A rounding difference of 1e-6 may still turn a number of 0 to 255 into its neighbour.
PIXEL_TOLERANCE = 1.5 / 255

IMPORT_PEER = "from diffusers import KolorsPipeline"
# The example's prompts, seed, steps and guidance.
DRAW_PEER = """
import sys, torch
from diffusers import KolorsPipeline
pipeline = KolorsPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32, variant="fp16")
prompts = ["a red circle on a white background", "黑色背景上的黄色正方形", "a green triangle on a grey background",
           "白色背景上的蓝色星形"]
pictures = pipeline(prompts, negative_prompt=[""] * 4, height=128, width=128, num_inference_steps=25,
                    guidance_scale=5.0, generator=torch.Generator().manual_seed(7)).images
for number, picture in enumerate(pictures):
    picture.save(f"{sys.argv[2]}/{number}.png")
"""


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows."""
    cases = [
        Case(name="start import", build=build_import_pair, pairs=2 if quick else 5),
        Case(name="start to four pictures", build=build_command_pair),
    ]
    return cases[:1] if quick else cases


def build_import_pair() -> Pair:
    """Pairs importing the pack, as a host does at its start, with importing diffusers' pipeline, as other packs do."""
    return Pair(
        ours=lambda: [run_python("-c", "import kolors_nodes")],
        peer=lambda: [run_python("-c", IMPORT_PEER)],
        peer_name="import of KolorsPipeline",
        tolerance=0.0,
        note="a process each; what is compared is that both end well",
    )


def build_command_pair() -> Pair:
    """Pairs the command on the bundled model with a script around diffusers' pipeline."""
    return Pair(
        ours=lambda: draw("-m", "kolors_nodes", "run", str(EXAMPLE), "--device", "cpu", "--output-dir"),
        peer=lambda: draw("-c", DRAW_PEER, str(DEMO_MODEL)),
        peer_name="script around KolorsPipeline",
        tolerance=PIXEL_TOLERANCE,
        note="four pictures of 128 x 128 pixels, 25 steps; a process each",
    )


def run_python(*arguments: str) -> torch.Tensor:
    """Runs Python in a process of its own and gives its exit status.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-W", "ignore", *arguments]
    ended = subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return torch.tensor([float(ended.returncode)])


def draw(*arguments: str) -> Outputs:
    """Runs a command whose last argument is the folder for its pictures, and reads these."""
    with tempfile.TemporaryDirectory() as folder:
        run_python(*arguments, folder)
        files = sorted(Path(folder).rglob("*.png"))
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        return [torch.from_numpy(np.stack(pictures))]
