"""Programs of torch.func and torch.autograd over layers and single steps of every cell.

A row of TRANSFORMS is a program of one function's derivatives or examples. It is run with our
module in the function, and with the pure-torch reference in its place: the values must agree,
whatever is differentiated and whatever is frozen, in eager mode and compiled. torch.nn's own
modules and finite differences are further references where they apply.

Sizes are T, N, I, H; B examples.
"""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import lstm_fused
from lstm_fused import reference
from tests.helpers import described
from tests.helpers.oracle import CELLS, module_of

T, N, I, H, B = 3, 2, 3, 5, 4  # noqa: E741
SIZES = [2, 2, 1]  # of packed data
F64 = torch.float64


@dataclass(frozen=True)
class Form:
    """A module of ours, or a single step's."""

    cell: str
    step: bool = False
    layers: int = 1
    directions: int = 1
    proj: int = 0
    bias: bool = True
    packed: bool = False

    def __str__(self):
        words = [self.cell, "step" if self.step else ""]
        words += [
            f"L{self.layers}" if self.layers > 1 else "",
            "both" if self.directions > 1 else "",
        ]
        words += [f"proj{self.proj}" if self.proj else "", "" if self.bias else "nobias"]
        words += ["packed" if self.packed else ""]
        return " ".join(filter(None, words))

    def module(self, library=lstm_fused):
        torch.manual_seed(1)
        if self.step:
            name, more = CELLS[self.cell]
            return getattr(library, f"{name}Cell")(I, H, bias=self.bias, dtype=F64, **more)
        return module_of(
            self.cell,
            library,
            I,
            H,
            num_layers=self.layers,
            bidirectional=self.directions == 2,
            bias=self.bias,
            dtype=F64,
            **({"proj_size": self.proj} if self.proj else {}),
        )

    @cached_property
    def names(self):
        return [name for name, _ in self.module().named_parameters()]

    def inputs(self):
        """x and the states, as a tuple."""
        generator = torch.Generator().manual_seed(2)

        def draw(*shape):
            return torch.randn(*shape, dtype=F64, generator=generator)

        widths = described.widths_of(self.cell, H, self.proj or H)
        if self.step:
            return draw(N, I), *(draw(N, width) for width in widths)
        states = self.layers * self.directions
        x = draw(sum(SIZES), I) if self.packed else draw(T, N, I)
        given = tuple(draw(states, N, width) for width in widths)
        return x, *described.proper_state(self.cell, given)

    def call(self, library):
        """f(weights by name, x, *states) -> tuple of outputs, by a library or the reference."""
        if library == "reference":
            assert self.names  # made outside of every transform
            return self._by_reference
        module = self.module(library)

        def by_module(weights, x, *states):
            hx = states if len(states) > 1 else states[0]
            if self.packed:
                x = PackedSequence(x, torch.tensor(SIZES))
            out = functional_call(module, weights, (x, hx))
            if self.step:
                return tuple(tree_leaves(out))
            return out[0].data if self.packed else out[0], *tree_leaves(out[1])

        return by_module

    def _by_reference(self, weights, x, *states):
        x = x[None] if self.step else x
        states = [s[None] for s in states] if self.step else states
        flat = [weights[name] for name in self.names]
        each = len(flat) // self.layers
        ends = []
        for k in range(self.layers):
            of_layer = tuple(s[k * self.directions : (k + 1) * self.directions] for s in states)
            x, end = reference.CELLS[self.cell](
                x,
                torch.tensor(SIZES) if self.packed else None,
                of_layer,
                described.whole(self.cell, flat[k * each : (k + 1) * each], self.directions, x),
                self.directions,
            )
            ends.append(end)
        if self.step:
            return tuple(s[0] for s in ends[0])
        return x, *(torch.cat(s) for s in zip(*ends, strict=True))


FORMS = [
    *(Form(cell) for cell in CELLS),
    *(Form(cell, step=True) for cell in CELLS),
    Form("lstm", layers=2, directions=2),
    Form("lstm", proj=2, directions=2),
    Form("gru", layers=2, directions=2, bias=False),
    Form("lstm", directions=2, packed=True),
    Form("gru", packed=True),
    *(Form(cell, directions=2) for cell in described.CELLS),
    Form("peephole_lstm", layers=2, proj=2, bias=False),
    Form("regularized_gru", packed=True),
]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)


def total(outputs):
    """A scalar to which every element of every output contributes with its own weight."""
    return sum(
        (o * torch.arange(1, o.numel() + 1).to(o).view(o.shape).sin()).sum() for o in outputs
    )


def scalar(f):
    return lambda *args: total(f(*args))


def of_x(f, weights, states):
    return lambda x: f(weights, x, *states)


