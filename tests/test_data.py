"""Facts about data.py: tokenizers, captions, images, files of pairs, the order of samples."""

import csv
import dataclasses
import gzip
import io
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import data
import qformer
import train
from conftest import TEXT, write_pairs


@pytest.fixture(scope="module")
def tok(world):
    return data.load_tokenizer(world[1])


# ------------------------------------------------------------------------------------------------------------ tokenizers

def generated_text(sentences=400):
    """Sentences of made-up words and of the captions' words, and a few in other scripts."""
    rng = random.Random(0)
    words = ["".join(rng.choices("ka mi ro the in st er lo wa ne".split(), k=rng.randint(1, 3))) for _ in range(200)]
    words += sorted(set(" ".join(TEXT).split())) * 8
    return [*TEXT, *(" ".join(rng.choices(words, k=8)) for _ in range(sentences)), "don't they?", "naïve café 漢字 12 345", "It is 7:30.  A, B or C"]


CORPUS = generated_text()
PIECES = ["a red square", "red", "brown", " ", "  ", "\n", "\t", "\r\n", "don't", "It's", "naïve", "Ünïcödé", "e\u0301", "ﬁ", "漢字", "日本語", "한국어",
          "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\x00", "\x07", "\x7f", "\u200b", "\ufeff", "\u00a0", "\u2581", "Ċ", "Ġ",
          "0", "12345", "3.14", "<0x0A>", "<0x41>", "</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>",
          "x" * 300, "ab" * 99, "!?", "...", '"', "\\", "مرحبا", "שלום", "ไทย", "Ω≈ç√", "€"]


def varied_strings():
    """A thousand, of which every piece alone and with a space before and behind it."""
    rng = random.Random(0)
    mixed = [rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(2, 9))) for _ in range(1000 - 3 * len(PIECES) - 1)]
    return ["", *PIECES, *(f" {p}" for p in PIECES), *(f"{p} " for p in PIECES), *mixed]


def byte_level(pattern=None):
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] if pattern else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split) if split else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC() if pattern else None, decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(tokenizer.to_str())


