"""The pack while ComfyUI runs it: memory, previews, cancelling, flags, neighbours."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import time

import pytest
from PIL import Image

GROWTH = 0.02  # of the resident size
TEXT_EVENT = b"\0\0\0\3"  # how a message begins that carries a line of text for a node
RIVAL = '''"""A pack with some of the same node ids."""


class Rival:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "rival"

    def run(self):
        return ()


NODE_CLASS_MAPPINGS = {"KolorsApplyLora": Rival, "KolorsSaveLora": Rival}
'''


def test_twenty_runs_do_not_grow(server, demo_prompt, find_inputs):
    """New words and a new seed each time, so that every run encodes, samples and decodes."""
    sizes = []
    for number in range(21):
        find_inputs(demo_prompt, "KolorsSampler")["seed"] = number
        find_inputs(demo_prompt, "KolorsTextEncode")["prompt"] = f"a red circle {number}|a blue star {number}"
        server.run(demo_prompt)
        sizes.append(server.get_resident_bytes())
    print("resident MB:", [size // 2**20 for size in sizes])
    # The first run loads; the twenty after it must not add to it.
    assert sizes[-1] < sizes[0] * (1 + GROWTH)


def test_a_stranger_s_model_evicts_ours_and_we_come_back(server, demo_prompt, find_inputs):
    sampler = find_inputs(demo_prompt, "KolorsSampler")
    (sampler_id,) = (node_id for node_id, node in demo_prompt.items() if node["inputs"] is sampler)
    sampler["seed"] = 4242
    before = read_pictures(server, server.run(demo_prompt))
    # In the same graph, so that ComfyUI keeps our models; by its input it runs when we have sampled.
    demo_prompt["probe"] = {"class_type": "ProbeLoadModel", "inputs": {"seed": 0, "latent": [sampler_id, 0]}}
    sampler["seed"] = 4243
    seen = server.run(demo_prompt)["probe"]
    assert "UNet2DConditionModel" in seen["before"]
    assert seen["after"] == ["Linear"]
    sampler["seed"] = 4242
    assert read_pictures(server, server.run(demo_prompt)) == before


def test_unloading_on_wish_frees_everything_and_the_next_run_works(server, demo_prompt, find_inputs):
    server.run(demo_prompt)
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)  # the queue's thread looks once a second
    probe = {"1": {"class_type": "ProbeLoadModel", "inputs": {"seed": time.time_ns() % 2**32}}}
    assert server.run(probe)["1"]["before"] == []
    find_inputs(demo_prompt, "KolorsSampler")["seed"] = 77
    server.run(demo_prompt)


def read_pictures(server, outputs) -> list[bytes]:
    """Reads the saved pictures' pixels; the files differ in the workflow that they carry."""
    images = [image for ui in outputs.values() for image in ui.get("images", [])]
    assert images
    return [Image.open(server.base / "output" / image["filename"]).tobytes() for image in images]


def test_shows_progress_and_a_preview_each_step(server, demo_prompt, find_inputs):
    find_inputs(demo_prompt, "KolorsSampler").update(seed=31, steps=5)
    (sampler,) = (node_id for node_id, node in demo_prompt.items() if node["class_type"] == "KolorsSampler")
    progress, previews = [], 0
    with server.listen() as (client_id, messages):
        server.queue(demo_prompt, client_id)
        for message in messages:
            if message["type"] == "preview":
                previews += 1
            elif message["type"] == "progress" and message["data"]["node"] == sampler:
                progress.append((message["data"]["value"], message["data"]["max"]))
            elif message["type"] in ("execution_success", "execution_error"):
                assert message["type"] == "execution_success", message
                break
    assert progress == [(step, 5) for step in range(1, 6)]
    assert previews >= 5


