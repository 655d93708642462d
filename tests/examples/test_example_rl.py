"""The pole on a cart: its physics, its rollouts, and that only a policy with memory balances it."""

import pytest
import torch

from examples import rl
from tests.helpers import example_checks


@pytest.mark.full
def test_learns(tmp_path):
    found = example_checks.learn(rl.EXAMPLE, tmp_path)["lengths"]
    # A pole falls within 22 steps or so under pushes drawn by chance.
    assert found["lstm"] > 250
    assert found[None] < 100


def test_backends_agree(tmp_path):
    example_checks.assert_agree(rl.EXAMPLE, tmp_path)


def test_moves_as_gymnasiums():
    """In float64, since the pole is unstable: rounding grows."""
    gymnasium = pytest.importorskip("gymnasium")
    envs = [gymnasium.make("CartPole-v1").unwrapped for _ in range(3)]
    carts = rl.CartPoles(3, 0)
    for k, env in enumerate(envs):
        env.reset(seed=k)
    state_of = lambda env: torch.as_tensor(env.state, dtype=torch.float64)  # noqa: E731
    carts.states = torch.stack([state_of(env) for env in envs])
    for _ in range(400):
        right = torch.rand(3) < 0.5
        fallen, over = carts.step(right)
        for k, env in enumerate(envs):
            terminated = env.step(int(right[k]))[2]
            assert terminated == fallen[k] == over[k]
            if terminated:
                assert carts.states[k].abs().max() <= 0.05
                env.state = carts.states[k].numpy()
                env.steps_beyond_terminated = None
            else:
                torch.testing.assert_close(carts.states[k], state_of(env), rtol=1e-9, atol=1e-9)
    assert carts.ages.max() < 400


def test_the_longest_episode_is_over_and_not_fallen():
    carts = rl.CartPoles(2, 0)
    carts.ages[0] = rl.LONGEST - 1
    fallen, over = carts.step(torch.tensor([True, False]))
    assert over.tolist() == [True, False] and not fallen.any()
    assert carts.ages.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [*rl.KINDS, None])
@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_a_rollout_at_once_is_what_was_played(kind, backend):
    """Episodes of some 20 steps begin inside rollouts of 128: the states must be forgotten."""
    game = rl.Game(rl.Player(kind, backend), 0)
    game.rollout()
    played, state = game.rollout()
    assert played["begins"][1:].sum() > 20
    with torch.no_grad():
        scores, values, _ = game.player(played["seen"], played["begins"], state)
    torch.testing.assert_close(rl.log_probability(scores, played["right"]), played["before"])
    torch.testing.assert_close(values, played["values"])


def test_gains_are_discounted_sums():
    """Of one cart whose first episode falls after two steps, and a second that goes on."""
    values, last = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])
    begins, after = torch.tensor([[True], [False], [True]]), torch.tensor([False])
    fallen = torch.tensor([[False], [True], [False]])
    far = rl.DISCOUNT
    wrong = [1 + far * 2 - 1, 1 - 2, 1 + far * 4 - 3]
    expected = [wrong[0] + far * rl.SMOOTHING * wrong[1], wrong[1], wrong[2]]
    found = rl.gains(values, last, begins, after, fallen)
    torch.testing.assert_close(found, torch.tensor(expected)[:, None])
    cut_off = rl.gains(values, last, begins, after, torch.zeros_like(fallen))
    torch.testing.assert_close(cut_off[1], torch.tensor([1 + far * 2 - 2]))


@pytest.mark.full
def test_sb3(tmp_path):
    pytest.importorskip("sb3_contrib")
    found = rl.EXAMPLE.results(
        ["--steps", "1", "--sb3", "--frames", "2048", "--out", str(tmp_path)]
    )
    assert found["sb3"].keys() == {"sb3-contrib", "lstm_fused.rl"}
    assert (tmp_path / "sb3.csv").is_file() and (tmp_path / "sb3-learning.png").is_file()
