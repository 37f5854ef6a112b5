"""Makes everything that is embedded in demo/: pictures with captions, a small BLIP-2 (the source) and a larger OPT (the target).

    python demo/make.py all          # or some of: scenes tokenizer vit llms source

Needs the WordNet glosses of the Debian package wordnet-base (apt-get install wordnet-base) as general text. Each stage
reads what the earlier ones left, so a stage can be run again alone; what is not embedded lies in --work. The stages
took 14 (vit), 30 (llms) and 6 (source) minutes on two busy CPU cores. No training here sees a picture of demo/pairs:
those are for the transfer.

B batch, T tokens, N image tokens, Q query tokens, D LLM width, V vocabulary.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import data
import scenes
from llm import OPT, load_llm
from qformer import VPG, is_frozen

BOS, IGNORE = 2, -100
SEEDS = dict(train_pairs=1, val_pairs=2, tokenizer=3, vit=4, llms=5, source=6, source_val=7)
TRAIN_PAIRS, VAL_PAIRS = 2400, 300
PIECES, VOCABULARY = 4000, 4032                              # the table has spare rows, as OPT's

VISION = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6, image_size=64, patch_size=8,
              hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)
QFORMER = dict(vocab_size=30523, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
               hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
               cross_attention_frequency=2, encoder_hidden_size=192)
QUERY_TOKENS = 12


def opt_config(dim, layers, heads):
    return dict(model_type="opt", architectures=["OPTForCausalLM"], vocab_size=VOCABULARY, hidden_size=dim, word_embed_proj_dim=dim,
                ffn_dim=4 * dim, num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=256,
                activation_function="relu", do_layer_norm_before=True, _remove_final_layer_norm=False, enable_bias=True,
                layer_norm_elementwise_affine=True, dropout=0.1, attention_dropout=0.0, layerdrop=0.0, init_std=0.02,
                bos_token_id=BOS, eos_token_id=BOS, pad_token_id=1, prefix="</s>", tie_word_embeddings=True, torch_dtype="bfloat16")


LLMS = {"source": opt_config(128, 4, 4), "target": opt_config(256, 5, 4)}


# ---------------------------------------------------------------- files

def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def save_bf16(file, tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, file,
              metadata={"format": "pt"})
    file.chmod(0o644)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")


def glosses():
    """Lines such as "dog: a member of the genus Canis", from WordNet."""
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        raise SystemExit(f"{folder}/data.noun: missing; install WordNet with: apt-get install wordnet-base")
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line[:1].isdigit() and " | " in line:
                word = re.sub(r"\(.*\)", "", line.split()[4]).replace("_", " ")
                lines.append(f"{word}: {line.split(' | ', 1)[1].strip()}")
    return lines


# ---------------------------------------------------------------- training in general

def batches(count, size, steps, rng):
    """`steps` arrays of `size` indices below `count`, in epochs without repetition."""
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def optimise(name, parameters, steps, rate, step_loss, evaluate=None, every=100, warm=100):
    """AdamW, linear warm-up, cosine to zero, gradients clipped to norm 1, bf16 autocast. step_loss(step) -> loss."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=0.05),
              dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    start, recent = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % every == 0:
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent[-every:]):.3f} {(time.time() - start) / (step + 1):.3f} s/step",
                  flush=True)
        if evaluate and (step + 1) % (10 * every) == 0:
            print(f"{name} {step + 1}: {evaluate()}", flush=True)
    print(f"{name}: {steps} steps in {(time.time() - start) / 60:.1f} min; {evaluate() if evaluate else ''}", flush=True)