def sentencepiece_bpe(form):
    """As LLaMA's: <unk> <s> </s>, the bytes, then pieces; spaces as ▁ by a normalizer (old files) or a pre-tokenizer (new ones)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # words, or BPE would learn whole sentences
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"] + BYTES))
    tokenizer.pre_tokenizer = None if form == "normalizer" else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if form == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str())
    return content | {"added_tokens": content["added_tokens"][:3]}


def unigram(byte_fallback=False):
    """As T5's: <pad> </s> <unk>, then pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]) if byte_fallback else decoders.Metaspace()
    tokenizer.normalizer = normalizers.NFKC() if byte_fallback else None
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"],
                                                                  unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(50), tokenizer.enable_padding(length=50)  # as saved after a training
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] += [["▁red", -3.0], *([byte, -20.0] for byte in BYTES if byte_fallback)]
    content["model"]["byte_fallback"] = byte_fallback
    return content


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA_TOKENS, T5_TOKENS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
KINDS = {  # content of tokenizer.json, model type, the class in transformers that reads it, the tokens in tokenizer_config.json
    "GPT-2": (byte_level, "opt", "GPT2Tokenizer", dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")),
    "Qwen": (lambda: byte_level(QWEN), "qwen2", "Qwen2Tokenizer", dict(bos_token=None, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")),
    "LLaMA, normalizer": (lambda: sentencepiece_bpe("normalizer"), "llama", "TokenizersBackend", LLAMA_TOKENS),
    "LLaMA, pre-tokenizer": (lambda: sentencepiece_bpe("pre-tokenizer"), "llama", "LlamaTokenizer", LLAMA_TOKENS),
    "Unigram": (unigram, "t5", "T5Tokenizer", T5_TOKENS),
    "Unigram, bytes": (lambda: unigram(True), "t5", "TokenizersBackend", T5_TOKENS)}


def write_json(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_kind(folder, kind):
    content, model_type, class_name, tokens = KINDS[kind]
    return write_json(folder, tokenizer=content(), config={"model_type": model_type}, tokenizer_config={"tokenizer_class": class_name, **tokens})


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: (our tokenizer, its folder)}"""
    folders = {kind: write_kind(tmp_path_factory.mktemp("kind"), kind) for kind in KINDS}
    return {kind: (data.load_tokenizer(folder), folder) for kind, folder in folders.items()}


def assert_equal_transformers(ours, folder, class_name):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == class_name
    texts = varied_strings()
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(texts) == 1000 and [ours.encode(text) for text in texts] == ids == ours.encode_all(texts)
    assert [ours.decode(row) for row in ids] == [theirs.decode(row, skip_special_tokens=True) for row in ids]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_equal_transformers(kinds, kind):
    assert_equal_transformers(*kinds[kind], KINDS[kind][2])


def test_vocab_json_and_merges_equal_transformers(kinds, tmp_path):
    """facebook/opt-* have no tokenizer.json."""
    ours, folder = kinds["GPT-2"]
    ours.encoder.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    old = data.load_tokenizer(tmp_path)
    assert (old.bos_id, old.eos_id, old.pad_id, old.end_id) == (2, 2, 1, ours.end_id)
    assert old.encode("x</s>y<pad>") == ours.encode("x</s>y<pad>") and old.decode([2, *old.encode(" red"), 2]) == " red"
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    assert_equal_transformers(data.load_tokenizer(tmp_path), tmp_path, "GPT2Tokenizer")


def test_llamas_old_files_are_read_as_they_say(kinds, tmp_path):
    """transformers 5 rebuilds them as new ones: no second ▁ before a leading space, none behind a special. On captions all agree."""
    ours, folder = kinds["LLaMA, normalizer"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **LLAMA_TOKENS}))
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    captions = [data.clean_caption(text) for text in CORPUS + varied_strings() if not re.search("<.*>|▁", text)]
    assert len(captions) > 600 and all(ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"] for text in captions)
    assert ours.encode(" red") != theirs(" red", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_survive_a_round_trip(kinds, kind):
    ours, texts = kinds[kind][0], [text for text in varied_strings() if "<" not in text and "▁" not in text]
    if kind.startswith("Unigram"):  # single spaces, and only the characters that it was trained on
        texts = [" ".join(text.split()) for text in CORPUS]
    if kind == "Qwen":
        texts = [normalizers.NFC().normalize_str(text) for text in texts]
    if kind == "LLaMA, pre-tokenizer":
        texts = [text.removeprefix(" ") for text in texts if not text.startswith("  ")]
    assert len(texts) > 60 and [ours.decode(ours.encode(text)) for text in texts] == texts


def test_vocab_spells_bytes(tok):
    vocab = tok.vocab()
    assert vocab["é".encode()[:1]] == tok.encode("é")[0] and vocab[b"\n"] == tok.end_id and vocab[b" red"] == tok.encode(" red")[0]
    assert not {0, 1, 2, 3} & set(vocab.values()) and len(vocab) == tok.encoder.get_vocab_size() - 4


@pytest.mark.parametrize("kind", ["LLaMA, normalizer", "LLaMA, pre-tokenizer", "Unigram, bytes", "Unigram"])
def test_vocab_spells_what_sentencepiece_means(kinds, kind):
    ours = kinds[kind][0]
    vocab, id_of = ours.vocab(), ours.encoder.token_to_id
    assert vocab[b" red"] == id_of("▁red") and vocab["é".encode()] == id_of("é") and vocab[b" "] == id_of("▁")
    assert vocab[b"e"] == id_of("e") != id_of("<0x65>")  # a plain piece that spells the byte wins
    assert vocab.get(b"\xff") == id_of("<0xFF>") and vocab.get(b"\x0a") == id_of("<0x0A>")
    assert not {b"<unk>", b"<s>", b"</s>", b"<pad>", b"<0xFF>", b"<0x65>"} & set(vocab)


@pytest.mark.parametrize("kind, before", [("GPT-2", ""), ("LLaMA, normalizer", " "), ("LLaMA, pre-tokenizer", " ")])
def test_the_spellings_of_a_texts_tokens_are_the_text(kinds, kind, before):
    ours = kinds[kind][0]
    spelled = {id: spelling for spelling, id in ours.vocab().items()}
    for text in [text.lstrip() for text in varied_strings() if not re.search("</|<s>|<unk>|<pad>|▁", text)]:
        assert b"".join(spelled[id] for id in ours.encode(text)) == (before + text if text else "").encode()


def test_a_newline_ends_a_caption_and_eos_where_there_is_none(kinds, tmp_path):
    end = {kind: ours.end_id for kind, (ours, _) in kinds.items()}
    assert end["GPT-2"] == kinds["GPT-2"][0].encode("\n")[0] and end["LLaMA, normalizer"] == end["LLaMA, pre-tokenizer"] == 3 + 10
    assert end["Unigram"] == end["Unigram, bytes"] == 1  # T5's </s>
    for kind, newline in (("Unigram", 1), ("Unigram, bytes", kinds["Unigram, bytes"][0].encoder.token_to_id("<0x0A>"))):
        assert data.load_tokenizer(write_json(write_kind(tmp_path / kind, kind), config={"model_type": "llama"})).end_id == newline


def spoken(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize("files, ids", [
    (dict(tokenizer_config=dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>"), config=dict(bos_token_id=9, eos_token_id=9)), (0, 2, 1)),
    (dict(tokenizer_config=dict(bos_token=spoken("<s>"), eos_token=spoken("</s>"), pad_token=None)), (0, 2, None)),
    (dict(tokenizer_config=dict(bos_token=None, eos_token="</s>"), config=dict(bos_token_id=0)), (None, 2, None)),  # Qwen2.5
    (dict(tokenizer_config=dict(eos_token="<s>"), special_tokens_map=dict(eos_token=spoken("</s>"), pad_token="<pad>")), (None, 2, 1)),
    (dict(tokenizer_config=dict(eos_token="<s>", added_tokens_decoder={}), special_tokens_map=dict(eos_token="</s>")), (None, 0, None)),
    (dict(special_tokens_map=dict(bos_token="<s>", eos_token="</s>")), (0, 2, None))])
def test_named_specials_are_as_transformers_finds_them(tmp_path, files, ids):
    write_json(tmp_path, tokenizer=byte_level(), **{"config": {}, **files})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = data.load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("config, ids", [
    (dict(model_type="qwen2", bos_token_id=5, eos_token_id=[7, 8], pad_token_id=-1), (5, 7, None)),
    (dict(model_type="llama", bos_token_id=None, eos_token_id=9, pad_token_id=0), (None, 9, 0)),
    (dict(model_type="blip-2", eos_token_id=9, text_config=dict(model_type="opt", eos_token_id=8)), (2, 8, 1)),
    (dict(model_type="opt"), (2, 2, 1)), (dict(model_type="llama"), (1, 2, None)), (dict(model_type="mistral"), (1, 2, None)),
    (dict(model_type="t5"), (None, 1, 0))])
def test_ids_of_config_json_where_no_token_is_named(tmp_path, config, ids):
    ours = data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level(), config=config))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids


def test_a_named_token_becomes_special(tmp_path):
    """As in transformers, where the file of the tokenizer does not say so."""
    write_json(tmp_path, tokenizer=byte_level() | {"added_tokens": []}, config={}, tokenizer_config={"eos_token": "</s>"})
    ours = data.load_tokenizer(tmp_path)
    assert ours.encode("a</s>") == PreTrainedTokenizerFast.from_pretrained(tmp_path)("a</s>")["input_ids"] and ours.encode("a</s>")[-1] == 2
    assert ours.decode(ours.encode("a</s>")) == "a" and b"</s>" not in ours.vocab()


@pytest.mark.parametrize("files, says", [
    (dict(config={"model_type": "qwen2"}), "eos_token in tokenizer_config.json.*eos_token_id in config.json"),
    (dict(config={"model_type": "qwen2", "eos_token_id": None}), "eos_token_id in config.json"),
    (dict(config={"model_type": "opt"}, tokenizer_config={"eos_token": None}), "eos_token in tokenizer_config.json"),
    (dict(config={"model_type": "opt"}, tokenizer_config={"bos_token": "[BOS]"}), "bos_token '\\[BOS\\]' of tokenizer_config.json"),
    (dict(config={"model_type": "opt"}, tokenizer_config={"eos_token": 2}), "eos_token 2 of tokenizer_config.json")])
def test_missing_specials_are_named(tmp_path, files, says):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{says}"):
        data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level(), **files))


def test_a_pad_token_that_was_added_later_is_done_without(tmp_path):
    ours = data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level(), config={"model_type": "opt"}, tokenizer_config={"pad_token": "[PAD]"}))
    assert ours.pad_id is None and ours.encode("[PAD]") == ours.encode("[PAD") + ours.encode("]")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: missing; .* Hugging Face layout"):
        data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level()))


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "vocab.json"])
@pytest.mark.parametrize("content", ["", '{"model": {', "<html>", "7"])
def test_a_damaged_file_is_named(tmp_path, damaged, content):
    write_json(tmp_path, tokenizer=byte_level(), config={"model_type": "opt"})
    if damaged == "vocab.json":
        (tmp_path / "tokenizer.json").unlink(), (tmp_path / "merges.txt").write_text("")
    (tmp_path / damaged).write_text(content)
    with pytest.raises(ValueError, match=f"{damaged}: .*download it again"):
        data.load_tokenizer(tmp_path)


def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path):
    vocab = {"[UNK]": 0, "a": 1, "</s>": 2}
    for model in (models.WordPiece(vocab, unk_token="[UNK]"), models.WordLevel(vocab, unk_token="[UNK]"), models.BPE(vocab, [])):
        write_json(tmp_path, tokenizer=json.loads(Tokenizer(model).to_str()), config={"model_type": "opt"})
        with pytest.raises(ValueError, match=f"tokenizer.json: {type(model).__name__} .*not implemented"):
            data.load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    write_json(tmp_path, config={"model_type": "llama"}, vocab={})
    with pytest.raises(FileNotFoundError, match="no tokenizer .tokenizer.json, or vocab.json and merges.txt.;"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")  # lmsys/vicuna-*
    with pytest.raises(FileNotFoundError, match="tokenizer.model.*--tgt-tokenizer.*huggyllama/llama-7b"):
        data.load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ text


def test_captions_are_cleaned_as_blip_does():
    assert data.clean_caption('A "Red" square; (on) a ~table!  #1: yes.') == "a red square on a table 1 yes"
    assert len(data.clean_caption("word " * 80).split()) == 50


def test_a_long_caption_keeps_its_end_mark(tok):
    ids = data.caption_ids(tok, "a red square on a brown table " * 9, max_tokens=10)
    assert len(ids) == 10 and ids[-1] == tok.end_id and ids[:-1] == tok.encode("a red square on a brown table " * 9)[:9]
    assert data.caption_ids(tok, "a red square") == [*tok.encode("a red square"), tok.end_id]


def test_the_prompt_is_soft_prompts_then_bos(tok):
    assert data.prompt_ids(tok, 3) == [-1, -1, -1, 2] and data.prompt_ids(tok, 1, "a red") == [-1, 2, *tok.encode("a red")]


def test_t5s_prompt_ends_with_eos_and_others_begin_with_bos_if_there_is_one(kinds):
    t5, qwen, llama = (kinds[kind][0] for kind in ("Unigram", "Qwen", "LLaMA, normalizer"))
    assert data.prompt_ids(t5, 2) == [-1, -1, 1] and data.prompt_ids(t5, 2, "a red") == [-1, -1, *t5.encode("a red"), 1]
    assert data.prompt_ids(qwen, 1) == [-1] and data.prompt_ids(qwen, 1, "a red") == [-1, *qwen.encode("a red")]
    assert data.prompt_ids(llama, 1) == [-1, 1] and data.prompt_ids(llama, 1, "a red") == [-1, 1, *llama.encode("a red")]
    assert data.caption_ids(t5, "a red") == [*t5.encode("a red"), 1]


@pytest.mark.parametrize("config, is_one", [
    ({"model_type": "t5"}, True), ({"model_type": "mt5", "is_encoder_decoder": True}, True), ({"model_type": "llama"}, False),
    ({"text_config": {"model_type": "t5"}}, True), ({"is_encoder_decoder": True, "text_config": {"model_type": "opt"}}, False)])
def test_config_json_says_whether_the_llm_is_an_encoder_decoder(tmp_path, config, is_one):
    write_json(write_kind(tmp_path, "Unigram"), config=config)
    assert data.load_tokenizer(tmp_path).encoder_decoder is is_one


def test_tokens_are_counted_on_captions(tok):
    counts = data.count_tokens(tok, ["a red square", "a red circle"], 400)
    assert counts[tok.end_id] == 2 and counts[tok.encode(" red")[0]] == 2 and counts.sum() == sum(len(data.caption_ids(tok, c)) for c in ("a red square", "a red circle"))


# ------------------------------------------------------------------------------------------------------------- images


def save(path, mode, colour, size=(40, 30), **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = lambda file: data.load_image(file).getpixel((0, 0))
    assert rgb(save(tmp_path / "plain.png", "RGB", (1, 2, 3))) == (1, 2, 3)
    assert rgb(save(tmp_path / "grey.png", "L", 90)) == (90, 90, 90)
    assert rgb(save(tmp_path / "clear.png", "RGBA", (10, 20, 30, 0))) == (255, 255, 255)  # transparency is white
    assert rgb(save(tmp_path / "half.png", "LA", (0, 128))) == (127, 127, 127)
    assert rgb(save(tmp_path / "deep.png", "I;16", 256 * 90)) == (90, 90, 90)
    assert max(rgb(save(tmp_path / "cmyk.jpg", "CMYK", (0, 0, 0, 255)))) < 10
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 10, 10, 0, 0, 0])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert rgb(tmp_path / "palette.png") == (200, 10, 10) and rgb(tmp_path / "clear.gif") == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert data.load_image(save(tmp_path / "turned.jpg", "RGB", "red", exif=turned)).size == (30, 40)


def photograph(width=640, height=480, seed=0):
    """Smooth colours with detail at all scales, as photographs have them."""
    rng, f = np.random.default_rng(seed), np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    channels = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, height, width))) / f.clip(1 / width) ** 1.3).real
    return Image.fromarray(np.clip(120 + 50 * channels / channels.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("kind, options", [("RGB", {"quality": 90}), ("L", {}), ("CMYK", {}), ("RGB", {"quality": 75, "progressive": True})])
def test_evaluation_images_equal_transformers(tmp_path, kind, options):
    """But for at most one of the 255 levels, 0.015 as normalised, in less than one of a hundred values: torch's kernel rounds otherwise."""
    photograph().convert(kind).save(tmp_path / "photo.jpg", **options)
    theirs = BlipImageProcessorPil(size={"height": 224, "width": 224})(Image.open(tmp_path / "photo.jpg"))["pixel_values"][0]
    with data.open_image(tmp_path / "photo.jpg") as image:
        ours = qformer.normalise(data.resize(image, 224)[None])[0]
    apart = (ours - torch.as_tensor(theirs)).abs() * 255 * torch.tensor(qformer.STD).view(3, 1, 1)  # in levels
    assert apart.max() < 1.001 and (apart > 1e-3).float().mean() < 0.01


def random_crops(file, **options):
    """Crops of a file by ten seeds, and the sizes at which it was decoded."""
    crops, sizes = [], []
    for seed in range(10):
        with data.open_image(file) as image:
            crops.append(data.random_crop(image, 224, np.random.default_rng(seed), **options).float())
            sizes.append(image.size)
    return torch.stack(crops), sizes


@pytest.mark.parametrize("width, height, factors", [(640, 480, {2}), (330, 330, {1}), (1500, 1100, {4}), (2900, 2700, {8}), (700, 360, {1, 2})])
def test_crops_of_jpegs_are_decoded_as_coarsely_as_they_allow(tmp_path, width, height, factors):
    """At a half, a quarter, an eighth, where 3/4 of the pixels that are wanted are left; and the crop is where it would be."""
    photograph(width, height).filter(ImageFilter.GaussianBlur(width / 200)).save(tmp_path / "photo.jpg", quality=95)
    coarse, sizes = random_crops(tmp_path / "photo.jpg")
    whole, all_of_it = random_crops(tmp_path / "photo.jpg", least=np.inf)
    assert {round(width / size[0]) for size in sizes} == factors and set(all_of_it) == {(width, height)}
    assert (coarse - whole).abs().mean((1, 2, 3)).max() < 4 and (coarse.mean((2, 3)) - whole.mean((2, 3))).abs().max() < 1


TOP = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0top\0\0\0\0\0"  # an orientation that is the text "top"


@pytest.mark.parametrize("kind, orientation", [(kind, o) for kind in ("jpg", "tif", "png") for o in (*range(1, 10), TOP) if (kind, o) != ("tif", TOP)])
def test_turned_images_are_cropped_as_upright_ones(tmp_path, kind, orientation):
    """By their EXIF orientation. One that Pillow does not know turns nothing."""
    back = {2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
            6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270]}.get(orientation, [])
    upright, exif = photograph().filter(ImageFilter.GaussianBlur(3)), Image.Exif()
    upright.save(tmp_path / f"upright.{kind}", quality=95)
    for turn in back:
        stored = upright.transpose(turn)
    if isinstance(orientation, int):
        exif[0x0112] = orientation
    else:
        exif = b"Exif\0\0" + orientation
    (stored if back else upright).save(tmp_path / f"turned.{kind}", exif=exif, quality=95)
    assert (random_crops(tmp_path / f"turned.{kind}")[0] - random_crops(tmp_path / f"upright.{kind}")[0]).abs().mean((1, 2, 3)).max() < 4


def test_a_decompression_bomb_is_an_unreadable_image(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", "RGB", "red", (300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match="bomb.png.*bomb"):
        data.load_image(tmp_path / "bomb.png")


def test_random_crops_are_half_to_all_of_the_area_and_half_are_flipped():
    """On a picture of its own coordinates, a crop shows where it comes from."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None] * 2, np.arange(100)[:, None] * 2
    areas, flips = [], []
    for seed in range(200):
        crop = data.random_crop(Image.fromarray(ramp), 50, np.random.default_rng(seed)).float()
        width, height = (crop[0, 0, -1] - crop[0, 0, 0]) / 2, (crop[1, -1, 0] - crop[1, 0, 0]) / 2
        areas.append(abs(width * height) / 100**2 * (50 / 49) ** 2), flips.append(bool(width < 0))
        assert crop.shape == (3, 50, 50) and height > 0
    assert 0.45 < min(areas) < 0.55 and max(areas) > 0.9 and 70 < sum(flips) < 130


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    file = tmp_path / "bad.jpg"
    if content is None:
        whole = save(tmp_path / "whole.png", "RGB", "red", (300, 300)).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.write_bytes(content)
    with pytest.raises(OSError, match="bad.jpg"):
        data.load_image(file)


# ------------------------------------------------------------------------------------------------------------- pairs


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


def of(pairs):
    """[(image's name, caption)] of all pairs"""
    return [(Path(pairs.file(i)).name, pairs.captions[i]) for i in range(len(pairs))]


def test_coco_annotations_find_their_images_and_every_caption(tmp_path):
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (7, 9)]
    annotations = [{"image_id": 7, "caption": "A cat."}, {"image_id": 9, "caption": "A dog"}, {"image_id": 7, "caption": "the same cat"},
                   {"image_id": 9, "caption": " ."}, {"image_id": 8, "caption": "nothing"}]
    file = write(tmp_path / "annotations" / "captions_train2017.json", json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "train2017").mkdir()
    for i in (7, 9):
        save(tmp_path / "train2017" / f"{i:012d}.jpg", "RGB", "red")
    pairs = data.read_pairs(f"coco={file}:0.5")
    assert pairs.name == "coco" and list(pairs.captions) == ["a cat", "a dog", "the same cat"] and len(pairs.images) == 2
    assert pairs.left_out == {"empty caption": [f"{file}, annotation 4"], "no image": [f"{file}, annotation 5"]}
    assert data.parse_spec(f"coco={file}:0.5") == ("coco", file, None, 0.5) and data.parse_spec("a/b.jsonl@c") == ("a", Path("a/b.jsonl"), Path("c"), None)
    assert pairs.file(0) == pairs.file(2) == str(tmp_path / "train2017" / "000000000007.jpg")
    assert list(data.one_caption_an_image(pairs, 10).captions) == ["a cat", "a dog"]


def test_a_list_in_json_and_images_elsewhere(tmp_path):
    save(tmp_path / "1.png", "RGB", "red")
    file = write(tmp_path / "notes" / "deep" / "pairs.json", json.dumps([{"image": "1.png", "caption": ["one", "two"]}]))
    assert list(data.read_pairs(f"{file}@{tmp_path}").captions) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="pairs.json@FOLDER"):
        data.read_pairs(str(file))


@pytest.mark.parametrize("text, captions", [
    ('{"image": "1.png", "caption": "a"}\n\n{"image": "1.png", "text": "b"}', ["a", "b"]), ('{"file_name": "1.png", "captions": ["a", "b"]}', ["a", "b"]),
    ('{"filepath": "1.png", "caption": "x", "all_captions": ["a", "b", "c"], "all_similarities": [0.1, 0.5, null]}', ["b"]),
    ('{"image": "1.png", "caption": "x", "all_captions": ["a"], "all_similarities": [null]}', ["x"])])
def test_keys_that_lie_around_are_understood(tmp_path, text, captions):
    save(tmp_path / "1.png", "RGB", "red")
    assert of(data.read_pairs(str(write(tmp_path / "pairs.jsonl", text)))) == [("1.png", caption) for caption in captions]


def test_tables_name_their_columns(tmp_path):
    """Quotes, commas and line breaks inside of a caption; columns in any order; short and damaged lines are left out."""
    save(tmp_path / "1.png", "RGB", "red"), save(tmp_path / "2.png", "RGB", "red")
    table = write(tmp_path / "pairs.csv", 'url,Caption,image\nx,"a cat, on\na mat",1.png\ny,a dog,2.png\nz,short\n')
    pairs = data.read_pairs(str(table))
    assert of(pairs) == [("1.png", "a cat, on a mat"), ("2.png", "a dog")] and pairs.left_out == {"no image": [f"{table}, line 5"]}
    assert of(data.read_pairs(str(write(tmp_path / "pairs.tsv", "filepath\ttitle\n1.png\ta, cat\n")))) == [("1.png", "a, cat")]
    pairs = data.read_pairs(str(write(tmp_path / "bad.tsv", b"image\tcaption\n1.png\ta \xff cat\n1.png\ta cat\n")))
    assert of(pairs) == [("1.png", "a cat")] and pairs.left_out.keys() == {"broken Unicode"}
    quotes = write(tmp_path / "quotes.csv", 'image,caption\n1.png,a cow\n1.png,"a cat\n2.png,a dog\n2.png,a horse\n')
    pairs = data.read_pairs(str(quotes))  # a quote that is never closed
    assert of(pairs) == [("1.png", "a cow")] and pairs.left_out == {"damaged line": [f"{quotes}, line {n}" for n in (3, 4, 5)]}
    excel = data.read_pairs(str(write(tmp_path / "excel.csv", "\ufeffimage,caption\r\n1.png,a cat\r\n,no image\r\n".encode())))
    assert of(excel) == [("1.png", "a cat")] and excel.left_out.keys() == {"no image"}
    with pytest.raises(ValueError, match="must name a column .* it names url, words"):
        data.read_pairs(str(write(tmp_path / "other.csv", "url,words\n1,2\n")))


def test_a_folder_of_images_with_texts_beside_them(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", "lonely.png", "empty.png", "broken.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, "RGB", "red")
    write(tmp_path / "b" / "2.txt", "\ufefftwo"), write(tmp_path / "b" / "1.txt", "one\n\nagain one\n"), write(tmp_path / "a.txt", "a")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    write(tmp_path / "empty.txt", " \n"), write(tmp_path / "broken.txt", b"\xff\xfe"), write(tmp_path / "notes.txt", "no image")
    pairs = data.read_pairs(str(tmp_path))
    assert of(pairs) == [("a.webp", "a"), ("1.png", "one"), ("1.png", "again one"), ("2.JPG", "two")]
    assert {kind: [Path(place).name for place in places] for kind, places in pairs.left_out.items()} == {
        "damaged caption file": ["broken.txt"], "empty caption": ["empty.png"], "no caption file": ["lonely.png"],
        "link to a folder": ["link"]}


@pytest.mark.parametrize("text, says", [('{"image": "1.png", "caption": ""}', "1 left out: empty caption"), ("", "not one image"), ("[1]", "no object"),
                                        ("7", "no object"), ('{"image": "1.p', "damaged line, such as .*pairs.jsonl, line 1"), ('{"picture": "1.png"}', "no image")])
def test_files_without_a_pair_say_what_is_wrong(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        data.read_pairs(str(write(tmp_path / "pairs.jsonl", text)))


@pytest.mark.parametrize("name, text, says", [("a.json", "[{", "not valid JSON"), ("a.json", "7", "neither a list"), ("a.parquet", "x", "are read from"),
                                              ("a.csv", "", "it names none"), ("a.json", "[" * 200_000, "not valid JSON"),
                                              ("a.json", '{"images": null, "annotations": []}', "neither a list"),
                                              ("a.json", '{"images": [{"id": [1], "file_name": "x"}], "annotations": [{"image_id": [2]}]}', "no image"),
                                              ("a.jsonl", "[" * 200_000, "damaged line"), ("a.jsonl", '{"image": true, "caption": "x"}', "no image")])
def test_files_of_no_format_are_refused(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=says):
        data.read_pairs(str(write(tmp_path / name, text)))


def test_lines_cut_or_damaged_are_left_out_and_named(tmp_path):
    save(tmp_path / "1.png", "RGB", "red")
    lines = ['{"image": "1.png", "caption": "first"}', '{"image": "1.png", "cap', '{"image": "1.png", "caption": "\\ud800 half"}', '{"image": "1.png", "caption": 7}',
             '{"image": "1.png", "caption": "Ωραία \u0007γάτα"}', '["1.png", "x"]', '{"image": "1.png", "caption": "last"}']
    file = write(tmp_path / "pairs.jsonl", "\n".join(lines))
    pairs = data.read_pairs(str(file))
    assert list(pairs.captions) == ["first", "ωραία γάτα", "last"]
    assert pairs.left_out == {"damaged line": [f"{file}, line 2"], "broken Unicode": [f"{file}, line 3"], "empty caption": [f"{file}, line 4"],
                              "no object with image and caption": [f"{file}, line 6"]}


def test_whole_images_are_held_out_always_the_same():
    pairs = make_pairs([f"{i // 5}.png" for i in range(500)], [str(i) for i in range(500)])
    held = data.hold_out(pairs, most=500, share=0.05)
    assert len(held) == 5 and held < set(pairs.files()) and data.hold_out(pairs) == held and len(data.hold_out(pairs, most=3)) == 3
    rest, val = pairs.without(held), pairs.without(held, instead=True)
    assert len(rest) == 475 and len(val) == 25 and set(val.files()) == held and set(rest.files()) | held == set(pairs.files())
    assert all(int(pairs.captions[i]) // 5 == int(pairs.file(i)[:-4]) for i in range(500))
    assert all(int(caption) // 5 == int(rest.file(i)[:-4]) for i, caption in enumerate(rest.captions))


def test_many_strings_are_kept_in_two_arrays():
    strings = data.Strings.of(["one", "", "Ωραία", "last"])
    assert list(strings) == ["one", "", "Ωραία", "last"] and strings[-1] == strings[3] and len(strings) == 4 and list(strings.take([2, 0])) == ["Ωραία", "one"]
    assert list(data.Strings.joined([strings, data.Strings.of([]), strings])) == [*strings, *strings]
    with pytest.raises(IndexError):
        strings[4]


def test_a_scan_is_kept_until_its_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "scans"))
    file = write_pairs(tmp_path / "pairs", 8)
    data.read_pairs(str(file))
    assert not (tmp_path / "scans").exists()  # too few to be worth it
    monkeypatch.setattr(data, "KEPT_FROM", 8)
    first, collect = of(data.read_pairs(str(file))), data.collect_pairs
    monkeypatch.setattr(data, "collect_pairs", lambda rows: pytest.fail("scanned again"))
    assert of(data.read_pairs(str(file))) == first and len(first) == 8
    monkeypatch.setattr(data, "collect_pairs", collect)
    with open(file, "a") as lines:
        lines.write('{"image": "0.png", "caption": "one more"}\n')
    assert of(data.read_pairs(str(file))) == [*first, ("0.png", "one more")]
    for scan in (tmp_path / "scans").glob("*"):
        scan.write_bytes(b"damaged")
    assert len(data.read_pairs(str(file))) == 9
    monkeypatch.setenv("VPGTRANS_CACHE", str(file / "not a folder"))  # a read-only home: scanned every time
    assert len(data.read_pairs(str(file))) == 9


def test_kept_scans_of_links_to_one_file_are_told_apart(tmp_path, monkeypatch):
    """As in the Hub's cache, where all names are links."""
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "scans"))
    monkeypatch.setattr(data, "KEPT_FROM", 1)
    shard = write_shard(tmp_path / "blobs" / "0a1b", {"1.jpg": encoded(1), "1.txt": b"one"})
    for name in ("a/00000.tar", "b/train.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(shard)
        assert pixels(data.read_pairs(str(tmp_path / name)).file(0)).shape == (30, 40, 3)


def test_paths_with_signs_in_them_are_read_as_they_are(tmp_path):
    write_pairs(tmp_path / "we@ird=x" / "a:5", 4)
    folder, file = tmp_path / "we@ird=x" / "a:5", tmp_path / "we@ird=x" / "a:5" / "pairs.jsonl"
    assert data.parse_spec(str(file)) == ("a:5", file, None, None) and len(data.read_pairs(str(file))) == 4
    assert data.parse_spec(str(folder)) == ("a:5", folder, None, None)
    assert data.parse_spec(f"n={tmp_path}/x.json@images:0.5") == ("n", tmp_path / "x.json", Path("images"), 0.5)
    assert data.parse_spec("x.jsonl")[0] == "x" and data.parse_spec("coco/x.jsonl")[0] == "coco"


@pytest.mark.parametrize("sheet", ["missing/sheet.png", "sheet", "sheet.txt"])
def test_a_sheet_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, sheet):
    monkeypatch.setattr(data, "read_pairs", None)
    with pytest.raises(SystemExit) as stop:
        data.main([str(write_pairs(tmp_path, 2)), "--sheet", str(tmp_path / sheet)])
    assert stop.value.code == 2 and sheet in capsys.readouterr().err


def test_the_papers_data_is_found_where_it_lies(tmp_path):
    write(tmp_path / "coco" / "annotations" / "captions_train2014.json", "")
    write(tmp_path / "coco" / "annotations" / "captions_val2017.json", "")
    write(tmp_path / "vg" / "vg_caption.json", "")
    assert {name: file.name for name, file in train.find_paper_data(tmp_path).items()} == {
        "coco": "captions_train2014.json", "vg": "vg_caption.json", "val": "captions_val2017.json"}
    write(tmp_path / "laion" / "00000.tar", "")
    assert train.find_paper_data(tmp_path)["laion"] == tmp_path / "laion"


# ------------------------------------------------------------------------------------------------------------ shards


def encoded(seed, kind="JPEG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def write_shard(path, samples):
    """{member name: bytes} as a plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pixels(file):
    return np.asarray(data.load_image(file))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_shards_of_webdataset_are_read_without_unpacking(tmp_path, ending):
    """As img2dataset writes them with that package: image, .txt, and .json beside it; the same pictures come out."""
    images = [encoded(i, {"jpg": "JPEG"}.get(ending, ending)) for i in range(25)]
    with webdataset.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=10, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"{i:09d}", ending: image, "txt": f"Picture {i}.", "json": {"url": "x", "key": f"{i:09d}", "caption": "no"}})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for spec in (f"laion={tmp_path}/{{00000..00002}}.tar", f"laion={tmp_path}/*.tar", f"laion={tmp_path}", f"laion={tmp_path}/{{00000..00002}}.tar:0.7"):
        pairs = data.read_pairs(spec)
        assert list(pairs.captions) == [f"picture {i}" for i in range(25)] and len(pairs.images) == 25 and not pairs.left_out
    theirs = [sample[ending] for sample in webdataset.WebDataset([str(file) for file in sorted(before)], shardshuffle=False)]
    for i in range(25):
        assert np.array_equal(pixels(pairs.file(i)), np.asarray(Image.open(io.BytesIO(theirs[i])).convert("RGB")))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="00003.tar"):
        data.read_pairs(f"{tmp_path}/{{00000..00003}}.tar")
    with pytest.raises(ValueError, match="holds its images"):
        data.read_pairs(f"{tmp_path}/*.tar@{tmp_path}")


def test_captions_of_shards_come_from_txt_or_json(tmp_path):
    members = {"a/1.jpg": encoded(1), "a/1.txt": b"from txt", "a/1.json": b'{"caption": "from json"}', "a/2.json": b'{"caption": "from json"}', "a/2.jpg": encoded(2),
               "b/1.jpg": encoded(3), "b/1.json": json.dumps({"all_captions": ["x", "best"], "all_similarities": [0.1, 0.2], "caption": "y"}).encode()}
    pairs = data.read_pairs(str(write_shard(tmp_path / "00000.tar", members)))
    assert list(pairs.captions) == ["from txt", "from json", "best"]
    assert [np.array_equal(pixels(pairs.file(i)), np.asarray(Image.open(io.BytesIO(encoded(i + 1))))) for i in range(3)] == [True] * 3


def test_unsafe_and_broken_members_are_left_out_and_nothing_is_written(tmp_path):
    members = {"1.jpg": encoded(1), "1.txt": b"one", "../2.jpg": encoded(2), "../2.txt": b"two", "/3.jpg": encoded(3), "4.jpg": encoded(4), "5.txt": b"five", "6.jpg": encoded(6),
               "6.txt": b"\xff", "7.jpg": encoded(7), "7.txt": b" . ", "8.jpg": encoded(8), "8.json": b'["no object"]', "1b.jpg": encoded(9), "1b.txt": b"last"}
    shard = write_shard(tmp_path / "deep" / "shard.tar", members)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("1.jpg", "1.txt"):  # a key for the second time
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"two"))
    pairs = data.read_pairs(str(shard))
    assert list(pairs.captions) == ["one", "last"] and sorted(f.name for f in tmp_path.rglob("*")) == ["deep", "shard.tar"]
    assert {kind: [place.split(": ")[1] for place in places] for kind, places in pairs.left_out.items()} == {
        "link or unsafe name": ["../2.jpg", "../2.txt", "/3.jpg", "9.jpg"], "no caption next to it": ["4"], "no image": ["5"], "damaged caption": ["6", "8"],
        "empty caption": ["7"], "duplicate key": ["1"]}


def corruptions():
    """(what is done, with which random numbers) of 240 damages to a shard of 12 samples"""
    return [(kind, seed) for kind in ("cut", "header", "picture", "caption", "zeros") for seed in range(48)]


@pytest.mark.parametrize("kind, seed", corruptions())
def test_damage_to_a_shard_costs_what_it_hits_and_no_neighbour(tmp_path, kind, seed, whole_shard):
    """Cut short, a header damaged, bits of a picture flipped, a caption damaged, a block of zeros: what is hit is named or, where
    flipped bits still make a picture, comes out changed; all others come out as they were; and the count adds up."""
    content, members, rng = bytearray(whole_shard[0]), whole_shard[1], np.random.default_rng(seed)
    hit = int(rng.integers(12))
    picture, caption = members[2 * hit], members[2 * hit + 1]
    allowed = {hit}
    if kind == "cut":
        at = int(rng.integers(1, members[-1].offset_data + members[-1].size))
        del content[at:]
        allowed = {i for i in range(12) if members[2 * i + 1].offset_data + members[2 * i + 1].size > at}
    elif kind == "header":
        content[picture.offset + int(rng.integers(512))] ^= int(rng.integers(1, 256))
    elif kind == "picture":
        for at in rng.integers(picture.offset_data, picture.offset_data + picture.size, 3):
            content[at] ^= int(rng.integers(1, 256))
    elif kind == "caption":
        content[caption.offset_data + int(rng.integers(caption.size))] = 0xFF
    else:
        start = picture.offset_data // 512 * 512
        content[start : start + 512] = bytes(512)
    shard = write(tmp_path / "00000.tar", bytes(content))
    try:
        pairs = data.read_pairs(str(shard))
    except ValueError as error:
        assert kind == "cut" and len(allowed) == 12 and "not one image" in str(error)
        return
    found, unreadable = {}, []
    for i in range(len(pairs)):
        try:
            found[int(pairs.captions[i].split()[1])] = pixels(pairs.file(i))
        except OSError as error:
            assert "00000.tar" in str(error)
            unreadable.append(i)
    assert all(np.array_equal(found[i], whole_shard[2][i]) for i in set(range(12)) - allowed)
    assert len(pairs) <= 12 and len(found) + len(unreadable) == len(pairs)
    assert pairs.left_out or unreadable or len(found) == 12 and kind in ("picture", "zeros", "header")  # flips that still make a picture, or a name
    if kind == "cut":
        assert {"cut short", "no caption next to it", "damaged shard", "damaged header", "no end mark, it is cut short"} & pairs.left_out.keys()
    if kind in ("header", "caption") and hit not in found:
        assert str(hit) in " ".join(place for places in pairs.left_out.values() for place in places)


def test_the_command_shows_what_is_in_a_data_set(tmp_path, capsys):
    """Counts, broken files by name, and a picture of samples with a frame where an image cannot be read."""
    contents = {f"{i}.{kind}": encoded(i) if kind == "jpg" else f"number {i} of ten".encode() for i in range(10) for kind in ("jpg", "txt")}
    shard = write_shard(tmp_path / "00000.tar", contents | {"3.jpg": b"<html>", "5.txt": b" "})
    data.main([f"ten={shard}", "--sheet", str(tmp_path / "sheet.png"), "--check", "0", "--image-size", "32"])
    said = capsys.readouterr().out
    assert "ten: 9 pairs, 9 images" in said and f"left out, empty caption: 1\n    {shard}: 5" in said and "4.0 words on average" in said
    assert "cannot be read: 1 of 9 images" in said and "::3.jpg@" in said and "images: 40 x 30 pixels" in said
    assert Image.open(tmp_path / "sheet.png").size == (8 * 40 + 8, 2 * 76 + 8)
    with pytest.raises(SystemExit) as stop:
        data.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2 and "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_header_costs_one_sample_of_a_webdataset_shard(tmp_path, seed):
    """Such shards have pax records before every member, since they keep times of day in fractions."""
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(12):
            writer.write({"__key__": f"{i:05d}", "jpg": encoded(i), "txt": f"number {i}"})
    with tarfile.open(tmp_path / "00000.tar") as tar:
        pictures = tar.getmembers()[::2]
    content, rng = bytearray((tmp_path / "00000.tar").read_bytes()), np.random.default_rng(seed)
    hit = int(rng.integers(12))
    content[int(rng.integers(pictures[hit].offset, pictures[hit].offset_data))] ^= int(rng.integers(1, 256))
    pairs = data.read_pairs(str(write(tmp_path / "00000.tar", bytes(content))))
    found = {int(pairs.captions[i].split()[1]): pixels(pairs.file(i)) for i in range(len(pairs))}
    assert set(range(12)) - {hit} <= found.keys() and (hit in found or pairs.left_out)
    assert all(np.array_equal(found[i], np.asarray(Image.open(io.BytesIO(encoded(i))))) for i in set(range(12)) - {hit})


@pytest.mark.parametrize("kind, size", [(b"0", -512), (b"S", -1024), (b"x", 10**12), (b"L", 2**62), (b"0", 2**40)])
def test_impossible_sizes_in_headers_neither_hang_nor_eat_memory(tmp_path, whole_shard, kind, size):
    """As the first header and in the middle; the others stay."""
    header = tarfile.TarInfo("evil.jpg")
    header.type, header.size = kind, 0
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else (0x80 << 88 | size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    for at in (0, whole_shard[1][8].offset):
        content = whole_shard[0][:at] + bytes(block) + whole_shard[0][at:]
        pairs = data.read_pairs(str(write(tmp_path / "00000.tar", content)))
        assert len(pairs) == 12 and pairs.left_out


def test_holes_and_missing_ends_of_shards_are_named(tmp_path, whole_shard):
    content, members, _ = whole_shard
    start, end = members[4].offset, members[20].offset
    hole = data.read_pairs(str(write(tmp_path / "hole.tar", content[:start] + bytes(end - start) + content[end:])))
    tail = data.read_pairs(str(write(tmp_path / "tail.tar", content[:start] + bytes(len(content) - start))))
    cut = data.read_pairs(str(write(tmp_path / "cut.tar", content[:start])))
    assert [len(pairs) for pairs in (hole, tail, cut)] == [4, 2, 2]
    assert hole.left_out.keys() == tail.left_out.keys() == {"hole"} and cut.left_out.keys() == {"no end mark, it is cut short"}
    joined = data.read_pairs(str(write(tmp_path / "joined.tar", content + content.replace(b"000", b"111"))))
    assert "hole" not in joined.left_out
    with pytest.raises(ValueError, match="gunzip it"):
        data.read_pairs(str(write(tmp_path / "gz.tar", gzip.compress(content))))


def test_odd_names_in_shards(tmp_path):
    """What looks like a place in a shard, line breaks, and bytes that are no text."""
    odd = write_shard(tmp_path / "odd.tar", {"a::b@1+2.jpg": encoded(1), "a::b@1+2.txt": b"one", "c\nd.jpg": encoded(2), "c\nd.txt": b"two",
                                            "._c.jpg": b"mac", "\udcff.jpg": encoded(3), "\udcff.txt": b"three"})
    pairs = data.read_pairs(str(odd))
    assert list(pairs.captions) == ["one", "two"] and pairs.left_out == {"broken Unicode": [f"{odd}: \\udcff"]}
    assert [np.array_equal(pixels(pairs.file(i)), np.asarray(Image.open(io.BytesIO(encoded(i + 1))))) for i in range(2)] == [True, True]


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory):
    """(bytes, members, pictures) of a shard of 12 samples"""
    contents = {f"{i:05d}.{kind}": encoded(i) if kind == "jpg" else f"number {i}".encode() for i in range(12) for kind in ("jpg", "txt")}
    shard = write_shard(tmp_path_factory.mktemp("shard") / "00000.tar", contents)
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    return shard.read_bytes(), members, [np.asarray(Image.open(io.BytesIO(encoded(i)))) for i in range(12)]


# -------------------------------------------------------------------------------------- damage to the other formats

def damage(content, kind, rng):
    """bytes -> the same with something wrong, and which bytes of the original were hit: (first, behind the last)"""
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 30))
    if kind == "cut":
        return content[:at], (at, len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :], (at, at + 1)
    if kind == "hole":
        return content[:at] + content[at + length :], (at, at + length)
    if kind == "zeros":
        return content[:at] + bytes(length) + content[at + length :], (at, at + length)
    return content[:at] + bytes(rng.choice(list(b'"{}[],\t\n\\\x00\xff:a'), length).tolist()) + content[at:], (at, at + 1)  # insertion


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A folder of 20 images, and {ending: bytes} of files that annotate them."""
    folder, rows = tmp_path_factory.mktemp("annotated"), []
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"number {i}, in a row" if i % 3 else f"number {i} in a row"})
    table = {}
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        csv.writer(text := io.StringIO(), delimiter=delimiter).writerows([rows[0].keys(), *(row.values() for row in rows)])
        table[ending] = text.getvalue().encode()
    coco = {"images": [{"id": i, "file_name": row["image"]} for i, row in enumerate(rows)],
            "annotations": [{"image_id": i, "caption": row["caption"]} for i, row in enumerate(rows)]}
    return folder, table | {"jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(), "json": json.dumps(rows).encode(),
                            "coco.json": json.dumps(coco).encode()}


@pytest.mark.parametrize("ending", ["jsonl", "json", "coco.json", "csv", "tsv"])
@pytest.mark.parametrize("kind", ["cut", "flip", "hole", "zeros", "insertion"])
@pytest.mark.parametrize("seed", range(12))
def test_damage_to_annotations_is_named_and_costs_the_lines_that_it_hits(tmp_path, annotated, ending, kind, seed):
    folder, contents = annotated
    content, (first, last) = damage(contents[ending], kind, np.random.default_rng((seed, len(ending), len(kind))))
    file = write(tmp_path / f"pairs.{ending}", content)
    try:
        pairs = data.read_pairs(f"{file}@{folder}")
    except (ValueError, FileNotFoundError) as error:  # not a line can be read, or not the first: of a list, its end is missed, too
        assert file.name in str(error) and (ending.endswith("json") or kind == "cut" or first < contents[ending].find(b"\n"))
        return
    found = {(Path(pairs.file(i)).name, caption) for i, caption in enumerate(pairs.captions)}
    whole = [(f"{i}.png", data.clean_caption(f"number {i}, in a row" if i % 3 else f"number {i} in a row")) for i in range(20)]
    left_out = sum(map(len, pairs.left_out.values()))
    if ending.endswith("json"):  # still a list: a letter is another one
        assert len(found & set(whole)) >= 18 and len(pairs) + left_out >= 19
        return
    lines = contents[ending].splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    hit = set(range(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last - 1, side="right")) + 1))
    hit = {line - (len(lines) - 20) for line in hit | {max(hit) + 1} if kind == "cut" or line < len(lines)}  # a line end may be lost
    if ending == "jsonl":
        assert set(whole) - found <= {whole[i] for i in hit if i < 20}
        assert len(pairs) + left_out == sum(bool(line.strip()) for line in content.split(b"\n"))
    else:  # an open quote may cost lines up to the next one, which are named
        lost = [i for i in range(20) if whole[i] not in found]
        assert all(i in hit or any(f"line {i + 2}" == place.split(", ")[-1] for places in pairs.left_out.values() for place in places) for i in lost)


