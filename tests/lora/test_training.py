"""The training loop: against plain torch, against itself after stops, and what it tells when it cannot go on."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from kolors_nodes.kolors.schedulers import build_scheduler
from kolors_nodes.lora.apply import apply_loras
from kolors_nodes.lora.checkpoint import load_newest_checkpoint
from kolors_nodes.lora.files import load_lora
from kolors_nodes.lora.latents import Sample, Text, TrainingData, get_prompt_embeds
from kolors_nodes.lora.options import TrainingError, TrainingOptions
from kolors_nodes.lora.trainee import build_trainee
from kolors_nodes.lora.training import (
    Watcher,
    build_batch,
    describe_memory,
    get_learning_rate_factor,
    get_loss,
    get_loss_weight,
    get_place,
    train,
)

CPU = torch.device("cpu")
SHORT = TrainingOptions(
    rank=4, alpha=2.0, learning_rate=1e-2, train_batch_size=2, max_train_steps=6, precision="32", checkpoint_every=2,
    gradient_checkpointing=False,
)  # fmt: skip
# Everything random at once.
RANDOM = replace(
    SHORT, dropout=0.2, caption_dropout=0.3, noise_offset=0.1, gradient_accumulation_steps=2, lr_schedule="cosine",
    min_snr_gamma=5.0, seed=11,
)  # fmt: skip


def make_data(seed: int = 0) -> TrainingData:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    captions = {"": 2, "one": 5, "two": 9, "old": 6}
    return TrainingData(
        samples=tuple(
            Sample(name=f"{index}.png", caption=caption, latents=draw(2, 4, *size), is_regularization=caption == "old",
                   time_ids=torch.tensor([[80.0, 64, 0, 16, 64, 64], [80.0, 64, 8, 0, 64, 64]]))
            for index, (caption, size) in enumerate(
                [("one", (8, 8)), ("two", (8, 8)), ("one", (8, 4)), ("two", (8, 8)), ("old", (8, 8)), ("old", (8, 8))]
            )
        ),
        captions={caption: Text(rows=draw(1 + n, 32), pooled=draw(32)) for caption, n in captions.items()},
        digest=str(seed),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return make_data()


def run(unet, data, options, folder: Path, **settings):
    return train(unet, data, options, place=get_place(folder, "x"), device="cpu", **settings)


# ---- one step ----


def test_first_loss_and_gradients_equal_plain_torch(unet, data):
    """Written out: 256 text rows, weights W + alpha / rank up down, the textbook's noise and loss."""
    options = replace(SHORT, min_snr_gamma=5.0)
    trainee, parameters = build_trainee(unet, options, CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:  # zero at first, so that the other gradients would be zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    betas = torch.linspace(0.00085**0.5, 0.014**0.5, 1100) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    chosen = list(enumerate(data.samples[:2]))
    batch = build_batch(data, options, chosen, build_scheduler("EulerDiscreteScheduler").alphas_cumprod, CPU)
    loss = get_loss(trainee, batch)
    loss.backward()

    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    weights = dict(unet.named_parameters())
    for name in leaves:
        module, found, _ = name.partition(".lora_A.")
        if found:
            up = leaves[name.replace(".lora_A.", ".lora_B.")]
            weights[f"{module}.weight"] = unet.get_parameter(f"{module}.weight") + 2.0 / 4 * up @ leaves[name]
    from kolors_nodes.lora.order import draw_sample

    losses = []
    for number, sample in chosen:
        draw = draw_sample(sample, seed=options.seed, number=number, num_timesteps=1100, caption_dropout=0.0)
        alpha = alphas_cumprod[draw.timestep]
        noisy = alpha.sqrt() * sample.latents[draw.view] + (1 - alpha).sqrt() * draw.noise
        text = get_prompt_embeds(data.captions[sample.caption], data.captions[""])
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": sample.time_ids[draw.view][None]}
        predicted = functional_call(
            unet, weights, (noisy[None], torch.tensor([draw.timestep])),
            {"encoder_hidden_states": text.prompt_embeds, "added_cond_kwargs": added},
        ).sample[0]  # fmt: skip
        snr = alpha / (1 - alpha)
        losses.append(((predicted - draw.noise) ** 2).mean() * min(float(snr), 5.0) / snr)
    expected = sum(losses) / len(losses)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    reference = torch.cat([leaves[name].grad.flatten() for name in parameters])
    assert float((found - reference).norm() / reference.norm()) < 1e-5
    for name, parameter in parameters.items():
        difference = (parameter.grad - leaves[name].grad).norm() / leaves[name].grad.norm()
        # the keys' gradients are small differences of large sums over 256 equal rows, in float32
        assert float(difference) < 1e-4, name


# Made by this test with torch 2.13 on a CPU; it guards against changes that nobody meant.
GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())


