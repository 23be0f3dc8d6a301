"""Triton's interpreter without what it does in vain, which is three quarters of its time; numbers are the same bits.

Patches of this process, for the version whose code they were read from; under another one it is only slow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import triton
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    if triton.__version__.startswith("3.6."):
        cover_a_kernel_once()
        patch_once_a_launch()
        leave_out_checks_that_nobody_reads()
        remember_numpy_types()
        remember_shapes()
        broadcast_where_shapes_differ()


def cover_a_kernel_once() -> None:
    """Coverage's tracer, under which all is twice as slow, sees the first launch of a kernel with its constants."""
    call = interpreter.GridExecutor.__call__
    seen: set[Any] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        key = self.fn, *(str(kwargs.get(name)) for name in self.constexprs)
        tracer = sys.gettrace()
        if key in seen and type(tracer).__module__.startswith("coverage"):  # not a debugger
            sys.settrace(None)
        try:
            call(self, *args, **kwargs)
        finally:
            sys.settrace(tracer)
        seen.add(key)

    interpreter.GridExecutor.__call__ = launched


def patch_once_a_launch() -> None:
    """`triton.language` is replaced for a launch; each call of a function inside a kernel did it again (1 ms)."""
    patch_lang, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[int, Any] = {}  # by the module of a kernel, or of a function that it calls

    class Kept:
        def restore(self) -> None:
            pass

    def patched(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in scopes:
            scopes[module] = patch_lang(fn)
        return Kept()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(self, *args, **kwargs)
        finally:
            while scopes:
                scopes.popitem()[1].restore()  # the last one first

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patched, launched


def leave_out_checks_that_nobody_reads() -> None:
    """Sums and products of integers were formed again, as int64, for an assertion that ``debug`` alone makes."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_numpy_types() -> None:
    """The table of NumPy's types was built for every number."""
    of_scalar, of_pointer = functools.cache(interpreter._get_np_dtype), interpreter._get_np_dtype(core.pi32_t)

    def found(kind: Any) -> Any:
        kind = kind.element_ty if isinstance(kind, core.block_type) else kind
        return of_pointer if isinstance(kind, core.pointer_type) else of_scalar(kind)

    interpreter._get_np_dtype = found


def remember_shapes() -> None:
    """A tile's type, its name and the constants of its shape were made for every operation; there are few of them."""
    make_type = core.block_type.__init__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}

    def make_or_recall(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(n.value if isinstance(n, core.constexpr) else n for n in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = (*type.shape.values,) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))
        self.shape, self.numel = shapes[shape]

    core.block_type.__init__, core.tensor.__init__ = make_or_recall, tensor


def broadcast_where_shapes_differ() -> None:
    """What has one shape, or none, was compared number by number."""
    broadcast = TritonSemantic.broadcast_impl_value

    def shortened(self: Any, lhs: Any, rhs: Any) -> Any:
        shapes = [each.type.shape.values if each.type.is_block() else None for each in (lhs, rhs)]
        return (lhs, rhs) if shapes[0] == shapes[1] else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = shortened