@pytest.mark.parametrize("kind", ["cut", "flip", "hole", "zeros", "insertion", "empty", "html", "no text", "another's text"])
@pytest.mark.parametrize("seed", range(6))
def test_damage_in_a_folder_touches_no_neighbour(tmp_path, tok, kind, seed):
    rng, hit = np.random.default_rng((seed, len(kind))), int(seed) + 1
    for i in range(8):
        write(tmp_path / f"{i}.jpg", encoded(i)), write(tmp_path / f"{i}.txt", f"number {i}")
    which = tmp_path / f"{hit}.{'txt' if kind == 'no text' or seed % 3 == 2 else 'jpg'}"
    if kind == "no text":
        which.unlink()
    elif kind == "another's text":
        which.write_bytes(b"\xff\xfe" + bytes(seed))
    else:
        nothing = {"empty": b"", "html": b"<!DOCTYPE html><p>404"}
        which.write_bytes(nothing[kind] if kind in nothing else damage(which.read_bytes(), kind, rng)[0])
    pairs = data.read_pairs(str(tmp_path))
    left_out = [place for places in pairs.left_out.values() for place in places]
    assert len(pairs) + len(left_out) == 8 and all(str(hit) in Path(place).name for place in left_out)
    samples = data.Samples([pairs], tok, 28, 5, augment=False)
    (batch,) = next(data.load_batches(samples, np.arange(len(pairs)), len(pairs), len(pairs)))
    assert all(f"{hit}.jpg" in message for message in batch["bad"]) and len(batch["bad"]) <= 1
    if which.suffix == ".jpg" and kind in ("empty", "html", "another's text"):
        assert len(batch["bad"]) == 1
    for file, image in zip(batch["files"], batch["images"]):
        if Path(file) != tmp_path / f"{hit}.jpg":
            assert torch.equal(image, data.resize(Image.open(io.BytesIO(encoded(int(Path(file).stem)))), 28))


