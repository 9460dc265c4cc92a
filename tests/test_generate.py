"""Generation from a cache equals generation without one; batches equal single runs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longnet.attention.reference import dilated_attention_reference
from longnet.generate import generate
from longnet.patterns import DilatedPattern

VOCABULARY = 11
PATTERN = DilatedPattern((4, 16), (1, 2))


class Tiny(nn.Module):
    """Embedding, two attention layers, head: enough to depend on everything visible. Positions come in by the pattern."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            pattern=lambda: PATTERN,
        )
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.ModuleList([nn.Linear(8, 24) for _ in range(2)])
        self.head = nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0, lengths=None):
        x = self.embedding(input_ids)
        for i, mix in enumerate(self.mix):
            q, k, v = mix(3 * x).view(*x.shape[:2], 3, 2, 4).unbind(2)
            if past_key_values is None:
                out, _ = dilated_attention_reference(q, k, v, PATTERN, True, 0.5)
            else:
                out = past_key_values.attend(i, q, k, v, lengths)
            x = x + out.flatten(2)
        n = x.shape[1]
        if past_key_values is not None:
            past_key_values.advance(n if lengths is None else lengths)
        if logits_to_keep:
            last = torch.full((len(x),), n - 1) if lengths is None else (lengths - 1).clamp(min=0)
            x = x[torch.arange(len(x)), last][:, None]
        return SimpleNamespace(logits=self.head(x))


@pytest.fixture
def model():
    return Tiny().eval()


