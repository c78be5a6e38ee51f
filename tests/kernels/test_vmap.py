"""``torch.func``: every operator mapped, differentiated per sample and nested, against a loop."""

from __future__ import annotations

import pytest
import torch
from support import bitwise_equal, device_of, fused, random
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

import gsalign_kernels as kernels

IMPLEMENTATIONS = {
    name: [pytest.param("reference"), *fused(name)]
    for name in (
        "tps_solve",
        "tps_evaluate",
        "tps_grid",
        "warp_image",
        "warp_tokens",
        "conv_relu_mean",
    )
}
SIZE = (3, 4)


def spread(*shape: int, seed: int) -> Tensor:
    """Control points far enough from each other and from one line."""
    corners = torch.tensor([[-1.0, -1.0], [1.0, -0.9], [-0.8, 1.0], [0.9, 1.1], [0.1, 0.2]])
    return corners + 0.1 * random(*shape, 5, 2, seed=seed, dtype=torch.float32).clamp(-1, 1)


def solve(chosen):
    return lambda points, values: kernels.tps_solve(points, values, implementation=chosen)


def evaluate(chosen):
    return lambda coefficients, points, where: kernels.tps_evaluate(
        coefficients, points, where, implementation=chosen
    )


def grid(chosen):
    return lambda coefficients, points: kernels.tps_grid(
        coefficients, points, SIZE, align_corners=False, implementation=chosen
    )


def image(chosen):
    return lambda pixels, points, values: kernels.warp_image(
        pixels, points, values, size=SIZE, padding_mode="border", implementation=chosen
    )


def tokens(chosen):
    return lambda features, source, angle, basis: kernels.warp_tokens(
        features, source, angle, basis, size=SIZE, eta=0.3, prefix=1, implementation=chosen
    )


def convolution(chosen):
    return lambda features, weight, bias: kernels.conv_relu_mean(
        features, weight, bias, size=SIZE, prefix=1, implementation=chosen
    )


FUNCTIONS = {
    "tps_solve": solve,
    "tps_evaluate": evaluate,
    "tps_grid": grid,
    "warp_image": image,
    "warp_tokens": tokens,
    "conv_relu_mean": convolution,
}


def arguments(name: str, *mapped: int) -> list[Tensor]:
    """One sample's arguments, or with leading axes of the given lengths before them."""

    def plain(*shape: int, seed: int) -> Tensor:
        return random(*mapped, *shape, seed=seed, dtype=torch.float32)

    points = spread(*mapped, 2, seed=1)
    return {
        "tps_solve": [points, plain(2, 5, 3, seed=2)],
        "tps_evaluate": [plain(2, 8, 3, seed=3), points, plain(2, 6, 2, seed=4)],
        "tps_grid": [plain(2, 8, 2, seed=5), points],
        "warp_image": [plain(2, 3, 5, 4, seed=6), points, 0.8 * spread(*mapped, 2, seed=7)],
        "warp_tokens": [
            plain(2, 13, 16, seed=8),
            plain(4, 2, seed=9),
            plain(2, seed=10),
            0.3 * plain(12, 4, seed=11),
        ],
        "conv_relu_mean": [
            plain(2, 13, 6, seed=12),
            plain(5, 6, 3, 3, seed=13),
            plain(5, seed=14),
        ],
    }[name]


def cases() -> list:
    """Every operator by each of its implementations; every subset of arguments mapped."""
    found = []
    for name, parameters in IMPLEMENTATIONS.items():
        count = len(arguments(name))
        for parameter in parameters:
            for subset in range(1, 2**count):
                mapped = tuple(bool(subset >> position & 1) for position in range(count))
                label = f"{name}-{parameter.values[0]}-{''.join('01'[m] for m in mapped)}"
                found.append(
                    pytest.param(name, *parameter.values, mapped, marks=parameter.marks, id=label)
                )
    return found


def each_operator() -> list:
    return [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name, parameters in IMPLEMENTATIONS.items()
        for parameter in parameters
    ]


def looped(function, mapped, given: list[Tensor], count: int) -> Tensor:
    """What ``vmap`` means: one call per sample, results stacked."""
    return torch.stack(
        [function(*(t[i] if m else t for t, m in zip(given, mapped, strict=True)))
         for i in range(count)]
    )  # fmt: skip


def exact(name: str, implementation: str) -> bool:
    """Whether a sample's bits do not depend on how many are computed with it.

    The solve puts samples side by side in vectors, and fewer otherwise; PyTorch promises nothing.
    """
    return implementation != "reference" and name in ("tps_evaluate", "tps_grid", "warp_tokens")