# ------------------------------------------------------------------------------------------------- order and batches


def test_an_epoch_has_every_pair_once_and_the_next_another_order():
    order = data.plan([30, 12], 100, seed=3)
    assert sorted(order[:42]) == sorted(order[42:84]) == list(range(42)) and (order[:42] != order[42:84]).any()
    assert (order == data.plan([30, 12], 100, seed=3)).all() and (order != data.plan([30, 12], 100, seed=4)).any()


def test_a_mixture_holds_in_every_window():
    order = data.plan([1000, 300, 5000], 20000, seed=0, weights=[0.1, 0.2, 0.7])
    which = np.searchsorted([1000, 1300], order, side="right")
    for start in range(0, 19000, 100):
        counts = np.bincount(which[start : start + 1000], minlength=3)
        assert np.abs(counts - [100, 200, 700]).max() <= 6
    assert sorted(order[which == 0][:1000]) == list(range(1000))  # a whole pass before any repeats


def make_pairs(files, captions):
    return data.Pairs("x", "", *data.collect_pairs((file, file, caption, None) for file, caption in zip(files, captions)))


@pytest.fixture(scope="module")
def samples(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return data.Samples([data.read_pairs(str(write_pairs(folder, 40)))], tok, 28, 5)


def test_ranks_share_every_batch_whatever_their_number(samples):
    order = data.plan([40], 40, seed=0)
    steps = lambda **options: [[file for micro in step for file in micro["files"]] for step in data.load_batches(samples, order, 8, **options)]
    alone = steps(micro_batch=8)
    ranks = [steps(micro_batch=3, rank=r, world=2) for r in range(2)]
    assert len(alone) == 5 and [sorted(a) for a in alone] == [sorted(x + y) for x, y in zip(*ranks)]


@pytest.mark.parametrize("captions", ["each", "packed"])
def test_micro_batches_hold_captions_of_like_length(samples, captions):
    pairs = captioned(samples, [1, 3, 2, 6, 4, 5, 9, 8])
    several = data.Samples([samples.sets[0], pairs], samples.tok, 28, 5, captions=captions)
    count = 48 if captions == "packed" else 78
    order = data.plan([count], count, seed=0)
    letters = [len(caption) for caption in several.sets[0].captions]
    of_images = np.bincount(pairs.image, [len(caption) for caption in pairs.captions])
    lengths = np.array([*letters, *(of_images if captions == "packed" else map(len, pairs.captions))])
    assert (several.lengths() == lengths).all()
    for rank in range(2):
        for step, micros in enumerate(data.load_batches(several, order, 24, 4, rank, 2)):
            letters = [[sum(len(samples.tok.decode(t for t in row[row >= 0][:-1].tolist()).strip()) for row in rows.view(-1, rows.shape[-1]))
                        for rows in micro["target_ids"]] for micro in micros]
            assert len(micros) == 3 and all(max(a) <= min(b) for a, b in zip(letters, letters[1:]))


@pytest.mark.slow
def test_starting_at_a_step_gives_what_would_have_come(samples):
    order = data.plan([40], 40, seed=0)
    whole, rest = list(data.load_batches(samples, order, 8, 4)), list(data.load_batches(samples, order, 8, 4, first_step=3, workers=1))
    assert len(rest) == 2
    for ours, theirs in zip(rest, whole[3:]):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["images"], b["images"]) and torch.equal(a["target_ids"], b["target_ids"]) and a["files"] == b["files"]


