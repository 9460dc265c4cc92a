"""What a LongNet is asked to do besides writing on: classify documents, label tokens, fill in masked spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MaskedLMOutput, TokenClassifierOutput
from transformers.utils import ModelOutput

from longnet.model.config import LongNetConfig
from longnet.model.padding import mask_to_span, require, roll_rows
from longnet.model.pieces import piece_tokens, read_pieces
from longnet.model.transformer import LongNetModel, LongNetPreTrainedModel, loss_chunk

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


@dataclass
class DocumentClassifierOutput(ModelOutput):
    """loss (); logits (B, labels); pooling_weights (B, N): how much each token counted, every row sums to 1, 0 at padding."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooling_weights: Tensor | None = None


class _Reader(LongNetPreTrainedModel):
    """A model whose head reads hidden states token by token, so that documents can be read in pieces."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.model = LongNetModel(config)
        self.piece = piece_tokens(config)
        """Tokens read at once (`pieces.piece_tokens`). May be lowered to any multiple of all segment lengths."""

    def _rows(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        lengths: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(inputs with every row at the left edge, lengths (B,) or None, first (B,) or None)."""
        self.model._check_inputs(input_ids, inputs_embeds, attention_mask, lengths, kwargs)
        inputs: Any = inputs_embeds if input_ids is None else input_ids
        if attention_mask is None or (span := mask_to_span(attention_mask, *inputs.shape[:2])) is None:
            return inputs, lengths, None
        return roll_rows(inputs, span[0]), span[1], span[0]

    def _hidden(self, inputs: Tensor, lengths: Tensor | None, first: Tensor | None) -> Tensor:
        """Hidden states (B, N, C), back in the caller's columns."""
        parts = [hidden for _, hidden, _ in read_pieces(self.model, inputs, lengths, self.piece)]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return hidden if first is None else roll_rows(hidden, -first)


class AttentionPooling(nn.Module):
    """pooled_p = sum_n softmax_n(w_p . h_n) h_n[p], for P heads that each pool their own C / P channels.

    The softmax runs over the valid tokens only, in fp32. Pieces of a document are joined by their softmax denominators, so
    a document of any length is pooled whole without its states ever existing whole.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads if hidden_size % heads == 0 else 1
        self.scorer = nn.Linear(hidden_size, self.heads, bias=False)

    def forward(self, hidden: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, n, C) -> pooled (B, P, C / P), lse (B, P), scores (B, n, P), all fp32; -inf where padded."""
        scores = self.scorer(hidden)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if lengths is not None:
            padded = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
            scores = scores.masked_fill(padded[..., None], -torch.inf)
        lse = scores.logsumexp(1)
        # A row without tokens in this piece has lse = -inf: its weights are 0, not NaN.
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[:, None])
        values = hidden.unflatten(-1, (self.heads, -1)).to(weights.dtype)
        return torch.einsum("bnp,bnpd->bpd", weights, values), lse, scores


