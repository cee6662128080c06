"""A stand-in on a CPU for CUDA graphs: a tape of operations, each of which is repeated on the tensors it had.

As with a graph, Python does not run again at a replay, numbers are those of the capture, and a tensor that was replaced
since is read where it was.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# What waits for the device, or whose shape depends on data, and what makes a tensor of numbers of the host.
HOST = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal", "bincount", "allclose",
        "repeat_interleave", "lift_fresh", "randn", "bernoulli", "copy_to_host")  # fmt: skip


class Refused(RuntimeError):
    """Says which operation cannot be captured."""


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Listening(TorchDispatchMode):
    """Refuses what a graph could not hold, and keeps the operations with their tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func)
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        masks = name.startswith("aten.index") and any(x.dtype == torch.bool for x in tree_flatten(args[1:2])[0] if
                                                      isinstance(x, torch.Tensor))  # fmt: skip
        number = "lift_fresh" in name and args[0].dim() == 0  # which a kernel takes as an argument
        if masks or not number and any(f".{host}" in f".{name.removeprefix('aten.')}" for host in HOST):
            raise Refused(name)
        found = func(*args, **kwargs)
        outputs = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)]
        read = {storage(x) for x in inputs}
        self.operations.append((func, args, kwargs, outputs, [storage(x) not in read for x in outputs]))
        return found


class TapeRecorder:
    """A `Recorder`."""

    def __init__(self, device):
        self.device = device

    @staticmethod
    def why_not(device):
        return None

    def warm_up(self, run):
        """Listens already: a capture, which does nothing, may stand at a column that its graph will never write."""
        with Listening() as self.tape:
            self.made = run()
        return self.made

    def capture(self, run):
        tape, made = self.tape, self.made

        def replay():
            for func, args, kwargs, outputs, fresh in tape.operations:
                found = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
                for kept, new, is_fresh in zip(outputs, found, fresh, strict=True):
                    if is_fresh:
                        kept.copy_(new)

        return replay, made
