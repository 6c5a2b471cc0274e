"""Operations with a derivative of their own, written once: for eager use and for the compiler.

torch.compile takes a custom operator as one node, without looking inside; outside of it the first custom operator that
runs loads the whole compiler, which costs a second and 150 MiB. So each operation is both a custom operator and an
autograd function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from contrastive_mm.errors import UserError


class Operation:
    """A function of tensors and numbers to a tensor, or to a tuple of them, that autograd takes as a whole.

    Args:
        name: its name among torch's operators.
        schema: its parameters and results as torch writes them, ``"(Tensor features, int period) -> Tensor"``.
        compute: the function itself; it is never differentiated.
        allocate: from the same parameters, results of the right shapes and types, their values left open.
        save: writes on the context what the derivative needs; takes it, the parameters, and the result.
        differentiate: takes the context, ``call`` and the results' gradients, gives a gradient (or None) for each
            parameter; other operations in it are called as ``call(operation, ...)``. Without it the operation is the
            derivative of another one and refuses to be differentiated itself.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        compute: Callable[..., Any],
        allocate: Callable[..., Any],
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        differentiate: Callable[..., Any] | None = None,
    ) -> None:
        def no_state(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

        keep = save or no_state
        derive = differentiate or _refuse_second_derivative
        self.compiled = torch.library.custom_op(f"contrastive_mm::{name}", compute, mutates_args=(), schema=schema)
        self.compiled.register_fake(allocate)

        def derive_compiled(ctx: Any, *gradients: Any) -> Any:
            return derive(ctx, lambda operation, *inputs: operation.compiled(*inputs), *gradients)

        self.compiled.register_autograd(derive_compiled, setup_context=keep)

        def forward(*inputs: Any) -> Any:
            return compute(*inputs)

        def backward(ctx: Any, *gradients: Any) -> Any:
            return derive(ctx, lambda operation, *inputs: operation.eager(*inputs), *gradients)

        members = {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(keep),
            "backward": staticmethod(backward),
        }
        function: Any = type(name, (torch.autograd.Function,), members)
        self.eager: Callable[..., Any] = function.apply

    def __call__(self, *inputs: Any) -> Any:
        """The function's result, as a node of autograd's graph."""
        return (self.compiled if torch.compiler.is_compiling() else self.eager)(*inputs)


def _refuse_second_derivative(ctx: Any, call: Any, *gradients: Any) -> Any:
    raise UserError(
        "This loss can't be differentiated twice in its tiled or fused form; put "
        "`with losses.use_form('plain'):` around it."
    )
