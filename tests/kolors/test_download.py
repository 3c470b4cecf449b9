"""Fetching from a local hub that speaks both protocols: whole files or none, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from kolors_nodes.kolors import download as downloads
from kolors_nodes.kolors.checkpoint import CheckpointError, find_weight_files, iterate_tensors
from kolors_nodes.kolors.download import DownloadError, choose_files, download, find_missing, is_whole
from kolors_nodes.kolors.hubs import HubError, HubUnreachable, RemoteFile, _Redirects

from .hub_server import HubServer

KOLORS, DIFFUSERS = "Kwai-Kolors/Kolors", "Kwai-Kolors/Kolors-diffusers"
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
HUBS = ("huggingface", "modelscope")


@cache
def make_weights(seed: int, count: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({"weight": torch.randint(256, (count,), dtype=torch.uint8, generator=generator)})


def make_repositories() -> dict[str, dict[str, bytes]]:
    """The published layout, with much that is not needed."""
    shards = {f"text_encoder/model.fp16-0000{i}-of-00002.safetensors": make_weights(i, 100_000) for i in (1, 2)}
    index = {"weight_map": {f"weight{i}": Path(name).name for i, name in enumerate(shards)}}
    pickles = {f"text_encoder/pytorch_model-0000{i}-of-00002.bin": b"\x80\x02" + bytes(1000) for i in (1, 2)}
    unet = {"unet/config.json": b'{"_class_name": "UNet2DConditionModel"}', UNET: make_weights(7, 2_000_000)}
    others = {"README.md": b"#", "imgs/a.png": bytes(9), "unet/diffusion_pytorch_model.safetensors": bytes(99)}
    text = {
        "text_encoder/config.json": b'{"num_layers": 28}',
        "tokenizer/tokenizer.model": b"\n\x0e\n\x05" + bytes(500),
    }
    safe_index = {"text_encoder/model.safetensors.index.fp16.json": json.dumps(index).encode()}
    vae = {"sdxl.vae.safetensors": make_weights(9, 50_000), "sdxl_vae.safetensors": bytes(9), "config.json": b"{}"}
    return {
        KOLORS: {
            **unet,
            **others,
            **pickles,
            **{"text_encoder/config.json": b"{}", "text_encoder/tokenizer.model": b"x"},
        },
        DIFFUSERS: {
            **unet,
            **others,
            **shards,
            **safe_index,
            **text,
            "text_encoder/model-00001-of-00002.safetensors": b"1",
        },
        "madebyollin/sdxl-vae-fp16-fix": vae,
        "AI-ModelScope/sdxl-vae-fp16-fix": vae,
    }


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No setting of the user's: addresses, tokens, proxies."""
    for name in [
        name for name in os.environ if re.match(r"(?i)(HF_|HUGGING_?FACE|MODELSCOPE|TRANSFORMERS_OFF|.*_PROXY$)", name)
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "stored_token"))
    monkeypatch.setattr(downloads, "_PAUSES", (0.0,) * 4)
    monkeypatch.setattr(downloads, "_INTERVAL", 0.0)


@pytest.fixture
def hub(environment, monkeypatch):
    server = HubServer(make_repositories())
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint + "/")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
    yield server
    server.close()


@pytest.fixture
def folders(tmp_path):
    model = tmp_path / "models" / "diffusers" / "Kolors"
    return {"unet": model, "text_encoder": model, "vae": tmp_path / "models" / "vae"}


@pytest.fixture
def unet(folders):
    return {"unet": folders["unet"]}


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def get_part(folder: Path) -> Path:
    (part,) = folder.rglob("*.part")
    return part


def cut_forever(hub: HubServer, path: str, size: int) -> None:
    """Lets ``size`` bytes through, and then nothing."""
    hub.faults.cuts[path] = [size] + [0] * 11  # of two hubs


