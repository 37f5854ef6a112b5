# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""Frozen language models that read soft prompts: forward, loss, generation, loading straight from
safetensors.

    llm = load_llm("facebook/opt-6.7b as a folder", dtype=torch.bfloat16, device="cuda")
    loss, tokens = llm.loss(soft_prompts, caption_ids)          # gradients flow to soft_prompts only
    captions = llm.generate(soft_prompts, num_beams=5)          # lists of ids

Every language model here reads a *prefix* of embeddings (soft prompts, BOS, an instruction) and
scores or produces a target: OPT and LLaMA (with Vicuna, Mistral, SmolLM2, Qwen2, Qwen3) read
[prefix | target]; T5 reads the prefix in its encoder. Parameter names equal the checkpoint's, so
that loading needs no table of names.

B batch, P prefix length, T target length, S positions read, D LLM width, V vocabulary, H heads, G
key-value heads, hd width of a head, K beams.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn

# ----------------------------------------------------------------------------- shared by all models


def attention(q, k, v, mask=None, causal=False, scale=None):
    """Softmax attention of queries (B,H,Sq,hd) over keys and values (B,G,Sk,hd) -> (B,H,Sq,hd).

    G < H: heads share keys and values in groups of H/G (GQA, Ainslie et al. 2023). `mask`
    broadcasts to (B,H,Sq,Sk): a bool is True where a query may look, numbers are added to the
    scores. scale is 1/sqrt(hd) unless given."""
    groups = (len(q), k.shape[1], -1, q.shape[-1])
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.requires_grad):
        # these lines beat scaled_dot_product_attention in bf16, and in its backward (docs/notes.md)
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).reshape(groups) @ k.transpose(-2, -1)
        scores = scores.view(*q.shape[:3], -1)  # (B, H, Sq, Sk)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1).to(v.dtype)
        return (weights.view(*groups[:3], weights.shape[-1]) @ v).view(q.shape)
    if mask is None or q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    # with a mask, torch's fast kernels know no groups: the heads of a group become queries of one
    # head
    mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(q.reshape(groups), k, v, mask, scale=scale).reshape(q.shape)


def split_heads(x, hd):
    return rearrange(x, "b s (h d) -> b h s d", d=hd)


def merge_heads(x):
    return rearrange(x, "b h s d -> b s (h d)")


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
    """(B,P,D), (B,P) bool or None -> the same two, checked; each row's real positions moved to the
    right end, in order, so that holes anywhere become padding on the left. A position then depends
    on the row's real positions alone."""
    if prefix.ndim != 3 or prefix.shape[1] == 0 or prefix.shape[2] != dim:
        raise ValueError(f"the prefix must be (B, P >= 1, {dim}), not {tuple(prefix.shape)}; a "
                         "text alone needs its BOS in it")
    if prefix_mask is None:
        return prefix.to(dtype), None
    if prefix_mask.dtype != torch.bool or prefix_mask.shape != prefix.shape[:2]:
        raise ValueError(f"prefix_mask must be {tuple(prefix.shape[:2])} of torch.bool (False: a "
                         f"hole), not {tuple(prefix_mask.shape)} of {prefix_mask.dtype}")
    if prefix_mask.device.type == "cpu" and not prefix_mask.any(1).all():
        raise ValueError("prefix_mask: a row has no real position; a text alone needs its BOS in "
                         "the prefix")
    order = prefix_mask.long().argsort(dim=1, stable=True)
    return prefix.to(dtype).gather(1, order[..., None].expand_as(prefix)), prefix_mask.gather(1, order)


def causal_mask(keep):
    """(B,S) bool, True for real positions -> (B,1,S,S). Padding looks at itself, so that no softmax
    is empty."""
    S = keep.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(S, dtype=torch.bool, device=keep.device)
    return ((causal & keep[:, None, :]) | itself)[:, None]


def cross_entropies_(logits, target_ids, differentiate):
    """Sum of the cross-entropies of logits (N,V) for targets (N,1), in float32; if asked, their
    derivative takes the logits' place."""
    log_p, real, ids = logits.float().log_softmax(-1), target_ids != -100, filled(target_ids)
    loss = -(log_p.gather(1, ids) * real).sum()
    if differentiate:
        p = log_p.exp_()  # the derivative is the probabilities, less 1 at the target
        logits.copy_(p.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=p.dtype)))
    return loss


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of hidden states x (N,D) under a frozen head (V,D): a block of
    rows at a time, of which the gradient is taken at once. No more logits than a block's exist at
    any time, and of what is made of them in float32 no more than a slice's, which on CPUs stays in
    the cache."""

    BLOCK = {"cpu": 2**25, "cuda": 2**28}  # bytes of logits
    SLICE = {"cpu": 2**21, "cuda": 2**28}  # bytes of these in float32

    @staticmethod
    def forward(ctx, x, weight, target_ids):
        rows = lambda limits, size: max(1, limits["cpu" if x.device.type == "cpu" else "cuda"] // (size * len(weight)))
        blocks = math.ceil(len(x) / rows(FrozenHeadLoss.BLOCK, weight.element_size()))
        loss, gradient = torch.zeros((), device=x.device), torch.empty_like(x)
        for part, ids, part_gradient in zip(x.chunk(blocks), target_ids[:, None].chunk(blocks), gradient.chunk(blocks)):
            logits = F.linear(part, weight)
            for few in zip(*(y.split(rows(FrozenHeadLoss.SLICE, 4)) for y in (logits, ids))):
                loss += cross_entropies_(*few, differentiate=ctx.needs_input_grad[0])
            if ctx.needs_input_grad[0]:
                part_gradient.copy_((logits @ weight) * (ids != -100))
            del logits, few  # before the next block's are made
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True: what is kept knows nothing of x
            raise RuntimeError("the loss of a frozen head has no second derivative; with "
                               "head.weight.requires_grad_() it has")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def filled(target_ids):
    """Targets with an id in the place of -100, which stands for none."""
    return target_ids.masked_fill(target_ids == -100, 0)


def caption_loss(head, x, target_ids):
    """Hidden states (B,T,D), targets (B,T) -> (sum of cross-entropies in float32, number of
    tokens); -100 does not count.

    A sum and a count, so that ranks and micro-batches can be normalised by the global number of
    tokens."""
    x, ids = x.flatten(0, 1), target_ids.flatten()
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
    inputs, targets, width = target_ids[..., :-1].flatten(1), target_ids[..., 1:].flatten(1), target_ids.shape[2] - 1
    real = targets != -100
    order = real.long().argsort(dim=1, descending=True, stable=True)[:, : int(real.sum(1).max())]
    return inputs.gather(1, order), order // width, order % width, targets.gather(1, order)


def check_ids(ids, vocab_size):
    """ValueError for ids outside of the vocabulary. On GPUs nothing waits for that: there, torch's
    own assertion ends it."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: this LLM's vocabulary has 0 to "
                         f"{vocab_size - 1}; is it its tokenizer?")


