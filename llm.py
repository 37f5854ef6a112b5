# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""Frozen language models that read soft prompts: forward, loss, generation, loading straight from
safetensors.

    llm = load_llm("facebook/opt-6.7b as a folder", dtype=torch.bfloat16, device="cuda")
    loss, tokens = llm.loss(soft_prompts, caption_ids)          # gradients flow to soft_prompts only
    captions = llm.generate(soft_prompts, num_beams=5)          # lists of ids
    small = load_llm(folder, device="cuda", weights="nf4")      # a quarter of the memory
    part = load_llm(folder, device="cuda", mesh=mesh)           # its share of it, in each of some processes
    cache = llm.read_prefix(soft_prompts, room=500)             # read once, for many questions or turns
    answers = llm.generate(question, cache=cache)

Every language model here reads a *prefix* of embeddings (soft prompts, BOS, an instruction) and
scores or produces a target: OPT and LLaMA (with Vicuna, Mistral, SmolLM2, Qwen2, Qwen3) read
[prefix | target]; T5 reads the prefix in its encoder. Parameter names equal the checkpoint's, so
that loading needs no table of names.

A *memory*, where one is given, is a function that every FFN calls with its own input (B,S,D) and its
activation; the result (B,S,D) is added to the FFN's output, before residual and norm. MemVP shows
images so; nothing here knows more of it.

The file goes: attention and masks, loss, generation, what models share, OPT, LLaMA, T5; then what
not every run needs, quantised and sharded weights; loading. To learn how soft prompts are read, read
`OPT`, `DecoderOnly.hidden_states` and `target_loss`; pass over `Cache` and beams at first.

B batch, P prefix length, T target length, S positions read, D LLM width, V vocabulary, H heads, G
key-value heads, hd width of a head, K beams.
"""

import json
import math
import zipfile
from functools import lru_cache, partial
from pathlib import Path
from statistics import NormalDist

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import register_flop_formula

# ----------------------------------------------------------------------------- shared by all models


def attention(q, k, v, mask=None, causal=False, scale=None):
    """Softmax attention of queries (B,H,Sq,hd) over keys and values (B,G,Sk,hd) -> (B,H,Sq,hd).

    G < H: heads share keys and values in groups of H/G (GQA, Ainslie et al. 2023). `mask`
    broadcasts to (B,H,Sq,Sk): a bool is True where a query may look, numbers are added to the
    scores. scale is 1/sqrt(hd) unless given."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    # faster on CPUs than torch's own attention in bf16, and in its backward pass (docs/notes.md)
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.requires_grad):
        return plain_attention(q, k, v, mask, causal, scale)
    grouped = q.shape[1] != k.shape[1]
    if mask is None or not grouped:
        options = dict(is_causal=causal, scale=scale, enable_gqa=grouped)
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    # with a mask, torch's fast kernels know no groups: the heads of a group become queries of one head
    mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
    queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # (B, G, H/G * Sq, hd)
    return F.scaled_dot_product_attention(queries, k, v, mask, scale=scale).reshape(q.shape)


def plain_attention(q, k, v, mask, causal, scale):
    """As `attention`, as two matrix products and a softmax."""
    B, H, Sq, hd = q.shape
    G = k.shape[1]
    scale = hd**-0.5 if scale is None else scale
    scores = (q * scale).reshape(B, G, -1, hd) @ k.transpose(-2, -1)  # (B, G, H/G * Sq, Sk)
    scores = scores.view(B, H, Sq, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1).to(v.dtype)
    return (weights.view(B, G, -1, weights.shape[-1]) @ v).view(q.shape)


def split_heads(x, hd):
    return rearrange(x, "b s (h d) -> b h s d", d=hd)


def merge_heads(x):
    return rearrange(x, "b h s d -> b s (h d)")


def add_memory(y, memory, x, activation):
    """An FFN's output y, and what it reads in the memory with its input x."""
    return y if memory is None else y + memory(x, activation)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Draws nothing on the meta device: torch would import its compiler for that, which takes a
        second."""
        if not self.weight.is_meta:
            super().reset_parameters()


def word_scores(head, x):
    """Hidden states (B,S,D) -> logits (B,S,V), as a product of two matrices: with three dimensions
    and strides, as of a slice, torch would copy the whole head for each row."""
    return head(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def take_prefix(prefix, prefix_mask, dim, dtype):
    """(B,P,D), (B,P) bool or None -> the same two, checked. Each row's real positions move to the
    right end, in order, so that holes anywhere become padding on the left: a position then depends
    on the row's real positions alone."""
    if prefix.ndim != 3 or prefix.shape[1] == 0 or prefix.shape[2] != dim:
        raise ValueError(f"the prefix must be (B, P >= 1, {dim}), not {tuple(prefix.shape)}; a text alone "
                         "needs its BOS in it")
    if prefix_mask is None:
        return prefix.to(dtype), None
    if prefix_mask.dtype != torch.bool or prefix_mask.shape != prefix.shape[:2]:
        raise ValueError(f"prefix_mask must be {tuple(prefix.shape[:2])} of torch.bool (False: a hole), not "
                         f"{tuple(prefix_mask.shape)} of {prefix_mask.dtype}")
    if prefix_mask.device.type == "cpu" and not prefix_mask.any(1).all():
        raise ValueError("prefix_mask: a row has no real position; a text alone needs its BOS in the prefix")
    order = prefix_mask.long().argsort(dim=1, stable=True)
    prefix = prefix.to(dtype).gather(1, order[..., None].expand_as(prefix))
    return prefix, prefix_mask.gather(1, order)


def causal_mask(keep):
    """(B,S) bool, True for real positions -> (B,1,S,S). Padding looks at itself, so that no softmax
    is empty."""
    S = keep.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(S, dtype=torch.bool, device=keep.device)
    return ((causal & keep[:, None, :]) | itself)[:, None]


def real_positions(keep):
    """(B,S) bool -> (B,S): the number of each real position in its row, from 0."""
    return (keep.cumsum(1) - 1).clamp(min=0)


# --------------------------------------------------------------------------------------------- loss


def filled(target_ids):
    """Targets with an id in the place of -100, which stands for none."""
    return target_ids.masked_fill(target_ids == -100, 0)


