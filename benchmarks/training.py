"""LoRA training against a loop as DiffSynth-Studio's, which encodes caption and picture in every step."""

from __future__ import annotations

from functools import partial

from pairs import Case, Row
from train_lora import Work, compare_speed

# Both loops see the same pictures, timesteps and noise; after some steps of AdamW, whose first ones are the signs of
# gradients, roundings show.
TOLERANCE = 1e-3


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows; a quick one takes small pictures, where what is encoded anew weighs more."""
    if quick:
        build = partial(build_row, "training 128", Work(side=128, steps=3), 1)
        return [Case(name="training 128", build=build, is_long=True)]
    works = {"training 256": Work(side=256), "training mid 256": Work(model="mid", side=256)}
    return [Case(name=name, build=partial(build_row, name, work, 2)) for name, work in works.items()]


def build_row(name: str, work: Work, pairs: int) -> Row:
    """Measures in processes of their own, each with one of the loops."""
    found = compare_speed(work, pairs)
    equal = found["max_relative_difference"] <= TOLERANCE
    return Row(
        name=name,
        peer="loop as DiffSynth's",
        ours_s=found["ours_s"],
        peer_s=found["peer_s"],
        ratio=found["ratio"] if equal else None,
        spread=found["spread"],
        max_relative_difference=found["max_relative_difference"],
        tolerance=TOLERANCE,
        pairs=pairs,
        note=describe(found),
    )


def describe(found: dict) -> str:
    """Says where the peer's step goes, in shares, and what memory both take."""
    parts, peer, peaks = found["parts"], found["peer_s"], found["peaks"]
    text = parts["unet"] - parts["unet, short text"]
    shares = {
        "caption": parts["caption"], "picture": parts["picture"], "UNet for 256 rows of text": text,
        "other UNet and optimizer": parts["unet, short text"] + parts["optimizer"],
    }  # fmt: skip
    listed = ", ".join(f"{name} {seconds / peer:.0%}" for name, seconds in shares.items())
    return f"a step; the peer's: {listed}; memory {peaks['ours']:.0f} and {peaks['plain']:.0f} MiB"
