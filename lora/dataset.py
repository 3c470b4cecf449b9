"""Training data on disk: pictures with captions, checked as a whole before anything heavy starts."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from .options import CELL, DatasetOptions, TrainingError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_LISTS = ("metadata.csv", "metadata.jsonl")
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture on disk.

    Attributes:
        path: of the file.
        caption: its text.
        width: in pixels, upright.
        height: likewise.
        digest: SHA-256 of the file's bytes, in hexadecimal.
        is_regularization: whether it keeps what the model knew, instead of teaching something.
    """

    path: Path
    caption: str
    width: int
    height: int
    digest: str
    is_regularization: bool = False


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is trained on.

    Attributes:
        pictures: sorted by path, those to learn first, then those of regularisation.
        options: how they become samples.
        warnings: what is odd about the files and stops nothing.
    """

    pictures: tuple[Picture, ...]
    options: DatasetOptions
    warnings: tuple[str, ...] = ()

    def with_regularization(self, other: Dataset) -> Dataset:
        """Gives this dataset with the pictures of another one for regularisation."""
        kept = tuple(replace(picture, is_regularization=True) for picture in other.pictures)
        return replace(self, pictures=self.pictures + kept, warnings=self.warnings + other.warnings)

    @property
    def digest(self) -> str:
        """Identity of content and options, in hexadecimal."""
        content = [(item.digest, item.caption, item.is_regularization) for item in self.pictures]
        return hashlib.sha256(repr((content, self.options)).encode()).hexdigest()


def read_dataset(folder: str | Path, options: DatasetOptions) -> Dataset:
    """Reads a folder of pictures and captions: every file is opened once, and nothing is kept but facts.

    Captions come from ``metadata.csv`` or ``metadata.jsonl`` (``file_name``, ``text``; in the folder or in its
    ``train``), else from a ``.txt`` of the picture's name beside it, else from ``options.caption``.

    Raises:
        TrainingError: there is nothing, or something is wrong; every fault is listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainingError(f"There is no dataset folder {folder}. Give a folder of pictures with captions.")
    faults: list[str] = []
    candidates = [folder / part / name for part in ("", "train") for name in _LISTS]
    listing = next((path for path in candidates if path.is_file()), None)
    found = list(_read_list(listing, faults) if listing else _find_pictures(folder))
    pictures = []
    for path, text, where in found:
        caption = (text or "").strip() or options.caption.strip()
        if not caption:
            faults.append(f"{where}: no caption")
        picture = _open_picture(path, caption, faults)
        if picture:
            pictures.append(picture)
    if not found and not faults:
        faults.append(f"no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) and no {' or '.join(_LISTS)}")
    if faults:
        shown = "".join(f"\n- {fault}" for fault in faults[:_SHOWN])
        more = f"\n- and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise TrainingError(f"The dataset {folder} cannot be used:{shown}{more}")
    pictures.sort(key=lambda picture: picture.path.relative_to(folder).as_posix())
    return Dataset(pictures=tuple(pictures), options=options, warnings=tuple(_list_duplicates(pictures)))


def _find_pictures(folder: Path) -> Iterator[tuple[Path, str | None, str]]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith("."):
            beside = path.with_suffix(".txt")
            text = beside.read_text(encoding="utf-8-sig", errors="replace") if beside.is_file() else None
            yield path, text, beside.name if text is not None else path.name


def _read_list(listing: Path, faults: list[str]) -> Iterator[tuple[Path, str | None, str]]:
    """Yields path, text and place of every entry whose picture is there; tells of the others."""
    for number, entry in _read_entries(listing, faults):
        where = f"{listing.name} line {number}"
        name = str(entry.get("file_name") or "").replace("\\", "/")
        relative = PurePosixPath(name)
        if not name or relative.is_absolute() or ".." in relative.parts or ":" in name:
            faults.append(f"{where}: file_name is {name!r}, expected a file in {listing.parent}")
        elif not (listing.parent / relative).is_file():
            faults.append(f"{where}: {name} is missing in {listing.parent}")
        else:
            yield listing.parent / relative, str(entry.get("text") or ""), where