@pytest.mark.parametrize(
    ("class_type", "changes"),
    [
        # Each is long enough to be caught in the act.
        (
            "KolorsTextEncode",
            {"KolorsTextEncode": {"prompt": "|".join(f"a red circle, number {i}" for i in range(900))}},
        ),
        ("KolorsSampler", {"KolorsSampler": {"steps": 200}}),
        ("VAEDecode", {"KolorsSampler": {"steps": 1}, "KolorsTextEncode": {"num_images_per_prompt": 8}}),
    ],
)
def test_cancel_acts_and_the_next_run_works(server, demo_prompt, find_inputs, class_type, changes):
    prompt = copy.deepcopy(demo_prompt)
    for name, inputs in changes.items():
        find_inputs(prompt, name).update(inputs)
    find_inputs(prompt, "KolorsSampler")["seed"] = time.time_ns() % 2**32
    with server.listen() as (client_id, messages):
        server.queue(prompt, client_id)
        steps, asked = 0, None
        for message in messages:
            kind, data = message["type"], message.get("data")
            node = prompt.get(data.get("node") or "", {}) if isinstance(data, dict) else {}
            is_there = kind == ("progress" if class_type == "KolorsSampler" else "executing")
            if asked is None and is_there and node.get("class_type") == class_type:
                time.sleep(0.3)
                server.post("/interrupt")
                asked = time.monotonic()
            elif asked is not None and kind == "progress":
                steps += 1
            elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                break
    print(f"{class_type}: stopped after {time.monotonic() - asked:.2f} s")
    assert kind == "execution_interrupted", message
    # Steps of the time before the wish may still be in the queue of messages.
    assert steps < 100
    assert prompt[data["node_id"]]["class_type"] == class_type
    find_inputs(demo_prompt, "KolorsSampler")["seed"] = time.time_ns() % 2**32
    server.run(demo_prompt)


@pytest.fixture
def full_size_unet(base, reference):
    """A file of the real UNet's names, shapes and size, all zeros; it takes no room on most disks."""
    shapes = json.loads((reference / "kolors" / "unet_state_dict_shapes.json").read_text(encoding="utf-8"))
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path = base / "models" / "diffusion_models" / "kolors zeros.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    yield path
    path.unlink()


def test_loading_says_how_far_it_is_and_cancel_ends_it(server, full_size_unet, demo_prompt):
    (loader,) = (id for id, node in demo_prompt.items() if node["class_type"] == "DownloadAndLoadKolorsModel")
    inputs = {"unet_name": full_size_unet.name, "precision": "bf16"}
    prompt = {**demo_prompt, loader: {"class_type": "LoadKolorsUNet", "inputs": inputs}}
    shares, texts = [], []
    with server.listen() as (client_id, messages):
        server.queue(prompt, client_id)
        for message in messages:
            kind, data = message["type"], message.get("data")
            if kind == "preview" and data[:4] == TEXT_EVENT:
                texts.append(data.decode(errors="replace"))
                server.post("/interrupt")
            elif kind == "progress" and data["node"] == loader:
                shares.append(data["value"] / data["max"])
            elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                break
    assert kind == "execution_interrupted", message
    assert prompt[data["node_id"]]["class_type"] == "LoadKolorsUNet"
    assert shares == sorted(shares) and shares[-1] < 1
    assert re.search(r"Loading kolors zeros.safetensors: [\d.]+ of 5\.2 GB", texts[0])
    server.run(demo_prompt)


@pytest.fixture
def training_prompt():
    """A training on the bundled model and dataset, long enough to be stopped."""
    demo = "kolors-shapes (demo)"
    training = {
        "kolors_model": ["1", 0], "chatglm3_model": ["2", 0], "vae": ["3", 0], "dataset": ["4", 0],
        "name": f"run_{time.time_ns()}", "rank": 4, "alpha": 4.0, "steps": 500, "learning_rate": 1e-3, "batch_size": 2,
        "resolution": 128, "seed": 0, "sample_prompts": "",
    }  # fmt: skip
    return {
        "1": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": demo, "precision": "fp32"}},
        "2": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"model": demo, "precision": "fp32"}},
        "3": {"class_type": "KolorsVAELoader", "inputs": {"vae_name": demo}},
        "4": {"class_type": "KolorsLoraDataset", "inputs": {"folder": demo}},
        "5": {"class_type": "KolorsTrainLora", "inputs": training},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 2]}},
    }


def watch_training(server, prompt, stop_at=None) -> tuple[str, list[int], list[str]]:
    """Runs a training; asks it to stop once it has done steps and told its loss, if a number of steps is given.

    Gives how it ended, its steps and its texts.
    """
    steps, texts = [], []
    with server.listen() as (client_id, messages):
        server.queue(prompt, client_id)
        for message in messages:
            kind, data = message["type"], message.get("data")
            if kind == "preview":
                texts += [data.decode(errors="replace")] if data[:4] == TEXT_EVENT else []
            elif kind == "progress" and data["node"] == "5" and data["max"] == prompt["5"]["inputs"]["steps"]:
                steps.append(data["value"])
                if stop_at is not None and len(steps) >= stop_at and any("loss" in text for text in texts):
                    server.post("/interrupt")
                    stop_at = None
            elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                return kind, steps, texts