def test_an_unreadable_image_is_replaced_and_named(tok, tmp_path):
    pairs = data.read_pairs(str(write_pairs(tmp_path, 12)))
    (tmp_path / "5.png").write_bytes(b"no image")
    samples = data.Samples([pairs], tok, 28, 5)
    (batch,) = next(data.load_batches(samples, np.arange(12), 12, 12))
    assert len(batch["images"]) == 12 and batch["files"].count(str(tmp_path / "6.png")) == 2
    assert len(batch["bad"]) == 1 and "5.png" in batch["bad"][0]


@pytest.mark.parametrize("captions", ["each", "one", "packed"])
def test_an_unreadable_image_with_many_captions_counts_once(tok, samples, tmp_path, captions):
    files = [write(tmp_path / "bad.png", "<html>"), *samples.sets[0].files()[:3]]
    pairs = make_pairs([str(file) for file in files for _ in range(20)], [f"a red square {'a ' * (i % 20)}" for i in range(80)])
    many = data.Samples([pairs], tok, 28, 5, captions=captions)
    drawn = [many[position, 0] for position in range(3)]
    assert all(sample["file"] == str(files[1]) and len(sample["bad"]) == 1 for sample in drawn)
    assert not many[0, many.starts[-1] - 1]["bad"]
    none = data.Samples([make_pairs([str(files[0])] * 4, ["a red square"] * 4)], tok, 28, 5, captions=captions)
    with pytest.raises(OSError, match="1 images in a row cannot be read"):
        none[0, 0]