def _read_entries(listing: Path, faults: list[str]) -> list[tuple[int, dict]]:
    """Gives line numbers and entries of a caption file."""
    try:
        with open(listing, encoding="utf-8-sig", newline="") as file:
            if listing.suffix == ".csv":
                reader = csv.DictReader(file)
                entries = [(reader.line_num, row) for row in reader]
                columns = set(reader.fieldnames or ())
            else:
                entries = [(number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip()]
                columns = {"file_name", "text"}
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        faults.append(f"{listing.name} is not readable: {error}")
        return []
    if missing := {"file_name", "text"} - columns:
        faults.append(f"{listing.name} has no column {' and no column '.join(sorted(missing))}")
        return []
    if not entries:
        faults.append(f"{listing.name} lists nothing")
    faults += [f"{listing.name} line {number}: expected an object" for number, row in entries if type(row) is not dict]
    return [(number, row) for number, row in entries if type(row) is dict]


def _open_picture(path: Path, caption: str, faults: list[str]) -> Picture | None:
    try:
        size = load_picture(path).size
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        faults.append(f"{path.name} is not readable as a picture: {error}")
        return None
    return Picture(path=path, caption=caption, width=size[0], height=size[1], digest=digest)


def _list_duplicates(pictures: list[Picture]) -> Iterator[str]:
    by_digest: dict[str, list[str]] = {}
    for picture in pictures:
        by_digest.setdefault(picture.digest, []).append(picture.path.name)
    for names in by_digest.values():
        if len(names) > 1:
            yield f"the same picture {len(names)} times: {', '.join(names[:5])}"


def list_enlarged(dataset: Dataset) -> list[str]:
    """Says which pictures are too small for the size they are trained at."""
    found = []
    for picture in dataset.pictures:
        factor = get_view_size(picture, dataset.options)[0] / picture.width
        if factor > 1:
            size = f"{picture.width}x{picture.height}"
            found.append(f"{picture.path.name} is {size} and gets enlarged {factor:.2f} times")
    return found


def load_picture(path: Path) -> Image.Image:
    """Loads a picture upright, as RGB, transparency on white.

    Raises:
        OSError: it is no picture, or damaged.
        ValueError: likewise.
    """
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16") or picture.mode == "I":
            # Pillow clips 16-bit grey to its lowest 255 levels.
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")


# ---- views: what of a picture is trained on ----


@dataclass(frozen=True, kw_only=True)
class View:
    """A part of a picture at training size: resized to ``resized``, then cropped.

    Attributes:
        resized: width and height in pixels before the crop.
        left: of the crop, in pixels of the resized picture.
        top: likewise.
        width: of the crop, in pixels.
        height: likewise.
        is_flipped: mirrored after the crop.
    """

    resized: tuple[int, int]
    left: int
    top: int
    width: int
    height: int
    is_flipped: bool = False


def get_target_size(picture: Picture, options: DatasetOptions) -> tuple[int, int]:
    """Gives width and height that a picture is trained at: the options', or those of its bucket."""
    if not options.buckets:
        return options.width, options.height
    ratio = math.log(picture.width / picture.height)
    return min(get_buckets(options), key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


def get_buckets(options: DatasetOptions) -> list[tuple[int, int]]:
    """Lists sizes of at most ``width * height`` pixels, sides multiples of 64 (32 below 512), 1:2 to 2:1."""
    area = options.width * options.height
    side = math.sqrt(area)
    step = 64 if side >= 512 else 32 if side >= 128 else CELL
    widths = range(max(step, math.ceil(side / math.sqrt(2) / step) * step), int(side * math.sqrt(2)) + 1, step)
    sizes = {(width, area // width // step * step) for width in widths}
    return sorted(size for size in sizes if size[1]) or [(options.width, options.height)]


def get_view_size(picture: Picture, options: DatasetOptions) -> tuple[int, int]:
    """Gives the size to which a picture is resized so that it just covers its target."""
    width, height = get_target_size(picture, options)
    factor = max(width / picture.width, height / picture.height)
    return max(width, round(picture.width * factor)), max(height, round(picture.height * factor))


def get_views(picture: Picture, options: DatasetOptions, seed: int) -> list[View]:
    """Lists the views of a picture; each is encoded once and one of them is drawn whenever it is shown.

    Args:
        picture: the picture.
        options: how.
        seed: decides random crops, together with the picture's content.
    """
    width, height = get_target_size(picture, options)
    resized = get_view_size(picture, options)
    room = resized[0] - width, resized[1] - height
    places = [(room[0] // 2, room[1] // 2)]
    if not options.center_crop and room != (0, 0):
        drawn = hashlib.shake_256(f"{seed}/crop/{picture.digest}".encode()).digest(8 * options.crops)
        numbers = [int.from_bytes(drawn[8 * i : 8 * i + 8], "big") / 2**64 for i in range(options.crops)]
        places = sorted({(int(number * (room[0] + 1)), int(number * (room[1] + 1))) for number in numbers})
    flips = (False, True) if options.random_flip else (False,)
    return [
        View(resized=resized, left=left, top=top, width=width, height=height, is_flipped=is_flipped)
        for left, top in places
        for is_flipped in flips
    ]


def get_time_ids(picture: Picture, view: View) -> list[float]:
    """Gives the micro-conditioning (6): original height and width, crop top and left, target height and width."""
    left = view.resized[0] - view.left - view.width if view.is_flipped else view.left
    return [float(value) for value in (picture.height, picture.width, view.top, left, view.height, view.width)]


def render_view(picture: Picture, view: View) -> np.ndarray:
    """Loads, resizes, crops and mirrors: (H, W, 3) float32 in [0, 1]."""
    image = load_picture(picture.path)
    if image.size != view.resized:
        image = image.resize(view.resized, Image.Resampling.LANCZOS)
    image = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    if view.is_flipped:
        image = ImageOps.mirror(image)
    return np.asarray(image, dtype=np.float32) / 255


# ---- what a user wants to see ----


def draw_contact_sheet(dataset: Dataset, side: int = 128, columns: int = 8) -> np.ndarray:
    """Draws the middle crops of all pictures as one, (H, W, 3) float32 in [0, 1]; at most 64 pictures."""
    options = replace(dataset.options, center_crop=True, random_flip=False)
    shown = dataset.pictures[:64]
    columns = min(columns, len(shown))
    sheet = Image.new("RGB", (columns * side, math.ceil(len(shown) / columns) * side), "white")
    for index, picture in enumerate(shown):
        pixels = render_view(picture, get_views(picture, options, 0)[0])
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        image.thumbnail((side, side))
        sheet.paste(image, (index % columns * side, index // columns * side))
    return np.asarray(sheet, dtype=np.float32) / 255


def describe_dataset(dataset: Dataset) -> str:
    """Gives a report: how many pictures of which sizes, how many captions, and what is odd."""
    learned = [picture for picture in dataset.pictures if not picture.is_regularization]
    sizes = Counter(f"{picture.width}x{picture.height}" for picture in dataset.pictures)
    more = f" and {len(sizes) - 8} other sizes" if len(sizes) > 8 else ""
    lines = [
        f"{len(learned)} pictures to learn, {len({picture.caption for picture in learned})} different captions",
        f"{len(dataset.pictures) - len(learned)} pictures for regularisation",
        "sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(8)) + more,
    ]
    return "\n".join([*lines, *(f"note: {warning}" for warning in dataset.warnings)])
