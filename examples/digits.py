"""The small trained DiT-MoE that the demo, the calibration and the tests share: handwritten digits, 16 x 16.

    model = load_model()
    images = sample(model, seed=0)                 # (32,1,16,16), digits 0..9 in turn, values about [-1, 1]
    print(accuracy(images, labels_of(32)))

The weights come from `examples/train_digits.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.dit_moe import DiTMoE, dit_moe

SIZE = 16
CLASSES = 10
CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODEL_FILE = CHECKPOINTS / "digits.safetensors"
CLASSIFIER_FILE = CHECKPOINTS / "classifier.safetensors"

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Network = TypeVar("Network", bound=nn.Module)


def build_model() -> DiTMoE:
    """The untrained network: 6 blocks, width 96, 3 heads, 2 of 8 experts per token, one shared; 2.86 M parameters."""
    return dit_moe(
        "S/2-8E2A",
        depth=6,
        hidden_size=96,
        num_heads=3,
        expert_hidden=144,
        shared_hidden=144,
        input_size=SIZE,
        in_channels=1,
        num_classes=CLASSES,
        learn_sigma=False,
        pretraining_tp=1,
        # Lighter than the published 0.01: enough to keep the experts even on a data set this small.
        aux_loss_weight=0.002,
    )


def load_model(path: str | Path | None = None) -> DiTMoE:
    """The trained network, eval mode, float32, CPU; ``path`` defaults to the committed checkpoint."""
    return load_weights(build_model(), path or MODEL_FILE)


def labels_of(n: int) -> Tensor:
    """The labels `sample` draws: 0, 1, ... 9, 0, ...; (n,) int64."""
    return torch.arange(n) % CLASSES


def initial_noise(seed: int, n: int) -> Tensor:
    """(n,1,16,16) standard normal, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: Velocity,
    seed: int,
    n: int = 32,
    steps: int = 50,
    cfg: float = 2.0,
    layout: Literal["batched", "two_calls"] = "batched",
    callback: Callable[[int, Tensor], None] | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Make n digits (n,1,16,16) by a rectified flow: Euler steps from noise (t = 1) to image (t = 0).

    model: called as ``model(x, 1000 t, labels)``, t (N,) float32, gives the velocity noise - image.
    cfg: classifier-free guidance, ``uncond + cfg * (cond - uncond)``.
    layout: "batched" asks for both in one call (conditional half first), "two_calls" for one after the other.
    callback: called after each step with its index and the new x.
    """
    labels = labels_of(n).to(device)
    null = torch.full_like(labels, CLASSES)
    return integrate(model, initial_noise(seed, n).to(device), labels, null, steps, cfg, layout, callback)


def integrate(
    model: Velocity,
    x: Tensor,
    labels: Tensor,
    null: Tensor,
    steps: int,
    cfg: float,
    layout: Literal["batched", "two_calls"],
    callback: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """What `sample` does from given noise x (N,1,H,W), labels (N,) and null labels (N,)."""
    if layout not in ("batched", "two_calls"):
        raise ValueError(f"layout must be 'batched' or 'two_calls', not {layout!r}")
    for step in range(steps):
        t = torch.full((len(x),), 1000.0 * (1 - step / steps), dtype=torch.float32, device=x.device)
        if layout == "batched":
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
            cond, uncond = both.chunk(2)
        else:
            cond = model(x, t, labels)
            uncond = model(x, t, null)
        x = x - (uncond + cfg * (cond - uncond)) / steps
        if callback is not None:
            callback(step, x)
    return x


class Classifier(nn.Module):
    """A small CNN for 16 x 16 digits, trained on real ones only: (N,1,16,16) -> logits (N,10).

    `features` gives the (N,64,4,4) before the last layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64 * 4 * 4, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


@lru_cache(maxsize=1)
def load_classifier() -> Classifier:
    """The committed classifier, eval mode, float32, CPU."""
    return load_weights(Classifier(), CLASSIFIER_FILE)


@torch.no_grad()
def accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of the images (N,1,16,16) that the classifier takes for their label (N,), between 0 and 1."""
    predicted = load_classifier()(images.float().cpu()).argmax(dim=1)
    return (predicted == labels.cpu()).float().mean().item()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each sample of a against b (N,...) -> (N,); the data range is 2."""
    error = (a.double() - b.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def load_weights(model: Network, path: str | Path) -> Network:
    """Read a checkpoint, stored in float16 to stay small, into the model in float32; gives it back in eval mode."""
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()