def test_crops_are_drawn_by_the_position_in_the_plan(samples):
    """The same sample comes out the same, at another position or with another seed differently; and validation is not cropped at
    all, nor is a set that says so (Visual Genome's regions)."""
    image, again, elsewhere = (samples[position, 5]["image"] for position in (3, 3, 4))
    assert torch.equal(image, again) and not torch.equal(image, elsewhere)
    assert not torch.equal(image, data.Samples(samples.sets, samples.tok, 28, 5, seed=1)[3, 5]["image"])
    plain = data.Samples(samples.sets, samples.tok, 28, 5, augment=False)[3, 5]["image"]
    assert torch.equal(plain, data.Samples([dataclasses.replace(samples.sets[0], crop=False)], samples.tok, 28, 5)[3, 5]["image"])
    assert torch.equal(plain, data.resize(data.load_image(samples.sets[0].file(5)), 28)) and not torch.equal(image, plain)


@pytest.fixture(scope="module")
def prefix_lm(kinds, samples):
    """Samples of captions of 1 to 9 words, for T5 if no other kind is named."""
    captions = [" ".join("a red square on the brown table the white".split()[:n]) for n in range(1, 10)]
    pairs = make_pairs([samples.sets[0].file(0)] * 9, captions)
    return lambda kind="Unigram", **options: data.Samples([pairs], kinds[kind][0], 28, 2, **options)


