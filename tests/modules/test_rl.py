"""Recurrent policies of sb3-contrib and torchrl after `rl.replace`, beside the same before it."""

import copy
import io
import warnings

import pytest
import torch

import lstm_fused
from lstm_fused import rl, runtime
from lstm_fused.fallback import Fused
from lstm_fused.testing import oracle, parity


@pytest.fixture(scope="module")
def sb3():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sb3_contrib")


@pytest.fixture(scope="module")
def torchrl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrl")
        from torchrl import modules
    return modules


class WithoutVelocities:
    """gymnasium's CartPole, which shows where cart and pole are and not how fast they move."""

    def __new__(cls):
        import gymnasium
        from gymnasium.wrappers import TransformObservation

        env = gymnasium.make("CartPole-v1", max_episode_steps=25)
        low, high = (b[::2] for b in (env.observation_space.low, env.observation_space.high))
        return TransformObservation(env, lambda o: o[::2], gymnasium.spaces.Box(low, high))


POLICIES = {
    "plain": {},
    "two layers": {"n_lstm_layers": 2},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "critic without": {"enable_critic_lstm": False},
}
each_policy = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)


def ppo(sb3, **options):
    """Three environments for 41 steps, batches of 50: pieces of episodes of any length."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    return sb3.RecurrentPPO(
        "MlpLstmPolicy",
        DummyVecEnv([WithoutVelocities] * 3),
        n_steps=41,
        batch_size=50,
        n_epochs=2,
        policy_kwargs={"lstm_hidden_size": 20} | options,
        seed=0,
        device="cpu",
    )


def evaluated(policy, batch):
    """Values, log probabilities and entropies of a batch of sb3's buffer, and gradients."""
    found = policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten(), batch.lstm_states, batch.episode_starts
    )
    outputs = [t[batch.mask > 0] if t.dim() == 1 else t[:, 0][batch.mask > 0] for t in found]
    parameters = dict(policy.named_parameters())
    loss = sum((t * torch.linspace(-1, 1, len(t))).sum() for t in outputs)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return outputs, {k: g for k, g in zip(parameters, grads, strict=True) if g is not None}


@each_policy
def test_sb3_evaluates_real_rollouts_as_before(sb3, options):
    """Each minibatch, whose pieces begin with and without a new episode, is one call a layer."""
    theirs = ppo(sb3, **options)
    theirs.learn(2 * 3 * 41)
    ours = rl.replace(ppo(sb3, **options)).policy
    ours.load_state_dict(theirs.policy.state_dict())
    calls = []
    ours.lstm_actor.register_forward_hook(lambda *_: calls.append(1))
    batches = list(theirs.rollout_buffer.get(50))
    assert any(b.episode_starts.any() for b in batches)
    for count, batch in enumerate(batches, 1):
        found, expected = evaluated(ours, batch), evaluated(theirs.policy, batch)
        torch.testing.assert_close(found, expected)
        assert len(calls) == count
        assert runtime.last_run()["pass"] == "backward"


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("starts", ["none", "first", "any", "all"])
def test_sb3_sequences_against_float64(sb3, steps, starts):
    """The method itself, episodes that end within a piece included."""
    theirs = ppo(sb3, n_lstm_layers=2).policy
    ours = rl.replace(copy.deepcopy(theirs))
    begins = torch.rand(3, steps) < {"none": 0.0, "first": 0.0, "any": 0.4, "all": 1.0}[starts]
    begins[:, 0] |= starts == "first"
    x = torch.randn(3 * steps, 2, requires_grad=True)
    state = tuple(torch.randn(2, 3, 20, requires_grad=True) for _ in range(2))
    given = (x, state, begins.float().flatten())

    def results(policy, x, state, begins):
        y, ends = policy._process_sequence(x, state, begins, policy.lstm_actor)
        outputs = {"y": y, "h_n": ends[0], "c_n": ends[1]}
        parameters = dict(policy.lstm_actor.named_parameters())
        leaves = {"x": x, "h0": state[0], "c0": state[1]} | parameters
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (y, *ends))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return outputs | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}

    exact = results(oracle.by_reference(oracle.in_float64(theirs)), *oracle.in_float64(given))
    verdicts = parity.compare(results(ours, *given), results(theirs, *given), exact)
    assert [v for v in verdicts if not v.ok] == []


