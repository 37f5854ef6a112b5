"""Makes the small world of the study: pictures with captions, a ViT, language models of three families and several sizes, and a
Q-Former that went through a first stage like BLIP-2's.

    python miniature/make.py all             # or some of: scenes tokenizers vit llms stage1
    python miniature/make.py llms --which opt-256 t5-256
    python miniature/make.py demo            # after study.py: what is embedded in demo/

What is trained here is what people who run VPGTrans download. All that the paper trains, the sources too, is trained by
train.py: see study.py. The general text is WordNet's glosses, from the Debian package wordnet-base (apt-get install
wordnet-base). Each stage reads what the earlier ones left in --out, so a stage can be run again alone, and what lies
there is not made again.

B batch, T tokens, N image tokens, Q query tokens, D LLM width, V vocabulary.
"""

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import pairs
from demo import scenes
from llm import ARCHITECTURES
from qformer import VPG, normalise as normalise_pixels

IGNORE = -100
SEEDS = {"train": 1, "val": 2, "test": 8, "tokenizers": 3, "vit": 4, "llms": 5, "stage1": 6, "demo-train": 9, "demo-val": 10}
PAIRS = dict(train=20000, val=500, test=1000)
SHARES = {"5": 0.05, "10.7": 0.107, "25": 0.25}  # parts of the training images, for the question how many are needed

VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8,
              hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)
QFORMER = dict(vocab_size=30523, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
               hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
               cross_attention_frequency=2, encoder_hidden_size=128)
VPG_CONFIG = dict(model_type="blip-2", num_query_tokens=12, vision_config=dict(model_type="blip_2_vision_model", **VISION),
                  qformer_config=dict(model_type="blip_2_qformer", **QFORMER))


def opt_config(dim, layers, heads):
    return dict(model_type="opt", architectures=["OPTForCausalLM"], vocab_size=4032, hidden_size=dim, word_embed_proj_dim=dim,
                ffn_dim=4 * dim, num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=256,
                activation_function="relu", do_layer_norm_before=True, _remove_final_layer_norm=False, enable_bias=True,
                layer_norm_elementwise_affine=True, dropout=0.1, attention_dropout=0.0, layerdrop=0.0, init_std=0.02,
                bos_token_id=2, eos_token_id=2, pad_token_id=1, prefix="</s>", tie_word_embeddings=True, torch_dtype="bfloat16")


def llama_config(dim, layers, heads):
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=3000, hidden_size=dim, intermediate_size=8 * dim // 3 // 8 * 8,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, hidden_act="silu", rms_norm_eps=1e-5,
                max_position_embeddings=256, rope_theta=10000.0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
                torch_dtype="bfloat16")


def t5_config(dim, layers, heads):
    return dict(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True, vocab_size=3000, d_model=dim,
                d_kv=dim // heads, d_ff=2 * dim, num_layers=layers, num_decoder_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6, pad_token_id=0,
                eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False, torch_dtype="bfloat16")


LLMS = {"opt-64": opt_config(64, 3, 2), "opt-128": opt_config(128, 4, 4), "opt-192": opt_config(192, 4, 4), "opt-256": opt_config(256, 5, 4),
        "llama-128": llama_config(128, 4, 4), "llama-256": llama_config(256, 5, 4),
        "t5-128": t5_config(128, 3, 4), "t5-256": t5_config(256, 3, 4)}
STEPS = dict(vit=2000, stage1=1500) | {name: 1600 if "256" in name else 1000 for name in LLMS}

# ------------------------------------------------------------------------------------------------------------------ files


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def save_bf16(file, tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, file,
              metadata={"format": "pt"})
    file.chmod(0o644)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)", flush=True)


def glosses():
    """[("dog", "a member of the genus Canis"), ...] from WordNet."""
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        raise SystemExit(f"{folder}/data.noun: missing; install WordNet with: apt-get install wordnet-base")
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line[:1].isdigit() and " | " in line:
                word = re.sub(r"\(.*\)", "", line.split()[4]).replace("_", " ")
                found.append((word, line.split(" | ", 1)[1].strip()))
    return found