def initialise(module):
    """Normal 0.02 for matrices, as in GPT-2, OPT and BERT."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(part.weight, std=0.02)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)


# ---------------------------------------------------------------- stage: scenes

def make_scenes(args):
    """demo/pairs: PNG images (smaller than JPEG here) and jsonl lines."""
    folder = HERE / "pairs"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for old in (folder / "images").glob("*"):
        old.unlink()
    number = 0
    for split, count in (("train", TRAIN_PAIRS), ("val", VAL_PAIRS)):
        rng, lines = random.Random(SEEDS[f"{split}_pairs"]), []
        for _ in range(count):
            scene = scenes.random_scene(rng)
            name = f"images/{number:05d}.png"
            Image.fromarray(scenes.render(scene)[0]).save(folder / name, optimize=True)
            lines.append(json.dumps(dict(image=name, caption=scenes.caption(scene, rng), objects=scenes.truth(scene))))
            number += 1
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"wrote {number} pairs to {folder} ({size / 1e6:.1f} MB)")


# ---------------------------------------------------------------- stage: tokenizer

def make_tokenizer(args):
    """A byte-level BPE with OPT's special tokens. The source's also knows <image>, as BLIP-2's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    rng = random.Random(SEEDS["tokenizer"])
    captions = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(20000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(captions + rng.sample(glosses(), 60000), trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", BOS)])
    special = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    for name in ("target", "source"):
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "source":
            tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_prefix_space=False,
                                                          errors="replace", model_max_length=256, **special))
        write_json(folder / "special_tokens_map.json", special)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    print(f"tokenizer: {tokenizer.get_vocab_size()} pieces, newline {newline}, "
          f"{np.mean([len(tokenizer.encode(c).ids) for c in captions[:1000]]):.1f} tokens a caption with BOS")


def load_tokenizer():
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(HERE / "target" / "tokenizer.json"))
    return lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)], tokenizer


# ---------------------------------------------------------------- stage: vit

def render_many(count, rng):
    """-> scenes, images (count, 64, 64, 3) uint8, owners (count, 64, 64) uint8"""
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    images, owners = zip(*map(scenes.render, drawn))
    return drawn, np.stack(images), np.stack(owners)


