"""What training reads of a dataset: captions and pictures encoded once, and kept on disk for the next run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kolors.options import SCALING_FACTOR, SamplingOptions
from ..kolors.prompts import PromptEmbeds, join_texts
from ..kolors.sampling import sample
from ..kolors.storage import get_cache_name, get_identity, read_tensors, write_tensors
from ..kolors.text_encoder import Text, TextEncoder, TokenBatch
from ..kolors.tokenizer import MAX_TOKENS, Tokenizer
from .dataset import Dataset, get_time_ids, get_views, render_view

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

OnProgress = Callable[[str, int, int], None]
EncodePictures = Callable[[torch.Tensor], torch.Tensor]

_CAPTIONS_AT_ONCE = 16
_PICTURES_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One picture, ready for the UNet.

    Attributes:
        name: of the file or the prompt, for messages.
        caption: key into the captions.
        latents: (V, C, h, w) float32, times the VAE's scaling factor: a row for each view.
        time_ids: (V, 6) float32, in pixels.
        is_regularization: whether it keeps what the model knew.
    """

    name: str
    caption: str
    latents: torch.Tensor
    time_ids: torch.Tensor
    is_regularization: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """Everything that training reads.

    Attributes:
        samples: in the dataset's order.
        captions: caption → text; the empty one and the sample prompts are there too.
        digest: identity of dataset and encoders.
    """

    samples: tuple[Sample, ...]
    captions: Mapping[str, Text]
    digest: str


def _get_path(cache: Path, kind: str, *parts: object) -> Path:
    return cache / kind / get_cache_name(*parts)


def _encode_missing(
    paths: Sequence[Path], size: int, encode: Callable[[slice], list[dict[str, torch.Tensor]]],
    on_progress: Callable[[int, int], None],
) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """Reads what is cached and encodes the rest, in parts whose borders do not depend on what is cached.

    A part is encoded whole if anything of it is missing: numbers may depend on what is computed beside them, and a
    run that was stopped here must go on with the same.
    """
    found: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(paths), size):
        part = slice(start, start + size)
        cached = [read_tensors(path) for path in paths[part]]
        if all(cached):
            found += [tensors for tensors, _ in cached if tensors]
        else:
            encoded = encode(part)
            for path, tensors in zip(paths[part], encoded, strict=True):
                write_tensors(path, tensors)
            found += encoded
        on_progress(min(start + size, len(paths)), len(paths))
    return found


class _Once:
    """Loads a model when it is first needed, and never if everything is cached."""

    def __init__(self, load: Callable):
        self._load, self._loaded = load, None

    def __call__(self):
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


def encode_captions(
    captions: Iterable[str], *, cache: Path, identity: str, precision: str, tokenizer: Tokenizer,
    load_text_encoder: Callable[[], TextEncoder], on_progress: OnProgress,
) -> dict[str, Text]:  # fmt: skip
    """Encodes captions, or reads them from the cache.

    Args:
        captions: texts; each is encoded once.
        cache: folder.
        identity: of the text encoder.
        precision: that it computes in.
        tokenizer: its tokenizer.
        load_text_encoder: called if something is missing; gives the encoder on its device.
        on_progress: called with the phase, how many are done, and of how many.

    Returns:
        Caption → text, on the CPU, in the encoder's dtype.
    """
    unique = sorted(set(captions))
    ids = [tokenizer.encode(caption) for caption in unique]
    paths = [_get_path(cache, "captions", identity, precision, tokens) for tokens in ids]
    load = _Once(load_text_encoder)

    def encode(part: slice) -> list[dict[str, torch.Tensor]]:
        encoder = load()
        with torch.no_grad():
            texts = encoder.encode_texts(TokenBatch.from_ids(ids[part], tokenizer.pad_token_id))
        return [{"rows": text.rows.cpu(), "pooled": text.pooled.cpu()} for text in texts]

    found = _encode_missing(
        paths, _CAPTIONS_AT_ONCE, encode, lambda done, total: on_progress("encoding captions", done, total)
    )
    return {caption: Text(**tensors) for caption, tensors in zip(unique, found, strict=True)}


