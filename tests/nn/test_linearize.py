"""Any network becomes a masked one that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_system.errors import UnsupportedLayer, UsageError
from pi_system.nn import MaskedReLU, build, count_relus, feeding_layers, linearize, relu_sites
from pi_system.nn.linearize import with_activations

X = torch.linspace(-2, 2, 2 * 3 * 5 * 7).reshape(2, 3, 5, 7)


class Net(nn.Module):
    """A network made of modules and a forward function."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_place_then_read_again(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.relu(y)
    return z + y


def in_place_through_identity(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    alias = net.identity(y)
    return y.relu_() + 2 * alias


def in_place_twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    F.relu(y, inplace=True)
    y -= 1
    torch.relu_(y)
    return y * 3


def in_place_before_an_addition(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = y.relu_()
    z += 1
    return y + x


def read_before_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    before = y + 0
    net.relu(y)
    return before + y


def all_spellings(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.conv(x))
    x = F.relu(net.conv(x) - 0.1)
    x = torch.relu(net.conv(x) - 0.1)
    x = net.relu(net.conv(x).relu() - 0.1)
    return F.relu(input=net.conv(x) - 0.1)


def in_place_arithmetic(net: Net, x: Tensor) -> Tensor:
    y = net.relu(net.conv(x))
    alias = y
    y += x
    y *= 2
    rows = x.size(0)
    count = rows
    count *= x.size(2)
    return (alias - y.view(rows, 3, count // rows, -1)) + y / count


@pytest.mark.parametrize(
    "function",
    [
        in_place_arithmetic,
        in_place_then_read_again,
        in_place_through_identity,
        in_place_twice,
        in_place_before_an_addition,
        read_before_in_place,
        all_spellings,
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_same_function_on_non_square_images(
    function: Callable[[Net, Tensor], Tensor], in_place: bool
) -> None:
    torch.manual_seed(3)
    net = Net(
        function,
        conv=nn.Conv2d(3, 3, 3, padding=1),
        relu=nn.ReLU(inplace=in_place),
        identity=nn.Identity(),
    )
    with torch.no_grad():
        expected = net(X.clone())
        example = X.clone()
        masked = linearize(net, example)
        assert torch.equal(example, X), "the caller's example is not changed"
        torch.testing.assert_close(masked(X.clone()), expected)
    assert all(site.mask.shape == (3, 5, 7) for site in relu_sites(masked).values())


def test_a_view_read_after_an_in_place_relu_is_refused_by_name() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        flat = y.flatten(1)
        net.relu(y)
        return net.head(flat)

    net = Net(forward, conv=nn.Conv2d(3, 2, 1), relu=nn.ReLU(True), head=nn.Linear(70, 2))
    with pytest.raises(UnsupportedLayer, match=r"layer head.*view.*relu.*out of place"):
        linearize(net, X)


def test_in_place_additions_nobody_else_sees_are_done_out_of_place() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.relu(net.conv(x))
        y += x
        return y

    masked = linearize(Net(forward, conv=nn.Conv2d(3, 3, 1), relu=nn.ReLU()), X)
    result, (activation,) = with_activations(masked, ("relu",))(X)
    torch.testing.assert_close(activation + X, result)


def test_a_relu_called_twice_becomes_two_sites_and_parameters_are_shared() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.relu(net.conv(net.relu(net.conv(x))))

    net = Net(forward, conv=nn.Conv2d(3, 3, 1), relu=nn.ReLU())
    masked = linearize(net, X)
    assert list(relu_sites(masked)) == ["relu", "relu_call2"]
    assert masked.conv.weight is net.conv.weight
    assert isinstance(net.relu, nn.ReLU), "the original is not changed"


def test_linearizing_again_keeps_masks_and_finds_new_relus() -> None:
    torch.manual_seed(0)
    inner = linearize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), X)
    (site,) = relu_sites(inner).values()
    site.set_mask(torch.rand(3, 5, 7) < 0.5)
    outer = nn.Sequential(inner, nn.Conv2d(3, 3, 1), nn.ReLU(), inner)
    masked = linearize(outer, X)
    kept = [layer.kept for layer in count_relus(masked).layers]
    assert kept == [site.kept, 105, site.kept]
    torch.testing.assert_close(masked(X), outer(X))


def test_sites_are_counted_in_the_order_of_execution() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.a(net.conv(net.b(net.conv(F.relu(x)))))

    net = Net(forward, a=nn.ReLU(), conv=nn.Conv2d(3, 3, 1), b=nn.ReLU())
    names = [layer.name for layer in count_relus(linearize(net, X)).layers]
    assert names == ["site_relu", "b", "a"]


def test_masked_relu_and_its_mask() -> None:
    site = MaskedReLU((2, 3))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    site.set_mask(mask)
    x = torch.randn(5, 2, 3)
    m = mask.float()
    torch.testing.assert_close(site(x), m * x.relu() + (1 - m) * x)
    assert (site.kept, site.total) == (3, 6)
    with pytest.raises(UsageError, match=r"bool \(2, 3\)"):
        site.set_mask(torch.ones(2, 3))
    with pytest.raises(UsageError):
        site.set_mask(torch.ones(3, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    "arch,side,total,without_stem",
    [
        ("resnet18", 32, 557_056, 491_520),
        ("resnet34", 32, 966_656, 901_120),
        ("wrn22_8", 32, 1_392_640, 1_376_256),
        ("vgg16", 32, 276_480, 210_944),
        ("resnet18", 64, 2_228_224, 1_966_080),
        # 64 channels of 112x112, then 4 layers each of 64x56x56 to 512x7x7.
        ("resnet18_imagenet", 224, 2_308_096, 1_505_280),
    ],
)
def test_published_counts(arch: str, side: int, total: int, without_stem: int) -> None:
    count = count_relus(linearize(build(arch, classes=100), torch.zeros(1, 3, side, side)))
    assert (count.total, count.total_without_stem) == (total, without_stem)
    assert (count.kept, count.kept_without_stem) == (total, without_stem)


@pytest.mark.parametrize(
    "arch", ["resnet10", "resnet18", "resnet34", "wrn22_8", "vgg16", "resnet18_imagenet"]
)
def test_the_architectures_are_unchanged_by_linearizing(arch: str) -> None:
    torch.manual_seed(0)
    model = build(arch, classes=7, width=2)
    x = torch.randn(4, 3, 32, 32)
    masked = linearize(model, x)
    assert masked.training and all(m.training for m in masked.modules())
    torch.testing.assert_close(masked.eval()(x), model.eval()(x))
    sites = tuple(relu_sites(masked))
    logits, activations = with_activations(masked, sites[:2])(x)
    torch.testing.assert_close(logits, model(x))
    assert [tuple(a.shape[1:]) for a in activations] == [
        tuple(relu_sites(masked)[s].mask.shape) for s in sites[:2]
    ]
    feeding = feeding_layers(masked)
    assert tuple(feeding) == sites and feeding[sites[0]]


def test_modes_of_modules_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    masked = linearize(model, X)
    assert [m.training for m in model] == [True, False, True, True]
    assert masked.training and not masked.get_submodule("1").training


def test_functional_dropout_follows_the_mode_after_tracing() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return F.dropout(net.relu(net.conv(x)), 0.5, net.training)

    torch.manual_seed(0)
    net = Net(forward, conv=nn.Conv2d(3, 3, 1), relu=nn.ReLU())
    for mode in (True, False):
        masked = linearize(net.train(mode), X)
        torch.manual_seed(0)
        assert (masked.train()(X) == 0).float().mean() > 0.6
        torch.testing.assert_close(masked.eval()(X), net.eval()(X))


@pytest.mark.parametrize(
    "layer,name",
    [
        (nn.GELU(), "GELU"),
        (nn.SiLU(), "SiLU"),
        (nn.LeakyReLU(), "LeakyReLU"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_another_activation_is_refused_by_name(layer: nn.Module, name: str) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 3, 1))
    model.add_module("act", layer)
    with pytest.raises(UnsupportedLayer, match=f"layer act: {name}.*replace it with nn.ReLU"):
        linearize(model, X)


def test_functional_activations_are_refused() -> None:
    for function in (F.gelu, torch.sigmoid, lambda x: x.softmax(1), lambda x: x.clamp(0, 6)):
        net = Net(lambda net, x, f=function: f(net.conv(x)), conv=nn.Conv2d(3, 3, 1))
        with pytest.raises(UnsupportedLayer, match="cannot be linearized"):
            linearize(net, X)


def test_control_flow_and_wrong_inputs_are_refused_in_one_line() -> None:
    net = Net(lambda net, x: net.conv(x) if x.sum() > 0 else x, conv=nn.Conv2d(3, 3, 1))
    with pytest.raises(UnsupportedLayer, match="cannot be traced") as caught:
        linearize(net, X)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedLayer, match="does not run on an input of shape"):
        linearize(nn.Sequential(nn.Conv2d(4, 3, 1)), X)


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match="resnet18"):
        build("alexnet", classes=10)
    with pytest.raises(UsageError, match="width"):
        build("resnet18", classes=10, width=0)
