"""What reads and writes: tokenizers and language models of three families, in several sizes.

They read WordNet's glosses, and documents in which several texts about one scene follow each other.
"""

import json
import random

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import data
from llm import ARCHITECTURES
from study import scenes
from study.world import IGNORE, SEEDS, batches, glosses, initialise, optimise, save_bf16, write_json

GENERAL, ABOUT = 60_000, 100_000  # glosses and documents that a language model reads


def opt_config(dim, layers, heads):
    return dict(
        model_type="opt", architectures=["OPTForCausalLM"],
        vocab_size=4032, max_position_embeddings=256,
        hidden_size=dim, word_embed_proj_dim=dim, ffn_dim=4 * dim,
        num_hidden_layers=layers, num_attention_heads=heads,
        activation_function="relu", enable_bias=True,
        do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True,
        dropout=0.1, attention_dropout=0.0, layerdrop=0.0, init_std=0.02,
        bos_token_id=2, eos_token_id=2, pad_token_id=1, prefix="</s>",
        tie_word_embeddings=True, torch_dtype="bfloat16")


def llama_config(dim, layers, heads):
    return dict(
        model_type="llama", architectures=["LlamaForCausalLM"],
        vocab_size=3000, max_position_embeddings=256, rope_theta=10000.0,
        hidden_size=dim, intermediate_size=8 * dim // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        hidden_act="silu", rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, torch_dtype="bfloat16")


def t5_config(dim, layers, heads):
    return dict(
        model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True,
        vocab_size=3000, relative_attention_num_buckets=32, relative_attention_max_distance=128,
        d_model=dim, d_kv=dim // heads, d_ff=2 * dim,
        num_layers=layers, num_decoder_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        tie_word_embeddings=False, torch_dtype="bfloat16")


LLMS = {
    "opt-64": opt_config(64, 3, 2),
    "opt-128": opt_config(128, 4, 4),
    "opt-192": opt_config(192, 4, 4),
    "opt-256": opt_config(256, 5, 4),
    "llama-128": llama_config(128, 4, 4),
    "llama-256": llama_config(256, 5, 4),
    "t5-128": t5_config(128, 3, 4),
    "t5-256": t5_config(256, 3, 4)}

# ------------------------------------------------------------------------------------- tokenizers


def opt_tokenizer(texts):
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)])
    return tokenizer


def llama_tokenizer(texts):
    """BPE with byte fallback: its pieces are learned first, and bytes are put before them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    size = 3000 - len(special) - len(fallback)
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = [*special, *fallback, *sorted(learned["vocab"], key=learned["vocab"].get)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learned["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def t5_tokenizer(texts):
    """Unigram."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=2990, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tokenizer


TOKENIZERS = {
    "opt": (opt_tokenizer, dict(
        tokenizer_class="GPT2Tokenizer", bos_token="</s>", eos_token="</s>", unk_token="</s>",
        pad_token="<pad>", add_bos_token=True, add_prefix_space=False, errors="replace",
        model_max_length=256)),
    "llama": (llama_tokenizer, dict(
        tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=256)),
    "t5": (t5_tokenizer, dict(
        tokenizer_class="T5Tokenizer", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=256))}


def make_tokenizers(args):
    """One for each family, on texts of its own: 20,000 captions and 60,000 glosses."""
    everything = [f"{word}: {gloss}" for word, gloss in glosses()]
    for number, (family, (build, config)) in enumerate(TOKENIZERS.items()):
        folder = args.out / f"tokenizer-{family}"
        if (folder / "tokenizer.json").is_file():
            continue
        rng = random.Random(SEEDS["tokenizers"] + 100 * number)
        texts = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(20000)]
        texts += rng.sample(everything, GENERAL)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = build(texts)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", config)
        lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts[:1000]]
        pieces = tokenizer.get_vocab_size()
        print(f"tokenizer of {family}: {pieces} pieces, {np.mean(lengths):.1f} tokens a caption", flush=True)


# ------------------------------------------------------------------------------- what LLMs read


def scene_document(scene, rng, encoder_decoder):
    """Texts about one scene, (opening, captions): what an LLM must learn to use is its context.

    The opening, key words or captions or nothing, stands where a captioning prompt has the image."""
    kind = rng.random()
    if kind < 0.35:
        opening = scenes.tags(scene, rng)
    elif kind < 0.55:
        opening = " ".join(scenes.caption(scene, rng) for _ in range(rng.choice([1, 1, 2])))
    else:
        opening = ""
    count = 1 if encoder_decoder else rng.choice([1, 2, 3, 4])
    return opening, [scenes.caption(scene, rng) for _ in range(count)]


