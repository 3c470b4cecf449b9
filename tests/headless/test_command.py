"""The `kolors` command: what it prints where, its exit status, and how mistakes are told."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kolors_nodes.headless.command import ProgressBar, main

STUB_PACK = str(Path(__file__).with_name("stub_nodes.py"))


@pytest.fixture
def kolors(tmp_path, monkeypatch, capsys):
    """Runs the command on a prompt (or a file) and returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(prompt, *arguments, pack=STUB_PACK):
        path = prompt
        if isinstance(prompt, dict):
            path = tmp_path / "workflow.json"
            path.write_text(json.dumps(prompt))
        capsys.readouterr()
        status = main(["run", str(path), "--nodes", pack, *arguments])
        return status, *capsys.readouterr()

    return run


def sampler(**inputs):
    good = {"model": ["1", 0], "width": 512, "seed": 1, "cfg": 5.0, "scheduler": "Euler"}
    return {
        "1": {"class_type": "Model", "inputs": {"name": "small", "precise": True}},
        "14": {"class_type": "Sampler", "inputs": {**good, **inputs}, "_meta": {"title": "Second pass"}},
        "3": {"class_type": "Show", "inputs": {"value": ["14", 0]}},
    }


def picture(**save):
    """A graph that saves a black picture, with the stand-ins alone."""
    return {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "in.png"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "pic", **save}},
    }


@pytest.fixture
def input_picture(tmp_path):
    from PIL import Image

    (tmp_path / "input").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "input" / "in.png")


def test_the_paths_of_the_pictures_are_printed(kolors, tmp_path, input_picture):
    status, out, err = kolors(picture())
    assert (status, out, err) == (0, f"{tmp_path / 'output' / 'pic_00001_.png'}\n", "")
    assert (tmp_path / "output" / "pic_00001_.png").is_file()
    assert kolors(picture(), "--output-dir", "other")[1] == f"{tmp_path / 'other' / 'pic_00001_.png'}\n"


