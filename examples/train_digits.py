"""Train a digits model, and the judge of all of them; about 25 minutes on one CPU core.

    python -m examples.train_digits                   # the DiT-MoE and the judge, into examples/checkpoints
    python -m examples.train_digits --model dsmoe --steps 3500        # the DSMoE alone, as it was committed
    python -m examples.train_digits --steps 200       # a quick look
    python -m examples.train_digits --evaluate        # class accuracy of the committed model's samples

Needs scikit-learn for the images and rich for the progress bar.
"""

from __future__ import annotations

import getopt
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from examples import digits, dsmoe
from examples.dit_moe import DiTMoE, SparseMoE
from examples.dsmoe import BiasRoutedMoE

BATCH = 32
LEARNING_RATE = 1e-3
LABEL_DROPOUT = 0.1  # the share of labels replaced by the null label, for classifier-free guidance
SAVE_EVERY = 500


def real_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits: images (N,1,16,16) in [-1, 1], labels (N,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=digits.SIZE, mode="bilinear", align_corners=False)
    return images, torch.tensor(data.target)


def sorted_branches(self: SparseMoE | BiasRoutedMoE, x: Tensor, flat_expert_indices: Tensor) -> Tensor:
    """Same result as `SparseMoE.moe_train`, but one gather for all experts instead of a mask for each.

    x (M,D), ids (M*K,) -> (M*K,D).
    """
    order = flat_expert_indices.argsort()
    counts = flat_expert_indices.bincount(minlength=len(self.experts)).tolist()
    segments = x[order // self.top_k].split(counts)
    out = torch.cat([expert(rows) for expert, rows in zip(self.experts, segments, strict=True)])
    return out[order.argsort()]


def sorted_dispatch(self: BiasRoutedMoE, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    """Same result as `BiasRoutedMoE.dispatch`, likewise; x (T,D), ids (T,K), weights (T,K) -> (T,D)."""
    branches = sorted_branches(self, x, topk_idx.flatten()).view(*topk_idx.shape, -1)
    return (branches * topk_weight.unsqueeze(-1)).sum(dim=1)


class Trained(NamedTuple):
    """A model that can be trained: how to build and load it, its checkpoint, and its layers' faster dispatch."""

    build: Callable[[], DiTMoE]
    load: Callable[[], DiTMoE]
    file: Path
    method: str
    faster: Callable[..., Tensor]


MODELS = {
    "dit_moe": Trained(digits.build_model, digits.load_model, digits.MODEL_FILE, "moe_train", sorted_branches),
    "dsmoe": Trained(dsmoe.build_digits, dsmoe.load_digits, dsmoe.MODEL_FILE, "dispatch", sorted_dispatch),
}


def train_model(name: str, steps: int, seed: int = 0) -> None:
    """Train one of `MODELS` from a seeded start."""
    torch.manual_seed(seed)
    one = MODELS[name]
    model = one.build()
    for block in model.blocks:
        setattr(block.moe, one.method, MethodType(one.faster, block.moe))
    fit(model, one.file, steps, seed)


def fit(model: nn.Module, path: Path, steps: int, seed: int = 0) -> None:
    """Rectified flow with label dropout; the exponential moving average of the weights is saved as it goes."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = real_digits()
    model.train()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    for step in track(range(steps), description=path.stem):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        pick = torch.randint(len(images), (BATCH,), generator=generator)
        loss = flow_loss(model, images[pick], labels[pick], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # The average forgets its random start quickly, then settles at 0.999.
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - decay)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(average, path)
            print(f"step {step + 1}: loss {loss.item():.3f}")


def learning_rate(step: int, steps: int) -> float:
    """100 steps of warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * cosine)


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity; scalar."""
    x, t, labels, velocity = noisy_batch(images, labels, digits.CLASSES, generator)
    return F.mse_loss(model(x, t, labels), velocity)


def noisy_batch(images: Tensor, labels: Tensor, null: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A batch of rectified flow at logit-normal times (Esser et al., arXiv 2403.03206, section 3.1).

    images (N,1,H,W), labels (N,) -> x like the images, 1000 t (N,), labels (N,) of which some are ``null``, and the
    velocity noise - image that the model is to give.
    """
    n = len(images)
    dropped = torch.rand(n, generator=generator) < LABEL_DROPOUT
    labels = labels.masked_fill(dropped, null)
    t = torch.sigmoid(torch.randn(n, generator=generator))
    noise = torch.randn(images.shape, generator=generator)
    x = torch.lerp(images, noise, t.view(-1, 1, 1, 1))
    return x, 1000 * t, labels, noise - images


def train_classifier(epochs: int = 40, seed: int = 0) -> float:
    """Train the judge on four fifths of the real digits, save it, return its accuracy on the other fifth."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    images, labels = real_digits()
    shuffled = torch.randperm(len(images), generator=generator)
    held_out, train = shuffled.split([len(images) // 5, len(images) - len(images) // 5])
    classifier = digits.Classifier()
    batches = len(train) // 64
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
    for _ in track(range(epochs), description="classifier"):
        order = train[torch.randperm(len(train), generator=generator)]
        for pick in order[: batches * 64].split(64):
            loss = F.cross_entropy(classifier(augment(images[pick], generator)), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save(classifier.state_dict(), digits.CLASSIFIER_FILE)
    digits.load_classifier.cache_clear()
    return digits.accuracy(images[held_out], labels[held_out])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the batch by up to one pixel each way and add a little noise; (N,1,16,16) -> the same."""
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    shifted = padded[:, :, dy : dy + digits.SIZE, dx : dx + digits.SIZE]
    return shifted + 0.1 * torch.randn(shifted.shape, generator=generator)


def save(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict in float16: half the bytes, and far finer than the model's own error."""
    path.parent.mkdir(exist_ok=True)
    save_file({name: value.detach().half().contiguous() for name, value in state.items()}, path)


def evaluate(model: digits.Velocity, images: int = 500) -> float:
    """Class accuracy of samples of a model: uncached, 50 steps, guidance 2."""
    made = digits.sample(model, seed=0, n=images)
    return digits.accuracy(made, digits.labels_of(images))


def main(argv: Sequence[str] | None = None) -> None:
    """Options: --model dit_moe|dsmoe; --steps N (default 5000); --evaluate, only measure what is saved."""
    try:
        pairs, rest = getopt.getopt(list(sys.argv[1:] if argv is None else argv), "", ["model=", "steps=", "evaluate"])
        options = dict(pairs)
        steps = int(options.get("--steps", 5000))
    except (getopt.GetoptError, ValueError) as error:
        raise SystemExit(f"{error}\n{main.__doc__}") from None
    name = options.get("--model", "dit_moe")
    if rest or steps < 1 or name not in MODELS:
        raise SystemExit(f"no positional arguments, at least one step, {' or '.join(MODELS)}\n{main.__doc__}")
    torch.set_num_threads(1)
    if "--evaluate" not in options:
        started = time.perf_counter()
        train_model(name, steps)
        print(f"{name} trained in {(time.perf_counter() - started) / 60:.1f} min -> {MODELS[name].file}")
        if name == "dit_moe":  # the judge belongs to no model, and need not change with each
            print(f"classifier: {train_classifier():.1%} of held-out real digits")
    print(f"class accuracy of 500 samples, 50 steps, guidance 2: {evaluate(MODELS[name].load()):.1%}")


if __name__ == "__main__":
    main()