def encode_pictures(
    dataset: Dataset, *, seed: int, cache: Path, identity: str, load_vae: Callable[[], EncodePictures],
    on_progress: OnProgress,
) -> list[Sample]:  # fmt: skip
    """Encodes all views of all pictures, or reads them from the cache.

    Args:
        dataset: the pictures.
        seed: decides random crops.
        cache: folder.
        identity: of the VAE.
        load_vae: called if something is missing; gives a function from pictures (B, H, W, 3) in [0, 1] to the means
            of their latents (B, C, h, w) without the scaling factor.
        on_progress: called with the phase, how many are done, and of how many.
    """
    views = [
        (index, picture, view)
        for index, picture in enumerate(dataset.pictures)
        for view in get_views(picture, dataset.options, seed)
    ]
    views.sort(key=lambda item: (item[2].height, item[2].width))  # stable: one size after the other
    load = _Once(load_vae)
    by_picture: dict[int, list[tuple[torch.Tensor, list[float]]]] = {}
    sizes = sorted({(view.height, view.width) for _, _, view in views})
    done = 0
    for size in sizes:
        group = [item for item in views if (item[2].height, item[2].width) == size]
        paths = [_get_path(cache, "latents", identity, picture.digest, view) for _, picture, view in group]

        def encode(part: slice, group: list = group) -> list[dict[str, torch.Tensor]]:
            pixels = np.stack([render_view(picture, view) for _, picture, view in group[part]])
            with torch.no_grad():
                latents = load()(torch.from_numpy(pixels)).float().cpu() * SCALING_FACTOR
            return [{"latents": latent.clone()} for latent in latents]

        found = _encode_missing(
            paths, _PICTURES_AT_ONCE, encode,
            lambda count, _, before=done: on_progress("encoding pictures", before + count, len(views)),
        )  # fmt: skip
        done += len(group)
        for (index, picture, view), tensors in zip(group, found, strict=True):
            by_picture.setdefault(index, []).append((tensors["latents"], get_time_ids(picture, view)))
    return [
        Sample(
            name=picture.path.name, caption=picture.caption, is_regularization=picture.is_regularization,
            latents=torch.stack([latents for latents, _ in by_picture[index]]),
            time_ids=torch.tensor([time_ids for _, time_ids in by_picture[index]]),
        )
        for index, picture in enumerate(dataset.pictures)
    ]  # fmt: skip


def draw_regularization(
    unet: UNet2DConditionModel, prompts: Sequence[str], captions: Mapping[str, Text], options: SamplingOptions, *,
    count: int, cache: Path, identity: str, on_progress: OnProgress,
) -> list[Sample]:  # fmt: skip
    """Lets the base model draw regularisation pictures, as latents, or reads them from the cache.

    Args:
        unet: the base, without any LoRA, on the device where it shall run.
        prompts: taken in turn.
        captions: the prompts' texts, and the empty one.
        options: how to sample; picture i has the seed ``options.seed + i``.
        count: pictures in all.
        cache: folder.
        identity: of UNet and text encoder.
        on_progress: called with the phase, how many are done, and of how many.
    """
    jobs = [(prompts[i % len(prompts)], (options.seed + i) % 2**64) for i in range(count)]
    paths = [_get_path(cache, "prior", identity, str(unet.dtype), prompt, seed, options) for prompt, seed in jobs]

    def draw(part: slice) -> list[dict[str, torch.Tensor]]:
        ((prompt, seed),) = jobs[part]
        latents = sample(unet, get_prompt_embeds(captions[prompt], captions[""]), replace(options, seed=seed))
        return [{"latents": latents[0].float().cpu()}]

    found = _encode_missing(paths, 1, draw, lambda done, total: on_progress("drawing regularisation", done, total))
    time_ids = torch.tensor([[options.height, options.width, 0.0, 0.0, options.height, options.width]])
    return [
        Sample(name=f"{prompt!r} seed {seed}", caption=prompt, latents=tensors["latents"][None], time_ids=time_ids,
               is_regularization=True)
        for (prompt, seed), tensors in zip(jobs, found, strict=True)
    ]  # fmt: skip


def get_prompt_embeds(text: Text, negative: Text) -> PromptEmbeds:
    """Gives a caption and a negative in the form that sampling takes: B = 1, all 256 rows."""

    return join_texts({"text": text, "negative": negative}, ["text"], ["negative"])


def get_pad_mask(pads: int) -> tuple[float, float]:
    """Gives the mask values of two equal rows that together weigh as much in attention as ``pads`` rows.

    diffusers turns a mask value m into an attention bias of (1 - m) times -10000, in float32. One row with
    m = 1 + log(pads) / 10000 would do, but the grid of float32 near 1 rounds its weight by up to 0.1 %. So the first
    row has the grid's next lower value, and the second one the remainder, to a relative error of 1e-6.
    """
    if pads == 0:
        return 0.0, 0.0
    first = np.float32(1 + np.log(pads) / 10000)
    if (float(first) - 1) * 10000 > np.log(pads):
        first = np.nextafter(first, np.float32(0))
    remainder = pads - np.exp((float(first) - 1) * 10000)
    return float(first), float(1 + np.log(remainder) / 10000) if remainder > 1e-6 else 0.0