def normalise(images):
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float"""
    return data.normalise(torch.from_numpy(images).permute(0, 3, 1, 2))


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
        self.vpg = VPG(dict(vision_config=VISION, qformer_config=QFORMER, num_query_tokens=QUERY_TOKENS))
        initialise(self)
        self.heads = nn.ModuleList(nn.Linear(VISION["hidden_size"], n) for n in (8, 9, 2, 5))

    def forward(self, images):
        x = self.vpg.vision_model.post_layernorm(self.vpg.features(images))[:, 1:]
        return [head(x) for head in self.heads]

    def loss(self, images, labels):
        logits = self(images)
        return sum(F.cross_entropy(out.float().flatten(0, 1), labels[:, i].flatten(), ignore_index=IGNORE) for i, out in enumerate(logits))


def make_vit(args):
    """The ViT, from dense labels: which colour, shape, size and place has the object under this patch?"""
    torch.manual_seed(SEEDS["vit"])
    rng = random.Random(SEEDS["vit"])
    model = PatchReader()
    drawn, images, owners = render_many(2 * args.scenes, rng)
    labels = patch_labels(drawn, owners)
    held_scenes, held_images, held_owners = render_many(512, rng)
    held_labels = patch_labels(held_scenes, held_owners)
    index = list(batches(len(images), 64, args.vit_steps, np.random.default_rng(SEEDS["vit"])))

    def evaluate():
        with torch.no_grad():
            outs = [out.argmax(-1) for out in model(normalise(held_images))]
        seen = held_labels[:, 0] != IGNORE
        return "on patches of held-out objects right: " + " ".join(
            f"{what} {(outs[i] == held_labels[:, i])[seen].float().mean():.3f}" for i, what in enumerate(("colour", "shape", "size", "place")))

    def step_loss(step):
        pick = index[step]
        batch, target = images[pick], labels[pick]
        return model.loss(normalise(batch), target)

    frozen = [p for n, p in model.vpg.named_parameters() if not n.startswith("vision_model.")]
    for p in frozen:
        p.requires_grad_(False)
    optimise("vit", model.parameters(), args.vit_steps, args.vit_rate, step_loss, evaluate)
    save_bf16(args.work / "vit.safetensors", {n: p for n, p in model.vpg.state_dict().items() if n.startswith("vision_model.")})


# ---------------------------------------------------------------- stage: llms

def scene_document(scene, rng, encode_one):
    """Several texts about one scene, one after another, as [ids]: what a language model must learn to use is its context.

    Half of the documents begin with key words or captions and then have </s> where a captioning prompt has it."""
    line = lambda text: encode_one(text)
    kind = rng.random()
    if kind < 0.35:
        opening = line(scenes.tags(scene, rng))
    elif kind < 0.55:
        opening = line(" ".join(scenes.caption(scene, rng) for _ in range(rng.choice([1, 1, 2]))))
    else:
        opening = []
    ids = opening + [BOS]
    for _ in range(rng.choice([1, 2, 3, 4])):
        ids += line(scenes.caption(scene, rng) + "\n")
    return ids


def make_corpus(args, encode, rng, length):
    """Rows of (length) ids: packed glosses, and scene documents padded with -100."""
    stream = [i for ids in encode([g + "\n" for g in rng.sample(glosses(), args.glosses)]) for i in ids]
    rows = [[BOS] + stream[i:i + length - 1] for i in range(0, len(stream) - length, length - 1)]
    texts, plan = [], []
    record = lambda text: (texts.append(text), [("text", len(texts) - 1)])[1]
    for _ in range(args.documents):
        plan.append(scene_document(scenes.random_scene(rng), rng, record))
    encoded = encode(texts)
    for document in plan:
        ids = [i for part in document for i in (encoded[part[1]] if isinstance(part, tuple) else [part])][:length]
        rows.append(ids + [IGNORE] * (length - len(ids)))
    return torch.tensor(rows), len(plan)


def context_use(llm, encode):
    """Loss per token of a caption (with newline) behind: nothing, key words, another caption, another scene's caption."""
    rng = random.Random(99)
    drawn = [scenes.random_scene(rng) for _ in range(256)]
    captions = encode([scenes.caption(s, rng) for s in drawn])
    newline = encode(["\n"])[0][0]
    openings = {"nothing": [[] for _ in drawn], "key words": encode([scenes.tags(s, rng) for s in drawn]),
                "caption": encode([scenes.caption(s, rng) for s in drawn])}
    openings["wrong key words"] = openings["key words"][1:] + openings["key words"][:1]
    result = {}
    for name, prefixes in openings.items():
        total = count = 0.0
        for prefix, caption in zip(prefixes, captions):
            with torch.no_grad():
                s, n = llm.loss(llm.embed(torch.tensor([prefix + [BOS]])), torch.tensor([caption + [newline]]))
            total, count = total + s.item(), count + n.item()
        result[name] = round(total / count, 3)
    return result


def make_llms(args):
    """Both language models, on WordNet glosses and documents about scenes; the target is also what is embedded as demo/target."""
    encode, _ = load_tokenizer()
    rows, documents = make_corpus(args, encode, random.Random(SEEDS["llms"]), 96)
    general = len(rows) - documents
    print(f"corpus: {general} rows of glosses, {documents} documents about scenes, {(rows != IGNORE).sum() / 1e6:.1f}M tokens")
    for name in args.which:
        torch.manual_seed(SEEDS["llms"])
        llm = OPT(LLMS[name])
        initialise(llm)
        steps = args.llm_steps[name]
        rng = np.random.default_rng(SEEDS["llms"])
        mixed = zip(batches(general, 6, steps, rng), batches(documents, 40, steps, rng))
        index = [np.concatenate([a, general + b]) for a, b in mixed]

        def step_loss(step):
            batch = rows[index[step]]
            length = (batch != IGNORE).sum(1)
            total = count = 0
            for part in (batch[:6], batch[6:, : int(length[6:].max())]):
                s, n = llm.loss(llm.embed(part[:, :1].clamp(min=0)), part[:, 1:])
                total, count = total + s, count + n
            return total / count

        optimise(name, llm.parameters(), steps, args.llm_rate[name], step_loss, lambda: context_use(llm, encode))
        tensors = dict(llm.named_parameters())  # the head, tied, is left out
        if name == "target":
            write_json(HERE / "target" / "config.json", LLMS["target"])
            write_json(HERE / "target" / "generation_config.json", dict(bos_token_id=BOS, eos_token_id=BOS, pad_token_id=1))
            save_bf16(HERE / "target" / "model.safetensors", tensors)
        else:
            write_json(args.work / "source-llm" / "config.json", LLMS["source"])
            save_bf16(args.work / "source-llm" / "model.safetensors", tensors)


