"""Memory and gradients: how far back RNN, GRU and LSTM can learn, and why.

The task is to copy: after the last step the model must name the first symbol of the sequence; all
other symbols are noise. The first step can learn only from the gradient d loss / d h_1, which
backpropagation carries from h_T back to h_1.

    symbol   noise   noise          noise
      |        |       |              |
     h_1 -->  h_2 --> h_3 --> ... --> h_T --> Linear --> which symbol?

Each kind of layer is trained from scratch for each length, with the same number of hidden units and
steps and the same batches. The gates of GRU and LSTM are initialised with biases that keep a state
for up to T steps (Tallec and Ollivier, Can recurrent neural networks warp time?, 2018); an RNN has
no such gate. The plot shows the gradients after torch's initialisation, with those biases, and
after training. For an LSTM it shows the gradients of h alone, although most of its long-range
gradient flows through c. Another plot shows what resets inside a sequence do to them: the gradient
of the last step ends where its row last began anew.
"""

import itertools
import sys

import torch
from torch import nn

import lstm_fused
from examples import common
from examples.layers import KINDS, layer

SYMBOLS, NOISE = 4, 4
HIDDEN = 32
BATCH = 64
TESTED = 500
LENGTHS = [10, 20, 50, 100, 200, 400]
QUICK_LENGTHS = [20, 100]
DISTANCE = 1000
RESET_STEPS, RESETS = 200, 0.01  # steps of the rows with resets, and the share of steps with one
STARTS = ("torch's start", "gates set", "trained")


class Copier(nn.Module):
    """One-hot symbols (T, N, 8) -> scores (N, 4) of the first symbol."""

    def __init__(self, kind, backend, length=None):
        super().__init__()
        self.layer = layer(kind, backend)(SYMBOLS + NOISE, HIDDEN)
        self.head = nn.Linear(HIDDEN, SYMBOLS)
        if length is not None:
            self.remember(kind, length)

    @torch.no_grad()
    def remember(self, kind, length):
        """Set the gate biases so that each unit keeps its state for a random time up to length.

        A forget gate of 1 - 1/t keeps a state for about t steps, and sigmoid(log(t - 1)) is that.
        """
        bias = torch.log(1 + torch.rand(HIDDEN) * (length - 2))
        b_ih, b_hh = self.layer.bias_ih_l0, self.layer.bias_hh_l0
        if kind == "lstm":  # gates i, f, g, o: write as rarely as forget
            b_ih[: 2 * HIDDEN] = torch.cat([-bias, bias])
            b_hh[: 2 * HIDDEN] = 0
        elif kind == "gru":  # gates r, z, n
            b_ih[HIDDEN : 2 * HIDDEN] = bias
            b_hh[HIDDEN : 2 * HIDDEN] = 0

    def forward(self, x):
        y, _ = self.layer(x)
        return self.head(y[-1])


