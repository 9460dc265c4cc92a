"""Llama and Qwen2 with LongNet attention, judged by the same model under "eager" with a 4-D mask of log multiplicities."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from longnet import DilatedPattern, HierarchicalPattern
from longnet.attention.reference import multiplicity
from longnet.integrations import StreamingCache, patch

PATTERN = DilatedPattern((8, 16, 64), (1, 2, 4))
DENSE = DilatedPattern((256,), (1,))
FAMILIES = [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)]


def make(family, **overrides):
    config, model = family
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = {**sizes, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 4096}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2}
    return model(config(**{**fields, **overrides})).eval()


@pytest.fixture(params=FAMILIES, ids=["llama", "qwen2"])
def model(request):
    return make(request.param)


@pytest.fixture
def llama():
    return make(FAMILIES[0])


def tokens(batch=2, n=50, seed=1):
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def padded(ids, spans):
    """ids with everything outside (first, end) of each row made padding."""
    mask = torch.zeros_like(ids)
    for row, (first, end) in zip(mask, spans, strict=True):
        row[first:end] = 1
    return ids * mask, mask


def oracle(model, ids, pattern, causal=True):
    """Logits of one document by transformers' own eager attention: scores + log multiplicity."""
    at = torch.arange(ids.shape[1])
    count = multiplicity(pattern, model.config.num_attention_heads, at, at, causal)
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=count.float().log()[None]).logits
    model.set_attn_implementation(previous)
    return out


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_equals_sdpa_where_the_pattern_covers_everything(model):
    ids, mask = padded(tokens(), [(7, 50), (0, 50)])
    dense = model(ids, attention_mask=mask).logits
    for pattern in (DENSE, HierarchicalPattern(block=4, radix=4, window_blocks=2, top_k=99, beam=99)):
        close(patch(model, pattern)(ids, attention_mask=mask).logits[mask.bool()], dense[mask.bool()])
    dilated = patch(model, PATTERN)(ids, attention_mask=mask).logits
    assert (dilated - dense)[mask.bool()].abs().max() > 1e-2


@pytest.mark.parametrize(
    "spans", [[(0, 50), (0, 50)], [(9, 50), (0, 50)], [(0, 50), (0, 31)], [(5, 40), (3, 6)]]
)
def test_a_row_equals_its_document_alone(model, spans):
    ids, mask = padded(tokens(), spans)
    actual = patch(model, PATTERN)(ids, attention_mask=mask).logits
    for row, (first, end) in enumerate(spans):
        # Rotary positions are relative: a shifted document is the same document.
        close(
            actual[row : row + 1, first:end],
            oracle(model, ids[row : row + 1, first:end].contiguous(), PATTERN),
        )


def test_padding_changes_no_bit_of_a_row(llama):
    patch(llama, PATTERN)
    ids, mask = padded(tokens(), [(0, 50), (0, 31)])
    changed = torch.where(mask.bool(), ids, 5)
    first, second = (llama(x, attention_mask=mask).logits for x in (ids, changed))
    assert torch.equal(first[mask.bool()], second[mask.bool()])


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_do_not_leak(llama, key, causal):
    llama.config.is_causal = causal
    patch(llama, PATTERN)
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (23, 1, 40)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": d} for d in documents])
    kept = {"input_ids", "position_ids"} | ({"cu_seq_lens_q"} if key == "cu_seq_lens_q" else set())
    packed = llama(**{name: batch[name] for name in kept}).logits
    for document, part in zip(documents, packed.split([len(d) for d in documents], 1), strict=True):
        close(part, oracle(llama, torch.tensor([document]), PATTERN, causal))


def test_bidirectional_by_configuration(llama):
    llama.config.is_causal = False
    patch(llama, PATTERN)
    ids, mask = padded(tokens(), [(9, 50), (0, 50)])
    close(llama(ids, attention_mask=mask).logits[:1, 9:], oracle(llama, ids[:1, 9:], PATTERN, causal=False))


@pytest.mark.parametrize(
    ("family", "beams"), [(FAMILIES[0], 3), (FAMILIES[1], 1)], ids=["llama-3", "qwen2-1"]
)
def test_generation_is_the_same_with_every_cache(family, beams):
    model = make(family)
    patch(model, PATTERN)
    ids, mask = padded(tokens(2, 30), [(0, 30), (7, 30)])
    options = {"max_new_tokens": 38, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    without = model.generate(ids, use_cache=False, **options)
    assert len(set(without[:, 30:].flatten().tolist())) > 5, "the text must vary for this to mean anything"
    assert torch.equal(model.generate(ids, **options), without)
    stream = StreamingCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=stream, **options), without)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), without)