def cross_entropies_(logits, target_ids, differentiate):
    """Sum of the cross-entropies of logits (N,V) for targets (N,1), in float32; if asked, their
    derivative takes the logits' place."""
    log_p = logits.float().log_softmax(-1)
    ids = filled(target_ids)
    loss = -(log_p.gather(1, ids) * (target_ids != -100)).sum()
    if differentiate:
        p = log_p.exp_()  # the derivative is the probabilities, less 1 at the target
        p.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=p.dtype))
        logits.copy_(p)
    return loss


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of hidden states x (N,D) under a frozen head (V,D): a block of
    rows at a time, whose gradient is taken at once. No more logits than a block's exist at any
    time. Of what is made of them in float32 there is no more than a slice's, which on CPUs stays in
    the cache."""

    BLOCK = {"cpu": 2**25, "cuda": 2**28}  # bytes of logits
    SLICE = {"cpu": 2**21, "cuda": 2**28}  # bytes of these in float32

    @staticmethod
    def forward(ctx, x, weight, target_ids):
        device = "cpu" if x.device.type == "cpu" else "cuda"
        V = len(weight)
        block = max(1, FrozenHeadLoss.BLOCK[device] // (weight.element_size() * V))  # rows
        few = max(1, FrozenHeadLoss.SLICE[device] // (4 * V))  # rows
        blocks = max(1, math.ceil(len(x) / block))
        differentiate = ctx.needs_input_grad[0]
        loss = torch.zeros((), device=x.device)
        gradient = torch.empty_like(x)
        parts = zip(x.chunk(blocks), target_ids[:, None].chunk(blocks), gradient.chunk(blocks))
        for hidden, ids, part_gradient in parts:
            logits = F.linear(hidden, weight)
            for some_logits, some_ids in zip(logits.split(few), ids.split(few)):
                loss += cross_entropies_(some_logits, some_ids, differentiate)
            if differentiate:
                part_gradient.copy_((logits @ weight) * (ids != -100))
            del logits, some_logits  # before the next block's are made
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True: what is kept knows nothing of x
            raise RuntimeError("the loss of a frozen head has no second derivative; with "
                               "head.weight.requires_grad_() it has")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def target_loss(head, x, target_ids, scored=None):
    """Hidden states (B,T,D), targets (B,T) -> (sum of cross-entropies in float32, number of
    tokens); -100 does not count.

    A sum and a count, so that ranks and micro-batches can be normalised by the global number of
    tokens. Where scored (B,T) is False nothing counts, and the head reads nothing."""
    x = x.flatten(0, 1)  # (B * T, D)
    ids = target_ids.flatten()
    if scored is not None:
        rows = scored.flatten().nonzero()[:, 0]
        x = x[rows.to(x.device, non_blocking=True)]
        ids = ids[rows.to(ids.device, non_blocking=True)]
    if head.weight.requires_grad:
        loss = F.cross_entropy(head(x).float(), ids, ignore_index=-100, reduction="sum")
    else:
        loss = FrozenHeadLoss.apply(x, head.weight, ids)
    return loss, (ids != -100).sum()


def pack_captions(target_ids):
    """Captions (B,K,T) of B images laid one behind the other, without their padding: what has been
    read when it is time to predict all targets but each caption's first.

    -> ids, the caption that each is of, its place there, and the target that it predicts, (B,S)
    each; where a row has fewer than S, the target is -100."""
    width = target_ids.shape[2] - 1
    inputs = target_ids[..., :-1].flatten(1)  # (B, K * width)
    targets = target_ids[..., 1:].flatten(1)
    real = targets != -100
    longest = int(real.sum(1).max())
    order = real.long().argsort(dim=1, descending=True, stable=True)
    order = order[:, :longest]
    return inputs.gather(1, order), order // width, order % width, targets.gather(1, order)


def check_ids(ids, vocab_size):
    """ValueError for ids outside of the vocabulary. On GPUs nothing waits for that: there, torch's
    own assertion ends it."""
    looked_at = ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() > 0
    if looked_at and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: this LLM's vocabulary has 0 to "
                         f"{vocab_size - 1}; is it its tokenizer?")


def check_scored(scored, target_ids):
    if scored is None:
        return
    if target_ids.ndim != 2:
        raise ValueError(f"scored is for targets (B,T), not {tuple(target_ids.shape)}: captions packed "
                         "behind one prefix all count")
    if scored.dtype != torch.bool or scored.shape != target_ids.shape:
        raise ValueError(f"scored must be {tuple(target_ids.shape)} of torch.bool, as the targets, not "
                         f"{tuple(scored.shape)} of {scored.dtype}")


# --------------------------------------------------------------------------------------- generation


class Cache:
    """What has been read of B texts, each of which K beams continue: keys and values of all layers,
    allocated once.

    A text has one row of columns: its prefix, the K tokens of step 1, the K of step 2, ... A beam
    looks at the prefix and at the tokens that it has come through itself (`visible`). So beams
    share a prefix, one that goes on from another takes over its row of `visible`, and no key is
    ever copied. On GPUs shapes stay the same, so that a step can be compiled as one graph.

    `llm.read_prefix` makes one that is kept: more can be read behind it (`extend`), its rows can be
    taken (`rows`), and its end can be forgotten (`cut`)."""

    def __init__(self, llm, B, columns, K, memory):
        layers, heads, hd = llm.cache_shape
        like = llm.lm_head.weight
        self.llm = llm
        self.memory = memory
        self.K = K
        self.P = 0  # columns of the prefix
        self.used = 0  # columns in use
        self.keys, self.values = like.new_zeros(2, layers, B, heads, columns, hd)
        self.visible = torch.zeros(B, 1, K, columns, dtype=torch.bool, device=like.device)
        # of the last tokens read, the same for all beams
        self.positions = torch.full((B, 1), -1, device=like.device)
        self.columns = None  # (S,) of the tokens being read; None for the beginning of a prefix

    def width(self):
        """Columns that a step looks at: on CPUs those in use, else all of them."""
        return self.used if self.keys.device.type == "cpu" else self.keys.shape[-2]

    def mask(self):
        return self.visible[..., : self.width()]

    def __getitem__(self, layer):
        width = self.width()
        keys = self.keys[layer, :, :, :width]
        values = self.values[layer, :, :, :width]
        return keys, values, self.columns

    def check_room(self, S):
        left = self.keys.shape[-2] - self.used
        if S > left:
            raise ValueError(f"the cache has room for {left} positions more, not {S}; give read_prefix "
                             "more room")

    def append(self, S, keep=None):
        """Makes room for S more columns of the prefix, of which keep (B,S) are real; None: all."""
        self.check_room(S)
        start = self.used
        end = start + S
        self.visible[..., start:end] = True if keep is None else keep[:, None, None]
        self.positions += S if keep is None else keep.sum(1, keepdim=True)
        self.columns = torch.arange(start, end, device=self.keys.device) if start else None
        self.P = self.used = end

    def mask_behind(self, mask, S):
        """What the last S columns of the prefix look at: all that came before, and by a mask
        (B,1,S,S) each other; None: causal. -> (B,1,S,columns)"""
        if mask is None:
            mask = torch.ones(S, S, dtype=torch.bool, device=self.keys.device).tril()
        whole = self.mask()[:, :, :1].repeat(1, 1, S, 1)
        whole[..., self.P - S : self.P] = mask
        return whole

    def advance(self, parents=None):
        """Makes room for the next token of each beam; beam k goes on from beam parents[b,k] (B,K),
        or from itself."""
        device = self.visible.device
        if parents is not None:
            index = parents[:, None, :, None].expand_as(self.visible)
            self.visible.copy_(self.visible.gather(2, index))
        if self.used == self.P:
            self.columns = torch.arange(self.K, device=device) + self.P
        else:
            self.columns += self.K
        self.used += self.K
        self.positions += 1
        self.visible[:, 0, torch.arange(self.K, device=device), self.columns] = True

    @torch.inference_mode()
    def extend(self, embeddings, mask=None):
        """Reads (B,S,D) behind the prefix; mask (B,S) bool is False at holes."""
        self.llm.check_cache(self, embeddings)
        self.llm.read_on(self, embeddings, mask)

    @torch.inference_mode()
    def rows(self, index):
        """A cache of its own whose row i goes on from row index[i] of this one. A memory needs a method
        rows(index) for that, too."""
        index = torch.as_tensor(index, device=self.keys.device)
        other = self.copy(index, self.keys.shape[-2], K=1)
        if self.memory is not None:
            other.memory = self.memory.rows(index)
        return other

    def copy(self, index, columns, K):
        """These rows, with so many columns in all, to be continued by K beams."""
        other = Cache(self.llm, len(index), columns, K, self.memory)
        other.keys[..., : self.used, :] = self.keys[:, index, :, : self.used]
        other.values[..., : self.used, :] = self.values[:, index, :, : self.used]
        other.visible[..., : self.used] = self.visible[index, ..., : self.used]
        other.positions.copy_(self.positions[index])
        other.P = other.used = self.used
        return other

    @torch.inference_mode()
    def cut(self, columns):
        """Forgets all but the first columns, holes counted."""
        self.visible[..., columns:] = False
        self.positions.copy_(self.visible[:, 0, 0].sum(1, keepdim=True) - 1)
        self.P = self.used = columns


def remember(cache, k, v):
    """Stores keys and values (B,G,s,hd) that one layer has just computed -> those that the tokens
    at hand look at."""
    keys, values, columns = cache
    k = k.to(keys.dtype)  # under autocast they differ: on GPUs a norm's output is float32
    v = v.to(values.dtype)
    if columns is None:  # a prefix looks at itself only
        keys[:, :, : k.shape[2]] = k
        values[:, :, : v.shape[2]] = v
        return k, v
    return keys.index_copy_(2, columns, k), values.index_copy_(2, columns, v)


def ends_with(ids, stop):
    """(..., n) ids -> (...) bool: do they end with one of the stop sequences?"""
    ended = torch.zeros(ids.shape[:-1], dtype=torch.bool, device=ids.device)
    for sequence in stop:
        if len(sequence) <= ids.shape[-1]:
            ended |= (ids[..., -len(sequence) :] == ids.new_tensor(sequence)).all(-1)
    return ended


def forbid_end(scores, ids, stop):
    """Forbids, in scores (..., V), the token that would complete a stop sequence after ids
    (..., n)."""
    everywhere = torch.ones(ids.shape[:-1], dtype=torch.bool, device=ids.device)
    for *head, last in stop:
        completes = ends_with(ids, [head]) if head else everywhere
        scores[..., last] = scores[..., last].masked_fill(completes, -torch.inf)
    return scores


def penalise_repetition(scores, ids, penalty, start_id=None):
    """Makes ids (..., n) that have been said, and the one that started a decoder, less probable in
    scores (..., V): above 0 these are divided by the penalty, below 0 multiplied (Keskar et al. 2019)."""
    if penalty == 1:
        return scores
    if start_id is not None:
        ids = F.pad(ids, (1, 0), value=start_id)
    said = scores.gather(-1, ids)
    said = torch.where(said < 0, said * penalty, said / penalty)
    return scores.scatter(-1, ids, said)


def without_end(ids, stop):
    """A list of ids up to the first stop sequence."""
    for end in range(1, len(ids) + 1):
        for sequence in stop:
            if ids[max(0, end - len(sequence)) : end] == list(sequence):
                return ids[: end - len(sequence)]
    return ids


def open_end(ids, stop):
    """How many ids at the end of a list may be the beginning of a stop sequence."""
    for n in range(len(ids), 0, -1):
        if any(len(sequence) > n and list(sequence[:n]) == ids[-n:] for sequence in stop):
            return n
    return 0


def sample_next(logits, temperature, top_p):
    """(B,V) -> (B,): the most probable token, or at temperature > 0 one drawn from the smallest set
    of tokens whose probabilities add up to top_p (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
    return ids.gather(1, p.multinomial(1))[:, 0]


def decode_tokens(llm, logits, cache, steps, min_new_tokens, repetition_penalty, temperature, top_p, stop):
    """Greedy decoding or sampling, all rows side by side, until every row has ended. Yields the ids
    so far, (B,n)."""
    ids = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(1, steps + 1):
        scores = logits[:, 0].float()  # (B, V)
        scores = penalise_repetition(scores, ids, repetition_penalty, llm.start_id)
        if n <= min_new_tokens:
            scores = forbid_end(scores, ids, stop)
        next_ids = sample_next(scores, temperature, top_p)
        ids = torch.cat([ids, next_ids[:, None]], dim=1)
        yield ids
        ended |= ends_with(ids, stop)
        if n == steps or llm.have_ended(ended):
            return
        cache.advance()
        logits = llm.step(ids[:, -1:].contiguous(), cache)


def pick(x, index):
    """Of candidates x (B,N,...) those with these numbers (B,K) -> (B,K,...)."""
    index = index.view(*index.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


class Finished:
    """The K best texts of each row that have ended: ids (B,K,steps), -1 behind their ends, and scores
    (B,K), the best first."""

    def __init__(self, B, K, steps, device):
        self.ids = torch.full((B, K, steps), -1, device=device)
        self.scores = torch.full((B, K), -1e9, device=device)

    def add(self, ids, scores):
        """Candidates (B,N,n) with their scores (B,N)."""
        K, steps = self.ids.shape[1:]
        self.scores, chosen = torch.cat([self.scores, scores], dim=1).topk(K)
        padded = F.pad(ids, (0, steps - ids.shape[2]), value=-1)
        self.ids = pick(torch.cat([self.ids, padded], dim=1), chosen)


def lengths(n, stops, prompt_lengths):
    """What beam search divides by, of candidates of n tokens that have ended, and of those that go on:
    their new tokens, or, before transformers 4.36, the prompt's and those without the end mark."""
    if prompt_lengths is None:
        return n, n
    length = (prompt_lengths.clamp(min=1).to(stops.device)[:, None] + n).float()
    return length - stops.float(), length


def beam_search(llm, logits, cache, steps, min_new_tokens, repetition_penalty, K, length_penalty, stop,
                prompt_lengths=None):
    """Beam search with transformers' rules: a hypothesis scores log-probability / length **
    length_penalty (its end mark counts), and a row is done when no running beam, at its present
    length, beats its K finished ones. -> (B, n) ids

    With `prompt_lengths` (B,) the rules are those before transformers 4.36, at batch 1: the length is
    the prompt's and the new tokens', without the end mark; any candidate of the step may keep a row
    going, and what runs out of steps is a hypothesis whether it is among the best K or not."""
    B, _, V = logits.shape
    device = logits.device
    logits = logits.expand(B, K, V)
    beams = torch.empty(B, K, 0, dtype=torch.long, device=device)  # (B, K, n) the running ones
    scores = torch.full((B, K), -1e9, device=device)
    scores[:, 0] = 0  # all start from beam 0
    finished = Finished(B, K, steps, device)
    done = torch.zeros(B, 1, dtype=torch.bool, device=device)
    width = (1 + len(stop)) * K  # candidates looked at: even if the best K all end, K go on
    is_among_best = torch.arange(width, device=device) < K
    for n in range(1, steps + 1):
        log_p = logits.log_softmax(-1, dtype=torch.float32)
        log_p = penalise_repetition(log_p, beams, repetition_penalty, llm.start_id)
        if n <= min_new_tokens:
            log_p = forbid_end(log_p, beams, stop)
        top, index = log_p.add_(scores[..., None]).flatten(1).topk(width)  # (B, width)
        parents = index // V
        next_ids = index % V
        candidates = torch.cat([pick(beams, parents), next_ids[..., None]], dim=-1)  # (B, width, n)
        stops = ends_with(candidates, stop)
        ended = stops | (n == steps)
        counts = ended & is_among_best  # transformers lets only the best K candidates finish
        if prompt_lengths is not None:
            counts |= ended & ~stops
        of_ended, of_running = lengths(n, stops, prompt_lengths)
        finished.add(candidates, (top / of_ended**length_penalty).masked_fill(~counts | done, -1e9))

        scores, chosen = (top - 1e9 * ended).topk(K)
        best = scores[:, :1] if prompt_lengths is None else top[:, :1]
        done |= finished.scores.min(1, keepdim=True).values >= best / of_running**length_penalty
        if n == steps or llm.have_ended(done):
            return finished.ids[:, 0]
        beams = pick(candidates, chosen)
        cache.advance(pick(parents, chosen))
        logits = llm.step(beams[..., -1].contiguous(), cache)


class LanguageModel(nn.Module):
    """What all have in common, given `hidden_states`, `start` (read a prefix) and `step` (read one
    more token of each beam)."""

    weights = None  # "int8" or "nf4" where load_llm has quantised the blocks
    mesh = None  # the processes over which it has sharded them
    start_id = None  # the token that starts a decoder, where there is one

    def finish(self, config):
        """What all constructors end with: ties the head to the word embeddings, and notes which
        tokens end a text."""
        if config["tie_word_embeddings"]:
            self.tie_head()
        self.stop = as_sequences(config.get("eos_token_id"))

    def tie_head(self):
        self.lm_head.weight = self.get_parameter(self.WORDS)

    def embed(self, ids):
        """(B,T) -> (B,T,D): word embeddings, in the space where soft prompts enter."""
        check_ids(ids, self.vocab_size)
        return F.embedding(ids, self.get_parameter(self.WORDS))

    def forward(self, prefix, target_ids, prefix_mask=None, memory=None):
        """(B,P,D), (B,T), (B,P) bool -> logits (B,T,V): row t is the prediction of target t.

        `prefix_mask` is False at holes, anywhere; each row gives what it gives alone with its holes
        taken out. None means no holes and takes the fast path. Targets of -100 stand behind a row's
        real targets. `memory`: see the top of this file."""
        x = self.hidden_states(prefix, target_ids, prefix_mask, memory)
        return word_scores(self.lm_head, x)

    def loss(self, prefix, target_ids, prefix_mask=None, scored=None, memory=None):
        """As `forward` -> (sum of cross-entropies in float32, number of tokens); -100 does not
        count.

        scored (B,T) bool: the targets that count (a conversation's answers), of which alone the
        head reads. Leave it on the CPU, and no GPU has to wait."""
        check_scored(scored, target_ids)
        x = self.hidden_states(prefix, target_ids, prefix_mask, memory)
        return target_loss(self.lm_head, x, target_ids, scored)

    def as_read(self):
        """{name: tensor} as the checkpoint has them, for a fingerprint."""
        tensors = as_read(self)
        for name, _ in quantised(self):
            del tensors[f"{name}.weight_scale"]
        return tensors

    def have_ended(self, rows):
        """(B,) bool -> bool: have all texts ended, those of the other processes, too, where blocks are
        sharded? Till then all must go on."""
        if self.mesh is None:
            return rows.all()
        going_on = (~rows).sum()
        dist.all_reduce(going_on, group=self.mesh.get_group())
        return going_on == 0

    @property
    def largest_quantised(self):
        """Numbers of the largest quantised matrix, one of which at a time exists as such; 0: none is
        quantised."""
        return max((module.shape.numel() for _, module in quantised(self)), default=0)

    def check_targets(self, target_ids):
        if target_ids.ndim != 2:
            raise ValueError(f"targets must be (B,T), not {tuple(target_ids.shape)}; several captions behind "
                             "one prefix are for the loss of decoder-only LLMs")
        check_ids(filled(target_ids), self.vocab_size)

    @torch.inference_mode()
    def generate(self, prefix, prefix_mask=None, max_new_tokens=30, num_beams=1, length_penalty=1.0,
                 min_new_tokens=0, temperature=0.0, top_p=1.0, stop=None, memory=None, cache=None,
                 prompt_lengths=None, repetition_penalty=1.0):
        """Continues a prefix. (B,P,D), (B,P) bool -> B lists of ids, without the stop sequence and
        what follows.

        `stop` holds the sequences of ids that end a text, such as ((2,), (835,), (2277, 29937));
        None: the checkpoint's end marks. `max_new_tokens` counts the end mark; none of the first
        `min_new_tokens` ids completes one. num_beams > 1 is beam search (temperature 0 only);
        temperature > 0 samples from the `top_p` nucleus. A repetition_penalty above 1 makes ids that a
        text already holds less probable; the prefix does not count. `prompt_lengths` (B,) makes the
        length that beam search penalises count so many tokens of each row's prompt, as transformers
        did before 4.36; VPGTrans's and BLIP-2's scores of questions rest on that.

        With a cache (`read_prefix`) the prefix is what comes behind it; the memory is the cache's,
        and the cache stays as it is."""
        stop = self.stop if stop is None else stop
        check_generation(max_new_tokens, num_beams, temperature, top_p, stop, repetition_penalty)
        cache = self.new_cache(prefix, max_new_tokens, num_beams, memory, cache)
        logits = self.start(prefix, prefix_mask, cache)
        if prompt_lengths is not None and not isinstance(self, DecoderOnly):
            prompt_lengths = torch.ones_like(prompt_lengths)  # T5's decoder reads its start token alone
        if num_beams > 1:
            ids = beam_search(self, logits, cache, max_new_tokens, min_new_tokens, repetition_penalty,
                              num_beams, length_penalty, stop, prompt_lengths)
        else:
            *_, ids = decode_tokens(self, logits, cache, max_new_tokens, min_new_tokens,
                                    repetition_penalty, temperature, top_p, stop)
        rows = [[i for i in row if i >= 0] for row in ids.tolist()]  # -1 is behind a beam's end
        return [without_end(row, stop) for row in rows]

    def stream(self, prefix, prefix_mask=None, max_new_tokens=30, min_new_tokens=0, temperature=0.0,
               top_p=1.0, stop=None, memory=None, cache=None, repetition_penalty=1.0):
        """As `generate` for one row (1,P,D), but yields its ids as they come. Ids that may be the
        beginning of a stop sequence are held back until that is decided.

        With a cache of one row, what is read stays in it, and it needs room for that: the prefix
        and all ids but the last, the stop sequence's among them. `cache.used` counts them, also
        after a stream that was closed or interrupted."""
        stop = self.stop if stop is None else stop
        check_generation(max_new_tokens, 1, temperature, top_p, stop, repetition_penalty)
        if len(prefix) != 1:
            raise ValueError(f"stream: one row, not {len(prefix)}; generate takes several")
        if cache is None:
            cache = self.new_cache(prefix, max_new_tokens, 1, memory)
        else:
            self.check_cache(cache, prefix, memory)
            cache.check_room(prefix.shape[1] + max_new_tokens - 1)
        options = max_new_tokens, min_new_tokens, repetition_penalty, temperature, top_p, stop
        return stream_tokens(self, prefix, prefix_mask, cache, options)

    def read_prefix(self, prefix, prefix_mask=None, room=0, memory=None):
        raise ValueError(f"{type(self).__name__} has an encoder, which reads a prefix whole: give all of "
                         "it to generate or stream")

    def check_cache(self, cache, prefix, memory=None):
        """ValueError where a cache does not go with what comes behind it."""
        if cache.llm is not self:
            raise ValueError("the cache is another language model's")
        if memory is not None:
            raise ValueError("the memory behind a cache is the one that read_prefix was given")
        B = len(cache.positions)
        if len(prefix) != B:
            raise ValueError(f"the cache has {B} rows, what comes behind it {len(prefix)}; cache.rows(index) "
                             "takes rows")


@torch.inference_mode()
def stream_tokens(llm, prefix, prefix_mask, cache, options):
    """Yields the ids of one row as they are decided; the cache keeps what has been read."""
    *_, stop = options
    complete = cache.used  # columns with their keys
    given = 0
    try:
        logits = llm.start(prefix, prefix_mask, cache)
        for ids in decode_tokens(llm, logits, cache, *options):
            complete = cache.used
            (ids,) = ids.tolist()
            text = without_end(ids, stop)
            if text == ids:
                text = ids[: len(ids) - open_end(ids, stop)]
            yield from text[given:]
            given = len(text)
        yield from without_end(ids, stop)[given:]
    finally:
        cache.cut(complete)  # a step that was interrupted has left a column without keys


def check_generation(max_new_tokens, num_beams, temperature, top_p, stop=(), repetition_penalty=1.0):
    """ValueError for options of `generate` that make no sense."""
    for name, number in {"max_new_tokens": max_new_tokens, "num_beams": num_beams}.items():
        if number < 1:
            raise ValueError(f"generate: {name} = {number} must be at least 1")
    if num_beams > 1 and temperature > 0:
        raise ValueError("generate: beam search does not sample; use num_beams = 1 or temperature = 0")
    if not (temperature == 0 or 1e-3 <= temperature < math.inf) or not 0 <= top_p <= 1:
        raise ValueError(f"generate: temperature = {temperature} must be 0 or at least 0.001, and top_p = "
                         f"{top_p} from 0 to 1")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"generate: repetition_penalty = {repetition_penalty} must be above 0; 1 is none")
    if not all(isinstance(sequence, (tuple, list)) and sequence for sequence in stop):
        raise ValueError(f"generate: stop = {stop} must be sequences of at least one id each, such as "
                         "((2,),)")


class DecoderOnly(LanguageModel):
    """[prefix | target] read by one stack of layers: what OPT and LLaMA have in common, given
    `embed` and `read`.

    At most `longest` positions can be read, if that is not None; a cache has `kv_heads` heads of
    width `head_dim`."""

    @property
    def cache_shape(self):
        """Layers, heads and their width, for a cache."""
        return len(self.layers), self.kv_heads, self.head_dim

    def check_length(self, S):
        if self.longest is not None and S > self.longest:
            raise ValueError(f"{S} positions (prefix, holes included, and target) are more than this "
                             f"{type(self).__name__}'s {self.longest} (OPT's max_position_embeddings, else "
                             "the sliding_window, beyond which attention is not implemented); shorten them")

    def lay_out(self, prefix, prefix_mask, T):
        """A prefix (B,P,D) with T tokens behind it -> the prefix with its holes moved to the left
        end, which positions are real (B,P) or None, the positions' numbers (B or 1,P+T), and the
        mask or None, which is causal."""
        prefix, prefix_mask = take_prefix(prefix, prefix_mask, self.dim, self.lm_head.weight.dtype)
        S = prefix.shape[1] + T
        self.check_length(S)
        if prefix_mask is None:
            return prefix, None, torch.arange(S, device=prefix.device)[None], None
        keep = F.pad(prefix_mask, (0, T), value=True)  # (B, S)
        return prefix, prefix_mask, real_positions(keep), causal_mask(keep)

    def hidden_states(self, prefix, target_ids, prefix_mask=None, memory=None):
        """As `forward` -> (B,T,D): what the head reads to predict target t."""
        self.check_targets(target_ids)
        read_ids = filled(target_ids[:, :-1])  # the last target is predicted, not read
        prefix, _, positions, mask = self.lay_out(prefix, prefix_mask, read_ids.shape[1])
        x = torch.cat([prefix, self.embed(read_ids)], dim=1)
        x = self.read(x, positions, mask, memory=memory)
        return x[:, prefix.shape[1] - 1 :]

    def loss(self, prefix, target_ids, prefix_mask=None, scored=None, memory=None):
        """(B,P,D), (B,T) or (B,K,T), (B,P) bool -> (sum of cross-entropies in float32, number of
        tokens); -100 does not count.

        scored (B,T) bool: the targets that count, of which alone the head reads; see `loss` of
        LanguageModel.

        K captions share one prefix, which is read once: each sees the prefix and itself, and its
        positions go on from the prefix's, so that the loss is the sum of what they give alone.
        Leave their ids on the CPU, and no GPU has to wait."""
        check_scored(scored, target_ids)
        if target_ids.ndim == 2:
            return super().loss(prefix, target_ids, prefix_mask, scored, memory)
        return self.packed_loss(prefix, target_ids, prefix_mask, memory)

    def packed_loss(self, prefix, target_ids, prefix_mask, memory):
        """The loss of K captions behind one prefix."""
        _, K, T = target_ids.shape
        check_ids(filled(target_ids), self.vocab_size)
        self.check_length(prefix.shape[1] + T - 1)
        device = prefix.device
        packed = *pack_captions(target_ids), target_ids[..., 0]
        ids, caption, place, targets, first_targets = (x.to(device, non_blocking=True) for x in packed)

        prefix, keep = take_prefix(prefix, prefix_mask, self.dim, self.lm_head.weight.dtype)
        P = prefix.shape[1]
        if keep is None:
            keep = torch.ones(prefix.shape[:2], dtype=torch.bool, device=device)
        behind = keep.sum(1, keepdim=True) + place  # (B, S - P)
        positions = torch.cat([real_positions(keep), behind], dim=1)  # (B, S)
        caption = F.pad(caption, (P, 0), value=-1)  # (B, S), -1: the prefix
        reader = caption[:, :, None]
        read = caption[:, None, :]
        sees = (reader == read) | (read == -1)  # (B, S, S)
        keep = F.pad(keep, (0, ids.shape[1]), value=True)
        mask = causal_mask(keep) & sees[:, None]
        words = self.embed(filled(ids))
        x = torch.cat([prefix, words], dim=1)  # (B, S, D)
        x = self.read(x, positions, mask, memory=memory)

        firsts = x[:, P - 1, None].expand(-1, K, -1)  # the prefix's last position predicts all first tokens
        x = torch.cat([firsts, x[:, P:]], dim=1)
        targets = torch.cat([first_targets, targets], dim=1)
        return target_loss(self.lm_head, x, targets)

    @torch.inference_mode()
    def read_prefix(self, prefix, prefix_mask=None, room=0, memory=None):
        """Reads a prefix (B,P,D) once, for many questions or turns -> its Cache, with room for so many
        positions more."""
        columns = prefix.shape[1] + room
        self.check_length(columns)
        cache = Cache(self, len(prefix), columns, 1, memory)
        self.read_on(cache, prefix, prefix_mask)
        return cache

    def read_on(self, cache, x, mask):
        """Reads (B,S,D) behind what a cache holds -> (B,S,D) hidden states."""
        before = cache.used
        x, keep, positions, mask = self.lay_out(x, mask, 0)
        S = x.shape[1]
        self.check_length(before + S)
        if before:
            positions = cache.positions + 1 + positions
        cache.append(S, keep)
        if before:
            mask = cache.mask_behind(mask, S)
        return self.read(x, positions, mask, cache, cache.memory)

    def new_cache(self, prefix, steps, K, memory=None, cache=None):
        """A cache for a prefix, and for that many steps of K beams; behind another cache, a copy of
        that."""
        P = prefix.shape[1]
        if cache is not None:
            self.check_cache(cache, prefix, memory)
            P += cache.used
        self.check_length(P + steps - 1)
        columns = P + (steps - 1) * K
        if cache is None:
            return Cache(self, len(prefix), columns, K, memory)
        every_row = torch.arange(len(prefix), device=prefix.device)
        return cache.copy(every_row, columns, K)

    def start(self, prefix, prefix_mask, cache):
        """Reads a prefix into a cache -> logits of the next token (B,1,V)."""
        x = self.read_on(cache, prefix, prefix_mask)
        return word_scores(self.lm_head, x[:, -1:])

    def step(self, ids, cache):
        """Reads one more token of each beam, (B,K) -> logits of the next (B,K,V)."""
        x = self.read(self.embed(ids), cache.positions, cache.mask(), cache, cache.memory)
        return word_scores(self.lm_head, x)


# -------------------------------------------------------------------------- OPT (Zhang et al. 2022)


class OPTAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, mask, cache):
        q = split_heads(self.q_proj(x), self.head_dim)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        if cache is not None:
            k, v = remember(cache, k, v)
        x = attention(q, k, v, mask, causal=mask is None)
        return self.out_proj(merge_heads(x))


class OPTLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        self.pre_norm = config["do_layer_norm_before"]  # False in opt-350m alone
        self.self_attn = OPTAttention(dim, config["num_attention_heads"])
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config["ffn_dim"])
        self.fc2 = nn.Linear(config["ffn_dim"], dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def feed_forward(self, x, memory):
        y = self.fc2(self.fc1(x).relu())
        return add_memory(y, memory, x, F.relu)

    def forward(self, x, mask=None, cache=None, memory=None):
        if self.pre_norm:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.feed_forward(self.final_layer_norm(x), memory)
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.feed_forward(x, memory))


class OPTDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        word_dim = config["word_embed_proj_dim"]
        self.embed_tokens = Embedding(config["vocab_size"], word_dim)
        # two rows more than there are positions: rows 0 and 1 are never read
        self.embed_positions = Embedding(config["max_position_embeddings"] + 2, dim)
        self.project_in = nn.Linear(word_dim, dim, bias=False) if word_dim != dim else None
        self.project_out = nn.Linear(dim, word_dim, bias=False) if word_dim != dim else None
        self.layers = nn.ModuleList(OPTLayer(config) for _ in range(config["num_hidden_layers"]))
        has_final_norm = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
        self.final_layer_norm = nn.LayerNorm(dim) if has_final_norm else None


