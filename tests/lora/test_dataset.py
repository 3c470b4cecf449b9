"""Datasets on disk: what is read, what is cropped, and that every fault is told at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from kolors_nodes.lora.dataset import (
    describe_dataset,
    draw_contact_sheet,
    get_buckets,
    get_target_size,
    get_time_ids,
    get_views,
    list_enlarged,
    load_picture,
    read_dataset,
    render_view,
)
from kolors_nodes.lora.options import DatasetOptions, TrainingError, TrainingOptions, check_name

SMALL = DatasetOptions(width=64, height=64)


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate([(96, 64), (64, 128), (80, 80)]):
        Image.new("RGB", size, (40 * index, 0, 200)).save(tmp_path / f"{index}.png")
    return tmp_path


def write_csv(folder, *rows, columns="file_name,text"):
    (folder / "metadata.csv").write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")


def test_captions_of_a_csv(folder):
    write_csv(folder, "2.png,third", '0.png,"first, with a comma"')
    found = [(item.path.name, item.caption, item.width, item.height) for item in read_dataset(folder, SMALL).pictures]
    assert found == [("0.png", "first, with a comma", 96, 64), ("2.png", "third", 80, 80)]


def test_captions_of_a_csv_in_train_as_in_the_tutorial(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "train" / "0.jpg")
    write_csv(tmp_path / "train", "0.jpg,一张图片")
    assert [item.caption for item in read_dataset(tmp_path, SMALL).pictures] == ["一张图片"]


def test_captions_of_a_jsonl(folder):
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"caption {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [item.caption for item in read_dataset(folder, SMALL).pictures] == ["caption 0", "caption 1", "caption 2"]


def test_captions_beside_pictures_and_one_for_all(folder):
    (folder / "1.txt").write_text("\ufeffits own\n", encoding="utf-8")
    pictures = read_dataset(folder, DatasetOptions(width=64, height=64, caption="for all")).pictures
    assert [item.caption for item in pictures] == ["for all", "its own", "for all"]


def test_every_fault_is_told_at_once(folder):
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    write_csv(folder, "0.png,fine", "gone.png,a", "bad.png,b", "text.png,c", "1.png,", "../0.png,d", "/etc/passwd,e")
    with pytest.raises(TrainingError) as error:
        read_dataset(folder, SMALL)
    text = str(error.value)
    for part in ("gone.png is missing", "bad.png is not readable", "text.png is not readable", "line 6: no caption",
                 "'../0.png'", "'/etc/passwd'"):  # fmt: skip
        assert part in text
    assert "0.png is not" not in text


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ("file_name,text", ["0.png,", "1.png,  "], "no caption"),
        ("file_name,caption", ["0.png,x"], "no column text"),
        ("file_name,text", [], "lists nothing"),
    ],
)
def test_caption_files_of_no_use(folder, columns, rows, message):
    write_csv(folder, *rows, columns=columns)
    with pytest.raises(TrainingError, match=message):
        read_dataset(folder, SMALL)


def test_no_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TrainingError, match="no pictures"):
        read_dataset(tmp_path, SMALL)
    with pytest.raises(TrainingError, match="There is no dataset folder"):
        read_dataset(tmp_path / "absent", SMALL)


def test_odd_pictures_are_told_and_used(folder):
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    Image.new("RGB", (32, 40)).save(folder / "4.png")
    dataset = read_dataset(folder, DatasetOptions(width=64, height=64, caption="x"))
    report = describe_dataset(dataset)
    assert len(dataset.pictures) == 5
    assert "the same picture 2 times: 0.png, 3.png" in report
    assert list_enlarged(dataset) == ["4.png is 32x40 and gets enlarged 2.00 times"]
    assert draw_contact_sheet(dataset, side=32).shape == (32, 160, 3)


def test_orientation_transparency_and_modes(tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_picture(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 3 + [0, 0, 255])
    palette.save(tmp_path / "clear.gif", transparency=3)
    for name in ("clear.png", "clear.gif"):
        assert load_picture(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert load_picture(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert load_picture(tmp_path / "print.jpg").mode == "RGB"


def test_a_centred_view_is_the_middle_and_says_so(folder):
    write_csv(folder, "0.png,a wide one")
    (picture,) = read_dataset(folder, SMALL).pictures
    (view,) = get_views(picture, SMALL, seed=0)
    assert (view.resized, view.left, view.top) == ((96, 64), 16, 0)
    assert get_time_ids(picture, view) == [64, 96, 0, 16, 64, 64]
    assert render_view(picture, view).shape == (64, 64, 3)


def test_random_views_follow_the_seed_and_stay_inside(folder):
    options = DatasetOptions(width=64, height=64, center_crop=False, crops=6, random_flip=True, caption="x")
    picture = read_dataset(folder, options).pictures[0]
    views = get_views(picture, options, seed=1)
    assert views == get_views(picture, options, seed=1) != get_views(picture, options, seed=2)
    assert all(0 <= view.left <= 32 and view.top == 0 for view in views)
    assert [view.is_flipped for view in views] == [False, True] * (len(views) // 2)
    plain, flipped = views[:2]
    np.testing.assert_array_equal(render_view(picture, plain), render_view(picture, flipped)[:, ::-1])
    # the crop is told as it lies in the mirrored picture
    assert get_time_ids(picture, flipped)[3] == 96 - 64 - plain.left


def test_buckets_keep_the_aspect_ratio_and_the_area(folder):
    options = DatasetOptions(width=1024, height=1024, buckets=True, caption="x")
    for width, height in get_buckets(options):
        assert width % 64 == height % 64 == 0
        assert 0.9 * 1024**2 < width * height <= 1024**2
        assert 0.5 <= width / height <= 2.01
    wide, tall, square = (get_target_size(item, options) for item in read_dataset(folder, options).pictures)
    assert wide[0] > wide[1] and tall[0] < tall[1] and square == (1024, 1024)


@pytest.mark.parametrize("size", [1023, 100, 0, -8])
def test_sizes_that_are_no_multiple_of_8(size):
    with pytest.raises(TrainingError, match="expected a multiple of 8"):
        DatasetOptions(width=size)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"optimizer": "sgd"}, {"learning_rate": float("nan")},
     {"max_train_steps": 0}, {"precision": "8"}, {"target_modules": ()}, {"seed": -1}, {"caption_dropout": 1.5},
     {"precision": "32", "base_precision": "fp16"}, {"lr_warmup_steps": 500}, {"noise_offset": -0.1}],
    ids=lambda wrong: "-".join(wrong),
)  # fmt: skip
def test_options_out_of_range(wrong):
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        TrainingOptions(**wrong)


@pytest.mark.parametrize(
    "name", ["", "../up", "a/b", "a\\b", "C:x", ".hidden", "a\nb", "ends with a dot.", "or a space ", "con", "LPT1.x"]
)
def test_names_that_lead_elsewhere_or_fit_no_windows(name):
    with pytest.raises(TrainingError, match="plain file name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "my style v1.2", "我的 风格", "console"])
def test_names_that_fit_everywhere(name):
    check_name(name)