def test_sb3_learns_and_saves_as_before(sb3, tmp_path):
    theirs = ppo(sb3).learn(3 * 3 * 41)
    ours = rl.replace(ppo(sb3))
    optimizer = ours.policy.optimizer
    ours.learn(3 * 3 * 41)
    assert ours.policy.optimizer is optimizer
    found, expected = ours.policy.state_dict(), theirs.policy.state_dict()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    ours.save(tmp_path / "model")
    loaded = sb3.RecurrentPPO.load(tmp_path / "model", env=theirs.env)
    assert type(loaded.policy) is type(theirs.policy)
    assert not any(isinstance(m, Fused) for m in loaded.policy.modules())
    torch.testing.assert_close(loaded.policy.state_dict(), found, rtol=0, atol=0)
    rl.replace(loaded)
    state, again = None, None
    for _ in range(5):
        seen, begin = torch.randn(3, 2).numpy(), torch.rand(3).numpy() < 0.5
        action, state = loaded.predict(seen, state, begin, deterministic=True)
        expected, again = ours.predict(seen, again, begin, deterministic=True)
        assert (action == expected).all() and (state[1] == again[1]).all()
    loaded.learn(3 * 41)


def test_sb3_restored(sb3):
    policy = ppo(sb3).policy
    before = {name: type(m) for name, m in policy.named_modules()}
    rl.replace(rl.replace(policy))
    assert type(policy) is not before[""] and isinstance(policy, before[""])
    assert isinstance(policy.lstm_actor, lstm_fused.LSTM)
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(policy)
    x, state = torch.randn(3 * 4, 2), (torch.randn(1, 3, 20),) * 2
    given = (x, state, torch.eye(12)[5], policy.lstm_actor)
    found = policy._process_sequence(*given)
    lstm_fused.restore(policy)  # the layers alone: the policy computes with torch.nn's as sb3 does
    halfway = policy._process_sequence(*given)
    rl.restore(policy)
    assert {name: type(m) for name, m in policy.named_modules()} == before
    expected = policy._process_sequence(*given)
    torch.testing.assert_close(halfway, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, expected)


def test_what_overrides_the_method_is_left_alone(sb3, torchrl):
    class Own(torchrl.GRUModule):
        def forward(self, tensordict):
            return tensordict

    module = Own(2, 3, in_keys=["x", "h"], out_keys=["y", ("next", "h")])
    with pytest.warns(UserWarning, match=r"left alone: the model, a Own, with its own forward"):
        rl.replace(module)
    assert type(module) is Own and isinstance(module.gru, lstm_fused.GRU)
    policy = ppo(sb3).policy
    policy._process_sequence = None
    with pytest.warns(UserWarning, match="_process_sequence"):
        rl.replace(policy)


def test_what_holds_no_policy_is_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module .*, got int"):
        rl.replace(3)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module .*, got int"):
        rl.restore(3)
    with pytest.raises(ValueError, match="the LSTM given holds none"):
        rl.replace(torch.nn.LSTM(2, 3))


KINDS = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "LSTM all": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU two layers": ("GRU", {"num_layers": 2, "bias": False}),
}
each_kind = pytest.mark.parametrize("kind, options", KINDS.values(), ids=KINDS)


def module_of(torchrl, kind, **options):
    """torchrl's module from two inputs to states of five units."""
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}
    return getattr(torchrl, f"{kind}Module")(2, 5, **keys, **options)


def rollout(module, *shape, starts=0.3):
    """Random inputs, random states before each step, and where episodes begin."""
    from tensordict import TensorDict

    layer = module.gru if hasattr(module, "gru") else module.lstm
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = {"h": layer.proj_size or layer.hidden_size, "c": layer.hidden_size}
    found = {s: torch.randn(*shape, layers, widths[s]) for s in module.in_keys if s in widths}
    found["is_init"] = torch.rand(*shape, 1) < starts
    return TensorDict({"x": torch.randn(*shape, 2, requires_grad=True), **found}, shape)


def recurrent_results(torchrl, module, data):
    """What the module writes in recurrent mode, and the gradients of it."""
    data = data.clone(False)  # what the module writes is not kept; the tensors are the same
    leaves = {"x": data["x"]} | dict(module.named_parameters())
    with torchrl.set_recurrent_mode(True):
        module(data)
    found = {str(key): data[key] for key in module.out_keys}
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in found.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}


