"""Our operators in ONNX: one LSTM, GRU or RNN node a layer, for both of torch.onnx's exporters.

A layer is written once, by ``_layer`` and its parts, on a graph that has ``op`` and ``constant``:
``_Graph`` of the exporter on torch.export (``dynamo=True``), ``_TracedGraph`` of the one on
TorchScript. ONNX's gates are in another order than torch's: i o f g, and z r n; its peepholes are
i o f.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions, S rows of packed
data.
"""

from typing import Any, NamedTuple

import torch

from lstm_fused import _plan
from lstm_fused.cuda import CELLS
from lstm_fused.hooks import when_imported
from lstm_fused.panels import GROUP, SIGN, forms_of, in_torch_order, inverse

_OPSET = 15  # the first with all that is used here


class _Node:
    """A cell in ONNX: the operator, the order of its gates and of its peepholes in terms of ours,
    its attributes."""

    def __init__(self, op, gates, states=1, peepholes=(), **attributes):
        self.op, self.gates, self.states, self.attributes = op, gates, states, attributes
        self.peepholes = peepholes


_NODES = {
    "lstm": _Node("LSTM", (0, 3, 1, 2), states=2),
    "peephole_lstm": _Node("LSTM", (0, 3, 1, 2), states=2, peepholes=(0, 2, 1)),
    # Its forget gate is 1 - i: the rows of i stand in the place of those that are not read.
    "coupled_lstm": _Node("LSTM", (0, 2, 0, 1), states=2, input_forget=1),
    "gru": _Node("GRU", (1, 0, 2), linear_before_reset=1),
    "reset_before_gru": _Node("GRU", (1, 0, 2), linear_before_reset=0),
    "rnn_tanh": _Node("RNN", (0,), activations=["Tanh"]),
    "rnn_relu": _Node("RNN", (0,), activations=["Relu"]),
}


class _Graph:
    """The graph under construction of the exporter on torch.export."""

    def op(self, name, *inputs, outputs=1, **attributes):
        from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

        made = call_op(name, *inputs, _num_outputs=outputs, **attributes)
        return made[0] if outputs == 1 else tuple(made)

    def constant(self, values, dtype=torch.int64):
        import onnx_ir

        return self.op("Constant", value=onnx_ir.tensor(torch.tensor(values, dtype=dtype).numpy()))

    def shape(self, value):
        return tuple(value.shape)

    def last_size(self, value):
        return int(value.shape[-1])

    def is_zeros(self, value):
        """Whether the value is known to be zeros, as an export passes them for a missing hx."""
        node = value.producer()
        while node is not None and node.op_type == "CastLike":
            node = node.inputs[0].producer()
        if node is None or node.op_type != "ConstantOfShape":
            return False
        fill = node.attributes.get("value")
        return fill is None or not fill.value.numpy().any()


class _TracedGraph:
    """The graph under construction of the exporter on TorchScript."""

    _SUFFIX = {int: "i", float: "f", str: "s"}

    def __init__(self, graph):
        self.graph = graph

    def op(self, name, *inputs, outputs=1, **attributes):
        named = {}
        for key, value in attributes.items():
            first = value[0] if isinstance(value, list) else value
            named[f"{key}_{self._SUFFIX[type(first)]}"] = value
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        return self.graph.op(name, *map(self._given, inputs), outputs=outputs, **named)

    def _given(self, value):
        """The value, or ONNX's placeholder for an input that is left out."""
        if value is not None:
            return value
        none = self.graph.op("prim::Constant")
        none.setType(torch._C.OptionalType.ofTensor())
        return none

    def constant(self, values, dtype=torch.int64):
        return self.graph.op("Constant", value_t=torch.tensor(values, dtype=dtype))

    def shape(self, value):
        return tuple(value.type().sizes())

    def last_size(self, value):
        return value.type().varyingSizes()[-1]

    def is_zeros(self, value):
        return False


class _Part(NamedTuple):
    """The weights of a direction; no biases are (), no projection and no vectors None."""

    w_ih: Any
    w_hh: Any
    biases: tuple[Any, ...]
    w_hr: Any
    vectors: Any


def _directions(weights, directions, has_vectors):
    each = len(weights) // directions
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        vectors = rest.pop() if has_vectors else None
        w_hr = rest.pop() if len(rest) % 2 else None
        yield _Part(w_ih, w_hh, tuple(rest), w_hr, vectors)


