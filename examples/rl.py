"""Reinforcement learning: balance a pole whose speed is not shown, from rollouts of many episodes.

The cart-pole of Barto, Sutton and Anderson (Neuronlike adaptive elements that can solve difficult
learning control problems, 1983) without friction, with the constants of gymnasium's CartPole-v1.
The policy is shown the position of the cart and the angle of the pole, not how fast they change:
one observation is not enough, a recurrent layer has to compare it with those before.

    rollout of one cart:  x x x x x x|x x x x x x x x x|x x x x
                                      ^                 ^       episodes begin: resets

A rollout is a fixed number of steps of several carts, and episodes end and begin inside it. While
playing, the layer gets one step a call. To train, by proximal policy optimisation (Schulman and
others, 2017), it gets whole rollouts and the steps at which its state must be forgotten, as
`resets`. torch.nn's layers have no resets: with `--backend torch` they are called step by step.

A policy without memory is trained the same way, for comparison. `--sb3` trains the RecurrentPPO of
sb3-contrib, if that is installed, as it comes and after `lstm_fused.rl.replace`.
"""

import math
import sys
import time

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, layer
from lstm_fused import rl, select_state, where_state

HIDDEN = 64
CARTS, STEPS = 16, 128  # of a rollout
EPOCHS, ROWS = 4, 4  # passes over a rollout, carts of a minibatch
DISCOUNT, SMOOTHING = 0.98, 0.9  # gamma and lambda of the advantages
CLIP, ENTROPY = 0.2, 0.005
LONGEST = 500


class CartPoles:
    """Poles on carts: states (N, 4) of position, speed, angle and angular speed, SI units."""

    GRAVITY, CART, POLE, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    FAR, TILTED = 2.4, math.radians(12)

    def __init__(self, count, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.states = self._first(count)
        self.ages = torch.zeros(count)

    def _first(self, count):
        return torch.rand(count, 4, generator=self.generator) * 0.1 - 0.05

    @property
    def seen(self):
        """(N, 2): the position and the angle."""
        return self.states[:, ::2]

    def step(self, right):
        """Push to the right where right (N,) is True, else to the left, for one step.

        Returns (fallen, over): whether the pole fell or the cart left its track, and whether the
        episode ended for that or for its length. The next episode has then begun.
        """
        position, speed, angle, spin = self.states.unbind(1)
        sin, cos = angle.sin(), angle.cos()
        mass, moment = self.CART + self.POLE, self.POLE * self.HALF_LENGTH
        push = (torch.where(right, self.FORCE, -self.FORCE) + moment * spin * spin * sin) / mass
        inertia = self.HALF_LENGTH * (4 / 3 - self.POLE * cos * cos / mass)
        turn = (self.GRAVITY * sin - cos * push) / inertia
        change = torch.stack([speed, push - moment * turn * cos / mass, spin, turn], 1)
        self.states = self.states + self.SECONDS * change
        self.ages += 1
        fallen = (self.states[:, 0].abs() > self.FAR) | (self.states[:, 2].abs() > self.TILTED)
        over = fallen | (self.ages >= LONGEST)
        if over.any():
            self.states[over] = self._first(int(over.sum())).to(self.states.dtype)
            self.ages[over] = 0
        return fallen, over


class Player(nn.Module):
    """What is seen (T, N, 2) -> scores (T, N) of a push to the right, values (T, N), the state."""

    def __init__(self, kind, backend):
        super().__init__()
        self.resets = backend == "fused"
        self.layer = layer(kind, backend)(2, HIDDEN) if kind else None
        self.inner = nn.Linear(HIDDEN if kind else 2, HIDDEN)
        self.policy, self.value = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)

    def forward(self, seen, begins, state=None):
        """begins (T, N): True where an episode begins, so that the state before is forgotten."""
        y = 10 * seen
        if self.layer is not None:
            y, state = self.remember(y, begins, state)
        y = self.inner(y).tanh()
        return self.policy(y)[..., 0], self.value(y)[..., 0], state

    def remember(self, x, begins, state):
        if self.resets:
            return self.layer(x, state, resets=begins)
        outputs = []
        for step, begin in zip(x, begins, strict=True):
            state = None if state is None else where_state(~begin, state)
            y, state = self.layer(step[None], state)
            outputs.append(y)
        return torch.cat(outputs), state