def decoder_corpus(tok, count, rng, length=96):
    """What OPT and LLaMA read: rows of general text, and documents. -> lists of lists of ids

    The general text is cut into rows of `length` ids. A document is an opening, BOS, and captions,
    each with a newline at its end."""
    newline = tok.end_id
    general = tok.encode_all([f"{word}: {gloss}" for word, gloss in rng.sample(glosses(), GENERAL)])
    stream = [i for ids in general for i in [*ids, newline]]
    step = length - 1
    rows = [[tok.bos_id] + stream[i : i + step] for i in range(0, len(stream) - length, step)]

    documents = [scene_document(scenes.random_scene(rng), rng, False) for _ in range(count)]
    openings = tok.encode_all([opening for opening, _ in documents])
    captions = iter(tok.encode_all([caption for _, several in documents for caption in several]))
    about = []
    for (_, several), ids in zip(documents, openings):
        ids = ids + [tok.bos_id]
        for _ in several:
            ids += [*next(captions), newline]
        about.append(ids[:length])
    return rows, about


def encoder_decoder_corpus(tok, count, rng, length=48):
    """What T5 reads, general text and documents: lists of (encoder ids, decoder ids).

    As in a prefix language model, the encoder reads the first part of a caption, too."""
    pairs = rng.sample(glosses(), GENERAL)
    words = tok.encode_all([word for word, _ in pairs])
    general = list(zip(words, tok.encode_all([gloss for _, gloss in pairs])))

    documents = [scene_document(scenes.random_scene(rng), rng, True) for _ in range(count)]
    openings = tok.encode_all([opening for opening, _ in documents])
    captions = tok.encode_all([several[0] for _, several in documents])
    draws = np.random.default_rng(rng.randrange(2**32))
    about = []
    for opening, caption in zip(openings, captions):
        cut = data.first_part(tok, caption, draws)
        about.append((opening + caption[:cut], caption[cut:]))

    def ended(ids):
        return ids[: length - 1] + [tok.eos_id]

    return [[(ended(encoder), ended(decoder)) for encoder, decoder in both] for both in (general, about)]


# ----------------------------------------------------------------------------- language models


def read_first_tokens(llm, rows):
    """Loss of rows of ids (lists) of which the first id is the prefix."""
    ids = data.pad(rows, IGNORE)
    return llm.loss(llm.embed(ids[:, :1]), ids[:, 1:])


def read_encoder_ids(llm, pairs):
    """Loss of (encoder ids, decoder ids)."""
    ids = data.pad([encoder for encoder, _ in pairs], IGNORE)
    targets = data.pad([decoder for _, decoder in pairs], IGNORE)
    return llm.loss(llm.embed(ids.clamp(min=0)), targets, ids != IGNORE)


def reads_key_words(llm, tok, count=300):
    """How a language model captions behind key words, in words.

    Can it read what stands where the soft prompts will be?"""
    rng = random.Random(99)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    last = tok.eos_id if tok.encoder_decoder else tok.bos_id
    keys = [ids + [last] for ids in tok.encode_all([scenes.tags(scene, rng) for scene in drawn])]
    ids = data.pad(keys, IGNORE, left=True)
    stop = ((tok.end_id,), (tok.eos_id,))
    answers = llm.generate(llm.embed(ids.clamp(min=0)), ids != IGNORE, stop=stop)
    texts = [tok.decode(answer) for answer in answers]
    claims = [scenes.named(text) for text in texts]
    facts = [set(map(tuple, scenes.truth(scene))) for scene in drawn]
    right = sum(len(claim & fact) for claim, fact in zip(claims, facts))
    precision = right / max(1, sum(map(len, claims)))
    recall = right / sum(map(len, facts))
    return (f"behind key words it names colour and shape with precision {precision:.3f}, "
            f"recall {recall:.3f}; e.g. {texts[:2]}")


def make_llms(args):
    """The language models, on WordNet's glosses and on documents about scenes."""
    for name in args.which:
        if not (args.out / name / "model.safetensors").is_file():
            make_llm(name, args.out, args.steps[name])


def make_llm(name, out, steps):
    """A language model in out/NAME, with the tokenizer of its family."""
    family = name.split("-")[0]
    folder = out / name
    write_json(folder / "config.json", LLMS[name])
    for file in (out / f"tokenizer-{family}").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tok = data.load_tokenizer(folder)
    rng = random.Random(SEEDS["llms"])
    if tok.encoder_decoder:
        corpora = encoder_decoder_corpus(tok, ABOUT, rng)
        sizes = (16, 80)  # of general text and of documents, in a batch
        read = read_encoder_ids
    else:
        corpora = decoder_corpus(tok, ABOUT, rng)
        sizes = (6, 40)
        read = read_first_tokens
    seed = SEEDS["llms"] + 100 * list(LLMS).index(name)
    torch.manual_seed(seed)
    llm = ARCHITECTURES[family](LLMS[name])
    initialise(llm)
    order = np.random.default_rng(seed)
    index = list(zip(*(batches(len(rows), size, steps, order) for rows, size in zip(corpora, sizes))))

    def step_loss(step):
        losses = [read(llm, [rows[i] for i in drawn]) for rows, drawn in zip(corpora, index[step])]
        sums, counts = zip(*losses)
        return sum(sums) / sum(counts)

    optimise(name, llm, steps, step_loss, lambda: reads_key_words(llm, tok))
    save_bf16(folder / "model.safetensors", dict(llm.named_parameters()))  # a tied head is there once