class OPT(DecoderOnly):
    """OPT, 125M to 66B, the odd opt-350m included. `config` is the checkpoint's config.json as a
    dict.

    Frozen weights are the caller's choice (`load_llm` freezes); there is no dropout in this
    file."""

    DEFAULTS = dict(do_layer_norm_before=True, _remove_final_layer_norm=False, activation_function="relu",
                    vocab_size=50272, max_position_embeddings=2048, enable_bias=True,
                    layer_norm_elementwise_affine=True, hidden_size=768, num_hidden_layers=12,
                    num_attention_heads=12, ffn_dim=3072, tie_word_embeddings=True, eos_token_id=2)
    ONLY = dict(activation_function="relu", enable_bias=True, layer_norm_elementwise_affine=True)
    WORDS = "model.decoder.embed_tokens.weight"
    PROJECT_IN = "model.decoder.project_in.weight"

    def __init__(self, config):
        super().__init__()
        config = read_options(config, self.DEFAULTS, self.ONLY)
        self.dim = config["hidden_size"]
        self.vocab_size = config["vocab_size"]
        self.longest = config["max_position_embeddings"]
        self.kv_heads = config["num_attention_heads"]
        self.head_dim = self.dim // self.kv_heads
        config["word_embed_proj_dim"] = config.get("word_embed_proj_dim") or self.dim
        self.model = nn.ModuleDict({"decoder": OPTDecoder(config)})
        self.lm_head = nn.Linear(config["word_embed_proj_dim"], self.vocab_size, bias=False)
        self.finish(config)

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return self.model["decoder"].layers

    def embed(self, ids):
        """(B,T) -> (B,T,D): word embeddings in the space where soft prompts enter (after
        project_in)."""
        x = super().embed(ids)
        project_in = self.model["decoder"].project_in
        return x if project_in is None else project_in(x)

    def read(self, x, positions, mask=None, cache=None, memory=None):
        """(B,S,D) embeddings -> (B,S,D) hidden states; positions count a row's real positions from
        0."""
        decoder = self.model["decoder"]
        x = x + decoder.embed_positions(positions + 2)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if cache is None else cache[i], memory)
        if decoder.final_layer_norm is not None:
            x = decoder.final_layer_norm(x)
        return x if decoder.project_out is None else decoder.project_out(x)

    @staticmethod
    def checkpoint_name(name):
        """The name here of a tensor of a checkpoint: old OPT files lack `model.`."""
        return "model." + name if name.startswith("decoder.") else name


