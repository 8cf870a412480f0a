"""The tasks of the benchmarks: labels go on from seed to seed, and changed conditions change the model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tasks, transfer


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=tasks.TASKS)
def test_labels_go_on_and_models_load(task: tasks.Task) -> None:
    labels = torch.cat([task.labels_of(seed, 8) for seed in range(task.classes)])
    assert torch.equal(labels, torch.arange(8 * task.classes) % task.classes)
    with torch.no_grad():
        first, second = (task.sampler(2, 2)(task.load(), seed) for seed in (0, 1))
    assert first.shape == task.noise(0, 2).shape
    assert not torch.equal(first, second)


def test_guidance_and_conditions_change_the_samples() -> None:
    task = tasks.DIGITS
    with torch.no_grad():
        samples = [task.sampler(2, 2, guidance=scale)(task.load(), 0) for scale in (1.0, 3.0)]
        for change in (transfer.mixed_labels, transfer.adapted):
            model = task.load()
            null = model.y_embedder.embedding_table.weight[-1].clone()
            change(model)
            assert torch.equal(model.y_embedder.embedding_table.weight[-1], null)
            samples.append(task.sampler(2, 2, guidance=3.0)(model, 0))
    for other in (0, 2, 3):
        assert not torch.allclose(samples[1], samples[other], atol=1e-3)
