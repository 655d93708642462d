"""A classifier of names, one sequence at a time: RNN -> Linear -> LogSoftmax, and NLLLoss.

An RNN reads the letters of a name, starting from the zero state of `init_hidden`; the language is
predicted from its state after the last letter. There is no batching and no padding: one name is one
training step. The included data has eight languages with 45 family names each.
"""

import sys
import unicodedata

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, hidden_of, layer

HIDDEN = 64


class NameClassifier(nn.Module):
    """One-hot letters (T, 1, I) and a state -> log-probabilities (1, labels)."""

    def __init__(self, letters, labels, kind, backend):
        super().__init__()
        self.rnn = layer(kind, backend)(letters, HIDDEN)
        self.linear = nn.Linear(HIDDEN, labels)
        self.softmax = nn.LogSoftmax(dim=1)

    def init_hidden(self):
        """The initial state: h_0 (1, 1, H), or (h_0, c_0) for an LSTM."""
        h_0 = self.linear.weight.new_zeros(1, 1, HIDDEN)
        return (h_0, h_0) if self.rnn.mode == "LSTM" else h_0

    def forward(self, letters, state):
        _, state = self.rnn(letters, state)
        return self.softmax(self.linear(hidden_of(state)[-1]))


def spelling(name):
    """Lower case, accents as separate characters, with a marker at each end."""
    return "^" + unicodedata.normalize("NFD", name.lower()) + "$"


class Alphabet:
    """Letters as one-hot rows; the last column stands for unknown letters."""

    def __init__(self, names):
        self.letters = sorted({letter for name in names for letter in spelling(name)})
        self.code = {letter: k for k, letter in enumerate(self.letters)}

    def __len__(self):
        return len(self.letters) + 1

    def rows(self, name):
        """The name as one-hot rows (T, 1, I)."""
        codes = [self.code.get(letter, len(self.letters)) for letter in spelling(name)]
        return nn.functional.one_hot(torch.tensor(codes), len(self)).to(torch.get_default_dtype())[
            :, None
        ]


def loss_of(model, letters, label):
    return nn.functional.nll_loss(model(letters, model.init_hidden()), label)


def one_by_one(pairs, alphabet, labels, seed):
    """Endless pairs (letters, label); the names are shuffled anew each epoch."""
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
    def probabilities_of(name):
        return model(alphabet.rows(name), model.init_hidden())[0].exp()

    outputs = torch.stack([probabilities_of(name) for name, _ in test])
    truth = torch.tensor([labels.index(label) for _, label in test])
    accuracy = (outputs.argmax(1) == truth).double().mean().item()
    report.say(f"{len(test)} names held out: accuracy {accuracy:.2f}, by chance {1 / len(labels)}")
    rows = [[name, *best_guesses(probabilities_of(name), labels)] for name in args.name]
    report.table("guesses", ["name", "first", "second", "third"], rows)
    plot_confusion(report, outputs.argmax(1), truth, labels)
    return {
        "losses": training.losses,
        "last": training.last,
        "accuracy": accuracy,
        "outputs": outputs,
        "problem": (model, loss_of, next(batches)),
    }


def best_guesses(probabilities, labels):
    return [
        f"{labels[k]} {probabilities[k]:.2f}" for k in probabilities.argsort(descending=True)[:3]
    ]


def plot_confusion(report, guesses, truth, labels):
    counts = torch.zeros(len(labels), len(labels))
    for guess, label in zip(guesses, truth, strict=True):
        counts[label, guess] += 1
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    title = f"{len(truth)} held-out names: the true language and the guess"
    with report.plot("confusion", title, figsize=(5.5, 5)) as axis:
        if axis is not None:
            image = axis.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=1)
            axis.figure.colorbar(image, label="share of the true language's names", shrink=0.8)
            axis.set_xticks(range(len(labels)), labels, rotation=90)
            axis.set_yticks(range(len(labels)), labels)
            axis.set_xlabel("guessed")
            axis.set_ylabel("true")


EXAMPLE = common.Example(
    "names", __doc__, run, steps=4000, quick=2000, options=options,
    data="CSV text,label: names or words and their class (default: the included 360 names)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