def one_target(sample):
    (target,) = sample["targets"]
    return sample["prompt"], target


def test_t5_captions_are_split_at_a_word_of_the_first_half(prefix_lm):
    samples = prefix_lm()
    tok, captions = samples.tok, samples.sets[0].captions
    for n, caption in enumerate(captions, 1):
        cuts = []
        for position in range(60):
            prompt, target = one_target(samples[position, n - 1])
            assert prompt[:2] == [-1, -1] and prompt[-1] == 1 and prompt[2:-1] + target == [*tok.encode(caption), 1]
            first, rest = tok.decode(prompt[2:-1]), tok.decode(target)
            assert first.split() + rest.split() == caption.split()
            assert prompt == data.prompt_ids(tok, 2, first) and target == data.caption_ids(tok, rest)
            cuts.append(len(first.split()))
        assert set(cuts) == set(range(n // 2 + 1))


def test_splits_are_drawn_by_seed_and_position_and_not_with_the_crops(prefix_lm):
    first_parts = lambda samples: [len(samples[position, 8]["prompt"]) - 3 for position in range(40)]
    samples = prefix_lm()
    assert first_parts(samples) == first_parts(samples) == first_parts(prefix_lm(augment=False)) != first_parts(prefix_lm(seed=1))
    assert torch.equal(samples[3, 8]["image"], prefix_lm(split=False)[3, 8]["image"])  # the crop is the same
    with_the_crops = [data.first_part(samples.tok, [*whole_ids(prefix_lm), 1], np.random.default_rng((0, position))) for position in range(40)]
    assert first_parts(samples) != with_the_crops


def test_validation_and_decoder_only_llms_have_whole_captions_as_targets(prefix_lm):
    t5, llama = prefix_lm(augment=False, split=False), prefix_lm("LLaMA, normalizer")
    for position in range(20):
        assert one_target(t5[position, 8]) == ([-1, -1, 1], [*whole_ids(prefix_lm), 1])
        assert one_target(llama[position, 8]) == ([-1, -1, 1], data.caption_ids(llama.tok, llama.sets[0].captions[8]))


def whole_ids(prefix_lm):
    return prefix_lm().tok.encode(prefix_lm().sets[0].captions[8])


def test_max_tokens_holds_for_both_parts_together(prefix_lm):
    """The caption is cut first: what is split is what would be the target without a split, so something is left to predict."""
    samples = prefix_lm(max_tokens=6)
    kept = [*whole_ids(prefix_lm)[:5], 1]
    prompts, targets = zip(*(one_target(samples[position, 8]) for position in range(40)))
    assert all(prompt[2:-1] + target == kept and len(target) >= 2 for prompt, target in zip(prompts, targets)) and len(set(map(len, prompts))) > 1


def test_prompts_of_unequal_lengths_are_filled_up_on_the_left(prefix_lm):
    samples = prefix_lm()
    rows = [samples[position, 8] for position in range(12)]
    batch = samples.collate(rows)
    for (prompt, target), prompt_row, target_row in zip(map(one_target, rows), batch["prompt_ids"].tolist(), batch["target_ids"].tolist()):
        assert prompt_row == [-100] * (len(prompt_row) - len(prompt)) + prompt and target_row == target + [-100] * (len(target_row) - len(target))
    assert len(set(len(row["prompt"]) for row in rows)) > 1


# ----------------------------------------------------------------------------------------------- captions of one image

def captioned(samples, most):
    """Samples' images, of which image i has `most`[i] captions: its number, and a word that is the caption's own."""
    image = np.repeat(np.arange(len(most)), most)[::-1]  # not in order
    files = samples.sets[0].files()[: len(most)]
    names = ["one", "two", "three", "four", "five"]
    own = np.concatenate([np.arange(n)[::-1] for n in most[::-1]])
    captions = [f"{names[i % 5]} " + "red " * int(k) for i, k in zip(image, own)]
    return data.Pairs("test", "/", data.Strings.of(files), data.Strings.of(c.strip() for c in captions), np.array(image))


def texts(samples, sample):
    return [samples.tok.decode(target[:-1]).strip() for target in sample["targets"]]


def test_an_image_can_come_with_one_of_its_captions(samples):
    pairs = captioned(samples, [1, 3, 2])
    one = data.Samples([samples.sets[0], pairs], samples.tok, 28, 5, captions="one")
    assert data.sizes(one.sets, "one") == [40, 3] and data.sizes(one.sets) == [40, 6] and list(one.starts) == [0, 40, 43]
    drawn = [[texts(one, one[position, 41]) for position in range(60)] for _ in "ab"]
    assert drawn[0] == drawn[1]
    crops = [np.random.default_rng((0, position)).choice(3) for position in range(60)]
    other_seed = data.Samples(one.sets, samples.tok, 28, 5, captions="one", seed=1)
    assert drawn[0] != [texts(one, other_seed[position, 41]) for position in range(60)]
    assert drawn[0] != [texts(one, {"targets": [data.caption_ids(samples.tok, pairs.captions[one.groups[1][0][1 + crop]])]}) for crop in crops]
    counts = {text: sum(text == other for (other,) in drawn[0]) for text in ("two", "two red", "two red red")}
    assert sum(counts.values()) == 60 and min(counts.values()) > 8  # 20 expected
    assert texts(one, one[0, 40]) == ["one"] and one[7, 42]["file"] == samples.sets[0].file(2)


def test_all_captions_of_an_image_can_be_packed(samples):
    pairs = captioned(samples, [1, 3, 2])
    packed = data.Samples([pairs], samples.tok, 28, 5, captions="packed")
    batch = packed.collate([packed[i, i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 28, 28) and batch["target_ids"].shape[:2] == (3, 3) and batch["prompt_ids"].shape == (3, 6)
    for i, rows in enumerate(batch["target_ids"].tolist()):
        own = sorted(caption for caption, of in zip(pairs.captions, pairs.image) if of == i)
        assert sorted(samples.tok.decode(t for t in row[:-1] if t >= 0).strip() for row in rows if row[0] >= 0) == own
    counts = [(row >= 0).any(1).tolist() for row in batch["target_ids"]]
    assert counts == [[True, False, False], [True] * 3, [True, True, False]]


def test_of_very_many_captions_some_are_drawn(samples):
    pairs = captioned(samples, [40, 2])
    packed = data.Samples([pairs], samples.tok, 28, 5, captions="packed", max_tokens=60)
    first, again, second = (texts(packed, packed[position, 0]) for position in (0, 0, 1))
    assert len(set(first)) == len(set(second)) == data.MOST_PACKED and first == again != second


def test_captions_are_not_packed_for_t5(prefix_lm):
    with pytest.raises(ValueError, match="T5"):
        prefix_lm(captions="packed")
    prompt, target = one_target(prefix_lm(captions="one")[0, 0])
    assert prompt[:2] == [-1, -1] and target[-1] == 1


# ------------------------------------------------------------------------------------------------------------ lookalikes

def test_a_picture_is_known_in_another_size_quality_and_name(tmp_path, samples):
    for i in range(12):
        photograph(seed=i).save(tmp_path / f"{i}.jpg", quality=90)
    known = data.Lookalikes([tmp_path / f"{i}.jpg" for i in range(8)] + [tmp_path / "missing.jpg"])
    assert known.files == tuple(tmp_path / f"{i}.jpg" for i in range(8))
    for i in range(12):
        for size, options in [((640, 480), dict(quality=60)), ((800, 600), dict(quality=90)), ((333, 250), dict(quality=80))]:
            photograph(seed=i).resize(size, Image.LANCZOS).save(tmp_path / "other.jpg", **options)
            with data.open_image(tmp_path / "other.jpg") as image:
                data.random_crop(image, 100, np.random.default_rng(0))  # as in training: decoded coarsely
                assert known.find(data.upright_rgb(image)) == (tmp_path / f"{i}.jpg" if i < 8 else None)
    photograph(seed=3).quantize(200).save(tmp_path / "palette.png")
    pairs = make_pairs([str(tmp_path / "palette.png")], ["a red square"])
    assert data.Samples([pairs], samples.tok, 28, 5, known=known).look(pairs, pairs.file(0), 0)[1] == tmp_path / "3.jpg"
    turned = photograph(seed=0)
    turned.paste(Image.new("RGB", (120, 90), "red"), (300, 200))  # another picture of the same place
    assert known.find(turned) is None and data.Lookalikes([]).find(turned) is None


def test_plain_pictures_are_not_taken_for_each_other(tmp_path):
    """Drawings in thin lines on white, an almost black one, a flat grey one: each looks like any other of its kind."""
    files, rng = [], np.random.default_rng(0)
    for i in range(12):
        image = Image.new("RGB", (200, 200), ("white", "black", "gray")[i % 3])
        for _ in range(3):
            ImageDraw.Draw(image).line(rng.integers(0, 200, 4).tolist(), fill="gray" if i % 3 < 2 else "silver", width=1)
        image.save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    photograph().save(tmp_path / "photograph.png")
    known = data.Lookalikes([*files[:6], tmp_path / "photograph.png"])
    assert [known.find(data.load_image(file)) for file in files] == [None] * 12 and known.find(photograph()) == tmp_path / "photograph.png"


def test_samples_name_pictures_that_are_held_out(samples, tok):
    pairs = samples.sets[0]
    known = data.Lookalikes(pairs.files()[:2])
    (batch,) = next(data.load_batches(data.Samples([pairs], tok, 28, 5, known=known), np.arange(8), 8, 8))
    assert batch["twins"].items() >= {(file, file) for file in known.files}
    assert not next(data.load_batches(samples, np.arange(8), 8, 8))[0]["twins"]
