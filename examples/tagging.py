"""N to N: one label for every step, with one direction and with two.

The model reads Python source character by character and labels each character: keyword, name, call,
number, string, comment, operator or space. The true labels come from Python's tokenizer.

Whether "i" begins "import" or "index", and whether a name is called, depends on the characters
after it. A bidirectional LSTM reads them; a unidirectional one can only guess. Both have about the
same number of parameters and the same training. `--bidirectional` or `--no-bidirectional` trains
only one.
"""

import argparse
import collections
import io
import keyword
import sys
import sysconfig
import tokenize
from pathlib import Path

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, layer

EMBEDDING, LENGTH, BATCH = 24, 96, 32
HIDDEN = {"one direction": 96, "both directions": 64}
TAGS = ["space", "keyword", "name", "call", "number", "string", "comment", "operator"]
MAX_CHARACTERS = 300_000
SHOWN = 60  # characters of a line in the plot
COLORS = ["0.97", "#b197fc", "#ffec99", "#74c0fc", "#ffa94d", "#8ce99a", "#ced4da", "#ff8787"]


class Tagger(nn.Module):
    """Characters (N, T) -> scores (N, T, tags)."""

    def __init__(self, characters, kind, backend, directions):
        super().__init__()
        both = directions == "both directions"
        size = HIDDEN[directions]
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.layer = layer(kind, backend)(EMBEDDING, size, batch_first=True, bidirectional=both)
        self.head = nn.Linear(2 * size if both else size, len(TAGS))

    def forward(self, characters):
        y, _ = self.layer(self.embedding(characters))
        return self.head(y)


def tags_of(source):
    """A tag for every character of a Python source.

    Raises:
        SyntaxError, tokenize.TokenError: it is not Python source.
    """
    starts = [0]
    for line in io.StringIO(source):  # as the tokenizer splits them: a form feed ends no line
        starts.append(starts[-1] + len(line))
    tags = [0] * len(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        tag = tag_of(token, after)
        if tag:
            begin, end = (starts[line - 1] + column for line, column in (token.start, token.end))
            tags[begin:end] = [TAGS.index(tag)] * (end - begin)
    return tags


def tag_of(token, after):
    """The tag of a token, or None for one without characters, such as an indent."""
    kind = tokenize.tok_name[token.type]
    if kind == "NAME":
        if keyword.iskeyword(token.string):
            return "keyword"
        return "call" if after is not None and after.string == "(" else "name"
    if kind.startswith(("FSTRING", "TSTRING")):  # parts of f"..." since Python 3.12
        return "string"
    return {"NUMBER": "number", "STRING": "string", "COMMENT": "comment", "OP": "operator"}.get(
        kind
    )


def load(path):
    """Characters and their tags, from a Python file or folder (default: the stdlib)."""
    path = path or Path(sysconfig.get_path("stdlib"))
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    text, tags = [], []
    for file in files:
        try:
            source = file.read_text(encoding="utf-8")
            found = tags_of(source)
        except (OSError, UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue
        text += source
        tags += found
        if len(text) >= MAX_CHARACTERS:
            break
    if len(text) < 20 * LENGTH:
        raise common.DataError(f"{path} holds {len(text)} characters of Python, too few")
    return text[:MAX_CHARACTERS], tags[:MAX_CHARACTERS]


def windows_of(codes):
    """Codes (S,) -> windows (S // LENGTH, LENGTH)."""
    return codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)


def loss_of(model, characters, tags):
    return nn.functional.cross_entropy(model(characters).flatten(0, 1), tags.flatten())


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="lstm")
    parser.add_argument(
        "--bidirectional",
        action=argparse.BooleanOptionalAction,
        help="train only this one (default: both)",
    )


def run(args, report):
    text, tags = load(args.data)
    kinds = [character for character, _ in collections.Counter(text).most_common(127)]
    code = {character: k for k, character in enumerate(kinds)}
    characters = windows_of(torch.tensor([code.get(c, len(kinds)) for c in text]))
    tags = windows_of(torch.tensor(tags))
    is_test = torch.arange(len(tags)) % 10 == 9
    learn, test = (characters[~is_test], tags[~is_test]), (characters[is_test], tags[is_test])
    wanted = list(HIDDEN)
    if args.bidirectional is not None:
        wanted = wanted[args.bidirectional : args.bidirectional + 1]
    found = {"losses": [], "accuracy": {}, "by tag": {}}
    guesses = {}
    for directions in wanted:
        torch.manual_seed(args.seed)
        model = Tagger(len(kinds) + 1, args.layer, args.backend, directions)
        batches = common.minibatches(learn, BATCH, args.seed)
        training = common.train(model, batches, loss_of, args.steps, report, 5e-3, directions)
        with torch.no_grad():
            scores = model(test[0])
        guesses[directions] = scores.argmax(2)
        right = guesses[directions] == test[1]
        found["losses"] += training.losses
        found["accuracy"][directions] = right.double().mean().item()
        found["by tag"][directions] = [
            right[test[1] == k].double().mean().item() for k in range(len(TAGS))
        ]
        found["outputs"] = scores
        found["problem"] = (model, loss_of, tuple(t[:8] for t in learn))
    rows = [[tag, *(found["by tag"][d][k] for d in wanted)] for k, tag in enumerate(TAGS)]
    rows.append(["all", *found["accuracy"].values()])
    report.table("accuracy", ["characters of", *wanted], rows, "on held-out source")
    plot_source(report, kinds, test, guesses)
    return found


def plot_source(report, kinds, test, guesses, rows=2):
    """A few windows, each character in the colour of its tag: the truth, then the predictions."""
    shown = {"truth": test[1]} | guesses
    title = "The tag of each character of held-out source"
    with report.plot("source", title, rows, figsize=(7, 0.45 * rows * (len(shown) + 1))) as axes:
        if axes is None:
            return
        kinds_of_tags = [-len(set(tags[:SHOWN].tolist())) for tags in test[1]]
        chosen = sorted(range(len(test[1])), key=kinds_of_tags.__getitem__)  # the most varied
        for axis, k in zip(axes, chosen[:rows], strict=True):
            for line, (name, tags) in enumerate(shown.items()):
                axis.text(-1, line, name, ha="right", va="center")
                tags = tags[k, :SHOWN].tolist()
                axis.bar(range(len(tags)), 0.7, 1, line - 0.35, color=[COLORS[t] for t in tags])
                for place in range(len(tags)):
                    character = test[0][k, place].item()
                    letter = kinds[character] if character < len(kinds) else common.UNKNOWN
                    letter = {"\n": "↵", "$": r"\$"}.get(letter, letter)
                    axis.text(place, line, letter, family="monospace", ha="center", va="center")
            axis.set(xlim=(-13, SHOWN), ylim=(len(shown) - 0.5, -0.5))
            axis.axis("off")
        keys = [axis.bar(0, 0, color=color) for color in COLORS]
        axis.figure.legend(keys, TAGS, loc="outside lower center", ncols=len(TAGS) // 2)


EXAMPLE = common.Example(
    "tagging", __doc__, run, steps=600, quick=100, options=options,
    data="a file or folder of Python source (default: Python's standard library)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
