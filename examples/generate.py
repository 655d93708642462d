"""1 to N: a sequence from one input, as in image captioning.

The input is a whole scanned digit; the output is its English and French name, letter by letter
("seven sept."). No letter is fed back: the layer's state alone encodes the position in the caption.

    fed once          the scan at step 1, zeros afterwards: the state has to remember the scan
    at every step     the scan at every step: the state has only to count

Both have the same parameters. The scans are the 1797 of scikit-learn's digits data set.
"""

import sys

import torch
from torch import nn

from examples import common, digits
from examples.layers import KINDS, layer

HIDDEN = 64
WAYS = ("fed once", "at every step")
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FRENCH = ["zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"]
CAPTIONS = [f"{english} {french}." for english, french in zip(ENGLISH, FRENCH, strict=True)]
STEPS = max(map(len, CAPTIONS))
LETTERS = sorted(set("".join(CAPTIONS)))


class Captioner(nn.Module):
    """scans (N, 8, 8) -> (N, STEPS, letters) scores."""

    def __init__(self, way, kind, backend):
        super().__init__()
        self.way = way
        self.layer = layer(kind, backend)(64, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, len(LETTERS))

    def forward(self, scans):
        x = scans.flatten(1)[:, None]
        if self.way == "fed once":
            x = torch.cat([x, x.new_zeros(len(x), STEPS - 1, 64)], 1)
        else:
            x = x.expand(-1, STEPS, -1)
        y, _ = self.layer(x)
        return self.head(y)


def codes_of(caption):
    """The caption as indices (STEPS,), padded with its last letter, the full stop."""
    return torch.tensor([LETTERS.index(letter) for letter in caption.ljust(STEPS, ".")])


def text_of(codes):
    """The letters before the full stop."""
    return "".join(LETTERS[code] for code in codes.tolist()).partition(".")[0]


def loss_of(model, scans, captions):
    return nn.functional.cross_entropy(model(scans).flatten(0, 1), captions.flatten())


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="lstm")
    parser.add_argument("--way", choices=WAYS, nargs="*", default=WAYS)


def run(args, report):
    scans, labels = digits.load(args.data)
    captions = torch.stack([codes_of(caption) for caption in CAPTIONS])[labels]
    learn, test = common.held_out(list(range(len(scans))), 0.25, args.seed)
    found = {"losses": [], "accuracy": {}, "by step": {}}
    written = {}
    for way in args.way:
        torch.manual_seed(args.seed)
        model = Captioner(way, args.layer, args.backend)
        batches = common.minibatches((scans[learn], captions[learn]), 64, args.seed)
        training = common.train(model, batches, loss_of, args.steps, report, 5e-3, way)
        with torch.no_grad():
            scores = model(scans[test])
        right = scores.argmax(2) == captions[test]
        written[way] = [text_of(row) for row in scores.argmax(2)]
        found["losses"] += training.losses
        found["accuracy"][way] = right.all(1).double().mean().item()
        found["by step"][way] = right.double().mean(0).tolist()
        found["outputs"] = scores
        found["problem"] = (model, loss_of, (scans[learn[:16]], captions[learn[:16]]))
    rows = [[f"letter {k + 1}", *(found["by step"][way][k] for way in args.way)]
            for k in range(STEPS)]  # fmt: skip
    rows.append(["all letters", *found["accuracy"].values()])
    columns = ["of a caption", *(f"scan {way}" for way in args.way)]
    report.table("accuracy", columns, rows, f"correct, of {len(test)} held-out scans")
    plot_captions(report, scans[test], written)
    return found


def plot_captions(report, scans, written, count=6):
    """Some scans and the captions generated for them."""
    title = "Captions written for held-out scans, by how the decoder is fed the scan"
    with report.plot("captions", title, 2, count // 2, figsize=(6, 5)) as axes:
        if axes is not None:
            for k, axis in enumerate(axes.flat):
                axis.axis("off")
                if k < len(scans):
                    axis.imshow(scans[k].tolist(), cmap="gray_r")
                    axis.set_title(
                        "\n".join(f"{way}: {texts[k]}" for way, texts in written.items())
                    )


EXAMPLE = common.Example(
    "generate", __doc__, run, steps=1500, quick=500, options=options,
    data="CSV of 64 pixels from 0 to 16 and a label in each line (default: scikit-learn's digits)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
