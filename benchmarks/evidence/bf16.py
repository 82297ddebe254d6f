"""A module run with its bf16 convolutions and matrix products computed in float32, where the processor has no bf16.

    python -m benchmarks.evidence.bf16 mixsize_timm.train ...

What is rounded to bf16 stays so: weights, activations and gradients are bf16 before and after each product, and sums
are of float32, as in processors that have bf16. Only the order of the sums differs, as it does between processors.
"""
import runpy
import sys
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_PRODUCTS = frozenset({
    torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default,
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})


class Bf16InFloat32(TorchDispatchMode):
    """While it is entered, products of bf16 tensors are computed in float32 and rounded to bf16."""

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Tuple[Any, ...] = (),
                           kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if function not in _PRODUCTS or args[0].dtype is not torch.bfloat16:
            return function(*args, **kwargs)
        wide = tree_map_only(torch.Tensor, torch.Tensor.float, args)
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, function(*wide, **kwargs))


def main() -> None:
    """Run the module that the first argument names, with the arguments after it."""
    if len(sys.argv) < 2:
        print(f'usage: python -m {__spec__.name} MODULE [ARGUMENT ...]', file=sys.stderr)
        sys.exit(2)
    del sys.argv[0]
    with Bf16InFloat32():
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