def test_the_server_speaks_hugging_face(hub, tmp_path):
    """Its own client lists and fetches; in another process, because this one is offline for it from the start."""
    code = """
import sys, json
from huggingface_hub import HfApi, hf_hub_download
endpoint, folder, path = sys.argv[1:]
files = HfApi(endpoint=endpoint).model_info("Kwai-Kolors/Kolors", files_metadata=True).siblings
tree = HfApi(endpoint=endpoint).list_repo_tree("Kwai-Kolors/Kolors", recursive=True)
for name in (path, "unet/config.json"):
    hf_hub_download("Kwai-Kolors/Kolors", name, local_dir=folder, endpoint=endpoint)
print(json.dumps([{file.rfilename: [file.size, file.lfs and file.lfs.sha256] for file in files},
                  {file.path: [file.size, file.lfs and file.lfs.sha256] for file in tree}]))
"""
    settings = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, hub.endpoint, str(tmp_path), UNET]
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    listed, tree = json.loads(result.stdout)
    assert listed == tree
    assert set(listed) == set(hub.repositories[KOLORS])
    assert (tmp_path / UNET).read_bytes() == hub.repositories[KOLORS][UNET]


@pytest.mark.parametrize("source", HUBS)
def test_a_fresh_download(hub, folders, source):
    reports, lines = [], []
    download(folders, source=source, on_progress=lambda *report: reports.append(report), on_line=lines.append)
    model = folders["unet"]
    published = hub.repositories[DIFFUSERS]
    expected = [
        "text_encoder/config.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "tokenizer/tokenizer.model",
        "unet/config.json",
        UNET,
    ]
    assert list_files(model) == expected
    assert all((model / name).read_bytes() == published[name] for name in expected)
    vae = hub.repositories["madebyollin/sdxl-vae-fp16-fix"]["sdxl.vae.safetensors"]
    assert list_files(folders["vae"]) == ["sdxl.vae.safetensors"]
    assert (folders["vae"] / "sdxl.vae.safetensors").read_bytes() == vae
    total = sum(len(published[name]) for name in expected) + len(vae)
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
    assert reports[-1][:2] == (total, total)
    assert lines[0] == f"Source: {source} ({hub.endpoint})."
    assert len(lines) == 1 + len(expected) + 1
    assert sum(request.sent for request in hub.requests if request.path) == total
    assert all(find_missing(folder, part) == [] for part, folder in folders.items())


def test_what_is_there_is_verified_and_not_fetched_again(hub, folders):
    download(folders)
    hub.requests.clear()
    reports = []
    download(folders, on_progress=lambda *report: reports.append(report))
    assert not [request for request in hub.requests if request.path]
    assert any(text.startswith("Checking diffusion_pytorch_model.fp16.safetensors: ") for _, _, text in reports)
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize("source", HUBS)
def test_resumed_after_30_cuts_only_the_rest_is_fetched(hub, unet, source):
    content = hub.repositories[KOLORS][UNET]
    points = sorted(random.Random(source).sample(range(1, len(content)), 30))
    hub.faults.cuts[UNET] = [end - start for start, end in zip([0, *points], points, strict=False)]
    download(unet, source=source)
    assert (unet["unet"] / UNET).read_bytes() == content
    assert hub.count_sent(UNET) == len(content)
    sent = [request for request in hub.requests if request.path == UNET and request.sent]
    assert [request.range for request in sent] == ["", *(f"bytes={point}-" for point in points)]
    assert {request.is_content for request in sent} == {source == "huggingface"}  # the redirect keeps the range


@pytest.mark.parametrize("point", random.Random(0).sample(range(0, 2_000_000), 30))
def test_resumed_by_another_call_after_the_connection_is_gone(hub, unet, point):
    content = hub.repositories[KOLORS][UNET]
    cut_forever(hub, UNET, point)
    with pytest.raises(DownloadError, match="have arrived and are kept; run the same again"):
        download(unet, source="huggingface")
    assert not (unet["unet"] / UNET).exists()
    assert get_part(unet["unet"]).stat().st_size == point
    assert find_missing(unet["unet"], "unet") == [UNET]
    hub.faults.cuts.clear()
    download(unet)
    assert (unet["unet"] / UNET).read_bytes() == content
    assert hub.count_sent(UNET) == len(content)
    assert not list(unet["unet"].rglob(".fetching"))