def _stacked(g, tensors):
    """Tensors of one shape along a new first axis."""
    axis = g.constant([0])
    parts = [g.op("Unsqueeze", t, axis) for t in tensors]
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=0)


def _size(g, value, axis):
    """The size of an axis as an int64 scalar."""
    return g.op("Gather", g.op("Shape", value), g.constant(axis), axis=0)


def _range(g, stop):
    return g.op("Range", g.constant(0), stop, g.constant(1))


def _zero_like(g, value):
    """A zero of value's dtype, of one element."""
    return g.op("CastLike", g.constant([0], torch.float32), value)


def _layer(g, x, lengths, state0, weights, cell, directions, hidden=None):
    """One layer of x (T, N, I): y (T, N, D * R), h_n (D, N, R) and c_n (D, N, H) or None.

    lengths: (N,), from 0 to T, or None. A row of length 0 keeps its state, which ONNX leaves open:
    it is run for one step, and the result dropped. hidden: H, where no shape of a weight tells.
    """
    if cell not in _NODES:
        raise NotImplementedError(f"ONNX has no operator for the cell {cell}")
    kind = _NODES[cell]
    parts = list(_directions(weights, directions, bool(kind.peepholes)))
    hidden = hidden or g.shape(parts[0].w_hh)[0] // (1 + max(kind.gates))
    h0, c0 = (*(None if g.is_zeros(s) else s for s in state0), None, None)[:2]
    if parts[0].w_hr is not None:
        x, initial_h, parts = _without_projection(g, x, lengths, h0, parts)
    else:
        initial_h = h0
    order = [gate * hidden + unit for gate in kind.gates for unit in range(hidden)]
    rows = g.constant(order)

    def sorted_rows(w):
        return w if len(kind.gates) == 1 else g.op("Gather", w, rows, axis=0)

    biases = [g.op("Concat", *map(sorted_rows, p.biases), axis=0) for p in parts if p.biases]
    sequence_lens = None
    if lengths is not None:
        sequence_lens = g.op("Cast", g.op("Max", lengths, g.constant(1)), to=6)  # int32
    attributes = dict(kind.attributes)
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * directions
    more = []
    if kind.peepholes:
        order, merged = g.constant(kind.peepholes), g.constant([-1])
        ours = [g.op("Gather", part.vectors, order, axis=0) for part in parts]
        more = [_stacked(g, [g.op("Reshape", v, merged) for v in ours])]
    y, *ends = g.op(
        kind.op,
        x,
        _stacked(g, [sorted_rows(part.w_ih) for part in parts]),
        _stacked(g, [sorted_rows(part.w_hh) for part in parts]),
        _stacked(g, biases) if biases else None,
        sequence_lens,
        initial_h,
        *([c0] if kind.states == 2 else []),
        *more,
        outputs=1 + kind.states,
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **attributes,
    )
    if parts[0].w_hr is not None:
        project = _stacked(g, [g.op("Transpose", part.w_hr, perm=[1, 0]) for part in parts])
        y, ends[0] = g.op("MatMul", y, project), g.op("MatMul", ends[0], project)
    # (T, D, N, R) -> (T, N, D * R)
    if directions == 1:
        y = g.op("Squeeze", y, g.constant([1]))
    else:
        y = g.op("Transpose", y, perm=[0, 2, 1, 3])
        y = g.op("Reshape", y, g.constant([0, 0, -1]))
    if lengths is not None:
        y, ends = _at_lengths(g, y, ends, lengths, (h0, c0))
    return (y, *ends, None)[:3]


def _at_lengths(g, y, ends, lengths, state0):
    """y with zeros in the padding, and the initial states of rows without a step."""
    zero = _zero_like(g, y)
    steps = g.op("Unsqueeze", _range(g, _size(g, y, 0)), g.constant([1]))
    within = g.op("Unsqueeze", g.op("Less", steps, lengths), g.constant([2]))
    began = g.op("Unsqueeze", g.op("Greater", lengths, g.constant(0)), g.constant([1]))
    ends = [
        g.op("Where", began, end, zero if start is None else start)
        for end, start in zip(ends, state0, strict=False)
    ]
    return g.op("Where", within, y, zero), ends


