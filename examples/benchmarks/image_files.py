"""Files of images: read, checked before anything is trained, and kept in the shape that they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Rows of pixels in [0, 1] and, where the file has them, labels; ``shape`` is ``(height, width)`` or ``(height,
    width, channels)``."""

    train: Tensor
    test: Tensor
    shape: tuple[int, ...]
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None


def read_images(path: str | Path | None, labels: bool = False) -> Images:
    """Images of an npz file (or of the first one in a folder): ``x_train``, ``x_test`` and perhaps ``y_train``,
    ``y_test``; or ``x`` alone, of which a sixth is for tests. Without a file scikit-learn's digits.

    Arrays are ``(n, height, width)``, ``(n, height, width, channels)`` or ``(n, channels, height, width)``, of bytes or
    of numbers in [0, 1].

    :param labels: whether there have to be some.
    :raises SystemExit: where a file is not like that, saying how.
    """
    if path is None:
        return _digits()
    file = _file(Path(path))
    with np.load(file) as found:
        arrays = {name: found[name] for name in found.files}
    if "x_train" not in arrays and "x" in arrays:
        arrays = {**arrays, **_split(arrays["x"])}
    if missing := [name for name in ("x_train", "x_test") if name not in arrays]:
        _refuse(file, f"has arrays {sorted(arrays)}, and no {missing}")
    if labels and (missing := [name for name in ("y_train", "y_test") if name not in arrays]):
        _refuse(file, f"has no labels {missing}, which this example needs")
    train, test = (_pixels(file, name, arrays[name]) for name in ("x_train", "x_test"))
    if train.shape[1:] != test.shape[1:]:
        _refuse(file, f"has training images of shape {train.shape[1:]} and test images of shape {test.shape[1:]}")
    found_labels = [_labels(file, arrays, part) for part in ("train", "test")]
    return Images(*(torch.tensor(x.reshape(len(x), -1)) for x in (train, test)), train.shape[1:], *found_labels)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x / 16).to(torch.get_default_dtype())[order], y[order]
    return Images(x[:-397], x[-397:], (8, 8), y[:-397], y[-397:])


def _file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if not found:
            raise SystemExit(f"{path} has no npz file.")
        return found[0]
    if not path.exists():
        raise SystemExit(f"there is no file {path}.")
    return path


def _split(x: np.ndarray) -> dict[str, np.ndarray]:
    order = np.random.default_rng(0).permutation(len(x))
    first = len(x) // 6
    return {"x_train": x[order[first:]], "x_test": x[order[:first]]}


def _pixels(file: Path, name: str, x: np.ndarray) -> np.ndarray:
    """``(n, height, width[, channels])`` in [0, 1]."""
    if x.ndim not in (3, 4) or not x.size:
        _refuse(
            file, f"'{name}' has shape {x.shape}, and images have (n, height, width) or (n, height, width, channels)"
        )
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[-1] not in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim == 4 and x.shape[-1] not in (1, 3):
        _refuse(file, f"'{name}' has {x.shape[-1]} channels: grey images have one or none, colour images three")
    x = x[..., 0] if x.ndim == 4 and x.shape[-1] == 1 else x
    dtype = np.float64 if torch.get_default_dtype() is torch.float64 else np.float32
    if x.dtype == np.uint8:
        return x.astype(dtype) / 255
    low, high = (float(v) for v in (x.min(), x.max()))
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 1):
        _refuse(file, f"'{name}' is {x.dtype} from {low:g} to {high:g}, and pixels are bytes or numbers in [0, 1]")
    return x.astype(dtype)


def _labels(file: Path, arrays: dict[str, np.ndarray], part: str) -> Tensor | None:
    if f"y_{part}" not in arrays:
        return None
    labels, count = arrays[f"y_{part}"].reshape(-1), len(arrays[f"x_{part}"])
    if len(labels) != count:
        _refuse(file, f"has {len(labels)} labels 'y_{part}' for {count} images")
    return torch.tensor(labels.astype(np.int64))


def _refuse(file: Path, what: str) -> None:
    raise SystemExit(f"{file}: {what}.")
