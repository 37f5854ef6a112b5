"""Frozen language models that read soft prompts: forward, loss, generation, loading straight from safetensors.

    llm = load_llm("facebook/opt-6.7b as a folder", dtype=torch.bfloat16, device="cuda")
    loss, tokens = llm.loss(soft_prompts, caption_ids)          # gradients flow to soft_prompts only
    captions = llm.generate(soft_prompts, num_beams=5)          # lists of ids

Every language model here reads a *prefix* of embeddings (soft prompts, BOS, an instruction) and scores or produces a
target. Parameter names equal the checkpoint's, so that loading needs no table of names. OPT today.

B batch, P prefix length, T target length, S = P + T - 1 positions read, D LLM width, V vocabulary, H heads, K beams.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn


# ---------------------------------------------------------------------------------------------- shared by all models


def attention(q, k, v, mask=None):
    """Softmax attention over (B,H,S,hd). `mask` (B,1,Sq,Sk) is True where a query may look; None means causal."""
    causal = mask is None and q.shape[2] > 1
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.requires_grad):
        # on CPUs these lines beat scaled_dot_product_attention in bf16, and in its backward (docs/notes.md)
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, Sq, Sk)
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def right_align(prefix, prefix_mask):
    """Moves each row's real positions to the right end, in order, so that holes anywhere become padding on the left.

    (B,P,D), (B,P) bool -> the same two, moved. A position then depends on the row's real positions alone."""
    order = prefix_mask.long().argsort(dim=1, stable=True)
    return prefix.gather(1, order[..., None].expand_as(prefix)), prefix_mask.gather(1, order)


def causal_mask(keep):
    """(B,S) bool, True for real positions -> (B,1,S,S). Padding looks at itself, so that no softmax is empty."""
    S = keep.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(S, dtype=torch.bool, device=keep.device)
    return ((causal & keep[:, None, :]) | itself)[:, None]


def caption_loss(logits, target_ids):
    """(B,T,V), (B,T) -> (sum of cross-entropies in float32, number of tokens); targets of -100 do not count.

    A sum and a count, so that ranks and micro-batches can be normalised by the global number of tokens."""
    loss = F.cross_entropy(logits.float().flatten(0, -2), target_ids.flatten(), ignore_index=-100, reduction="sum")
    return loss, (target_ids != -100).sum()


class Cache:
    """Keys and values of all layers, allocated once for `size` positions: two tensors (layers, B, H, size, hd)."""

    def __init__(self, layers, heads, head_dim, size, prefix, prefix_mask):
        B, P, _ = prefix.shape
        self.k, self.v = prefix.new_empty(2, layers, B, heads, size, head_dim)
        self.prefix, self.length = P, 0
        self.keep = None  # (B, size) bool where some rows have padding
        self.positions = torch.full((B,), P, device=prefix.device)  # of the next token in each row
        if prefix_mask is not None:
            self.keep = F.pad(prefix_mask, (0, size - P), value=True)
            self.positions = prefix_mask.sum(1)

    def append(self, layer, k, v):
        """Stores (B,H,s,hd) behind what `layer` has read so far and returns all keys and values up to there."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def repeat(self, K):
        """K beams in the place of every row."""
        self.k, self.v = self.k.repeat_interleave(K, dim=1), self.v.repeat_interleave(K, dim=1)
        self.positions = self.positions.repeat_interleave(K)
        self.keep = None if self.keep is None else self.keep.repeat_interleave(K, dim=0)

    def reorder(self, rows):
        """Beam i continues beam rows[i], which has the same prefix: only what came after that is copied."""
        for cache in (self.k, self.v):
            cache[:, :, :, self.prefix : self.length] = cache[:, rows, :, self.prefix : self.length]


# ----------------------------------------------------------------------------------------------------------- generation


def ends_with(ids, stop):
    """(..., n) ids -> (...) bool: do they end with one of the stop sequences?"""
    ended = torch.zeros(ids.shape[:-1], dtype=torch.bool, device=ids.device)
    for sequence in stop:
        if len(sequence) <= ids.shape[-1]:
            ended |= (ids[..., -len(sequence) :] == ids.new_tensor(sequence)).all(-1)
    return ended


def forbid_end(scores, ids, stop):
    """Forbids, in scores (..., V), the token that would complete a stop sequence after ids (..., n)."""
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
    """(B,V) -> (B,): the most probable token, or at temperature > 0 one drawn from the smallest set of tokens whose
    probabilities add up to top_p (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0)
    return ids.gather(1, probs.multinomial(1))[:, 0]