def _without_projection(g, x, lengths, h0, parts):
    """A layer with a projection as an ONNX node without one, which carries h before the projection.

    The recurrent product is W_hh (W_hr h) = (W_hh W_hr) h. What that cannot give, W_hh h_0 in the
    first step of each direction, comes as further inputs: h_0 there, zeros elsewhere.
    Returns x, the initial h and the parts.
    """
    inputs, recurrent = [part.w_ih for part in parts], [part.w_hh for part in parts]
    if h0 is not None:
        steps = g.op("Unsqueeze", _range(g, _size(g, x, 0)), g.constant([1, 2]))
        zero = _zero_like(g, x)
        begins = [g.constant(0)]
        if len(parts) == 2:
            end = _size(g, x, 0) if lengths is None else g.op("Max", lengths, g.constant(1))
            last = g.op("Sub", end, g.constant(1))
            begins.append(last if lengths is None else g.op("Unsqueeze", last, g.constant([0, 2])))
        given = []
        for d, begin in enumerate(begins):
            start = g.op("Gather", h0, g.constant([d]), axis=0)
            given.append(g.op("Where", g.op("Equal", steps, begin), start, zero))
        x = g.op("Concat", x, *given, axis=2)
        nothing = [g.op("Mul", w, zero) for w in recurrent]
        inputs = [
            g.op("Concat", w, *nothing[:d], recurrent[d], *nothing[d + 1 :], axis=1)
            for d, w in enumerate(inputs)
        ]
    whole = [
        part._replace(w_ih=w, w_hh=g.op("MatMul", part.w_hh, part.w_hr))
        for w, part in zip(inputs, parts, strict=True)
    ]
    return x, None, whole


def _packed_layer(g, x, batch_sizes, state0, weights, cell, directions, hidden):
    """One layer of packed x (S, I): padded for the node, and its y packed again."""
    column = g.op("Unsqueeze", batch_sizes, g.constant([1]))
    ranks = _range(g, g.op("Gather", batch_sizes, g.constant(0), axis=0))
    alive = g.op("Greater", column, ranks)  # (T, N)
    lengths = g.op("ReduceSum", g.op("Cast", alive, to=7), g.constant([0]), keepdims=0)
    offsets = g.op("CumSum", column, g.constant(0), exclusive=1)
    at = g.op("Where", alive, g.op("Add", offsets, ranks), g.constant(0))
    padded = g.op("Gather", x, at, axis=0)
    y, h_n, c_n = _layer(g, padded, lengths, state0, weights, cell, directions, hidden)
    merged = g.constant([-1])
    width = g.op("Shape", y)
    width = g.op("Slice", width, g.constant([2]), g.constant([3]))
    rows = g.op("Reshape", y, g.op("Concat", merged, width, axis=0))
    rows = g.op("Compress", rows, g.op("Reshape", alive, merged), axis=0)
    # Rows of x beyond the batch sizes' sum belong to no step: their y is zero.
    missing = g.op("Sub", _size(g, x, 0), _size(g, rows, 0))
    shape = g.op("Concat", g.op("Unsqueeze", missing, g.constant([0])), width, axis=0)
    rest = g.op("Expand", _zero_like(g, y), shape)
    return g.op("Concat", rows, rest, axis=0), h_n, c_n


def _none(g, like):
    """An empty tensor (0,), for an output that the operator does not have."""
    return g.op("Expand", _zero_like(g, like), g.constant([0]))


def _check_options(resets, cell_states):
    """Refuse what ONNX's operators of a layer do not have."""
    if resets is not None:
        raise NotImplementedError(
            "ONNX's LSTM, GRU and RNN have no resets: export a model that is called for one step, "
            "or for the steps between two resets, and give it the state to begin with"
        )
    if cell_states:
        raise NotImplementedError(
            "ONNX's LSTM does not return the cell states of all steps: "
            "export a model that is called for one step, whose c_n is that step's"
        )


def _forward(g, x, batch_sizes, resets, state0, weights, cell, directions, cell_states, save_every):
    """``lstm_fused::recurrent_forward``, with empty outputs for what is saved for backward."""
    found = _run(g, x, batch_sizes, resets, state0, weights, cell, directions, cell_states)
    return *found, _none(g, x), _none(g, x)


def _run(g, x, batch_sizes, resets, state0, weights, cell, directions, cell_states, hidden=None):
    """y, h_n and c_n of ``recurrent_forward``; hidden as of _layer."""
    _check_options(resets, cell_states)
    if batch_sizes is not None and len(g.shape(batch_sizes)) == 2:
        raise NotImplementedError(
            "documents (cu_seqlens=) cannot be exported to ONNX: give a padded input and lengths="
        )
    layer = _layer if batch_sizes is None else _packed_layer
    name = CELLS[cell]["name"]
    y, h_n, c_n = layer(g, x, batch_sizes, state0, weights, name, directions, hidden)
    return y, h_n, _none(g, x) if c_n is None else c_n