# -------------------------------------------------------------------------------------------------------------- training


def batches(count, size, steps, rng):
    """`steps` arrays of `size` indices below `count`, in epochs without repetition."""
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def optimise(name, model, steps, step_loss, evaluate=None, muon=0.02, adam=2e-3, every=100, warm=100):
    """Muon (Jordan et al. 2024) for the matrices inside, AdamW for the rest, or with muon=None for all; linear warm-up, cosine to
    zero, gradients clipped to norm 1, bf16 autocast. step_loss(step) -> loss.

    With AdamW alone, language models took three times as many steps until they could copy what colour goes with what shape. What
    AdamW is to go on training it had better train from the start: Muon leaves weights so large that AdamW's steps hardly move them."""
    inside = [m.weight for n, m in model.named_modules() if muon and isinstance(m, nn.Linear) and "head" not in n and m.weight.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in inside)]
    optimizers = [(adam, torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True))]
    optimizers += [(muon, torch.optim.Muon(inside, lr=muon, momentum=0.95, weight_decay=0.01))] if muon else []
    start, recent = time.time(), []
    for step in range(steps):
        for rate, optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(step)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*inside, *others], 1.0)
        for _, optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item())
        if (step + 1) % every == 0:
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent[-every:]):.3f} {(time.time() - start) / (step + 1):.3f} s/step", flush=True)
    print(f"{name}: {steps} steps in {(time.time() - start) / 60:.1f} min; {evaluate() if evaluate else ''}", flush=True)


def initialise(module):
    """Normal 0.02 for matrices, as in GPT-2, OPT and BERT."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(part.weight, std=0.02)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)


# ---------------------------------------------------------------------------------------------------------- stage: scenes


def make_scenes(args):
    """pairs/: PNG images, and lines of image, caption and truth for training (whole and in parts), validation and test."""
    folder = args.out / "pairs"
    for split, count in PAIRS.items():
        if (folder / f"{split}.jsonl").is_file():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        rng, lines = random.Random(SEEDS[split]), []
        for number in range(count):
            scene = scenes.random_scene(rng)
            name = f"{split}/{number:05d}.png"
            Image.fromarray(scenes.render(scene)[0]).save(folder / name)
            lines.append(json.dumps(dict(image=name, caption=scenes.caption(scene, rng), objects=scenes.truth(scene))))
        for part, share in (SHARES if split == "train" else {}).items():
            (folder / f"train-{part}.jsonl").write_text("\n".join(lines[: round(share * count)]) + "\n")
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"wrote {count} pairs to {folder}/{split}", flush=True)


# ------------------------------------------------------------------------------------------------------ stage: tokenizers


def make_tokenizers(args):
    """One for each family, on different texts: byte-level BPE (OPT), BPE with byte fallback (LLaMA), Unigram (T5)."""
    everything = [f"{word}: {gloss}" for word, gloss in glosses()]
    for number, (family, (build, config)) in enumerate(TOKENIZERS.items()):
        folder = args.out / f"tokenizer-{family}"
        if (folder / "tokenizer.json").is_file():
            continue
        rng = random.Random(SEEDS["tokenizers"] + 100 * number)
        texts = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(20000)] + rng.sample(everything, 60000)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = build(texts)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", config)
        print(f"tokenizer of {family}: {tokenizer.get_vocab_size()} pieces, "
              f"{np.mean([len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts[:1000]]):.1f} tokens a caption", flush=True)


def opt_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)])
    return tokenizer


def llama_tokenizer(texts):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=3000 - 259, show_progress=False))
    made = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(made["vocab"], key=made["vocab"].get)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [tuple(merge) for merge in made["merges"]],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def t5_tokenizer(texts):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=2990, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tokenizer


TOKENIZERS = {
    "opt": (opt_tokenizer, dict(tokenizer_class="GPT2Tokenizer", bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>",
                                add_bos_token=True, add_prefix_space=False, errors="replace", model_max_length=256)),
    "llama": (llama_tokenizer, dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256)),
    "t5": (t5_tokenizer, dict(tokenizer_class="T5Tokenizer", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=256))}


# ------------------------------------------------------------------------------------------------------------- stage: vit


def normalise(images):
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float"""
    return normalise_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))


