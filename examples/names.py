"""A classifier of names, one sequence at a time: RNN -> Linear -> LogSoftmax, and NLLLoss.

The letters of a name go through an RNN that starts from `init_hidden`, a state of zeros; what it
holds after the last letter tells the language. No batches, no padding: one name is one step of
training. Eight languages with 45 family names each are shipped.
"""

import sys
import unicodedata

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, hidden_of, layer

HIDDEN = 64


class NameClassifier(nn.Module):
    """letters (T, 1, I), one-hot, and a state -> (1, labels) logarithms of probabilities."""

    def __init__(self, letters, labels, kind, backend):
        super().__init__()
        self.rnn = layer(kind, backend)(letters, HIDDEN)
        self.linear = nn.Linear(HIDDEN, labels)
        self.softmax = nn.LogSoftmax(dim=1)

    def init_hidden(self):
        """The state before the first letter: h_0 (1, 1, H), for an LSTM c_0 as well."""
        h_0 = self.linear.weight.new_zeros(1, 1, HIDDEN)
        return (h_0, h_0) if self.rnn.mode == "LSTM" else h_0

    def forward(self, letters, state):
        _, state = self.rnn(letters, state)
        return self.softmax(self.linear(hidden_of(state)[-1]))


def spelling(name):
    """Small letters, accents as letters of their own, and an end on both sides."""
    return "^" + unicodedata.normalize("NFD", name.lower()) + "$"


class Alphabet:
    """Letters as one-hot rows; the last column stands for every letter not known."""

    def __init__(self, names):
        self.letters = sorted({letter for name in names for letter in spelling(name)})
        self.code = {letter: k for k, letter in enumerate(self.letters)}

    def __len__(self):
        return len(self.letters) + 1

    def rows(self, name):
        """(T, 1, I)"""
        codes = [self.code.get(letter, len(self.letters)) for letter in spelling(name)]
        return nn.functional.one_hot(torch.tensor(codes), len(self)).to(torch.get_default_dtype())[
            :, None
        ]


def loss_of(model, letters, label):
    return nn.functional.nll_loss(model(letters, model.init_hidden()), label)


def one_by_one(pairs, alphabet, labels, seed):
    """Endless (letters, label), all names in a new order each time round."""
    given = [(alphabet.rows(name), torch.tensor([labels.index(x)])) for name, x in pairs]
    for (k,) in common.minibatches((torch.arange(len(given)),), 1, seed):
        yield given[k]


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="rnn")
    parser.add_argument("--name", nargs="*", default=["Schneider", "Rossini", "Yamamoto"])


def run(args, report):
    pairs = common.read_pairs(args.data or common.BUILT_IN / "names.csv")
    labels = sorted({label for _, label in pairs})
    learn, test = common.held_out(pairs, 0.2, args.seed)
    alphabet = Alphabet([name for name, _ in learn])
    model = NameClassifier(len(alphabet), len(labels), args.layer, args.backend)
    batches = one_by_one(learn, alphabet, labels, args.seed)
    training = common.train(model, batches, loss_of, args.steps, report, lr=2e-3)

    @torch.no_grad()
    def chances(name):
        return model(alphabet.rows(name), model.init_hidden())[0].exp()

    outputs = torch.stack([chances(name) for name, _ in test])
    truth = torch.tensor([labels.index(label) for _, label in test])
    accuracy = (outputs.argmax(1) == truth).double().mean().item()
    report.say(f"{len(test)} names held out: accuracy {accuracy:.2f}, by chance {1 / len(labels)}")
    rows = [[name, *sorted_guesses(chances(name), labels)] for name in args.name]
    report.table("guesses", ["name", "first", "second", "third"], rows)
    plot_confusion(report, outputs.argmax(1), truth, labels)
    return {
        "losses": training.losses,
        "last": training.last,
        "accuracy": accuracy,
        "outputs": outputs,
        "problem": (model, loss_of, next(batches)),
    }


def sorted_guesses(chances, labels):
    return [f"{labels[k]} {chances[k]:.2f}" for k in chances.argsort(descending=True)[:3]]


def plot_confusion(report, guesses, truth, labels):
    counts = torch.zeros(len(labels), len(labels))
    for guess, label in zip(guesses, truth, strict=True):
        counts[label, guess] += 1
    with report.plot("confusion", figsize=(5.5, 5)) as axis:
        if axis is not None:
            axis.imshow((counts / counts.sum(1, keepdim=True).clamp_min(1)).tolist(), cmap="Blues")
            axis.set_xticks(range(len(labels)), labels, rotation=90)
            axis.set_yticks(range(len(labels)), labels)
            axis.set_xlabel("guessed")
            axis.set_ylabel("true")


EXAMPLE = common.Example(
    "names", __doc__, run, steps=4000, quick=2000, options=options,
    data="CSV text,label: names or words and their class (default: 360 names shipped)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