# ----------------------- LLaMA (Touvron et al. 2023) and its family: Vicuna, Mistral, SmolLM2, Qwen


def rotary_frequencies(config, hd):
    """Angles a position by which pairs of a head's dimensions turn: (hd/2,) float32. RoPE (Su et
    al. 2021), and what lengthens it: `linear` (Chen et al. 2023) and `llama3`, which slows the slow
    ones down and keeps the fast ones.

    Older files say rope_theta and rope_scaling {type}, newer ones rope_parameters {rope_theta,
    rope_type}."""
    rope = {"rope_theta": config.get("rope_theta") or 1e4}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rotary_share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type = {kind!r} is not implemented; only 'default', 'linear' and "
                         "'llama3' are")
    if rotary_share != 1.0:
        raise ValueError(f"partial_rotary_factor = {rotary_share} is not implemented; only 1.0 is")
    frequencies = rope["rope_theta"] ** -(torch.arange(0, hd, 2, device="cpu").float() / hd)
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        # turns that a pair makes in the length that it was trained on
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope["factor"])
    return frequencies


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i + hd/2}) of (B,H,S,hd) by the angles of their positions; cos and
    sin (B or 1,1,S,hd)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class LLaMAAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        bias = config["qkv_bias"]
        self.head_dim = config["head_dim"]
        width = config["num_attention_heads"] * self.head_dim
        kv_width = config["num_key_value_heads"] * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias)
        self.k_proj = nn.Linear(dim, kv_width, bias)
        self.v_proj = nn.Linear(dim, kv_width, bias)
        self.o_proj = nn.Linear(width, dim, bias=config["attention_bias"])
        norm_eps = config["rms_norm_eps"]
        if config["qk_norm"]:
            self.q_norm = nn.RMSNorm(self.head_dim, norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, rotation, mask, cache):
        q = split_heads(self.q_proj(x), self.head_dim)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        q = rotate(self.q_norm(q), *rotation)
        k = rotate(self.k_norm(k), *rotation)
        if cache is not None:
            k, v = remember(cache, k, v)
        x = attention(q, k, v, mask, causal=mask is None)
        return self.o_proj(merge_heads(x))


class LLaMALayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        hidden = config["intermediate_size"]
        bias = config["mlp_bias"]
        self.input_layernorm = nn.RMSNorm(dim, config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(dim, config["rms_norm_eps"])
        self.self_attn = LLaMAAttention(config)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(dim, hidden, bias),
            "up_proj": nn.Linear(dim, hidden, bias),
            "down_proj": nn.Linear(hidden, dim, bias)})

    def feed_forward(self, x, memory):
        gate = F.silu(self.mlp["gate_proj"](x))
        y = self.mlp["down_proj"](gate * self.mlp["up_proj"](x))
        return add_memory(y, memory, x, F.silu)

    def forward(self, x, rotation, mask=None, cache=None, memory=None):
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.feed_forward(self.post_attention_layernorm(x), memory)


class LLaMA(DecoderOnly):
    """LLaMA 1 to 3.3, Vicuna, Mistral, SmolLM2, Qwen2 and 2.5, Qwen3. `config` is the checkpoint's
    config.json as a dict."""

    DEFAULTS = dict(hidden_act="silu", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=None, head_dim=None,
                    rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
                    sliding_window=None, qk_norm=False, eos_token_id=2)
    QWEN = dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, use_sliding_window=False,
                sliding_window=4096, eos_token_id=None)
    MEMBERS = {  # what the members of the family do in their own way, where their config.json does not say
        "llama": {},
        "mistral": dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096),
        "qwen2": QWEN | dict(qkv_bias=True),
        "qwen3": QWEN | dict(qk_norm=True, head_dim=128)}
    ONLY = dict(hidden_act="silu")
    WORDS = "model.embed_tokens.weight"
    PROJECT_IN = None

    def __init__(self, config):
        super().__init__()
        config = read_options(config, self.DEFAULTS | self.MEMBERS[config["model_type"]], self.ONLY)
        heads = config["num_attention_heads"]
        config["num_key_value_heads"] = self.kv_heads = config["num_key_value_heads"] or heads
        config["head_dim"] = self.head_dim = config["head_dim"] or config["hidden_size"] // heads
        config.setdefault("qkv_bias", config["attention_bias"])
        self.dim = config["hidden_size"]
        self.vocab_size = config["vocab_size"]
        # sliding windows are not implemented; a text no longer than the window does not notice
        self.longest = config["sliding_window"] if config.get("use_sliding_window", True) else None
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(self.vocab_size, self.dim),
            "norm": nn.RMSNorm(self.dim, config["rms_norm_eps"]),
            "layers": nn.ModuleList(LLaMALayer(config) for _ in range(config["num_hidden_layers"]))})
        self.lm_head = nn.Linear(self.dim, self.vocab_size, bias=False)
        self.finish(config)
        self.register_buffer("frequencies", rotary_frequencies(config, self.head_dim), persistent=False)

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return self.model["layers"]

    def read(self, x, positions, mask=None, cache=None, memory=None):
        """(B,S,D) embeddings -> (B,S,D) hidden states; positions (B or 1,S) count a row's real
        positions from 0."""
        angles = (positions[:, None, :, None] * self.frequencies).repeat(1, 1, 1, 2)  # (B or 1, 1, S, hd)
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, None if cache is None else cache[i], memory)
        return self.model["norm"](x)

    @staticmethod
    def checkpoint_name(name):
        """The name here of a tensor of a checkpoint: old files hold rotary frequencies, which
        follow from config.json."""
        return None if name.endswith("rotary_emb.inv_freq") else name


# ------------------------------------------------ T5 and Flan-T5 (Raffel et al. 2020, Chung et al. 2022)


def relative_buckets(distance, bidirectional, buckets, farthest):
    """Key position minus query position -> index into the table of biases: half of the buckets for
    small distances, one each; the others for ranges that widen logarithmically up to `farthest`.
    Both signs have buckets if bidirectional."""
    sign = 0
    if bidirectional:
        buckets //= 2
        sign = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    near = buckets // 2
    log_distance = (distance.clamp(min=1).float() / near).log()
    far = near + (log_distance / math.log(farthest / near) * (buckets - near)).long()
    return sign + torch.where(distance < near, distance, far.clamp(max=buckets - 1))


