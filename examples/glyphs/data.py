"""The data: every face's 62 glyphs, train and test split by family."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.glyphs.fonts import FOLDER, Face
from examples.glyphs.render import CHARACTERS, SIZE, render

# Two faces whose glyphs differ by less than this, root mean square of 255, count as the same one.
TWIN = 8.0  # two faces of one split: neighboring weights of a family are nearer than that
RELATIVE = 16.0  # a test face and a training face: two digitizations of one design are nearer than that


def without_twins(root: Path, faces: list[Face]) -> list[Face]:
    """Leave out test faces that look like a training face, and training faces that look like an earlier one."""
    ordered = sorted(faces, key=lambda face: face.split != "train")
    pixels = torch.stack([torch.from_numpy(render(root / face.path)).float().flatten() for face in ordered])
    distances = torch.cdist(pixels, pixels) / pixels.shape[1] ** 0.5
    accepted: list[int] = []
    for index, face in enumerate(ordered):
        limits = torch.tensor([TWIN if ordered[other].split == face.split else RELATIVE for other in accepted])
        if bool((distances[index, accepted] >= limits).all()):
            accepted.append(index)
    return sorted(ordered[index] for index in accepted)


def build(root: Path, faces: list[Face], folder: Path = FOLDER) -> str:
    """Render the faces into ``folder/glyphs.npz``, whole or not at all; a line that says how many there are."""
    images = {"train": [], "test": []}
    for face in faces:
        images[face.split].append(render(root / face.path))
    target = folder / "glyphs.npz"
    partial = folder / "glyphs.part.npz"
    np.savez_compressed(partial, **{split: np.stack(stack) for split, stack in images.items()})
    os.replace(partial, target)
    return f"{len(images['train'])} faces to train on, {len(images['test'])} to test on -> {target}"


def load(split: str, folder: str | Path = FOLDER) -> tuple[Tensor, Tensor]:
    """The images and labels of a split.

    Args:
        split: "train" or "test".
        folder: where `build` wrote them.

    Returns:
        Images (faces * 62, 1, 32, 32) float32 in [-1, 1], paper at -1; labels (faces * 62,) int64. Face by face.

    Raises:
        SystemExit: nothing is there yet.
    """
    path = Path(folder) / "glyphs.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run python -m examples.glyphs.fonts --folder {folder}")
    with np.load(path) as arrays:
        faces = torch.from_numpy(arrays[split])
    images = faces.view(-1, 1, SIZE, SIZE).float() / 127.5 - 1
    return images, torch.arange(len(CHARACTERS)).repeat(len(faces))
