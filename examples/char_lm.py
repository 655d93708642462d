"""A character language model, trained with nn.LSTM and with lstm_fused side by side.

An ordinary PyTorch model is built twice from one seed, and `lstm_fused.replace` swaps the LSTM in
one of the two. Before training, outputs and all gradients are compared. Then both are trained on
the same batches, a few steps of one and a few steps of the other, so that other load on the machine
affects both alike.

Training is truncated backpropagation through time: each row of a batch reads on where it stopped in
the batch before, from the state that it had there, detached.
"""

import argparse
import codecs
import copy
import itertools
import math
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import lstm_fused
from lstm_fused.testing import oracle, parity

BATCH, LENGTH = 16, 64
EMBEDDING = 64
BLOCK = 5  # consecutive steps of one model
TEMPERATURE = 0.7
GENERATED = 400  # characters
MAX_CHARACTERS = 4_000_000
MAX_VOCABULARY = 128
MIN_CHARACTERS = 1000
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
TORCH, FUSED = "nn.LSTM", "lstm_fused"


class DataError(Exception):
    """The text cannot be used; the message gives the reason in one line."""


class CharModel(nn.Module):
    """An ordinary PyTorch model: it does not refer to lstm_fused."""

    def __init__(self, vocabulary: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, hidden, num_layers=2)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, codes, state=None):
        """codes (T, N) -> logits (T, N, vocabulary), and the final state."""
        y, state = self.lstm(self.embedding(codes), state)
        return self.head(y), state


def decode(path: Path) -> str:
    """The text of a file, or the beginning of a long one."""
    limit = 4 * MAX_CHARACTERS
    try:
        with path.open("rb") as file:
            data = file.read(limit)
        # A truncated text may end within a character; a whole file may not.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < limit)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if "\0" in text:
        raise DataError(f"{path} is not text: it holds zero bytes")
    return text


def read_folder(files: list[Path]) -> str:
    """The text files, concatenated up to the limit."""
    parts, total = [], 0
    for path in files:
        try:
            parts.append(decode(path))
        except DataError:
            continue
        total += len(parts[-1])
        if total >= MAX_CHARACTERS:
            break
    return "\n".join(parts)


def read_text(data: Path | None) -> str:
    """The user's text, or the standard library's own source."""
    if data is None:
        data = Path(sysconfig.get_path("stdlib"))
        text = read_folder(sorted(data.glob("*.py")))
    elif data.is_dir():
        text = read_folder(sorted(p for p in data.rglob("*") if p.is_file()))
    else:
        text = decode(data)
    if len(text) < MIN_CHARACTERS:
        raise DataError(
            f"{data} holds {len(text)} characters of text, at least {MIN_CHARACTERS} are needed"
        )
    return text[:MAX_CHARACTERS]


class Corpus:
    """A text as indices into a vocabulary of its most frequent characters."""

    def __init__(self, text: str):
        counts = {}
        for character in text:
            counts[character] = counts.get(character, 0) + 1
        frequent = sorted(counts, key=counts.get, reverse=True)[: MAX_VOCABULARY - 1]
        self.vocabulary = [*sorted(frequent), UNKNOWN]
        code = {character: k for k, character in enumerate(self.vocabulary)}
        self.codes = torch.tensor([code.get(c, len(code) - 1) for c in text])

    def unigram_entropy(self) -> float:
        """Loss in nats per character of a prediction by character frequency alone."""
        p = torch.bincount(self.codes).double() / len(self.codes)
        return max(0.0, -(p * p.clamp_min(1e-300).log()).sum().item())

    def batches(self, generator: torch.Generator):
        """Inputs and targets, (T, N) each: rows from random positions, each read on and on."""
        starts = torch.randint(len(self.codes), (BATCH,), generator=generator)
        for step in itertools.count():
            rows = starts + step * LENGTH + torch.arange(LENGTH + 1)[:, None]
            window = self.codes[rows % len(self.codes)]
            yield window[:-1], window[1:]