class T5Attention(nn.Module):
    """Without 1/sqrt(hd); positions are known by a bias that block 0 holds for all blocks."""

    def __init__(self, config, holds_bias=False):
        super().__init__()
        dim = config["d_model"]
        heads = config["num_heads"]
        self.head_dim = config["d_kv"]
        self.q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.o = nn.Linear(heads * self.head_dim, dim, bias=False)
        if holds_bias:
            self.relative_attention_bias = Embedding(config["relative_attention_num_buckets"], heads)

    def keys_values(self, x):
        """(B,S,D) -> what may be looked at there, (B,H,S,hd) each."""
        k = split_heads(self.k(x), self.head_dim)
        v = split_heads(self.v(x), self.head_dim)
        return k, v

    def forward(self, x, keys_values, mask):
        q = split_heads(self.q(x), self.head_dim)
        x = attention(q, *keys_values, mask, scale=1.0)
        return self.o(merge_heads(x))


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class T5FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["d_model"]
        hidden = config["d_ff"]
        self.activation = ACTIVATIONS[config["dense_act_fn"]]
        self.is_gated = config["is_gated_act"]  # False in T5 v1.0 alone
        if self.is_gated:
            self.wi_0 = nn.Linear(dim, hidden, bias=False)
            self.wi_1 = nn.Linear(dim, hidden, bias=False)
        else:
            self.wi = nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, memory):
        if self.is_gated:
            y = self.activation(self.wi_0(x)) * self.wi_1(x)
        else:
            y = self.activation(self.wi(x))
        return add_memory(self.wo(y), memory, x, self.activation)


class T5Block(nn.Module):
    """Self-attention, in the decoder attention to what the encoder has read, feed-forward; each
    with its norm."""

    def __init__(self, config, decodes, first):
        super().__init__()
        cross_attention = [("EncDecAttention", T5Attention(config))] if decodes else []
        parts = [
            ("SelfAttention", T5Attention(config, holds_bias=first)),
            *cross_attention,
            ("DenseReluDense", T5FeedForward(config))]
        self.layer = nn.ModuleList()
        for name, part in parts:
            norm = nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])
            self.layer.append(nn.ModuleDict({name: part, "layer_norm": norm}))

    def forward(self, x, mask, encoded=None, encoded_mask=None, cache=None, memory=None):
        """`encoded`, for a decoder's block: what the encoder has read (B,P,D), or the keys and values
        (B,H,P,hd) that this block has made of it before. -> x, and these where there is a cache, else None"""
        attend = self.layer[0]["SelfAttention"]
        y = self.layer[0]["layer_norm"](x)
        keys_values = attend.keys_values(y)
        if cache is not None:
            keys_values = remember(cache, *keys_values)
        x = x + attend(y, keys_values, mask)
        if encoded is not None:
            attend = self.layer[1]["EncDecAttention"]
            if isinstance(encoded, torch.Tensor):
                encoded = attend.keys_values(encoded)
            y = self.layer[1]["layer_norm"](x)
            x = x + attend(y, encoded, encoded_mask)
        y = self.layer[-1]["layer_norm"](x)
        x = x + self.layer[-1]["DenseReluDense"](y, memory)
        return x, None if cache is None else encoded


class T5Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config, layers, decodes):
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, decodes, first=i == 0) for i in range(layers))
        self.final_layer_norm = nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])
        self.bidirectional = not decodes
        self.farthest = config["relative_attention_max_distance"]

    def bias(self, queries, keys, keep=None):
        """Positions (Sq,) and (Sk,) -> (B or 1,H,Sq,Sk), to be added to the scores; keep broadcasts
        to that."""
        table = self.block[0].layer[0]["SelfAttention"].relative_attention_bias
        distance = keys - queries[:, None]
        buckets = relative_buckets(distance, self.bidirectional, table.num_embeddings, self.farthest)
        bias = rearrange(table(buckets), "q k h -> 1 h q k")
        return bias if keep is None else bias.masked_fill(~keep, torch.finfo(bias.dtype).min)


class T5(LanguageModel):
    """T5 v1.0 and v1.1, Flan-T5, base to XXL. The encoder reads the prefix, soft prompts included,
    the decoder the target.

    `config` is the checkpoint's config.json as a dict."""

    DEFAULTS = dict(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=None,
                    num_heads=8, relative_attention_num_buckets=32, relative_attention_max_distance=128,
                    layer_norm_epsilon=1e-6, feed_forward_proj="relu", tie_word_embeddings=True,
                    decoder_start_token_id=0, eos_token_id=1)
    # "gated-gelu" alone means the tanh form (google's files); BLIP-2's files say that theirs is exact
    FEED_FORWARD = {
        "relu": dict(dense_act_fn="relu", is_gated_act=False),
        "gated-gelu": dict(dense_act_fn="gelu_new", is_gated_act=True)}
    WORDS = "shared.weight"
    PROJECT_IN = None

    def __init__(self, config):
        super().__init__()
        kind = config.get("feed_forward_proj", self.DEFAULTS["feed_forward_proj"])
        if kind not in self.FEED_FORWARD:
            raise ValueError(f"feed_forward_proj = {kind!r} is not implemented for T5; only "
                             f"{', '.join(self.FEED_FORWARD)} are")
        form = self.FEED_FORWARD[kind]
        config = read_options(config, self.DEFAULTS | form, only=dict(is_gated_act=form["is_gated_act"]))
        activation = config["dense_act_fn"]
        if activation not in ACTIVATIONS:
            raise ValueError(f"dense_act_fn = {activation!r} is not implemented for T5; only "
                             f"{', '.join(ACTIVATIONS)} are")
        self.dim = config["d_model"]
        self.vocab_size = config["vocab_size"]
        self.heads = config["num_heads"]
        self.head_dim = config["d_kv"]
        self.start_id = config["decoder_start_token_id"]
        decoder_layers = config["num_decoder_layers"] or config["num_layers"]
        self.shared = Embedding(self.vocab_size, self.dim)
        self.encoder = T5Stack(config, config["num_layers"], decodes=False)
        self.decoder = T5Stack(config, decoder_layers, decodes=True)
        self.lm_head = nn.Linear(self.dim, self.vocab_size, bias=False)
        self.finish(config)
        # a tied head reads scaled hidden states (T5 1.0); today's writer ties all, and says apart which scale
        is_scaled = config.get("scale_decoder_outputs", config["tie_word_embeddings"])
        self.scale = self.dim**-0.5 if is_scaled else 1.0

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return [*self.encoder.block, *self.decoder.block]

    @property
    def cache_shape(self):
        """Layers, heads and their width, for a cache."""
        return len(self.decoder.block), self.heads, self.head_dim

    def encode(self, prefix, prefix_mask, memory):
        """The encoder: (B,P,D), (B,P) bool or None -> what it has read (B,P,D), once for each block of
        the decoder, and the mask."""
        x, prefix_mask = take_prefix(prefix, prefix_mask, self.dim, self.shared.weight.dtype)
        keep = None if prefix_mask is None else prefix_mask[:, None, None]  # (B, 1, 1, P)
        positions = torch.arange(x.shape[1], device=x.device)
        bias = self.encoder.bias(positions, positions, keep)
        for block in self.encoder.block:
            x, _ = block(x, bias, memory=memory)
        x = self.encoder.final_layer_norm(x)
        return [x] * len(self.decoder.block), keep

    def decode(self, x, bias, encoded, keep, cache=None, memory=None):
        """The decoder: (B,T,D) embeddings -> (B,T,D) what the head reads. With a cache, each block leaves
        in the list `encoded` the keys and values that it has made, for the tokens to come."""
        for i, block in enumerate(self.decoder.block):
            x, encoded[i] = block(x, bias, encoded[i], keep, None if cache is None else cache[i], memory)
        return self.decoder.final_layer_norm(x) * self.scale

    def hidden_states(self, prefix, target_ids, prefix_mask=None, memory=None):
        """As `forward` -> (B,T,D): what the head reads to predict target t."""
        self.check_targets(target_ids)
        encoded, keep = self.encode(prefix, prefix_mask, memory)
        read_ids = filled(target_ids[:, :-1])  # the last target is predicted, not read
        read_ids = F.pad(read_ids, (1, 0), value=self.start_id)
        positions = torch.arange(read_ids.shape[1], device=read_ids.device)
        causal = positions[:, None] >= positions
        bias = self.decoder.bias(positions, positions, causal)
        return self.decode(self.embed(read_ids), bias, encoded, keep, memory=memory)

    def new_cache(self, prefix, steps, K, memory=None, cache=None):
        """A cache for the token that starts the decoder, and for that many steps of K beams."""
        if cache is not None:
            self.check_cache(cache, prefix, memory)
        return Cache(self, len(prefix), 1 + (steps - 1) * K, K, memory)

    def start(self, prefix, prefix_mask, cache):
        """Reads a prefix, and the token that starts the decoder, into a cache -> logits (B,1,V)."""
        cache.encoded, cache.keep = self.encode(prefix, prefix_mask, cache.memory)
        start_ids = torch.full((len(prefix), 1), self.start_id, device=prefix.device)
        x = self.embed(start_ids)
        cache.append(1)
        position = torch.zeros(1, dtype=torch.long, device=x.device)
        bias = self.decoder.bias(position, position)
        x = self.decode(x, bias, cache.encoded, cache.keep, cache, cache.memory)
        return word_scores(self.lm_head, x)

    def step(self, ids, cache):
        """Reads one more token of each beam, (B,K) -> logits of the next (B,K,V)."""
        columns = torch.arange(cache.width(), device=ids.device)
        step = (columns - cache.P).div(cache.K, rounding_mode="floor")  # in which each column's token came
        bias = self.decoder.bias(cache.positions[0], cache.P + step, cache.mask())
        x = self.decode(self.embed(ids), bias, cache.encoded, cache.keep, cache, cache.memory)
        return word_scores(self.lm_head, x)

    @staticmethod
    def checkpoint_name(name):
        """The name here of a tensor of a checkpoint: the word embeddings have three names, and old
        files a bias in vain."""
        if name.endswith("EncDecAttention.relative_attention_bias.weight"):
            return None
        return "shared.weight" if name.endswith("coder.embed_tokens.weight") else name