def test_a_part_is_continued_from_the_other_hub(hub, unet):
    cut_forever(hub, UNET, 700_000)
    with pytest.raises(DownloadError):
        download(unet, source="huggingface")
    hub.faults.cuts.clear()
    download(unet, source="modelscope")
    content = hub.repositories[KOLORS][UNET]
    assert (unet["unet"] / UNET).read_bytes() == content
    assert hub.count_sent(UNET) == len(content)


def test_nothing_partial_is_loaded(hub, folders):
    """Neither the part nor a set that lacks a shard."""
    text = {"text_encoder": folders["text_encoder"]}
    cut_forever(hub, "text_encoder/model.fp16-00002-of-00002.safetensors", 50_000)
    with pytest.raises(DownloadError):
        download(text)
    folder = folders["text_encoder"] / "text_encoder"
    with pytest.raises(CheckpointError, match="1 of 2"):
        find_weight_files(folder)
    assert "text_encoder/model.fp16-00002-of-00002.safetensors" in find_missing(folder.parent, "text_encoder")


def test_a_stopped_download_goes_on(hub, unet):
    class Stopped(Exception):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        download(unet, on_progress=stop)
    kept = get_part(unet["unet"]).stat().st_size
    assert kept > 1_000_000
    hub.requests.clear()
    download(unet)
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]
    assert [request.range for request in hub.requests if request.path == UNET and request.is_content] == [
        f"bytes={kept}-"
    ]


RUN = """
import sys
from pathlib import Path
from kolors_nodes.kolors.download import download
download({"unet": Path(sys.argv[1])}, source="huggingface")
"""


def start_process(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stderr=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_no_file(hub, unet):
    reached = threading.Event()
    hub.gate = lambda count: (reached.set(), time.sleep(60)) if count == 80 else None
    process = start_process(unet["unet"])
    assert reached.wait(60)
    part = get_part(unet["unet"])
    until = time.monotonic() + 30
    while not part.stat().st_size and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stderr.close()
    assert not (unet["unet"] / UNET).exists()
    kept = part.stat().st_size
    assert kept > 0
    hub.gate = lambda count: None
    download(unet)
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]
    assert hub.requests[-1].range == f"bytes={kept}-"


def test_two_processes_at_once_fetch_each_file_once(hub, unet):
    def wait_for_both(count: int) -> None:
        """Holds the first file back until both processes have asked what there is."""
        until = time.monotonic() + 60
        while len([request for request in hub.requests if not request.path]) < 2 and time.monotonic() < until:
            time.sleep(0.01)

    hub.gate = wait_for_both
    processes = [start_process(unet["unet"]) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    content = hub.repositories[KOLORS][UNET]
    assert (unet["unet"] / UNET).read_bytes() == content
    assert hub.count_sent(UNET) == len(content)
    assert list_files(unet["unet"]) == ["unet/config.json", UNET]


def test_two_threads_at_once(hub, unet):
    """Two graphs in one program."""
    hub.gate = lambda count: time.sleep(0.005)
    waited: list[str] = []
    threads = [
        threading.Thread(
            target=download, args=(unet,), kwargs={"on_progress": lambda *report: waited.append(report[2])}
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]
    assert hub.count_sent(UNET) == len(hub.repositories[KOLORS][UNET])
    assert any("another process is fetching it" in text for text in waited)


@pytest.mark.parametrize("source", HUBS)
def test_a_corrupted_byte_is_found_and_the_file_fetched_again(hub, unet, source, caplog):
    hub.faults.corrupt[UNET] = 1
    with caplog.at_level(logging.WARNING):
        download(unet, source=source)
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]
    assert "arrived damaged" in caplog.text


@pytest.mark.parametrize(
    "source, path", [("huggingface", UNET), ("huggingface", "unet/config.json"), ("modelscope", UNET)]
)
def test_a_file_that_always_arrives_corrupted_is_not_kept(hub, unet, source, path):
    """Large files have a SHA-256, small ones on Hugging Face the id of a git blob."""
    hub.faults.corrupt[path] = 9
    with pytest.raises(DownloadError, match=f"{path} from {source} .* arrives damaged"):
        download(unet, source=source)
    assert not (unet["unet"] / path).exists()
    assert not list(unet["unet"].rglob("*.part"))


def test_a_part_with_a_wrong_byte_is_thrown_away(hub, unet):
    cut_forever(hub, UNET, 500_000)
    with pytest.raises(DownloadError):
        download(unet)
    part = get_part(unet["unet"])
    part.write_bytes(bytes(500_000))
    download(unet)
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]