def test_cancel_in_training_leaves_a_checkpoint_and_the_next_run_goes_on(server, training_prompt):
    kind, steps, texts = watch_training(server, training_prompt, stop_at=5)
    assert kind == "execution_interrupted"
    # Steps taken while the wish was on its way; at 500 it would have been done.
    assert steps[-1] < 100
    assert any("loss" in text for text in texts)
    folder = server.base / "output" / "kolors_training" / f"{training_prompt['5']['inputs']['name']}-training"
    assert list((folder / "checkpoints").iterdir())
    training_prompt["5"]["inputs"]["steps"] = steps[-1] + 10
    kind, steps_after, _ = watch_training(server, training_prompt)
    assert kind == "execution_success"
    assert steps[-1] < steps_after[0] <= steps[-1] + 2
    assert steps_after[-1] == steps[-1] + 10


def test_cancel_while_pictures_are_encoded_and_the_next_run_works(server, training_prompt):
    """Many random places in pictures that are new each time, so that nothing is cached from another run."""
    folder = server.base / "input" / f"pictures {time.time_ns()}"
    folder.mkdir()
    for number in range(10):
        Image.effect_noise((256, 256), 40 + number).convert("RGB").save(folder / f"{number}.png")
    training_prompt["4"]["inputs"].update(folder=folder.name, caption="noise", center_crop=False, crops=64)
    training_prompt["5"]["inputs"].update(steps=3, seed=time.time_ns() % 2**32)
    with server.listen() as (client_id, messages):
        server.queue(training_prompt, client_id)
        asked, later = False, 0
        for message in messages:
            if message["type"] == "progress" and message["data"]["node"] == "5":
                later += asked
                if not asked and message["data"]["value"] < message["data"]["max"]:
                    server.post("/interrupt")
                    asked = True
            elif message["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                break
    assert message["type"] == "execution_interrupted"
    assert later < 10
    training_prompt["4"]["inputs"]["crops"] = 1
    assert watch_training(server, training_prompt)[0] == "execution_success"


@pytest.fixture(scope="module")
def crowded_server(make_server, base, pack_name, tmp_path_factory):
    """Frugal flags, our folder named with a space and Chinese characters, and a pack with the same ids beside it."""
    crowded = tmp_path_factory.mktemp("crowded")
    for folder in ("input", "custom_nodes/rival"):
        (crowded / folder).mkdir(parents=True)
    (crowded / "custom_nodes" / "Kolors 节点").symlink_to(base / "custom_nodes" / pack_name, target_is_directory=True)
    (crowded / "custom_nodes" / "rival" / "__init__.py").write_text(RIVAL, encoding="utf-8")
    return make_server("--cpu", "--cache-none", "--disable-smart-memory", "--deterministic", base=crowded)


def test_says_who_won_where_another_pack_has_the_same_ids(crowded_server):
    python_module = crowded_server.get("/object_info")["KolorsSaveLora"]["python_module"]
    winner = "rival" if python_module.endswith("rival") else "Kolors Nodes"
    lines = [line for line in crowded_server.log.splitlines() if "both have the nodes" in line]
    assert len(lines) == 1
    assert f"Kolors Nodes and rival both have the nodes KolorsApplyLora, KolorsSaveLora; those of {winner}" in lines[0]


def test_runs_from_any_folder_with_frugal_flags(crowded_server, demo_prompt):
    for _ in range(2):
        crowded_server.run(demo_prompt)


@pytest.mark.parametrize("flag", ["--lowvram", "--novram", "--highvram"])
def test_obeys_memory_flags_on_a_graphics_card(make_server, checkout, demo_prompt, find_inputs, flag):
    question = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([checkout.python, "-c", question]).returncode:
        pytest.skip(f"{flag} needs a graphics card, and ComfyUI's Python sees none")
    server = make_server(flag)
    server.run(demo_prompt)
    probe = {"1": {"class_type": "ProbeLoadModel", "inputs": {"seed": 1}}}
    assert server.run(probe)["1"]["after"] == ["Linear"]
    find_inputs(demo_prompt, "KolorsSampler")["seed"] = 1
    server.run(demo_prompt)
