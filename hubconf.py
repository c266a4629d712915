"""torch.hub: `torch.hub.load("cadm-paper/cadm-paper", "cadm", num_classes=20, backbone="resnet50")`."""

dependencies = ["torch", "torchvision", "numpy", "safetensors", "jaxtyping", "filelock"]


def cadm(num_classes: int = 80, **options):
    """The paper's network; `options` as in `cadm_paper.model.CADM`."""
    from cadm_paper.model import CADM

    return CADM(num_classes, **options)


def load_model(folder: str, **hub):
    """A saved model of any method: a folder, or `user/name` on the Hugging Face hub."""
    from cadm_paper.methods import load_model

    return load_model(folder, **hub)
