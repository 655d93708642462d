"""N to M: an encoder reads a whole sequence, then a decoder writes another one.

The decoder gets a context c, computed from the encoder's states h_1 .. h_N in one of four ways:

    h_N            c = h_N, the last state
    g(h_N)         c = tanh(W h_N)
    g(h_1..h_N)    c = tanh(W mean(h_1 .. h_N))
    attention      a c_t per step: the mean of h_1 .. h_N weighted by softmax_s(q_t . h_s), where
                   the query q_t comes from the decoder's state

The first three compress a sequence of any length into one vector. The task is to reverse real
words, which needs every letter of the input, so that accuracy by length shows the capacity of that
vector. Each form is trained from the same seed on the same words; the test words are not among
them. Words are written greedily, the best letter at each step, and by beam search, which keeps the
--beams best beginnings of a word and their decoder states.
"""

import random
import re
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import lstm_fused
from examples import common
from examples.layers import KINDS, hidden_of, layer

FORMS = ("h_N", "g(h_N)", "g(h_1..h_N)", "attention")
EMBEDDING, HIDDEN = 24, 64
SHORTEST, LONGEST = 2, 12  # letters
PAD, BEGIN, END = 0, 1, 2
SIZE = END + 1 + 26


class Translator(nn.Module):
    """Words (N, S), lengths (N,), decoder inputs (N, T) -> scores (N, T, SIZE)."""

    def __init__(self, form, kind, backend):
        super().__init__()
        self.form = form
        self.embedding = nn.Embedding(SIZE, EMBEDDING)
        self.encoder = layer(kind, backend)(EMBEDDING, HIDDEN, batch_first=True)
        self.g = nn.Linear(HIDDEN, HIDDEN) if form.startswith("g") else None
        self.query = nn.Linear(HIDDEN, HIDDEN) if form == "attention" else None
        self.decoder = layer(kind, backend)(EMBEDDING + HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, SIZE)

    def encode(self, words, lengths):
        """States (N, S, H), zero in the padding; a mask of real steps (N, S); c (N, H)."""
        packed = pack_padded_sequence(
            self.embedding(words), lengths, batch_first=True, enforce_sorted=False
        )
        y, state = self.encoder(packed)
        states, _ = pad_packed_sequence(y, batch_first=True, total_length=words.shape[1])
        c = hidden_of(state)[-1]
        if self.form == "g(h_1..h_N)":
            c = states.sum(1) / lengths[:, None]
        return states, words != PAD, c if self.g is None else torch.tanh(self.g(c))

    def start(self, c):
        """The decoder's initial state."""
        return (c[None], torch.zeros_like(c)[None]) if self.decoder.mode == "LSTM" else c[None]

    def decode(self, before, encoded, state):
        """Scores (N, T, SIZE), the final state, and the attention weights (N, T, S) or None."""
        states, real, c = encoded
        c = c[:, None].expand(-1, before.shape[1], -1)
        y, state = self.decoder(torch.cat([self.embedding(before), c], 2), state)
        weights = None
        if self.query is not None:
            match = self.query(y) @ states.mT
            weights = match.masked_fill(~real[:, None], -torch.inf).softmax(2)
            c = weights @ states
        return self.head(torch.cat([y, c], 2)), state, weights

    def forward(self, words, lengths, before):
        encoded = self.encode(words, lengths)
        return self.decode(before, encoded, self.start(encoded[2]))[0]

    @torch.no_grad()
    def write(self, words, lengths, steps):
        """Greedily decoded letters (N, steps), and the attention weights of each step."""
        encoded = self.encode(words, lengths)
        state, before = self.start(encoded[2]), torch.full((len(words), 1), BEGIN)
        letters, attended = [], []
        for _ in range(steps):
            scores, state, weights = self.decode(before, encoded, state)
            before = scores.argmax(2)
            letters.append(before)
            attended.append(weights)
        return torch.cat(letters, 1), attended

    @torch.no_grad()
    def search(self, words, lengths, steps, beams):
        """The letters (N, steps) of the likeliest of `beams` candidates a word (beam search).

        A candidate is a row of the decoder's batch, a word's candidates side by side. At each step
        the likeliest of all continued candidates take the rows, with the states they come from.
        """
        N = len(words)
        encoded = [t.repeat_interleave(beams, 0) for t in self.encode(words, lengths)]
        state, before = self.start(encoded[2]), torch.full((N * beams, 1), BEGIN)
        letters = before[:, :0]
        total = torch.full((N, beams), -torch.inf)
        total[:, 0] = 0  # the candidates are the same before the first letter
        first_row = torch.arange(N).unsqueeze(1) * beams
        stay = torch.full((SIZE,), -torch.inf)
        stay[END] = 0  # a finished candidate gets no likelier
        for _ in range(steps):
            scores, state, _ = self.decode(before, encoded, state)
            scores = scores[:, -1].log_softmax(1)
            scores = torch.where(before == END, stay, scores).unflatten(0, (N, beams))
            total, chosen = (total.unsqueeze(2) + scores).flatten(1).topk(beams)
            rows = (first_row + chosen // SIZE).flatten()
            before = (chosen % SIZE).reshape(-1, 1)
            state = lstm_fused.select_state(state, rows)
            letters = torch.cat((letters[rows], before), 1)
        return letters.unflatten(0, (N, beams))[:, 0]


def load(path):
    """The distinct words of SHORTEST to LONGEST letters in a text (default: Python's stdlib)."""
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    try:
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    except OSError as error:
        raise common.DataError(f"{path}: {error.strerror}") from None
    words = re.findall(rf"(?<![a-z])[a-z]{{{SHORTEST},{LONGEST}}}(?![a-z])", text.lower())
    words = sorted(set(words))
    if len(words) < 200:
        raise common.DataError(f"{path} has {len(words)} different words, 200 are needed")
    return words


def batch_of(words):
    """Words (N, S), lengths (N,), decoder inputs and targets (N, S + 1)."""
    codes = [torch.tensor([ord(letter) - ord("a") + END + 1 for letter in word]) for word in words]
    begin, end = torch.tensor([BEGIN]), torch.tensor([END])
    before = [torch.cat([begin, code.flip(0)]) for code in codes]
    wanted = [torch.cat([code.flip(0), end]) for code in codes]
    lengths = torch.tensor([len(code) for code in codes])
    padded = [pad_sequence(rows, batch_first=True) for rows in (codes, before, wanted)]
    return padded[0], lengths, *padded[1:]


def batches_of(words, size, seed):
    """Endless batches of words; the length is drawn first, so all lengths are equally frequent."""
    chance = random.Random(seed)
    by_length = {}
    for word in words:
        by_length.setdefault(len(word), []).append(word)
    lengths = sorted(by_length)
    while True:
        yield batch_of([chance.choice(by_length[chance.choice(lengths)]) for _ in range(size)])


def loss_of(model, words, lengths, before, wanted):
    scores = model(words, lengths, before)
    return nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=PAD)