def assert_same(actual: Tensor, wanted: Tensor, name: str, implementation: str) -> None:
    if exact(name, implementation):
        assert bitwise_equal(actual, wanted)
    else:
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "implementation", "mapped"), cases())
def test_mapped_equals_a_loop(name, implementation, mapped):
    device = device_of(implementation)
    many, one = arguments(name, 3), arguments(name)
    given = [(a if m else b).to(device) for a, b, m in zip(many, one, mapped, strict=True)]
    function = FUNCTIONS[name](implementation)
    actual = vmap(function, tuple(0 if m else None for m in mapped))(*given)
    assert_same(actual, looped(function, mapped, given, 3), name, implementation)


@pytest.mark.parametrize(("name", "implementation", "mapped"), cases())
def test_per_sample_gradients_equal_a_loop(name, implementation, mapped):
    device = device_of(implementation)
    many, one = arguments(name, 3), arguments(name)
    given = [(a if m else b).to(device) for a, b, m in zip(many, one, mapped, strict=True)]
    function = FUNCTIONS[name](implementation)
    wanted_by = tuple(range(len(given) - (name == "warp_tokens")))  # the basis is a constant

    def loss(*leaves):
        return function(*leaves).sin().sum()

    mapped_gradients = vmap(grad(loss, wanted_by), tuple(0 if m else None for m in mapped))(*given)
    for position, actual in enumerate(mapped_gradients):

        def gradient(*leaves, position=position):
            leaves = [leaf.detach().clone().requires_grad_(i in wanted_by)
                      for i, leaf in enumerate(leaves)]  # fmt: skip
            return torch.autograd.grad(loss(*leaves), leaves[position])[0]

        assert_same(actual, looped(gradient, mapped, given, 3), name, implementation)


def fused_operators() -> list:
    return [parameter for parameter in each_operator() if parameter.values[1] != "reference"]


@pytest.mark.parametrize(("name", "implementation"), fused_operators())
def test_axes_other_than_the_first(name, implementation):
    """PyTorch's own grid_sample swaps axes here (2.11 to 2.14), so the reference warps may."""
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name, 3)]
    function = FUNCTIONS[name](implementation)
    wanted = vmap(function)(*given)
    for dim in (1, -1):
        moved = [t.movedim(0, dim) for t in given]
        assert bitwise_equal(vmap(function, dim)(*moved), wanted)
    last = vmap(function, out_dims=-1)(*given)
    assert bitwise_equal(last.movedim(-1, 0), wanted)


@pytest.mark.parametrize(("name", "implementation"), each_operator())
def test_nested_maps(name, implementation):
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name, 3, 2)]
    function = FUNCTIONS[name](implementation)
    wanted = torch.stack([looped(function, [True] * len(given), [t[i] for t in given], 2)
                          for i in range(3)])  # fmt: skip
    assert_same(vmap(vmap(function))(*given), wanted, name, implementation)
    # The inner map over the first argument only, the outer over all.
    inner = vmap(function, (0, *[None] * (len(given) - 1)))
    actual = vmap(inner)(given[0], *(t[:, 0] for t in given[1:]))
    for i in range(3):
        for j in range(2):
            one = function(given[0][i, j], *(t[i, 0] for t in given[1:]))
            assert_same(actual[i, j], one, name, implementation)


@pytest.mark.parametrize(("name", "implementation"), fused_operators())
def test_an_axis_of_length_zero(name, implementation):
    """PyTorch's own grid_sample refuses one, so the reference warps do."""
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name, 0)]
    function = FUNCTIONS[name](implementation)
    wanted = function(*(t.to(device) for t in arguments(name)))
    result = vmap(function)(*given)
    assert result.shape == (0, *wanted.shape) and result.dtype == wanted.dtype
    gradient = vmap(grad(lambda *leaves: function(*leaves).sum()))(*given)
    assert gradient.shape == given[0].shape


@pytest.mark.parametrize(("name", "implementation"), each_operator())
def test_jacobian_equals_autograds(name, implementation):
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name)]
    function = FUNCTIONS[name](implementation)
    positions = tuple(range(len(given) - (name == "warp_tokens")))
    constants = given[len(positions) :]
    actual = jacrev(function, positions)(*given)
    wanted = torch.autograd.functional.jacobian(
        lambda *leaves: function(*leaves, *constants), tuple(given[: len(positions)])
    )
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "implementation"), each_operator())
def test_gradient_of_a_map_and_pullback(name, implementation):
    """The order of grad and vmap does not matter; a pullback outlives the transform it came of."""
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name, 3)]
    function = FUNCTIONS[name](implementation)

    def loss(*leaves):
        return function(*leaves).sin().sum()

    inside = vmap(grad(loss))(*given)
    outside = grad(lambda *leaves: vmap(loss)(*leaves).sum())(*given)
    torch.testing.assert_close(outside, inside, rtol=1e-4, atol=1e-5)
    _, pull = vjp(lambda first: vmap(loss)(first, *given[1:]).sum(), given[0])
    (pulled,) = pull(torch.ones((), device=device))
    torch.testing.assert_close(pulled, inside, rtol=1e-4, atol=1e-5)
    # Leaves of ordinary autograd seen through a map.
    leaf = given[0].clone().requires_grad_()
    (plain,) = torch.autograd.grad(vmap(loss)(leaf, *given[1:]).sum(), leaf)
    torch.testing.assert_close(plain, inside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "implementation"), fused_operators())
