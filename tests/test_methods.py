"""Streams of all heads, greedy decoding of the recurrent ones, and statistics of the training labels."""

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


def head(method, **given):
    """A head in double precision with the label statistics of random images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args = method_arguments(method, given)
        found = (
            build_network(method, CLASSES, "narrow_resnet", None, args, image_size=SIZE).double().eval().head
        )
    found.start(np.random.default_rng(0).integers(0, 2, (20, CLASSES)), list("abcde"))
    return found


def maps():
    g = torch.Generator().manual_seed(0)
    return {name: torch.rand(3, 64, 8, 8, dtype=torch.float64, generator=g) for name in ("layer3", "layer4")}


@pytest.mark.parametrize("method, given", [*((m, {}) for m in METHODS), ("cadm", {"streams": "scls"})])
def test_predicting_streams(method, given):
    one = head(method, **given)
    out, streams = one(maps()), streams_of(method, method_arguments(method, given))
    assert torch.equal(out.logits, predicted(streams or "fcls", out.logits_fcls, out.logits_scls))
    assert torch.equal(out.logits_fcls, out.logits_scls) == (streams is None)


@pytest.mark.parametrize("method", ["cnn_rnn", "order_free_rnn"])
def test_a_beam_of_one_is_greedy_and_repeats_no_label(method):
    rnn = head(method)
    x = rnn.inputs(maps()["layer4"])
    weights = rnn.get_parameter("labels" if method == "cnn_rnn" else "predict.weight")
    weights.data.mul_(6)  # scores that differ
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
@pytest.mark.parametrize("part", [dict(holdout=0.5), dict(limit=48)])
def test_label_statistics_come_from_the_training_images(tmp_path, method, statistic, part):
    """Not from images that are held out or beyond the limit; they are saved with the model."""
    given = dict(data_dir=str(tmp_path / "scenes"), out_dir=str(tmp_path / "run"), weights="none")
    config = TrainConfig(method=method, epochs=1, **part, **given)
    build_scenes(tmp_path / "scenes", train=96, test=8)
    record = train(config)
    saved, fresh = (load_model(record.folder / "checkpoint" / "model").head for _ in range(2))
    kept = prepare_data(config)[0].labels
    for labels, same in ((kept, True), (kept[::2], False)):
        fresh.start(labels, record.dataset["classes"])
        assert torch.equal(getattr(saved, statistic), getattr(fresh, statistic)) == same
