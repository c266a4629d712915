"""Tests of model, weights and methods beyond notebook cells: many inputs, number formats, compilers, exports, files."""

import json
import os
import pickle
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from cadm_paper.methods import METHODS, load_model
from cadm_paper.methods.base import build_network, method_arguments
from cadm_paper.model import BACKBONES, CADM, CADMHead, class_maps, export_onnx, global_pool, pair
from cadm_paper.weights import load_backbone_weights, read_state_dict


def seeded(model, x):
    """The model's output, with the same dropout each time."""
    torch.manual_seed(0)
    return model(x)


def images(n=2, size=64, seed=0):
    return torch.randn(n, 3, *pair(size), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CADM(6, "narrow_resnet", None, image_size=64, embed_dim=8, classes=list("abcdef"))


def network(method, image_size=64, **given):
    """A small network of a method, λ = 0.5 where it has one."""
    short = dict.fromkeys(("cnn_rnn", "order_free_rnn"), {"steps": 3, "beam": 2})
    usual = {"cadm": {"lam": 0.5}} | short
    args = method_arguments(method, usual.get(method, {}) | given)
    return build_network(method, 3, "narrow_resnet", None, args, image_size=image_size)


def close(a, b, **tolerance):
    """Every field of two outputs, those that are None in both."""
    for ours, theirs in zip(a, b, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.float(), theirs.float(), **tolerance)


# ---- the two streams -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    d=st.integers(1, 9),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    signed=st.booleans(),
)
def test_bounds_between_the_streams(seed, d, h, w, signed):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3, d, h, w, dtype=torch.float64, generator=g)
    X = X if signed else X.relu()  # the proposition does not need X >= 0
    theta = torch.randn(4, d, dtype=torch.float64, generator=g)
    spread = global_pool(X) + global_pool(-X)
    gap = lambda t: global_pool(class_maps(X, t)) - global_pool(X) @ t.T
    assert (gap(theta) <= spread @ (-theta).clamp(min=0).T + 1e-9).all()
    assert (gap(theta) >= -(spread @ theta.clamp(min=0).T) - 1e-9).all()
    assert (gap(theta.abs()) <= 1e-9).all() and (gap(-theta.abs()) >= -1e-9).all()
    average = global_pool(class_maps(X, theta), "avg") - global_pool(X, "avg") @ theta.T
    assert average.abs().max() < 1e-9


def test_nothing_of_size_classes_times_channels_times_positions(largest_tensor):
    """The largest tensor has the size of X, the weights or the maps; C x d x h x w would be 40 times that."""
    B, C, d, hw = 2, 40, 64, 49
    head, X = CADMHead(d, C, 7, embed_hidden=16, embed_dim=8), torch.rand(B, d, 7, 7, requires_grad=True)
    with largest_tensor as found:
        out = head(X)
        (out.logits.sum() + out.label_vectors.square().sum()).backward()
    assert 0 < found.numel <= max(B * d * hw, B * C * hw, C * d)


# ---- backbones and weights ---------------------------------------------------------------------------------------


RESNETS = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
KINDS = ("resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2")  # one of each kind of block


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in KINDS)) for n in RESNETS]
)
def test_every_torchvision_resnet_keeps_its_names_and_fits_the_head(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
        ours = CADM(3, name, None, quiet=True)
        assert ours(torch.empty(1, 3, 64, 96)).maps.shape == (1, 3, 2, 3)
    shapes = {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.backbone.state_dict().items()} == shapes


def test_the_features_are_those_of_torchvision(tmp_path):
    """From torchvision's file, without a warning; counters may be missing (torch < 0.4.1), layers may not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = CADM(1000, "resnet18", tmp_path / "resnet18.pth", pool="avg", streams="fcls", bias="fcls").eval()
    ours.head.classifier.load_state_dict(theirs.fc.state_dict())
    torch.testing.assert_close(ours(images()).logits, theirs(images()))
    assert ours.provenance["source"] == "resnet18.pth" and str(tmp_path) not in json.dumps(ours.config)
    old = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert load_backbone_weights(ours.backbone, old) == []
    with pytest.raises(ValueError, match="missing: layer"):
        CADM(4, "resnet34", weights=tmp_path / "resnet18.pth")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_not_run(tmp_path):
    """Files that would create a folder when unpickled are rejected, and the folder does not exist."""
    bomb = Bomb(str(tmp_path / "made"))
    (tmp_path / "a.pth").write_bytes(pickle.dumps(bomb, protocol=2))
    torch.save({"conv1.weight": bomb}, tmp_path / "b.pth")
    np.savez(tmp_path / "c.npz", x=np.array([bomb], dtype=object))
    for name in ("a.pth", "b.pth", "c.npz"):
        with pytest.raises(ValueError, match="cannot read weights"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "made").exists()


SD = BACKBONES["narrow_resnet"]().state_dict()
UNREADABLE = {
    "module.pth": ({f"module.{k}": v for k, v in SD.items()}, "begin with 'module.': remove this prefix"),
    "lightning.pth": ({"state_dict": {f"net.enc.{k}": v for k, v in SD.items()}}, "with 'net.enc.'"),
    "args.pth": ({"state_dict": SD, "args": SimpleNamespace()}, "contains types.SimpleNamespace"),
    "whole.pth": (torchvision.models.resnet18(weights=None), "contains torchvision.models.resnet.ResNet"),
    "c.pth.tar": ({"state_dict": SD}, "rename it"),
    "x.ckpt": ({"state_dict": SD}, "rename it"),
    "model.pth": ({"model": SD}, "under 'model'"),
    "list.pth": ([1, 2], "no state dict"),
    "nan.pth": ({**SD, "bn1.bias": SD["bn1.bias"] / 0}, "bn1.bias is not finite"),
    "empty.pth": (b"", "is empty"),
    "empty.npz": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "page.pth": (b"<html>not found</html>", "not a file of torch.save"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "header"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_error_for_a_foreign_file_says_what_to_do(tmp_path, name):
    content, says = UNREADABLE[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError) as error:
        CADM(3, "narrow_resnet", tmp_path / name, image_size=64)
    said = str(error.value)
    assert name in said and says in said.replace(str(tmp_path), "") and "\n" not in said and len(said) < 600


def test_words_for_imagenet_and_for_no_weights(tmp_path, monkeypatch):
    """The file is loaded as weights only, with its checksum; a damaged file in the cache is reported."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    calls, state = [], torchvision.models.resnet18(weights=None).state_dict()
    with monkeypatch.context() as patch:
        fetch = lambda url, **how: calls.append(how) or state
        patch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
        model = CADM(4, "resnet18", "imagenet", image_size=64)
    assert model.provenance["version"] == "IMAGENET1K_V1"
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])
    assert calls[0]["weights_only"] and calls[0]["check_hash"]
    for word in (None, "none", "None"):
        assert CADM(4, "resnet18", word, image_size=64, quiet=True).provenance == {"source": None}
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / Path(url).name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(pickle.dumps(Bomb(str(tmp_path / "made")), protocol=2))
    with pytest.raises(RuntimeError, match=f"{cached.name} .*remove it from torch's cache"):
        CADM(4, "resnet18", image_size=64)
    assert not (tmp_path / "made").exists()


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(RuntimeError, match=r"could not download .*resnet18.*\.pth .*no route.*pass its path"):
        CADM(4, "resnet18")