def render_many(count, rng):
    """-> scenes, images (count, 64, 64, 3) uint8, owners (count, 64, 64) uint8"""
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    images, owners = zip(*map(scenes.render, drawn))
    return drawn, np.stack(images), np.stack(owners)


def patch_labels(drawn, owners):
    """For every 8 x 8 patch that an object touches: its colour, shape, size, place; elsewhere -100, and shape 0 ("nothing").

    The place is there so that the features keep where things are: it takes that to tell which colour goes with which shape."""
    colours, shapes, sizes = list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.SIZES)
    labels = np.full((len(drawn), 4, 64), IGNORE, dtype=np.int64)
    patches = owners.reshape(-1, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4).reshape(len(drawn), 64, 64)  # (B, patches, pixels)
    for i, scene in enumerate(drawn):
        cover = np.stack([(patches[i] == n).sum(-1) for n in range(1, len(scene["objects"]) + 1)])
        owner, touched = cover.argmax(0), cover.max(0) >= 4
        labels[i, 1] = 0
        for n, o in enumerate(scene["objects"]):
            here = touched & (owner == n)
            place = {"alone": 0, "above": 1 + n, "beside": 3 + n}[scene["arrangement"]]
            labels[i, :, here] = colours.index(o["colour"]), 1 + shapes.index(o["shape"]), sizes.index(o["size"]), place
    return torch.from_numpy(labels)


class PatchReader(nn.Module):
    """The ViT with linear readers of colour, shape, size and place on each patch; the readers are thrown away."""

    def __init__(self):
        super().__init__()
        self.vpg = VPG(VPG_CONFIG)
        initialise(self)
        self.heads = nn.ModuleList(nn.Linear(VISION["hidden_size"], n) for n in (len(scenes.COLOURS), 1 + len(scenes.SHAPES), 2, 5))
        self.vpg.requires_grad_(False).vision_model.requires_grad_(True)

    def forward(self, images):
        x = self.vpg.vision_model.post_layernorm(self.vpg.features(images))[:, 1:]
        return [head(x) for head in self.heads]

    def loss(self, images, labels):
        return sum(F.cross_entropy(out.float().flatten(0, 1), labels[:, i].flatten(), ignore_index=IGNORE) for i, out in enumerate(self(images)))


def make_vit(args):
    """The ViT, from dense labels: which colour, shape, size and place has the object under this patch?"""
    if (args.out / "vit" / "model.safetensors").is_file():
        return
    torch.manual_seed(SEEDS["vit"])
    rng = random.Random(SEEDS["vit"])
    model = PatchReader()
    drawn, images, owners = render_many(40000, rng)
    labels = patch_labels(drawn, owners)
    held_scenes, held_images, held_owners = render_many(512, rng)
    held_labels = patch_labels(held_scenes, held_owners)
    index = list(batches(len(images), 64, args.steps["vit"], np.random.default_rng(SEEDS["vit"])))

    def evaluate():
        with torch.no_grad():
            outs = [out.argmax(-1) for out in model(normalise(held_images))]
        seen = held_labels[:, 0] != IGNORE
        return "on patches of held-out objects right: " + " ".join(
            f"{what} {(outs[i] == held_labels[:, i])[seen].float().mean():.3f}" for i, what in enumerate(("colour", "shape", "size", "place")))

    optimise("vit", model, args.steps["vit"], lambda step: model.loss(normalise(images[index[step]]), labels[index[step]]), evaluate)
    write_json(args.out / "vit" / "config.json", VPG_CONFIG)
    save_bf16(args.out / "vit" / "model.safetensors", {n: p for n, p in model.vpg.state_dict().items() if n.startswith("vision_model.")})


# ------------------------------------------------------------------------------------------------------------ stage: llms


