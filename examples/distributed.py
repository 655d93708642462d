"""Distributed training: a character model trained by several processes that share gradients.

    torchrun --standalone --nproc_per_node=2 -m examples.distributed --quick

Each process takes its rows of the batch, and DistributedDataParallel averages the gradients (gloo
on the CPU, nccl on GPUs). Every process therefore makes the step that a single process would make
on the joint batch. Without torchrun the example is that single process. A checkpoint after half of
the steps holds the complete training state: `--resume` continues from it to a bit-identical model.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples import common
from examples.char_lm import DataError, read_text
from examples.layers import layer

BATCH, LENGTH = 16, 32  # of the joint batch
HIDDEN, EMBEDDING = 64, 16


class CharModel(nn.Module):
    """codes (T, N) -> scores (T, N, vocabulary)."""

    def __init__(self, vocabulary, backend):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = layer("lstm", backend)(EMBEDDING, HIDDEN)
        self.head = nn.Linear(HIDDEN, vocabulary)

    def forward(self, codes):
        return self.head(self.lstm(self.embedding(codes))[0])


def encode(text):
    """The text as codes (characters,), and the number of distinct characters."""
    vocabulary = sorted(set(text))
    numbers = {character: k for k, character in enumerate(vocabulary)}
    return torch.tensor([numbers[character] for character in text]), len(vocabulary)


def joint_batch(codes, step, seed):
    """(LENGTH + 1, BATCH) of a step, the same in every process and for any number of them."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    begins = torch.randint(len(codes) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([codes[b : b + LENGTH + 1] for b in begins.tolist()], 1)


def world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def loss_of(model, batch):
    scores = model(batch[:-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), batch[1:].flatten())


def checkpoint(path, model, optimizer, step):
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path
    )


def run(args, report):
    rank, processes = world()
    if BATCH % processes:
        raise common.DataError(f"{BATCH} rows cannot be divided evenly among {processes} processes")
    try:
        codes, vocabulary = encode(read_text(args.data)[:200_000])
    except DataError as error:
        raise common.DataError(str(error)) from None
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return train(args, report, codes, vocabulary, device)
    finally:
        if processes > 1:
            dist.destroy_process_group()


def train(args, report, codes, vocabulary, device):
    rank, processes = world()
    model = CharModel(vocabulary, args.backend).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first, path = 0, args.out / "checkpoint.pt"
    if args.resume:
        saved = torch.load(args.resume, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    trained = DistributedDataParallel(model) if processes > 1 else model
    own = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    losses = []
    for step in range(first, args.steps):
        if step == args.steps // 2 and rank == 0 and not args.resume:
            checkpoint(path, model, optimizer, step)
        loss = loss_of(trained, joint_batch(codes, step, args.seed)[:, own].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    if rank == 0:
        torch.save(model.state_dict(), args.out / "model.pt")
        rows = [[first + k, loss] for k, loss in enumerate(losses)]
        kept = rows[:: max(1, len(rows) // 10)]
        report.table("loss", ["step", "loss"], kept, f"{processes} process(es)")
        title = f"Training a character model in {processes} process{'es' * (processes > 1)}"
        with report.plot("loss", title, figsize=(6, 3.2)) as axes:
            if axes is not None:
                axes.plot(*zip(*rows, strict=True))
                axes.set(xlabel="training step", ylabel="loss, nats a character")
    batch = joint_batch(codes, 0, args.seed)
    return {"losses": losses, "outputs": model(batch[:-1].to(device)).detach().cpu(),
            "problem": (model, loss_of, (batch,))}  # fmt: skip


def options(parser):
    parser.add_argument("--resume", type=Path, help="a checkpoint to continue from")


EXAMPLE = common.Example(
    "distributed", __doc__, run, steps=400, quick=60, options=options,
    data="a text file, or a folder of them (default: the standard library's source)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