@pytest.mark.parametrize("surplus", [1, 2**20, 3 * 2**20])
def test_a_part_that_is_too_long_is_thrown_away(hub, unet, surplus):
    cut_forever(hub, UNET, 500_000)
    with pytest.raises(DownloadError):
        download(unet)
    part = get_part(unet["unet"])
    part.write_bytes(hub.repositories[KOLORS][UNET] + bytes(surplus))
    reports = []
    download(unet, on_progress=lambda *report: reports.append(report))
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]
    assert reports[-1][0] == reports[-1][1]


def test_a_corrupted_byte_on_the_disk_is_found_and_the_file_left_alone(hub, unet):
    download(unet)
    path = unet["unet"] / UNET
    content = bytearray(path.read_bytes())
    content[1_000_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DownloadError, match="damaged, or a version of your own. Delete or rename it"):
        download(unet)
    assert path.read_bytes() == content
    download(unet, verify=False)


def test_a_truncated_file_on_the_disk_is_fetched_again(hub, unet):
    """Another program's download that was broken off."""
    download(unet)
    path = unet["unet"] / UNET
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_whole(path)
    assert find_missing(unet["unet"], "unet") == [UNET]
    download(unet, verify=False)
    assert path.read_bytes() == hub.repositories[KOLORS][UNET]


def test_one_part_does_not_hide_that_another_is_missing(hub, folders):
    download({"text_encoder": folders["text_encoder"]})
    assert find_missing(folders["unet"], "unet") == ["unet/config.json", UNET]
    hub.requests.clear()
    download({part: folders[part] for part in ("unet", "text_encoder")})
    assert {request.path for request in hub.requests} == {"", "unet/config.json", UNET}


def test_only_the_tokenizer(hub, folders):
    download({"tokenizer": folders["unet"]})
    assert list_files(folders["unet"]) == ["tokenizer/tokenizer.model"]


def test_weights_in_another_form_are_kept(hub, folders):
    """All seven (here two) pickles of Kwai-Kolors/Kolors: what lacks is only the tokenizer."""
    folder = folders["text_encoder"] / "text_encoder"
    folder.mkdir(parents=True)
    for name, content in hub.repositories[KOLORS].items():
        if name.startswith("text_encoder/") and not name.endswith(".model"):
            (folder.parent / name).write_bytes(content)
    before = list_files(folder)
    download({"text_encoder": folders["text_encoder"]})
    assert list_files(folder) == before
    assert (folder.parent / "tokenizer" / "tokenizer.model").is_file()


def test_pickles_where_a_hub_has_nothing_else(hub, folders):
    del hub.repositories[DIFFUSERS]
    download({"text_encoder": folders["text_encoder"]}, source="modelscope")
    assert list_files(folders["text_encoder"]) == [
        "text_encoder/config.json",
        "text_encoder/pytorch_model-00001-of-00002.bin",
        "text_encoder/pytorch_model-00002-of-00002.bin",
        "text_encoder/tokenizer.model",
    ]


@pytest.mark.parametrize("name", ["unet/config.json", "tokenizer/tokenizer.model", "sdxl.vae.safetensors"])
def test_a_file_that_no_repository_holds_is_named(hub, folders, name):
    for files in hub.repositories.values():
        for path in [path for path in files if path.endswith((name, "tokenizer.model" if "token" in name else name))]:
            del files[path]
    hub.repositories["madebyollin/sdxl-vae-fp16-fix"] = (
        {"README.md": b""} if "vae" in name else {"sdxl.vae.safetensors": b"1"}
    )
    part = {"u": "unet", "t": "text_encoder", "s": "vae"}[name[0]]
    with pytest.raises(DownloadError, match=f"huggingface .* holds no {name}"):
        download({part: folders[part]})
    assert not folders[part].exists() or list_files(folders[part]) == []