def loss_of(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def results(model, inputs, targets) -> dict[str, torch.Tensor]:
    """The results of one training step: logits, final states and all gradients."""
    model.zero_grad()
    logits, (h_n, c_n) = model(inputs)
    loss_of(logits, targets).backward()
    found = {"logits": logits, "h_n": h_n, "c_n": c_n}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def check_agreement(original, fused, batch, console: Console) -> bool:
    """Compare both with the original in float64; our error may be at most twice nn.LSTM's."""
    baseline, found = results(original, *batch), results(fused, *batch)
    exact = results(oracle.in_float64(original), *batch)
    verdicts = parity.compare(found, baseline, exact, parity.model_row)
    table = Table(title="Before training, one batch: largest errors against float64")
    table.add_column("", no_wrap=True)
    for name in (TORCH, FUSED, "allowed", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for v in verdicts:
        difference = parity.max_error(found[v.tensor], baseline[v.tensor].double())
        numbers = (v.baseline_error, v.error, v.allowed, difference)
        table.add_row(v.tensor, *(f"{x:.1e}" for x in numbers), style=None if v.ok else "red")
    console.print(table)
    wrong = [v.tensor for v in verdicts if not v.ok]
    if wrong:
        console.print(f"They do not agree: {', '.join(wrong)}.", style="red")
    else:
        console.print("Agreement: outputs, final states and every gradient.\n")
    return not wrong


class Trainee:
    """A model in training, with the loss and the time of each step."""

    def __init__(self, model: CharModel, corpus: Corpus, seed: int):
        self.model = model
        self.vocabulary = corpus.vocabulary
        self.batches = corpus.batches(torch.Generator().manual_seed(seed))
        self.state = None
        self.optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        self.losses = []
        self.seconds = []

    def step(self):
        inputs, targets = next(self.batches)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        logits, state = self.model(inputs, self.state)
        self.state = lstm_fused.detach_state(state)
        loss = loss_of(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())


def train(trainees: dict[str, Trainee], steps: int, limit: float, console: Console) -> None:
    """Train the models in alternating blocks of steps, for up to `limit` seconds."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps  {task.fields[losses]}  left"),
        TimeRemainingColumn(),
    )
    end = time.monotonic() + limit
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=steps * len(trainees), losses="")
        for begin in range(0, steps, BLOCK):
            for trainee in trainees.values():
                for _ in range(min(BLOCK, steps - begin)):
                    trainee.step()
                    progress.advance(bar)
            losses = ", ".join(f"{name} {t.losses[-1]:.2f}" for name, t in trainees.items())
            progress.update(bar, losses=losses)
            if time.monotonic() > end:
                break
    done = len(trainees[TORCH].losses)
    if done < steps:
        console.print(f"Stopped after {done} steps: the limit is {limit:g} s (--limit).\n")


def print_losses(trainees: dict[str, Trainee], entropy: float, console: Console) -> None:
    """The mean loss of each tenth of the run, as a number and as a bar."""
    steps = len(trainees[TORCH].losses)
    edges = sorted({round(steps * k / 10) for k in range(11)})
    table = Table(title=f"Loss, nats per character; by letter frequency alone {entropy:.2f}")
    table.add_column("steps", justify="right")
    for name in trainees:
        table.add_column(name, justify="right")
        table.add_column("", min_width=20)
    for begin, end in itertools.pairwise(edges):
        cells = [f"{begin + 1}-{end}"]
        for trainee in trainees.values():
            mean = statistics.fmean(trainee.losses[begin:end])
            width = round(20 * min(mean / max(entropy, 1e-9), 1)) if math.isfinite(mean) else 0
            cells += [f"{mean:.3f}", "█" * width]
        table.add_row(*cells)
    console.print(table)


class Writer:
    """Samples text one character at a time with the state carried on, and times each step."""

    def __init__(self, model: CharModel, vocabulary: list[str], prompt: str, seed: int):
        self.model = model
        self.vocabulary = vocabulary
        self.generator = torch.Generator().manual_seed(seed)
        self.text = prompt
        self.seconds = []
        codes = [vocabulary.index(c if c in vocabulary else UNKNOWN) for c in prompt]
        self.logits, self.state = model(torch.tensor(codes)[:, None])

    def step(self):
        probabilities = torch.softmax(self.logits[-1, 0] / TEMPERATURE, dim=0)
        code = torch.multinomial(probabilities, 1, generator=self.generator)
        self.text += self.vocabulary[code.item()]
        begin = time.perf_counter()
        self.logits, self.state = self.model(code[:, None], self.state)
        self.seconds.append(time.perf_counter() - begin)


@torch.no_grad()
def write(trainees: dict[str, Trainee], prompt: str, length: int, seed: int) -> dict[str, Writer]:
    """Text of each model, sampled in alternating blocks as in training."""
    writers = {
        name: Writer(trainee.model, trainee.vocabulary, prompt, seed)
        for name, trainee in trainees.items()
    }
    for _ in range(0, length, BLOCK):
        for writer in writers.values():
            for _ in range(BLOCK):
                writer.step()
    return writers


def print_speeds(trainees: dict, writers: dict, console: Console) -> None:
    """Median times of whole steps: embedding, LSTM, linear layer, loss and optimizer."""
    table = Table(title="Median time of a whole step")
    table.add_column("")
    for name in (TORCH, FUSED, "speedup"):
        table.add_column(name, justify="right")
    kinds = {f"training, T={LENGTH} N={BATCH}": trainees, "generating, T=1 N=1": writers}
    for what, timed in kinds.items():
        slow, fast = (statistics.median(timed[name].seconds) for name in (TORCH, FUSED))
        table.add_row(what, f"{slow * 1e3:.3g} ms", f"{fast * 1e3:.3g} ms", f"{slow / fast:.2f}x")
    console.print(table)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m examples.char_lm", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="a file or folder of text (default: Python's standard library)"
    )
    parser.add_argument(
        "--steps", type=int, default=400, help="training steps of each model (default: 400)"
    )
    parser.add_argument(
        "--limit", type=float, default=75, help="seconds after which training ends (default: 75)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the LSTM")
    parser.add_argument("--threads", type=int, help="threads (default: torch's choice)")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    args = parser.parse_args(argv)
    for name in ("steps", "hidden", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def run(args, console: Console) -> int:
    text = read_text(args.data)
    corpus = Corpus(text)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    original = CharModel(len(corpus.vocabulary), args.hidden).to(args.device)
    fused = lstm_fused.replace(copy.deepcopy(original))
    console.print(
        f"{len(text):,} characters, {len(corpus.vocabulary)} kinds; "
        f"2-layer LSTM of {args.hidden}; {torch.get_num_threads()} threads\n"
    )
    batch = next(corpus.batches(torch.Generator().manual_seed(args.seed + 1)))
    if not check_agreement(original, fused, batch, console):
        return 1
    trainees = {
        TORCH: Trainee(original, corpus, args.seed),
        FUSED: Trainee(fused, corpus, args.seed),
    }
    train(trainees, args.steps, args.limit, console)
    print_losses(trainees, corpus.unigram_entropy(), console)
    writers = write(trainees, "def " if args.data is None else text[:8], GENERATED, args.seed)
    console.print(f"\nWritten by the model trained with {FUSED}:")
    console.print(writers[FUSED].text, markup=False, highlight=False, style="cyan")
    console.print()
    print_speeds(trainees, writers, console)
    console.print("\nWhat ran in training, by lstm_fused.explain:")
    console.print(str(lstm_fused.explain(fused, batch[0])), markup=False, highlight=False)
    return 0


def main(argv=None) -> int:
    args = parse(argv)
    try:
        return run(args, Console())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
