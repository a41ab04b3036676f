"""Count the bytes that autograd holds during a step, on the meta device too, where tensors have no content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode


def distinct_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of some tensors; a storage that several of them share is counted once."""
    storages = {_key(tensor): _bytes(tensor) for tensor in tensors if tensor is not None}
    return sum(storages.values())


def _key(tensor: Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _bytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


class PeakOfSaved:
    """Count what autograd holds: ``with PeakOfSaved(weights) as count: count.backward(forward())``.

    Args:
        held: Tensors that are held anyway, such as weights.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._held = set(map(_key, held))
        self._uses: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda saved: saved.tensor)
        self.live = 0
        self.peak = 0

    def __enter__(self) -> PeakOfSaved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def note(self, passing: int) -> None:
        """Note that ``passing`` bytes are held for a moment, besides what is saved."""
        self.peak = max(self.peak, self.live + passing)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, with the gradients that enter and leave each node of the graph."""
        waiting: list[Any] = [loss.grad_fn]
        seen: set[Node] = set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                node.register_hook(lambda entering, leaving: self.note(distinct_bytes([*entering, *leaving])))
                waiting += [following for following, _ in node.next_functions]
        loss.backward()

    def _pack(self, tensor: Tensor) -> _Saved:
        key = _key(tensor)
        if key not in self._held:
            self.live += 0 if self._uses.get(key) else _bytes(tensor)
            self._uses[key] = self._uses.get(key, 0) + 1
            self.note(0)
        # Detached, since an output that its own node saves would keep that node alive.
        return _Saved(tensor.detach(), key, self)

    def release(self, key: int, size: int) -> None:
        """Note that a saved tensor is released."""
        if key not in self._held:
            self._uses[key] -= 1
            self.live -= 0 if self._uses[key] else size


class _Saved:
    """A tensor that is saved for the backward pass, and tells when it is released."""

    def __init__(self, tensor: Tensor, key: int, count: PeakOfSaved) -> None:
        self.tensor = tensor
        self._key = key
        self._count = count

    def __del__(self) -> None:
        self._count.release(self._key, _bytes(self.tensor))


class Emulation(TorchFunctionMode):
    """Make the meta device save what real devices save: attention by a fused kernel, and autocast.

    Args:
        autocast: Type in which linear layers compute; None for that of their inputs.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("item", "__bool__") and args[0].is_meta:
            return True  # asked of masks without padding only, which are all ones
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            return _FusedAttention.apply(query, key, value, kwargs.get("attn_mask"))
        if func is torch.nn.functional.linear and self._autocast is not None:
            args = tuple(item.to(self._autocast) if isinstance(item, Tensor) else item for item in args)
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Attention that saves inputs, output and one number per query and head, as FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return an output of the right shape."""
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return gradients of the right shapes."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