# ------------------------------------------------------------------------------ quantised frozen weights

BLOCK = 64  # numbers of nf4 that share a scale


def to_int8(rows):
    """(out,in) float32 -> codes (out,in) int8, scales (out,1) float32: each row in steps of 1/127.5 of
    its largest number, as torchao's int8 weights."""
    scale = rows.abs().amax(1, keepdim=True) / 127.5
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    codes = (rows * (1 / scale)).round().clamp(-128, 127)
    return codes.to(torch.int8), scale


def nf4_numbers():
    """The 16 numbers of NF4, from -1 to 1: quantiles of a normal distribution, 7 below zero and 8 above
    (Dettmers et al. 2023, "QLoRA"). So the weights of a block, each divided by the largest, use them
    about equally often."""
    quantile = NormalDist().inv_cdf
    last = 0.9677083  # bitsandbytes' choice: halfway between 1 - 1/30 and 1 - 1/32
    below = [-quantile(last + (0.5 - last) * i / 7) for i in range(7)]
    above = [quantile(last + (0.5 - last) * i / 8) for i in range(8)]
    return torch.tensor([*below, 0.0, *reversed(above)], device="cpu") / above[0]


def to_nf4(rows):
    """(out,in) float32 -> codes (out,in/2) uint8, two numbers a byte, the first in its high bits; scales
    (out * in/64,1) float32, as bitsandbytes' nf4 without its double quantisation."""
    blocks = rows.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)
    numbers = nf4_numbers().to(rows.device)
    codes = torch.bucketize(shares, (numbers[1:] + numbers[:-1]) / 2, out_int32=True)
    first, second = codes.to(torch.uint8).view(len(rows), -1, 2).unbind(-1)
    return first << 4 | second, scale