# ---------------------------------------------------------------- stage: source

def word_likeness(soft_prompts, words):
    """How far soft prompts (B,Q,D) are from mixtures of word embeddings (V,D): squared distance, in units of a word's square norm.

    The mixture is the softmax attention of a soft prompt over the words, so that the loss pulls it towards words it is near."""
    scores = soft_prompts.float() @ words.T - 0.5 * words.pow(2).sum(-1)     # nearest word first, up to a constant
    mixture = (scores * 16 / words.pow(2).sum(-1).mean()).softmax(-1) @ words
    return (soft_prompts.float() - mixture).pow(2).sum(-1).mean() / words.pow(2).sum(-1).mean()


def caption_ids(encode, newline, captions):
    """-> (B, T) ids, each caption followed by the newline that ends it, padded with -100"""
    ids = [c + [newline] for c in encode(captions)]
    return torch.tensor([i + [IGNORE] * (max(map(len, ids)) - len(i)) for i in ids])


def make_source(args):
    """The source's Q-Former and projector, through the frozen source LLM, with a loss that keeps soft prompts near words."""
    torch.manual_seed(SEEDS["source"])
    encode, tokenizer = load_tokenizer()
    newline = encode(["\n"])[0][0]
    llm = load_llm(args.work / "source-llm", dtype=torch.float32)
    vpg = VPG(dict(vision_config=VISION, qformer_config=QFORMER, num_query_tokens=QUERY_TOKENS))
    initialise(vpg)
    vpg.load_state_dict(vpg.state_dict() | {n: t.float() for n, t in load_file(args.work / "vit.safetensors").items()})
    nn.init.normal_(vpg.query_tokens, std=0.5)
    projector = nn.Linear(QFORMER["hidden_size"], LLMS["source"]["hidden_size"])
    common = encode([scenes.caption(scenes.random_scene(r), r) for r in [random.Random(0)] for _ in range(3000)])
    words = llm.embed(torch.tensor(sorted({i for ids in common for i in ids})))  # those that captions use
    nn.init.normal_(projector.weight, std=float(words.pow(2).sum(-1).mean().sqrt()) / 128)
    nn.init.zeros_(projector.bias)
    vpg.requires_grad_(False)
    for name, p in vpg.named_parameters():
        p.requires_grad_(not is_frozen(name))

    def with_features(count, seed):
        rng = random.Random(seed)
        drawn, images, _ = render_many(count, rng)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return drawn, torch.cat([vpg.features(normalise(images[i:i + 256])).bfloat16() for i in range(0, count, 256)]), rng

    drawn, features, rng = with_features(args.scenes, SEEDS["source"])
    held, held_features, held_rng = with_features(VAL_PAIRS, SEEDS["source_val"])
    held_ids = caption_ids(encode, newline, [scenes.caption(s, held_rng) for s in held])
    print(f"source: {len(drawn)} fresh scenes, features {features.numel() * 2 / 1e6:.0f} MB", flush=True)
    index = list(batches(len(drawn), 64, args.source_steps, np.random.default_rng(SEEDS["source"])))
    bos = llm.embed(torch.tensor([[BOS]]))
    prefix = lambda f: projector(vpg.query(f))
    near = [0.0]

    def loss_of(f, ids, likeness=0.0):
        soft = prefix(f)
        distance = word_likeness(soft, words)
        near[0] = distance.item()
        total, count = llm.loss(torch.cat([soft, bos.expand(len(f), -1, -1).to(soft.dtype)], 1), ids)
        return total / count + likeness * distance

    def evaluate():
        vpg.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            matched, shuffled = loss_of(held_features, held_ids), loss_of(held_features.roll(1, 0), held_ids)
            soft = prefix(held_features).float()
            texts = generate(llm, torch.cat([soft, bos.expand(len(soft), -1, -1)], 1), tokenizer, newline)
        vpg.train()
        return (f"held-out loss {matched:.3f}, with the wrong image {shuffled:.3f}, {precision(texts, held)}, soft prompt norm "
                f"{soft.norm(dim=-1).mean():.2f} (words {words.norm(dim=-1).mean():.2f}), distance from words {near[0]:.2f}; "
                f"e.g. {texts[:3]}")

    def step_loss(step):
        pick = index[step]
        ids = caption_ids(encode, newline, [scenes.caption(drawn[i], rng) for i in pick])
        return loss_of(features[pick], ids, args.word_like)

    vpg.train()
    optimise("source", [*vpg.parameters(), *projector.parameters()], args.source_steps, args.source_rate, step_loss, evaluate)
    tensors = dict(vpg.state_dict()) | {f"language_projection.{n}": p for n, p in projector.state_dict().items()}
    tensors |= {f"language_model.{n}": p for n, p in llm.named_parameters()}
    write_source_config()
    save_bf16(HERE / "source" / "model.safetensors", tensors)


