"""Data of ``generators.py``: images as rows in [0, 1], and features for a Frechet distance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Images:
    """Rows of pixels in [0, 1], in ``{0, 1}`` where ``binary``; ``seconds`` is what a full run gives each method."""

    name: str
    train: Tensor
    test: Tensor
    binary: bool
    seconds: float

    @property
    def pixels(self) -> int:
        return self.train.shape[1]


def shuffled(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def digits(folder: Path | None) -> Images:
    """scikit-learn's, 8 x 8."""
    from sklearn.datasets import load_digits

    x = shuffled(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
    return Images("digits", x[:-297], x[-297:], False, 8.0)


def frey(folder: Path) -> Images:
    """Frey faces, 28 x 20."""
    x = shuffled(torch.tensor(_array(folder / "faces" / "frey_faces.npz", "x")).flatten(1).float() / 255)
    return Images("Frey faces", x[:-300], x[-300:], False, 24.0)


def binarised(folder: Path) -> Images:
    """MNIST in Larochelle's fixed binarisation, whose test part is sorted by class."""
    file = folder / "binarized_mnist" / "binarized_mnist_packed.npz"
    train, test = (torch.tensor(np.unpackbits(_array(file, k), axis=1)).float() for k in ("train", "test"))
    return Images("binarised MNIST", train, shuffled(test), True, 60.0)


def _array(file: Path, name: str) -> np.ndarray:
    with np.load(file) as z:
        if name not in z.files:
            raise SystemExit(f"{file} has arrays {z.files}, and no {name!r}.")
        return np.asarray(z[name])


class Features:
    """The hidden layer of a small network that tells which of 20 clusters of training images an image is in (labels
    are not there for all sets), as the features of a Frechet distance.

    Compare such distances within one set only; they are no FID.
    """

    def __init__(self, data: Images, clusters: int = 20, epochs: int = 5) -> None:
        from sklearn.cluster import KMeans

        torch.manual_seed(0)
        x = data.train[:20_000]
        found = KMeans(clusters, n_init=1, random_state=0).fit_predict(x.numpy())
        labels = torch.tensor(found, dtype=torch.long)
        self._net = nn.Sequential(nn.Linear(data.pixels, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        head = nn.Linear(32, clusters)
        optimiser = torch.optim.Adam([*self._net.parameters(), *head.parameters()], lr=1e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(100):
                optimiser.zero_grad()
                nn.functional.cross_entropy(head(self._net(x[index])), labels[index]).backward()
                optimiser.step()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self._net(x)