class Game:
    """Rollouts of a player, and the lengths of the episodes that ended in them."""

    def __init__(self, player, seed):
        self.player, self.carts = player, CartPoles(CARTS, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.state, self.begins = None, torch.ones(CARTS, dtype=torch.bool)
        self.frames, self.curve = 0, []  # curve: (frames, mean length of the episodes of a rollout)

    @torch.no_grad()
    def rollout(self):
        """A dict of (T, N) each; the state is that before the first step, (L, N, H) each."""
        first, steps, lengths = self.state, [], []
        for _ in range(STEPS):
            seen, begins, ages = self.carts.seen, self.begins, self.carts.ages + 1
            scores, values, self.state = self.player(seen[None], begins[None], self.state)
            chance = torch.rand(CARTS, generator=self.generator)
            right = chance < scores[0].sigmoid()
            fallen, self.begins = self.carts.step(right)
            lengths += ages[self.begins].tolist()
            before = log_probability(scores[0], right)
            steps.append((seen, begins, right, before, values[0], fallen))
        self.frames += STEPS * CARTS
        if lengths:
            self.curve.append((self.frames, sum(lengths) / len(lengths)))
        names = ("seen", "begins", "right", "before", "values", "fallen")
        found = dict(zip(names, map(torch.stack, zip(*steps, strict=True)), strict=True))
        last = self.player(self.carts.seen[None], self.begins[None], self.state)[1]
        found["gains"] = gains(found["values"], last, found["begins"], self.begins, found["fallen"])
        return found, first

    def minibatches(self):
        """Endless: EPOCHS times over a rollout in minibatches of ROWS carts, then the next one."""
        while True:
            found, state = self.rollout()
            for _ in range(EPOCHS):
                for rows in torch.randperm(CARTS, generator=self.generator).split(ROWS):
                    part = None if state is None else select_state(state, rows)
                    yield {name: t[:, rows] for name, t in found.items()}, part


def log_probability(scores, right):
    return -nn.functional.softplus(torch.where(right, -scores, scores))


def gains(values, last, begins, begins_after, fallen):
    """Advantages (T, N) of a reward of 1 a step, discounted with GAE's lambda.

    Where the longest episode was cut off, the value of its last state stands for what would follow.
    """
    following = torch.cat([values[1:], last])
    over = torch.cat([begins[1:], begins_after[None]])
    following = torch.where(over, torch.where(fallen, 0.0, values), following)
    wrong = 1 + DISCOUNT * following - values
    found, after = [], torch.zeros_like(last[0])
    for t in reversed(range(len(values))):
        after = wrong[t] + DISCOUNT * SMOOTHING * torch.where(over[t], 0.0, after)
        found.append(after)
    return torch.stack(found[::-1])


def loss_of(player, played, state):
    scores, values, _ = player(played["seen"], played["begins"], state)
    gain = played["gains"]
    aim = gain + played["values"]
    gain = (gain - gain.mean()) / (gain.std() + 1e-6)
    ratio = (log_probability(scores, played["right"]) - played["before"]).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    entropy = nn.functional.softplus(scores) - scores * scores.sigmoid()
    policy = torch.minimum(gain * ratio, gain * clipped).mean() + ENTROPY * entropy.mean()
    return 0.5 * nn.functional.mse_loss(values / 50, aim / 50) - policy


def train(kind, args, report):
    """A game played and learnt by a policy with a layer of that kind, None for no memory."""
    torch.manual_seed(args.seed)
    game = Game(Player(kind, args.backend), args.seed)
    what = NAMES[kind]
    training = common.train(
        game.player, game.minibatches(), loss_of, args.steps, report, lr=1e-3, what=what
    )
    return game, training


NAMES = {kind: kind.upper() for kind in KINDS} | {None: "no memory"}


def run(args, report):
    kinds = [args.layer, None]
    trained = {kind: train(kind, args, report) for kind in kinds}
    rows = []
    for kind, (game, training) in trained.items():
        best = max(length for _, length in game.curve)
        rows.append([NAMES[kind], game.frames, lately(game), best, game.frames / training.seconds])
    columns = ["policy", "frames", "mean length of the last episodes", "best", "frames a second"]
    report.table("lengths", columns, rows, f"Steps that the pole stays up, of {LONGEST}")
    curves = {NAMES[kind]: game.curve for kind, (game, _) in trained.items()}
    plot_curves(report, "learning", "A pole balanced by where it is, not how fast it moves", curves)
    found = {"sb3": learn_sb3(args, report)} if args.sb3 else {}
    game, training = trained[args.layer]
    batch = next(game.minibatches())
    with torch.no_grad():
        scores = game.player(batch[0]["seen"], batch[0]["begins"], batch[1])[0]
    return found | {
        "losses": [x for _, training in trained.values() for x in training.losses],
        "lengths": {kind: lately(game) for kind, (game, _) in trained.items()},
        "outputs": scores,
        "problem": (game.player, loss_of, batch),
    }


def lately(game):
    """The mean length of the episodes in the last tenth of the rollouts."""
    tail = [length for _, length in game.curve[-max(1, len(game.curve) // 10) :]]
    return sum(tail) / len(tail)


def plot_curves(report, name, title, curves):
    """curves: by label, (frames, mean length of an episode) of each rollout."""
    with report.plot(name, title, figsize=(6, 3.2)) as axis:
        if axis is None:
            return
        for label, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), label=label)
        axis.axhline(LONGEST, color="gray", linestyle=":")
        axis.set(xlabel="frames played", ylabel="steps of an episode", ylim=(0, 1.05 * LONGEST))
        axis.legend(loc="upper left")


def learn_sb3(args, report):
    """RecurrentPPO as it comes and after rl.replace: frames a second, by name."""
    try:
        import gymnasium
        import sb3_contrib
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError as error:
        raise common.DataError(f"--sb3 needs sb3-contrib: {error}") from None

    def without_speeds(env):
        low, high = env.observation_space.low[::2], env.observation_space.high[::2]
        shown = gymnasium.spaces.Box(low, high)
        return gymnasium.wrappers.TransformObservation(env, lambda seen: seen[::2], shown)

    class Curve(BaseCallback):
        def _on_training_start(self):
            self.found = []

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if lengths := [episode["l"] for episode in self.model.ep_info_buffer]:
                self.found.append((self.num_timesteps, sum(lengths) / len(lengths)))

    curves, speeds = {}, {}
    for name, change in {"sb3-contrib": lambda model: model, "lstm_fused.rl": rl.replace}.items():
        envs = make_vec_env("CartPole-v1", 8, seed=args.seed, wrapper_class=without_speeds)
        model = sb3_contrib.RecurrentPPO("MlpLstmPolicy", envs, seed=args.seed, device="cpu")
        change(model)
        curve, begin = Curve(), time.perf_counter()
        model.learn(args.frames, callback=curve)
        speeds[name] = model.num_timesteps / (time.perf_counter() - begin)
        curves[name] = curve.found
        report.say(f"RecurrentPPO of {name}: {speeds[name]:.0f} frames a second")
    rows = [[name, curves[name][-1][1], speed] for name, speed in speeds.items()]
    columns = ["RecurrentPPO of", "mean length of 100 episodes", "frames a second"]
    report.table("sb3", columns, rows, "8 environments, sb3-contrib's own hyperparameters")
    plot_curves(report, "sb3-learning", "RecurrentPPO of sb3-contrib, speeds not shown", curves)
    return speeds


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="lstm")
    parser.add_argument("--sb3", action="store_true", help="also train sb3-contrib's RecurrentPPO")
    parser.add_argument("--frames", type=int, default=8192, help="for --sb3 (default: 8192)")


EXAMPLE = common.Example(
    "rl", __doc__, run, steps=3200, quick=1600, options=options,
    data="not used: what is learnt from is played",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