def _padded(g, x, lengths, resets, state0, weights, cell, directions, cell_states):
    """``lstm_fused::recurrent_padded``."""
    _check_options(resets, cell_states)
    y, h_n, c_n = _layer(g, x, lengths, state0, weights, CELLS[cell]["name"], directions)
    return y, h_n, _none(g, x) if c_n is None else c_n


def _unpacked(g, panels, form, has_scales):
    """Panels, or scales (blocks, groups, G, 16), as a float32 matrix of form's shape."""
    U, K, gates = form
    is_scales = len(g.shape(panels)) == 4
    w = g.op("Cast", panels, to=1)  # float32
    if not is_scales and has_scales:
        w = g.op("Sub", w, g.constant([SIGN], torch.float32))
    if is_scales:  # each for the columns of its group
        w = g.op("Unsqueeze", w, g.constant([4]))
        w = g.op("Expand", w, g.constant([1, 1, 1, 1, GROUP]))
    w = g.op("Transpose", w, perm=[2, 0, 3, 1, 4])
    rows = -(-U // _plan.block) * _plan.block
    w = g.op("Reshape", w, g.constant([len(gates), rows, -1]))
    w = g.op("Slice", w, g.constant([0, 0]), g.constant([U, K]), g.constant([1, 2]))
    w = g.op("Gather", w, g.constant(inverse(gates)), axis=0)
    return g.op("Reshape", w, g.constant([-1, K]))


def _dequantized(g, weights, forms, directions):
    """The weights of a layer of int8 or bfloat16 ones, see panels.plain_weights."""
    has_scales = len(g.shape(weights[1])) == 4

    def take(part, form):
        w = _unpacked(g, part.pop(0), form, has_scales)
        return g.op("Mul", w, _unpacked(g, part.pop(0), form, has_scales)) if has_scales else w

    each = len(weights) // directions
    parts = [list(weights[d * each : (d + 1) * each]) for d in range(directions)]
    return [w for part in parts for w in in_torch_order(part, forms, has_scales, take)]


def _quantized_forward(g, x, batch_sizes, resets, state0, weights, *numbers):
    """``lstm_fused::quantized_forward``, in float32 with the values that the weights have."""
    hidden_size, proj_size, cell, directions, cell_states = numbers
    forms = forms_of(cell, g.last_size(x), hidden_size, proj_size)
    plain = _dequantized(g, weights, forms, directions)
    options = cell, directions, cell_states, hidden_size
    return _run(g, x, batch_sizes, resets, state0, plain, *options)


_OPERATORS = {
    "recurrent_forward": _forward,
    "recurrent_padded": _padded,
    "quantized_forward": _quantized_forward,
}


def _register(_):
    """Register our operators with the exporter on torch.export, as torchlib registers torch's."""
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry as registry

    for name, write in _OPERATORS.items():

        def translate(*arguments, write=write):
            return write(_Graph(), *arguments)

        operator = getattr(torch.ops.lstm_fused, name).default
        registry.onnx_impl(operator, no_compile=True)(translate)


def _register_traced(registration):
    """Register our operators with the exporter on TorchScript."""

    for name, write in _OPERATORS.items():

        def translate(graph, *arguments, write=write):
            return write(_TracedGraph(graph), *map(_traced, arguments))

        registration.custom_onnx_symbolic(f"lstm_fused::{name}", _OPSET)(translate)


def _traced(argument):
    """The content of a traced argument: a tensor's value, a list of them, a number, or None."""
    from torch.onnx import symbolic_helper

    if argument.node().kind() == "prim::ListConstruct":
        return symbolic_helper._unpack_list(argument)
    if symbolic_helper._is_none(argument):
        return None
    numbers = argument.node().kind() in ("prim::Constant", "onnx::Constant")
    return symbolic_helper._maybe_get_const(argument, "i") if numbers else argument


def register():
    """Register our operators with torch.onnx, when it is imported."""
    when_imported("torch.onnx._internal.exporter._torchlib.ops", _register)
    when_imported("torch.onnx._internal.torchscript_exporter.registration", _register_traced)