def test_golden_losses_of_20_steps(unet, data, tmp_path):
    result = run(unet, data, replace(SHORT, max_train_steps=20, checkpoint_every=20), tmp_path)
    # float32 kernels of other CPUs and releases round otherwise, and steps amplify that
    assert result.losses == pytest.approx(GOLDEN, rel=2e-3)


def test_learning_rates():
    options = replace(SHORT, lr_warmup_steps=4, max_train_steps=12)

    def get_factors(schedule):
        return [get_learning_rate_factor(step, replace(options, lr_schedule=schedule)) for step in range(12)]

    assert get_factors("constant") == [0.25, 0.5, 0.75] + [1.0] * 9
    assert get_factors("linear")[4:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert get_factors("cosine")[8] == pytest.approx(0.5)


def test_min_snr_weights():
    alphas = torch.tensor([0.99, 0.5, 0.01])
    assert get_loss_weight(alphas, 0.0).tolist() == [1, 1, 1]
    assert get_loss_weight(alphas, 5.0).tolist() == pytest.approx([5 / 99, 1, 1])


THREE = replace(SHORT, max_train_steps=3, checkpoint_every=3)


@pytest.fixture(scope="module")
def plain_losses(unet, data, tmp_path_factory):
    return run(unet, data, THREE, tmp_path_factory.mktemp("plain")).losses


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"learning_rate": 1e-3}, {"alpha": 4.0}, {"dropout": 0.3}, {"init_lora_weights": "gaussian"},
     {"optimizer": "prodigy"}, {"lr_warmup_steps": 2}, {"max_grad_norm": 1e-3}, {"noise_offset": 0.5},
     {"weight_decay": 0.5}, {"gradient_accumulation_steps": 2}, {"min_snr_gamma": 1.0}, {"caption_dropout": 0.9},
     {"regularization_share": 0.0}, {"precision": "bf16"}, {"lr_schedule": "linear"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_option_changes_the_run(unet, data, tmp_path, change, plain_losses):
    assert run(unet, data, replace(THREE, **change), tmp_path).losses != plain_losses


def test_gradient_checkpointing_changes_nothing(unet, data, tmp_path):
    plain = run(unet, data, RANDOM, tmp_path)
    # the same operations twice, in the same order: equal to the last bit, dropout included
    assert run(unet, data, replace(RANDOM, gradient_checkpointing=True), tmp_path).losses == plain.losses


# ---- whole runs ----


def test_two_runs_give_the_same_file(unet, data, tmp_path):
    files = []
    for name in ("a", "b"):
        run(unet, data, RANDOM, tmp_path / name)
        files.append((tmp_path / name / "x.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(("stop", "optimizer"), [(1, "adamw"), (4, "adamw"), (3, "prodigy")])
def test_a_stopped_run_goes_on_as_if_it_had_not(unet, data, tmp_path, stop, optimizer):
    options = replace(RANDOM, optimizer=optimizer)
    whole = run(unet, data, options, tmp_path / "whole")
    steps = []
    watcher = Watcher(on_step=lambda report: steps.append(report.step), should_stop=lambda: len(steps) == stop)
    stopped = run(unet, data, options, tmp_path / "parts", watcher=watcher)
    assert stopped.step == stop
    load_lora(tmp_path / "parts" / "x.safetensors", stopped.lora.names)  # the LoRA so far is there
    resumed = run(unet, data, options, tmp_path / "parts", resume="yes")
    assert resumed.losses == whole.losses and resumed.smoothed_losses == whole.smoothed_losses
    files = [(tmp_path / name / "x.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_watcher_that_raises_leaves_a_run_that_goes_on(unet, data, tmp_path):
    """ComfyUI's Cancel is an exception out of the progress call."""

    class Cancelled(BaseException):
        pass

    def cancel(report):
        if report.step == 3:
            raise Cancelled

    whole = run(unet, data, RANDOM, tmp_path / "whole")
    with pytest.raises(Cancelled):
        run(unet, data, RANDOM, tmp_path / "parts", watcher=Watcher(on_step=cancel))
    assert load_newest_checkpoint(tmp_path / "parts" / "x-training" / "checkpoints").step == 3
    assert run(unet, data, RANDOM, tmp_path / "parts", resume="unfinished").losses == whole.losses


def test_a_damaged_checkpoint_is_passed_over(unet, data, tmp_path):
    whole = run(unet, data, RANDOM, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    folder = tmp_path / "parts" / "x-training" / "checkpoints"
    newest = sorted(folder.iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert load_newest_checkpoint(folder).step == 4
    resumed = run(unet, data, RANDOM, tmp_path / "parts", resume="yes")
    assert resumed.losses == whole.losses
    files = [(tmp_path / name / "x.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_finished_run_gives_its_result_again(unet, data, tmp_path):
    whole = run(unet, data, SHORT, tmp_path)
    (tmp_path / "x.safetensors").unlink()
    again = run(unet, data, SHORT, tmp_path, resume="yes")
    assert again.losses == whole.losses and (tmp_path / "x.safetensors").is_file()


def test_a_run_can_be_made_longer(unet, data, tmp_path):
    whole = run(unet, data, replace(SHORT, max_train_steps=8), tmp_path / "whole")
    run(unet, data, SHORT, tmp_path / "parts")
    assert run(unet, data, replace(SHORT, max_train_steps=8), tmp_path / "parts", resume="yes").losses == whole.losses
    with pytest.raises(TrainingError, match="at step 8 already, more than the 6"):
        run(unet, data, SHORT, tmp_path / "parts", resume="yes")


def test_resuming_with_other_settings_is_refused(unet, data, tmp_path):
    watcher = Watcher(should_stop=lambda: True)
    run(unet, data, SHORT, tmp_path, watcher=watcher)
    changed = replace(SHORT, rank=8, learning_rate=1e-3)
    for resume in ("yes", "unfinished"):
        with pytest.raises(TrainingError, match="learning_rate was 0.01, now 0.001; rank was 4, now 8"):
            run(unet, data, changed, tmp_path, resume=resume)
        with pytest.raises(TrainingError, match="data was '0', now '1'"):
            run(unet, make_data(1), SHORT, tmp_path, resume=resume)


def test_a_finished_run_of_other_settings_gives_way_to_a_new_one(unet, data, tmp_path):
    run(unet, data, SHORT, tmp_path)
    changed = replace(SHORT, rank=8)
    with pytest.raises(TrainingError, match="rank was 4, now 8"):
        run(unet, data, changed, tmp_path, resume="yes")
    assert len(run(unet, data, changed, tmp_path, resume="unfinished").losses) == 6


def test_the_trained_file_draws_what_training_saw(unet, data, tmp_path):
    """Merged at a strength of 1 it predicts what the UNet in training predicted."""
    result = run(unet, data, SHORT, tmp_path)
    trainee, parameters = build_trainee(unet, SHORT, CPU)
    checkpoint = load_newest_checkpoint(tmp_path / "x-training" / "checkpoints")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.weights[name])
        batch = build_batch(data, SHORT, [(0, data.samples[0])], torch.linspace(0.99, 0.01, 1100), CPU)
        expected = get_loss(trainee, batch)
        merged = apply_loras(unet, [(load_lora(tmp_path / "x.safetensors", result.lora.names), 1.0)])
        found, base = get_loss(merged, batch), get_loss(unet, batch)
    # float32 rounding: the product is added to the weight instead of to the output
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(base) / float(expected) - 1) > 1e-4


def test_the_base_is_not_changed(unet, data, tmp_path):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    modules = [type(module) for module in unet.modules()]
    run(unet, data, SHORT, tmp_path)
    assert [type(module) for module in unet.modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_training_in_a_host_that_is_in_inference_mode(unet, data, tmp_path):
    import copy

    expected = run(unet, data, SHORT, tmp_path).losses
    with torch.inference_mode():
        made_there = copy.deepcopy(unet)
        for name, parameter in list(made_there.named_parameters()):
            module, _, attribute = name.rpartition(".")
            copied = torch.nn.Parameter(parameter.clone(), requires_grad=False)
            setattr(made_there.get_submodule(module), attribute, copied)
        assert next(made_there.parameters()).is_inference()
        assert run(made_there, data, SHORT, tmp_path).losses == expected


def test_the_host_s_random_numbers_stay(unet, data, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(unet, data, RANDOM, tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_reports_log_plot_and_samples(unet, data, tmp_path):
    reports, pictures = [], []
    watcher = Watcher(
        on_step=reports.append, on_samples=lambda step, batch: pictures.append((step, batch.shape)),
        decode=lambda latents: latents[:, :3].movedim(1, -1).sigmoid(),
    )  # fmt: skip
    options = replace(SHORT, sample_prompts=("one", "two"), sample_steps=2)
    result = run(unet, data, options, tmp_path, watcher=watcher)
    assert [report.step for report in reports] == list(range(1, 7))
    assert reports[-1].seconds_left == 0 and "step 6/6" in reports[-1].describe()
    assert pictures == [(step, (2, 8, 8, 3)) for step in (2, 4, 6)] and result.samples.shape == (2, 8, 8, 3)
    folder = tmp_path / "x-training"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(result.losses)
    assert len(list((folder / "samples").iterdir())) == 6 and (folder / "loss.png").is_file()
    # drawing pictures on the way does not change what is learned
    assert run(unet, data, SHORT, tmp_path / "plain").losses == result.losses


# ---- what cannot go on ----


def test_a_loss_that_is_no_number_stops_with_step_and_files(unet, data, tmp_path):
    broken = replace(data.samples[3], latents=torch.full((2, 4, 8, 8), math.nan))
    damaged = replace(data, samples=(*data.samples[:3], broken, *data.samples[4:]))
    with pytest.raises(TrainingError, match=r"The loss is nan at step \d+, with .*3\.png"):
        run(unet, damaged, replace(SHORT, max_train_steps=20), tmp_path)


def test_target_modules_that_fit_nothing(unet, data, tmp_path):
    with pytest.raises(TrainingError, match="to_nothing"):
        run(unet, data, replace(SHORT, target_modules=("to_nothing",)), tmp_path)


def test_a_folder_that_cannot_be_written(unet, data, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="cannot be written to"):
        run(unet, data, SHORT, tmp_path / "file")


def test_a_full_disk(unet, data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 10, 1000)
    monkeypatch.setattr("kolors_nodes.lora.training.shutil.disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="free disk space"):
        run(unet, data, SHORT, tmp_path)


@pytest.mark.parametrize(("option", "value"), [("optimizer", "adamw8bit"), ("base_precision", "4bit")])
def test_a_missing_bitsandbytes_is_told(unet, data, tmp_path, monkeypatch, option, value):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        run(unet, data, replace(SHORT, **{option: value}), tmp_path)


def test_too_little_memory_says_what_to_lower(data):
    text = describe_memory(replace(SHORT, base_precision=""), data, CPU)
    assert text.startswith("Out of memory on cpu. Lower")
    for part in ("batch size (2)", "gradient checkpointing", "resolution (64x64)", "4bit", "rank (4)"):
        assert part in text


def test_a_processor_out_of_memory_is_told_alike(unet, data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("kolors_nodes.lora.training.get_loss", fail)
    with pytest.raises(TrainingError, match=r"Out of memory on cpu\. Lower.*batch size \(2\)"):
        run(unet, data, SHORT, tmp_path)


@pytest.mark.parametrize("change", [{"base_precision": "4bit"}, {"base_precision": "8bit"}, {"optimizer": "adamw8bit"}])
def test_bitsandbytes_trains_nearly_the_same(unet, data, tmp_path, change):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    plain = run(unet, data, replace(SHORT, precision="bf16"), tmp_path / "plain")
    changed = run(unet, data, replace(SHORT, precision="bf16", **change), tmp_path / "changed")
    # 4 bits round weights by several percent; a random UNet's loss follows by about a fifth of that
    assert changed.losses == pytest.approx(plain.losses, rel=0.1)
    assert changed.lora.ranks == plain.lora.ranks