def scene_document(scene, rng, encoder_decoder):
    """Texts about one scene, as (opening, captions): what a language model must learn to use is its context.

    The opening, key words or captions or nothing, stands where a captioning prompt has the image."""
    kind = rng.random()
    if kind < 0.35:
        opening = scenes.tags(scene, rng)
    elif kind < 0.55:
        opening = " ".join(scenes.caption(scene, rng) for _ in range(rng.choice([1, 1, 2])))
    else:
        opening = ""
    return opening, [scenes.caption(scene, rng) for _ in range(1 if encoder_decoder else rng.choice([1, 2, 3, 4]))]


def pad_rows(rows):
    longest = max(map(len, rows))
    return torch.tensor([row + [IGNORE] * (longest - len(row)) for row in rows])


def decoder_corpus(tok, count, rng, length=96):
    """-> rows of general text (R, length), and documents as lists of ids: opening, BOS, captions that end with a newline each."""
    newline = tok.end_id
    general = tok.encode_all([f"{word}: {gloss}" for word, gloss in rng.sample(glosses(), 60000)])
    stream = [i for ids in general for i in [*ids, newline]]
    rows = [[tok.bos_id] + stream[i : i + length - 1] for i in range(0, len(stream) - length, length - 1)]
    documents = [scene_document(scenes.random_scene(rng), rng, False) for _ in range(count)]
    openings = tok.encode_all([opening for opening, _ in documents])
    captions = iter(tok.encode_all([caption for _, several in documents for caption in several]))
    about = []
    for (opening, several), ids in zip(documents, openings):
        ids = ids + [tok.bos_id]
        for _ in several:
            ids += [*next(captions), newline]
        about.append(ids[:length])
    return rows, about


def encoder_decoder_corpus(tok, count, rng, length=48):
    """-> (encoder ids, decoder ids) of general text and of scenes: as prefix language models, the encoder reads a first part, too."""
    pairs = rng.sample(glosses(), 60000)
    general = list(zip(tok.encode_all([word for word, _ in pairs]), tok.encode_all([gloss for _, gloss in pairs])))
    documents = [scene_document(scenes.random_scene(rng), rng, True) for _ in range(count)]
    openings, captions = tok.encode_all([opening for opening, _ in documents]), tok.encode_all([several[0] for _, several in documents])
    draws = np.random.default_rng(rng.randrange(2**32))
    about = []
    for opening, caption in zip(openings, captions):
        cut = data.first_part(tok, caption, draws)
        about.append((opening + caption[:cut], caption[cut:]))
    return [[(a[: length - 1] + [tok.eos_id], b[: length - 1] + [tok.eos_id]) for a, b in pairs] for pairs in (general, about)]


def read_first_tokens(llm, rows):
    """Loss of rows of ids (lists) of which the first id is the prefix."""
    ids = pad_rows(rows)
    return llm.loss(llm.embed(ids[:, :1]), ids[:, 1:])


def read_encoder_ids(llm, pairs):
    ids = pad_rows([a for a, _ in pairs])
    return llm.loss(llm.embed(ids.clamp(min=0)), pad_rows([b for _, b in pairs]), ids != IGNORE)


def reads_key_words(llm, tok, count=300):
    """How a language model captions behind key words: can it read what stands where the soft prompts will be?"""
    rng = random.Random(99)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    keys = tok.encode_all([scenes.tags(scene, rng) for scene in drawn])
    keys = [ids + [tok.eos_id if tok.encoder_decoder else tok.bos_id] for ids in keys]
    ids = data.pad(keys, IGNORE, left=True)
    texts = [tok.decode(answer) for answer in llm.generate(llm.embed(ids.clamp(min=0)), ids != IGNORE, stop=((tok.end_id,), (tok.eos_id,)))]
    claims, facts = [scenes.named(text) for text in texts], [set(map(tuple, scenes.truth(scene))) for scene in drawn]
    right = sum(len(c & f) for c, f in zip(claims, facts))
    return (f"behind key words it names colour and shape with precision {right / max(1, sum(map(len, claims))):.3f}, "
            f"recall {right / sum(map(len, facts)):.3f}; e.g. {texts[:2]}")