@each_kind
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
def test_torchrl_whole_rollouts(torchrl, kind, options, shape, starts):
    theirs = module_of(torchrl, kind, **options)
    ours = rl.replace(copy.deepcopy(theirs))
    assert type(ours) is not type(theirs) and isinstance(ours, type(theirs))
    data = rollout(theirs, *shape, starts=starts)
    found = recurrent_results(torchrl, ours, data)
    assert runtime.last_run()["pass"] == "backward"
    exact = oracle.by_reference(oracle.in_float64(theirs))
    exact = recurrent_results(torchrl, exact, data.apply(oracle.in_float64))
    expected = recurrent_results(torchrl, theirs, data)
    verdicts = parity.compare(found, expected, exact, parity.model_row)
    assert [v for v in verdicts if not v.ok] == []


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_collects_and_replays(torchrl, kind):
    """Step by step in a real environment, and the same rollout as a whole; called with tensors."""
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.envs import GymWrapper, InitTracker, TransformedEnv

    theirs = module_of(torchrl, kind)
    theirs.in_keys[0] = "observation"
    ours = rl.replace(copy.deepcopy(theirs))
    env = TransformedEnv(GymWrapper(WithoutVelocities()), InitTracker())
    env.append_transform(theirs.make_tensordict_primer())
    head = TensorDictModule(lambda y: (y[..., :2] > y[..., 2:4]).long(), ["y"], ["action"])
    env.set_seed(0)
    data = env.rollout(60, TensorDictSequential(ours, head), break_when_any_done=False).detach()
    assert 1 < data["is_init"].sum() < 60
    for module in (theirs, ours):
        again = data.exclude("y", "next")
        with torchrl.set_recurrent_mode(True):
            module(again)
        torch.testing.assert_close(again["y"], data["y"])
        ends = torch.cat([data["is_init"][1:, 0], torch.tensor([True])])
        torch.testing.assert_close(again["next", "h"][ends], data["next", "h"][ends])
        assert not again["next", "h"][~ends].any()
    with torchrl.set_recurrent_mode(True):
        given = [data[key] for key in ours.in_keys]
        torch.testing.assert_close(ours(*given)[0], data["y"])


def test_torchrl_loss_of_ppo(torchrl):
    """A loss module, which keeps the parameters of its own and calls the policy with them."""
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.objectives import ClipPPOLoss

    def losses(change):
        torch.manual_seed(3)
        memory = change(module_of(torchrl, "LSTM"))
        head = TensorDictModule(torch.nn.Linear(5, 2), ["y"], ["logits"])
        actor = torchrl.ProbabilisticActor(
            TensorDictSequential(memory, head),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        critic = torchrl.ValueOperator(torch.nn.Linear(2, 1), in_keys=["x"])
        loss = ClipPPOLoss(actor, critic)
        data = rollout(memory, 3, 7).detach()
        data["action"] = torch.randint(2, (3, 7))
        data["action_log_prob"] = torch.randn(3, 7)
        data["advantage"], data["value_target"] = torch.randn(2, 3, 7, 1)
        with torchrl.set_recurrent_mode(True):
            found = loss(data)
        found["loss_objective"].backward()
        grads = {k: p.grad for k, p in loss.named_parameters() if p.grad is not None}
        return found["loss_objective"], grads

    (expected, theirs), (found, ours) = losses(lambda m: m), losses(rl.replace)
    assert runtime.last_run()["pass"] == "backward" and len(ours) == 6
    torch.testing.assert_close((found, ours), (expected, theirs))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_several_critics_by_vmap(torchrl, kind):
    """Of one module with stacked parameters, as the losses of several critics call it."""
    from tensordict import from_modules

    modules = [module_of(torchrl, kind) for _ in range(3)]
    data = rollout(modules[0], 2, 7)
    with torchrl.set_recurrent_mode(True):
        expected = torch.stack([module(data.clone())["y"] for module in modules])
        for module in modules:
            rl.replace(module)

        def call(parameters):
            with parameters.to_module(modules[0]):
                return modules[0](data.clone())["y"]

        found = torch.vmap(call)(from_modules(*modules, as_module=False))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_restored_pickled_and_compiled(torchrl, kind):
    module = module_of(torchrl, kind)
    before = {name: type(m) for name, m in module.named_modules()}
    data, weights = rollout(module, 3, 7), copy.deepcopy(module.state_dict())
    expected = recurrent_results(torchrl, module, data)
    rl.replace(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(module)
    torch.testing.assert_close(loaded.state_dict(), weights, rtol=0, atol=0)
    with torchrl.set_recurrent_mode(True), torch.no_grad():
        torch.testing.assert_close(loaded(data.clone())["y"], expected["y"].detach())
        compiled = torch.compile(module, backend="eager")(data.clone())
        torch.testing.assert_close(compiled["y"], expected["y"].detach())
        lstm_fused.restore(module)
        module(data)
    torch.testing.assert_close(data["y"], expected["y"].detach(), rtol=0, atol=0)
    rl.restore(module)
    assert {name: type(m) for name, m in module.named_modules()} == before
