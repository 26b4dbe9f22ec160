"""How operators are registered with torch: as `torch.library.custom_op` does it, with less between a call and its work.

A network calls a hundred of them a step, whose kernels take tens of microseconds each, so that what happens around them
decides how long a small batch takes. Left out are the check that no output is an input, which `opcheck` makes in the
tests, and what lets one wrapper serve every schema.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("msv", "FRAGMENT")


def register(
    name: str,
    implementation: Callable,
    fake: Callable,
    keep: Callable[[Any, tuple, Any], None] | None = None,
    gradients: Callable | None = None,
) -> OpOverload:
    """Registers the operator `msv::name` for all devices; its schema is what the type hints say.

    Args:
        name: of the operator.
        implementation: what computes the outputs, none of which lies in the memory of an input.
        fake: makes empty tensors in the outputs' shapes, strides and dtypes.
        keep: given (ctx, inputs, outputs), keeps in ctx what `gradients` wants.
        gradients: given ctx and the gradients of outputs, those of inputs, None for what is no tensor. Without it the
            operator cannot be differentiated.

    Returns:
        The operator.
    """
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"msv::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.msv, name).default
    _LIBRARY.impl(name, _autograd_kernel(name, operator, keep, gradients), "Autograd")
    return operator


def _autograd_kernel(name: str, operator: OpOverload, keep: Callable | None, gradients: Callable | None) -> Callable:
    """What a call of the operator does before it reaches a device: notes how it is differentiated."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator(*inputs)
        if keep is not None:
            keep(ctx, inputs, outputs)
        return tuple(outputs) if isinstance(outputs, list) else outputs

    def backward(ctx: Any, *of_outputs: Tensor | None) -> Any:
        if gradients is None:
            raise RuntimeError(f"there is no way backward through {operator}; expected first derivatives only")
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients(ctx, *of_outputs)
        with torch._C._AutoDispatchBelowAutograd():  # nothing is to be noted of the operators called now
            return gradients(ctx, *of_outputs)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"msv_{name}", (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return call
