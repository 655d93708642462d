"""Encoder and decoder: attention beats one vector on long words; both backends agree."""

import pytest
import torch

from examples import translate
from tests.helpers import example_checks


@pytest.mark.full
def test_learns_and_attention_holds_long_words(tmp_path):
    found = example_checks.learn(translate.EXAMPLE, tmp_path)
    accuracy, by_length = found["accuracy"], found["by length"]
    for form in translate.FORMS[:3]:
        assert accuracy["attention"] > accuracy[form] + 0.15
        assert sum(by_length[form][k] for k in (2, 3, 4)) / 3 > 0.3
    longest = range(8, translate.LONGEST + 1)
    assert sum(by_length["attention"][k] for k in longest) / len(longest) > 0.4


@pytest.mark.parametrize("form", translate.FORMS)
def test_backends_agree(tmp_path, form):
    example_checks.assert_agree(translate.EXAMPLE, tmp_path, "--context", form)


def test_backends_agree_on_lstm(tmp_path):
    example_checks.assert_agree(
        translate.EXAMPLE, tmp_path, "--layer", "lstm", "--context", "attention"
    )


def test_contexts():
    words, lengths, _, _ = translate.batch_of(["abc", "fused"])
    for form in translate.FORMS:
        model = translate.Translator(form, "gru", "fused")
        with torch.no_grad():
            states, real, c = model.encode(words, lengths)
            alone = model.encoder(model.embedding(words[:1, :3]))[0][0]
            wanted = {"h_N": alone[-1], "attention": alone[-1], "g(h_N)": alone[-1]}
            wanted = wanted.get(form, alone.mean(0))
            wanted = torch.tanh(model.g(wanted)) if form.startswith("g") else wanted
        assert real.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
        torch.testing.assert_close(states[0, :3], alone)
        torch.testing.assert_close(c[0], wanted)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("form", translate.FORMS)
def test_writing_is_what_training_scores(form, kind):
    model = translate.Translator(form, kind, "fused")
    words, lengths, *_ = translate.batch_of(["backwards", "it"])
    letters, attended = model.write(words, lengths, 6)
    before = torch.cat([torch.full((2, 1), translate.BEGIN), letters[:, :-1]], 1)
    with torch.no_grad():
        assert torch.equal(model(words, lengths, before).argmax(2), letters)
    if form == "attention":
        for weights in attended:
            torch.testing.assert_close(weights.sum(2), torch.ones(2, 1))
            assert not weights[1, 0, 2:].any()


def test_words_and_codes(tmp_path, capsys):
    _, lengths, before, wanted = translate.batch_of(["abc", "xy"])
    assert lengths.tolist() == [3, 2]
    assert [translate.text_of(row) for row in wanted] == ["cba", "yx"]
    assert torch.equal(before[0, 1:], wanted[0, :-1])
    path = tmp_path / "text.txt"
    path.write_text("Only a few words, averyverylongoneamong them.")
    assert translate.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "has 4 different words" in message
    assert message.count("\n") == 1


def log_likelihood(model, words, lengths, letters):
    """Of the letters up to the first END, for each word."""
    before = torch.cat([torch.full((len(words), 1), translate.BEGIN), letters[:, :-1]], 1)
    with torch.no_grad():
        scores = model(words, lengths, before).log_softmax(2)
    each = scores.gather(2, letters.unsqueeze(2)).squeeze(2)
    ended = (letters == translate.END).cumsum(1) - (letters == translate.END).int()
    return torch.where(ended > 0, 0, each).sum(1)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_beam_search_follows_its_states(kind):
    torch.manual_seed(0)
    model = translate.Translator("attention", kind, "fused")
    words, lengths, *_ = translate.batch_of(["backwards", "it", "fused"])
    greedy, _ = model.write(words, lengths, 5)
    assert torch.equal(model.search(words, lengths, 5, 1), greedy)
    # One letter after the other, all candidates are kept: the likeliest of all pairs of letters.
    size = translate.SIZE
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    found = model.search(words, lengths, 2, size)
    for n in range(len(words)):
        row = slice(n, n + 1)
        many = log_likelihood(
            model,
            words[row].expand(len(pairs), -1),
            lengths[row].expand(len(pairs)),
            pairs,
        )
        own = log_likelihood(model, words[row], lengths[row], found[row])
        torch.testing.assert_close(own[0], many.max())
