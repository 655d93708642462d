"""Programs of helpers/transforms.py under torch.compile, and over modules whose own parameters need
gradients.
"""

from functools import partial

import pytest
import torch
from torch.func import grad, jacrev
from torch.utils._pytree import tree_leaves

import lstm_fused
from tests.helpers.transforms import FORMS, TRANSFORMS, Form, assert_close, run, total

# Each program is compiled with one of these, and the gradient of everything with all. Of forward
# mode torch.compile knows that of torch.func alone.
COMPILED_FORMS = [
    Form("lstm"),
    Form("gru", step=True),
    Form("lstm", layers=2, directions=2),
    Form("rnn_relu"),
    Form("lstm", proj=2, directions=2),
]
COMPILED = [(name, COMPILED_FORMS[k % len(COMPILED_FORMS)]) for k, name in enumerate(TRANSFORMS)]
COMPILED = [(name, form) for name, form in COMPILED if name != "forward mode"]
COMPILED += [("grad of all", form) for form in COMPILED_FORMS[1:]]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.covering(goals=lambda name, form: {form} if name == "grad of all" else set())
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name, form", COMPILED, ids=lambda case: str(case))
def test_compiled(name, form):
    found = run(name, form, lstm_fused, lambda f: torch.compile(f, backend="aot_eager"))
    assert_close(found, run(name, form, "reference"))


def own_parameters(module, x, how):
    """Programs over a module whose parameters need gradients: torch.func does not see them.

    Returns the gradient of x, and those that ordinary autograd then finds.
    """

    def f(z):
        return total(tree_leaves(module(z)))

    g = how(grad(f))(x)
    weights = [w for w in module.parameters() if w.requires_grad]
    through = torch.autograd.grad(g.sum(), weights, allow_unused=True)
    x = x.clone().requires_grad_()
    J = jacrev(lambda z: tree_leaves(module(z))[0])(x)
    J.square().sum().add(f(x)).backward()
    return g, through, x.grad, [w.grad for w in weights]


@pytest.mark.covering(
    goals=lambda form, frozen, compiled: {(frozen, compiled), (form, form.step and compiled)}
)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True], ids=("eager", "compiled"))
@pytest.mark.parametrize("frozen", ["", "ih", "all"], ids=lambda f: f"{f or 'nothing'} frozen")
@pytest.mark.parametrize("form", FORMS[:8], ids=str)
def test_matches_torch_with_module_parameters(form, frozen, compiled):
    found = []
    for library in (lstm_fused, torch.nn):
        module = form.module(library)
        for name, w in module.named_parameters():
            w.requires_grad_(frozen != "all" and not (frozen and frozen in name))
        ours = library is lstm_fused
        how = partial(torch.compile, backend="aot_eager") if compiled and ours else lambda f: f
        if frozen == "all":
            x = form.inputs()[0]
            found.append(how(grad(lambda z, m=module: total(tree_leaves(m(z)))))(x))
        else:
            found.append(own_parameters(module, form.inputs()[0], how))
    assert_close(*found)


@pytest.mark.full
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["grad of all", "per sample", "ensemble trained"])
def test_compiled_by_inductor(name):
    form = Form("lstm")
    found = run(name, form, lstm_fused, lambda f: torch.compile(f, fullgraph=True))
    assert_close(found, run(name, form, "reference"))