class LongNetForSequenceClassification(_Reader):
    """One label, or several, for a whole document: LongNet, attention pooling, a linear layer.

    config.problem_type "single_label_classification" (labels (B,) int64, -100 ignored; cross entropy) or
    "multi_label_classification" (labels (B, L) of 0 and 1; binary cross entropy); None decides by the labels' dtype.
    Documents may be padded on either side (attention_mask, or lengths for right-padded rows): padding is no key and is not
    pooled, so logits do not depend on what else is in the batch. Made for config.bidirectional=True; a causal
    configuration works too, each token then having seen only what is before it.

    Example:
        >>> config = LongNetConfig.preset("tiny", num_hidden_layers=1, bidirectional=True, num_labels=3)
        >>> ids, lengths = torch.randint(4, 260, (2, 50)), torch.tensor([50, 20])
        >>> LongNetForSequenceClassification(config)(input_ids=ids, lengths=lengths).logits.shape
        torch.Size([2, 3])
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # pyrefly: ignore - never None here
        self.pooling = AttentionPooling(config.hidden_size, config.num_attention_heads)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: Tensor | None = None,
        return_dict: bool | None = None,
        return_pooling: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> DocumentClassifierOutput | tuple:
        """Logits (B, L) and, with labels, the loss; with return_pooling, also the pooling weights (B, N).

        Raises:
            ValueError: a row without tokens; labels that fit neither problem type.
        """
        inputs, lengths, first = self._rows(input_ids, attention_mask, inputs_embeds, lengths, kwargs)
        if lengths is not None:
            require(
                (lengths > 0).all(),
                "expected at least one token in every row; got an empty one; leave empty documents out",
            )
        pooled, weights = self._pool(inputs, lengths, return_pooling)
        if weights is not None and first is not None:
            weights = roll_rows(weights, -first)
        logits = self.classifier(self.dropout(pooled.to(self.classifier.weight.dtype)))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        output = DocumentClassifierOutput(loss=loss, logits=logits, pooling_weights=weights)
        return output if return_dict is not False else output.to_tuple()

    def _pool(self, inputs: Tensor, lengths: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """pooled (B, C) over all pieces and, if `keep`, the weight of every token, averaged over the pooling heads."""
        parts = [
            self.pooling(hidden, rest)
            for _, hidden, rest in read_pieces(self.model, inputs, lengths, self.piece)
        ]
        pooled, lse, scores = zip(*parts, strict=True)
        shares = torch.softmax(torch.stack(lse), 0)  # (pieces, B, P)
        merged = (torch.stack(pooled) * shares[..., None]).sum(0).flatten(1)
        if not keep:
            return merged, None
        total = torch.stack(lse).logsumexp(0)
        return merged, torch.exp(torch.cat(scores, 1) - total[:, None]).mean(-1)

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        kind = self.config.problem_type or (MULTI if labels.is_floating_point() else SINGLE)
        shape = (len(logits),) if kind == SINGLE else tuple(logits.shape)
        if kind not in (SINGLE, MULTI) or tuple(labels.shape) != shape:
            raise ValueError(
                f"expected labels of shape {shape} for problem_type {kind!r} ({SINGLE} or {MULTI}); got"
                f" {tuple(labels.shape)}"
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if kind == SINGLE:
            losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count = (labels != -100).sum().clamp(min=1)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
            count = labels.numel()
        return losses / (count if num_items is None else num_items)


class LongNetForTokenClassification(_Reader):
    """A label, or several, for every token: LongNet and a linear layer. Logits (B, N, L).

    Labels: (B, N) int64, -100 ignored (cross entropy); or (B, N, L) of 0 and 1 under problem_type
    "multi_label_classification", a token of -100s ignored (binary cross entropy). Padding never counts.

    Example:
        >>> config = LongNetConfig.preset("tiny", num_hidden_layers=1, bidirectional=True, num_labels=5)
        >>> LongNetForTokenClassification(config)(input_ids=torch.randint(4, 260, (2, 50))).logits.shape
        torch.Size([2, 50, 5])
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # pyrefly: ignore - never None here
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Logits (B, N, L) and, with labels, the loss: the mean over the labels that count."""
        inputs, lengths, first = self._rows(input_ids, attention_mask, inputs_embeds, lengths, kwargs)
        logits = self.classifier(self.dropout(self._hidden(inputs, lengths, first)))
        loss = None
        if labels is not None:
            if attention_mask is None and lengths is not None:
                attention_mask = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
            loss = self._loss(logits, labels, attention_mask, num_items_in_batch)
        output = TokenClassifierOutput(loss=loss, logits=logits)  # pyrefly: ignore
        return output if return_dict is not False else output.to_tuple()

    def _loss(
        self, logits: Tensor, labels: Tensor, mask: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        multi = self.config.problem_type == MULTI
        shape = tuple(logits.shape if multi else logits.shape[:2])
        if tuple(labels.shape) != shape:
            raise ValueError(f"expected labels of shape {shape}; got {tuple(labels.shape)}")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        counted = labels != -100
        if mask is not None:
            real = mask[:, -logits.shape[1] :].bool()
            counted = counted & (real[..., None] if multi else real)
        if multi:
            wanted = labels.masked_fill(~counted, 0).to(logits.dtype)
            losses = F.binary_cross_entropy_with_logits(
                logits, wanted, weight=counted.to(logits.dtype), reduction="sum"
            )
        else:
            wanted = labels.masked_fill(~counted, -100)
            losses = F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
            )
        return losses / (counted.sum().clamp(min=1) if num_items is None else num_items)


class LongNetForMaskedLM(_Reader):
    """A bidirectional LongNet that fills in masked tokens: the pre-training of classifiers and extractors.

    labels (B, N): the original id where a token was masked, -100 elsewhere. Only masked tokens get logits while the loss
    is computed, in chunks; without labels, logits are (B, N, V).

    Example:
        >>> model = LongNetForMaskedLM(LongNetConfig.preset("tiny", num_hidden_layers=1, bidirectional=True))
        >>> labels = torch.randint(4, 260, (2, 50))
        >>> masked = labels.masked_fill(torch.rand(2, 50) < 0.15, 3)
        >>> model(input_ids=masked, labels=labels.masked_fill(masked == labels, -100)).loss.shape
        torch.Size([])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if not config.bidirectional:
            raise ValueError(
                "expected bidirectional=True for masked language modelling; got a causal configuration"
            )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """The loss over masked tokens (mean, or their sum / num_items_in_batch); without labels, logits (B, N, V)."""
        inputs, lengths, first = self._rows(input_ids, attention_mask, inputs_embeds, lengths, kwargs)
        hidden = self._hidden(inputs, lengths, first)
        loss, logits = None, None
        if labels is None:
            logits = self.lm_head(hidden)
        else:
            masked = labels != -100
            losses = self._losses(hidden[masked], labels[masked])
            loss = losses / (masked.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        output = MaskedLMOutput(loss=loss, logits=logits)  # pyrefly: ignore
        return output if return_dict is not False else output.to_tuple()

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        total = hidden.sum() * 0.0  # a graph even where nothing is masked
        size = loss_chunk(self.config.vocab_size)
        for part in zip(hidden.split(size), targets.split(size), strict=True):
            if torch.is_grad_enabled():
                total = total + checkpoint(self._chunk, *part, use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + self._chunk(*part)
        return total

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, reduction="sum")