def leaves(weights, tensors):
    """Copies that gradients are recorded for."""
    weights = {k: w.clone().requires_grad_() for k, w in weights.items()}
    return weights, [t.clone().requires_grad_() for t in tensors]


def recorded(value, weights, tensors):
    """Gradients of a scalar that ordinary autograd recorded."""
    flat = [*weights.values(), *tensors]
    return torch.autograd.grad(value, [t for t in flat if t.requires_grad], allow_unused=True)


def inner_grad_then_backward(f, weights, x, *states):
    """A gradient by torch.func, then .backward() through it to what is outside."""
    weights, (x, *states) = leaves(weights, (x, *states))
    g = grad(scalar(of_x(f, weights, states)))(x.detach())
    return g, recorded(g.square().sum(), weights, states)


def penalty(f, weights, x, *states):
    """The loss, and beside it a Jacobian that ordinary autograd goes through."""
    weights, (x, *states) = leaves(weights, (x, *states))
    call = of_x(f, weights, states)
    J = jacrev(lambda z: call(z)[0])(x)
    return recorded(total(call(x)) + J.square().sum(), weights, (x, *states))


def maml(f, weights, x, *states):
    """A step down the gradient of some weights, the others frozen, and the gradient through it."""

    def loss(w):
        return scalar(f)(w, x, *states)

    moved = {k: w for k, w in weights.items() if "hh" in k}
    frozen = {k: w for k, w in weights.items() if "hh" not in k}

    def after(moved):
        slope = grad(lambda m: loss(frozen | m))(moved)
        return loss(frozen | {k: w - 0.1 * slope[k] for k, w in moved.items()})

    return grad(after)(moved)


def hvp_forward_over_reverse(f, weights, x, *states):
    return jvp(grad(scalar(of_x(f, weights, states))), (x,), (x.cos(),))


def hvp_reverse_over_reverse(f, weights, x, *states):
    slope = grad(scalar(of_x(f, weights, states)))
    return grad(lambda z: (slope(z) * x.cos()).sum())(x)


def under_no_grad(f, weights, x, *states):
    with torch.no_grad():
        return grad(scalar(f), argnums=(0, 1))(weights, x, *states)


def examples(*tensors):
    """Each tensor B times, the copies different."""
    return [torch.stack([t * (1 + 0.1 * k) for k in range(B)]) for t in tensors]


def vmap_of_inputs(f, weights, x, *states):
    xs, *ss = examples(x, *states)
    return vmap(lambda x, *s: f(weights, x, *s))(xs, *ss)


def vmap_of_x_in_the_middle(f, weights, x, *states):
    (xs,) = examples(x)
    return vmap(of_x(f, weights, states), in_dims=1, out_dims=-1)(xs.movedim(0, 1))


def ensemble(f, weights, x, *states):
    stacked = dict(zip(weights, examples(*weights.values()), strict=True))
    return vmap(f, in_dims=(0, *[None] * (1 + len(states))))(stacked, x, *states)


def ensemble_of_inputs(f, weights, x, *states):
    stacked = dict(zip(weights, examples(*weights.values()), strict=True))
    return vmap(f)(stacked, *examples(x, *states))


def ensemble_of_one_weight(f, weights, x, *states):
    name = next(k for k in weights if "hh" in k)
    (stacked,) = examples(weights[name])
    return vmap(lambda w: f(weights | {name: w}, x, *states))(stacked)


def ensemble_trained(f, weights, x, *states):
    stacked = dict(zip(weights, examples(*weights.values()), strict=True))
    return vmap(grad(scalar(f)))(stacked, *examples(x, *states))


def ensemble_then_grad(f, weights, x, *states):
    stacked = dict(zip(weights, examples(*weights.values()), strict=True))
    return grad(lambda w: total(vmap(f)(w, *examples(x, *states))))(stacked)


def per_sample(f, weights, x, *states):
    xs, *ss = examples(x, *states)
    return vmap(grad(scalar(f)), in_dims=(None, 0, *[0] * len(ss)))(weights, xs, *ss)


def per_sample_of_x_alone(f, weights, x, *states):
    (xs,) = examples(x)
    return vmap(grad(scalar(f)), in_dims=(None, 0, *[None] * len(states)))(weights, xs, *states)


def per_sample_of_some(f, weights, x, *states):
    some = {k: w for k, w in weights.items() if "ih" in k}
    (xs,) = examples(x)
    return vmap(grad(lambda s, z: scalar(f)(weights | s, z, *states)), (None, 0))(some, xs)


def per_sample_norms_differentiated(f, weights, x, *states):
    """grad over vmap over grad."""
    (xs,) = examples(x)

    def norm(weights, xs):
        each = vmap(grad(scalar(f)), in_dims=(None, 0, *[None] * len(states)))
        return sum(g.square().sum() for g in each(weights, xs, *states).values())

    return grad(norm, argnums=(0, 1))(weights, xs)


