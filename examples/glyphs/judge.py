"""The judge of glyphs: a small CNN whose answers give an accuracy, and whose features a Frechet distance."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from examples.digits import CHECKPOINTS, load_weights
from examples.glyphs import data
from examples.glyphs.model import CLASSES
from examples.train_digits import save

CLASSIFIER_FILE = CHECKPOINTS / "glyphs_classifier.safetensors"
FEATURES = 96


class Classifier(nn.Module):
    """(N,1,32,32) -> logits (N,62); `features` gives the (N,96) before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 96)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.hidden = nn.Linear(widths[-1] * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x), 0.3, self.training))


def load(path: str | Path | None = None) -> Classifier:
    """The trained classifier, eval mode, float32, CPU; ``path`` defaults to the checkpoint beside the digits'."""
    return load_weights(Classifier(), path or CLASSIFIER_FILE)


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images (N,1,32,32) taken for their label (N,), between 0 and 1.

    Some glyphs can't be told apart without their neighbors (l and I in many faces, 0 and O in some, o and O of small
    capitals), so real ones of unseen faces don't reach 1 either.
    """
    predicted = torch.cat([classifier(part).argmax(dim=1) for part in images.float().cpu().split(1024)])
    return (predicted == labels).float().mean().item()


def train(path: Path, folder: str | Path, seed: int = 0, epochs: int = 8) -> float:
    """Train a classifier on the training faces, write it in float16, return its accuracy on the test faces."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    images, labels = data.load("train", folder)
    classifier = Classifier()
    batches = len(images) // 128
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for picked in order[: batches * 128].split(128):
            x = augment(images[picked], generator)
            loss = F.cross_entropy(classifier(x), labels[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)
    save(classifier.state_dict(), path)
    return accuracy(load(path), *data.load("test", folder))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the batch by up to one pixel each way and add a little noise; (N,1,32,32) -> the same."""
    dy, dx = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
    shifted = torch.roll(images, (dy, dx), dims=(2, 3))  # the margins are paper
    return shifted + 0.1 * torch.randn(images.shape, generator=generator)


def picture(images: Tensor, path: Path) -> None:
    """Write images (N,1,32,32) as a PNG, one row for each 62, black ink on white."""
    rows = images.split(CLASSES)
    full = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, CLASSES - len(row)), value=-1.0) for row in rows]
    tiles = torch.stack(full)[:, :, 0].permute(0, 2, 1, 3).reshape(len(full) * images.shape[2], -1)
    Image.fromarray(((1 - tiles.clamp(-1, 1)) * 127.5).round().byte().numpy().astype(np.uint8)).save(path)
