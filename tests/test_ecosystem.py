"""The library's parts with data loaders, metrics, backbones, hubs and tools of other projects."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cadm_paper.data import Split
from cadm_paper.engine.config import ConfigError, TrainConfig
from cadm_paper.engine.processes import resolve_machine
from cadm_paper.loss import CADMLoss
from cadm_paper.methods import load_model
from cadm_paper.metrics import MultiLabelMetrics, multilabel_metrics
from cadm_paper.model import CADM, export_onnx

ROOT = Path(__file__).resolve().parents[1]
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


class Module(torch.nn.Module):
    """The methods that a Lightning module has, without Lightning."""

    def __init__(self, classes=2):
        super().__init__()
        self.model = CADM(classes, "narrow_resnet", None, image_size=32, quiet=True)
        self.loss, self.meter = CADMLoss(lam=0.5), MultiLabelMetrics()

    def training_step(self, batch, index):
        return self.loss(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.meter.update(self.model(batch[0]).scores, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_training_loop_of_another_framework(split):
    from torchvision.transforms import v2

    to_tensor = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loader, module = DataLoader(split.as_dataset(transform=to_tensor), batch_size=3), Module()
    optimiser, losses = module.configure_optimizers(), []
    for index, batch in enumerate([*loader] * 3):
        loss = module.train().training_step(batch, index)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        for index, batch in enumerate(loader):
            module.eval().validation_step(batch, index)
    assert np.isfinite(losses).all() and len(module.meter) == 6 and 0 <= module.meter.compute()["mAP"] <= 1
    again = Module()
    again.load_state_dict(module.state_dict())  # what a checkpoint of such a framework holds
    assert torch.equal(again.eval().model(batch[0]).logits, module.model(batch[0]).logits)


def test_a_custom_backbone_and_the_loss_of_plain_logits():
    trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU())
    model, targets = CADM(2, trunk, image_size=32), torch.tensor([[1, 0], [0, -1]])
    logits = model(torch.rand(2, 3, 32, 32, generator=g)).logits
    known = targets >= 0
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[known], targets[known].float(), reduction="sum"
    )
    torch.testing.assert_close(CADMLoss(lam=0)(logits, targets), cross_entropy / 2)
    with pytest.raises(ValueError, match="needs label vectors"):
        CADMLoss(lam=0.5)(logits, targets)


@pytest.mark.slow
def test_compiled_and_exported_by_the_user(tmp_path):
    """A step of model and loss as one graph; ONNX Runtime gives the scores of the model."""
    model, image = CADM(2, "narrow_resnet", None, image_size=32, quiet=True), torch.rand(3, 3, 32, 32)
    loss, targets = CADMLoss(lam=0.5), (torch.rand(3, 2) < 0.5).float()
    step = torch.compile(lambda x, y: loss(model(x), y), fullgraph=True, backend="aot_eager")
    step(image, targets).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    pytest.importorskip("onnxscript")
    file = str(export_onnx(model.eval(), tmp_path / "m.onnx"))
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    named = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": image.numpy()})))
    np.testing.assert_allclose(named["logits"], model(image).logits.detach(), rtol=1e-3, atol=1e-4)


def test_metrics_in_a_collection():
    """Called, updated, moved, cloned, pickled, reset, and gathered from two processes with half of the images each."""
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
    assert not both.state_dict()  # a checkpoint of a module with metrics holds no scores
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


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_backbone_of_timm(name, tmp_path, monkeypatch):
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
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **how: create(name, **how))
    assert CADM(3, f"timm/{name}", image_size=224).provenance["source"] == "imagenet"


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
    model = torch.hub.load(
        str(ROOT),
        "cadm",
        source="local",
        num_classes=2,
        backbone="narrow_resnet",
        weights=None,
        image_size=64,
    )
    again = torch.hub.load(
        str(ROOT), "load_model", str(model.save_pretrained(tmp_path / "m")), source="local"
    )
    assert type(again) is type(model) and again.num_classes == 2


def test_an_apple_gpu_is_accepted_if_available():
    config = TrainConfig(device="mps")
    if torch.backends.mps.is_available():
        assert resolve_machine(config).precision == "fp32"
    else:
        with pytest.raises(ConfigError, match="no Apple device found"):
            resolve_machine(config)


@pytest.mark.slow
def test_snakemake_lint():
    lint = [sys.executable, "-m", "snakemake", "--lint", "--snakefile", ROOT / "workflow" / "Snakefile"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