# --------------------------------------------------------------------------------------- generation


class Cache:
    """What has been read of B texts, each of which K beams continue: keys and values of all layers,
    allocated once.

    A text has one row of columns: its prefix, the K tokens of step 1, the K of step 2, ... A beam
    looks at the prefix and at the tokens that it has come through itself (`visible`), so that beams
    share a prefix, and one that goes on from another takes over a row of `visible`; no key is ever
    copied. On GPUs shapes stay the same, so that a step can be compiled as one graph."""

    def __init__(self, layers, heads, hd, prefix, prefix_mask, steps, K):
        (B, P, _), device = prefix.shape, prefix.device
        self.keys, self.values = prefix.new_zeros(2, layers, B, heads, P + steps * K, hd)
        self.columns = None  # (K,) of the tokens being read; None for the prefix
        self.visible = torch.zeros(B, 1, K, P + steps * K, dtype=torch.bool, device=device)
        self.visible[..., :P] = True if prefix_mask is None else prefix_mask[:, None, None]
        # (B,1) of the tokens being read, the same for all beams
        self.positions = (torch.full((B,), P, device=device) if prefix_mask is None else prefix_mask.sum(1))[:, None] - 1
        self.P, self.K, self.used = P, K, P

    def width(self):
        """Columns that a step looks at: on CPUs those in use, else all of them."""
        return self.used if self.keys.device.type == "cpu" else self.keys.shape[-2]

    def mask(self):
        return self.visible[..., : self.width()]

    def __getitem__(self, layer):
        return self.keys[layer, :, :, : self.width()], self.values[layer, :, :, : self.width()], self.columns

    def advance(self, parents=None):
        """Makes place for the next token of each beam; beam k goes on from beam parents[b,k] (B,K),
        or from itself."""
        if parents is not None:
            self.visible.copy_(self.visible.gather(2, parents[:, None, :, None].expand_as(self.visible)))
        if self.columns is None:
            self.columns = torch.arange(self.K, device=self.visible.device) + self.P
        else:
            self.columns += self.K
        self.used += self.K
        self.positions += 1
        self.visible[:, 0, torch.arange(self.K, device=self.columns.device), self.columns] = True


def remember(cache, k, v):
    """Stores keys and values (B,G,s,hd) that one layer has just computed -> those that the tokens
    at hand look at."""
    keys, values, columns = cache
    k, v = k.to(keys.dtype), v.to(values.dtype)  # under autocast they differ: on GPUs a norm's output is float32
    if columns is None:  # a prefix looks at itself only
        keys[:, :, : k.shape[2]], values[:, :, : k.shape[2]] = k, v
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
    """Forbids, in scores (..., V), the token that would complete a stop sequence after ids (...,
    n)."""
    for *head, last in stop:
        completes = ends_with(ids, [head]) if head else torch.ones(ids.shape[:-1], dtype=torch.bool, device=ids.device)
        scores[..., last] = scores[..., last].masked_fill(completes, -torch.inf)
    return scores


def without_end(ids, stop):
    """A list of ids up to the first stop sequence."""
    for end in range(1, len(ids) + 1):
        for sequence in stop:
            if ids[max(0, end - len(sequence)) : end] == list(sequence):
                return ids[: end - len(sequence)]
    return ids


