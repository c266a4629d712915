"""What the notebook 01_model cannot show in a cell: properties over many inputs, other number formats, compilers, exports, other processes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cadm_paper import model as module
from cadm_paper.model import BACKBONES, CADM, METHODS, CADMHead, class_maps, export_onnx, global_pool
from cadm_paper.weights import UntrainedBackbone, load_backbone_weights, read_state_dict

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))


def images(n=2, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CADM(6, "narrow_resnet", None, image_size=64, embed_dim=8, classes=list("abcdef"))


def close(a, b, **tolerance):
    """Every field of two outputs, label vectors too where both have them."""
    assert (a.label_vectors is None) == (b.label_vectors is None)
    for ours, theirs in zip(a, b):
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


def test_equal_exactly_where_one_position_carries_every_maximum():
    g = torch.Generator().manual_seed(0)
    X, theta = torch.rand(1, 6, 3, 3, generator=g), torch.rand(2, 6, generator=g)
    gap = lambda: global_pool(class_maps(X, theta)) - global_pool(X) @ theta.T
    assert (gap() < -1e-3).all()
    X[:, :, 1, 2] = 2.0
    assert gap().abs().max() < 1e-6


def test_nothing_of_size_classes_times_channels_times_positions():
    """The largest tensor of forward and backward is X's size, the weights' or the maps'; C x d x h x w would be 40 times that."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        t.untyped_storage().nbytes() // t.element_size()
                        for t in tree_flatten(out)[0]
                        if isinstance(t, torch.Tensor)
                    ),
                ]
            )
            return out

    B, C, d, hw = 2, 40, 64, 49
    head, X = CADMHead(d, C, 7, embed_hidden=16, embed_dim=8), torch.rand(B, d, 7, 7, requires_grad=True)
    with Watch():
        out = head(X)
        (out.logits.sum() + out.label_vectors.square().sum()).backward()
    assert 0 < largest <= max(B * d * hw, B * C * hw, C * d)


