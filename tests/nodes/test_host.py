"""What nodes ask of a host that needs no ComfyUI to be tested: stopping within a forward pass, room on the device."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kolors_nodes.headless.host import HeadlessHost, Interrupted
from kolors_nodes.kolors.checkpoint import describe_bytes
from kolors_nodes.kolors.options import SamplingOptions
from kolors_nodes.kolors.prompts import PromptEmbeds
from kolors_nodes.nodes.host import ComfyHost, RunnerHost, stop_between_blocks
from kolors_nodes.nodes.sampler import count_cells


class Stopped(Exception):
    """The host's wish to stop."""


class Blocks(nn.Module):
    """Three blocks that note when they run."""

    def __init__(self):
        super().__init__()
        self.ran = []
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        for index, block in enumerate(self.blocks):
            block.register_forward_hook(lambda *_, index=index: self.ran.append(index))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def run(module: Blocks, raise_if_interrupted) -> None:
    with stop_between_blocks(module, raise_if_interrupted):
        module(torch.zeros(1, 2))


def test_a_wish_to_stop_acts_between_two_blocks():
    module = Blocks()

    def raise_if_interrupted():
        if module.ran == [0]:
            raise Stopped

    with torch.inference_mode(), pytest.raises(Stopped):
        run(module, raise_if_interrupted)
    assert module.ran == [0]


def test_a_training_step_is_not_torn_apart_and_no_hook_stays():
    module = Blocks()

    def raise_if_interrupted():
        raise Stopped

    run(module, raise_if_interrupted)
    assert module.ran == [0, 1, 2]
    assert not any(block._forward_pre_hooks for block in module.blocks)


@pytest.mark.parametrize(
    ("prompts", "guidance_scale", "samples", "expected"),
    [
        (1, 1.0, None, 128 * 64),
        (1, 5.0, None, 2 * 128 * 64),
        (3, 5.0, None, 6 * 128 * 64),
        # The latent's size counts, and one prompt serves many latents.
        (1, 5.0, (4, 4, 32, 16), 8 * 32 * 16),
        (3, 5.0, (1, 4, 32, 16), 6 * 32 * 16),
    ],
)
def test_room_is_asked_for_the_whole_batch(prompts, guidance_scale, samples, expected):
    sequence, pooled = torch.zeros(prompts, 256, 8), torch.zeros(prompts, 8)
    embeds = PromptEmbeds(
        prompt_embeds=sequence, pooled_prompt_embeds=pooled,
        negative_prompt_embeds=sequence, negative_pooled_prompt_embeds=pooled,
    )  # fmt: skip
    options = SamplingOptions(width=1024, height=512, guidance_scale=guidance_scale)
    assert count_cells(embeds, options, None if samples is None else torch.zeros(samples)) == expected


def test_a_line_that_is_shown_is_not_shown_again_but_a_wish_to_stop_is_heard():
    shown = []
    services = HeadlessHost(on_progress=lambda *progress: shown.append(progress))
    host = RunnerHost(services)
    for done in range(0, 2_000, 10):
        host.report_work(done, 2_000, f"Loading: {describe_bytes(done * 10**6, 2 * 10**9)}")
    assert len(shown) == 21  # 0.0 to 2.0 GB
    services.interrupt()
    with pytest.raises(Interrupted):
        host.report_work(2_000, 2_000, "Loading: 1.9 of 2.0 GB")


def test_bytes_are_described_in_the_unit_of_the_whole():
    assert describe_bytes(2_140_000_000, 5_160_000_000) == "2.1 of 5.2 GB"
    assert describe_bytes(900_000, 14_000_000) == "0.9 of 14.0 MB"
    assert describe_bytes(0, 0) == "0.0 of 0.0 kB"


def test_comfyui_s_folders_are_listed_where_only_extra_paths_are_registered(tmp_path, monkeypatch):
    """ComfyUI knows no kind "LLM"; a line of extra_model_paths.yaml registers it without models/LLM."""

    def search(folder: str, excluded_dir_names: list[str]) -> tuple[list[str], dict]:
        return sorted(path.name for path in Path(folder).iterdir()), {}

    registered = {"LLM": ([str(tmp_path / "extra")], set()), "vae": ([str(tmp_path / "models" / "vae")], {".sft"})}
    folder_paths = SimpleNamespace(
        models_dir=str(tmp_path / "models"),
        folder_names_and_paths=registered,
        get_filename_list=lambda kind: [f"what ComfyUI lists of {kind}"],
        recursive_search=search,
        filter_files_extensions=lambda files, extensions: [file for file in files if Path(file).suffix in extensions],
        supported_pt_extensions={".safetensors"},
    )
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    for folder in ("extra", "models/LLM"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{Path(folder).name}.safetensors").touch()
    host = ComfyHost()
    assert host.list_files("LLM") == ["LLM.safetensors", "extra.safetensors"]
    assert host.resolve_file("LLM", "LLM.safetensors") == tmp_path / "models" / "LLM" / "LLM.safetensors"
    assert host.list_files("vae") == ["what ComfyUI lists of vae"]
