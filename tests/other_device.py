"""A device that is only pretended, to find tensors and generators on the wrong one without a GPU

Under `OtherDevice` tensors made for `DEVICE` hold their numbers in a tensor on the CPU. Each operation is looked at: other tensors
with dimensions among its inputs must be on `DEVICE` too (numbers may come from anywhere, as with CUDA), and what is drawn there
must come from a generator of there, which is one with the seed `SEED`.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE, SEED = torch.device("meta"), 424242
MOVES = ("aten::_to_copy", "aten::copy_", "aten::lift_fresh")


class There(torch.Tensor):
    "A tensor on `DEVICE`; `inner` holds its numbers"

    @staticmethod
    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)

    def __init__(self, inner):
        self.inner = inner

    def here(self):
        return self.detach().inner

    def item(self):
        return self.here().item()

    def tolist(self):
        return self.here().tolist()

    def __bool__(self):
        return bool(self.here())

    def __int__(self):
        return int(self.here())

    __index__ = __int__

    def __float__(self):
        return float(self.here())

    def __repr__(self, **options):
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return perform(func, args, kwargs or {})


def perform(func, args, kwargs):
    "One operation, looked at and done on the CPU"
    leaves, name = tree_leaves((args, kwargs)), func._schema.name
    there = [v for v in leaves if isinstance(v, There)]
    here = [v for v in leaves if isinstance(v, torch.Tensor) and not isinstance(v, There)]
    wanted = kwargs.get("device")
    result_there = bool(there) if wanted is None else torch.device(wanted) == DEVICE
    if there and name not in MOVES and any(v.ndim for v in here):
        raise RuntimeError(f"{name}: tensors on two devices, {[tuple(v.shape) for v in here]} on the CPU")
    for generator in (v for v in leaves if isinstance(v, torch.Generator)):
        if (generator.initial_seed() == SEED) != result_there:
            raise RuntimeError(f"{name}: the generator is on another device than what it draws")
    args, kwargs = tree_map(inner, (args, kwargs))
    with _disable_current_modes():
        found = func(*args, **kwargs)
    same = {id(v.inner): v for v in there}
    wrap = lambda v: same.get(id(v), There(v)) if isinstance(v, torch.Tensor) else v  # noqa: E731
    return tree_map(wrap, found) if result_there else found


def inner(v):
    if isinstance(v, There):
        return v.inner
    return torch.device("cpu") if isinstance(v, torch.device) else v


class OtherDevice(TorchDispatchMode):
    "The context in which `DEVICE` can be used"

    def __init__(self, monkeypatch):
        super().__init__()
        for name in ("tensor", "as_tensor"):  # these make their tensor out of sight
            monkeypatch.setattr(torch, name, moved(getattr(torch, name)))
        monkeypatch.setattr(torch, "autocast", AutocastThere)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return perform(func, args, kwargs or {})


def moved(make):
    def then_move(*args, device=None, **kwargs):
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    return then_move


class AutocastThere(torch.autocast):
    "Autocast knows no device `meta`"

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


def take_there(network):
    "Move the parameters of a network"
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(There(p.detach().clone()))
    return network
