"""The library's parts with data loaders, metrics, backbones, hubs and tools of other projects."""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from cadm_paper.data import Split
from cadm_paper.engine.config import TrainConfig
from cadm_paper.loss import CADMLoss
from cadm_paper.methods import load_model
from cadm_paper.metrics import MultiLabelMetrics, multilabel_metrics
from cadm_paper.model import CADM

ROOT = Path(__file__).resolve().parents[1]
g = torch.Generator().manual_seed(0)
SCORES, TARGETS = torch.rand(60, 4, generator=g), (torch.rand(60, 4, generator=g) < 0.4).to(torch.int8)


def test_a_split_in_a_data_loader(tmp_path):
    """Images of different sizes and modes with labels of two classes, through model, loss and metrics."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB" if i % 2 else "L", (40 + i, 30), 40 * i if i % 2 == 0 else (40 * i,) * 3).save(path)
    labels = np.eye(6, 2, dtype=int) * 2 - 1
    split = Split("own", "train", tmp_path, "ab", [p.stem for p in paths], paths, labels)
    to_tensor = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loader = DataLoader(split.as_dataset(transform=to_tensor), batch_size=3, num_workers=2)
    images, targets = map(torch.cat, zip(*loader))
    assert images.shape == (6, 3, 32, 32) and targets.dtype == torch.float32
    torch.testing.assert_close(images.amax((1, 2, 3)), torch.arange(6) * 40 / 255)
    assert torch.equal(targets, torch.eye(6, 2) * 2 - 1)
    output = CADM(2, "narrow_resnet", None, image_size=32, quiet=True)(images)
    CADMLoss(lam=0.5)(output, targets).backward()
    assert 0 <= multilabel_metrics(output.scores, targets)["mAP"] <= 1


def test_a_custom_backbone_and_the_loss_of_plain_logits():
    trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU())
    model, targets = CADM(2, trunk, image_size=32), torch.tensor([[1, 0], [0, 1]])
    logits = model(torch.rand(2, 3, 32, 32, generator=g)).logits
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")
    torch.testing.assert_close(CADMLoss(lam=0)(logits, targets), expected / 2)


@pytest.mark.slow
def test_a_compiled_step_of_model_and_loss():
    model, loss = CADM(2, "narrow_resnet", None, image_size=32, quiet=True), CADMLoss(lam=0.5)
    step = torch.compile(lambda x, y: loss(model(x), y), fullgraph=True, backend="aot_eager")
    step(torch.rand(3, 3, 32, 32), (torch.rand(3, 2) < 0.5).float()).backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_metrics_in_a_collection():
    """Called, updated, moved, cloned, pickled and reset."""
    torchmetrics = pytest.importorskip("torchmetrics")
    other = torchmetrics.classification.MultilabelAveragePrecision(4)
    both = torchmetrics.MetricCollection({"paper": MultiLabelMetrics(), "theirs": other}, prefix="val_")
    whole = multilabel_metrics(SCORES, TARGETS)
    for s, y in zip(SCORES.split(20), TARGETS.split(20)):
        assert both(s, y.int())["val_mAP"] == multilabel_metrics(s, y)["mAP"]
    for collection in (both, pickle.loads(pickle.dumps(both.clone().to("cpu")))):
        numbers = collection.compute()
        assert {name: numbers[f"val_{name}"] for name in whole} == whole
    assert not both.state_dict()  # a checkpoint of a module with metrics holds no scores
    both.reset()
    assert len(both["paper"]) == 0


def test_metrics_gathered_from_two_processes():
    pytest.importorskip("torchmetrics")
    gather = lambda part, group: [part, part.flip(1)]
    meter = MultiLabelMetrics(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    for s, y in zip(SCORES.split(30), TARGETS.split(30)):
        meter.update(s, y)
    mirrored = [torch.cat([x, x.flip(1)]) for x in (SCORES, TARGETS)]
    assert meter.compute() == multilabel_metrics(*mirrored) and len(meter) == 60


def test_metrics_without_torchmetrics(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    meter = MultiLabelMetrics()
    assert type(meter) is MultiLabelMetrics
    assert meter(SCORES, TARGETS) == meter.compute() == pickle.loads(pickle.dumps(meter)).compute()
    assert meter(SCORES[:2], TARGETS[:2] * 0) == {} and len(meter) == 62


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_backbone_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    model = CADM(3, f"timm/{name}", None, image_size=224).eval()
    image, theirs = torch.rand(1, 3, 224, 224), timm.create_model(name, features_only=True).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(model(image).maps, model.head(theirs(image)[-1]).maps)
    again = CADM.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert torch.equal(again(image).logits, model(image).logits)
    assert TrainConfig(backbone=f"timm/{name}").backbone == f"timm/{name}"
    with pytest.raises(ValueError, match="timm has no 'resnet10u'"):
        CADM(3, "timm/resnet10u", None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder instead of the hub: uploads to user/name can be downloaded again."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Api(huggingface_hub.HfApi):
        def create_repo(self, repo_id, **how):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=True)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **how):
            for path in Path(folder_path).iterdir():
                path.rename(tmp_path / repo_id / path.name)
            return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id, allow_patterns=None, **how):
        if not (tmp_path / repo_id).is_dir():
            raise huggingface_hub.errors.HFValidationError(f"404: no {repo_id}")
        return str(tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return tmp_path


def test_to_the_hub_and_back(hub):
    """By our functions, and by the mixin of a user's class, which reads the same config.json."""
    from huggingface_hub import PyTorchModelHubMixin

    model = CADM(2, "narrow_resnet", None, image_size=64, classes=["a", "b"], pool="avg").eval()
    assert model.push_to_hub("user/cadm").endswith("user/cadm/commit/1")
    image = torch.rand(1, 3, 64, 64)
    theirs = type("Mine", (PyTorchModelHubMixin, CADM), {}).from_pretrained(hub / "user" / "cadm").eval()
    for again in (CADM.from_pretrained("user/cadm", revision="main"), load_model("user/cadm"), theirs):
        assert torch.equal(again(image).logits, model(image).logits) and again.classes == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="no folder user/other, and the hub has none: 404"):
        CADM.from_pretrained("user/other")


def test_torch_hub(tmp_path):
    from_hub = functools.partial(torch.hub.load, str(ROOT), source="local")
    model = from_hub("cadm", num_classes=2, backbone="narrow_resnet", weights=None, image_size=64)
    again = from_hub("load_model", str(model.save_pretrained(tmp_path / "m")))
    assert type(again) is type(model) and again.num_classes == 2


@pytest.mark.slow
def test_snakemake_lint():
    lint = [sys.executable, "-m", "snakemake", "--lint", "--snakefile", ROOT / "workflow" / "Snakefile"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