def per_sample_of_ensemble(f, weights, x, *states):
    stacked = dict(zip(weights, examples(*weights.values()), strict=True))
    (xs,) = examples(x)
    each = vmap(grad(scalar(f)), in_dims=(None, 0, *[None] * len(states)))
    return vmap(each, in_dims=(0, None, *[None] * len(states)))(stacked, xs, *states)


def per_sample_twice(f, weights, x, *states):
    (xs,) = examples(x)
    xs = torch.stack([xs, xs.sin()])
    each = vmap(grad(scalar(f)), in_dims=(None, 0, *[None] * len(states)))
    return vmap(each, in_dims=(None, 0, *[None] * len(states)))(weights, xs, *states)


def vmap_of_cotangents(f, weights, x, *states):
    y, pull = vjp(of_x(f, weights, states), x)
    return vmap(pull)(tuple(examples(*y)))


def jacobians_per_sample(f, weights, x, *states):
    (xs,) = examples(x)
    return vmap(jacrev(lambda z: f(weights, z, *states)[0]))(xs)


def forward_mode(f, weights, x, *states):
    """Without torch.func, and with gradients of the tangents."""
    weights, (x, *states) = leaves(weights, (x, *states))
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(w, w.detach().sin()) for k, w in weights.items()}
        out = f(duals, forward_ad.make_dual(x, x.detach().cos()), *states)
        moved = [forward_ad.unpack_dual(t).tangent for t in out]
        return moved, recorded(total(moved), weights, (x, *states))


TRANSFORMS = {
    "grad of all": lambda f, w, *ts: grad(scalar(f), tuple(range(1 + len(ts))))(w, *ts),
    "grad of x": lambda f, w, x, *s: grad(scalar(f), 1)(w, x, *s),
    "grad of states": lambda f, w, x, *s: grad(scalar(f), tuple(range(2, 2 + len(s))))(w, x, *s),
    "grad under no_grad": under_no_grad,
    "vjp": lambda f, w, *ts: vjp(f, w, *ts)[1](f(w, *ts)),
    "jacrev": lambda f, w, *ts: jacrev(f, argnums=(0, 1))(w, *ts),
    "jacfwd": lambda f, w, *ts: jacfwd(f, argnums=(0, 1))(w, *ts),
    "jvp": lambda f, w, *ts: jvp(
        f, (w, *ts), ({k: v.sin() for k, v in w.items()}, *map(torch.cos, ts))
    ),
    "jvp of x": lambda f, w, x, *s: jvp(of_x(f, w, s), (x,), (x.cos(),)),
    "jvp of jvp": lambda f, w, x, *s: jvp(
        lambda z: jvp(of_x(f, w, s), (z,), (z.cos(),))[1], (x,), (x.sin(),)
    ),
    "grad of jvp": lambda f, w, x, *s: grad(
        lambda w, z: total(jvp(of_x(f, w, s), (z,), (x.cos(),))[1]), (0, 1)
    )(w, x),
    "forward mode": forward_mode,
    "hessian": lambda f, w, x, *s: hessian(scalar(of_x(f, w, s)))(x),
    "jacrev of jacrev": lambda f, w, x, *s: jacrev(jacrev(scalar(of_x(f, w, s))))(x),
    "grad of grad of grad": lambda f, w, x, *s: grad(
        lambda a: grad(lambda b: grad(scalar(of_x(f, w, s)))(b).square().sum())(a).square().sum()
    )(x),
    "hvp forward over reverse": hvp_forward_over_reverse,
    "hvp reverse over reverse": hvp_reverse_over_reverse,
    "inner grad then backward": inner_grad_then_backward,
    "penalty": penalty,
    "maml": maml,
    "vmap of inputs": vmap_of_inputs,
    "vmap of x in the middle": vmap_of_x_in_the_middle,
    "ensemble": ensemble,
    "ensemble of inputs": ensemble_of_inputs,
    "ensemble of one weight": ensemble_of_one_weight,
    "ensemble trained": ensemble_trained,
    "ensemble then grad": ensemble_then_grad,
    "per sample": per_sample,
    "per sample of x alone": per_sample_of_x_alone,
    "per sample of some": per_sample_of_some,
    "per sample norms differentiated": per_sample_norms_differentiated,
    "per sample of ensemble": per_sample_of_ensemble,
    "per sample twice": per_sample_twice,
    "vmap of cotangents": vmap_of_cotangents,
    "jacobians per sample": jacobians_per_sample,
}


def run(name, form, library, how=lambda f: f):
    weights = {k: w.detach() for k, w in form.module().named_parameters()}
    f = form.call(library)
    return how(lambda w, *ts: TRANSFORMS[name](f, w, *ts))(weights, *form.inputs())


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
