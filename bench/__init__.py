"""The benchmark harness: `python -m bench --help`. Each file uses those above it.

cases.py         what is measured: workloads, sets of them, goals
environment.py   the machine, and conditions set for it on purpose; compiled.py the harness's C++
runs.py          a workload's tensors, and modules that run on them
onnx_runs.py     graphs of one node in other runtimes; streams.py prepared steps
providers.py     what is compared, and what each cannot run
isolated.py      processes of their own; timing.py the clock in them
measure.py       one row: the parity gate, then the clock; memory; latency.py single calls
roofline.py      the machine's limits, and a workload's time at them; gpu.py those of a GPU
run.py           a whole set; model.py a user's model
accuracy.py      what rounded weights cost trained models
report.py        what people read of results: tables, goals, comparisons; charts.py, pages.py
"""