def make_llms(args):
    """The language models, on WordNet's glosses and on documents about scenes."""
    for name in args.which:
        family, folder = name.split("-")[0], args.out / name
        if (folder / "model.safetensors").is_file():
            continue
        write_json(folder / "config.json", LLMS[name])
        for file in (args.out / f"tokenizer-{family}").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tok = data.load_tokenizer(folder)
        corpus, read = (encoder_decoder_corpus, read_encoder_ids) if tok.encoder_decoder else (decoder_corpus, read_first_tokens)
        general, about = corpus(tok, 100000, random.Random(SEEDS["llms"]))
        seed = SEEDS["llms"] + 100 * list(LLMS).index(name)
        torch.manual_seed(seed)
        llm = ARCHITECTURES[family](LLMS[name])
        initialise(llm)
        rng, steps = np.random.default_rng(seed), args.steps[name]
        index = list(zip(batches(len(general), 16 if tok.encoder_decoder else 6, steps, rng),
                         batches(len(about), 80 if tok.encoder_decoder else 40, steps, rng)))

        def step_loss(step):
            sums, counts = zip(*(read(llm, [rows[i] for i in pick]) for rows, pick in zip((general, about), index[step])))
            return sum(sums) / sum(counts)

        optimise(name, llm, steps, step_loss, lambda: reads_key_words(llm, tok))
        save_bf16(folder / "model.safetensors", dict(llm.named_parameters()))  # a tied head is there once


# ---------------------------------------------------------------------------------------------------------- stage: stage1


class FirstStage(nn.Module):
    """BLIP-2's first stage (Li et al. 2023, section 3.2): a Q-Former learns from pairs before it meets any language model.

    Contrast (the best of the queries against the caption), matching (with the most confusing captions of the batch) and
    captioning. BLIP-2's Q-Former reads text with its own self-attention layers; here a small causal transformer that is
    thrown away does, which reads [queries, caption] for captioning and matching, and the caption alone for contrast."""

    def __init__(self, vpg, vocab_size):
        super().__init__()
        self.vpg, D = vpg, QFORMER["hidden_size"]
        self.reader = ARCHITECTURES["opt"](opt_config(D, 2, 4) | dict(vocab_size=vocab_size))
        self.image_side, self.text_side, self.matches = nn.Linear(D, 64), nn.Linear(D, 64), nn.Linear(D, 2)
        initialise(self.reader)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def read(self, prefix, ids):
        """(B,P,D), (B,T) -> hidden states (B,T,D) that predict the ids, and the one after the last id (B,D)"""
        x = self.reader.hidden_states(prefix, F.pad(ids, (0, 1), value=0))
        return x[:, :-1], x[torch.arange(len(x)), (ids != IGNORE).sum(1)]

    def forward(self, features, ids, bos_id):
        B = len(ids)
        queries = self.vpg.query(features)
        bos = self.reader.embed(torch.full((B, 1), bos_id))
        prefix = torch.cat([queries, bos.to(queries.dtype)], 1)
        images = F.normalize(self.image_side(queries).float(), dim=-1)  # (B, Q, 64)
        texts = F.normalize(self.text_side(self.read(bos, ids)[1]).float(), dim=-1)  # (B, 64)
        similarity = torch.einsum("iqd,jd->ijq", images, texts).amax(-1) / self.temperature
        same = torch.arange(B)
        contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        others = similarity.detach().masked_fill(torch.eye(B, dtype=torch.bool), -math.inf).softmax(1).multinomial(1)[:, 0]
        states, right = self.read(prefix, ids)
        captioning = F.cross_entropy(self.reader.lm_head(states).float().flatten(0, 1), ids.flatten(), ignore_index=IGNORE)
        _, wrong = self.read(prefix, ids[others])
        matching = F.cross_entropy(self.matches(torch.cat([right, wrong])).float(), torch.cat([same * 0 + 1, same * 0]))
        return contrast, matching, captioning