def test_second_derivatives_name_the_way_out(name, implementation):
    """Never silently zero, though autograd is off while an operator's forward pass runs."""
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name)]
    function = FUNCTIONS[name](implementation)

    def loss(first):
        return function(first, *given[1:]).sin().sum()

    with pytest.raises(RuntimeError, match="implementation='reference'"):
        grad(lambda first: grad(loss)(first).square().sum())(given[0])


@pytest.mark.parametrize(("name", "implementation"), fused_operators())
def test_forward_mode_is_refused(name, implementation):
    device = device_of(implementation)
    given = [t.to(device) for t in arguments(name)]
    function = FUNCTIONS[name](implementation)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(lambda first: function(first, *given[1:]), (given[0],), (given[0],))


def test_compiled_per_sample_gradients_equal_eager():
    given = arguments("warp_tokens", 3)
    function = tokens("cpp")

    def loss(features, source, angle, basis):
        return function(features, source, angle, basis).sin().sum()

    per_sample = vmap(grad(loss, (0, 1, 2)), (0, None, 0, None))
    given[1], given[3] = given[1][0], given[3][0]
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(*given)
    for one, other in zip(compiled, per_sample(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0)])
def test_pooling_is_mapped_one_sample_at_a_time(mapped):
    """Masks have a batch axis or none, so nothing is merged."""
    features = random(3, 2, 7, 8, seed=1, dtype=torch.float32)
    masks = random(3, 4, 7, seed=2, dtype=torch.float32)
    given = [t if m == 0 else t[0] for t, m in zip((features, masks), mapped, strict=True)]

    def function(features, masks):
        return kernels.masked_part_pool(features, masks, activation="softmax")[0]

    actual = vmap(function, mapped)(*given)
    assert bitwise_equal(actual, looped(function, [m == 0 for m in mapped], given, 3))


def test_prototype_loss_per_sample():
    features = random(3, 6, 8, seed=3, dtype=torch.float32)
    masks = random(3, 6, 8, seed=4, dtype=torch.float32).sigmoid()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])

    def loss(features, masks):
        return kernels.masked_prototype_loss(features, masks, labels)[0]

    actual = vmap(grad(loss))(features, masks)
    for i in range(3):
        leaf = features[i].clone().requires_grad_()
        assert bitwise_equal(actual[i], torch.autograd.grad(loss(leaf, masks[i]), leaf)[0])


@pytest.mark.parametrize(("name", "implementation"), each_operator()[:2])
def test_singular_samples_are_named_through_a_map(name, implementation):
    points, values = arguments("tps_solve", 3)
    points[1, 1] = points[1, 1, 0]
    with pytest.raises(RuntimeError, match="control_points: those of sample 3"):
        vmap(FUNCTIONS[name](implementation))(points, values)

    def info(points, values):
        return kernels.tps_solve_ex(points, values, implementation=implementation).info

    assert vmap(info)(points, values).tolist() == [[0, 0], [0, 1], [0, 0]]


def test_compiled_reference_leaves_out_the_check():
    """There are no figures to read while compiling; a singular sample's coefficients are NaN."""
    points, values = arguments("tps_solve")
    compiled = torch.compile(solve("reference"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(points, values), solve("reference")(points, values))
    points[1] = 0.0
    outcome = compiled(points, values)
    assert outcome[0].isfinite().all() and outcome[1].isnan().all()


def test_a_derivative_knows_which_arguments_want_it():
    """As with torch.library.register_autograd: one flag per argument of the operator."""
    from gsalign_kernels import transforms

    library = torch.library.Library("gsalign_test_transforms", "FRAGMENT")
    library.define("scale(Tensor x, Tensor y, float factor) -> Tensor")
    library.define("scale_backward(Tensor grad, Tensor x, Tensor y, float factor) -> Tensor")
    library.impl("scale", lambda x, y, factor: x * y * factor, "CompositeExplicitAutograd")
    seen: list[tuple[bool, ...]] = []

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.factor = inputs[2]

    def backward(ctx, grad):
        seen.append(ctx.needs_input_grad)
        x, y = ctx.saved_tensors
        return grad * y * ctx.factor, grad * x * ctx.factor, None

    transforms.register_autograd(library, "scale", backward=backward, setup_context=setup)
    x, y = torch.tensor(3.0), torch.tensor(5.0, requires_grad=True)
    torch.ops.gsalign_test_transforms.scale(x, y, 2.0).backward()
    assert y.grad == 6.0 and seen == [(False, True, False)]