def test_a_shard_that_the_repository_lacks_is_told(hub, folders):
    for repository in (KOLORS, DIFFUSERS):
        files = hub.repositories[repository]
        for path in [path for path in files if "-00002-of-" in path]:
            del files[path]
    with pytest.raises(DownloadError, match="1 of 2 shards: text_encoder/.*-00001-of-00002"):
        download({"text_encoder": folders["text_encoder"]})


def test_a_shard_that_only_the_index_names_is_told(hub, folders):
    files = hub.repositories[DIFFUSERS]
    name = "text_encoder/model.safetensors.index.fp16.json"
    files[name] = files[name].replace(b"-00002-of-00002", b"-00003-of-00003")
    with pytest.raises(DownloadError, match="model.fp16-00003-of-00003.safetensors is still missing"):
        download({"text_encoder": folders["text_encoder"]})


@pytest.mark.parametrize("source", HUBS)
def test_a_file_that_the_listing_holds_and_the_hub_has_not(hub, unet, source):
    hub.faults.lost = {UNET}
    with pytest.raises(DownloadError, match=f"{source} .* answers 404 .*{UNET}.*Try the other source"):
        download(unet, source=source)


@pytest.mark.parametrize("source", HUBS)
def test_no_such_repository(hub, folders, source):
    hub.repositories.clear()
    with pytest.raises(DownloadError, match=f"{source} .* answers 404 .* for Kwai-Kolors/Kolors"):
        download({"unet": folders["unet"]}, source=source)


@pytest.mark.parametrize("source, hint", [("huggingface", "hf auth login"), ("modelscope", "MODELSCOPE_API_TOKEN")])
@pytest.mark.parametrize("token", ["", "wrong-secret"])
def test_a_missing_or_wrong_token_says_how_to_give_one(hub, unet, monkeypatch, caplog, source, hint, token):
    hub.token = "right"
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.setenv(name, token)
    with caplog.at_level(logging.DEBUG), pytest.raises(DownloadError, match=f"answers 401 .*{hint}") as error:
        download(unet, source=source)
    assert "secret" not in f"{error.value}{caplog.text}"


def test_a_gated_repository(hub, unet):
    hub.faults.statuses = {KOLORS: 403, DIFFUSERS: 403}
    with pytest.raises(DownloadError, match="answers 403 .*Accept the conditions"):
        download(unet)


@pytest.mark.parametrize("way", ["HF_TOKEN", "stored", "MODELSCOPE_API_TOKEN"])
def test_the_users_token_goes_to_the_hub_and_to_nobody_else(hub, unet, monkeypatch, tmp_path, way):
    hub.token = "right-secret"
    if way == "stored":
        (tmp_path / "stored_token").write_text("right-secret\n")
    else:
        monkeypatch.setenv(way, "right-secret")
    download(unet, source="modelscope" if way.startswith("MODEL") else "huggingface")
    assert all(("right-secret" in request.token) != request.is_content for request in hub.requests)
    assert way.startswith("MODEL") or any(request.is_content for request in hub.requests)


def test_a_redirect_off_encryption_is_refused():
    from urllib.error import HTTPError
    from urllib.request import Request

    request = Request("https://hub.example/file", headers={"Authorization": "Bearer x", "Range": "bytes=5-"})
    with pytest.raises(HTTPError, match="unencrypted"):
        _Redirects().redirect_request(request, None, 302, "Found", {}, "http://hub.example/file")
    same = _Redirects().redirect_request(request, None, 302, "Found", {}, "https://hub.example/other")
    other = _Redirects().redirect_request(request, None, 302, "Found", {}, "https://content.example/other")
    assert (same.get_header("Authorization"), other.get_header("Authorization")) == ("Bearer x", None)
    assert same.get_header("Range") == other.get_header("Range") == "bytes=5-"