def write_source_config():
    folder = HERE / "source"
    write_json(folder / "config.json", dict(
        model_type="blip-2", architectures=["Blip2ForConditionalGeneration"], num_query_tokens=QUERY_TOKENS,
        image_token_index=PIECES, initializer_range=0.02, tie_word_embeddings=True, torch_dtype="bfloat16",
        vision_config=dict(model_type="blip_2_vision_model", **VISION), qformer_config=dict(model_type="blip_2_qformer", **QFORMER),
        text_config=LLMS["source"], use_decoder_only_language_model=True))
    write_json(folder / "generation_config.json", dict(bos_token_id=BOS, eos_token_id=BOS, pad_token_id=1))
    write_json(folder / "preprocessor_config.json", dict(
        image_processor_type="BlipImageProcessor", processor_class="Blip2Processor", size=dict(height=64, width=64), resample=3,
        do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=data.MEAN, image_std=data.STD, do_convert_rgb=True))


def generate(llm, prefix, tokenizer, newline):
    return tokenizer.decode_batch(llm.generate(prefix.float(), max_new_tokens=30, stop=((newline,), (BOS,))))


def precision(texts, held):
    """Of the colour + shape pairs that captions name, how many are in the picture; and of those in the picture, how many are named."""
    claims, facts = [scenes.named(t) for t in texts], [{tuple(p) for p in scenes.truth(s)} for s in held]
    right = sum(len(c & f) for c, f in zip(claims, facts))
    return f"colour + shape: precision {right / max(1, sum(map(len, claims))):.3f} recall {right / sum(map(len, facts)):.3f}"


# ---------------------------------------------------------------- the command

STAGES = dict(scenes=make_scenes, tokenizer=make_tokenizer, vit=make_vit, llms=make_llms, source=make_source)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/vpgtrans-demo"), help="folder for what is not embedded")
    parser.add_argument("--scenes", type=int, default=20000, help="fresh scenes for the source VPG; the ViT has twice as many others")
    parser.add_argument("--glosses", type=int, default=60000, help="WordNet glosses for the language models")
    parser.add_argument("--documents", type=int, default=150000, help="documents about scenes for the language models")
    parser.add_argument("--which", nargs="+", choices=["source", "target"], default=["source", "target"], help="LLMs to train")
    parser.add_argument("--word-like", type=float, default=0.3, help="weight of the loss that keeps the source's soft prompts near words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", type=float, default=1.0, help="share of the steps, for a trial")
    args = parser.parse_args()
    args.vit_steps, args.vit_rate = int(args.quick * 3000), 1e-3
    args.llm_steps = dict(source=int(args.quick * 2400), target=int(args.quick * 1800))
    args.llm_rate = dict(source=2e-3, target=1.5e-3)
    args.source_steps, args.source_rate = int(args.quick * 4000), 1e-3
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for stage in STAGES if "all" in args.stages else [s for s in STAGES if s in args.stages]:
        start = time.time()
        STAGES[stage](args)
        print(f"== {stage}: {(time.time() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
