"""Bring your own model: any traceable network becomes a masked one.

The tracer is ``torch.fx``: unlike ``torch.export`` it keeps the modules (so that the masked
network trains, with batch norm switching between its modes) and their names (so that an error
can name the layer its author wrote).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import UnsupportedLayer
from .relu import MaskedReLU

_RELU_FUNCTIONS: tuple[Callable[..., Any], ...] = (torch.relu, torch.relu_, F.relu, F.relu_)
_RELU_METHODS = ("relu", "relu_")
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_OTHER_ACTIVATIONS = (
    nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax,
    nn.LogSigmoid, nn.LogSoftmax, nn.Softmin, nn.Softsign, nn.Threshold, nn.RReLU, nn.GLU,
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.MultiheadAttention,
)  # fmt: skip
# What may be done out of place: numbers must (the code of a trace would change them), tensors
# nobody else reads had better.
IN_PLACE: dict[Any, Callable[[Any, Any], Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_OTHER_FUNCTIONS = {
    getattr(F, name)
    for name in (
        "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh",
        "hardsigmoid", "softplus", "softsign", "relu6", "prelu", "rrelu", "threshold", "glu",
        "logsigmoid", "log_softmax", "softmax", "sigmoid", "tanh", "scaled_dot_product_attention",
    )
} | {
    torch.sigmoid, torch.tanh, torch.softmax, torch.log_softmax, torch.prelu, torch.selu,
    torch.celu, torch.exp, torch.clamp, torch.clip, operator.matmul, torch.matmul, torch.bmm,
}  # fmt: skip
_OTHER_METHODS = (
    "sigmoid", "sigmoid_", "tanh", "tanh_", "softmax", "log_softmax", "prelu", "exp", "clamp",
    "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "matmul", "bmm",
)  # fmt: skip


class _Proxy(fx.Proxy):
    """``fx.Proxy`` that records ``x += y`` as what it is and not as ``x = x + y``."""

    def _in_place(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)


class Tracer(fx.Tracer):
    """``fx.Tracer`` that keeps in-place arithmetic, and :class:`MaskedReLU` whole, so that a
    masked network traces again."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, MaskedReLU):
            return True
        # A parametrized layer belongs to torch by name, its forward perhaps not.
        own = str(type(m).forward.__module__).startswith("torch.")
        return own and super().is_leaf_module(m, module_qualified_name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards every module in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace(model: nn.Module) -> fx.GraphModule:
    """``model`` as an ``fx.GraphModule`` that shares its parameters and modes.

    Functional dropout that follows the mode becomes an ``nn.Dropout``, since a trace keeps
    only the value ``self.training`` had.

    Raises:
        UnsupportedLayer: the network cannot be traced.
    """
    with evaluating(model):
        graph = _trace_graph(model)
    result = fx.GraphModule(model, graph, type(model).__name__)
    result.training = model.training
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in result.named_modules():
        module.training = modes.get(name, model.training)
    dropouts = [n for n in graph.nodes if n.op == "call_function" and n.target in _DROPOUTS]
    if dropouts:
        _dropout_modules(model, result, dropouts)
    return result


def layer_name(node: fx.Node) -> str:
    """What a user would call ``node``: a module's path, or the path of the module whose code
    calls the function and the function."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values() if path]
    return f"{paths[-1]}.{node.name}" if paths else node.name


def _trace_graph(model: nn.Module) -> fx.Graph:
    if isinstance(model, fx.GraphModule):
        # Tracing its code again would lose the names of its functions.
        graph = fx.Graph()
        graph.output(graph.graph_copy(model.graph, {}))
        return graph
    try:
        return Tracer().trace(model)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedLayer(
            f"{type(model).__name__} cannot be traced: {reason}; "
            "remove control flow that depends on values, and optional inputs"
        ) from error


def _dropout_modules(model: nn.Module, result: fx.GraphModule, found: list[fx.Node]) -> None:
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        other = list(_trace_graph(model).nodes)
    except UnsupportedLayer:
        return
    finally:
        for module, mode in modes.items():
            module.training = mode
    nodes = list(result.graph.nodes)
    if [(n.op, n.target) for n in nodes] != [(n.op, n.target) for n in other]:
        return
    position = {node: i for i, node in enumerate(nodes)}
    for node in found:
        twin = other[position[node]]
        if _dropout_training(node) or not _dropout_training(twin):
            continue
        p = twin.kwargs.get("p", twin.args[1] if len(twin.args) > 1 else 0.5)
        name = f"dropout_{node.name}"
        dropout = _DROPOUTS[node.target](p)
        dropout.training = model.training
        result.add_submodule(name, dropout)
        with result.graph.inserting_before(node):
            source = node.args[0] if node.args else node.kwargs["input"]
            node.replace_all_uses_with(result.graph.call_module(name, (source,)))
        result.graph.erase_node(node)
    result.recompile()


def _dropout_training(node: fx.Node) -> bool:
    default = node.target in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
    value = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else default)
    return bool(value)


def linearize(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Turn every ReLU of ``model`` into a :class:`MaskedReLU` site with a full mask.

    Functional, in-place, method and module ReLUs are found; a ReLU module that is called
    twice becomes two sites. Sites that are masked already keep their masks. The result shares
    its parameters with ``model`` and computes the same function.

    Args:
        example: one or more images, (N, C, H, W); only its shape matters.

    Raises:
        UnsupportedLayer: the network cannot be traced, or has an activation other than ReLU.
    """
    graph_module = trace(model)
    refuse_other_activations(graph_module)
    values = _Values(graph_module)
    with evaluating(graph_module), torch.no_grad():
        try:
            values.run(example.clone())
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnsupportedLayer(
                f"{type(model).__name__} does not run on an input of shape "
                f"{tuple(example.shape)}: {reason}"
            ) from error

    nodes = list(graph_module.graph.nodes)
    # Found out beforehand: a site takes the place of the module that a later call also names.
    found = [
        (_masked(n, graph_module), is_relu(n, graph_module), _in_place(n, graph_module))
        for n in nodes
    ]
    taken: set[str] = set()
    for index, (node, (masked, plain, in_place)) in enumerate(zip(list(nodes), found, strict=True)):
        if node.target in IN_PLACE and (
            node not in values.results or not any(_later_readers(nodes, index, values))
        ):
            node.target = IN_PLACE[node.target]
        if masked is None and not plain:
            continue
        name = _site_name(node, taken)
        taken.add(name)
        if masked is not None and name == node.target:
            continue
        shape = values.results[node].shape[1:]
        site = MaskedReLU(tuple(shape))
        if masked is not None:
            site.set_mask(masked.mask)
        site.train(graph_module.training)
        site.to(values.results[node].device)
        with graph_module.graph.inserting_before(node):
            graph_module.add_submodule(name, site)
            source = node.args[0] if node.args else node.kwargs["input"]
            new = graph_module.graph.call_module(name, (source,))
        nodes[index], values.results[new] = new, values.results[node]
        if in_place:
            _redirect_aliases(nodes, index, graph_module, values)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


class _Values(fx.Interpreter):
    """Runs a network and keeps the value of every node, alive, so that storages stay distinct."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.results: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.results[n] = result
        return result


def _later_readers(
    nodes: list[fx.Node], index: int, values: _Values
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Earlier names of the memory of node ``index``, each with its readers after that node."""
    position = {node: i for i, node in enumerate(nodes)}
    storage = values.results[nodes[index]].untyped_storage().data_ptr()
    for alias in nodes[:index]:
        value = values.results.get(alias)
        if value is not None and value.untyped_storage().data_ptr() == storage:
            later = [user for user in alias.users if position.get(user, -1) > index]
            if later:
                yield alias, later


def _redirect_aliases(
    nodes: list[fx.Node], index: int, module: fx.GraphModule, values: _Values
) -> None:
    """Give later readers of a tensor that ReLU ``index`` changed in place the changed value."""
    new = nodes[index]
    changed = values.results[new]
    for alias, later in list(_later_readers(nodes, index, values)):
        value = values.results[alias]
        same = value.shape == changed.shape and value.stride() == changed.stride()
        if not same or _is_dropout(alias, module):
            raise UnsupportedLayer(
                f"layer {layer_name(later[0])}: reads a view of a tensor that {new.target} "
                "changes in place; make that ReLU out of place"
            )
        for user in later:
            user.replace_input_with(alias, new)


def with_activations(
    model: fx.GraphModule, sites: tuple[str, ...], *, before: bool = False
) -> fx.GraphModule:
    """A view of a masked network that returns (logits, [activations after ``sites``]).

    It shares all modules with ``model``.

    Args:
        before: return what enters the sites instead of what leaves them.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(model.graph, env)
    copies = {node.target: env[node] for node in model.graph.nodes if node.op == "call_module"}
    found = [copies[name] for name in sites]
    graph.output((output, [node.args[0] for node in found] if before else found))
    return fx.GraphModule(model, graph)


def is_relu(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether ``node`` applies an ordinary ReLU."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_method":
        return node.target in _RELU_METHODS
    return node.op == "call_function" and node.target in _RELU_FUNCTIONS


def feeding_layers(model: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """For each site the convolutions and linear layers between it and the sites before it."""
    result: dict[str, tuple[str, ...]] = {}
    for node in model.graph.nodes:
        if _masked(node, model) is None:
            continue
        found: list[str] = []
        seen: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "call_module":
                module = model.get_submodule(str(current.target))
                if isinstance(module, MaskedReLU):
                    continue
                if isinstance(module, nn.Conv2d | nn.Linear):
                    found.append(str(current.target))
            stack.extend(current.all_input_nodes)
        result[str(node.target)] = tuple(sorted(found))
    return result


def _masked(node: fx.Node, module: fx.GraphModule) -> MaskedReLU | None:
    if node.op != "call_module":
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, MaskedReLU) else None


def _is_dropout(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        found = module.get_submodule(str(node.target))
        return isinstance(found, nn.modules.dropout._DropoutNd)
    return node.op == "call_function" and node.target in _DROPOUTS


def _in_place(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return node.target == "relu_"
    return node.target in (torch.relu_, F.relu_) or (
        node.target is F.relu
        and bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False))
    )


def _site_name(node: fx.Node, taken: set[str]) -> str:
    base = layer_name(node)
    if node.op != "call_module":
        owner, dot, function = base.rpartition(".")
        base = f"{owner}{dot}site_{function}"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_call{count}"
    return name


def refuse_other_activations(graph_module: fx.GraphModule) -> None:
    """Raise :class:`UnsupportedLayer` at the first activation that is not a ReLU."""
    for node in graph_module.graph.nodes:
        bad: str | None = None
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, _OTHER_ACTIVATIONS):
                bad = type(module).__name__
        elif node.op == "call_function" and node.target in _OTHER_FUNCTIONS:
            bad = getattr(node.target, "__name__", str(node.target))
        elif node.op == "call_method" and node.target in _OTHER_METHODS:
            bad = str(node.target)
        if bad is not None:
            raise UnsupportedLayer(
                f"layer {layer_name(node)}: {bad} cannot "
                "be linearized or run privately; replace it with nn.ReLU, or move a final softmax "
                "out of the network"
            )
