"""Exported graphs compute what PyTorch does; what cannot be exported is refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pi_system.errors import UnsupportedLayer, UsageError
from pi_system.graph.ir import Graph
from pi_system.graph.trace import export
from pi_system.nn import linearize, relu_sites

Check = Callable[..., Graph]


class Net(nn.Module):
    """A network made of modules and a forward function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class RandomNet(nn.Module):
    """A random small network on (N, 3, 8, 12) drawing on every supported spelling."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.shared = nn.ReLU(inplace=self.rng.random() < 0.5)
        self.layers = nn.ModuleList()
        self.plan: list[Callable[[Tensor], Tensor]] = []
        channels, size = 3, (8, 12)
        for _ in range(self.rng.randint(1, 6)):
            step = self.rng.choice(["conv", "residual", "concat", "pool", "norm", "odd"])
            if step == "conv":
                channels, size = self.conv_step(channels, size)
            elif step == "residual":
                self.residual_step(channels)
            elif step == "concat":
                channels = self.concat_step(channels)
            elif step == "pool":
                size = self.pool_step(size)
            elif step == "norm":
                norm = self.keep(nn.BatchNorm2d(channels, affine=self.rng.random() < 0.7))
                act = self.activation()
                self.plan.append(lambda x, n=norm, a=act: a(n(x)))
            else:
                self.odd_step()
        self.head(channels, size)

    def keep(self, module: nn.Module) -> nn.Module:
        self.layers.append(module)
        return module

    def activation(self) -> Callable[[Tensor], Tensor]:
        return self.rng.choice(
            [
                self.shared,
                self.keep(nn.ReLU()),
                self.keep(nn.ReLU(inplace=True)),
                F.relu,
                lambda x: F.relu(x, inplace=True),
                torch.relu,
                torch.relu_,
                lambda x: x.relu(),
                lambda x: x.relu_(),
                lambda x: x,
            ]
        )

    def conv(self, c_in: int, c_out: int, keep_size: bool = True) -> nn.Module:
        kernel = self.rng.choice([1, 3, (3, 1), (1, 3)])
        dilation = self.rng.choice([1, 1, 2])
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding: Any = tuple(dilation * (k - 1) // 2 for k in sides)
        stride: Any = 1
        if keep_size:
            padding = self.rng.choice([padding, "same"])
        else:
            stride = self.rng.choice([2, (2, 1), (1, 2)])
        groups = c_in if c_out % c_in == 0 and self.rng.random() < 0.4 else 1
        conv = self.keep(
            nn.Conv2d(
                c_in, c_out, kernel, stride, padding, dilation, groups, self.rng.random() < 0.5
            )
        )
        if self.rng.random() < 0.6:
            return nn.Sequential(conv, self.keep(nn.BatchNorm2d(c_out)))
        return conv

    def conv_step(self, channels: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        c_out = self.rng.choice([channels, channels * 2, 4])
        shrink = min(size) >= 4 and self.rng.random() < 0.4
        conv, act = self.keep(self.conv(channels, c_out, not shrink)), self.activation()
        self.plan.append(lambda x: act(conv(x)))
        with torch.no_grad():
            shape = conv.eval()(torch.zeros(1, channels, *size)).shape
        return c_out, (shape[2], shape[3])

    def residual_step(self, channels: int) -> None:
        conv, act = self.keep(self.conv(channels, channels)), self.activation()

        def iadd(x: Tensor, y: Tensor) -> Tensor:
            y += x
            return y

        add = self.rng.choice(
            [
                lambda x, y: x + y,
                torch.add,
                lambda x, y: y.add(x, alpha=1),
                lambda x, y: y.add_(x),
                iadd,
                lambda x, y: torch.add(x, y, alpha=0.5),
                lambda x, y: x - y,
                lambda x, y: x + 0.5 * y,
            ]
        )
        self.plan.append(lambda x: act(add(x, conv(x))))

    def concat_step(self, channels: int) -> int:
        conv, act = self.keep(self.conv(channels, 2)), self.activation()
        cat = self.rng.choice(
            [
                lambda x, y: torch.cat([x, y], 1),
                lambda x, y: torch.cat((y, x), dim=-3),
                lambda x, y: torch.concat([x, y], dim=1),
            ]
        )
        self.plan.append(lambda x: cat(x, act(conv(x))))
        return channels + 2

    def pool_step(self, size: tuple[int, int]) -> tuple[int, int]:
        if size[0] % 2 or size[1] % 2:
            return size
        half = (size[0] // 2, size[1] // 2)
        pools: list[tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = [
            (self.keep(nn.MaxPool2d(2)), half),
            (lambda x: F.max_pool2d(x, 2), half),
            (lambda x: torch.max_pool2d(x, 3, 2, 1), half),
            (lambda x: F.max_pool2d(x, kernel_size=(3, 1), stride=1, padding=(1, 0)), size),
            (self.keep(nn.AvgPool2d(3, 1, 1)), size),
            (self.keep(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)), half),
            (lambda x: F.avg_pool2d(x, (2, 1)), (half[0], size[1])),
            (self.keep(nn.AdaptiveAvgPool2d((half[0], None))), (half[0], size[1])),
            (lambda x: F.adaptive_max_pool2d(x, half), half),
        ]
        pool, result = self.rng.choice(pools)
        self.plan.append(pool)
        return result

    def odd_step(self) -> None:
        scale = torch.rand(1)
        self.plan.append(
            self.rng.choice(
                [
                    self.keep(nn.Identity()),
                    self.keep(nn.Dropout(0.5)),
                    self.keep(nn.Dropout2d(0.5, inplace=True)),
                    lambda x: F.dropout(x, 0.3, self.training),
                    lambda x: x.contiguous().clone(),
                    lambda x: (x - 0.5) / 2,
                    lambda x: 1 - x * scale,
                    lambda x: -x,
                ]
            )
        )

    def head(self, channels: int, size: tuple[int, int]) -> None:
        flat = self.rng.random() < 0.3
        width = features = channels * size[0] * size[1] if flat else channels
        whole: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.view(x.size(0), -1),
            lambda x: torch.flatten(x, 1),
            lambda x: x.reshape(x.shape[0], width),
            self.keep(nn.Flatten()),
        ]
        pooled: list[Callable[[Tensor], Tensor]] = [
            lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
            lambda x: nn.functional.adaptive_avg_pool2d(x, (1, 1)).view(-1, width),
            lambda x: x.mean((2, 3)),
            lambda x: x.mean(dim=[-2, -1], keepdim=True).flatten(1),
            lambda x: torch.mean(x, (2, 3), keepdim=True).squeeze(-1).squeeze(-1),
            lambda x: F.avg_pool2d(x, x.size()[2:]).squeeze(3).squeeze(2),
            lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
            lambda x: x.amax((2, 3)),
            lambda x: x.flatten(2).mean(2),
            lambda x: x.view(x.size(0), x.size(1), -1).mean(-1),
        ]
        self.plan.append(self.rng.choice(whole if flat else pooled))
        if self.rng.random() < 0.5:
            hidden, norm = self.keep(nn.Linear(features, 6)), self.keep(nn.BatchNorm1d(6))
            act = self.activation()
            self.plan.append(lambda x: act(norm(hidden(x))))
            features = 6
        self.plan.append(self.keep(nn.Linear(features, 5, bias=self.rng.random() < 0.5)))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.plan:
            x = step(x)
        return x


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_networks(same: Check, seed: int) -> None:
    same(RandomNet(seed), seed=seed)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_networks_with_random_masks(same: Check, seed: int) -> None:
    masked = linearize(RandomNet(seed).eval(), torch.zeros(2, 3, 8, 12))
    for site in relu_sites(masked).values():
        site.set_mask(torch.rand(site.mask.shape) < random.Random(seed).choice([0, 0.1, 0.9]))
    graph = same(masked, seed=seed)
    assert graph.relu_kept == sum(site.kept for site in relu_sites(masked).values())
    assert [n.name for n in graph.relus] == list(relu_sites(masked))


def test_a_training_model_is_exported_as_in_evaluation_and_left_as_it_was(same: Check) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.9), nn.Flatten(),
        nn.Linear(240, 2),
    )  # fmt: skip
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    trained = export(model, (3, 8, 12))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert trained.sha256() == export(model.eval(), torch.zeros(1, 3, 8, 12)).sha256()
    assert [node.op for node in trained] == ["input", "conv", "relu", "flatten", "linear"]


def test_batch_norm_is_folded_only_where_the_convolution_has_no_other_reader(same: Check) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.fc((F.relu(net.bn(y)) + y).mean((2, 3)))

    modules = {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)}
    graph = same(Net(forward, **modules))
    assert [node.op for node in graph].count("affine") == 1
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(384, 3), nn.BatchNorm1d(3))  # fmt: skip
    assert "affine" not in [node.op for node in same(plain)]


def test_preactivation_keeps_an_affine_layer(same: Check) -> None:
    from pi_system.nn import build

    graph = same(build("wrn22_8", classes=5, width=1), (3, 32, 32))
    affine = [node.name for node in graph if node.op == "affine"]
    assert "blocks.1.bn1" in affine and "blocks.1.bn2" not in affine


def test_weights_computed_in_the_forward_pass_are_constants(same: Check) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, padding="same")

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
            self.conv = torch.nn.utils.parametrizations.weight_norm(Standardised(3, 4, 3))
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = (x - self.mean) / torch.tensor([[[0.2]], [[0.3]], [[0.4]]])
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    graph = same(Normalised())
    assert [node.op for node in graph][:3] == ["input", "affine", "conv"]


def test_values_changed_in_place_keep_their_other_names(same: Check) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        alias = net.identity(y)
        y += x
        y *= 2
        alias.add_(1)
        return net.fc((y + alias).flatten(1))

    same(Net(forward, conv=nn.Conv2d(3, 3, 1), identity=nn.Identity(), fc=nn.Linear(288, 2)))

    def stale(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        flat = y.flatten(1)
        y += x
        return net.fc(flat)

    net = Net(stale, conv=nn.Conv2d(3, 3, 1), fc=nn.Linear(288, 2))
    with pytest.raises(UnsupportedLayer, match=r"layer fc.*changed in place"):
        export(net, (3, 8, 12))


def test_unused_layers_disappear_and_odd_names_are_made_safe(same: Check) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.unused(x)
        return net.get_submodule("größe 1")(x.flatten(1))

    graph = same(Net(forward, unused=nn.Conv2d(3, 3, 1), **{"größe 1": nn.Linear(288, 2)}))
    assert [node.op for node in graph] == ["input", "flatten", "linear"]
    assert graph.output.name.isascii()


def _sequence(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3, padding=1))
    for index, layer in enumerate(layers):
        model.add_module(f"layer{index}", layer)
    return model


@pytest.mark.parametrize(
    "layer,message",
    [
        (nn.ConvTranspose2d(4, 4, 2), r"layer layer0 \(ConvTranspose2d\).*use Conv2d"),
        (nn.GroupNorm(2, 4), r"layer layer0 \(GroupNorm\).*BatchNorm2d"),
        (nn.InstanceNorm2d(4), r"layer layer0 \(InstanceNorm2d\).*BatchNorm2d"),
        (nn.LayerNorm([4, 8, 12]), r"layer layer0 \(LayerNorm\).*BatchNorm2d"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), r"layer0.*padding_mode 'reflect'.*'zeros'"),
        (nn.Conv2d(4, 4, 2, padding="same"), r"layer0.*odd kernel"),
        (nn.MaxPool2d(5, ceil_mode=True), r"layer0.*ceil_mode"),
        (nn.MaxPool2d(2, dilation=2), r"layer0.*dilated"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), r"layer0.*count_include_pad"),
        (nn.AvgPool2d(2, divisor_override=3), r"layer0.*divisor_override"),
        (nn.AdaptiveAvgPool2d(5), r"layer0.*unevenly"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"layer0.*running statistics"),
        (nn.ZeroPad2d(1), r"layer0 \(ZeroPad2d\).*padding of the convolution"),
        (nn.Upsample(scale_factor=2), r"layer0 \(Upsample\): not supported; supported are conv2d"),
        (nn.Linear(12, 3), r"layer0 \(Linear\).*flatten before"),
        (nn.Flatten(2), r"output.*expected \(classes,\)"),
        (nn.PixelShuffle(2), r"layer0 \(PixelShuffle\)"),
        (nn.GELU(), r"layer0: GELU.*nn.ReLU"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_unsupported_modules_are_refused_by_name(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayer, match=message) as caught:
        export(_sequence(layer), (3, 8, 12))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "function,message",
    [
        (lambda net, x: net.c(x) * net.c(x), "multiplies two activations"),
        (lambda net, x: net.c(x) / net.c(x), "divides by an activation"),
        (lambda net, x: torch.cat([net.c(x), net.c(x)], 2), "axis 2; only axis 1"),
        (lambda net, x: net.c(x).transpose(2, 3), r"layer transpose \(transpose\)"),
        (lambda net, x: net.c(x).mean(1), "only over height and width"),
        (lambda net, x: net.c(x).view(3, -1), "mixes the batch"),
        (lambda net, x: net.c(net.c(x).view(2, 3, 12, 8)), "only reshape is a flattening"),
        (lambda net, x: net.c(x) + torch.arange(12.0), "same at every position of a channel"),
        (lambda net, x: F.dropout(net.c(x)), "training=self.training"),
        (lambda net, x: net.c(x).chunk(3, 1)[0], "several tensors"),
        (lambda net, x: F.pad(net.c(x), (1, 1)), "padding of the convolution"),
        (lambda net, x: net.c(x) + net.c(x).mean((2, 3), keepdim=True), "shapes must be equal"),
        (lambda net, x: (net.c(x), x), "one tensor of logits"),
        (lambda net, x: torch.ones(2, 3), "one tensor of logits"),
        (lambda net, x: net.c(x).half(), "half"),
        (lambda net, x: F.layer_norm(net.c(x), (12,)), "BatchNorm2d"),
        (lambda net, x: F.conv_transpose2d(x, net.c.weight), "transposed"),
        (lambda net, x: net.c(x)[:, :2], "getitem"),
    ],
)
def test_unsupported_functions_are_refused(
    function: Callable[[Any, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=message) as caught:
        export(Net(function, c=nn.Conv2d(3, 3, 1)), (3, 8, 12))
    assert "\n" not in str(caught.value)


def test_two_inputs_wrong_shapes_and_bad_weights_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(UnsupportedLayer, match=r"2 inputs \(x, y\)"):
        export(Two(), (3, 8, 12))
    model = _sequence(nn.Flatten(), nn.Linear(384, 2))
    with pytest.raises(UnsupportedLayer, match="does not run on"):
        export(model, (3, 8, 8))
    with pytest.raises(UsageError, match="C, H, W"):
        export(model, (8, 12))
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UnsupportedLayer, match=r"stem.*weight.*not finite"):
        export(model, (3, 8, 12))


def test_a_hook_that_no_trace_shows_is_found_out() -> None:
    model = _sequence(nn.Flatten(), nn.Linear(384, 2))
    model.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(UnsupportedLayer, match="differs"):
        export(model, (3, 8, 12))


def test_double_precision_models_are_exported_in_single(same: Check) -> None:
    graph = export(_sequence(nn.ReLU(), nn.Flatten(), nn.Linear(384, 2)).double(), (3, 8, 12))
    assert {v.dtype.name for v in graph.tensors.values()} == {"float32", "bool"}


def test_functions_are_named_after_the_module_that_calls_them(same: Check) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)) + x

    model = nn.Sequential()
    model.add_module("first", Block())
    model.add_module("second", Block())
    model.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(288, 2)))
    names = ["x", "first.conv", "first.site_relu", "first.add", "second.conv",
             "second.site_relu_1", "second.add_1", "head.0", "head.1"]  # fmt: skip
    expected = [name.replace("head.0", "second.add_1.flatten") for name in names]
    assert [n.name.replace("input_1", "x") for n in same(model)] == expected
    masked = linearize(model.eval(), torch.zeros(1, 3, 8, 12))
    assert [n.name.replace("input_1", "x") for n in same(masked)] == expected
    model.add_module("bad", Net(lambda net, x: F.gelu(x)))
    with pytest.raises(UnsupportedLayer, match=r"layer bad\.gelu: gelu"):
        export(model, (3, 8, 12))