def make_stage1(args):
    """A Q-Former after the first stage, from the training pairs: what BLIP-2's second stage, and its baseline here, starts from."""
    if (args.out / "stage1" / "model.safetensors").is_file():
        return
    torch.manual_seed(SEEDS["stage1"])
    tok = data.load_tokenizer(args.out / "opt-128")
    vpg = VPG(VPG_CONFIG)
    vpg.reset()
    vit = {name: tensor.float() for name, tensor in load_file(args.out / "vit" / "model.safetensors").items()}
    vpg.load_state_dict(vpg.state_dict() | {name: vit[name] for name in vpg.frozen_parameters()})
    for name in vpg.frozen_parameters():
        vpg.get_parameter(name).requires_grad_(False)
    nn.init.normal_(vpg.query_tokens, std=0.5)  # apart from each other
    model = FirstStage(vpg, LLMS["opt-128"]["vocab_size"])
    rows = [json.loads(line) for line in (args.out / "pairs" / "train.jsonl").read_text().splitlines()]
    captions = tok.encode_all([pairs.clean_caption(row["caption"]) for row in rows])
    images = [np.asarray(Image.open(args.out / "pairs" / row["image"])) for row in rows]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = torch.cat([vpg.features(normalise(np.stack(images[i : i + 250]))).bfloat16() for i in range(0, len(images), 250)])
    index = list(batches(len(rows), 64, args.steps["stage1"], np.random.default_rng(SEEDS["stage1"])))
    losses = []

    def step_loss(step):
        parts = model(features[index[step]], pad_rows([captions[i] for i in index[step]]), tok.bos_id)
        losses.append([part.item() for part in parts])
        return sum(parts)

    optimise("stage1", model, args.steps["stage1"], step_loss, lambda: "contrast {:.3f}, matching {:.3f}, captioning {:.3f}".format(
        *np.mean(losses[-100:], axis=0)), muon=None, adam=1e-3)
    write_json(args.out / "stage1" / "config.json", VPG_CONFIG)
    save_bf16(args.out / "stage1" / "model.safetensors", vpg.state_dict())


# ------------------------------------------------------------------------------------------------------------ stage: demo


def make_demo(args):
    """demo/: 2,700 other pairs, the largest OPT as the target, and the source of seed 0, which study.py has trained."""
    pairs, number = ROOT / "demo" / "pairs", 0
    shutil.rmtree(pairs, ignore_errors=True)
    (pairs / "images").mkdir(parents=True)
    for split, count in (("train", 2400), ("val", 300)):
        rng, lines = random.Random(SEEDS[f"demo-{split}"]), []
        for _ in range(count):
            scene = scenes.random_scene(rng)
            name = f"images/{number:05d}.png"
            Image.fromarray(scenes.render(scene)[0]).save(pairs / name, optimize=True)
            lines.append(json.dumps(dict(image=name, caption=scenes.caption(scene, rng), objects=scenes.truth(scene))))
            number += 1
        (pairs / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("source", "target"):
        shutil.rmtree(ROOT / "demo" / name, ignore_errors=True)
    shutil.copytree(args.out / "opt-256", ROOT / "demo" / "target")
    subprocess.run([sys.executable, ROOT / "export.py", args.out / "runs" / "source-opt-128-s0", ROOT / "demo" / "source"], check=True)
    (ROOT / "demo" / "source" / "README.md").unlink()  # a model card that says how to load it


# ------------------------------------------------------------------------------------------------------------ the command

STAGES = dict(scenes=make_scenes, tokenizers=make_tokenizers, vit=make_vit, llms=make_llms, stage1=make_stage1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all", "demo"])
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder of the world (default: %(default)s)")
    parser.add_argument("--which", nargs="+", choices=list(LLMS), default=list(LLMS), help="language models (default: all)")
    parser.add_argument("--quick", type=float, default=1.0, help="share of the steps, for a trial (default: %(default)s)")
    args = parser.parse_args()
    args.steps = {name: max(1, int(args.quick * steps)) for name, steps in STEPS.items()}
    torch.set_num_threads(1)
    for stage in STAGES if "all" in args.stages else [s for s in STAGES if s in args.stages]:
        STAGES[stage](args)
    if "demo" in args.stages:
        make_demo(args)


if __name__ == "__main__":
    main()
