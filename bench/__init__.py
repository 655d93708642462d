"""The benchmark harness: `python -m bench --help`.

workloads.py, sets.py   what is measured, as plain data
problem.py              its tensors, and the right answer in float64
providers.py, peers.py  who is measured
parity.py, timing.py    the gate, and the clock behind it
roofline.py             the machine's limits, and a workload's time at them; exchange.py on a GPU
apart.py, worker.py     processes of their own: for a row's times, for the rows of a GPU
measure.py, memory.py   rows; model.py: a user's model; selfcheck.py: torch.nn against itself
report.py               tables; chart.py, page.py, readme.py, compare.py: the rest made of results
"""
