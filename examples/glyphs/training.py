"""Training that can stop at any time and go on: all that a step depends on is in one file, written whole or not at all.

Every random number of a step comes from a generator seeded with the run's seed and the step, so a run that was stopped
and resumed is the same as one that wasn't.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit_moe import Attention, DiTMoE
from examples.train_digits import noisy_batch, sorted_branches

LEARNING_RATE = 1e-3
WARM_UP = 300  # steps
FLAT = 8000  # steps; from there on the rate falls with the square root, so that no run length has to be known
AVERAGE = 0.9995  # of the weights' exponential moving average
STRIDE = 1_000_003  # between the seeds of two runs


class Training:
    """A model, the moving average of its weights, its optimizer, and how many steps they have taken."""

    def __init__(
        self, model: DiTMoE, images: Tensor, labels: Tensor, batch: int = 32, seed: int = 0, bf16: bool = False
    ) -> None:
        """images (N,1,H,W) and labels (N,) on the CPU, the model where it is to be trained; bf16: autocast to it."""
        self.model, self.images, self.labels = model.train(), images, labels
        self.batch, self.seed, self.bf16, self.step = batch, seed, bf16, 0
        self.device = next(model.parameters()).device
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        for block in model.blocks:
            block.moe.moe_train = MethodType(sorted_branches, block.moe)
            if bf16 and self.device.type == "cpu":
                block.attn.forward = MethodType(_attention_in_float32, block.attn)

    def advance(self) -> float:
        """Take a step; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step)
        generator = torch.Generator().manual_seed(self.seed * STRIDE + self.step)
        picked = self._picked()
        batch = noisy_batch(self.images[picked], self.labels[picked], self.model.config.num_classes, generator)
        x, t, labels, velocity = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.model(x, t, labels)
        loss = F.mse_loss(predicted.float(), velocity)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        decay = min(AVERAGE, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - decay)
        self.step += 1
        return loss.item()

    def _picked(self) -> Tensor:
        """The rows of this step: each epoch is a permutation of its own."""
        steps_an_epoch = max(1, len(self.images) // self.batch)
        epoch, index = divmod(self.step, steps_an_epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(-1 - self.seed - STRIDE * epoch)
        )
        return order[index * self.batch : (index + 1) * self.batch]

    def save(self, path: Path) -> None:
        """Write everything to a file that replaces the one before only when it is complete."""
        state = {
            "step": self.step,
            "seed": self.seed,
            "batch": self.batch,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".part")
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            SystemExit: it was another run: other seed or batch.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if (state["seed"], state["batch"]) != (self.seed, self.batch):
            raise SystemExit(
                f"{path} is of --seed {state['seed']} --batch {state['batch']}: give those, or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def learning_rate(step: int) -> float:
    """A linear warm-up, a plateau, then down with the inverse square root of the step."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * min(1.0, math.sqrt(FLAT / (step + 1)))


def _attention_in_float32(self: Attention, x: Tensor) -> Tensor:
    """`Attention.forward` for autocast on a CPU, where attention in bfloat16 takes longer than in float32."""
    n, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.autocast(x.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return self.proj(out.transpose(1, 2).reshape(n, tokens, dim))