def get_text_batch(texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packs captions for the UNet: few rows, with a mask that makes them equal to the 256 of inference.

    Returns:
        Rows (B, S, D), mask (B, S) and pooled (B, D), all float32: two pad rows, the real tokens, filler of mask 0.
    """
    longest = max(len(text.rows) for text in texts)
    rows = torch.zeros(len(texts), 1 + longest, texts[0].rows.shape[1])
    mask = torch.zeros(len(texts), 1 + longest)
    for index, text in enumerate(texts):
        count = len(text.rows)
        rows[index, 0] = text.rows[0].float()
        rows[index, 1 : 1 + count] = text.rows.float()
        mask[index, 2 : 1 + count] = 1.0
        mask[index, :2] = torch.tensor(get_pad_mask(MAX_TOKENS - (count - 1)))
    return rows, mask, torch.stack([text.pooled.float() for text in texts])


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoders:
    """The models that training needs before the UNet, loaded only where the cache lacks something.

    Attributes:
        tokenizer: of the text encoder.
        text_identity: of the text encoder.
        text_precision: that it computes in.
        load_text_encoder: gives it on its device.
        vae_identity: of the VAE.
        load_vae: gives a function from pictures to latents; see ``encode_pictures``.
    """

    tokenizer: Tokenizer
    text_identity: str
    text_precision: str
    load_text_encoder: Callable[[], TextEncoder]
    vae_identity: str
    load_vae: Callable[[], EncodePictures]


@dataclass(frozen=True, kw_only=True)
class Regularization:
    """Pictures that the base model draws itself, so that what it knew survives.

    Attributes:
        prompts: taken in turn; none: no such pictures.
        count: pictures in all.
        sampling: how they are drawn.
    """

    prompts: tuple[str, ...] = ()
    count: int = 50
    sampling: SamplingOptions = SamplingOptions(num_inference_steps=20)


def encode_dataset(
    dataset: Dataset, encoders: Encoders, *, other_captions: Iterable[str], seed: int, cache: Path,
    on_progress: OnProgress,
) -> TrainingData:  # fmt: skip
    """Encodes captions, then pictures; one encoder is let go before the next is loaded.

    Args:
        dataset: the pictures.
        encoders: the models.
        other_captions: sample prompts, and those of regularisation; the empty caption is encoded anyway.
        seed: decides random crops.
        cache: folder.
        on_progress: called with the phase, how many are done, and of how many.
    """
    captions: dict[str, Text] = {}
    # Apart, so that another sample prompt changes nothing about the captions in training.
    for texts in ([picture.caption for picture in dataset.pictures], ["", *other_captions]):
        captions |= encode_captions(
            texts, cache=cache, identity=encoders.text_identity, precision=encoders.text_precision,
            tokenizer=encoders.tokenizer, load_text_encoder=encoders.load_text_encoder, on_progress=on_progress,
        )  # fmt: skip
    samples = encode_pictures(
        dataset, seed=seed, cache=cache, identity=encoders.vae_identity, load_vae=encoders.load_vae,
        on_progress=on_progress,
    )  # fmt: skip
    return TrainingData(samples=tuple(samples), captions=captions, digest=get_digest(dataset, encoders))


def get_digest(dataset: Dataset, encoders: Encoders, regularization: Regularization | None = None) -> str:
    """Gives the identity of what a dataset will be encoded to, before anything is."""
    parts = (dataset.digest, encoders.text_identity, encoders.text_precision, encoders.vae_identity)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return _add_to_digest(digest, regularization) if regularization and regularization.prompts else digest


def _add_to_digest(digest: str, regularization: Regularization) -> str:
    return hashlib.sha256((digest + repr(regularization)).encode()).hexdigest()


def add_regularization(
    data: TrainingData, regularization: Regularization, unet: UNet2DConditionModel, *, text_identity: str,
    cache: Path, on_progress: OnProgress,
) -> TrainingData:  # fmt: skip
    """Gives the data with pictures that the base model draws; the data itself where none are asked for."""
    if not regularization.prompts:
        return data
    identity = f"{text_identity} {get_identity(unet.state_dict().items())}"
    drawn = draw_regularization(
        unet, regularization.prompts, data.captions, regularization.sampling, count=regularization.count, cache=cache,
        identity=identity, on_progress=on_progress,
    )  # fmt: skip
    return replace(data, samples=(*data.samples, *drawn), digest=_add_to_digest(data.digest, regularization))
