"""Files of images for the examples: read in the shape that they have, or refused before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from image_files import Images, read_images  # noqa: E402

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def read(folder: Path, labels: bool = False, **arrays: Any) -> Images:
    np.savez(folder / "data.npz", **arrays)
    return read_images(folder / "data.npz", labels)


@pytest.mark.parametrize("shape", [(28, 20), (9, 9, 3)], ids=["grey", "colour"])
def test_images_keep_their_shape(shape, tmp_path):
    train, test = pixels(5, *shape), pixels(2, *shape)
    found = read(tmp_path, x_train=train, x_test=test, y_train=np.arange(5), y_test=np.zeros((2, 1)))
    assert found.shape == shape
    torch.testing.assert_close(found.train.reshape(5, *shape), torch.tensor(train / 255).to(found.train))
    assert found.train_labels.tolist() == [0, 1, 2, 3, 4] and found.test_labels.tolist() == [0, 0]
    assert read_images(tmp_path).shape == shape  # a folder


def test_other_ways_to_write_them(tmp_path):
    x = pixels(12, 4, 6)
    alone = read(tmp_path, x=x)
    assert (len(alone.train), len(alone.test), alone.train_labels) == (10, 2, None)
    assert sorted(torch.cat([alone.train, alone.test]).sum(1).tolist()) == pytest.approx(
        sorted((x / 255).sum((1, 2))), rel=1e-5
    )
    first = pixels(3, 3, 4, 6)  # channels first
    found = read(tmp_path, x_train=first, x_test=first)
    assert found.shape == (4, 6, 3)
    torch.testing.assert_close(found.train[0, :3], torch.tensor(first[0, :, 0, 0] / 255).to(found.train))
    assert read(tmp_path, x_train=pixels(3, 4, 6, 1), x_test=pixels(3, 4, 6, 1)).shape == (4, 6)
    real = np.linspace(0, 1, 24).reshape(1, 4, 6)
    torch.testing.assert_close(
        read(tmp_path, x_train=real, x_test=real).train[0], torch.tensor(real.ravel()).to(found.train)
    )


GREY = pixels(4, 5, 5)
BAD = {
    "no arrays": (dict(images=GREY), r"\['images'\], and no \['x_train', 'x_test'\]"),
    "no test images": (dict(x_train=GREY), r"no \['x_test'\]"),
    "grey against colour": (dict(x_train=GREY, x_test=pixels(4, 5, 5, 3)), "training images of shape"),
    "flat": (dict(x_train=GREY.reshape(4, 25), x_test=GREY), "'x_train' has shape"),
    "four channels": (dict(x_train=pixels(4, 5, 5, 4), x_test=pixels(4, 5, 5, 4)), "4 channels"),
    "range": (dict(x_train=GREY.astype(float), x_test=GREY), r"'x_train' is float64 from .* numbers in \[0, 1\]"),
    "negative": (dict(x_train=GREY / 255, x_test=GREY / 255 - 0.5), "'x_test' is float64 from -0.5"),
    "not a number": (dict(x_train=GREY / np.nan, x_test=GREY), "from nan to nan"),
    "empty": (dict(x_train=GREY[:0], x_test=GREY), "shape"),
    "labels": (dict(x_train=GREY, x_test=GREY, y_train=np.zeros(3), y_test=np.zeros(4)), "3 labels 'y_train' for 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name, tmp_path):
    arrays, words = BAD[name]
    with pytest.raises(SystemExit, match=words):
        read(tmp_path, **arrays)


def test_missing_files_and_labels(tmp_path):
    for path in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(SystemExit, match="no npz file|there is no file"):
            read_images(path)
    with pytest.raises(SystemExit, match="no labels"):
        read(tmp_path, labels=True, x_train=GREY, x_test=GREY)
