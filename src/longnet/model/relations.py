"""From mentions to entities to relations: the head that makes a knowledge graph of a whole document.

It knows bytes and numbers, no text: what is a mention, which earlier mentions and which pairs of entities come into question, and
the features of strings come from `longnet.tasks.mentions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.model.config import LongNetConfig
from longnet.model.heads import LongNetForTokenClassification
from longnet.model.pieces import read_pieces

# Bytes that one entry of the document's memory stands for, at least; longer documents double it until MEMORY entries do.
BLOCK, MEMORY = 64, 512
# Values that a bucketed feature may take (powers of two of a distance or count), and kinds of agreement of two strings.
BUCKETS, AGREEMENTS = 16, 6
# Width of the channel groups whose products the relation scores are linear in.
GROUP = 16
# Pairs scored at one time.
PAIR_CHUNK = 8192


@dataclass
class Reading:
    """A batch read once: logits (B, N, 2 L); per document the bytes that were asked for, their states, and the memory.

    positions[b] (n,) ascending; states[b] (n, C); memory[b] (blocks, C) fp32, at most `MEMORY` rows of equally many bytes each;
    block[b] that number of bytes.
    """

    logits: Tensor
    positions: list[Tensor]
    states: list[Tensor]
    memory: list[Tensor]
    block: list[int]


@dataclass
class EntityInputs:
    """Entities of one document, as tensors: `member` (n,) mention, `entity` (n,) whose it is, `blocks` (n,) where it stands."""

    member: Tensor
    entity: Tensor
    blocks: Tensor
    count: int


def segment_logsumexp(x: Tensor, segment: Tensor, count: int) -> Tensor:
    """out[s] = log sum_{i: segment[i] = s} exp(x[i]) for x (n, ...), out (count, ...); -inf for a segment without rows.

    Example:
        >>> segment_logsumexp(torch.zeros(3), torch.tensor([0, 0, 1]), 2)
        tensor([0.6931, 0.0000])
    """
    with torch.no_grad():
        top = x.new_full((count, *x.shape[1:]), -torch.inf)
        rows = segment.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        top = top.scatter_reduce(0, rows, x, "amax")
        top = top.masked_fill(top == -torch.inf, 0)
    return torch.log(torch.zeros_like(top).index_add(0, segment, torch.exp(x - top[segment]))) + top


def antecedent_loss(scores: Tensor, anaphor: Tensor, right: Tensor, counted: Tensor) -> Tensor:
    """Sum of -log sum_{j right} softmax_j(s_ij) over the counted mentions i (Lee et al. 2017, "End-to-end neural coreference
    resolution", section 3), where a mention may also open an entity, with score 0: right if no candidate is.

    Args:
        scores: (P,) of candidates; anaphor (P,) the mention each is a candidate for; right: rows of right ones.
        counted: (M,) bool, mentions whose choice is known.
    """
    count = len(counted)
    every = segment_logsumexp(scores, anaphor, count).logaddexp(scores.new_zeros(count))
    found = torch.zeros_like(counted).index_fill(0, anaphor[right], True)
    best = segment_logsumexp(scores[right], anaphor[right], count)
    return (every - torch.where(found, best, 0)).masked_fill(~counted, 0).sum()


def adaptive_threshold_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum over pairs of ATLOP's loss (Zhou et al. 2021, "Document-level relation extraction with adaptive thresholding", eq. 6).

    Class 0 is the threshold T that every relation r of a pair has to pass and every other has to stay below:
    - sum_{r wanted} log softmax_{wanted + T}(l)_r - log softmax_{unwanted + T}(l)_T.

    Args:
        logits: (Q, R + 1). wanted: (Q, R + 1) bool; column 0 is ignored.
    """
    wanted = wanted.clone()
    wanted[:, 0] = False
    others = ~wanted
    others[:, 0] = False
    threshold = logits[:, :1]
    over = torch.cat((threshold, logits.masked_fill(~wanted, -torch.inf)[:, 1:]), 1).logsumexp(1)
    under = torch.cat((threshold, logits.masked_fill(~others, -torch.inf)[:, 1:]), 1).logsumexp(1)
    positive = (over[:, None] - logits).masked_fill(~wanted, 0).sum()
    return positive + (under - threshold[:, 0]).sum()


def buckets(distance: Tensor) -> Tensor:
    """floor(log2(1 + distance)), at most BUCKETS - 1."""
    return torch.log2(1 + distance.float()).long().clamp(max=BUCKETS - 1)


class KnowledgeHead(nn.Module):
    """Mentions (first and last byte's state), entities (their pooled mentions), relations (pairs of entities in their document).

    - mention m = LayerNorm(W [h_first; h_last] + label + how often its string occurs + how far into the document it is);
    - s(i, j) that mention i names the same entity as the earlier j: an MLP of m_i, m_j, m_i * m_j and features of the
      two strings;
    - entity e = log sum exp of its mentions, channel by channel;
    - context of a pair c = softmax_b(a_h(b) + a_t(b)) . memory(b), over blocks b of the document: the product of both
      entities' attention (ATLOP's localized context pooling; here the attention a is learned from e, with a bias by
      distance to the entity's mentions);
    - logits: a group bilinear form of tanh(W_h e_h + U_h c + d) and tanh(W_t e_t + U_t c + d), plus <A e_h, B e_t>,
      which also picks the pairs that are worth scoring in documents with many entities. Class 0 is the threshold.
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        width, relations = config.hidden_size, len(getattr(config, "relation_labels", None) or ())
        self.heads = config.num_attention_heads if width % config.num_attention_heads == 0 else 1
        self.group = GROUP if width % GROUP == 0 else width
        self.gate = nn.Linear(width, 1)
        self.borders = nn.Linear(2 * width, width)
        self.label = nn.Embedding(
            (config.num_labels or 0) // 2 + 1, width
        )  # the last: a label that training has never seen
        self.frequency = nn.Embedding(BUCKETS, width)
        self.place = nn.Embedding(BUCKETS, width)
        self.norm = nn.LayerNorm(width)
        self.salience = nn.Linear(width, 1)
        self.anaphor = nn.Linear(width, width)
        self.antecedent = nn.Linear(width, width, bias=False)
        self.product = nn.Linear(width, width, bias=False)
        self.distance = nn.Embedding(BUCKETS, width)
        self.agreement = nn.Embedding(AGREEMENTS, width)
        self.same_label = nn.Embedding(2, width)
        self.link = nn.Linear(width, 1)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.nearness = nn.Embedding(BUCKETS, self.heads)
        self.sides = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.contexts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.between = nn.Embedding(2 * BUCKETS, width)
        self.coarse = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.relation = nn.Linear(width * self.group, relations + 1)

    def block_sums(self, hidden: Tensor, begin: int, rest: Tensor | None) -> Tensor:
        """Sums of g_n [h_n; 1] over the blocks that a piece touches, (B, blocks, C + 1) fp32; g in (0, 1) is learned."""
        gate = torch.sigmoid(self.gate(hidden).float())
        if rest is not None:
            gate = gate * (torch.arange(hidden.shape[1], device=hidden.device) < rest[:, None])[..., None]
        weighted = torch.cat((gate * hidden.float(), gate), -1)
        front, back = begin % BLOCK, -(begin + hidden.shape[1]) % BLOCK
        return F.pad(weighted, (0, 0, front, back)).unflatten(1, (-1, BLOCK)).sum(2)

    def mentions(self, borders: Tensor, label: Tensor, frequency: Tensor, place: Tensor) -> Tensor:
        """(M, C) from borders (M, 2, C), the states of first and last bytes, and integer features (M,)."""
        mixed = self.borders(borders.flatten(1))
        return self.norm(mixed + self.label(label) + self.frequency(frequency) + self.place(place)).float()

    def antecedents(self, mentions: Tensor, pairs: Tensor, features: Tensor) -> Tensor:
        """Scores (P,) of pairs (P, 2), later mention first; features (P, 3): distance, agreement, same label."""
        later, earlier = self.anaphor(mentions), self.antecedent(mentions)
        parts = [
            self._antecedents(mentions, later, earlier, *part)
            for part in zip(pairs.split(PAIR_CHUNK), features.split(PAIR_CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else mentions.new_zeros(0)

    def _antecedents(
        self, mentions: Tensor, later: Tensor, earlier: Tensor, pairs: Tensor, features: Tensor
    ) -> Tensor:
        i, j = pairs.unbind(1)
        distance, agreement, same = features.unbind(1)
        mixed = later[i] + earlier[j] + self.product(mentions[i] * mentions[j])
        mixed = mixed + self.distance(distance) + self.agreement(agreement) + self.same_label(same)
        return self.link(F.gelu(mixed))[:, 0].float()

    def entities(self, mentions: Tensor, inputs: EntityInputs) -> Tensor:
        """(E, C) fp32: log sum exp over each entity's mentions."""
        return segment_logsumexp(mentions[inputs.member], inputs.entity, inputs.count)

    def attention(self, entities: Tensor, memory: Tensor, inputs: EntityInputs) -> tuple[Tensor, Tensor]:
        """(scores (E, P, blocks) fp32 of every entity for every block, values (blocks, P, C / P))."""
        query = self.query(entities).unflatten(-1, (self.heads, -1))
        key, value = self.key_value(memory).chunk(2, -1)
        key, value = (x.unflatten(-1, (self.heads, -1)) for x in (key, value))
        scores = torch.einsum("epd,bpd->epb", query, key).float() / query.shape[-1] ** 0.5
        near = buckets(self._block_distance(inputs, len(memory)))
        # Decays with the distance from the start of training; what is learned comes on top.
        bias = self.nearness(near).float().transpose(1, 2) - 0.5 * near[:, None]
        return scores + bias, value

    @staticmethod
    def _block_distance(inputs: EntityInputs, blocks: int) -> Tensor:
        """(E, blocks): blocks to the nearest mention of every entity."""
        at = torch.arange(blocks, device=inputs.blocks.device)
        marks = torch.zeros(inputs.count, blocks, dtype=torch.bool, device=at.device)
        marks[inputs.entity, inputs.blocks] = True
        before = torch.where(marks, at, -(2**30)).cummax(1).values
        after = torch.where(marks, at, 2**30).flip(1).cummin(1).values.flip(1)
        return torch.minimum(at - before, after - at)

    def coarse_scores(self, entities: Tensor, pairs: Tensor) -> Tensor:
        """<A e_h, B e_t> / sqrt(C) of pairs (Q, 2), fp32."""
        head, tail = (side(entities) for side in self.coarse)
        return (head[pairs[:, 0]] * tail[pairs[:, 1]]).float().sum(-1) / entities.shape[-1] ** 0.5

    @torch.no_grad()
    def best_tails(self, entities: Tensor, most: int) -> Tensor:
        """(E most, 2): every entity with the `most` others that its coarse score prefers."""
        head, tail = (side(entities).float() for side in self.coarse)
        most, parts = min(most, len(entities) - 1), []
        for begin in range(0, len(entities), 512):
            scores = head[begin : begin + 512] @ tail.T
            rows = torch.arange(len(scores), device=scores.device)
            scores[rows, rows + begin] = -torch.inf
            tails = scores.topk(most, 1).indices
            parts.append(torch.stack(((rows + begin)[:, None].expand_as(tails), tails), -1).flatten(0, 1))
        return torch.cat(parts)

    def relations(
        self, entities: Tensor, memory: Tensor, inputs: EntityInputs, pairs: Tensor, between: Tensor
    ) -> Tensor:
        """Logits (Q, R + 1) fp32 of pairs (Q, 2) = (head, tail); between (Q,): how far apart, and which comes first."""
        scores, value = self.attention(entities, memory, inputs)
        sides = [side(entities) for side in self.sides]
        coarse = self.coarse_scores(entities, pairs)
        parts = []
        for rows, gap in zip(pairs.split(PAIR_CHUNK), between.split(PAIR_CHUNK), strict=True):
            weights = torch.softmax(scores[rows[:, 0]] + scores[rows[:, 1]], -1)
            context = torch.einsum("qpb,bpd->qpd", weights.to(value.dtype), value).flatten(1)
            gap = self.between(gap)
            head, tail = (
                torch.tanh(sides[i][rows[:, i]] + self.contexts[i](context) + gap).unflatten(
                    -1, (-1, self.group)
                )
                for i in range(2)
            )
            parts.append(self.relation((head[..., :, None] * tail[..., None, :]).flatten(1)).float())
        if not parts:
            return entities.new_zeros(0, self.relation.out_features)
        logits = torch.cat(parts)
        return torch.cat((logits[:, :1], logits[:, 1:] + coarse[:, None]), 1)


class LongNetForKnowledgeExtraction(LongNetForTokenClassification):
    """Entities, which of their mentions are the same, and relations: `LongNetForTokenClassification` with a `KnowledgeHead`.

    config.num_labels = 2 L for L entity labels (start and end of each); config.relation_labels names the relations.
    `read` gives states and memory of documents of any length; `knowledge` takes them on. As a token classifier it is
    used like any other.

    Example:
        >>> config = LongNetConfig.preset("tiny", num_hidden_layers=1, bidirectional=True, num_labels=6, relation_labels=["r"])
        >>> model = LongNetForKnowledgeExtraction(config)
        >>> reading = model.read(torch.randint(4, 260, (1, 200)), positions=[torch.tensor([3, 9])])
        >>> reading.states[0].shape, reading.memory[0].shape
        (torch.Size([2, 128]), torch.Size([4, 128]))
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.knowledge = KnowledgeHead(config)
        self.post_init()

    def read(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        positions: Sequence[Tensor] | None = None,
        floor: float = 0.5,
    ) -> Reading:
        """Read a batch of right-padded rows, in pieces where they are long: only logits, memory and wanted states are kept.

        Args:
            input_ids: (B, N). lengths: (B,) or None if no row is padded.
            positions: per row, the bytes whose states are wanted, ascending; None: every byte with a tag of probability >= floor.
        """
        logits, sums = [], input_ids.new_zeros(0)
        places: list[list[Tensor]] = [[] for _ in input_ids]
        states: list[list[Tensor]] = [[] for _ in input_ids]
        for begin, hidden, rest in read_pieces(self.model, input_ids, lengths, self.piece):
            hidden = self.dropout(hidden)
            logits.append(self.classifier(hidden))
            sums = self._join(sums, self.knowledge.block_sums(hidden, begin, rest), begin)
            for b in range(len(hidden)):
                if positions is not None and hidden.shape[1] == input_ids.shape[1]:
                    wanted = positions[b]
                elif positions is not None:
                    inside = (positions[b] >= begin) & (positions[b] < begin + hidden.shape[1])
                    wanted = positions[b][inside] - begin
                else:
                    own = logits[-1][b] if rest is None else logits[-1][b, : int(rest[b])]
                    wanted = torch.nonzero(own.float().sigmoid().amax(-1) >= floor)[:, 0]
                places[b].append(wanted + begin)
                states[b].append(hidden[b, wanted])
        sizes = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths.tolist()
        memory = [self._memory(sums[b], size) for b, size in enumerate(sizes)]
        return Reading(
            torch.cat(logits, 1),
            [torch.cat(p) for p in places],
            [torch.cat(s) for s in states],
            [rows for rows, _ in memory],
            [block for _, block in memory],
        )

    @staticmethod
    def _join(sums: Tensor, more: Tensor, begin: int) -> Tensor:
        """Append the blocks of a piece; a block that both pieces touch is added up."""
        if not begin:
            return more
        if begin % BLOCK:
            shared = sums[:, -1:] + more[:, :1]
            return torch.cat((sums[:, :-1], shared, more[:, 1:]), 1)
        return torch.cat((sums, more), 1)

    @staticmethod
    def _memory(sums: Tensor, size: int) -> tuple[Tensor, int]:
        """(weighted means (blocks, C), bytes of a block): blocks are joined in twos until there are at most MEMORY."""
        sums, block = sums[: -(-size // BLOCK)], BLOCK
        while len(sums) > MEMORY:
            sums = F.pad(sums, (0, 0, 0, len(sums) % 2)).unflatten(0, (-1, 2)).sum(1)
            block *= 2
        return sums[:, :-1] / sums[:, -1:].clamp(min=1e-6), block
