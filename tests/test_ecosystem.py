"""A user of other projects: their data loaders, metrics, loops, hubs and compilers with this library's parts."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cadm_paper.data import Split
from cadm_paper.loss import CADMLoss
from cadm_paper.metrics import MultiLabelMetrics, multilabel_metrics

g = torch.Generator().manual_seed(0)
SCORES, TARGETS = torch.rand(60, 4, generator=g), (torch.rand(60, 4, generator=g) < 0.4).to(torch.int8)


@pytest.fixture
def split(tmp_path):
    """Six images of different sizes and modes, with labels of two classes."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB" if i % 2 else "L", (40 + i, 30), 40 * i if i % 2 == 0 else (40 * i,) * 3).save(path)
    return Split(
        "own", "train", tmp_path, "ab", [p.stem for p in paths], paths, np.eye(6, 2, dtype=int) * 2 - 1
    )


def test_a_split_in_a_data_loader(split):
    from torchvision.transforms import v2

    to_tensor = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loader = DataLoader(split.as_dataset(transform=to_tensor), batch_size=3, shuffle=True, num_workers=2)
    images, targets = map(torch.cat, zip(*loader))
    order = images[:, 0, 0, 0].argsort()
    assert images.shape == (6, 3, 32, 32) and targets.dtype == torch.float32
    torch.testing.assert_close(images[order].amax((1, 2, 3)), torch.arange(6) * 40 / 255)
    assert torch.equal(targets[order], torch.from_numpy(split.labels).float())


def test_metrics_in_a_collection():
    """Called, updated, moved, cloned, pickled, reset, and gathered from two processes of which each has half."""
    torchmetrics = pytest.importorskip("torchmetrics")
    other = torchmetrics.classification.MultilabelAveragePrecision(4)
    both = torchmetrics.MetricCollection({"paper": MultiLabelMetrics(), "theirs": other}, prefix="val_")
    whole, found = multilabel_metrics(SCORES, TARGETS), {}
    for s, y in zip(SCORES.split(20), TARGETS.split(20)):
        found = both(s, y.int())
    assert found["val_mAP"] == multilabel_metrics(s, y)["mAP"]
    again = pickle.loads(pickle.dumps(both.clone().to("cpu")))
    for collection in (both, again):
        numbers = collection.compute()
        assert {name: numbers[f"val_{name}"] for name in whole} == whole
    both.reset()
    assert len(both["paper"]) == 0
    gathered = MultiLabelMetrics(
        dist_sync_fn=lambda part, group: [part, part.flip(1)], distributed_available_fn=lambda: True
    )
    gathered.update(SCORES[:30], TARGETS[:30])
    gathered.update(SCORES[30:], TARGETS[30:])
    mirrored = [torch.cat([x, x.flip(1)]) for x in (SCORES, TARGETS)]
    assert gathered.compute() == multilabel_metrics(*mirrored) and len(gathered) == 60


def test_metrics_without_torchmetrics(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    meter = MultiLabelMetrics()
    assert type(meter) is MultiLabelMetrics
    assert meter(SCORES, TARGETS) == meter.compute() == pickle.loads(pickle.dumps(meter)).compute()
    assert meter(SCORES[:2], TARGETS[:2] * 0) == {} and len(meter) == 62


def test_the_loss_takes_plain_logits():
    logits = SCORES.logit().requires_grad_()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, TARGETS.float(), reduction="sum")
    torch.testing.assert_close(CADMLoss(lam=0)(logits, TARGETS), expected / 60)