def sample_next(logits, temperature, top_p):
    """(B,V) -> (B,): the most probable token, or at temperature > 0 one drawn from the smallest set
    of tokens whose probabilities add up to top_p (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0)
    return ids.gather(1, probs.multinomial(1))[:, 0]


def decode_tokens(llm, logits, cache, steps, min_new_tokens, temperature, top_p, stop):
    """Greedy decoding or sampling, all rows side by side, until every row has ended. -> (B, n)
    ids"""
    ids = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(1, steps + 1):
        scores = logits[:, 0].float()  # (B, V)
        scores = forbid_end(scores, ids, stop) if n <= min_new_tokens else scores
        ids = torch.cat([ids, sample_next(scores, temperature, top_p)[:, None]], dim=1)
        ended |= ends_with(ids, stop)
        if n == steps or ended.all():
            return ids
        cache.advance()
        logits = llm.step(ids[:, -1:].contiguous(), cache)


def beam_search(llm, logits, cache, steps, min_new_tokens, K, length_penalty, stop):
    """Beam search with transformers' rules: a hypothesis scores log-probability / length **
    length_penalty (its end mark counts), and a row is done when no running beam, at its present
    length, beats its K finished ones. -> (B, n) ids"""
    B, _, V = logits.shape
    logits = logits.expand(B, K, V)
    beams = torch.empty(B, K, 0, dtype=torch.long, device=logits.device)  # (B, K, n) the running ones
    scores = torch.tensor([0.0] + [-1e9] * (K - 1), device=logits.device).repeat(B, 1)  # (B, K): all start from beam 0
    best = torch.full((B, K, steps), -1, device=logits.device)  # (B, K, steps) the finished ones, -1 behind their ends
    best_scores = torch.full((B, K), -1e9, device=logits.device)
    done = torch.zeros(B, 1, dtype=torch.bool, device=logits.device)
    width = (1 + len(stop)) * K  # candidates looked at: even if the best K all end, K go on
    pick = lambda x, index: x.gather(1, index.view(B, -1, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
    for n in range(1, steps + 1):
        log_p = logits.log_softmax(-1, dtype=torch.float32)
        log_p = forbid_end(log_p, beams, stop) if n <= min_new_tokens else log_p
        top, index = log_p.add_(scores[..., None]).flatten(1).topk(width)  # (B, width)
        candidates = torch.cat([pick(beams, index // V), (index % V)[..., None]], dim=-1)
        ended = ends_with(candidates, stop) | (n == steps)
        counts = ended & (torch.arange(width, device=top.device) < K) & ~done  # only the best K candidates may finish
        merged = torch.cat([best_scores, (top / n**length_penalty).masked_fill(~counts, -1e9)], dim=1)
        best_scores, chosen = merged.topk(K)
        best = pick(torch.cat([best, F.pad(candidates, (0, steps - n), value=-1)], dim=1), chosen)
        scores, chosen = (top - 1e9 * ended).topk(K)
        done |= best_scores.min(1, keepdim=True).values >= scores[:, :1] / n**length_penalty
        if n == steps or done.all():
            return best[:, 0]
        beams = pick(candidates, chosen)
        cache.advance(pick(index // V, chosen))
        logits = llm.step(beams[..., -1].contiguous(), cache)


class LanguageModel(nn.Module):
    """What all have in common, given `hidden_states`, `start` (read a prefix) and `step` (read one
    more token of each beam)."""

    def finish(self, config):
        """What all constructors end with: ties the head to the word embeddings, and notes which
        tokens end a text."""
        if config["tie_word_embeddings"]:
            self.tie_head()
        ends = config.get("eos_token_id")
        self.stop = [(end,) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]

    def tie_head(self):
        self.lm_head.weight = self.get_parameter(self.WORDS)

    def embed(self, ids):
        """(B,T) -> (B,T,D): word embeddings, in the space where soft prompts enter."""
        check_ids(ids, self.vocab_size)
        return F.embedding(ids, self.get_parameter(self.WORDS))

    def forward(self, prefix, target_ids, prefix_mask=None):
        """(B,P,D), (B,T), (B,P) bool -> logits (B,T,V): row t is the prediction of target t.

        `prefix_mask` is False at holes, anywhere; each row gives what it gives alone with its holes
        taken out. None means no holes and takes the fast path. Targets of -100 stand behind a row's
        real targets."""
        return word_scores(self.lm_head, self.hidden_states(prefix, target_ids, prefix_mask))

    def loss(self, prefix, target_ids, prefix_mask=None):
        """As `forward` -> (sum of cross-entropies in float32, number of tokens); -100 does not
        count."""
        return caption_loss(self.lm_head, self.hidden_states(prefix, target_ids, prefix_mask), target_ids)

    def check_targets(self, target_ids):
        if target_ids.ndim != 2:
            raise ValueError(f"targets must be (B,T), not {tuple(target_ids.shape)}; several "
                             "captions behind one prefix are for the loss of decoder-only LLMs")
        check_ids(filled(target_ids), self.vocab_size)

    @torch.inference_mode()
    def generate(self, prefix, prefix_mask=None, max_new_tokens=30, num_beams=1, length_penalty=1.0, min_new_tokens=0,
                 temperature=0.0, top_p=1.0, stop=None):
        """Continues a prefix. (B,P,D), (B,P) bool -> B lists of ids, without the stop sequence and
        what follows.

        `stop` holds the sequences of ids that end a text, such as ((2,), (835,), (2277, 29937));
        None: config.json's eos_token_id. `max_new_tokens` counts the end mark; none of the first
        `min_new_tokens` ids completes one. num_beams > 1 is beam search (temperature 0 only);
        temperature > 0 samples from the `top_p` nucleus."""
        stop = self.stop if stop is None else stop
        if min(max_new_tokens, num_beams) < 1:
            raise ValueError(f"generate: max_new_tokens = {max_new_tokens} and num_beams = "
                             f"{num_beams} must be at least 1")
        if num_beams > 1 and temperature > 0:
            raise ValueError("generate: beam search does not sample; use num_beams=1 or "
                             "temperature=0")
        if temperature < 0 or not 0 <= top_p <= 1:
            raise ValueError(f"generate: temperature = {temperature} must not be below 0, and "
                             f"top_p = {top_p} must be from 0 to 1")
        if not all(isinstance(sequence, (tuple, list)) and sequence for sequence in stop):
            raise ValueError(f"generate: stop = {stop} must be sequences of at least one id each, "
                             "such as ((2,),)")
        logits, cache = self.start(prefix, prefix_mask, max_new_tokens, num_beams)
        if num_beams > 1:
            ids = beam_search(self, logits, cache, max_new_tokens, min_new_tokens, num_beams, length_penalty, stop)
        else:
            ids = decode_tokens(self, logits, cache, max_new_tokens, min_new_tokens, temperature, top_p, stop)
        return [without_end([i for i in row if i >= 0], stop) for row in ids.tolist()]


class DecoderOnly(LanguageModel):
    """[prefix | target] read by one stack of layers: what OPT and LLaMA have in common, given
    `embed` and `read`.

    At most `longest` positions can be read, if that is not None; a cache has `kv_heads` heads of
    width `head_dim`."""

    def check_length(self, S):
        if self.longest is not None and S > self.longest:
            raise ValueError(f"{S} positions (prefix, holes included, and target) are more than "
                             f"this {type(self).__name__}'s {self.longest} (OPT's "
                             "max_position_embeddings, else the sliding_window, beyond which "
                             "attention is not implemented); shorten them")

    def lay_out(self, prefix, prefix_mask, T):
        """A prefix (B,P,D) with T tokens behind it: -> the prefix with its holes moved to the left
        end, which positions are real (B,P) or None, the positions' numbers (B or 1,P+T), and the
        mask or None, which is causal."""
        prefix, prefix_mask = take_prefix(prefix, prefix_mask, self.dim, self.lm_head.weight.dtype)
        S = prefix.shape[1] + T
        self.check_length(S)
        if prefix_mask is None:
            return prefix, None, torch.arange(S, device=prefix.device)[None], None
        keep = F.pad(prefix_mask, (0, T), value=True)  # (B, S)
        return prefix, prefix_mask, (keep.cumsum(1) - 1).clamp(min=0), causal_mask(keep)

    def hidden_states(self, prefix, target_ids, prefix_mask=None):
        """As `forward` -> (B,T,D): what the head reads to predict target t."""
        self.check_targets(target_ids)
        prefix, _, positions, mask = self.lay_out(prefix, prefix_mask, target_ids.shape[1] - 1)
        x = torch.cat([prefix, self.embed(filled(target_ids[:, :-1]))], dim=1)
        return self.read(x, positions, mask)[:, prefix.shape[1] - 1 :]

    def loss(self, prefix, target_ids, prefix_mask=None):
        """(B,P,D), (B,T) or (B,K,T), (B,P) bool -> (sum of cross-entropies in float32, number of
        tokens); -100 does not count.

        K captions share one prefix, which is read once: each sees the prefix and itself, and its
        positions go on from the prefix's, so that the loss is the sum of what they give alone.
        Leave their ids on the CPU, and no GPU has to wait."""
        if target_ids.ndim == 2:
            return super().loss(prefix, target_ids, prefix_mask)
        _, K, T = target_ids.shape
        check_ids(filled(target_ids), self.vocab_size)
        self.check_length(prefix.shape[1] + T - 1)
        packed = (*pack_captions(target_ids), target_ids[..., 0])
        ids, caption, place, targets, first_targets = (x.to(prefix.device, non_blocking=True) for x in packed)  # (B, S - P), (B, K)
        prefix, prefix_mask = take_prefix(prefix, prefix_mask, self.dim, self.lm_head.weight.dtype)
        keep = prefix_mask if prefix_mask is not None else torch.ones(prefix.shape[:2], dtype=torch.bool, device=prefix.device)
        positions = torch.cat([(keep.cumsum(1) - 1).clamp(min=0), keep.sum(1, keepdim=True) + place], dim=1)  # (B, S)
        caption = F.pad(caption, (prefix.shape[1], 0), value=-1)  # -1: the prefix
        sees = (caption[:, :, None] == caption[:, None, :]) | (caption[:, None, :] == -1)
        mask = causal_mask(F.pad(keep, (0, ids.shape[1]), value=True)) & sees[:, None]
        x = self.read(torch.cat([prefix, self.embed(filled(ids))], dim=1), positions, mask)
        firsts = x[:, prefix.shape[1] - 1, None].expand(-1, K, -1)  # the prefix's last position predicts all first tokens
        x, targets = torch.cat([firsts, x[:, prefix.shape[1] :]], dim=1), torch.cat([first_targets, targets], dim=1)
        return caption_loss(self.lm_head, x, targets)

    def start(self, prefix, prefix_mask, steps, K):
        """Reads a prefix. -> logits of the next token (B,1,V), and the cache for that many steps of
        K beams."""
        prefix, prefix_mask, positions, mask = self.lay_out(prefix, prefix_mask, 0)
        self.check_length(prefix.shape[1] + steps - 1)
        cache = Cache(len(self.layers), self.kv_heads, self.head_dim, prefix, prefix_mask, steps - 1, K)
        return word_scores(self.lm_head, self.read(prefix, positions, mask, cache)[:, -1:]), cache

    def step(self, ids, cache):
        """Reads one more token of each beam, (B,K) -> logits of the next (B,K,V)."""
        return word_scores(self.lm_head, self.read(self.embed(ids), cache.positions, cache.mask(), cache))


# -------------------------------------------------------------------------- OPT (Zhang et al. 2022)


class OPTAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.head_dim = dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, mask, cache):
        q, k, v = (split_heads(project(x), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = remember(cache, k, v)
        return self.out_proj(merge_heads(attention(q, k, v, mask, causal=mask is None)))


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

    def feed_forward(self, x):
        return self.fc2(self.fc1(x).relu())

    def forward(self, x, mask=None, cache=None):
        if self.pre_norm:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.feed_forward(x))


class OPTDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, word_dim = config["hidden_size"], config["word_embed_proj_dim"]
        self.embed_tokens = Embedding(config["vocab_size"], word_dim)
        self.embed_positions = Embedding(config["max_position_embeddings"] + 2, dim)  # rows 0 and 1 are never read
        self.project_in = nn.Linear(word_dim, dim, bias=False) if word_dim != dim else None
        self.project_out = nn.Linear(dim, word_dim, bias=False) if word_dim != dim else None
        self.layers = nn.ModuleList(OPTLayer(config) for _ in range(config["num_hidden_layers"]))
        final = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
        self.final_layer_norm = nn.LayerNorm(dim) if final else None


class OPT(DecoderOnly):
    """OPT, 125M to 66B, the odd opt-350m included. `config` is the checkpoint's config.json as a
    dict.

    Frozen weights are the caller's choice (`load_llm` freezes); there is no dropout in this
    file."""

    DEFAULTS = dict(do_layer_norm_before=True, _remove_final_layer_norm=False, activation_function="relu", vocab_size=50272,
                    max_position_embeddings=2048, enable_bias=True, layer_norm_elementwise_affine=True, hidden_size=768,
                    num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072, tie_word_embeddings=True, eos_token_id=2)
    ONLY = dict(activation_function="relu", enable_bias=True, layer_norm_elementwise_affine=True)
    WORDS, PROJECT_IN = "model.decoder.embed_tokens.weight", "model.decoder.project_in.weight"

    def __init__(self, config):
        super().__init__()
        config = read_options(config, self.DEFAULTS, self.ONLY)
        self.dim, self.vocab_size, self.longest = config["hidden_size"], config["vocab_size"], config["max_position_embeddings"]
        config["word_embed_proj_dim"] = config.get("word_embed_proj_dim") or self.dim
        self.kv_heads, self.head_dim = config["num_attention_heads"], self.dim // config["num_attention_heads"]
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
        x, project_in = super().embed(ids), self.model["decoder"].project_in
        return x if project_in is None else project_in(x)

    def read(self, x, positions, mask=None, cache=None):
        """(B,S,D) embeddings -> (B,S,D) hidden states; positions count a row's real positions from
        0."""
        decoder = self.model["decoder"]
        x = x + decoder.embed_positions(positions + 2)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if cache is None else cache[i])
        x = x if decoder.final_layer_norm is None else decoder.final_layer_norm(x)
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
    rope = {"rope_theta": config.get("rope_theta") or 1e4, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type = {kind!r} is not implemented; only 'default', 'linear' and "
                         "'llama3' are")
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor = {partial} is not implemented; only 1.0 is")
    frequencies = rope["rope_theta"] ** -(torch.arange(0, hd, 2, device="cpu").float() / hd)
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        turns = length * frequencies / (2 * math.pi)  # in the length that it was trained on
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
        dim, H, G, self.head_dim = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
        self.q_proj = nn.Linear(dim, H * self.head_dim, bias=config["qkv_bias"])
        self.k_proj, self.v_proj = (nn.Linear(dim, G * self.head_dim, bias=config["qkv_bias"]) for _ in range(2))
        self.o_proj = nn.Linear(H * self.head_dim, dim, bias=config["attention_bias"])
        if config["qk_norm"]:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, config["rms_norm_eps"]) for _ in range(2))
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, rotation, mask, cache):
        q, k, v = (split_heads(project(x), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)
        if cache is not None:
            k, v = remember(cache, k, v)
        return self.o_proj(merge_heads(attention(q, k, v, mask, causal=mask is None)))


class LLaMALayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, hidden, eps, bias = (config[key] for key in ("hidden_size", "intermediate_size", "rms_norm_eps", "mlp_bias"))
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.self_attn = LLaMAAttention(config)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(dim, hidden, bias), "up_proj": nn.Linear(dim, hidden, bias),
                                  "down_proj": nn.Linear(hidden, dim, bias)})

    def forward(self, x, rotation, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class LLaMA(DecoderOnly):
    """LLaMA 1 to 3.3, Vicuna, Mistral, SmolLM2, Qwen2 and 2.5, Qwen3. `config` is the checkpoint's
    config.json as a dict."""

    DEFAULTS = dict(hidden_act="silu", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, attention_bias=False,
                    mlp_bias=False, tie_word_embeddings=False, sliding_window=None, qk_norm=False, eos_token_id=2)
    QWEN = dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, use_sliding_window=False, sliding_window=4096,
                eos_token_id=None)
    MEMBERS = {  # what the members of the family do in their own way, where their config.json does not say
        "llama": {}, "mistral": dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096),
        "qwen2": QWEN | dict(qkv_bias=True), "qwen3": QWEN | dict(qk_norm=True, head_dim=128)}
    ONLY = dict(hidden_act="silu")
    WORDS, PROJECT_IN = "model.embed_tokens.weight", None

    def __init__(self, config):
        super().__init__()
        config = read_options(config, self.DEFAULTS | self.MEMBERS[config["model_type"]], self.ONLY)
        heads = config["num_attention_heads"]
        config["num_key_value_heads"] = self.kv_heads = config["num_key_value_heads"] or heads
        config["head_dim"] = self.head_dim = config["head_dim"] or config["hidden_size"] // heads
        config.setdefault("qkv_bias", config["attention_bias"])
        # up to the width of its window, a sliding window is all of the text
        self.longest = config["sliding_window"] if config.get("use_sliding_window", True) else None
        self.dim, self.vocab_size = config["hidden_size"], config["vocab_size"]
        self.model = nn.ModuleDict({"embed_tokens": Embedding(self.vocab_size, self.dim), "norm": nn.RMSNorm(self.dim, config["rms_norm_eps"]),
                                    "layers": nn.ModuleList(LLaMALayer(config) for _ in range(config["num_hidden_layers"]))})
        self.lm_head = nn.Linear(self.dim, self.vocab_size, bias=False)
        self.finish(config)
        self.register_buffer("frequencies", rotary_frequencies(config, self.head_dim), persistent=False)

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return self.model["layers"]

    def read(self, x, positions, mask=None, cache=None):
        """(B,S,D) embeddings -> (B,S,D) hidden states; positions (B or 1,S) count a row's real
        positions from 0."""
        angles = (positions[:, None, :, None] * self.frequencies).repeat(1, 1, 1, 2)  # (B or 1, 1, S, hd)
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, None if cache is None else cache[i])
        return self.model["norm"](x)

    @staticmethod
    def checkpoint_name(name):
        """The name here of a tensor of a checkpoint: old files hold rotary frequencies, which
        follow from config.json."""
        return None if name.endswith("rotary_emb.inv_freq") else name


# -------------------------------------- T5 v1.1 and Flan-T5 (Raffel et al. 2020, Chung et al. 2022)


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
    far = near + ((distance.clamp(min=1).float() / near).log() / math.log(farthest / near) * (buckets - near)).long()
    return sign + torch.where(distance < near, distance, far.clamp(max=buckets - 1))


class T5Attention(nn.Module):
    """Without 1/sqrt(hd); positions are known by a bias that block 0 holds for all blocks."""

    def __init__(self, config, holds_bias=False):
        super().__init__()
        dim, self.head_dim = config["d_model"], config["d_kv"]
        inner = config["num_heads"] * self.head_dim
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, dim, bias=False)
        if holds_bias:
            self.relative_attention_bias = Embedding(config["relative_attention_num_buckets"], config["num_heads"])

    def keys_values(self, x):
        return split_heads(self.k(x), self.head_dim), split_heads(self.v(x), self.head_dim)

    def forward(self, x, keys_values, mask):
        q = split_heads(self.q(x), self.head_dim)
        return self.o(merge_heads(attention(q, *keys_values, mask, scale=1.0)))


class T5FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, hidden, self.gelu = config["d_model"], config["d_ff"], config["gelu"]
        self.wi_0, self.wi_1 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate=self.gelu) * self.wi_1(x))


class T5Block(nn.Module):
    """Self-attention, in the decoder attention to what the encoder has read, feed-forward; each
    with its norm."""

    def __init__(self, config, decodes, first):
        super().__init__()
        part = lambda name, module: nn.ModuleDict({name: module, "layer_norm": nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])})
        crosses = [part("EncDecAttention", T5Attention(config))] if decodes else []
        self.layer = nn.ModuleList([part("SelfAttention", T5Attention(config, holds_bias=first)), *crosses,
                                    part("DenseReluDense", T5FeedForward(config))])

    def forward(self, x, mask, read=None, read_mask=None, cache=None):
        """`read`: the keys and values (B,H,P,hd) of what the encoder has read, for a decoder's
        block."""
        norm, attend = self.layer[0]["layer_norm"], self.layer[0]["SelfAttention"]
        y = norm(x)
        keys_values = attend.keys_values(y)
        x = x + attend(y, keys_values if cache is None else remember(cache, *keys_values), mask)
        if read is not None:
            x = x + self.layer[1]["EncDecAttention"](self.layer[1]["layer_norm"](x), read, read_mask)
        return x + self.layer[-1]["DenseReluDense"](self.layer[-1]["layer_norm"](x))


class T5Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config, layers, decodes):
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, decodes, first=i == 0) for i in range(layers))
        self.final_layer_norm = nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])
        self.bidirectional, self.farthest = not decodes, config["relative_attention_max_distance"]

    def bias(self, queries, keys, keep=None):
        """Positions (Sq,) and (Sk,) -> (B or 1,H,Sq,Sk), to be added to the scores; keep broadcasts
        to that."""
        table = self.block[0].layer[0]["SelfAttention"].relative_attention_bias
        buckets = relative_buckets(keys - queries[:, None], self.bidirectional, table.num_embeddings, self.farthest)
        bias = rearrange(table(buckets), "q k h -> 1 h q k")
        return bias if keep is None else bias.masked_fill(~keep, torch.finfo(bias.dtype).min)


class T5(LanguageModel):
    """T5 v1.1 and Flan-T5, base to XXL. The encoder reads the prefix, soft prompts included, the
    decoder the target.

    `config` is the checkpoint's config.json as a dict. Without dense_act_fn, "gated-gelu" means the
    tanh form (google's files); the BLIP-2 ones say that theirs is exact."""

    DEFAULTS = dict(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=None, num_heads=8,
                    relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
                    feed_forward_proj="relu", dense_act_fn="gelu_new", is_gated_act=True, tie_word_embeddings=True, decoder_start_token_id=0,
                    eos_token_id=1)
    ONLY = dict(feed_forward_proj="gated-gelu", is_gated_act=True)
    GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
    WORDS, PROJECT_IN = "shared.weight", None

    def __init__(self, config):
        super().__init__()
        config = read_options(config, self.DEFAULTS, self.ONLY)
        if config["dense_act_fn"] not in self.GELU:
            raise ValueError(f"dense_act_fn = {config['dense_act_fn']!r} is not implemented for "
                             f"T5; only {', '.join(self.GELU)} are")
        config["gelu"] = self.GELU[config["dense_act_fn"]]
        self.dim, self.vocab_size, self.heads = config["d_model"], config["vocab_size"], config["num_heads"]
        self.shared = Embedding(self.vocab_size, self.dim)
        self.encoder = T5Stack(config, config["num_layers"], decodes=False)
        self.decoder = T5Stack(config, config["num_decoder_layers"] or config["num_layers"], decodes=True)
        self.lm_head = nn.Linear(self.dim, self.vocab_size, bias=False)
        self.finish(config)
        self.start_id = config["decoder_start_token_id"]
        # a tied head reads scaled hidden states (T5 1.0); today's writer ties all and says that
        # apart
        self.scale = self.dim**-0.5 if config.get("scale_decoder_outputs", config["tie_word_embeddings"]) else 1.0

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return [*self.encoder.block, *self.decoder.block]

    def read(self, prefix, prefix_mask):
        """The encoder: (B,P,D), (B,P) bool or None -> keys and values for each block of the
        decoder, and their mask."""
        x, prefix_mask = take_prefix(prefix, prefix_mask, self.dim, self.shared.weight.dtype)
        keep = None if prefix_mask is None else prefix_mask[:, None, None]  # (B, 1, 1, P)
        positions = torch.arange(x.shape[1], device=x.device)
        bias = self.encoder.bias(positions, positions, keep)
        for block in self.encoder.block:
            x = block(x, bias)
        x = self.encoder.final_layer_norm(x)
        return [block.layer[1]["EncDecAttention"].keys_values(x) for block in self.decoder.block], keep

    def write(self, x, bias, read, keep, cache=None):
        """The decoder: (B,T,D) embeddings -> (B,T,D) what the head reads."""
        for i, block in enumerate(self.decoder.block):
            x = block(x, bias, read[i], keep, None if cache is None else cache[i])
        return self.decoder.final_layer_norm(x) * self.scale

    def hidden_states(self, prefix, target_ids, prefix_mask=None):
        """As `forward` -> (B,T,D): what the head reads to predict target t."""
        self.check_targets(target_ids)
        read, keep = self.read(prefix, prefix_mask)
        ids = F.pad(filled(target_ids[:, :-1]), (1, 0), value=self.start_id)
        positions = torch.arange(ids.shape[1], device=ids.device)
        bias = self.decoder.bias(positions, positions, positions[:, None] >= positions)
        return self.write(self.embed(ids), bias, read, keep)

    def start(self, prefix, prefix_mask, steps, K):
        """Reads a prefix, and the token that starts the decoder. -> logits (B,1,V), and the cache
        for K beams' steps."""
        read, keep = self.read(prefix, prefix_mask)
        x = self.embed(torch.full((len(prefix), 1), self.start_id, device=prefix.device))
        cache = Cache(len(self.decoder.block), self.heads, read[0][0].shape[-1], x, None, steps - 1, K)
        cache.read, cache.keep = read, keep
        start = torch.zeros(1, dtype=torch.long, device=x.device)
        return word_scores(self.lm_head, self.write(x, self.decoder.bias(start, start), read, keep, cache)), cache

    def step(self, ids, cache):
        """Reads one more token of each beam, (B,K) -> logits of the next (B,K,V)."""
        columns = torch.arange(cache.width(), device=ids.device)
        keys = (columns - cache.P).div(cache.K, rounding_mode="floor") + cache.P  # the position of each column's token
        bias = self.decoder.bias(cache.positions[0], keys, cache.mask())
        return word_scores(self.lm_head, self.write(self.embed(ids), bias, cache.read, cache.keep, cache))

    @staticmethod
    def checkpoint_name(name):
        """The name here of a tensor of a checkpoint: the word embeddings have three names, and old
        files a bias in vain."""
        if name.endswith("EncDecAttention.relative_attention_bias.weight"):
            return None
        return "shared.weight" if name.endswith("coder.embed_tokens.weight") else name


# ------------------------------------------------------------------------------------------ loading

HEAD = "lm_head.weight"
ARCHITECTURES = {"opt": OPT, "llama": LLaMA, "mistral": LLaMA, "qwen2": LLaMA, "qwen3": LLaMA, "t5": T5}


def read_options(config, defaults, only):
    """config.json as a dict, with defaults for what it leaves out; ValueError for an option that is
    not implemented."""
    config = defaults | config
    for key, value in {**only, "quantization_config": None}.items():
        if config.get(key) != value:
            remedy = f"only {value!r} is" if value is not None else "use the checkpoint without"
            raise ValueError(f"{key} = {config[key]!r} is not implemented for "
                             f"{config.get('model_type')}; {remedy}")
    return config


def checkpoint_files(folder):
    """{tensor name: file} of a folder in Hugging Face layout: safetensors, or .bin where there is
    nothing else."""
    folder = Path(folder)
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            try:
                return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: damaged ({error}); download it again") from error
        if single.is_file():
            return {name: single for name, _ in read_file(single, lambda name: False)}
    raise FileNotFoundError(f"{folder}: no weights (model.safetensors, pytorch_model.bin, or "
                            "shards with their index)")


def read_file(file, wanted):
    """(name, tensor) for every tensor of a file; tensor is None, and nothing of it is read, where
    wanted(name) is False.

    A .bin is memory-mapped and read with weights_only=True: no code in it is ever executed."""
    try:
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield from ((name, tensor if wanted(name) else None) for name, tensor in tensors.items())
        else:
            with safe_open(file, framework="pt") as tensors:
                yield from ((name, tensors.get_tensor(name) if wanted(name) else None) for name in tensors.keys())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: missing; its index names it: download the checkpoint "
                                "again") from None
    except Exception as error:
        raise ValueError(f"{file}: damaged or no checkpoint ({error}); download or copy it "
                         "again") from error


