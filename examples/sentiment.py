"""Sentiment: a review read word by word, then the probabilities of two classes.

    Embedding -> LSTM(batch_first) -> dropout -> Linear -> softmax

Reviews have different lengths, so a batch of them is packed: the linear layer gets each review's
state after its own last word.

Only the softmax is a probability distribution. An LSTM's output gate is also between 0 and 1, but
it has one value per hidden unit, and their sum is arbitrary: it scales how much of the cell state
enters h.
"""

import re
import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from examples import common
from examples.layers import layer

EMBEDDING, HIDDEN = 32, 32
MAX_WORDS = 400  # of a review
MIN_COUNT = 2  # a word seen less often is unknown
LABELS = ["neg", "pos"]


class Classifier(nn.Module):
    """Words (N, T) and lengths (N,) -> scores (N, 2); their softmax is the probabilities."""

    def __init__(self, vocabulary, backend):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = layer("lstm", backend)(EMBEDDING, HIDDEN, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(HIDDEN, len(LABELS))

    def forward(self, words, lengths):
        embedded = self.dropout(self.embedding(words))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)
        return self.linear(self.dropout(h_n[-1]))

    def probabilities(self, words, lengths):
        return torch.softmax(self(words, lengths), dim=1)


def words_of(text):
    return re.findall(r"[\w']+|[!?]", text.lower())[:MAX_WORDS]


def load(path):
    """(text, label) of a folder with pos/ and neg/, of a CSV file, or of the included reviews."""
    if path is None or not path.is_dir():
        pairs = common.read_pairs(path or common.BUILT_IN / "reviews.csv")
    else:
        files = [(file, label) for label in LABELS for file in sorted((path / label).glob("*.txt"))]
        pairs = [(file.read_text(encoding="utf-8", errors="replace"), x) for file, x in files]
    pairs = [(text, label) for text, label in pairs if words_of(text)]
    if {label for _, label in pairs} != set(LABELS):
        raise common.DataError(f"{path} has no reviews labelled pos and neg")
    return pairs


class Vocabulary:
    """Words as indices; 0 is padding, 1 any unknown word."""

    def __init__(self, texts):
        counts = {}
        for text in texts:
            for word in words_of(text):
                counts[word] = counts.get(word, 0) + 1
        known = sorted(word for word, count in counts.items() if count >= MIN_COUNT)
        self.code = {word: k for k, word in enumerate(known, start=2)}

    def __len__(self):
        return len(self.code) + 2

    def batch(self, texts):
        """Padded words (N, T) and lengths (N,)."""
        rows = [torch.tensor([self.code.get(w, 1) for w in words_of(text)]) for text in texts]
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def loss_of(model, words, lengths, labels):
    longest = int(lengths.max())
    return nn.functional.cross_entropy(model(words[:, :longest], lengths), labels)


def tensors_of(vocabulary, pairs):
    labels = torch.tensor([LABELS.index(label) for _, label in pairs])
    return (*vocabulary.batch([text for text, _ in pairs]), labels)


@torch.no_grad()
def accuracy_of(model, reviews):
    """The accuracy on reviews, and the probabilities (N, 2)."""
    parts = [t.split(256) for t in reviews]
    probabilities = torch.cat([model.probabilities(*each[:2]) for each in zip(*parts, strict=True)])
    return (probabilities.argmax(1) == reviews[2]).double().mean().item(), probabilities


@torch.no_grad()
def output_gate(model, words):
    """Output gate and hidden state (H,) after the last word of (T,), from the LSTM equations."""
    lstm = model.lstm
    x = model.embedding(words)
    if len(words) > 1:
        _, (h, c) = lstm(x[:-1])
    else:
        h = c = x.new_zeros(1, HIDDEN)
    preacts = x[-1] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
    i, f, g, o = (preacts + h[0] @ lstm.weight_hh_l0.T + lstm.bias_hh_l0).chunk(4)
    c = torch.sigmoid(f) * c[0] + torch.sigmoid(i) * torch.tanh(g)
    gate = torch.sigmoid(o)
    h = gate * torch.tanh(c)
    torch.testing.assert_close(h, lstm(x)[1][0][0])  # the layer's own result
    return gate, h


@torch.no_grad()
def show_gate(report, model, vocabulary, text):
    words, lengths = vocabulary.batch([text])
    gate, hidden = output_gate(model, words[0])
    probabilities = model.probabilities(words, lengths)[0]
    kinds = {"output gate": gate, "hidden state": hidden, "softmax": probabilities}
    rows = [
        [name, str(tuple(t.shape)), *(f(t).item() for f in (torch.min, torch.max, torch.sum))]
        for name, t in kinds.items()
    ]
    columns = ["", "shape", "smallest", "largest", "sum"]
    report.table("gate", columns, rows, f"Only one is a probability: {text!r}")
    return kinds


@torch.no_grad()
def plot_reading(report, model, vocabulary, texts):
    """The probability of "pos" after each word of some reviews."""
    title = "What the classifier thinks of a review after each word of it"
    with report.plot("reading", title, len(texts), figsize=(7, 1.7 * len(texts))) as axes:
        if axes is None:
            return
        for axis, text in zip(axes if len(texts) > 1 else [axes], texts, strict=True):
            words = words_of(text)[:20]
            parts = [" ".join(words[: k + 1]) for k in range(len(words))]
            axis.bar(
                range(len(words)), model.probabilities(*vocabulary.batch(parts))[:, 1].tolist()
            )
            axis.axhline(0.5, color="black", linewidth=0.5)
            axis.set_xticks(range(len(words)), words, rotation=30)
            axis.set(ylim=(0, 1), ylabel='probability\nof "pos"')
        axis.set_xlabel("the words, in the order they are read")


def run(args, report):
    learn, test = common.held_out(load(args.data), 0.2, args.seed)
    vocabulary = Vocabulary([text for text, _ in learn])
    report.say(f"{len(learn)} reviews to learn from, {len(test)} held out, {len(vocabulary)} words")
    model = Classifier(len(vocabulary), args.backend)
    given = tensors_of(vocabulary, learn)
    batches = common.minibatches(given, 32, args.seed)
    training = common.train(model, batches, loss_of, args.steps, report, lr=5e-3)
    learned, _ = accuracy_of(model, given)
    accuracy, probabilities = accuracy_of(model, tensors_of(vocabulary, test))
    rows = [["learned from", len(learn), learned], ["held out", len(test), accuracy]]
    report.table("accuracy", ["reviews", "count", "accuracy"], rows)
    kinds = show_gate(report, model, vocabulary, test[0][0])
    plot_reading(report, model, vocabulary, [text for text, _ in test[:4]])
    return {
        "losses": training.losses,
        "learned": learned,
        "accuracy": accuracy,
        "kinds": kinds,
        "outputs": probabilities,
        "problem": (model, loss_of, tuple(t[:16] for t in given)),
    }


EXAMPLE = common.Example(
    "sentiment", __doc__, run, steps=600, quick=250,
    data="a folder with pos/ and neg/, or a CSV text,label (default: the included 420 reviews)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
