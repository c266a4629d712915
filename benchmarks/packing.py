"""What packing does to scores: the same trained classifier, tested on original photographs and on their packs.

A ResNet-18 trained on ImageNet (without its last block: shared/data has no more of it), global max-pooling, and one logistic regression per class on
part of VOC 2007's training photographs, read from the originals; then the scores of part of the test photographs, read from the originals, from a raw pack
and from JPEG packs of several qualities. Nothing is tuned; what counts is the difference between the columns, not the mAP itself.

    python benchmarks/packing.py --out benchmarks/results/packing.json      # about five minutes on one core
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from measure import setting, write
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cadm_paper.data import load_split
from cadm_paper.data.feed import Feeder, prepare
from cadm_paper.data.pack import Pack, pack
from cadm_paper.metrics import multilabel_metrics

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))


def backbone() -> torch.nn.Module:
    """ResNet-18 up to layer4.0, with the weights that are there."""
    net = torchvision.models.resnet18(weights=None)
    net.layer4, net.fc, net.avgpool = net.layer4[:1], torch.nn.Identity(), torch.nn.AdaptiveMaxPool2d(1)
    with np.load(SHARED / "resnet18_imagenet_no_layer4_1.npz", allow_pickle=False) as file:
        unused = net.load_state_dict({k: torch.from_numpy(file[k]) for k in file.files}, strict=False)
    assert not unused.unexpected_keys and all(
        k.endswith("num_batches_tracked") for k in unused.missing_keys
    ), unused
    return net.eval()


@torch.inference_mode()
def features(net, split, size: int, packed=None) -> np.ndarray:
    """N x 512, one row per photograph."""
    return np.concatenate(
        [
            net(prepare(batch.images)).numpy()
            for batch in Feeder(split, size, pack=packed, in_memory=False).epoch(32)
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--train", type=int, default=600)
    p.add_argument("--test", type=int, default=600)
    p.add_argument("--qualities", type=int, nargs="+", default=[75, 90, 95])
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    if not (SHARED / "VOCdevkit-224").is_dir():
        sys.exit(f"{SHARED}: no VOCdevkit-224; set CADM_SHARED_DATA")
    train, test = (
        load_split("voc2007", SHARED / "VOCdevkit-224", s, missing="drop") for s in ("train", "test")
    )
    draw = lambda split, n: split.take(np.sort(np.random.default_rng(0).permutation(len(split))[:n]))
    train, test = draw(train, a.train), draw(test, a.test)
    net, scaler, models = backbone(), StandardScaler(), []
    x = scaler.fit_transform(features(net, train, a.size))
    for labels in train.labels.T:
        models.append(LogisticRegression(C=0.01, max_iter=500).fit(x[labels >= 0], labels[labels >= 0]))

    def scores(packed=None) -> np.ndarray:
        z = scaler.transform(features(net, test, a.size, packed))
        return np.stack([m.predict_proba(z)[:, 1] for m in models], axis=1)

    originals = scores()
    result = dict(
        command="python benchmarks/packing.py",
        train=len(train),
        test=len(test),
        size=a.size,
        setting=setting("cpu"),
        originals=dict(mAP=multilabel_metrics(originals, test.labels)["mAP"]),
        packs={},
    )
    with tempfile.TemporaryDirectory() as tmp:
        for name, how in {
            "raw": dict(encoding="raw"),
            **{f"jpeg-{q}": dict(quality=q) for q in a.qualities},
        }.items():
            packed = Pack(pack(test, Path(tmp) / name, a.size, **how))
            other = scores(packed)
            change = np.abs(other - originals)
            result["packs"][name] = dict(
                mAP=multilabel_metrics(other, test.labels)["mAP"],
                score_change_mean=change.mean(),
                score_change_max=change.max(),
                decisions_changed=((other > 0.5) != (originals > 0.5)).mean(),
                **packed.loss,
            )
            result["packs"][name] = {
                k: v if v is None else float(v) for k, v in result["packs"][name].items()
            }
    print(json.dumps(result, indent=1))
    write(result, a.out)


if __name__ == "__main__":
    main()