def test_hierarchical_generation_with_and_without_cache(llama):
    patch(llama, HierarchicalPattern(block=4, radix=4, window_blocks=2, top_k=1, beam=2))
    ids, mask = padded(tokens(2, 30), [(0, 30), (7, 30)])
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": mask}
    assert torch.equal(llama.generate(ids, **options), llama.generate(ids, use_cache=False, **options))


def test_streaming_logits_equal_parallel_ones_in_chunks(llama):
    patch(llama, PATTERN)
    ids, mask = padded(tokens(2, 150), [(0, 150), (40, 150)])
    parallel = llama(ids, attention_mask=mask).logits
    cache, parts = StreamingCache(llama.config), []
    with torch.no_grad():
        for begin, end in ((0, 17), (17, 18), (18, 97), (97, 98), (98, 150)):
            part = llama(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            parts.append(part)
    close(torch.cat(parts, 1)[mask.bool()], parallel[mask.bool()])
    assert cache.get_seq_length() == 150
    # 150 tokens were read; every layer keeps 2 x (8 + 2 x 8) + 4 offsets of 16 rows at most.
    rows = PATTERN.cache_entries(4, 2)
    assert cache.nbytes() <= 2 * 2 * 2 * rows * 8 * 4


def test_streaming_memory_does_not_grow(llama):
    patch(llama, PATTERN)
    cache, sizes = StreamingCache(llama.config), []
    with torch.no_grad():
        for seed in range(6):
            llama(tokens(1, 256, seed), past_key_values=cache, logits_to_keep=1)
            sizes.append(cache.nbytes())
    assert sizes[0] == sizes[-1] > 0


def test_a_saved_cache_goes_on(llama, tmp_path):
    patch(llama, PATTERN)
    ids, more = tokens(1, 70), tokens(1, 20, 3)
    cache = StreamingCache(llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        cache.save(tmp_path / "read.safetensors")
        expected = llama(more, past_key_values=cache).logits
        loaded = StreamingCache.load(tmp_path / "read.safetensors", llama.config)
        assert torch.equal(llama(more, past_key_values=loaded).logits, expected)


def test_a_cache_that_nobody_reads_is_refused(llama):
    patch(llama, PATTERN)
    cache = StreamingCache(llama.config)
    llama.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="another implementation"):
        llama(tokens(), past_key_values=cache)


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
def test_nothing_quadratic_is_ever_made(llama, kind):
    patch(llama, PATTERN)
    n, mode = 6000, LargestTensor()
    inputs = {"input_ids": tokens(1, n), "logits_to_keep": 1}
    if kind == "left":
        inputs["input_ids"], inputs["attention_mask"] = padded(inputs["input_ids"], [(100, n)])
    if kind == "packed":
        inputs["position_ids"] = torch.cat((torch.arange(4000), torch.arange(2000)))[None]
    with torch.no_grad(), mode:
        llama(**inputs, use_cache=False)
    assert n * 48 <= mode.largest <= n * 200


def test_trains_with_gradient_checkpointing(model):
    patch(model, PATTERN)
    ids, mask = padded(tokens(), [(9, 50), (0, 50)])
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_gradients_equal_the_oracles(llama):
    patch(llama, PATTERN)
    ids = tokens(1, 40)
    results = []
    for logits in (llama(ids).logits, oracle(llama, ids, PATTERN)):
        llama.zero_grad()
        logits.square().sum().backward()
        results.append([p.grad.clone() for p in llama.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


def test_pattern_is_saved_and_the_name_is_given_at_load(llama, tmp_path):
    ids = tokens()
    expected = patch(llama, PATTERN)(ids).logits
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longnet_dilated")
    assert torch.equal(loaded(ids).logits, expected)


def test_bad_input_is_refused(llama):
    ids = tokens()
    llama.set_attn_implementation("longnet_dilated")
    with pytest.raises(ValueError, match=r"config\.longnet"):
        llama(ids)
    with pytest.raises(ValueError, match="DilatedPattern"):
        patch(llama, "geometric")
    with pytest.raises(ValueError, match="router_mix"):
        patch(llama, HierarchicalPattern(), router_mix=2)
    patch(llama, PATTERN)
    hole = torch.ones_like(ids)
    hole[0, 20] = 0
    with pytest.raises(ValueError, match="hole"):
        llama(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="N x N"):
        llama(ids, attention_mask=torch.zeros(2, 1, 50, 50))
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        llama(ids, cu_seq_lens_q=torch.tensor([0, 50]))
    with pytest.raises(ValueError, match="sliding_window"):
        llama(ids, sliding_window=8)
    with pytest.raises(ValueError, match="dropout"):
        patch(make(FAMILIES[0], attention_dropout=0.1), PATTERN).train()(ids)