def test_too_little_room_is_told_before_anything_is_fetched(hub, unet, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**26 + 2_000_000})())
    with pytest.raises(DownloadError, match=r"has 69.1 MB free, the download needs 2.0 MB"):
        download(unet)
    assert not [request for request in hub.requests if request.path]
    cut_forever(hub, UNET, 500_000)
    monkeypatch.undo()


def test_what_has_arrived_needs_no_room(hub, unet, monkeypatch):
    cut_forever(hub, UNET, 1_500_000)
    with pytest.raises(DownloadError):
        download(unet)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**26 + 600_000})())
    download(unet)


def test_a_disk_that_fills_up(hub, unet, monkeypatch):
    open_file = Path.open

    class FullDisk:
        """Takes a million bytes, and then as a full disk the half of what it is given."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, chunk):
            if self.file.tell() + len(chunk) > 1_000_000:
                self.file.write(chunk[: len(chunk) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(chunk)

    def open_on_full_disk(path, mode="r", *arguments, **options):
        file = open_file(path, mode, *arguments, **options)
        return FullDisk(file) if path.suffix == ".part" and UNET.rpartition("/")[2] in path.name else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(DownloadError, match="The disk is full: .* What has arrived is kept; make room"):
            download(unet)
    assert not (unet["unet"] / UNET).exists()
    kept = get_part(unet["unet"]).stat().st_size
    download(unet)
    assert (unet["unet"] / UNET).read_bytes() == hub.repositories[KOLORS][UNET]
    assert hub.requests[-1].range == f"bytes={kept}-"


def test_a_folder_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written .*permissions"):
        download({"vae": tmp_path / "file"})


def test_a_server_that_ignores_ranges(hub, unet):
    content = hub.repositories[KOLORS][UNET]
    hub.faults.ignores_ranges = True
    hub.faults.cuts[UNET] = [1_900_000, 500_000]
    reports = []
    download(unet, on_progress=lambda *report: reports.append(report))
    assert (unet["unet"] / UNET).read_bytes() == content
    assert hub.count_sent(UNET) == 1_900_000 + 500_000 + len(content)
    assert reports[-1][0] == reports[-1][1]


def test_a_server_that_ignores_ranges_and_always_breaks_off_is_given_up(hub, unet):
    hub.faults.ignores_ranges = True
    hub.faults.cuts[UNET] = [1_000_000] * 20
    with pytest.raises(DownloadError, match="have arrived and are kept"):
        download(unet, source="huggingface")
    assert len(hub.faults.cuts[UNET]) >= 12


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_for_a_moment(hub, unet, status):
    hub.faults.statuses = {UNET: status}
    threading.Timer(0.3, hub.faults.statuses.clear).start()
    downloads._PAUSES = (0.2,) * 4  # the fixture sets it back
    download(unet)
    assert (unet["unet"] / UNET).is_file()


@pytest.mark.parametrize("name", [
    "../../escaped.safetensors", "/tmp/escaped.safetensors", "unet/../../escaped.safetensors",
    "unet/..\\..\\escaped.safetensors", "C:\\escaped.safetensors", "unet/CON",
])  # fmt: skip
@pytest.mark.parametrize("source", HUBS)
def test_a_listing_never_leads_out_of_the_folder(hub, unet, tmp_path, source, name):
    for repository in (KOLORS, DIFFUSERS):
        hub.repositories[repository] = {name: b"evil", **hub.repositories[repository]}
    before = set(tmp_path.rglob("*"))
    download(unet, source=source)
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert new == {unet["unet"] / "unet" / "config.json", unet["unet"] / UNET}
    assert not any(request.path == name for request in hub.requests)


def test_an_index_never_leads_out_of_the_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    index = {"weight_map": {"a": "../../../etc/passwd"}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert find_missing(tmp_path, "unet") == ["unet/passwd"]


def test_names_are_safe_on_windows(hub, folders):
    names = set()
    hub.gate = lambda count: names.update(path.name for folder in folders.values() for path in folder.rglob("*"))
    download(folders)
    assert any(name.endswith(".part") for name in names)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,80}", name) and not name.endswith(".") for name in names)


def test_parts_of_other_versions_are_removed(hub, unet):
    work = unet["unet"] / "unet" / ".fetching"
    work.mkdir(parents=True)
    old = work / "diffusion_pytorch_model.fp16.safetensors.000000000000.part"
    other = work / "config.json.bak.000000000000.part"
    old.write_bytes(b"old")
    other.write_bytes(b"other")
    download(unet)
    assert (old.exists(), other.exists()) == (False, True)


def test_without_a_checksum_no_part_of_another_call_is_continued(hub, unet):
    """Nobody could tell whether it is of the same version."""
    hub.faults.keeps_checksums = True
    cut_forever(hub, UNET, 500_000)
    with pytest.raises(DownloadError):
        download(unet, source="modelscope")
    assert get_part(unet["unet"]).stat().st_size == 500_000
    content = hub.repositories[KOLORS][UNET]
    hub.faults.cuts[UNET] = [300_000]
    hub.requests.clear()
    lines = []
    download(unet, source="modelscope", on_line=lines.append)
    assert (unet["unet"] / UNET).read_bytes() == content
    assert [request.range for request in hub.requests if request.path == UNET] == ["", "bytes=300000-"]
    assert lines[-1].endswith("verified, by its size only: the hub gives no checksum.")


def close_hub(hub: HubServer, monkeypatch, name: str) -> None:
    """Gives a hub an address where nobody listens."""
    hub_there = HubServer({})
    monkeypatch.setenv(name, hub_there.endpoint)
    hub_there.close()


def test_auto_takes_hugging_face(hub, unet):
    assert download(unet) == "huggingface"


def test_auto_takes_modelscope_where_hugging_face_is_out_of_reach(hub, unet, monkeypatch, caplog):
    close_hub(hub, monkeypatch, "HF_ENDPOINT")
    with caplog.at_level(logging.INFO):
        assert download(unet) == "modelscope"
    assert "huggingface (http://127.0.0.1" in caplog.text
    assert f"Source: modelscope ({hub.endpoint})." in caplog.text
    with pytest.raises(DownloadError, match="huggingface .* does not answer .* HTTPS_PROXY"):
        download(unet, source="huggingface")


def test_auto_takes_modelscope_where_hugging_face_fails(hub, unet, monkeypatch):
    failing = HubServer({})
    failing.faults.statuses = {KOLORS: 502}
    monkeypatch.setenv("HF_ENDPOINT", failing.endpoint)
    assert download(unet) == "modelscope"
    failing.close()


def test_auto_goes_on_with_modelscope_where_hugging_face_stops(hub, unet, monkeypatch, caplog):
    """Its content server may be out of reach where the hub itself answers."""
    stopping = HubServer(make_repositories())
    monkeypatch.setenv("HF_ENDPOINT", stopping.endpoint)
    cut_forever(stopping, UNET, 600_000)
    assert download(unet) == "modelscope"
    content = hub.repositories[KOLORS][UNET]
    assert (unet["unet"] / UNET).read_bytes() == content
    assert (stopping.count_sent(UNET), hub.count_sent(UNET)) == (600_000, len(content) - 600_000)
    assert "600.0 kB of 2.0 MB have arrived and are kept" in caplog.text
    stopping.close()


def test_a_page_in_place_of_a_listing_is_no_answer(hub, unet, monkeypatch):
    """A captive portal, or an address that is no hub."""
    strange = HubServer({})
    monkeypatch.setenv("HF_ENDPOINT", f"{strange.content_endpoint}/")
    strange.repositories = {"api/models": {}}
    from http.server import BaseHTTPRequestHandler

    monkeypatch.setattr(
        strange._content.RequestHandlerClass,
        "do_GET",
        lambda handler: (
            BaseHTTPRequestHandler.send_response(handler, 200)
            or handler.send_header("Content-Length", "6")
            or handler.end_headers()
            or handler.wfile.write(b"<html>")
        ),
    )
    assert download(unet) == "modelscope"
    strange.close()


def test_nobody_answers(hub, unet, monkeypatch):
    hub.faults.silent = True
    with pytest.raises(DownloadError, match="modelscope .* does not answer .*Check the connection"):
        download(unet)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nothing_is_asked(hub, unet, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download(unet, source="modelscope")
    assert not hub.requests


def test_proxies_of_the_environment_are_used(hub, unet, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.endpoint)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the content
    assert download(unet) == "huggingface"


def test_the_old_name_of_modelscopes_address(hub, unet, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.endpoint)
    assert download(unet, source="modelscope") == "modelscope"


def test_wrong_arguments(unet):
    with pytest.raises(ValueError, match="No source 'ftp'"):
        download(unet, source="ftp")
    with pytest.raises(ValueError, match="parts"):
        download({"scheduler": unet["unet"]})


def test_what_is_missing_is_what_the_loader_misses(tmp_path):
    """Over random halves of the published layouts: nothing is missing exactly where the loader finds its files."""
    generator = random.Random(3)
    shards = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    safe = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {str(i): name for i, name in enumerate(safe)}}
    contents = {name: b"\x80\x02" for name in shards} | {name: make_weights(1, 5) for name in safe}
    contents |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model.fp16.safetensors": make_weights(1, 5),
    }
    outcomes = set()
    for number in range(200):
        folder = tmp_path / str(number) / "text_encoder"
        folder.mkdir(parents=True)
        for name in [name for name in contents if generator.random() < 0.6]:
            (folder / name).write_bytes(contents[name])
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.model").write_text("x")
        missing = find_missing(folder.parent, "text_encoder")
        try:
            list(iterate_tensors([file for file in find_weight_files(folder) if file.suffix == ".safetensors"]))
        except CheckpointError:
            assert missing
        else:
            assert missing == []
        assert not any((folder.parent / name).is_file() for name in missing)
        outcomes.add(bool(missing))
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"PK\x03\x04 broken", make_weights(1, 9)[:-1], make_weights(1, 9) + b"x"]
)
def test_what_is_not_whole(tmp_path, content):
    path = tmp_path / f"file.{'bin' if content.startswith(b'PK') else 'safetensors'}"
    path.write_bytes(content)
    assert not is_whole(path)


def test_what_is_whole(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(make_weights(1, 9))
    assert is_whole(path)
    torch.save({"weight": torch.ones(3)}, tmp_path / "file.bin")
    assert is_whole(tmp_path / "file.bin")
    content = (tmp_path / "file.bin").read_bytes()
    (tmp_path / "file.bin").write_bytes(content[: len(content) // 2])
    assert not is_whole(tmp_path / "file.bin")


def make_listing(*names: str) -> dict[str, RemoteFile]:
    return {name: RemoteFile(path=name, size=1, url="http://x/") for name in ("unet/config.json", *names)}


@pytest.mark.parametrize("names, chosen", [
    (["model.safetensors", "model.fp16.safetensors", "model.bin"], ["model.fp16.safetensors"]),
    (["model.safetensors", "model.fp16.bin"], ["model.safetensors"]),
    (["model.fp16.bin", "model.bin"], ["model.fp16.bin"]),
    (["model-00001-of-00001.fp16.safetensors", "model.safetensors"], ["model-00001-of-00001.fp16.safetensors"]),
    (["model.fp16-00001-of-00002.safetensors", "model.bin"], ["model.bin"]),
    (["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
     ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
])  # fmt: skip
def test_half_precision_first_and_safetensors_before_pickles(names, chosen):
    def complete(name: str) -> str:
        return f"unet/{name.replace('model', 'diffusion_pytorch_model', 1)}"

    listed = make_listing(*(complete(name) for name in names))
    assert list(choose_files("unet", listed, "here")) == ["unet/config.json", *(complete(name) for name in chosen)]


def test_errors_are_told_apart():
    assert issubclass(HubUnreachable, HubError)
    with pytest.raises(HubError, match="here holds no unet/diffusion_pytorch_model.fp16.safetensors"):
        choose_files("unet", make_listing(), "here")
