"""One thread per process (`make test` runs two, and waiting threads cost the other's time), and one fixture."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def largest_tensor():
    """A context manager; its `numel` is the size of the largest tensor that torch allocates meanwhile."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            sizes = (t.untyped_storage().nbytes() // t.element_size() for t in tensors)
            self.numel = max([self.numel, *sizes])
            return out

    return Watch()
