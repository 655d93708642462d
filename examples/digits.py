"""N to 1: a scanned digit read row by row, one class at the end.

A scan of 8x8 pixels is a sequence of 8 rows. The layer reads one row per step; the classifier gets
only the last hidden state.

    row 1   row 2         row 8
      |       |             |
     h_1 --> h_2 --> ... --> h_8 --> Linear --> ten scores

The scans are the 1797 of scikit-learn's digits data set.
"""

import sys

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, hidden_of, layer

HIDDEN = 64


class RowReader(nn.Module):
    """(N, 8, 8) pixels -> (N, 10) scores."""

    def __init__(self, kind, backend):
        super().__init__()
        self.rows = layer(kind, backend)(8, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, scans):
        _, state = self.rows(scans)
        return self.head(hidden_of(state)[-1])


def load(path):
    """Scans (S, 8, 8) from 0 to 1 and their labels (S,).

    Each line of a file holds 64 pixels from 0 to 16 and a label, as in UCI's optdigits.
    """
    if path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        scans, labels = torch.tensor(digits.data), torch.tensor(digits.target)
    else:
        numbers = common.read_numbers(path)
        if numbers.shape[1] != 65 or len(numbers) < 10:
            raise common.DataError(f"{path} does not hold ten lines of 64 pixels and a label")
        scans, labels = numbers[:, :64], numbers[:, 64].long()
        if not ((labels >= 0) & (labels < 10)).all():
            raise common.DataError(f"{path} has labels that are not from 0 to 9")
    return (scans / 16).view(-1, 8, 8).to(torch.get_default_dtype()), labels


def loss_of(model, scans, labels):
    return nn.functional.cross_entropy(model(scans), labels)


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="lstm")


def run(args, report):
    scans, labels = load(args.data)
    learn, test = common.held_out(list(range(len(scans))), 0.25, args.seed)
    model = RowReader(args.layer, args.backend)
    batches = common.minibatches((scans[learn], labels[learn]), 64, args.seed)
    training = common.train(model, batches, loss_of, args.steps, report)
    with torch.no_grad():
        scores = model(scans[test])
    right = scores.argmax(1) == labels[test]
    accuracy = right.double().mean().item()
    rows = []
    for digit in range(10):
        those = right[labels[test] == digit]
        rows.append([digit, len(those), those.double().mean().item()])
    report.table("accuracy", ["digit", "scans", "accuracy"], rows, "on scans held out")
    report.say(f"{len(test)} scans held out: accuracy {accuracy:.3f}, by chance 0.1")
    plot_mistakes(report, scans[test], labels[test], scores.argmax(1))
    return {
        "losses": training.losses,
        "accuracy": accuracy,
        "outputs": scores,
        "problem": (model, loss_of, (scans[learn[:16]], labels[learn[:16]])),
    }


def plot_mistakes(report, scans, labels, guesses):
    """Ten scans, misclassified ones first."""
    order = torch.argsort((labels == guesses).int(), stable=True)[:10].tolist()
    wrong = int((labels != guesses).sum())
    title = f"Held-out scans, misread ones first ({wrong} of {len(labels)} are misread)"
    with report.plot("scans", title, 2, 5, figsize=(6, 3)) as axes:
        if axes is not None:
            for axis, k in zip(axes.flat, order, strict=False):
                axis.imshow(scans[k].tolist(), cmap="gray_r")
                axis.set_title(f"a {labels[k]}, read as {guesses[k]}")
            for axis in axes.flat:
                axis.axis("off")


EXAMPLE = common.Example(
    "digits", __doc__, run, steps=1500, quick=500, options=options,
    data="CSV of 64 pixels from 0 to 16 and a label in each line (default: scikit-learn's digits)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