def read_tensors(folder, wanted):
    """(name, tensor) of every tensor of a checkpoint for which wanted(name) is true; opens only the
    files it needs."""
    files = checkpoint_files(folder)
    for file in sorted({file for name, file in files.items() if wanted(name)}):
        yield from ((name, tensor) for name, tensor in read_file(file, wanted) if tensor is not None)


def assign_tensors(module, tensors, folder):
    """Puts {name: tensor} in the place of all parameters of a module, after saying what is missing,
    extra or misshapen."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    wrong = [f"{name} is {tuple(tensors[name].shape)}, config.json says {shapes[name]}"
             for name in shapes.keys() & tensors.keys() if shapes[name] != tuple(tensors[name].shape)]
    for problem, names in (("tensors missing", missing), ("unknown tensors", extra), ("wrong "
                                                                                      "shapes", sorted(wrong))):
        if names:
            raise ValueError(f"{folder}: {len(names)} {problem}, the first: {names[0]}; is this "
                             "the right checkpoint?")
    module.load_state_dict(tensors, strict=True, assign=True)


def read_llm_config(folder):
    """(config of the LLM, prefix of its tensors) of a folder that holds an LLM, or one inside a
    BLIP-2 checkpoint."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; {folder} is not a checkpoint in Hugging Face "
                                "layout")
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download it again") from error
    config, prefix = (config["text_config"], "language_model.") if "text_config" in config else (config, "")
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type {config.get('model_type')!r} is not implemented; "
                         f"there is {', '.join(ARCHITECTURES)}")
    return config, prefix


