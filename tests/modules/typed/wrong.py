"""A program with mistakes, for `mypy --strict`: the test expects exactly the marked errors."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_fused
from lstm_fused import ops, runtime

lstm, gru, cell = lstm_fused.LSTM(4, 8), lstm_fused.GRU(4, 8), lstm_fused.LSTMCell(4, 8)
x = torch.ones(3, 2, 4)

lstm_fused.LSTM("4", 8)  # error: arg-type
lstm_fused.RNN(4, 8, learned_initial_state="yes")  # error: arg-type
lstm_fused.LSTM(4)  # error: call-arg
lstm_fused.MinGRU(4, 8, proj_size=2)  # error: call-arg
lstm_fused.QRNN(4, 8, window="two")  # error: arg-type
lstm_fused.RegularizedLSTM(4, 8, zoneout=0.1)  # error: call-arg
lstm_fused.LSTM(4, 8, layers=2)  # error: call-arg
lstm_fused.GRU(4, 8, proj_size=2)  # error: call-arg
lstm_fused.RNN(4, 8, nonlinearity=3)  # error: arg-type
lstm_fused.GRUCell(4, 8, dtype="float32")  # error: arg-type
lstm(x, x)  # error: call-overload
lstm([1.0])  # error: call-overload
lstm(x, lengths=3)  # error: call-overload
lstm(x, resets=[True])  # error: call-overload
lstm(x, reset=x)  # error: call-overload
lstm(x, checkpoint_every="all")  # error: call-overload
lstm.forward(x, x)  # error: call-overload
gru(x, (x, x))  # error: call-overload
h: Tensor = lstm(x)[1]  # error: assignment
y: PackedSequence = gru(x)[0]  # error: assignment
gru.checkpoint_every = "all"  # error: assignment
lstm_fused.detach_state(3)  # error: type-var
cell(x, x)  # error: arg-type
h = cell(x)  # error: assignment
h = lstm(x, return_cell_states=True)[1]  # error: assignment
other: nn.GRU = lstm_fused.replace(nn.LSTM(4, 8))  # error: assignment
lstm_fused.replace({"lstm": lstm})  # error: type-var
lstm_fused.gradient_flow(nn.Linear(1, 1), x)  # error: arg-type
lstm_fused.explain(lstm)  # error: call-arg
runtime.set_isa(2)  # error: arg-type
print(runtime.build_info()["isa"])  # error: typeddict-item
print(runtime.plan("lstm", torch.float32, 1, 1, 4, 8, 8, 1).kernl)  # error: union-attr
ops.layer(x, None, None, [x])  # error: call-overload