def test_json_is_one_object(kolors, tmp_path, input_picture):
    status, out, err = kolors(picture(), "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["status"] == "success"
    assert report["files"] == [str(tmp_path / "output" / "pic_00001_.png")]
    assert report["executed"] == ["2", "3"]
    assert report["outputs"]["3"]["images"][0]["filename"] == "pic_00001_.png"
    assert (report["error"], report["node_errors"], report["messages"]) == (None, {}, [])


def test_json_stays_pure_when_nodes_print(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps({"1": {"class_type": "Printer", "inputs": {"steps": 2}}}))
    command = [sys.executable, "-m", "kolors_nodes", "run", str(path), "--nodes", STUB_PACK, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert json.loads(done.stdout)["outputs"] == {"1": {"text": ["2"]}}
    assert done.stdout.count("\n") == 1
    assert "printed by a node" in done.stderr
    assert "written by a library" in done.stderr
    assert done.returncode == 0


def test_settings_change_inputs_by_id_title_or_class(kolors):
    arguments = ["--set", "14.seed=7", "--set", "Second pass.width=256", "--set", "Model.name=large", "--json"]
    arguments += ["--set", "Model.precise=false", "--set", "Sampler.scheduler=DPM"]
    status, out, _ = kolors(sampler(), *arguments)
    assert status == 0
    assert json.loads(out)["outputs"]["3"]["text"] == ["{'width': 256, 'seed': 7}"]


def test_settings_show_in_the_workflow_that_pictures_carry(kolors, tmp_path, input_picture):
    from PIL import Image

    workflow = {
        "nodes": [
            {"id": 2, "type": "LoadImage", "widgets_values": ["other.png", "image"],
             "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}]},
            {"id": 3, "type": "SaveImage", "widgets_values": ["pic"],
             "inputs": [{"name": "images", "type": "IMAGE", "link": 1}]},
        ],
        "links": [[1, 2, 0, 3, 0, "IMAGE"]],
        "version": 0.4,
    }  # fmt: skip
    assert kolors(workflow, "--set", "2.image=in.png")[0] == 0
    with Image.open(tmp_path / "output" / "pic_00001_.png") as saved:
        carried = json.loads(saved.text["workflow"])
        prompt = json.loads(saved.text["prompt"])
    assert carried["nodes"][0]["widgets_values"] == ["in.png", "image"]
    assert prompt["2"]["inputs"]["image"] == "in.png"
    # And the picture is itself a workflow.
    assert kolors(tmp_path / "output" / "pic_00001_.png")[0] == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("14.seeds=1", ["Sampler has no input seeds", "Did you mean seed?", "width, seed, cfg"]),
        ("99.seed=1", ["no node 99", "14 (Sampler)"]),
        ("seed=1", ["NODE.INPUT=VALUE"]),
        ("14.seed", ["NODE.INPUT=VALUE"]),
    ],
)
def test_settings_that_fit_nothing_list_the_choices(kolors, setting, words):
    status, out, err = kolors(sampler(), "--set", setting)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: --set {setting}: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_class_that_two_nodes_have_names_none(kolors):
    prompt = {**sampler(), "15": sampler()["14"]}
    status, _, err = kolors(prompt, "--set", "Sampler.seed=1")
    assert (status, "14, 15" in err) == (2, True)


MISTAKES = {
    "above the maximum": (
        sampler(cfg=500),
        'error: Sampler "Second pass" (node 14): cfg is 500.0, more than its maximum 20.0. Take 0.0 to 20.0, for '
        "example --set 14.cfg=5.0.\n",
    ),
    "below the minimum": (
        sampler(width=1),
        'error: Sampler "Second pass" (node 14): width is 1, less than its minimum 64. Take 64 to 2048, for example '
        "--set 14.width=1024.\n",
    ),
    "not in the list": (
        sampler(scheduler="Eulr"),
        "error: Sampler \"Second pass\" (node 14): scheduler is 'Eulr', which is not one of: Euler, DPM. For example "
        "--set 14.scheduler=Euler.\n",
    ),
    "no number": (
        sampler(width="wide"),
        "error: Sampler \"Second pass\" (node 14): width is 'wide', which is not a whole number. Correct it, for "
        "example --set 14.width=VALUE.\n",
    ),
    "wrong type": (
        sampler(latent=["1", 0]),
        'error: Sampler "Second pass" (node 14): latent takes LATENT, but output 0 of Model (node 1) is MODEL. '
        "Connect LATENT to it.\n",
    ),
    "missing node": (
        sampler(model=["99", 0]),
        "error: Sampler \"Second pass\" (node 14): model is linked to node '99', which is not in the workflow. "
        "Connect it again in ComfyUI and save the workflow.\n",
    ),
    "missing output": (
        sampler(model=["1", 3]),
        'error: Sampler "Second pass" (node 14): model is linked to output 3 of Model (node 1), which has 1, counted '
        "from 0. Connect it again in ComfyUI and save the workflow.\n",
    ),
    "not connected": (
        {"3": {"class_type": "Show", "inputs": {}}},
        "error: Show (node 3): its input value is not connected. Connect INT,LATENT,STRING,LIST to it.\n",
    ),
    "bad link": (
        sampler(model=["1"]),
        "error: Sampler \"Second pass\" (node 14): model is the list ['1'], but a link is [node id, output index]. "
        "Correct the file.\n",
    ),
    "cycle": (
        {
            "1": {"class_type": "Add", "inputs": {"a": ["2", 0]}},
            "2": {"class_type": "Add", "inputs": {"a": ["1", 0]}},
            "3": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
        },
        "error: The links go round in a circle: 1 (Add) -> 2 (Add) -> 1 (Add). Remove one of them.\n",
    ),
    "unknown node": (
        {"1": {"class_type": "KSamplr", "inputs": {}}},
        "error: KSamplr (node 1): this runner knows no such node. Did you mean Sampler? Load the pack it comes from "
        "with --nodes FOLDER, or mute the node in ComfyUI.\n",
    ),
    "nothing to show": (
        {"1": {"class_type": "Number", "inputs": {"value": 1}}},
        "error: The workflow has nothing to show: no node saves or previews anything, or those that do are muted or "
        "bypassed. Add a SaveImage or PreviewImage node.\n",
    ),
    "refused by the node": (
        {"1": {"class_type": "Checked", "inputs": {"value": 13, "other": 1}}},
        "error: Checked (node 1): 13 brings bad luck\n",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_workflow_are_told_in_a_line(kolors, tmp_path, mistake):
    prompt, message = MISTAKES[mistake]
    assert kolors(prompt) == (2, "", message)
    assert not (tmp_path / "output").exists()


def test_mistakes_come_as_json_too(kolors):
    status, out, err = kolors(sampler(cfg=500), "--json")
    report = json.loads(out)
    assert (status, err, report["status"]) == (2, "", "invalid")
    assert report["error"]["type"] == "prompt_outputs_failed_validation"
    assert report["node_errors"]["14"]["errors"][0]["type"] == "value_bigger_than_max"
    assert "cfg is 500.0" in report["messages"][0]


def test_a_missing_vae_is_told_with_where_it_goes_and_what_fetches_it(kolors, tmp_path):
    prompt = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": "sdxl.vae.safetensors"}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    status, _, err = kolors(prompt)
    assert status == 2
    assert str(tmp_path / "models" / "vae") in err
    assert f'kolors download --what vae --models-dir "{tmp_path / "models"}"' in err
    assert "hint: " in err
    assert "--demo" in err
    err = kolors(prompt, "--models-dir", "elsewhere")[2]
    assert str(tmp_path / "elsewhere" / "vae") in err
    assert f'--models-dir "{tmp_path / "elsewhere"}"' in err


def test_a_failing_node_is_told_in_a_line_and_with_its_traceback_only_when_asked(kolors):
    prompt = {
        "1": {"class_type": "Number", "inputs": {"value": 1}},
        "2": {"class_type": "Fail", "inputs": {"value": ["1", 0], "text": "the disk is full"}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
    }
    assert kolors(prompt) == (1, "", "error: Fail (node 2): the disk is full\n")
    status, _, err = kolors(prompt, "--verbose")
    assert status == 1
    assert "raise ValueError(text)" in err
    report = json.loads(kolors(prompt, "--json")[1])
    assert (report["status"], report["error"]["node_id"]) == ("error", "2")


def test_a_fault_in_a_nodes_code_names_its_kind(kolors):
    prompt = {"1": {"class_type": "Spread", "inputs": {"count": 0}}, "2": {"class_type": "Show", "inputs": {}}}
    prompt["2"]["inputs"]["value"] = ["1", 0]
    status, _, err = kolors(prompt)
    assert status == 1
    assert err.startswith("error: Show (node 2) failed with TypeError: ")
    assert "--verbose" in err


def test_a_partly_valid_graph_runs_and_warns(kolors):
    prompt = {**sampler(), "5": {"class_type": "Show", "inputs": {"value": ["14", 4]}}}
    status, _, err = kolors(prompt)
    assert status == 0
    assert err.startswith("warning: Show (node 5): value is linked to output 4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--output-dir", "workflow.json"], ["workflow.json cannot be written to", "--output-dir"]),
        (["--nodes", "nowhere"], ["nowhere", "no node pack"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_wrong_arguments(kolors, tmp_path, input_picture, arguments, words):
    status, out, err = kolors(picture(), *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err
    report = json.loads(kolors(picture(), *arguments, "--json")[1])
    assert (report["status"], report["error"]["type"]) == ("invalid", "invalid_arguments")
    assert not (tmp_path / "output").exists()


def test_unreadable_workflows(kolors, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name, word in (("absent.json", "cannot be read"), ("broken.json", "not valid JSON")):
        status, out, err = kolors(name)
        assert (status, out, word in err, err.count("\n")) == (2, "", True, 1)


def test_packs_are_loaded_like_comfyui_loads_them(kolors, tmp_path):
    pack = tmp_path / "My.Pack-1"
    pack.mkdir()
    (pack / "inner.py").write_text(Path(STUB_PACK).read_text(encoding="utf-8"), encoding="utf-8")
    (pack / "__init__.py").write_text("from .inner import NODE_CLASS_MAPPINGS\n")
    prompt = {"1": {"class_type": "Checked", "inputs": {"value": 1, "other": 1}}}
    assert kolors(prompt, pack=str(pack))[0] == 0
    broken = {
        "needs_comfy": ("import folder_paths\n", "needs ComfyUI itself"),
        "needs_more": ("import no_such_library\n", "no_such_library"),
        "empty": ("", "NODE_CLASS_MAPPINGS"),
        "raises": ("raise RuntimeError('boom')\n", "RuntimeError: boom"),
    }
    for name, (source, word) in broken.items():
        (tmp_path / f"{name}.py").write_text(source)
        status, _, err = kolors(prompt, pack=str(tmp_path / f"{name}.py"))
        assert (status, word in err, err.count("\n")) == (2, True, 1)


def test_ctrl_c_ends_in_one_line(kolors, monkeypatch):
    from kolors_nodes.headless import stand_ins

    def stop(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stand_ins.EmptyLatentImage, "generate", stop)
    prompt = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}},
    }
    assert kolors(prompt) == (1, "", "error: Interrupted.\n")
    assert json.loads(kolors(prompt, "--json")[1])["status"] == "error"


def test_warnings_of_the_package_are_shown_and_details_only_when_asked(kolors, monkeypatch):
    import logging

    from kolors_nodes.headless import stand_ins

    def generate(self, **_):
        logging.getLogger("kolors_nodes.kolors.prompts").warning("3 tokens are lost")
        logging.getLogger("kolors_nodes.kolors.prompts").debug("a detail")
        return ({},)

    monkeypatch.setattr(stand_ins.EmptyLatentImage, "generate", generate)
    prompt = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}},
        "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
    }
    assert kolors(prompt) == (0, "", "warning: 3 tokens are lost\n")
    assert "debug: a detail" in kolors(prompt, "--verbose")[2]


def test_help_goes_to_stdout(capsys):
    assert main(["run", "--help"]) == 0
    assert "--models-dir" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_nodes_and_steps():
    stream = Terminal()
    with ProgressBar(stream) as bar:
        bar("execution_start", {"nodes": ["1", "2"]})
        bar("executing", {"node": "1", "class_type": "Number"})
        bar("executed", {"node": "1"})
        bar("executing", {"node": "2", "class_type": "Sampler"})
        bar("progress", {"node": "2", "value": 5, "max": 10})
        bar("progress", {"node": "2", "value": 2_500_000_000, "max": 5_000_000_000})
    lines = stream.getvalue().split("\r")
    assert "[------------------------] 1/2 Number (node 1)" in lines
    assert "[##################------] 2/2 Sampler (node 2) 5/10" in [line.rstrip() for line in lines]
    assert "[##################------] 2/2 Sampler (node 2) 2500/5000 MB" in [line.rstrip() for line in lines]
    assert lines[-2].strip() == ""  # cleared at the end
    silent = io.StringIO()
    with ProgressBar(silent) as bar:
        bar("execution_start", {"nodes": []})
        bar("executing", {"node": "1", "class_type": "Number"})
    assert silent.getvalue() == ""


def test_timings_and_a_trace_tell_when_nodes_were_at_work(kolors, tmp_path):
    prompt = {
        "1": {"class_type": "Number", "inputs": {"value": 3}},
        "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
    }
    trace = tmp_path / "trace.json"
    code, out, _ = kolors(prompt, "--json", "--trace", str(trace))
    timings = json.loads(out)["timings"]
    assert [(node_id, entry["class_type"]) for node_id, entry in timings.items()] == [("1", "Number"), ("2", "Show")]
    assert all(0 <= entry["seconds"] < 1 for entry in timings.values())
    events = json.loads(trace.read_text())["traceEvents"]
    assert [(event["ph"], event["name"]) for event in events] == [("X", "Number (node 1)"), ("X", "Show (node 2)")]
    assert events[0]["ts"] == 0 and events[1]["ts"] >= events[0]["dur"]
    code, out, _ = kolors(prompt, "--json", "--trace", str(tmp_path / "absent" / "trace.json"))
    assert code == 0
    assert "cannot be written" in json.loads(out)["messages"][0]


def test_a_blocked_node_is_told(kolors):
    prompt = {
        "1": {"class_type": "Number", "inputs": {"value": 3}},
        "2": {"class_type": "Block", "inputs": {"value": ["1", 0], "how": "message"}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
    }
    code, _, err = kolors(prompt)
    assert code == 0
    assert "Show (node 3) did not run: odd numbers are not welcome" in err