class Sequences:
    """Training sequences: a symbol to copy, then noise, random or from the characters of a text."""

    def __init__(self, path):
        self.codes = None
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise common.DataError(f"{path}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise common.DataError(f"{path} is not UTF-8 text") from None
            if len(text) <= DISTANCE:
                raise common.DataError(f"{path} holds fewer than {DISTANCE + 1} characters")
            self.codes = torch.tensor([ord(character) % NOISE for character in text])

    def draw(self, length, size, generator):
        """(T, N, 8) one-hot, and the first symbols (N,)."""
        if self.codes is None:
            codes = torch.randint(NOISE, (length, size), generator=generator)
        else:
            begin = torch.randint(len(self.codes) - length, (size,), generator=generator)
            codes = self.codes[begin + torch.arange(length)[:, None]]
        first = torch.randint(SYMBOLS, (size,), generator=generator)
        codes = torch.cat([first[None], SYMBOLS + codes[1:]])
        one_hot = nn.functional.one_hot(codes, SYMBOLS + NOISE)
        return one_hot.to(torch.get_default_dtype()), first

    def batches(self, length, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(length, BATCH, generator)


def loss_of(model, x, first):
    return nn.functional.cross_entropy(model(x), first)


def begin(kind, args, length=None):
    """A new model whose initial weights depend on the seed alone."""
    torch.manual_seed(args.seed)
    return Copier(kind, args.backend, length)


def norms(model, x):
    """Norms (T,) of d loss / d h_t, mean over the batch; the loss is the sum of the last output."""
    flow = lstm_fused.gradient_flow(model.layer, x)
    return flow[:, 0].norm(dim=-1).mean(dim=1)


def run(args, report):
    sequences = Sequences(args.data)
    lengths = QUICK_LENGTHS if args.quick else LENGTHS
    generator = torch.Generator().manual_seed(args.seed + 1)
    tests = {length: sequences.draw(length, TESTED, generator) for length in lengths}
    models, found, losses, rows = {}, {}, [], []
    for length, kind in itertools.product(lengths, KINDS):
        model = begin(kind, args, length)
        batches = sequences.batches(length, args.seed)
        what = f"{kind.upper()} over {length} steps"
        training = common.train(model, batches, loss_of, args.steps, report, lr=1e-2, what=what)
        x, first = tests[length]
        with torch.no_grad():
            scores = model(x)
        accuracy = (scores.argmax(1) == first).double().mean().item()
        count = sum(p.numel() for p in model.layer.parameters())
        times = 1e3 * training.seconds / args.steps
        rows.append([kind.upper(), length, accuracy, training.last, count, times])
        losses += training.losses
        models[kind, length], found[kind, length] = model, (accuracy, scores, count, times)
    tabulate(report, rows, found, lengths)
    drawn = sequences.draw(DISTANCE, 8, generator)[0]
    flows = gradients(args, models, lengths[-1], drawn)
    tabulate_flows(report, flows)
    plot_flows(report, flows, lengths[-1])
    resets, by_row = gradients_with_resets(args, lengths[-1], drawn[:RESET_STEPS])
    plot_resets(report, resets, by_row)
    plot_accuracy(report, found, lengths)
    short = sequences.draw(lengths[0], 16, generator)
    return {
        "losses": losses,
        "accuracy": {at: accuracy for at, (accuracy, *_) in found.items()},
        "parameters": {kind: found[kind, lengths[0]][2] for kind in KINDS},
        "flows": flows,
        "resets": (resets, by_row),
        "outputs": torch.cat([scores for _, scores, *_ in found.values()]),
        "problem": (models["lstm", lengths[0]], loss_of, short),
    }


def gradients(args, models, length, x):
    """The norms over all steps of x, by initialisation and kind of layer."""
    flows = {}
    for kind in KINDS:
        flows[STARTS[0], kind] = norms(begin(kind, args), x)
        flows[STARTS[1], kind] = norms(begin(kind, args, length), x)
        flows[STARTS[2], kind] = norms(models[kind, length], x)
    return flows


def gradients_with_resets(args, length, x):
    """Resets (T, N), and norms (T, N) without and with them, of an LSTM whose gates are set."""
    module = begin("lstm", args, length).layer
    resets = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(args.seed)) < RESETS
    found = {}
    for name, mask in (("no resets", None), ("resets", resets)):
        found[name] = lstm_fused.gradient_flow(module, x, resets=mask)[:, 0].norm(dim=-1)
    return resets, found


def tabulate(report, rows, found, lengths):
    columns = ["layer", "T", "accuracy", "loss", "parameters", "ms per training step"]
    title = f"Copying the first symbol after T steps; by chance {1 / SYMBOLS:.2f}"
    report.table("copying", columns, rows, title)
    rows = []
    for kind in KINDS:
        learnt = [length for length in lengths if found[kind, length][0] > 0.95]
        _, _, count, times = found[kind, lengths[-1]]
        _, _, least, fastest = found["rnn", lengths[-1]]
        rows.append([kind.upper(), max(learnt, default="none"), count / least, times / fastest])
    columns = ["layer", "longest T learnt", "parameters over RNN", "time over RNN"]
    report.table("memory", columns, rows, "Learnt: accuracy above 0.95")


def tabulate_flows(report, flows):
    """The gradient some steps back, relative to that of the last step."""
    back = [10, 20, 100, DISTANCE - 1]
    rows = [
        [f"{kind.upper()}, {start}", *(f"{norm[-1 - k] / norm[-1]:.1e}" for k in back)]
        for (start, kind), norm in flows.items()
    ]
    columns = ["layer", *(f"{k} back" for k in back)]
    report.table("gradients", columns, rows, "Norm of d loss / d h_t over that of the last step")


def plot_flows(report, flows, length):
    title = "How much of the loss reaches back: norm of d loss / d h_t"
    with report.plot("gradients", title, 1, len(STARTS), sharey=True, figsize=(7, 3)) as axes:
        if axes is None:
            return
        titles = (STARTS[0], f"{STARTS[1]} for {length} steps", f"{STARTS[2]} over {length} steps")
        for axis, start, title in zip(axes, STARTS, titles, strict=True):
            for kind in KINDS:
                norm = flows[start, kind].flip(0)
                # The smallest positive float32 is near 1e-45; a logarithmic axis cannot show 0.
                axis.loglog(range(1, len(norm) + 1), norm.clamp_min(1e-45), label=kind.upper())
            axis.set(title=title, xlabel="steps from the end", ylim=(1e-12, None))
        axes[0].set_ylabel("norm of the gradient")
        axes[0].legend(loc="lower left")


def plot_resets(report, resets, by_row):
    title = "Resets end the gradient: norm of d loss / d h_t, the loss being of the last step"
    with report.plot("resets", title, 1, 2, sharey=True, figsize=(7, 2.6)) as axes:
        if axes is None:
            return
        for axis, (name, norm) in zip(axes, by_row.items(), strict=True):
            # No gradient at all is NaN, which is left white.
            image = torch.where(norm > 0, norm, torch.nan).log10().t()
            drawn = axis.imshow(
                image.numpy(), aspect="auto", vmin=-4, vmax=1, interpolation="nearest"
            )
            axis.set(title=name, xlabel="step")
        steps, rows = resets.nonzero(as_tuple=True)
        axes[1].scatter(steps, rows, marker="|", color="tab:red", s=120)
        axes[1].set_title("resets, in red")
        axes[0].set_ylabel("row of the batch")
        axes[1].figure.colorbar(drawn, ax=list(axes), label="log10 of the norm")


def plot_accuracy(report, found, lengths):
    title = "Copying the first symbol of a sequence, after training"
    with report.plot("accuracy", title, figsize=(6, 3.2)) as axis:
        if axis is None:
            return
        # Broader lines first: equal curves stay visible.
        for width, kind in zip((5, 3, 1.5), KINDS, strict=True):
            accuracy = [found[kind, length][0] for length in lengths]
            axis.semilogx(lengths, accuracy, "o-", label=kind.upper(), linewidth=width)
        axis.axhline(1 / SYMBOLS, color="gray", linestyle=":", label="chance")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.set(xlabel="steps to remember", ylabel="share copied correctly", ylim=(0, 1.05))
        axis.legend()


EXAMPLE = common.Example(
    "gradients", __doc__, run, steps=600, quick=300,
    data=f"text of more than {DISTANCE} characters to use as noise (default: random symbols)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
