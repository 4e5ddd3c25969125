"""The model of the recipe `text`, its decoding, and the estimate of mutual information."""

import itertools
import math
from typing import Any

import pytest
import torch

from fastvae.train import information
from fastvae.train import text as text_runs
from fastvae.train.text import decoding, sentences
from fastvae.train.text.module import TextVAE
from fastvae.train.text.recipe import Text
from fastvae.train.text.sentences import END, PAD, START, UNKNOWN

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(**options: Any) -> TextVAE:
    torch.manual_seed(0)
    settings = Text(data="x", hidden=8, embedding=6, latent=3, **options)
    vocabulary = sentences.Vocabulary.train(["a b c d e f g h"], settings)
    return text_runs.KIND.build(settings, vocabulary).eval()


OPTIONS = [{"cell": c, "bidirectional": b} for c in ("lstm", "gru") for b in (True, False)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_model_is_independent_of_padding(options):
    """A sentence gives the same result alone and in a batch with longer ones."""
    model = small_model(**options)
    alone = sentences.make_batch(sentences.token_table([[5, 6, 7]]))
    beside = sentences.make_batch(sentences.token_table([[5, 6, 7], [8, 9, 10, 11, 4, 5, 6]]))
    z = torch.randn(1, 3)
    for a, b in zip(model.encode(alone), model.encode(beside), strict=True):
        torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(model.nll(z, alone)[0], model.nll(z.expand(2, 3), beside)[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_decoder_step_by_step_agrees_with_full_sequence(options):
    model = small_model(**options)
    decoder, z = model.decoder, torch.randn(2, 3)
    tokens = torch.tensor([[START, 5, 6], [START, 7, 8]])
    state, logits = decoder.initial_state(z), []
    for t in range(3):
        now, state = decoder.advance(z, tokens[:, t : t + 1], state)
        logits.append(now)
    torch.testing.assert_close(torch.cat(logits, 1), decoder(z, tokens))


def log_prob(model: Any, z: torch.Tensor, tokens: list[int], longest: int) -> float:
    """Return the log-probability of decoding these tokens, followed by END if there is room."""
    after = [*tokens, END] if len(tokens) < longest else tokens
    logits = model.decoder(z, torch.tensor([[START, *after[:-1]]]))[0].double()
    log_probs = logits.log_softmax(-1)  # scores as in beam search
    return sum(log_probs[t, token].item() for t, token in enumerate(after))


@pytest.mark.parametrize("end", [1.0, -30.0], ids=["some end", "none end"])
@torch.no_grad()
def test_beam_search_with_all_beams_finds_the_best_sentence(end):
    """With as many beams as there are prefixes, beam search is exhaustive."""
    model = small_model()
    for parameter in model.decoder.parameters():
        parameter *= 3  # makes the output depend more on the previous tokens
    model.decoder.rnn.weight_hh_l0 *= 5
    model.decoder.logits.bias[END] = end
    longest, words = 3, range(4, 12)
    z = torch.randn(12, 3)
    sentences_found = decoding.decode(model, z, decoding.Decoding("beam", beams=100, longest=longest))
    likeliest = 0
    for row, got in zip(z.split(1), sentences_found, strict=True):
        candidates = [list(c) for n in range(longest + 1) for c in itertools.product(words, repeat=n)]
        log_probs = {tuple(c): log_prob(model, row, c, longest) for c in candidates}
        lengths = {c: min(len(c) + 1, longest) for c in log_probs}
        best = max(log_probs, key=lambda c: log_probs[c] / ((5 + lengths[c]) / 6) ** 0.6)
        assert got == list(best)
        likeliest += best == max(log_probs, key=log_probs.__getitem__)
    assert end < 0 or 0 < likeliest < len(z), "this test needs sentences that the length decides, and others"


@torch.no_grad()
def test_greedy_and_nucleus_decoding_avoid_special_tokens():
    model = small_model()
    z = torch.randn(40, 3)
    greedy = decoding.decode(model, z, decoding.Decoding("greedy", longest=12))
    assert decoding.decode(model, z, decoding.Decoding("beam", beams=1, longest=12)) == greedy
    # This nucleus is so small that it contains only the likeliest token.
    assert decoding.decode(model, z, decoding.Decoding("nucleus", top_p=1e-6, longest=12)) == greedy
    model.decoder.logits.bias[[PAD, UNKNOWN, START]] = 50.0  # the model strongly prefers special tokens
    draws = [
        decoding.decode(
            model, z, decoding.Decoding("nucleus", top_p=1.0, longest=12), torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    written = {token for line in draws[0] for token in line}
    assert not written & {PAD, UNKNOWN, START, END}
    assert max(map(len, draws[0])) <= 12


@torch.no_grad()
def test_nucleus_decoding_samples_from_the_top_p_tokens():
    model = small_model()
    model.decoder.logits.weight.zero_()
    model.decoder.logits.bias.copy_(torch.full((12,), -30.0))
    model.decoder.logits.bias[[4, 5, 6]] = torch.tensor([0.5, 0.3, 0.2]).log()
    z = torch.zeros(3000, 3)
    (first,) = zip(
        *decoding.decode(model, z, decoding.Decoding("nucleus", top_p=0.7, longest=1)), strict=True
    )
    share = first.count(4) / len(first)
    assert set(first) == {4, 5}
    assert share == pytest.approx(0.5 / 0.8, abs=0.03)


def test_mutual_information_agrees_with_known_values():
    torch.manual_seed(0)
    mu = torch.randn(700, 2)
    # Posteriors that do not overlap give log N, and equal ones give 0.
    far = torch.arange(700.0).unsqueeze(1).expand(700, 2) * 100
    apart = information.mutual_information(far, torch.zeros(700, 2), far + torch.randn(700, 2))
    assert apart == pytest.approx(math.log(700), abs=1e-6)
    same = torch.zeros(700, 2)
    assert information.mutual_information(same, same, torch.randn(700, 2)) == pytest.approx(0, abs=1e-9)
    # If x and z are jointly normal with var(mu) = 1 and posterior variance v, it is log(1 + 1 / v) / 2 per dimension.
    v = 0.5
    z = mu + v**0.5 * torch.randn(700, 2)
    got = information.mutual_information(mu, torch.full((700, 2), math.log(v)), z)
    assert got == pytest.approx(math.log(1 + 1 / v), abs=0.1)