# ---- number formats, memory formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method, dtype):
    """Forward and backward, on a GPU if available; every head returns float32, close to the float32 result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = network(method).to(device), images().to(device)
    expected = seeded(model, x)
    with torch.autocast(device, dtype):
        out = seeded(model, x)
    for ours, theirs in zip(out, expected):
        if ours is not None:
            assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 0.1 * theirs.abs().max()
    out.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters())


def test_parameters_of_another_precision_and_layout(small):
    expected = small.eval()(images(), with_label_vectors=True)
    last = small.to(memory_format=torch.channels_last)
    out = last(images().contiguous(memory_format=torch.channels_last), with_label_vectors=True)
    close(expected, out, rtol=1e-4, atol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        assert all(t.dtype == dtype for t in small.train().to(dtype)(images().to(dtype)))


def test_float64_gradients_of_the_head():
    head = CADMHead(4, 3, 3, embed_hidden=5, embed_dim=2, bias="both").double()
    X = torch.rand(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: tuple(head(x)), X.requires_grad_())


# ---- compiled and exported -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_no_graph_breaks(method, training):
    """fullgraph=True raises at the first graph break; label vectors are resized, too."""
    model = network(method, image_size=48).train(training)
    expected = seeded(model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(seeded(compiled, images()), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(images()).logits.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_onnx_file_agrees(tmp_path, method, size=(64, 96)):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = network(method, size).train()
    file = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert model.training and os.listdir(file.parent) == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["cadm_paper"])
    assert about["backbone"] == "narrow_resnet" and about["image_size"] == list(pair(size))
    names = [o.name for o in session.get_outputs()]
    for n in (1, 3):
        expected = model.eval()(images(n, size, seed=n))
        assert names == [name for name, value in expected._asdict().items() if value is not None]
        for name, found in zip(names, session.run(None, {"images": images(n, size, seed=n).numpy()})):
            np.testing.assert_allclose(getattr(expected, name).detach().numpy(), found, rtol=1e-3, atol=1e-4)


# ---- saved and loaded ------------------------------------------------------------------------------------------------


SWITCHES = {"share_weights": False}, {"bias": "both", "embed_relu": "both"}, {"embed_resize": "pool"}


@pytest.mark.parametrize("method, given", [*((m, {}) for m in METHODS), *(("cadm", of) for of in SWITCHES)])
def test_every_method_is_loaded_as_it_was_saved(tmp_path, method, given, monkeypatch, recwarn):
    """Bit for bit, without random numbers, unpickling or a warning; and the loaded model can be trained."""
    model = network(method, image_size=(64, 48), **given)
    model(images())  # batch statistics move
    folder, before = model.save_pretrained(tmp_path / "m"), torch.get_rng_state()
    for place, name in ((torch, "load"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(place, name, lambda *a, **k: pytest.fail("unpickled"))
    again = load_model(folder)
    assert torch.equal(before, torch.get_rng_state()) and again.config == model.config and not recwarn.list
    assert not again.training
    vectors = (True,) if method == "cadm" else ()
    close(again(images(), *vectors), model.eval()(images(), *vectors), rtol=0, atol=0)
    again.train()(images()).logits.sum().backward()


def test_a_model_without_its_preprocessing_is_rejected(small, tmp_path):
    """As earlier versions saved it: other settings than in training would give wrong scores."""
    file = small.save_pretrained(tmp_path / "m") / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "normalise"}))
    with pytest.raises(ValueError, match="no preprocessing"):
        load_model(tmp_path / "m")


def test_a_saved_model_that_is_not_finite_is_rejected(small, tmp_path):
    with torch.no_grad():
        small.head.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="head.classifier.weight is not finite"):
        CADM.from_pretrained(small.save_pretrained(tmp_path / "m"))