def text_of(codes):
    """The text of the letters before END."""
    letters = []
    for code in codes.tolist():
        if code <= END:
            break
        letters.append(chr(code - END - 1 + ord("a")))
    return "".join(letters)


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="gru")
    parser.add_argument("--context", choices=FORMS, nargs="*", default=FORMS)
    parser.add_argument("--beams", type=int, default=4, help="candidates a word in beam search")


def run(args, report):
    learn, test = common.held_out(load(args.data), 0.2, args.seed)
    test = [word for k in range(LONGEST + 1) for word in [w for w in test if len(w) == k][:40]]
    report.say(f"{len(learn)} words to learn from, {len(test)} held-out words to test with")
    words, lengths, before, _ = batch_of(test)
    counts = lengths.tolist()
    found = {"losses": [], "accuracy": {}, "by length": {}, "beam search": {}}
    written = {}

    def right(texts):
        return torch.tensor([x == w[::-1] for x, w in zip(texts, test, strict=True)])

    for form in args.context:
        torch.manual_seed(args.seed)
        model = Translator(form, args.layer, args.backend)
        batches = batches_of(learn, 64, args.seed)
        training = common.train(model, batches, loss_of, args.steps, report, 5e-3, form)
        letters, attended = model.write(words, lengths, LONGEST + 1)
        written[form] = [text_of(row) for row in letters]
        greedy = right(written[form])
        found["losses"] += training.losses
        found["accuracy"][form] = greedy.double().mean().item()
        found["by length"][form] = {
            k: greedy[lengths == k].double().mean().item() for k in sorted(set(counts))
        }
        searched = model.search(words, lengths, LONGEST + 1, args.beams)
        found["beam search"][form] = right(map(text_of, searched)).double().mean().item()
        if form == "attention":
            plot_attention(report, test[-1], written[form][-1], attended)
        with torch.no_grad():
            found["outputs"] = model(words, lengths, before)
        found["problem"] = (model, loss_of, next(batches))
    rows = [[k, *(each[k] for each in found["by length"].values())] for k in sorted(set(counts))]
    report.table("accuracy", ["letters", *written], rows, "words reversed correctly, by length")
    rows = [
        ["greedy", *found["accuracy"].values()],
        ["beam search", *found["beam search"].values()],
    ]
    report.table("search", ["decoding", *written], rows, "words reversed correctly, all lengths")
    shown = range(0, len(test), max(1, len(test) // 6))
    rows = [[test[k], *(each[k] for each in written.values())] for k in shown]
    report.table("words", ["word", *written], rows)
    plot_accuracy(report, found["by length"])
    return found


def plot_accuracy(report, by_length):
    title = "Words reversed correctly, by what the decoder knows of the word"
    with report.plot("accuracy", title, figsize=(6, 3.4)) as axis:
        if axis is not None:
            for form, shares in by_length.items():
                axis.plot(list(shares), list(shares.values()), marker="o", label=form)
            axis.set_xlabel("length of the word, in letters")
            axis.set_ylabel("share of words")
            axis.set_ylim(0, 1.02)
            axis.legend()


def plot_attention(report, word, written, attended):
    """The attention weights: one row per written letter, one column per letter read."""
    shown = min(len(written) + 1, LONGEST + 1)
    title = f"Attention while {word!r} is reversed"
    with report.plot("attention", title, figsize=(5, 4.4)) as axis:
        if axis is not None:
            rows = [step[-1, 0, : len(word)].tolist() for step in attended[:shown]]
            image = axis.imshow(rows, cmap="Blues", vmin=0, vmax=1)
            axis.figure.colorbar(image, label="attention weight", shrink=0.8)
            axis.set_xticks(range(len(word)), list(word))
            axis.set_yticks(range(shown), [*written, "end"][:shown])
            axis.set_xlabel("letter read")
            axis.set_ylabel("letter written")


EXAMPLE = common.Example(
    "translate", __doc__, run, steps=2000, quick=250, options=options,
    data="a text to take the words from (default: Python's standard library)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