def renaming(architecture, prefix):
    """-> function from a tensor's name in the checkpoint to its name in the architecture, None for
    what does not belong there."""
    return lambda name: architecture.checkpoint_name(name.removeprefix(prefix)) if name.startswith(prefix) else None


def complete_tied(tensors, words):
    """Where config.json ties head and word embeddings, files hold either or both: one tensor gets
    both names.

    A head that differs from the word embeddings stays, whatever config.json says (as in
    transformers)."""
    held = [tensors[name] for name in (words, HEAD) if name in tensors]
    if held and torch.equal(held[0], held[-1]):
        tensors[words] = tensors[HEAD] = nn.Parameter(held[0], requires_grad=False)


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


def load_llm(folder, dtype=torch.bfloat16, device="cpu"):
    """The language model of a folder in Hugging Face layout, frozen and in eval mode.

    The LLM lies at the top level or under `language_model.` (BLIP-2). FileNotFoundError or
    ValueError name the file and the option that is not implemented, or the tensor that is missing,
    misshapen or damaged."""
    llm, (_, prefix) = empty_llm(folder), read_llm_config(folder)
    if isinstance(llm, T5) and dtype == torch.float16:
        raise ValueError(f"{folder}: T5 overflows in float16; load it in bfloat16 or float32")
    rename = renaming(type(llm), prefix)
    tensors = {rename(name): tensor.to(device, dtype) for name, tensor in read_tensors(folder, rename)}
    if llm.lm_head.weight is llm.get_parameter(llm.WORDS):
        complete_tied(tensors, llm.WORDS)
    assign_tensors(llm, tensors, folder)
    return llm.to(device).requires_grad_(False).eval()


def read_word_embeddings(folder):
    """(V, D) float32: the word embeddings in the space where soft prompts enter; reads that tensor
    (and project_in)."""
    config, prefix = read_llm_config(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    rename, words = renaming(architecture, prefix), architecture.WORDS
    if (architecture.DEFAULTS | config)["tie_word_embeddings"] and words not in map(rename, checkpoint_files(folder)):
        words = HEAD
    wanted = {words, architecture.PROJECT_IN} - {None}
    tensors = {rename(name): tensor.float() for name, tensor in read_tensors(folder, lambda name: rename(name) in wanted)}
    if words not in tensors:
        raise ValueError(f"{folder}: {architecture.WORDS} is missing; is this the right "
                         "checkpoint?")
    project_in = tensors.get(architecture.PROJECT_IN)
    return tensors[words] if project_in is None else tensors[words] @ project_in.T
