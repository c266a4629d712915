"""Tests of the loss beyond notebook cells: oracles over many inputs, gradients, number formats, memory, compilers."""

import functools
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cadm_paper.loss import CADMLoss, asymmetric_loss, classification_loss, label_correlation_loss
from cadm_paper.paper import DECISIONS, LossOptions

ROOT = Path(__file__).resolve().parents[1]
switches = st.fixed_dictionaries(
    {
        f.name: st.sampled_from(list(DECISIONS[f.name].choices))
        for f in fields(LossOptions)
        if f.name != "margin"
    }
)
many = settings(deadline=None, max_examples=60)


@st.composite
def batches(draw, ignored=True, dtype=torch.float64, images=5):
    """An output (logits and label vectors) and targets, with no, some or all labels present."""
    n, C, k = draw(st.integers(1, images)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, present = (-1 if ignored else 0), draw(st.floats(0, 1))
    targets = torch.where(
        torch.rand(n, C, generator=g) < present, 1, torch.randint(low, 1, (n, C), generator=g)
    ).to(torch.int8)
    output = SimpleNamespace(
        logits=3 * torch.randn(n, C, dtype=dtype, generator=g),
        label_vectors=0.6 * torch.randn(n, C, k, dtype=dtype, generator=g),
    )
    return output, targets


def part(output, index):
    return SimpleNamespace(logits=output.logits[index], label_vectors=output.label_vectors[index])


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Eq. 4, 9-12 against independent computations --------------------------------------------------------------------


def one_image(vectors, labels, hinge, margin, distance, pair_weight, no_positive, one_positive, center, **_):
    """Eq. 12 of one image with Python's own numbers."""
    S, rest = ([c for c, y in enumerate(labels) if y == value] for value in (1, 0))
    if (not S and no_positive == "skip") or (len(S) == 1 and one_positive == "skip"):
        return 0.0
    mean = [sum(vectors[c][i] for c in S) / max(len(S), 1) for i in range(len(vectors[0]))]
    mean = mean if center == "present" else [0.0] * len(mean)
    squares = [sum((x - m) ** 2 for x, m in zip(v, mean)) for v in vectors]
    d = squares if distance == "squared" else [s**0.5 for s in squares]
    second = (
        sum(max(0, margin - d[c]) for c in rest)
        if hinge == "inside"
        else max(0, margin - sum(d[c] for c in rest))
    )
    return sum(d[c] for c in S) * (len(S) if pair_weight else 1) + second


@many
@given(batch=batches(), options=switches, margin=st.floats(0.1, 3))
def test_every_switch_against_plain_python(batch, options, margin):
    output, y = batch
    images = [
        one_image(v, t, margin=margin, **options) for v, t in zip(output.label_vectors.tolist(), y.tolist())
    ]
    if options["reduction_classes"] == "mean":
        images = [x / max(sum(label >= 0 for label in t), 1) for x, t in zip(images, y.tolist())]
    ours = label_correlation_loss(output.label_vectors, y, margin=margin, **options)
    assert ours.item() == pytest.approx(sum(images) / len(images), rel=1e-9, abs=1e-9)


@many
@given(batch=batches(ignored=False))
def test_cross_entropy_is_torchs(batch):
    output, y = batch
    close(
        classification_loss(output.logits, y),
        F.binary_cross_entropy_with_logits(output.logits, y.double(), reduction="sum") / len(y),
    )
    close(
        classification_loss(output.logits, y, reduction_classes="mean"),
        F.binary_cross_entropy_with_logits(output.logits, y.double()),
    )
    close(
        asymmetric_loss(output.logits, y, gamma_neg=0, gamma_pos=0, clip=0),
        classification_loss(output.logits, y),
    )


# ---- invariances -------------------------------------------------------------------------------------------------------


@many
@given(batch=batches(), options=switches, cuts=st.lists(st.integers(0, 5), max_size=4))
def test_parts_add_up(batch, options, cuts):
    """Values and gradients of micro-batches and processes, also empty ones, add up to those of the whole."""
    output, y = batch
    loss, edges = CADMLoss(**options), [0, *sorted(min(c, len(y)) for c in cuts), len(y)]
    leaves = [output.logits.requires_grad_(), output.label_vectors.requires_grad_()]
    whole = loss.terms(output, y)
    grads = torch.autograd.grad(whole.total, leaves)
    pieces = [
        loss.terms(part(output, slice(a, b)), y[a:b], num_images=len(y)) for a, b in zip(edges, edges[1:])
    ]
    for total, *split in zip(whole, *pieces):
        close(sum(split), total)
    for a, b in zip(torch.autograd.grad(sum(p.total for p in pieces), leaves), grads):
        close(a, b)


@many
@given(batch=batches(ignored=False), options=switches, data=st.data())
def test_an_ignored_label_is_like_a_missing_class(batch, options, data):
    output, y = batch
    drop = data.draw(
        st.lists(st.booleans(), min_size=y.shape[1], max_size=y.shape[1]).filter(lambda drop: not all(drop))
    )
    keep = ~torch.tensor(drop)
    unknown = torch.where(keep, y, -1)
    output.logits[:, ~keep], output.label_vectors[:, ~keep] = 1e4, -1e4  # arbitrary values
    loss = CADMLoss(**options)
    leaves = [output.logits.requires_grad_(), output.label_vectors.requires_grad_()]
    for a, b in zip(loss.terms(output, unknown), loss.terms(part(output, (slice(None), keep)), y[:, keep])):
        close(a, b)
    for grad in torch.autograd.grad(loss(output, unknown), leaves):
        assert (grad[:, ~keep] == 0).all()


# ---- gradients ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(batch=batches(images=3), options=switches)
def test_gradients_against_finite_differences(batch, options):
    output, y = batch
    options |= {"detach_center": False}  # a stopped gradient is not a finite difference
    if options["distance"] == "euclidean":  # no derivative where a single present label is its own mean
        options["one_positive"] = "skip"
    loss = CADMLoss(lam=0.7, **options)
    function = lambda logits, vectors: loss(SimpleNamespace(logits=logits, label_vectors=vectors), y)
    assert torch.autograd.gradcheck(
        function, (output.logits.requires_grad_(), output.label_vectors.requires_grad_()), atol=1e-6
    )


@many
@given(batch=batches(), options=switches)
def test_gradients_are_finite_where_distances_are_zero(batch, options):
    output, y = batch
    leaf = torch.zeros_like(output.label_vectors, requires_grad=True)
    CADMLoss(**options)(SimpleNamespace(logits=output.logits, label_vectors=leaf), y).backward()
    assert leaf.grad.isfinite().all()


ASYMMETRIC = [
    functools.partial(asymmetric_loss, gamma_pos=gamma, gamma_neg=gamma, clip=clip)
    for gamma in (0.0, 0.01, 1.0, 4.0)
    for clip in (0.0, 0.05)
]


@pytest.mark.parametrize("function", [classification_loss, asymmetric_loss, *ASYMMETRIC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(function, dtype):
    """Right or wrong, present or absent: a power below 1 has an infinite gradient at a score of 0."""
    logits = torch.tensor([[-6e4, -120, -5, 0, 5, 120, 6e4]] * 2).to(dtype).requires_grad_()
    loss = function(logits, torch.tensor([[1] * 7, [0] * 7]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@settings(deadline=None, max_examples=25)
@given(batch=batches(images=3), reduction=st.sampled_from(["sum", "mean"]))
def test_the_asymmetric_loss_by_its_definition(batch, reduction):
    """Ridnik et al. with their three parameters, label by label; its gradient without clipping."""
    output, y = batch
    p = output.logits.sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    each = torch.where(y == 1, (1 - p) * p.log(), shifted**2 * (1 - shifted).log()) * (y >= 0)
    per_image = -each.sum(1) / ((y >= 0).sum(1).clamp(min=1) if reduction == "mean" else 1)
    how = dict(gamma_neg=2, gamma_pos=1, reduction_classes=reduction)
    close(asymmetric_loss(output.logits, y, **how), per_image.mean())
    function = lambda logits: asymmetric_loss(logits, y, clip=0, **how)
    assert torch.autograd.gradcheck(function, output.logits.requires_grad_(), atol=1e-6)


# ---- number formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"distance": "euclidean"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_from_half_precision(options, dtype):
    """float32 inputs: the same number. Half-precision inputs: only their own rounding (2^-8, 2^-11) matters."""
    g = torch.Generator().manual_seed(0)
    logits, vectors = torch.randn(8, 80, generator=g), 0.1 * torch.randn(8, 80, 64, generator=g)
    y = (torch.rand(8, 80, generator=g) < 0.05).to(torch.int8)
    of = lambda x, v: CADMLoss(**options)(SimpleNamespace(logits=x, label_vectors=v), y)
    half, exact = (logits.to(dtype), vectors.to(dtype)), of(logits, vectors)
    with torch.autocast("cpu", dtype):
        assert torch.equal(of(logits, vectors), exact) and of(*half).dtype == torch.float32
        close(of(*half).double(), of(*(x.double() for x in half)), 1e-6)
    close(exact.double(), of(logits.double(), vectors.double()), 1e-6)
    close(of(*half), exact, 1e-2)


# ---- cost, mistakes -------------------------------------------------------------------------------------------


def test_nothing_for_pairs_of_classes(largest_tensor):
    n, C, k = 2, 300, 4
    output = SimpleNamespace(
        logits=torch.randn(n, C, requires_grad=True), label_vectors=torch.randn(n, C, k, requires_grad=True)
    )
    with largest_tensor as found:
        CADMLoss()(output, (torch.rand(n, C) < 0.5).long()).backward()
    assert 0 < found.numel <= n * C * k < n * C * C


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(targets=torch.zeros(2, 4)), "2 images and 3 classes"),
        (dict(targets=torch.full((2, 3), 0.5)), "6 targets are neither"),
        (dict(targets=torch.full((2, 3), float("nan"))), "the first is nan"),
        (dict(label_vectors=None), "needs label vectors"),
        (dict(label_vectors=torch.zeros(2, 4, 5)), "2 images and 4 classes"),
        (dict(label_vectors=torch.zeros(2, 3)), "label vectors B x C x k"),
        (dict(label_vectors=torch.zeros(2, 3, 5, 5)), "label vectors B x C x k"),
        (dict(logits=torch.zeros(2, 3, 1), targets=torch.zeros(2, 3, 1)), "expected logits B x C"),
        (dict(logits=torch.zeros(3), targets=torch.zeros(3)), "expected logits B x C"),
    ],
)
def test_wrong_input(wrong, message):
    given = (
        dict(logits=torch.zeros(2, 3), label_vectors=torch.zeros(2, 3, 5), targets=torch.zeros(2, 3)) | wrong
    )
    with pytest.raises(ValueError, match=message):
        CADMLoss()(SimpleNamespace(**given), given["targets"])


@pytest.mark.parametrize(
    "function, wrong",
    [
        (CADMLoss, dict(lam=-0.1)),
        (CADMLoss, dict(lam=float("inf"))),
        (CADMLoss, dict(margin=0)),
        (CADMLoss, dict(hinge="sum")),
        (classification_loss, dict(sign="plus")),
        (classification_loss, dict(reduction_classes="none")),
        (asymmetric_loss, dict(reduction_classes="none")),
        (asymmetric_loss, dict(clip=-1)),
        (asymmetric_loss, dict(gamma_neg=-1)),
        (asymmetric_loss, dict(gamma_pos=float("nan"))),
    ],
)
def test_wrong_switches(function, wrong):
    arguments = () if function is CADMLoss else (torch.zeros(2, 3), torch.zeros(2, 3))
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: "):
        function(*arguments, **wrong)


# ---- the benchmarks run ----------------------------------------------------------------------------------------------------


def benchmark(name, folder, *arguments):
    """Run a small benchmark and return its JSON."""
    options = "--device cpu --repeats 2 --out new/result.json".split()
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "new" / "result.json").read_text())


@pytest.mark.slow
def test_peak_memory_is_linear_in_classes(tmp_path):
    arguments = "--classes 60 600 --naive-up-to 60 --naive-repeats 2 --batch 2".split()
    found = benchmark("loss_scaling", tmp_path, *arguments)
    assert found["growth"]["60 -> 600 classes"]["peak"] == pytest.approx(10, rel=0.02)


@pytest.mark.slow
def test_peak_memory_of_the_head(tmp_path):
    """The head is counted and small, even at 96 pixels and with a small backbone, where its share is larger."""
    arguments = "--backbone resnet18 --size 96 --head-repeats 2".split()
    found = benchmark("head_overhead", tmp_path, *arguments)
    assert 1 < found["peak_memory_ratio"] < 1.02