def prompt(n, batch=1, seed=0):
    return torch.randint(VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


def greedy_without_cache(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, -steps:].tolist()


@pytest.mark.parametrize("chunk_size", [1, 5, 8192])
def test_greedy_equals_greedy_without_cache(model, chunk_size):
    ids, seen, read = prompt(21), [], []
    output = generate(
        model, ids, max_new_tokens=20, temperature=0, chunk_size=chunk_size,
        on_token=lambda b, token: seen.append((b, token)), on_prefill=lambda done, total: read.append((done, total)),
    )  # fmt: skip
    assert output.ids == [greedy_without_cache(model, ids, 20)]
    assert seen == [(0, token) for token in output.ids[0]]
    assert read[-1] == (21, 21)
    assert output.finish_reasons == ["length"]
    assert output.cache.host_positions == (40,)


def test_a_batch_of_different_lengths_equals_single_runs(model):
    ids, lengths = prompt(30, batch=3), [30, 7, 16]
    ids[1, 7:] = ids[2, 16:] = 0
    singles = [
        generate(model, ids[b : b + 1, :n], max_new_tokens=15, temperature=0, eos_token_id=4).ids[0]
        for b, n in enumerate(lengths)
    ]
    for chunk_size in (6, 100):
        output = generate(
            model,
            ids,
            lengths=lengths,
            max_new_tokens=15,
            temperature=0,
            eos_token_id=4,
            chunk_size=chunk_size,
        )
        assert output.ids == singles
        read = [n + len(new) - 1 for n, new in zip(lengths, singles, strict=True)]
        assert list(output.cache.host_positions) == read


def test_a_cache_resumes_where_it_stopped(model):
    ids = prompt(9)
    whole = generate(model, ids, max_new_tokens=12, temperature=0).ids[0]
    first = generate(model, ids, max_new_tokens=5, temperature=0)
    last = torch.tensor([first.ids[0][-1:]])
    second = generate(model, last, max_new_tokens=7, temperature=0, cache=first.cache)
    assert first.ids[0] + second.ids[0] == whole


def test_a_callback_that_returns_true_ends_its_sequence(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = generate(model, ids, max_new_tokens=9, temperature=0).ids
    seen = ([], [])

    def stop(sequence, token):
        seen[sequence].append(token)
        return sequence == 1 and len(seen[1]) >= 2

    output = generate(model, ids, max_new_tokens=9, temperature=0, on_token=stop)
    assert output.ids == [whole[0], whole[1][:2]] == list(seen)
    assert output.finish_reasons == ["length", "stop"]
    output = generate(
        model, ids, max_new_tokens=9, min_new_tokens=5, temperature=0, on_token=lambda sequence, token: True
    )
    assert output.ids == [row[:5] for row in whole]


def test_stop_sequences_and_end_ids(model):
    ids = prompt(9)
    whole = generate(model, ids, max_new_tokens=12, temperature=0).ids[0]
    output = generate(model, ids, max_new_tokens=12, temperature=0, stop_sequences=[whole[2:4]])
    assert output.finish_reasons == ["stop"]
    assert output.ids[0][-2:] == whole[2:4]
    assert len(output.ids[0]) <= 4
    output = generate(model, ids, max_new_tokens=12, temperature=0, eos_token_id=[whole[3]])
    assert output.ids[0] == whole[: whole.index(whole[3]) + 1]
    assert output.finish_reasons == ["eos"]


def test_sampling_repeats_with_a_seed_and_narrows_to_greedy(model):
    ids = prompt(9)
    options = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.95, "top_k": 8, "repetition_penalty": 1.3}
    one, two = (generate(model, ids, seed=7, **options).ids for _ in range(2))
    assert one == two
    greedy = generate(model, ids, max_new_tokens=10, temperature=0).ids
    assert generate(model, ids, max_new_tokens=10, top_k=1).ids == greedy
    assert generate(model, ids, max_new_tokens=10, top_p=1e-9).ids == greedy


def test_a_strong_penalty_forbids_recent_ids(model):
    new = generate(model, prompt(1), max_new_tokens=8, temperature=0, repetition_penalty=1e9).ids[0]
    assert len(set(new)) > len(new) // 2


def test_samples_follow_the_softmax():
    from longnet.generate import _Sampler

    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    ids = _Sampler(1.0, None, None, 1.0, None, torch.Generator().manual_seed(0))(logits)
    frequency = torch.bincount(ids, minlength=3) / 20000
    assert (frequency - logits[0].softmax(-1)).abs().max() < 0.015


def test_broken_logits_raise(model):
    model.head.bias.data[2] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(model, prompt(4), max_new_tokens=2)


def ngrams(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_written_twice(model, size):
    """The oracle looks at all n-grams of the finished text; without the rule the same model repeats them."""
    free = generate(model, prompt(9), max_new_tokens=60, temperature=0).ids[0]
    assert len(set(ngrams(free, size))) < len(ngrams(free, size))
    for temperature in (0, 1.0):
        output = generate(
            model,
            prompt(9, batch=2),
            lengths=[9, 4],
            max_new_tokens=60,
            temperature=temperature,
            no_repeat_ngram=size,
            seed=1,
        )
        for ids, reason in zip(output.ids, output.finish_reasons, strict=True):
            assert len(set(ngrams(ids, size))) == len(ngrams(ids, size))
            if size == 1:
                assert sorted(ids) == list(range(VOCABULARY))  # every id once, then none is left
            assert reason == ("exhausted" if len(ids) < 60 else "length")
        assert size == 1 or len(output.ids[0]) > 30


def test_only_the_repeating_ids_are_forbidden(model):
    """Greedy without a cache, the rule applied by hand to the whole text at every step."""
    ids, new = prompt(6), []
    for _ in range(40):
        logits = model(torch.cat((ids, torch.tensor([new], dtype=torch.int64)), 1)).logits[0, -1]
        for token in range(VOCABULARY):
            if (*new[-2:], token) in ngrams(new, 3):
                logits[token] = -torch.inf
        new.append(int(logits.argmax()))
    assert generate(model, ids, max_new_tokens=40, temperature=0, no_repeat_ngram=3).ids == [new]


def test_forbidden_ids_are_never_written(model):
    new = generate(model, prompt(9), max_new_tokens=80, forbidden_ids=[0, 3, 7], seed=2).ids[0]
    assert set(new) == set(range(VOCABULARY)) - {0, 3, 7}
    beyond = [*range(5), VOCABULARY, 10**6]  # ids that the model does not have are never written anyway
    few = generate(model, prompt(9), max_new_tokens=80, forbidden_ids=beyond, no_repeat_ngram=1, seed=2)
    assert sorted(few.ids[0]) == list(range(5, VOCABULARY))
    assert few.finish_reasons == ["exhausted"]


def test_a_target_length_is_met(model):
    ids, steps = prompt(9), []
    free = generate(model, ids, max_new_tokens=30, temperature=0).ids[0]
    end, stop = free[3], free[5:7]
    options = {"temperature": 0, "eos_token_id": end, "stop_sequences": [stop]}
    assert len(generate(model, ids, max_new_tokens=30, **options).ids[0]) < 10
    output = generate(
        model, ids, max_new_tokens=30, min_new_tokens=30, on_progress=lambda *at: steps.append(at), **options
    )
    assert len(output.ids[0]) == 30
    assert end not in output.ids[0][:29]
    assert steps == [(n, 30) for n in range(1, 31)]
    late = generate(model, ids, max_new_tokens=30, min_new_tokens=12, **options)
    assert end not in late.ids[0][:11]
    assert 12 <= len(late.ids[0]) <= 30


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": -1}, {"chunk_size": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0},
        {"lengths": [5]}, {"lengths": [0]}, {"stop_sequences": [[]]}, {"repetition_penalty": 0.0},
        {"min_new_tokens": 3}, {"min_new_tokens": -1}, {"no_repeat_ngram": 0},
        {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, {"forbidden_ids": [-1]},
        {"eos_token_id": "<eos>"},
    ],
)  # fmt: skip
def test_arguments(model, change):
    with pytest.raises(ValueError, match="expected"):
        generate(**{"model": model, "input_ids": prompt(4), "max_new_tokens": 2, **change})


def test_a_prompt_may_stay_in_host_memory_in_a_narrow_dtype():
    model = Tiny()
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 8, "temperature": 0, "chunk_size": 7, "repetition_penalty": 1.3}
    wide, narrow = (generate(model, x, **options) for x in (ids, ids.to(torch.uint16)))
    assert wide.ids == narrow.ids
