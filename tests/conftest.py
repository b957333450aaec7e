"""What several modules' tests share."""

import pytest
import torch

import n2n_fast
from n2n_fast.distill import fit, seeded
from n2n_fast.teacher import SmallResNet


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The directory of a finished run of seconds: four classes, told apart by which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = 0.5 * torch.randn(400, 1, 8, 8, generator=generator)
    for n, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[n, :, row : row + 4, column : column + 4] += 1.0
    data = n2n_fast.from_tensors("quarters", (images, labels), seed=0)
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1)
    teacher = fit(model, n2n_fast.data.Batches(data.train, model, 6, 32, None, seed=0), learning_rate=0.1)
    config = n2n_fast.SearchConfig(
        updates=2,
        rollouts=3,
        rollout_steps=4,
        anchors=4,
        anchor_epochs=0.5,
        anchor_every=1,
        stage_epochs=0.5,
        final_epochs=1,
        batch_size=32,
        calibration_images=64,
    )
    return n2n_fast.compress(teacher, data, config, tmp_path_factory.mktemp("runs") / "tiny").out