def empty_codes(weights, out, width):
    """Codes and scales of a matrix (out,in), on the meta device. torch.empty alone makes them: to encode
    a matrix there torch would import its compiler, which takes seconds."""
    if weights == "nf4" and (width % 2 or out * width % BLOCK):
        raise ValueError(f"nf4 has blocks of {BLOCK} numbers, into which a matrix of {out} x {width} cannot "
                         "be cut; use int8")
    with torch.device("meta"):
        if weights == "int8":
            return torch.empty(out, width, dtype=torch.int8), torch.empty(out, 1)
        return torch.empty(out, width // 2, dtype=torch.uint8), torch.empty(out * width // BLOCK, 1)


@lru_cache
def nf4_pairs(dtype, device):
    """The two numbers that each byte stands for, as the bits of one: looked up so, they are several
    times faster on CPUs. (256,)"""
    numbers = nf4_numbers().to(device, dtype)
    pairs = torch.stack([numbers.repeat_interleave(16), numbers.repeat(16)], dim=1)
    as_wide = {2: torch.int32, 4: torch.int64, 8: torch.complex128}
    return pairs.view(as_wide[dtype.itemsize])[:, 0]


def decode(codes, scale, dtype):
    """What to_int8 or to_nf4 has made -> the matrix (out,in)."""
    if codes.dtype == torch.int8:
        return codes.to(dtype) * scale.to(dtype)
    numbers = nf4_pairs(dtype, codes.device).index_select(0, codes.flatten().int()).view(dtype)
    return (numbers.view(-1, BLOCK) * scale.to(dtype)).view(len(codes), -1)


# One operation, into which torch.compile does not look: else it would keep every decoded matrix for
# the backward pass, which is the memory that was to be saved.
@torch.library.custom_op("vpgtrans::decode_multiply", mutates_args=())
def decode_multiply(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, back: bool) -> torch.Tensor:
    """x (...,in) times the matrix (out,in) of these codes -> (...,out); back: (...,out) -> (...,in)."""
    matrix = decode(codes, scale, x.dtype)
    return x @ matrix if back else F.linear(x, matrix)


def product_width(codes, back):
    """The last dimension of what decode_multiply returns."""
    out, width = codes.shape
    if not back:
        return out
    return width if codes.dtype == torch.int8 else 2 * width


@decode_multiply.register_fake
def _(x, codes, scale, back):
    return x.new_empty(*x.shape[:-1], product_width(codes, back))


@register_flop_formula(torch.ops.vpgtrans.decode_multiply, get_raw=True)
def _(x, codes, scale, back, out_val=None):
    return 2 * x.numel() * product_width(codes, back)


def keep_codes(ctx, inputs, output):
    _, codes, scale, ctx.back = inputs
    ctx.save_for_backward(codes, scale)


def multiply_back(ctx, gradient):
    codes, scale = ctx.saved_tensors
    return decode_multiply(gradient, codes, scale, not ctx.back), None, None, None


decode_multiply.register_autograd(multiply_back, setup_context=keep_codes)


class QuantisedLinear(nn.Module):
    """A frozen nn.Linear whose matrix is kept as codes and scales. Made of one on the meta device;
    `take` makes of the checkpoint's matrix what it then loads."""

    ENCODE = {"int8": to_int8, "nf4": to_nf4}
    ROWS = 1024  # that are encoded at a time: what is made on the way stays small

    def __init__(self, linear, weights):
        super().__init__()
        self.encode = self.ENCODE[weights]
        self.shape = linear.weight.shape  # (out, in)
        codes, scale = empty_codes(weights, *self.shape)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def take(self, matrix):
        """(out,in) -> {"weight": codes, "weight_scale": scales}"""
        self.ends = Ends(matrix)
        codes, scales = zip(*(self.encode(rows.float()) for rows in matrix.split(self.ROWS)))
        return {"weight": torch.cat(codes), "weight_scale": torch.cat(scales)}

    def forward(self, x):
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = decode_multiply(x, self.weight, self.weight_scale, False)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def check_outliers(name, matrix, codes):
    """ValueError where a few numbers are so much larger than the others that int8 makes zeros of more
    than a quarter of these: from there on nf4 is nearer to the matrix (docs/beyond-one-card.md)."""
    if codes.dtype != torch.int8:
        return
    lost = ((codes == 0).sum() - (matrix == 0).sum()).item() / matrix.numel()
    if lost > 0.25:
        raise ValueError(f"{name}: int8 would make zeros of {lost:.0%} of its numbers, since some are so "
                         f"much larger; take nf4, which has a scale for each {BLOCK}")


def quantise_blocks(llm, weights):
    """Puts a QuantisedLinear, "int8" or "nf4", in the place of each matrix of the repeated blocks of an
    LLM on the meta device; word embeddings, head and norms stay as they are. -> {name of a matrix in
    the checkpoint: its module}"""
    for block in llm.layers:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    module.register_module(name, QuantisedLinear(child, weights))
    return {f"{name}.weight": module for name, module in quantised(llm)}


def quantised(llm):
    """(name, QuantisedLinear) of all that an LLM has."""
    return [(name, module) for name, module in llm.named_modules() if isinstance(module, QuantisedLinear)]


# -------------------------------------------------------------------------------- sharded frozen weights


def shard_blocks(model, blocks, mesh, methods=()):
    """Spreads the matrices of a model's repeated blocks, on the meta device, over the processes of a mesh
    (FSDP, Zhao et al. 2023): each keeps some rows of each matrix, and all rows are gathered for a block while
    it is at work, those of the next meanwhile. What else there is stays whole, in every process.

    A block must be entered by its forward, the model by its forward or one of the `methods`, by all processes
    equally often. -> {name of a matrix: its linear layer}"""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes two seconds

    inside = {module for block in blocks for module in block.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sharded = {f"{name}.weight": module for name, module in linear.items() if module in inside}
    model.requires_grad_(False)
    whole = set(model.parameters()) - {module.weight for module in sharded.values()}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    # shards nothing more; but under one root, the next block is gathered while one is at work
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return sharded


def own_rows(matrix, mesh, dtype, device):
    """A matrix (out,in) as read -> the DTensor of which this process keeps its rows. Of a file that is
    mapped into memory, as read_file's are, no others are read."""
    from torch.distributed.tensor import DTensor, Shard

    rows = -(-len(matrix) // mesh.size())
    own = matrix[mesh.get_local_rank() * rows :][:rows].to(device, dtype)
    how = dict(run_check=False, shape=matrix.shape, stride=matrix.stride())
    return DTensor.from_local(own, mesh, [Shard(0)], **how)


def gather_once(blocks):
    """FSDP makes the tensors of a gathered block once, and only frees and fills them later. Made in the
    inference mode of `generate` they could not be trained through: so they are made here."""
    for block in blocks:
        block.unshard()
        block.reshard()


# ------------------------------------------------------------------------------------------ loading


class Ends:
    """Stands for a tensor where only its shape and its first and last eight numbers are asked for, as
    a fingerprint does."""

    def __init__(self, tensor):
        self.shape = tensor.shape
        self.numbers = torch.cat([tensor.flatten()[:8], tensor.flatten()[-8:]])

    def flatten(self):
        return self.numbers


def as_read(module):
    """{name: tensor} of a module's parameters as they were read, for a fingerprint: of a matrix that was
    quantised or sharded its Ends."""
    tensors = dict(module.named_parameters())
    for name, child in module.named_modules():
        ends = getattr(child, "ends", None)
        if isinstance(ends, Ends):
            tensors[f"{name}.weight"] = ends
    return tensors


HEAD = "lm_head.weight"
ARCHITECTURES = {"opt": OPT, "llama": LLaMA, "mistral": LLaMA, "qwen2": LLaMA, "qwen3": LLaMA, "t5": T5}


def read_options(config, defaults, only):
    """config.json as a dict, with defaults for what it leaves out; ValueError for an option that is
    not implemented."""
    config = defaults | config
    for key, value in {**only, "quantization_config": None}.items():
        if config.get(key) != value:
            remedy = f"only {value!r} is"
            if key == "quantization_config":
                remedy = ("use the checkpoint that is not quantised; --llm-weights int8 or nf4 (load_llm's "
                          "weights=) quantises it while it is read")
            raise ValueError(f"{key} = {config[key]!r} is not implemented for {config.get('model_type')}; "
                             f"{remedy}")
    return config


def not_a_checkpoint(folder, missing):
    """The error for a folder that lacks something: what lies there in its place, and the way out."""
    is_adapter = (folder / "adapter_config.json").is_file()
    gguf = min(folder.glob("*.gguf"), default=None)
    found = f"{folder} is not a checkpoint in Hugging Face layout"
    if is_adapter:
        found = (f"{folder} holds a PEFT adapter (adapter_config.json), which is no whole model: merge it "
                 "into its base model with peft's merge_and_unload(), and save that with save_pretrained")
    elif gguf:
        found = (f"{gguf.name} is a GGUF file, which is not read here: convert it with transformers' "
                 f"from_pretrained(folder, gguf_file={gguf.name!r}), and save that with save_pretrained")
    return FileNotFoundError(f"{missing}; {found}")


def checkpoint_files(folder):
    """{tensor name: file} of a folder in Hugging Face layout: safetensors, or .bin where there is
    nothing else."""
    folder = Path(folder)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        file = folder / whole
        index = folder / f"{whole}.index.json"
        if index.is_file():
            try:
                shards = json.loads(index.read_text())["weight_map"]
                return {name: folder / shard for name, shard in shards.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: damaged ({error}); download it again") from error
        if file.is_file():
            return {name: file for name, _ in read_file(file, lambda name: False)}
    lacks = "no weights (model.safetensors, pytorch_model.bin, or shards with their index)"
    raise not_a_checkpoint(folder, f"{folder}: {lacks}")


def read_file(file, wanted):
    """(name, tensor) for every tensor of a file; tensor is None, and nothing of it is read, where
    wanted(name) is False.

    A .bin is memory-mapped and read with weights_only=True: no code in it is ever executed."""
    try:
        if file.suffix == ".bin":
            mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote no archives
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            for name, tensor in tensors.items():
                yield name, tensor if wanted(name) else None
        else:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name) if wanted(name) else None
    except FileNotFoundError:
        message = f"{file}: missing; its index names it: download the checkpoint again"
        raise FileNotFoundError(message) from None
    except Exception as error:
        raise ValueError(f"{file}: damaged or no checkpoint ({error}); download or copy it again") from error


def read_tensors(folder, wanted):
    """(name, tensor) of every tensor of a checkpoint for which wanted(name) is true; opens only the
    files it needs."""
    needed = {file for name, file in checkpoint_files(folder).items() if wanted(name)}
    for file in sorted(needed):
        for name, tensor in read_file(file, wanted):
            if tensor is not None:
                yield name, tensor


def assign_tensors(module, tensors, folder):
    """Puts {name: tensor} in the place of all parameters of a module, after saying what is missing,
    extra or misshapen."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    both = shapes.keys() & found.keys()
    wrong = [name for name in both if shapes[name] != found[name]]
    problems = {
        "tensors missing": shapes.keys() - found.keys(),
        "unknown tensors": found.keys() - shapes.keys(),
        "wrong shapes": [f"{name} is {found[name]}, config.json says {shapes[name]}" for name in wrong]}
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{folder}: {len(names)} {problem}, the first: {min(names)}; is this the right "
                             "checkpoint?")
    module.load_state_dict(tensors, strict=True, assign=True)


def read_llm_config(folder):
    """(config of the LLM, prefix of its tensors) of a folder that holds an LLM, or one inside a
    BLIP-2 checkpoint."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise not_a_checkpoint(Path(folder), f"{file}: missing")
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download it again") from error
    prefix = ""
    if "text_config" in config:
        config = config["text_config"]
        prefix = "language_model."
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type {config.get('model_type')!r} is not implemented; there is "
                         f"{', '.join(ARCHITECTURES)}")
    return config, prefix


def renaming(architecture, prefix):
    """-> function from a tensor's name in the checkpoint to its name in the architecture, None for
    what does not belong there."""

    def rename(name):
        if not name.startswith(prefix):
            return None
        return architecture.checkpoint_name(name.removeprefix(prefix))

    return rename


def complete_tied(tensors, words):
    """Where config.json ties head and word embeddings, files hold either or both: one tensor gets
    both names.

    A head that differs from the word embeddings stays, whatever config.json says (as in
    transformers)."""
    held = [tensors[name] for name in (words, HEAD) if name in tensors]
    if held and torch.equal(held[0], held[-1]):
        tensors[words] = tensors[HEAD] = nn.Parameter(held[0], requires_grad=False)


def as_sequences(ends):
    """eos_token_id, a number, several or None, as stop sequences of `generate`."""
    ends = ends if isinstance(ends, list) else [ends]
    return [(end,) for end in ends if end is not None]


def end_marks(folder, otherwise):
    """The stop sequences of a checkpoint: generation_config.json has the last word, in which instruct
    models name the ends of their turns."""
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return otherwise
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download it again") from error
    ends = config.get("eos_token_id")
    return otherwise if ends is None else as_sequences(ends)


def empty_llm(folder):
    """The language model of a folder as its config.json says, without weights: on the meta device,
    where tensors have shapes only."""
    config, _ = read_llm_config(folder)
    try:
        with torch.device("meta"):
            return ARCHITECTURES[config["model_type"]](config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json: {error} is missing") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def read_weights(folder, llm, dtype, device, matrices):
    """{name: tensor} of the checkpoint in a folder, in a dtype on a device; where it is one of the
    `matrices` of quantise_blocks or shard_blocks, its codes and scales or this process's rows. No more than
    one tensor is whole at any time."""
    _, prefix = read_llm_config(folder)
    rename = renaming(type(llm), prefix)
    tensors = {}
    for name, tensor in read_tensors(folder, rename):
        name = rename(name)
        module = matrices.get(name)
        if module is None:
            tensors[name] = tensor.to(device, dtype)
        elif llm.mesh:
            module.ends = Ends(tensor)
            tensors[name] = own_rows(tensor, llm.mesh, dtype, device)
        elif tensor.shape != module.shape:
            raise ValueError(f"{folder}: {name} is {tuple(tensor.shape)}, config.json says "
                             f"{tuple(module.shape)}; is this the right checkpoint?")
        else:
            tensor = tensor.to(device)
            taken = module.take(tensor)
            check_outliers(f"{folder}: {name}", tensor, taken["weight"])
            stem = name.removesuffix("weight")
            tensors |= {stem + part: codes for part, codes in taken.items()}
    return tensors


def load_llm(folder, dtype=torch.bfloat16, device="cpu", weights=None, mesh=None):
    """The language model of a folder in Hugging Face layout, frozen and in eval mode.

    weights "int8" or "nf4" keeps the matrices of its blocks in half or 0.28 of bf16's bytes,
    quantised while they are read; the arithmetic stays that of `dtype`. With a mesh, a DeviceMesh of one
    dimension, each of its processes reads and keeps its share of these matrices (`shard_blocks`).

    The LLM lies at the top level or under `language_model.` (BLIP-2). FileNotFoundError or
    ValueError name the file and the option that is not implemented, or the tensor that is missing,
    misshapen or damaged."""
    if weights and mesh:
        raise ValueError(f"{folder}: quantised weights cannot be sharded; use one or the other")
    llm = empty_llm(folder)
    llm.stop = end_marks(folder, llm.stop)
    if isinstance(llm, T5) and dtype == torch.float16:
        raise ValueError(f"{folder}: T5 overflows in float16; load it in bfloat16 or float32")
    llm.weights = weights
    llm.mesh = mesh
    matrices = {}
    if weights:
        matrices = quantise_blocks(llm, weights)
    elif mesh:
        matrices = shard_blocks(llm, llm.layers, mesh, methods=("loss", "generate", "read_prefix"))
    tensors = read_weights(folder, llm, dtype, device, matrices)
    if llm.lm_head.weight is llm.get_parameter(llm.WORDS):
        complete_tied(tensors, llm.WORDS)
    assign_tensors(llm, tensors, folder)
    if mesh:
        gather_once(llm.layers)
    return llm.to(device).requires_grad_(False).eval()


def read_word_embeddings(folder):
    """(V, D) float32: the word embeddings in the space where soft prompts enter; reads that tensor
    (and project_in)."""
    config, prefix = read_llm_config(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    rename = renaming(architecture, prefix)
    words = architecture.WORDS
    is_tied = (architecture.DEFAULTS | config)["tie_word_embeddings"]
    if is_tied and words not in map(rename, checkpoint_files(folder)):
        words = HEAD
    wanted = {words, architecture.PROJECT_IN} - {None}
    read = read_tensors(folder, lambda name: rename(name) in wanted)
    tensors = {rename(name): tensor.float() for name, tensor in read}
    if words not in tensors:
        raise ValueError(f"{folder}: {architecture.WORDS} is missing; is this the right checkpoint?")
    project_in = tensors.get(architecture.PROJECT_IN)
    return tensors[words] if project_in is None else tensors[words] @ project_in.T
