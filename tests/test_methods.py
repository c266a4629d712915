"""What the notebooks of the methods show once, over many heads; and that statistics of labels are those of the images trained on."""

import numpy as np
import pytest
import torch

from cadm_paper.data import build_scenes
from cadm_paper.engine.config import TrainConfig
from cadm_paper.engine.splits import prepare_data
from cadm_paper.methods import METHODS, load_model
from cadm_paper.methods.base import build_network, method_arguments, streams_of
from cadm_paper.methods.sequence import search
from cadm_paper.model import predicted
from cadm_paper.train import train

CLASSES, SIZE = 5, 64


def head(method, seed=0, start=True, **given):
    """A head in double precision that has seen the labels of some images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        args = method_arguments(method, given)
        found = (
            build_network(method, CLASSES, "narrow_resnet", None, args, image_size=SIZE).double().eval().head
        )
    if start:
        found.start(np.random.default_rng(seed).integers(0, 2, (20, CLASSES)), list("abcde"))
    return found


def maps(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(3, 64, 8, 8, dtype=torch.float64, generator=g) for name in ("layer3", "layer4")}


@pytest.mark.parametrize("method, given", [*((m, {}) for m in METHODS), ("cadm", {"streams": "scls"})])
def test_the_prediction_is_made_of_the_streams_that_the_method_says(method, given):
    one = head(method, **given)
    out, streams = one(maps()), streams_of(method, method_arguments(method, given))
    assert torch.equal(out.logits, predicted(streams or "fcls", out.logits_fcls, out.logits_scls))
    assert torch.equal(out.logits_fcls, out.logits_scls) == (streams is None)


@pytest.mark.parametrize("seed", range(3))
def test_a_silent_regularisation_leaves_half_the_main_logit(seed):
    srn = head("srn", seed)
    for p in srn.regularise[-1].parameters():
        p.data.zero_()
    out = srn(maps(seed))
    torch.testing.assert_close(out.logits, out.logits_fcls / 2)
    assert not torch.equal(out.logits_fcls[0], out.logits_fcls[1])


@pytest.mark.parametrize("seed", range(3))
def test_without_edges_labels_share_nothing(seed):
    """ML-GCN: a factorised linear classifier; ML-ZSL: a logit for each initial state alone."""
    gcn, X = head("ml_gcn", seed, start=False), maps(seed)
    first, second = (layer.weight.T for layer in gcn.layers_of_graph)
    weights = torch.nn.functional.leaky_relu(first, 0.2) @ second
    torch.testing.assert_close(gcn(X).logits, X["layer4"].amax((2, 3)) @ weights.T)
    zsl, h = head("ml_zsl", seed, start=False), torch.rand(3, CLASSES, 5, dtype=torch.float64)
    for edges, shared in ((0.0, False), (0.2, True)):
        zsl.edges.fill_(edges)
        moved = [
            zsl.propagate(h + torch.eye(CLASSES)[c, :, None])[0] != zsl.propagate(h)[0]
            for c in range(CLASSES)
        ]
        assert torch.equal(torch.stack(moved), torch.eye(CLASSES) > 0) != shared


def test_labels_of_query2label_do_not_see_each_other():
    q2l, X, order = head("query2label"), maps(), [3, 0, 4]
    before = q2l(X).logits
    for name in ("queries", "weight", "bias"):
        setattr(q2l, name, torch.nn.Parameter(getattr(q2l, name)[order]))
    torch.testing.assert_close(q2l(X).logits, before[:, order])


@pytest.mark.parametrize("method", ["cnn_rnn", "order_free_rnn"])
def test_a_beam_of_one_takes_the_best_next_label_and_none_twice(method):
    rnn, features = head(method), maps()["layer4"]
    x = features.mean((2, 3)) if method == "cnn_rnn" else features.flatten(2).transpose(1, 2)
    rnn.get_parameter("labels" if method == "cnn_rnn" else "predict.weight").data.mul_(
        6
    )  # scores that differ
    greedy = search(rnn.step, rnn.begin(x), CLASSES, CLASSES, 1)[0]
    for image, when in enumerate(greedy):
        state, previous = rnn.begin(x[image : image + 1]), CLASSES
        taken, named = torch.zeros(1, CLASSES + 1, dtype=torch.bool), []
        while len(named) < CLASSES:
            scores, state = rnn.step(torch.tensor([previous]), taken, state)
            previous = scores.masked_fill(taken, -torch.inf).argmax().item()
            if previous == CLASSES:
                break
            named.append(previous)
            taken[0, previous] = True
        assert named == when.argsort()[when.sort().values > 0].tolist()


@pytest.mark.parametrize("method, statistic", [("ml_gcn", "graph"), ("cnn_rnn", "rank"), ("ml_zsl", "edges")])
def test_statistics_of_labels_are_those_of_the_images_trained_on(tmp_path, method, statistic):
    """Not of the held-out ones; saved with the model."""
    given = dict(data_dir=str(tmp_path / "scenes"), out_dir=str(tmp_path / "run"), weights="none")
    config = TrainConfig(method=method, epochs=1, holdout=0.5, **given)
    build_scenes(tmp_path / "scenes", train=96, test=8)
    record = train(config)
    saved, fresh = (load_model(record.folder / "checkpoint" / "model").head for _ in range(2))
    kept = prepare_data(config)[0].labels
    for labels, same in ((kept, True), (kept[::2], False)):
        fresh.start(labels, record.dataset["classes"])
        assert torch.equal(getattr(saved, statistic), getattr(fresh, statistic)) == same
