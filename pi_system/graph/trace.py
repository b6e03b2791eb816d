"""From a PyTorch network to a :class:`Graph`.

The traced network runs once on an example. Whatever does not depend on the image is computed
then and there (so weight normalisation, buffers and sizes need no rules of their own); every
other operation must be one of the handlers below, each written with the signature of the
``torch`` function whose modules, functions and methods it stands for.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import UnsupportedLayer, UsageError
from ..nn.linearize import (
    IN_PLACE,
    evaluating,
    is_relu,
    layer_name,
    linearize,
    refuse_other_activations,
    trace,
)
from ..nn.relu import MaskedReLU
from . import validate
from .fold import fold
from .ir import Array, Attribute, Graph, Node

_BATCH: Final = 2
_TOLERANCE: Final = 1e-3
_SUPPORTED: Final = (
    "supported are conv2d, linear, batch_norm, relu, addition, concatenation of channels, "
    "average and max pooling, flatten, and dropout"
)


def export(
    model: nn.Module,
    example: Tensor | Sequence[int],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Graph:
    """Trace ``model`` into a graph, batch norm folded, and check it against ``model``.

    Args:
        model: an ordinary or masked network (N, C, H, W) -> (N, classes); ReLUs that are not
            masked yet are all kept. It is not changed.
        example: one or more images, or the shape (C, H, W) of one.
        metadata: JSON-able facts for :attr:`Graph.metadata`.

    Raises:
        UnsupportedLayer: a layer has no counterpart; the message names it and a way out.
        UsageError: the example is not an image.
    """
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else tuple(example)
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"an input is (C, H, W), got {shape}")
    first = next(iter(model.parameters()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, *shape, generator=generator).to(first)
    with evaluating(model), torch.no_grad():
        traced = trace(model)
        _check_signature(traced, model)
        refuse_other_activations(traced)
        if any(is_relu(node, traced) for node in traced.graph.nodes):
            traced = linearize(traced, images)
        walker = _Walker(traced, metadata or {})
        graph = walker.export(images.clone())
        expected = model(images.clone())
    graph = fold(graph)
    validate.check(graph, weights=True, error=UnsupportedLayer)
    _verify(graph, images, expected)
    return graph


def _check_signature(traced: fx.GraphModule, model: nn.Module) -> None:
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder" and not n.args]
    if len(inputs) != 1:
        names = ", ".join(str(n.target) for n in inputs)
        raise UnsupportedLayer(
            f"{type(model).__name__} has {len(inputs)} inputs ({names}); export a network of one "
            "image input, wrap it if need be"
        )


def _verify(graph: Graph, images: Tensor, expected: Tensor) -> None:
    """The graph must compute what the network does; hooks, for one, do not show in a trace."""
    from . import execute

    got = execute.run(graph, images.detach().cpu().float().numpy())
    want = expected.detach().cpu().float().numpy()
    error = float(np.abs(got - want).max())
    if not error <= _TOLERANCE * (1 + float(np.abs(want).max())):
        raise UnsupportedLayer(
            f"the exported network differs from {graph.metadata.get('name', 'the original')} by "
            f"{error:.3g}; it depends on hooks, randomness or the batch, or its values overflow"
        )


@dataclass(frozen=True)
class _Edge:
    """A value of the graph: its node, and the shape it has in PyTorch, batch included.

    The two shapes differ between a reshape and the layer that reads it.
    """

    node: Node
    shape: tuple[int, ...]


class _Walker(fx.Interpreter):
    """Runs the network once and writes a node for every operation on the image."""

    def __init__(self, module: fx.GraphModule, metadata: Mapping[str, Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.root = module
        self.metadata = metadata
        self.nodes: list[Node] = []
        self.tensors: dict[str, Array] = {}
        self.edges: dict[fx.Node, _Edge] = {}
        self.stale: dict[fx.Node, str] = {}
        self.names: set[str] = set()
        self.layer = ""
        self.kind = ""

    def export(self, images: Tensor) -> Graph:
        super().run(images)
        (output,) = [n for n in self.root.graph.nodes if n.op == "output"]
        result = output.args[0]
        if not isinstance(result, fx.Node) or result not in self.edges:
            raise UnsupportedLayer(
                "the network must return one tensor of logits computed from the image; "
                "wrap it to return only that"
            )
        edge = self._fresh(result)
        self.layer, self.kind = "output", "output"
        if len(edge.shape) != 2:
            raise self._refuse(f"the output is {edge.shape[1:]} per image, expected (classes,)")
        last = self._settle(edge)
        return Graph(_needed(self.nodes, last), self._tensors_of(last), self.metadata)

    def _tensors_of(self, last: Node) -> dict[str, Array]:
        names = {node.name for node in _needed(self.nodes, last)}
        return {k: v for k, v in self.tensors.items() if k.rpartition(".")[0] in names}

    # -- running -----------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnsupportedLayer(
                f"layer {layer_name(n)}: does not run on this input: {reason}"
            ) from error
        self.layer = layer_name(n)
        self.kind = getattr(n.target, "__name__", str(n.target))
        if n.op == "placeholder":
            if isinstance(result, Tensor):
                node = Node(self._name(n.name), "input", (), tuple(result.shape[1:]))
                self.nodes.append(node)
                self.edges[n] = _Edge(node, tuple(result.shape))
        elif n.op != "output" and any(source in self.edges for source in n.all_input_nodes):
            self._emit(n, result)
        return result

    def _emit(self, n: fx.Node, result: Any) -> None:
        def value(source: fx.Node) -> Any:
            return self._fresh(source) if source in self.edges else self.env[source]

        args = fx.map_arg(n.args, value)
        kwargs = fx.map_arg(n.kwargs, value)
        if not isinstance(result, Tensor):
            # Sizes, or a tuple of tensors; the latter fails where its parts are read.
            if _holds_tensor(result):
                raise self._refuse("returns several tensors")
            return
        if n.op == "call_module":
            edge = self._module(self.root.get_submodule(str(n.target)), args, kwargs, result)
        else:
            handler = (_METHODS if n.op == "call_method" else _FUNCTIONS).get(n.target)  # type: ignore[arg-type]
            if handler is None:
                raise self._refuse(_hint(self.kind))
            edge = self._call(handler, args, kwargs, result)
        if edge.shape != tuple(result.shape):
            raise self._refuse(f"gives {tuple(result.shape)}, expected {edge.shape}")
        self.edges[n] = edge
        if _changes_in_place(n):
            self._rebind(n, edge, result)

    def _call(self, handler: Callable[..., _Edge], args: Any, kwargs: Any, result: Tensor) -> _Edge:
        try:
            return handler(self, result, *args, **kwargs)
        except TypeError as error:
            raise self._refuse(f"called in a way that is not understood ({error})") from error

    def _rebind(self, n: fx.Node, edge: _Edge, result: Tensor) -> None:
        """All names of a tensor that changed in place now mean the new value."""
        storage = result.untyped_storage().data_ptr()
        for other in self.edges:
            value = self.env.get(other)
            if other is n or not isinstance(value, Tensor):
                continue
            if value.untyped_storage().data_ptr() == storage:
                if value.shape == result.shape and value.stride() == result.stride():
                    self.edges[other] = edge
                else:
                    self.stale[other] = layer_name(n)

    def _fresh(self, source: fx.Node) -> _Edge:
        if source in self.stale:
            raise self._refuse(
                f"reads a view of a tensor that {self.stale[source]} changed in place; "
                "write that operation out of place"
            )
        return self.edges[source]

    # -- writing -----------------------------------------------------------------------------

    def _refuse(self, reason: str) -> UnsupportedLayer:
        return UnsupportedLayer(f"layer {self.layer} ({self.kind}): {reason}")

    def _name(self, wanted: str) -> str:
        wanted = re.sub(r"[^A-Za-z0-9_.\-]", "_", wanted)[:160].lstrip(".-") or "node"
        name, count = wanted, 1
        while name in self.names:
            count += 1
            name = f"{wanted}_call{count}"
        self.names.add(name)
        return name

    def _write(
        self,
        op: str,
        inputs: Sequence[Node],
        *,
        channels: int = 0,
        attrs: Mapping[str, Attribute] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> _Edge:
        attrs = attrs or {}
        try:
            shape = validate.infer_shape(op, attrs, tuple(n.shape for n in inputs), channels)
        except ValueError as error:
            raise self._refuse(str(error)) from error
        node = Node(self._name(self.layer), op, tuple(n.name for n in inputs), shape, attrs)
        self.nodes.append(node)
        for role, value in (tensors or {}).items():
            self.tensors[f"{node.name}.{role}"] = self._array(value, role)
        return _Edge(node, (_BATCH, *shape))

    def _array(self, value: Tensor, role: str) -> Array:
        dtype = np.bool_ if role == "mask" else np.float32
        array: Array = np.array(value.detach().cpu().numpy(), dtype=dtype, order="C")
        if not np.isfinite(array).all():
            raise self._refuse(f"its {role} holds a value that is not finite")
        return array

    def _settle(self, edge: Any) -> Node:
        """The node of ``edge``, flattened if that is what its shape asks for."""
        if not isinstance(edge, _Edge):
            raise self._refuse("needs a value computed from the image")
        shape = edge.shape[1:]
        if edge.node.shape == shape:
            return edge.node
        if edge.shape[0] == _BATCH and shape == (math.prod(edge.node.shape),):
            for node in self.nodes:
                if node.op == "flatten" and node.inputs == (edge.node.name,):
                    return node
            layer, self.layer = self.layer, f"{edge.node.name}.flatten"
            flat = self._write("flatten", [edge.node]).node
            self.layer = layer
            return flat
        raise self._refuse(
            f"reads {edge.node.shape} reshaped to {edge.shape}; the only reshape is a "
            "flattening of each whole image"
        )

    def _constant(self, value: Any, what: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise self._refuse(f"its {what} depends on the image")
        return value

    def _module(self, module: nn.Module, args: Any, kwargs: Any, result: Tensor) -> _Edge:
        self.kind = type(module).__name__
        for kind, call in _MODULES.items():
            if isinstance(module, kind):
                handler, extra = call(module)
                if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
                    raise self._refuse(
                        f"padding_mode {module.padding_mode!r} is not supported; use 'zeros'"
                    )
                return self._call(handler, args, {**extra, **kwargs}, result)
        raise self._refuse(_hint(self.kind))


# -- handlers: (walker, the result, then the torch function's own parameters) ---------------------


def _conv2d(
    w: _Walker, result: Tensor, input: Any, weight: Any, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> _Edge:  # fmt: skip
    kernel = w._constant(weight, "weight")
    size = (kernel.shape[2], kernel.shape[3])
    steps = _pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = tuple(d * (k - 1) for d, k in zip(steps, size, strict=True))
        if any(t % 2 for t in total):
            raise w._refuse("padding 'same' is uneven for this kernel; use an odd kernel")
        padding = tuple(t // 2 for t in total)
    source = w._settle(input)
    attrs: dict[str, Attribute] = {
        "kernel": size, "stride": _pair(stride), "padding": _pair(padding), "dilation": steps,
        "groups": groups,
    }  # fmt: skip
    out = kernel.shape[0]
    offset = kernel.new_zeros(out) if bias is None else w._constant(bias, "bias")
    return w._write(
        "conv", [source], channels=out, attrs=attrs, tensors={"weight": kernel, "bias": offset}
    )


def _linear(w: _Walker, result: Tensor, input: Any, weight: Any, bias: Any = None) -> _Edge:
    matrix = w._constant(weight, "weight")
    if isinstance(input, _Edge) and len(input.shape) != 2:
        raise w._refuse(f"acts on the last axis of {input.shape[1:]}; flatten before it")
    source = w._settle(input)
    out = matrix.shape[0]
    offset = matrix.new_zeros(out) if bias is None else w._constant(bias, "bias")
    return w._write("linear", [source], channels=out, tensors={"weight": matrix, "bias": offset})


def _batch_norm(
    w: _Walker, result: Tensor, input: Any, running_mean: Any, running_var: Any,
    weight: Any = None, bias: Any = None, training: bool = False, momentum: Any = 0.1,
    eps: float = 1e-5, cudnn_enabled: bool = True,
) -> _Edge:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise w._refuse("normalises by each batch; it needs running statistics")
    source = w._settle(input)
    mean = w._constant(running_mean, "mean").double()
    scale = 1 / torch.sqrt(w._constant(running_var, "variance").double() + eps)
    if weight is not None:
        scale = scale * w._constant(weight, "weight")
    shift = -mean * scale
    if bias is not None:
        shift = shift + w._constant(bias, "bias")
    return w._write("affine", [source], tensors={"scale": scale, "shift": shift})


def _masked_relu(w: _Walker, result: Tensor, x: Any, *, mask: Tensor) -> _Edge:
    source = w._settle(x)
    if tuple(mask.shape) != source.shape:
        raise w._refuse(f"its mask is {tuple(mask.shape)}, the activations {source.shape}")
    return w._write("relu", [source], tensors={"mask": mask})


def _affine(w: _Walker, edge: _Edge, scale: Any, shift: Any) -> _Edge:
    source = w._settle(edge)
    channels = source.shape[0]
    values = {
        "scale": _per_channel(w, scale, edge.shape, channels),
        "shift": _per_channel(w, shift, edge.shape, channels),
    }
    return w._write("affine", [source], tensors=values)


def _per_channel(w: _Walker, value: Any, shape: tuple[int, ...], channels: int) -> Tensor:
    constant = torch.as_tensor(value, dtype=torch.float64)
    if np.broadcast_shapes(tuple(constant.shape), shape) != shape:
        raise w._refuse(f"a constant of shape {tuple(constant.shape)} enlarges {shape}")
    full = constant.expand(shape)
    first = full[0].reshape(channels, -1)[:, 0]
    if not torch.equal(full, first.reshape(-1, *[1] * (len(shape) - 2)).expand(shape)):
        raise w._refuse("a constant must be the same at every position of a channel")
    return first


def _add(
    w: _Walker, result: Tensor, input: Any, other: Any, *, alpha: float = 1, sign: int = 1
) -> _Edge:
    factor = alpha * sign
    if isinstance(input, _Edge) and isinstance(other, _Edge):
        if input.shape != other.shape:
            raise w._refuse(f"adds {input.shape[1:]} to {other.shape[1:]}; shapes must be equal")
        if factor != 1:
            other = _affine(w, other, factor, 0.0)
        return w._write("add", [w._settle(input), w._settle(other)])
    if isinstance(input, _Edge):
        return _affine(w, input, 1.0, torch.as_tensor(other, dtype=torch.float64) * factor)
    return _affine(w, other, factor, input)


def _sub(w: _Walker, result: Tensor, input: Any, other: Any, *, alpha: float = 1) -> _Edge:
    return _add(w, result, input, other, alpha=alpha, sign=-1)


def _mul(w: _Walker, result: Tensor, input: Any, other: Any) -> _Edge:
    if isinstance(input, _Edge) and isinstance(other, _Edge):
        raise w._refuse(
            "multiplies two activations (attention, squeeze-and-excitation); "
            "use a network without it"
        )
    edge, constant = (input, other) if isinstance(input, _Edge) else (other, input)
    return _affine(w, edge, constant, 0.0)


def _div(w: _Walker, result: Tensor, input: Any, other: Any) -> _Edge:
    if isinstance(other, _Edge):
        raise w._refuse("divides by an activation")
    return _affine(w, input, 1 / torch.as_tensor(other, dtype=torch.float64), 0.0)


def _neg(w: _Walker, result: Tensor, input: Any) -> _Edge:
    return _affine(w, input, -1.0, 0.0)


def _cat(w: _Walker, result: Tensor, tensors: Any, dim: int = 0) -> _Edge:
    if not all(isinstance(t, _Edge) for t in tensors):
        raise w._refuse("joins an activation and a constant")
    if dim % len(tensors[0].shape) != 1:
        raise w._refuse(f"joins along axis {dim}; only axis 1 (channels) is supported")
    sources = [w._settle(t) for t in tensors]
    return _Edge(sources[0], tensors[0].shape) if len(sources) == 1 else w._write("concat", sources)


def _pool(w: _Walker, op: str, source: Node, window: tuple[Any, Any, Any]) -> _Edge:
    kernel, stride, padding = window
    stride = kernel if stride is None or stride == [] else stride
    attrs: dict[str, Attribute] = {
        "kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)
    }  # fmt: skip
    return w._write(op, [source], attrs=attrs)


def _avg_pool2d(
    w: _Walker, result: Tensor, input: Any, kernel_size: Any, stride: Any = None,
    padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Edge:  # fmt: skip
    if _pair(padding) != (0, 0) and not count_include_pad:
        raise w._refuse("count_include_pad=False with padding is not supported")
    if divisor_override is not None and divisor_override != math.prod(_pair(kernel_size)):
        raise w._refuse("divisor_override is not supported")
    edge = _pool(w, "avgpool", w._settle(input), (kernel_size, stride, padding))
    return _floor_mode(w, edge, result, ceil_mode)


def _max_pool2d(
    w: _Walker, result: Tensor, input: Any, kernel_size: Any, stride: Any = None,
    padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> _Edge:  # fmt: skip
    if _pair(dilation) != (1, 1):
        raise w._refuse("dilated max pooling is not supported")
    edge = _pool(w, "maxpool", w._settle(input), (kernel_size, stride, padding))
    return _floor_mode(w, edge, result, ceil_mode)


def _floor_mode(w: _Walker, edge: _Edge, result: Tensor, ceil_mode: bool) -> _Edge:
    if ceil_mode and edge.shape != tuple(result.shape):
        raise w._refuse("ceil_mode has an effect on this input and is not supported")
    return edge


def _adaptive(op: str) -> Callable[..., _Edge]:
    def handler(
        w: _Walker, result: Tensor, input: Any, output_size: Any, return_indices: bool = False
    ) -> _Edge:
        source = w._settle(input)
        if len(source.shape) != 3:
            raise w._refuse(f"needs an input of shape (C, H, W), got {source.shape}")
        size, target = source.shape[1:], tuple(result.shape[2:])
        if any(n % t for n, t in zip(size, target, strict=True)):
            raise w._refuse(f"pools {size} to {target} unevenly; the sizes must divide")
        kernel = (size[0] // target[0], size[1] // target[1])
        if kernel == (1, 1):
            return _Edge(source, tuple(result.shape))
        return _pool(w, op, source, (kernel, kernel, 0))

    return handler


def _global(op: str) -> Callable[..., _Edge]:
    def handler(
        w: _Walker, result: Tensor, input: Any, dim: Any = None, keepdim: bool = False, **other: Any
    ) -> _Edge:
        source = input.node
        shape = input.shape
        axes = {d % len(shape) for d in ((dim,) if isinstance(dim, int) else dim or ())}
        # Axis 2 of (N, C, H * W) is as good as axes 2 and 3 of (N, C, H, W).
        spatial = set(range(2, len(shape)))
        whole = len(source.shape) == 3 and shape[:2] == (_BATCH, source.shape[0])
        if not whole or axes != spatial or any(v is not None for v in other.values()):
            raise w._refuse(f"reduces axes {dim} of {shape[1:]}; only over height and width")
        kernel = source.shape[1:]
        if kernel != (1, 1):
            source = _pool(w, op, source, (kernel, kernel, 0)).node
        return _Edge(source, tuple(result.shape))

    return handler


def _reshape(w: _Walker, result: Tensor, input: Any, *args: Any, **kwargs: Any) -> _Edge:
    """Any row-major change of shape; whether it was a flattening shows at its reader."""
    if result.shape[0] != _BATCH:
        raise w._refuse("mixes the batch with other axes; reshape with x.flatten(1)")
    return _Edge(input.node, tuple(result.shape))


def _identity(w: _Walker, result: Tensor, input: Any, *args: Any, **kwargs: Any) -> _Edge:
    if not isinstance(input, _Edge) or not result.is_floating_point():
        raise w._refuse("changes the type of the activations")
    return input


def _dropout(
    w: _Walker, result: Tensor, input: Any, p: float = 0.5, training: bool = True,
    inplace: bool = False,
) -> _Edge:  # fmt: skip
    if training and p > 0:
        raise w._refuse("drops activations in evaluation too; pass training=self.training")
    return _identity(w, result, input)


_avg_adaptive, _max_adaptive = _adaptive("avgpool"), _adaptive("maxpool")
_mean, _amax = _global("avgpool"), _global("maxpool")

Call = tuple[Callable[..., _Edge], dict[str, Any]]


def _attributes(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda module: {name: getattr(module, name) for name in names}


def _entry(handler: Callable[..., _Edge], *names: str, **fixed: Any) -> Callable[[nn.Module], Call]:
    return lambda module: (handler, {**_attributes(*names)(module), **fixed})


def _batch_norm_module(module: nn.Module) -> Call:
    names = _attributes("running_mean", "running_var", "weight", "bias", "eps")
    return _batch_norm, names(module)


_MODULES: Final[dict[type[nn.Module], Callable[[nn.Module], Call]]] = {
    MaskedReLU: _entry(_masked_relu, "mask"),
    nn.Conv2d: _entry(_conv2d, "weight", "bias", "stride", "padding", "dilation", "groups"),
    nn.Linear: _entry(_linear, "weight", "bias"),
    nn.BatchNorm1d: _batch_norm_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.AvgPool2d: _entry(
        _avg_pool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
        "divisor_override",
    ),
    nn.MaxPool2d: _entry(
        _max_pool2d, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    ),
    nn.AdaptiveAvgPool2d: _entry(_avg_adaptive, "output_size"),
    nn.AdaptiveMaxPool2d: _entry(_max_adaptive, "output_size"),
    nn.Flatten: _entry(_reshape),
    nn.Unflatten: _entry(_reshape),
    nn.Identity: _entry(_identity),
    nn.modules.dropout._DropoutNd: _entry(_dropout, training=False),
}  # fmt: skip

_FUNCTIONS: Final[dict[Any, Callable[..., _Edge]]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), _sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide), _div),
    **dict.fromkeys((operator.neg, torch.neg), _neg),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    F.avg_pool2d: _avg_pool2d,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    F.adaptive_avg_pool2d: _avg_adaptive,
    F.adaptive_max_pool2d: _max_adaptive,
    torch.mean: _mean,
    torch.amax: _amax,
    **dict.fromkeys(
        (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten), _reshape
    ),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout), _dropout),
    torch.clone: _identity,
}

_METHODS: Final[dict[str, Callable[..., _Edge]]] = {
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("sub", "sub_", "subtract"), _sub),
    **dict.fromkeys(("mul", "mul_", "multiply"), _mul),
    **dict.fromkeys(("div", "div_", "divide"), _div),
    "neg": _neg,
    "mean": _mean,
    "amax": _amax,
    **dict.fromkeys(
        ("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten", "view_as",
         "reshape_as"), _reshape
    ),
    **dict.fromkeys(("contiguous", "clone", "detach", "float", "to", "type_as"), _identity),
}  # fmt: skip


def _changes_in_place(n: fx.Node) -> bool:
    if n.op == "call_function":
        return n.target in IN_PLACE
    return n.op == "call_method" and str(n.target).endswith("_")


def _hint(kind: str) -> str:
    if kind in ("LayerNorm", "GroupNorm", "InstanceNorm2d", "layer_norm", "group_norm",
                "instance_norm", "InstanceNorm1d", "LocalResponseNorm", "RMSNorm"):  # fmt: skip
        return "needs statistics of each image; use BatchNorm2d instead and retrain"
    if "Transpose" in kind or "conv_transpose" in kind:
        return "transposed convolution is not supported; use Conv2d"
    if "1d" in kind or "3d" in kind:
        return "only two-dimensional layers are supported; use the 2d kind"
    if kind == "pad" or "Pad" in kind:
        return "padding of its own is not supported; use the padding of the convolution"
    return f"not supported; {_SUPPORTED}"


def _pair(value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (values * 2)[:2] if len(values) == 1 else values


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value)


def _needed(nodes: list[Node], last: Node) -> tuple[Node, ...]:
    """``last`` and what it depends on, in order."""
    wanted = {last.name}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
    return tuple(node for node in nodes if node.name in wanted)
