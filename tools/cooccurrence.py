"""Label co-occurrence in MS-COCO's train2014 and in COCO-40k, a part of it: outputs/reference/coco40k/cooccurrence.npz.

For each of the two: the share of labelled images with each label (C), and the pointwise mutual information of each pair of labels (C x C).

    python tools/cooccurrence.py                    # reads data/coco2014
    python tools/cooccurrence.py --labels FILE      # .npz: `names` of the images, `labels` N x 80
"""

import argparse

import numpy as np

from cadm_paper.data.datasets import COCO40K_IDS, load_split
from cadm_paper.files import read_arrays
from cadm_paper.results.claims import reference_folder
from cadm_paper.results.measures import pmi


def train2014(file: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Image ids N, and labels N x C of 0 and 1, of the labelled images."""
    if file is None:
        split = load_split("coco2014", split="train2014", unlabelled="drop")
        return np.array(split.image_ids, int), split.labels
    table = read_arrays(file)
    rows = np.char.startswith(table["names"], "COCO_train2014_") & table["labels"].any(1)
    ids = [int(name.removesuffix(".jpg")[-12:]) for name in table["names"][rows]]
    return np.array(ids), table["labels"][rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels")
    ids, labels = train2014(parser.parse_args().labels)
    parts = {
        "train2014": labels,
        "coco40k": labels[np.isin(ids, np.concatenate([*read_arrays(COCO40K_IDS).values()]))],
    }
    out = reference_folder("coco40k") / "cooccurrence.npz"
    out.parent.mkdir(exist_ok=True)
    found = {f"{name}/share": of.mean(0) for name, of in parts.items()}
    found |= {f"{name}/pmi": pmi(of) for name, of in parts.items()}
    np.savez_compressed(out, **{name: values.astype(np.float32) for name, values in found.items()})
    print({name: len(of) for name, of in parts.items()})