def decode_tokens(llm, logits, cache, steps, min_new_tokens, temperature, top_p, stop):
    """Greedy decoding or sampling, all rows side by side, until every row has ended. -> (B, n) ids"""
    ids = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(1, steps + 1):
        logits = forbid_end(logits, ids, stop) if n <= min_new_tokens else logits
        ids = torch.cat([ids, sample_next(logits, temperature, top_p)[:, None]], dim=1)
        ended |= ends_with(ids, stop)
        if n == steps or ended.all():
            return ids
        logits = llm.step(ids[:, -1], cache)


def beam_search(llm, logits, cache, steps, min_new_tokens, K, length_penalty, stop):
    """Beam search with transformers' rules: a hypothesis scores log-probability / length ** length_penalty (its end mark
    counts), and a row is done when no running beam, at its present length, beats its K finished ones. -> (B, n) ids"""
    B, V = logits.shape
    row = torch.arange(B, device=logits.device)
    cache.repeat(K)
    logits = logits.repeat_interleave(K, dim=0)
    beams = torch.empty(B, K, 0, dtype=torch.long, device=logits.device)  # (B, K, n) the running ones
    scores = torch.tensor([0.0] + [-1e9] * (K - 1), device=logits.device).repeat(B, 1)  # (B, K): all start from beam 0
    best = torch.full((B, K, steps), -1, device=logits.device)  # (B, K, steps) the finished ones, -1 behind their ends
    best_scores = torch.full((B, K), -1e9, device=logits.device)
    done = torch.zeros(B, 1, dtype=torch.bool, device=logits.device)
    width = (1 + len(stop)) * K  # candidates looked at: even if the best K all end, K go on
    pick = lambda x, index: x.gather(1, index.view(B, -1, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
    for n in range(1, steps + 1):
        log_p = logits.float().log_softmax(-1).view(B, K, V)
        log_p = forbid_end(log_p, beams, stop) if n <= min_new_tokens else log_p
        top, index = (scores[..., None] + log_p).flatten(1).topk(width)  # (B, width)
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
        cache.reorder((row[:, None] * K + pick(index // V, chosen)).flatten())
        logits = llm.step(beams[..., -1].flatten(), cache)


class Generates:
    """`generate` for every model that has `start` (read the prefix) and `step` (read one more token)."""

    @torch.inference_mode()
    def generate(self, prefix, prefix_mask=None, max_new_tokens=30, num_beams=1, length_penalty=1.0, min_new_tokens=0,
                 temperature=0.0, top_p=1.0, stop=((2,),)):
        """Continues a prefix. (B,P,D), (B,P) bool -> B lists of ids, without the stop sequence and what follows.

        `stop` holds the sequences of ids that end a text, `max_new_tokens` and `min_new_tokens` count the end mark.
        num_beams > 1 is beam search (temperature 0 only); temperature > 0 samples from the `top_p` nucleus."""
        if num_beams > 1 and temperature > 0:
            raise ValueError("generate: beam search does not sample; use num_beams=1 or temperature=0")
        logits, cache = self.start(prefix, prefix_mask, max_new_tokens)
        if num_beams > 1:
            ids = beam_search(self, logits, cache, max_new_tokens, min_new_tokens, num_beams, length_penalty, stop)
        else:
            ids = decode_tokens(self, logits, cache, max_new_tokens, min_new_tokens, temperature, top_p, stop)
        return [without_end([i for i in row if i >= 0], stop) for row in ids.tolist()]


# ------------------------------------------------------------------------------------------- OPT (Zhang et al. 2022)


class OPTAttention(nn.Module):
    def __init__(self, dim, heads, index):
        super().__init__()
        self.heads, self.index = heads, index
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, mask, cache):
        q, k, v = (rearrange(f(x), "b s (h d) -> b h s d", h=self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        return self.out_proj(rearrange(attention(q, k, v, mask), "b h s d -> b s (h d)"))


class OPTLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        dim = config["hidden_size"]
        self.pre_norm = config["do_layer_norm_before"]  # False in opt-350m alone
        self.self_attn = OPTAttention(dim, config["num_attention_heads"], index)
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
        self.embed_tokens = nn.Embedding(config["vocab_size"], word_dim)
        self.embed_positions = nn.Embedding(config["max_position_embeddings"] + 2, dim)  # rows 0 and 1 are never read
        self.project_in = nn.Linear(word_dim, dim, bias=False) if word_dim != dim else None
        self.project_out = nn.Linear(dim, word_dim, bias=False) if word_dim != dim else None
        self.layers = nn.ModuleList(OPTLayer(config, i) for i in range(config["num_hidden_layers"]))
        final = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
        self.final_layer_norm = nn.LayerNorm(dim) if final else None


class OPT(Generates, nn.Module):
    """OPT, 125M to 66B, the odd opt-350m included. `config` is the checkpoint's config.json as a dict.

    Frozen weights are the caller's choice (`load_llm` freezes); there is no dropout in this file."""

    DEFAULTS = dict(do_layer_norm_before=True, _remove_final_layer_norm=False, activation_function="relu", vocab_size=50272,
                    max_position_embeddings=2048, enable_bias=True, layer_norm_elementwise_affine=True, hidden_size=768,
                    num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072)

    def __init__(self, config):
        super().__init__()
        config = self.DEFAULTS | config
        config["word_embed_proj_dim"] = config.get("word_embed_proj_dim") or config["hidden_size"]
        only = dict(activation_function="relu", enable_bias=True, layer_norm_elementwise_affine=True)
        for key, value in only.items():
            if config[key] != value:
                raise ValueError(f"config.json: {key} = {config[key]!r} is not implemented for OPT; only {value!r} is")
        self.config = config
        self.dim, self.vocab_size = config["hidden_size"], config["vocab_size"]
        self.model = nn.ModuleDict({"decoder": OPTDecoder(config)})

    @property
    def decoder(self):
        return self.model["decoder"]

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return self.decoder.layers

    def embed(self, ids):
        """(B,T) -> (B,T,D): word embeddings in the space where soft prompts enter (after project_in)."""
        x = self.decoder.embed_tokens(ids)
        return x if self.decoder.project_in is None else self.decoder.project_in(x)

    def read(self, x, positions, mask=None, cache=None):
        """(B,S,D) embeddings -> (B,S,D) hidden states; positions count a row's real positions from 0."""
        longest = self.config["max_position_embeddings"]
        if x.shape[1] > longest:
            raise ValueError(f"{x.shape[1]} positions (prefix and target) are more than this OPT's {longest}; shorten them")
        x = x + self.decoder.embed_positions(positions + 2)
        for layer in self.layers:
            x = layer(x, mask, cache)
        return x if self.decoder.final_layer_norm is None else self.decoder.final_layer_norm(x)

    def head(self, x):
        """Hidden states -> logits; the head is tied to the word embeddings."""
        x = x if self.decoder.project_out is None else self.decoder.project_out(x)
        return F.linear(x, self.decoder.embed_tokens.weight)

    def forward(self, prefix, target_ids, prefix_mask=None):
        """(B,P,D), (B,T), (B,P) bool -> logits (B,T,V): row t is the prediction of target t.

        `prefix_mask` is False at holes, anywhere; each row gives what it gives alone with its holes taken out. None
        means no holes and takes the fast path. Targets of -100 stand behind a row's real targets."""
        P, T = check_prefix(prefix, self.dim), target_ids.shape[1]
        read_targets = self.embed(target_ids[:, :-1].clamp(min=0))
        positions, mask = torch.arange(P + T - 1, device=prefix.device), None
        prefix = prefix.to(read_targets.dtype)
        if prefix_mask is not None:
            prefix, prefix_mask = right_align(prefix, prefix_mask)
            keep = F.pad(prefix_mask, (0, T - 1), value=True)  # (B, S)
            positions, mask = (keep.cumsum(1) - 1).clamp(min=0), causal_mask(keep)
        x = self.read(torch.cat([prefix, read_targets], dim=1), positions, mask)
        return self.head(x[:, P - 1 :].contiguous())  # a strided matrix product would first copy the whole head

    def loss(self, prefix, target_ids, prefix_mask=None):
        """As `forward` -> (sum of cross-entropies in float32, number of tokens); -100 does not count."""
        return caption_loss(self(prefix, target_ids, prefix_mask), target_ids)

    def start(self, prefix, prefix_mask, room):
        """Reads a prefix. -> logits of the next token (B,V), and the cache with room for that many tokens."""
        P, mask = check_prefix(prefix, self.dim), None
        prefix = prefix.to(self.decoder.embed_tokens.weight.dtype)
        positions, longest = torch.arange(P, device=prefix.device), self.config["max_position_embeddings"]
        if P + room - 1 > longest:
            raise ValueError(f"a prefix of {P} and {room} new tokens are more than this OPT's {longest} positions")
        if prefix_mask is not None:
            prefix, prefix_mask = right_align(prefix, prefix_mask)
            positions, mask = (prefix_mask.cumsum(1) - 1).clamp(min=0), causal_mask(prefix_mask)
        heads = self.config["num_attention_heads"]
        cache = Cache(len(self.layers), heads, self.dim // heads, P + room, prefix, prefix_mask)
        x = self.read(prefix, positions, mask, cache)
        cache.length = P
        return self.head(x[:, -1]), cache

    def step(self, ids, cache):
        """Reads one more token a row, (B,) -> logits of the next (B,V)."""
        mask = None if cache.keep is None else cache.keep[:, None, None, : cache.length + 1]
        x = self.read(self.embed(ids[:, None]), cache.positions[:, None], mask, cache)
        cache.length += 1
        cache.positions = cache.positions + 1
        return self.head(x[:, -1])

    @staticmethod
    def checkpoint_name(name):
        """The name here of a tensor of an OPT checkpoint: old files lack `model.`; the head is tied, hence left out."""
        name = "model." + name if name.startswith("decoder.") else name
        return None if name == "lm_head.weight" else name

    WORD_EMBEDDINGS = "model.decoder.embed_tokens.weight"
    PROJECT_IN = "model.decoder.project_in.weight"


def check_prefix(prefix, dim):
    """The length of a prefix (B,P,D), which must not be empty and must have the LLM's width."""
    if prefix.ndim != 3 or prefix.shape[1] == 0 or prefix.shape[2] != dim:
        raise ValueError(f"the prefix must be (B, P >= 1, {dim}), not {tuple(prefix.shape)}; a text alone needs its BOS in it")
    return prefix.shape[1]


# -------------------------------------------------------------------------------------------------------------- loading

ARCHITECTURES = {"opt": OPT}


def checkpoint_files(folder):
    """{tensor name: file} of a folder in Hugging Face layout: safetensors, or .bin where there is nothing else."""
    folder = Path(folder)
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            try:
                return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError) as error:
                raise ValueError(f"{index}: damaged ({error}); download it again") from error
        if single.is_file():
            return {name: single for name, _ in read_file(single, lambda name: False)}
    raise FileNotFoundError(f"{folder}: no weights (model.safetensors, pytorch_model.bin, or shards with their index)")


def read_file(file, wanted):
    """(name, tensor) for every tensor of a file; tensor is None, and nothing of it is read, where wanted(name) is False.

    A .bin is memory-mapped and read with weights_only=True: no code in it is ever executed."""
    try:
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield from ((name, tensor if wanted(name) else None) for name, tensor in tensors.items())
        else:
            with safe_open(file, framework="pt") as tensors:
                yield from ((name, tensors.get_tensor(name) if wanted(name) else None) for name in tensors.keys())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: missing; its index names it: download the checkpoint again") from None
    except Exception as error:
        raise ValueError(f"{file}: damaged or no checkpoint ({error}); download or copy it again") from error


def read_tensors(folder, wanted):
    """(name, tensor) of every tensor of a checkpoint for which wanted(name) is true; opens only the files it needs."""
    files = checkpoint_files(folder)
    for file in sorted({file for name, file in files.items() if wanted(name)}):
        yield from ((name, tensor) for name, tensor in read_file(file, wanted) if tensor is not None)


def assign_tensors(module, tensors, folder):
    """Puts {name: tensor} in the place of all parameters of a module, after saying what is missing, extra or misshapen."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    wrong = [f"{name} is {tuple(tensors[name].shape)}, config.json says {shapes[name]}"
             for name in shapes.keys() & tensors.keys() if shapes[name] != tuple(tensors[name].shape)]
    for problem, names in (("tensors missing", missing), ("unknown tensors", extra), ("wrong shapes", sorted(wrong))):
        if names:
            raise ValueError(f"{folder}: {len(names)} {problem}, the first: {names[0]}; is this the right checkpoint?")
    module.load_state_dict(tensors, strict=True, assign=True)


def read_config(folder):
    """(config of the LLM, prefix of its tensors) of a folder that holds an LLM, or one inside a BLIP-2 checkpoint."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; {folder} is not a checkpoint in Hugging Face layout")
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download it again") from error
    config, prefix = (config["text_config"], "language_model.") if "text_config" in config else (config, "")
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type {config.get('model_type')!r} is not implemented; there is {', '.join(ARCHITECTURES)}")
    return config, prefix


def load_llm(folder, dtype=torch.bfloat16, device="cpu"):
    """The language model of a folder in Hugging Face layout, frozen and in eval mode.

    The LLM lies at the top level or under `language_model.` (BLIP-2). FileNotFoundError or ValueError name the file and
    the tensor that is missing, misshapen or damaged."""
    config, prefix = read_config(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    with torch.device("meta"):
        llm = architecture(config)
    rename = lambda name: architecture.checkpoint_name(name.removeprefix(prefix)) if name.startswith(prefix) else None
    tensors = {rename(name): tensor.to(device, dtype) for name, tensor in read_tensors(folder, rename)}
    assign_tensors(llm, tensors, folder)
    return llm.requires_grad_(False).eval()


def read_word_embeddings(folder):
    """(V, D) float32: the word embeddings in the space where soft prompts enter; reads that tensor (and project_in)."""
    config, prefix = read_config(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    rename = lambda name: architecture.checkpoint_name(name.removeprefix(prefix)) if name.startswith(prefix) else None
    wanted = (architecture.WORD_EMBEDDINGS, architecture.PROJECT_IN)
    tensors = {rename(name): tensor.float() for name, tensor in read_tensors(folder, lambda name: rename(name) in wanted)}
    if architecture.WORD_EMBEDDINGS not in tensors:
        raise ValueError(f"{folder}: {architecture.WORD_EMBEDDINGS} is missing; is this the right checkpoint?")
    words, project_in = tensors[architecture.WORD_EMBEDDINGS], tensors.get(architecture.PROJECT_IN)
    return words if project_in is None else words @ project_in.T