# ---- backbones and weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "narrow_resnet"])
def test_every_torchvision_resnet_keeps_its_names_and_fits_the_head(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
        ours = CADM(3, name, None, quiet=True)
        assert ours(torch.empty(1, 3, 64, 96)).maps.shape == (1, 3, 2, 3)
    assert {k: v.shape for k, v in ours.backbone.state_dict().items()} == {
        k: v.shape for k, v in theirs.items() if not k.startswith("fc.")
    }


def test_the_features_are_those_of_torchvision():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(weights=None).eval()
    ours = CADM(1000, "resnet18", None, quiet=True, pool="avg", streams="fcls", bias="fcls").eval()
    load_backbone_weights(ours.backbone, theirs.state_dict())
    ours.head.classifier.load_state_dict(theirs.fc.state_dict())
    torch.testing.assert_close(ours(images()).logits, theirs(images()))


def test_a_checkpoint_file_of_torchvision(tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = CADM(
        4, "resnet18", weights=tmp_path / "resnet18.pth"
    )  # pytest shows warnings: there is none to show here
    assert torch.equal(ours.backbone.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)
    assert (
        ours.provenance["source"] == "resnet18.pth"
        and len(ours.provenance["sha256"]) == 64
        and str(tmp_path) not in json.dumps(ours.config)
    )
    old = {
        k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")
    }  # torch < 0.4.1 had no such counter
    assert load_backbone_weights(ours.backbone, old) == []
    with pytest.raises(ValueError, match="missing: layer1.1|missing: layer"):
        CADM(4, "resnet34", weights=tmp_path / "resnet18.pth")


def test_real_weights_with_a_layer_missing():
    file = SHARED / "resnet18_imagenet_no_layer4_1.npz"
    if not file.is_file():
        pytest.skip(f"no {file.name} in ../shared/data")
    with pytest.raises(ValueError, match="missing: layer4.1"):
        CADM(4, "resnet18", weights=file)
    ours = CADM(4, "resnet18", weights=file, expected_missing=["layer4.1.*"])
    assert (
        all(name.startswith("layer4.1.") for name in ours.provenance["initialised"])
        and len(ours.provenance["initialised"]) == 10
    )
    assert np.array_equal(ours.backbone.conv1.weight.detach().numpy(), np.load(file)["conv1.weight"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __init__(self, path):
        self.path = path


def test_pickles_are_not_run(tmp_path):
    """A .pth and an .npz that would make a folder when unpickled are refused, and there is no folder."""
    bomb = Bomb(str(tmp_path / "made"))
    (tmp_path / "a.pth").write_bytes(pickle.dumps(bomb, protocol=2))
    torch.save({"conv1.weight": bomb}, tmp_path / "b.pth")
    np.savez(tmp_path / "c.npz", x=np.array([bomb], dtype=object))
    for name in ("a.pth", "b.pth", "c.npz"):
        with pytest.raises(ValueError, match="cannot read weights"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(
        RuntimeError, match=r"could not get .*resnet18.*\.pth .*no route to host.*pass its path"
    ):
        CADM(4, "resnet18")


def test_training_from_nothing_is_warned_of_at_the_callers_line():
    with pytest.warns(UntrainedBackbone, match="resnet18 starts from random weights") as caught:
        CADM(4, "resnet18", None)
    assert caught[0].filename == __file__


def test_wrong_arguments_are_named():
    for arguments, message in [
        (dict(num_classes=0), "num_classes=0"),
        (dict(num_classes=3, classes=["a"]), "1 class names"),
        (dict(num_classes=3, pool="sum"), "pool='sum'"),
        (dict(num_classes=3, map_size=0), "positive whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            CADM(backbone="narrow_resnet", weights=None, **arguments)
    with pytest.raises(TypeError, match="poool"):
        CADM(3, "narrow_resnet", None, poool="max")


# ---- number formats, memory formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_autocast(small, dtype, device):
    """Forward and backward; the head answers in float32, near the float32 answer."""
    small, x = small.to(device), images().to(device)
    expected = small(x)
    with torch.autocast(device, dtype):
        out = small(x)
    assert all(t.dtype == torch.float32 for t in out)
    for ours, theirs in zip(out, expected):
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    (out.logits.sum() + out.label_vectors.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_another_precision(small, dtype):
    out = small.to(dtype)(images().to(dtype))
    assert all(t.dtype == dtype for t in out)


def test_channels_last(small):
    expected = small.eval()(images(), with_label_vectors=True)
    last = small.to(memory_format=torch.channels_last)(
        images().contiguous(memory_format=torch.channels_last), with_label_vectors=True
    )
    close(expected, last, rtol=1e-4, atol=1e-5)


def test_float64_gradients_of_the_head():
    head = CADMHead(4, 3, 3, embed_hidden=5, embed_dim=2, bias="both").double()
    X = torch.rand(
        2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(head(x)), X)


# ---- compiled and exported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, training", [("cadm", True), ("cadm", False), ("baseline_gap", True)])
def test_no_graph_breaks(method, training):
    """fullgraph=True raises at the first graph break; label vectors at another size than f_embed's are in it, too."""
    model = CADM(3, "narrow_resnet", None, image_size=48, **METHODS[method]).train(training)
    expected = model(images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(images()).logits.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_code_agrees(small):
    expected = small(images())
    grads = torch.autograd.grad(
        expected.logits.sum() + expected.label_vectors.square().sum(), list(small.parameters())
    )
    torch._dynamo.reset()
    out = torch.compile(small, fullgraph=True)(images())
    close(out, expected, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(out.logits.sum() + out.label_vectors.square().sum(), list(small.parameters())),
        grads,
    ):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-4


def test_torch_export(small):
    program = torch.export.export(small.eval(), (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    close(program.module()(images(5)), small(images(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone, size", [("narrow_resnet", 80), ("resnet18", (64, 96))])
def test_onnx_file_agrees(tmp_path, backbone, size):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = CADM(4, backbone, None, quiet=True, bias="both", image_size=size).train()
    file = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert model.training and os.listdir(file.parent) == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["logits", "logits_fcls", "logits_scls", "maps"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["cadm_paper"])["backbone"] == backbone
    for n in (1, 3):
        x = torch.randn(n, 3, *module.pair(size), generator=torch.Generator().manual_seed(n))
        for ours, theirs in zip(model.eval()(x), session.run(None, {"images": x.numpy()})):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-3, atol=1e-4)


def test_a_failed_export_leaves_what_was_there(tmp_path, small, monkeypatch):
    pytest.importorskip("onnxscript")
    file = tmp_path / "model.onnx"
    file.write_bytes(b"the old one")

    def full_disk(self, destination, **kwargs):
        Path(destination).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        export_onnx(small, file)
    assert file.read_bytes() == b"the old one" and os.listdir(tmp_path) == ["model.onnx"]


# ---- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"share_weights": False},
        {"bias": "both", "embed_relu": "both"},
        {"embed_resize": "pool", "map_size": (3, 5)},
    ],
)
def test_round_trip(tmp_path, switches):
    model = CADM(3, "narrow_resnet", None, image_size=(64, 48), **switches)
    model(images())  # batch statistics move
    again = CADM.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert again.config == model.config and not again.training
    close(
        again(images(), with_label_vectors=True),
        model.eval()(images(), with_label_vectors=True),
        rtol=0,
        atol=0,
    )
    again.train()(images()).logits.sum().backward()  # what was loaded can be trained


def test_loading_draws_no_random_numbers_and_unpickles_nothing(tmp_path, small, monkeypatch):
    folder = small.save_pretrained(tmp_path / "m")
    forbidden = lambda *a, **k: pytest.fail("unpickled")
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    before = torch.get_rng_state()
    again = CADM.from_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state()) and again.classes == list("abcdef")


def test_a_deep_model_loads_without_a_warning(tmp_path, recwarn):
    model = CADM(3, "resnet18", None, quiet=True)
    CADM.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert not [w for w in recwarn if w.category is UntrainedBackbone]


def test_a_failed_save_leaves_the_old_model(tmp_path, small, monkeypatch):
    folder = small.save_pretrained(tmp_path / "m")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full_disk(state, filename, **kwargs):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(module.safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        CADM(2, "narrow_resnet", None).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before and os.listdir(
        tmp_path
    ) == ["m"]


def test_damaged_folders_are_refused(tmp_path, small):
    folder = small.save_pretrained(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"backbone": "resnet18"}, "do not make a model"),
        ({"backbone": "no"}, "unknown backbone"),
        ({"new_switch": 1}, "new_switch"),
        ({"sha256": "0" * 64}, "checksum differs"),
        ({"schema": None}, "another schema"),
        ({"map_size": [2, 2]}, "do not make a model"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            CADM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        CADM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        CADM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no saved model"):
        CADM.from_pretrained(tmp_path / "nowhere")


# ---- outside processes -------------------------------------------------------------------------------------------------


def test_the_import_is_light():
    """`from cadm_paper.model import CADM` brings in nothing of notebooks, tests, plots or tables."""
    heavy = [
        "fastcore",
        "nbdev",
        "IPython",
        "papermill",
        "pytest",
        "hypothesis",
        "matplotlib",
        "seaborn",
        "pandas",
        "sklearn",
        "pycocotools",
        "onnx",
        "onnxruntime",
        "onnxscript",
    ]
    code = f"import sys; from cadm_paper.model import CADM; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_papers_setting():
    """ResNet-101 at 448 x 448 (Sec. 2.2), without weights."""
    model = CADM(80, weights=None, quiet=True).eval()
    with torch.inference_mode():
        out = model(images(1, 448))
    assert (
        out.logits.shape == (1, 80) and out.maps.shape == (1, 80, 14, 14) and model.head.map_size == (14, 14)
    )
    assert out.upsampled_maps(448).shape == (1, 80, 448, 448)
