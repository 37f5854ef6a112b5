"""Facts about data.py: tokenizers, prompts, images, the order of samples, batches."""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import types
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CORPUS,
    KINDS,
    LLAMA_TOKENS,
    byte_level,
    make_llm_pair,
    make_pairs,
    save_image,
    sentencepiece_bpe,
    write,
    write_json,
    write_kind,
    write_pairs,
)
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import data
import qformer
from pairs import Items, Pairs, Strings, clean_caption, collect, item_text, read_pairs


@pytest.fixture(scope="module")
def tok(world):
    return data.load_tokenizer(world[1])


# --------------------------------------------------------------------------------------- tokenizers

PIECES = [
    "a red square", "red", "brown", " ", "  ", "\n", "\t", "\r\n", "don't", "It's",
    "naïve", "Ünïcödé", "e\u0301", "ﬁ", "漢字", "日本語", "한국어",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x00", "\x07", "\x7f", "\u200b", "\ufeff", "\u00a0", "\u2581", "Ċ", "Ġ",
    "0", "12345", "3.14", "<0x0A>", "<0x41>", "</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>",
    "x" * 300, "ab" * 99, "!?", "...", '"', "\\", "مرحبا", "שלום", "ไทย", "Ω≈ç√", "€"]


def varied_strings():
    """A thousand, of which every piece alone and with a space before and behind it."""
    rng = random.Random(0)
    strings = ["", *PIECES, *(f" {p}" for p in PIECES), *(f"{p} " for p in PIECES)]
    while len(strings) < 1000:
        between = rng.choice(["", " "])
        strings.append(between.join(rng.choices(PIECES, k=rng.randint(2, 9))))
    return strings


def assert_equal_transformers(ours, folder, class_name):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == class_name
    texts = varied_strings()
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(texts) == 1000
    assert [ours.encode(text) for text in texts] == ids
    assert ours.encode_all(texts) == ids
    decoded = [theirs.decode(row, skip_special_tokens=True) for row in ids]
    assert [ours.decode(row) for row in ids] == decoded
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_id == theirs.eos_token_id
    assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_equal_transformers(kinds, kind):
    assert_equal_transformers(*kinds[kind], KINDS[kind][2])


def test_vocab_json_and_merges_equal_transformers(kinds, tmp_path):
    """facebook/opt-* have no tokenizer.json."""
    ours, folder = kinds["GPT-2"]
    ours.encoder.model.save(str(tmp_path))
    write_json(tmp_path, config={"model_type": "opt"})
    old = data.load_tokenizer(tmp_path)
    assert (old.bos_id, old.eos_id, old.pad_id, old.end_id) == (2, 2, 1, ours.end_id)
    assert old.encode("x</s>y<pad>") == ours.encode("x</s>y<pad>")
    assert old.decode([2, *old.encode(" red"), 2]) == " red"
    named = (folder / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(named)
    assert_equal_transformers(data.load_tokenizer(tmp_path), tmp_path, "GPT2Tokenizer")


def test_llamas_old_files_are_read_as_they_say(kinds, tmp_path):
    """transformers 5 rebuilds them as new ones: no second ▁ before a leading space, none behind a
    special. On captions all agree."""
    ours, folder = kinds["LLaMA, normalizer"]
    write_json(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", **LLAMA_TOKENS})
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    def their_ids(text):
        return theirs(text, add_special_tokens=False)["input_ids"]

    texts = [text for text in CORPUS + varied_strings() if not re.search("<.*>|▁", text)]
    captions = [clean_caption(text) for text in texts]
    assert len(captions) > 600
    assert all(ours.encode(text) == their_ids(text) for text in captions)
    assert ours.encode(" red") != their_ids(" red")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_survive_a_round_trip(kinds, kind):
    ours = kinds[kind][0]
    texts = [text for text in varied_strings() if "<" not in text and "▁" not in text]
    if kind.startswith("Unigram"):  # single spaces, and only the characters that it was trained on
        texts = [" ".join(text.split()) for text in CORPUS]
    if kind == "Qwen":
        texts = [normalizers.NFC().normalize_str(text) for text in texts]
    if kind == "LLaMA, pre-tokenizer":
        texts = [text.removeprefix(" ") for text in texts if not text.startswith("  ")]
    assert len(texts) > 60
    assert [ours.decode(ours.encode(text)) for text in texts] == texts


def test_vocab_spells_bytes(tok):
    vocab = tok.vocab()
    assert vocab["é".encode()[:1]] == tok.encode("é")[0]
    assert vocab[b"\n"] == tok.end_id
    assert vocab[b" red"] == tok.encode(" red")[0]
    assert not {0, 1, 2, 3} & set(vocab.values())
    assert len(vocab) == tok.encoder.get_vocab_size() - 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("GPT-2", "Qwen")])
def test_vocab_spells_what_sentencepiece_means(kinds, kind):
    ours = kinds[kind][0]
    vocab = ours.vocab()
    id_of = ours.encoder.token_to_id
    assert vocab[b" red"] == id_of("▁red")
    assert vocab["é".encode()] == id_of("é")
    assert vocab[b" "] == id_of("▁")
    assert vocab[b"e"] == id_of("e") != id_of("<0x65>")  # a plain piece that spells the byte wins
    assert vocab.get(b"\xff") == id_of("<0xFF>")
    assert vocab.get(b"\x0a") == id_of("<0x0A>")
    assert not {b"<unk>", b"<s>", b"</s>", b"<pad>", b"<0xFF>", b"<0x65>"} & set(vocab)


@pytest.mark.parametrize("kind, before", [
    ("GPT-2", ""), ("LLaMA, normalizer", " "), ("LLaMA, pre-tokenizer", " ")])
def test_the_spellings_of_a_texts_tokens_are_the_text(kinds, kind, before):
    ours = kinds[kind][0]
    spelled = {id: spelling for spelling, id in ours.vocab().items()}
    texts = [t.lstrip() for t in varied_strings() if not re.search("</|<s>|<unk>|<pad>|▁", t)]
    for text in texts:
        spellings = b"".join(spelled[id] for id in ours.encode(text))
        assert spellings == (before + text if text else "").encode()


def test_a_newline_ends_a_caption_and_eos_where_there_is_none(kinds, tmp_path):
    end = {kind: ours.end_id for kind, (ours, _) in kinds.items()}
    assert end["GPT-2"] == kinds["GPT-2"][0].encode("\n")[0]
    assert end["LLaMA, normalizer"] == end["LLaMA, pre-tokenizer"] == 3 + 10
    assert end["Unigram"] == end["Unigram, bytes"] == 1  # T5's </s>
    newline = kinds["Unigram, bytes"][0].encoder.token_to_id("<0x0A>")
    for kind, id in (("Unigram", 1), ("Unigram, bytes", newline)):
        folder = write_json(write_kind(tmp_path / kind, kind), config={"model_type": "llama"})
        assert data.load_tokenizer(folder).end_id == id


def spoken(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True,
            "rstrip": False, "single_word": False}


@pytest.mark.parametrize("config, named, older, ids", [
    (dict(bos_token_id=9, eos_token_id=9),
     dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>"), None, (0, 2, 1)),
    ({}, dict(bos_token=spoken("<s>"), eos_token=spoken("</s>"), pad_token=None), None, (0, 2, None)),
    (dict(bos_token_id=0), dict(bos_token=None, eos_token="</s>"), None, (None, 2, None)),  # Qwen2.5
    ({}, dict(eos_token="<s>"), dict(eos_token=spoken("</s>"), pad_token="<pad>"), (None, 2, 1)),
    ({}, dict(eos_token="<s>", added_tokens_decoder={}), dict(eos_token="</s>"), (None, 0, None)),
    ({}, None, dict(bos_token="<s>", eos_token="</s>"), (0, 2, None))])
def test_named_specials_are_as_transformers_finds_them(tmp_path, config, named, older, ids):
    write_json(tmp_path, tokenizer=byte_level(), config=config)
    if named:
        write_json(tmp_path, tokenizer_config=named)
    if older:
        write_json(tmp_path, special_tokens_map=older)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = data.load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == ids


@pytest.mark.parametrize("config, ids", [
    (dict(model_type="qwen2", bos_token_id=5, eos_token_id=[7, 8], pad_token_id=-1), (5, 7, None)),
    (dict(model_type="llama", bos_token_id=None, eos_token_id=9, pad_token_id=0), (None, 9, 0)),
    (dict(model_type="blip-2", eos_token_id=9, text_config=dict(model_type="opt", eos_token_id=8)),
     (2, 8, 1)),
    (dict(model_type="opt"), (2, 2, 1)),
    (dict(model_type="llama"), (1, 2, None)),
    (dict(model_type="mistral"), (1, 2, None)),
    (dict(model_type="t5"), (None, 1, 0))])
def test_ids_of_config_json_where_no_token_is_named(tmp_path, config, ids):
    ours = data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level(), config=config))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids


def test_a_named_token_becomes_special(tmp_path):
    """As in transformers, where the file of the tokenizer does not say so."""
    write_json(tmp_path, tokenizer=byte_level() | {"added_tokens": []}, config={},
               tokenizer_config={"eos_token": "</s>"})
    ours = data.load_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.encode("a</s>") == theirs("a</s>")["input_ids"]
    assert ours.encode("a</s>")[-1] == 2
    assert ours.decode(ours.encode("a</s>")) == "a"
    assert b"</s>" not in ours.vocab()


@pytest.mark.parametrize("files, says", [
    (dict(config={"model_type": "qwen2"}),
     "eos_token in tokenizer_config.json.*eos_token_id in config.json"),
    (dict(config={"model_type": "qwen2", "eos_token_id": None}), "eos_token_id in config.json"),
    (dict(config={"model_type": "opt"}, tokenizer_config={"eos_token": None}),
     "eos_token in tokenizer_config.json"),
    (dict(config={"model_type": "opt"}, tokenizer_config={"bos_token": "[BOS]"}),
     "bos_token '\\[BOS\\]' of tokenizer_config.json"),
    (dict(config={"model_type": "opt"}, tokenizer_config={"eos_token": 2}),
     "eos_token 2 of tokenizer_config.json")])
def test_missing_specials_are_named(tmp_path, files, says):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{says}"):
        data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level(), **files))


def test_a_pad_token_that_was_added_later_is_done_without(tmp_path):
    write_json(tmp_path, tokenizer=byte_level(), config={"model_type": "opt"},
               tokenizer_config={"pad_token": "[PAD]"})
    ours = data.load_tokenizer(tmp_path)
    assert ours.pad_id is None
    assert ours.encode("[PAD]") == ours.encode("[PAD") + ours.encode("]")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: missing; .* Hugging Face layout"):
        data.load_tokenizer(write_json(tmp_path, tokenizer=byte_level()))


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json",
                                     "special_tokens_map.json", "config.json", "vocab.json"])
@pytest.mark.parametrize("content", ["", '{"model": {', "<html>", "7"])
def test_a_damaged_file_is_named(tmp_path, damaged, content):
    write_json(tmp_path, tokenizer=byte_level(), config={"model_type": "opt"})
    if damaged == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "merges.txt").write_text("")
    (tmp_path / damaged).write_text(content)
    with pytest.raises(ValueError, match=f"{damaged}: .*download it again"):
        data.load_tokenizer(tmp_path)


VOCABULARY = {"[UNK]": 0, "a": 1, "</s>": 2}


@pytest.mark.parametrize("model", [
    models.WordPiece(VOCABULARY, unk_token="[UNK]"), models.WordLevel(VOCABULARY, unk_token="[UNK]"),
    models.BPE(VOCABULARY, [])])
def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path, model):
    write_json(tmp_path, tokenizer=json.loads(Tokenizer(model).to_str()), config={"model_type": "opt"})
    with pytest.raises(ValueError, match=f"tokenizer.json: {type(model).__name__} .*not implemented"):
        data.load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    write_json(tmp_path, config={"model_type": "llama"}, vocab={})
    says = "no tokenizer .tokenizer.json, or vocab.json and merges.txt.;"
    with pytest.raises(FileNotFoundError, match=says):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")  # lmsys/vicuna-*
    says = "tokenizer.model, a SentencePiece file.*--tgt-tokenizer.*huggyllama/llama-7b"
    with pytest.raises(FileNotFoundError, match=says):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "spiece.model")  # google/t5-v1_1-*
    with pytest.raises(FileNotFoundError, match="spiece.model, a Sentence.*flan-t5-base for T5 v1.1"):
        data.load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------- ids and prompts


def test_a_long_caption_keeps_its_end_mark(tok):
    text = "a red square on a brown table " * 9
    ids = data.caption_ids(tok, text, max_tokens=10)
    assert len(ids) == 10
    assert ids == [*tok.encode(text)[:9], tok.end_id]
    assert data.caption_ids(tok, "a red square") == [*tok.encode("a red square"), tok.end_id]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("Unigram")])
def test_a_special_token_spelled_in_a_caption_is_a_text(kinds, kind):
    """And no end of it. A prompt may spell one."""
    tok = kinds[kind][0]
    specials = {tok.encoder.token_to_id(special) for special in tok.specials}
    caption = "was <s>50</s> now 20 <unk>"
    ids = data.caption_ids(tok, caption)
    assert not specials & {*ids[:-1]}
    assert tok.decode(ids[:-1]).strip() == caption
    counts = data.count_tokens(tok, [caption], 600)
    assert counts.sum() == len(ids) and all(counts[id] == ids.count(id) for id in ids)
    assert tok.encoder.token_to_id("</s>") in data.prompt_ids(tok, 0, "a </s>")[1:]
    assert data.caption_ids(tok, "a red square")[:-1] == tok.encode("a red square")


def test_the_prompt_is_soft_prompts_then_bos(tok):
    assert data.prompt_ids(tok, 3) == [-1, -1, -1, 2]
    assert data.prompt_ids(tok, 1, "a red") == [-1, 2, *tok.encode("a red")]


def test_t5s_prompt_ends_with_eos_and_others_begin_with_bos_if_there_is_one(kinds):
    t5, qwen, llama = (kinds[kind][0] for kind in ("Unigram", "Qwen", "LLaMA, normalizer"))
    assert data.prompt_ids(t5, 2) == [-1, -1, 1]
    assert data.prompt_ids(t5, 2, "a red") == [-1, -1, *t5.encode("a red"), 1]
    assert data.prompt_ids(qwen, 1) == [-1]
    assert data.prompt_ids(qwen, 1, "a red") == [-1, *qwen.encode("a red")]
    assert data.prompt_ids(qwen, 0) == [qwen.eos_id]
    assert data.prompt_ids(llama, 1) == [-1, 1]
    assert data.prompt_ids(llama, 0) == [1]
    assert data.prompt_ids(llama, 1, "a red") == [-1, 1, *llama.encode("a red")]
    assert data.caption_ids(t5, "a red") == [*t5.encode("a red"), 1]


@pytest.mark.parametrize("config, is_one", [
    ({"model_type": "t5"}, True),
    ({"model_type": "mt5", "is_encoder_decoder": True}, True),
    ({"model_type": "llama"}, False),
    ({"text_config": {"model_type": "t5"}}, True),
    ({"is_encoder_decoder": True, "text_config": {"model_type": "opt"}}, False)])
def test_config_json_says_whether_the_llm_is_an_encoder_decoder(tmp_path, config, is_one):
    write_json(write_kind(tmp_path, "Unigram"), config=config)
    assert data.load_tokenizer(tmp_path).encoder_decoder is is_one


def test_tokens_are_counted_on_captions(tok):
    captions = ["a red square", "a red circle"]
    counts = data.count_tokens(tok, captions, 400)
    assert counts[tok.end_id] == 2
    assert counts[tok.encode(" red")[0]] == 2
    assert counts.sum() == sum(len(data.caption_ids(tok, caption)) for caption in captions)


# ------------------------------------------------------------------------------------ conversations

# In the layouts of VICUNA.md, section 5: Qwen2.5, Llama-3, Mistral 7B, Vicuna 1.1 as a checkpoint has
# it, and Qwen3, which writes an empty block of thoughts into its last answer
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}"
          "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
          " + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}") + GENERATION
LLAMA3 = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']"
          " + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for message in messages %}"
           "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('roles must alternate') }}{% endif %}"
           "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
           "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}")
LLAMA2 = MISTRAL.replace("message['content'] + eos", "' ' + message['content'] | trim + ' ' + eos")
VICUNA = ("{{ bos_token + 'Be polite. ' }}{% for message in messages %}{% if message['role'] == 'user' %}"
          "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}{% else %}"
          "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
          "{% endif %}{% endfor %}")
QWEN3 = ("{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' }}\n"
         "    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}"
         "{%- endif %}\n    {{- message.content + '<|im_end|>\\n' }}\n{%- endfor %}\n") + GENERATION + (
         "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
         "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}")
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATS = {  # template, tokenizer, special tokens, what ends an answer
    "ChatML": (CHATML, "Qwen", CHATML_TOKENS, "<|im_end|>"),
    "Qwen3": (QWEN3, "Qwen", CHATML_TOKENS, "<|im_end|>"),
    "ChatML, SentencePiece": (CHATML, "LLaMA, normalizer", CHATML_TOKENS, "<|im_end|>"),
    "Llama-3": (LLAMA3, "GPT-2", LLAMA3_TOKENS, "<|eot_id|>"),
    "Mistral": (MISTRAL, "LLaMA, normalizer", [], "</s>"),
    "Mistral, new file": (MISTRAL, "LLaMA, pre-tokenizer", ["[INST]", "[/INST]"], "</s>"),
    "Llama-2": (LLAMA2, "LLaMA, normalizer", [], "</s>"),
    "Vicuna": (VICUNA, "LLaMA, normalizer", [], "</s>"),
    "Vicuna, new file": (VICUNA, "LLaMA, pre-tokenizer", [], "</s>"),
}


def write_chat_kind(folder, template, kind, tokens):
    """A checkpoint's tokenizer with such a chat template."""
    write_kind(folder, kind)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if kind == "Qwen":
        config["bos_token"] = "<s>"
    return write_json(folder, tokenizer_config=config | {"chat_template": template})


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """{name: (our tokenizer, our template, transformers' tokenizer, the end)}"""
    made = {}
    for name, (template, kind, tokens, end) in CHATS.items():
        folder = write_chat_kind(tmp_path_factory.mktemp("chat"), template, kind, tokens)
        ours = data.load_tokenizer(folder), data.load_chat_template(folder)
        made[name] = *ours, AutoTokenizer.from_pretrained(folder), end
    return made


def as_messages(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages[:-1] if turns[-1][1] is None else messages


def conversations(count=60):
    """Of one to four turns, of all kinds of pieces, but for special tokens."""
    rng = random.Random(1)
    plain = [piece for piece in PIECES if "<" not in piece and piece.strip()]

    def text():
        return rng.choice(["", " "]).join(rng.choices(plain, k=rng.randint(1, 6)))

    made = [[["What is it?", "A red square."]], [["What is it?", "A square."], ["And?", "Red."]],
            [["  What? ", "\nA square.\n "], ["\t", " Red "]]]
    while len(made) < count:
        made.append([[text(), text()] for _ in range(rng.randint(1, 4))])
    return made


@pytest.mark.parametrize("name", CHATS)
def test_ids_of_conversations_equal_transformers(chats, name):
    """Whole, and up to where the model is to answer."""
    tok, template, theirs, _ = chats[name]
    for turns in conversations():
        for some in (turns, [*turns[:-1], [turns[-1][0], None]]):
            expected = theirs.apply_chat_template(
                as_messages(some), add_generation_prompt=some[-1][1] is None, enable_thinking=False,
                return_dict=False)
            ids, scored = data.chat_ids(tok, template, some)
            assert ids == expected
            assert len(scored) == len(ids)


@pytest.mark.parametrize("name", ["ChatML", "Llama-3"])
def test_a_system_text_is_written_as_the_template_has_it(chats, name):
    tok, template, theirs, _ = chats[name]
    turns = [["What is it?", "A red square."]]
    expected = theirs.apply_chat_template(as_messages(turns, "Be brief."), return_dict=False)
    ids, scored = data.chat_ids(tok, template, turns, system="Be brief.")
    assert ids == expected
    assert "Be brief." in tok.encoder.decode(ids, skip_special_tokens=False)


def letters_of(text):
    """Without blanks, since a token may reach over the seam to those before it."""
    return "".join(unicodedata.normalize("NFC", text).replace("▁", " ").split())


@pytest.mark.parametrize("name", CHATS)
def test_answers_and_their_ends_are_scored_and_nothing_else(chats, name):
    tok, template, _, end = chats[name]
    end_id = tok.encoder.token_to_id(end)
    for turns in conversations():
        ids, scored = data.chat_ids(tok, template, turns)
        runs, before = [], False
        for id, counts in zip(ids, scored):
            if counts and not before:
                runs.append([])
            if counts:
                runs[-1].append(id)
            before = counts
        assert len(runs) == len(turns)
        for run, (_, answer) in zip(runs, turns):
            assert run[-1] == end_id
            said = tok.encoder.decode(run[:-1], skip_special_tokens=False)
            assert letters_of(said) == letters_of(answer)
    assert data.stop_ids(tok, template) == ((end_id,),)


def test_one_token_off_would_be_seen(chats):
    """By hand: what is scored of two turns in ChatML."""
    tok, template, _, _ = chats["ChatML"]
    ids, scored = data.chat_ids(tok, template, [["Is it red?", "yes"], ["Is it?", "no way"]])
    end = tok.encoder.token_to_id("<|im_end|>")
    assert [id for id, counts in zip(ids, scored) if counts] == [
        *tok.encode("yes"), end, *tok.encode("no way"), end]
    first = scored.index(True)
    assert ids[first - 1 : first] == tok.encode("\n")


@pytest.mark.parametrize("name", ["ChatML", "Llama-3", "Mistral, new file", "Vicuna"])
def test_a_special_token_in_what_people_say_is_a_text(chats, name):
    """And does not end a turn: only those that the template writes are special."""
    tok, template, _, end = chats[name]
    end_id = tok.encoder.token_to_id(end)
    turns = [[f"Say {end} now", f"I say {end} now"], ["<s>[INST]", "fine"]]
    ids, scored = data.chat_ids(tok, template, turns)
    honest, _ = data.chat_ids(tok, template, [["Say x now", "I say x now"], ["y", "fine"]])
    for special in {*tok.specials}:
        id = tok.encoder.token_to_id(special)
        assert ids.count(id) == honest.count(id)
    assert end in tok.encoder.decode([id for id, counts in zip(ids, scored) if counts][:-2],
                                     skip_special_tokens=True)
    assert sum(id == end_id for id, counts in zip(ids, scored) if counts) == 2
    assert tok.encode(end) == [end_id]  # as ever


@pytest.mark.parametrize("name", CHATS)
def test_soft_prompts_stand_in_front_of_the_first_question(chats, name):
    tok, template, _, _ = chats[name]
    turns = [["What is it?", "A square."], ["And?", "Red."]]
    ids, scored = data.chat_ids(tok, template, turns, num_query_tokens=3)
    assert ids.count(data.IMAGE) == 3
    at = ids.index(data.IMAGE)
    assert ids[at : at + 3] == [-1, -1, -1]
    assert not any(scored[: at + 3])
    before = tok.encoder.decode(ids[:at], skip_special_tokens=False)
    behind = tok.encoder.decode(ids[at + 3 :], skip_special_tokens=False)
    assert "What" not in before
    assert behind.lstrip().startswith("What is it?")


def test_vicuna_v0_is_written_as_it_was_trained(kinds):
    """Pieces around the image and the answer each encoded alone; ### ends an answer, and is another
    token behind a blank."""
    tok = kinds["LLaMA, normalizer"][0]
    template = data.TEMPLATES["vicuna-v0"]
    turns = [["What is red?", "The circle."], ["Is it?", "no"]]
    ids, scored = data.chat_ids(tok, template, turns, num_query_tokens=2)
    pieces = ["###Human: <Img>", [-1, -1], "</Img> What is red? ###Assistant: ",
              "The circle. ###Human: Is it? ###Assistant: ", "no###"]
    expected = [1]
    for piece in pieces:
        expected += tok.encode(piece) if isinstance(piece, str) else piece
    assert ids == expected
    said = tok.decode(id for id, counts in zip(ids, scored) if counts)
    assert said == "The circle. ### no###"
    without, _ = data.chat_ids(tok, template, [["Hi", "x"]])
    assert without == [1, *tok.encode("###Human: Hi ###Assistant: "), *tok.encode("x###")]


def test_all_spellings_of_vicuna_v0s_stop_are_known(tmp_path):
    content = sentencepiece_bpe("normalizer", [*CORPUS, *["### a b ### c###"] * 200])
    write_json(write_kind(tmp_path, "LLaMA, normalizer"), tokenizer=content)
    tok = data.load_tokenizer(tmp_path)
    stops = data.stop_ids(tok, data.TEMPLATES["vicuna-v0"])
    assert len(stops) > 1
    for before in ("a", "a ", "a.", "a\n"):
        ids = tok.encode(f"{before}###")
        assert any(tuple(ids[-len(stop) :]) == stop for stop in stops)


def test_vicuna_v1_1_is_written_as_fastchat_does(kinds):
    tok = kinds["LLaMA, normalizer"][0]
    template = data.TEMPLATES["vicuna-v1.1"]
    turns = [["Q1", "A1"], ["Q2", None]]
    text = f"{data.VICUNA_SYSTEM} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    assert data.chat_ids(tok, template, turns)[0] == [1, *tok.encode(text)]
    assert len(data.VICUNA_SYSTEM) == 154
    own = data.chat_ids(tok, template, [["Q1", None]], system="Be brief.")[0]
    assert own == [1, *tok.encode("Be brief. USER: Q1 ASSISTANT:")]
    assert data.stop_ids(tok, template) == ((2,),)


def test_a_chat_template_is_found_where_checkpoints_have_it(tmp_path):
    write_chat_kind(tmp_path, CHATML, "Qwen", CHATML_TOKENS)
    assert data.load_chat_template(tmp_path).source == CHATML
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA3}]
    write_json(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": named})
    assert data.load_chat_template(tmp_path).source == LLAMA3
    write(tmp_path / "chat_template.jinja", MISTRAL)  # goes first
    found = data.load_chat_template(tmp_path)
    assert found.source == MISTRAL
    assert found.tokens == {"eos_token": "</s>"}
    assert data.load_chat_template(write_kind(tmp_path / "none", "GPT-2")) is None


@pytest.mark.parametrize("template, says", [
    ("{% for m in messages %}", "chat template: Unexpected end"),
    ("{{ messages[0].content + 7 }}", "chat template: TypeError"),
    ("{{ nothing.at.all }}", "chat template: 'nothing' is undefined"),
    ("{{ raise_exception('no') }}", "chat template: no"),
    ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    ("{{ messages.append(1) }}", "unsafe|not safe|undefined"),
    ("{% for i in range(10**9) %}x{% endfor %}", "chat template: OverflowError"),
    ([{"name": "rag", "template": "x"}], "none of its chat templates .rag. is called default"),
    (7, "its chat_template is no text")])
def test_a_chat_template_that_is_damaged_or_does_mischief_is_refused(tmp_path, template, says):
    write_json(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": template})
    with pytest.raises(ValueError, match=says):
        data.load_chat_template(tmp_path)


@pytest.mark.parametrize("template", [
    "{{ messages[-1].content }}",  # leaves a turn out
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"])
def test_a_chat_template_that_drops_or_repeats_turns_is_refused(kinds, template):
    with pytest.raises(ValueError, match="leaves out or repeats"):
        data.chat_ids(kinds["GPT-2"][0], data.ChatTemplate(template), [["a", "b"]])


def test_a_template_that_refuses_a_conversation_says_why(chats):
    tok, template, _, _ = chats["Mistral"]
    with pytest.raises(ValueError, match="roles must alternate"):
        data.chat_ids(tok, template, [["a", "b"]], system="no place for it")


def test_what_ends_no_answer_is_said(kinds):
    template = data.ChatTemplate("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    with pytest.raises(ValueError, match="nothing that ends an answer"):
        data.stop_ids(kinds["GPT-2"][0], template)


def test_conversations_become_a_prompt_and_a_target(chats):
    tok, template, _, end = chats["ChatML"]
    turns = [["What is it?", "A square."], ["And?", "Red."]]
    ids, scored = data.chat_ids(tok, template, turns, 4)
    make = data.Conversations(tok, template, 4)
    text = make(json.dumps({"turns": turns}), True, None)
    assert text.prompt == data.chat_ids(tok, template, [[turns[0][0], None]], 4)[0]
    (target,) = text.targets
    assert text.prompt + target == ids[:-1]  # but for the line end behind the last
    assert text.scored == scored[len(text.prompt) : -1]
    assert target[-1] == tok.encoder.token_to_id(end)
    one = make(json.dumps({"turns": turns[:1], "system": "Be brief."}), False, None)
    assert one.scored is None
    assert data.IMAGE not in one.prompt
    short = data.Conversations(tok, template, 4, max_tokens=3)(json.dumps({"turns": turns}), True, None)
    assert short.targets == [target[:3]]


def test_an_encoder_reads_all_before_the_last_answer(kinds):
    tok = kinds["Unigram"][0]
    make = data.Conversations(tok, data.TEMPLATES["vicuna-v1.1"], 2)
    turns = [["what", "a red square"], ["is it", "the circle"]]
    text = make(json.dumps({"turns": turns}), True, None)
    assert text.targets == [[*tok.encode("the circle"), 1]]
    asked = [turns[0], ["is it", None]]
    assert text.prompt == [*data.chat_ids(tok, make.template, asked, 2)[0], 1]
    assert text.prompt.count(data.IMAGE) == 2
    assert text.scored is None


def test_an_instruction_is_drawn_where_there_is_no_question(chats):
    tok, template, _, _ = chats["ChatML"]
    make = data.Conversations(tok, template, 0, instructions=("Look!", "See?", "What?"))
    item = json.dumps({"turns": [[None, "A boat."]]})
    prompts = {tuple(make(item, False, np.random.default_rng(i)).prompt) for i in range(40)}
    asked = {tuple(data.chat_ids(tok, template, [[q, None]])[0]) for q in make.instructions}
    assert prompts == asked


# ------------------------------------------------------------------------------------------- images


def first_pixel(file):
    return data.load_image(file).getpixel((0, 0))


@pytest.mark.parametrize("name, mode, colour, seen", [
    ("plain.png", "RGB", (1, 2, 3), (1, 2, 3)),
    ("grey.png", "L", 90, (90, 90, 90)),
    ("clear.png", "RGBA", (10, 20, 30, 0), (255, 255, 255)),  # transparency is white
    ("half.png", "LA", (0, 128), (127, 127, 127)),
    ("deep.png", "I;16", 256 * 90, (90, 90, 90)),
    ("deep.tif", "I;16", 256 * 90, (90, 90, 90)),
    ("deep.pgm", "I;16", 256 * 90, (90, 90, 90)),
    ("black.tif", "CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("plain.ppm", "RGB", (1, 2, 3), (1, 2, 3)),
    ("plain.bmp", "RGB", (1, 2, 3), (1, 2, 3))])
def test_every_kind_of_image_becomes_rgb(tmp_path, name, mode, colour, seen):
    assert first_pixel(save_image(tmp_path / name, mode, colour)) == seen


@pytest.mark.parametrize("name, mode", [("whole.tif", "I"), ("float.tif", "F"), ("float.pfm", "F")])
def test_pixels_of_32_bits_are_refused_by_name(tmp_path, name, mode):
    """What is white in them, nobody says."""
    save_image(tmp_path / name, mode, 90)
    with pytest.raises(OSError, match=f"{name}: pixels of more than 16 bits"):
        data.load_image(tmp_path / name)


def test_a_pgm_of_12_bits_is_as_bright_as_it_says(tmp_path):
    write(tmp_path / "deep.pgm", b"P5 1 1 4095\n" + struct.pack(">H", 2048))
    assert first_pixel(tmp_path / "deep.pgm") == (128, 128, 128)


def test_palettes_jpegs_in_cmyk_and_turned_ones_become_rgb(tmp_path):
    assert max(first_pixel(save_image(tmp_path / "cmyk.jpg", "CMYK", (0, 0, 0, 255)))) < 10
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 10, 10, 0, 0, 0])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert first_pixel(tmp_path / "palette.png") == (200, 10, 10)
    assert first_pixel(tmp_path / "clear.gif") == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert data.load_image(save_image(tmp_path / "turned.jpg", exif=turned)).size == (30, 40)


@pytest.mark.parametrize("format, options", [
    ("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}),
    ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "blue")]}),
    ("AVIF", {})])
def test_formats_of_data_sets_are_read_whatever_the_file_is_called(tmp_path, format, options):
    if format == "AVIF" and "AVIF" not in data.IMAGE_FORMATS:
        pytest.skip("this Pillow has no AVIF")
    save_image(tmp_path / "any.jpg", colour="red", format=format, **options)
    red, green, blue = first_pixel(tmp_path / "any.jpg")
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("format", ["EPS", "ICNS", "JPEG2000", "PCX", "TGA"])
def test_no_other_format_is_opened(tmp_path, format):
    """Above all not what starts a program: Pillow gives an EPS to Ghostscript."""
    save_image(tmp_path / "other.jpg", size=(64, 64), format=format)
    with pytest.raises(OSError, match="other.jpg: no picture in one of JPEG, PNG, WEBP"):
        data.load_image(tmp_path / "other.jpg")


def png_of_size(width, height):
    """The beginning of a PNG that says how large it is, and holds next to nothing."""
    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("width, height", [(12_000, 9_000), (100_000, 100_000)])
def test_a_picture_with_too_many_pixels_is_not_decoded(tmp_path, monkeypatch, width, height):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    write(tmp_path / "large.png", png_of_size(width, height))
    with pytest.raises(OSError, match="large.png.*pixels"):
        data.load_image(tmp_path / "large.png")


def test_a_picture_with_as_many_pixels_as_allowed_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_PIXELS", 40 * 30)
    assert data.load_image(save_image(tmp_path / "just.png")).size == (40, 30)
    with pytest.raises(OSError, match="41 x 30 pixels are more than the 1,200"):
        data.load_image(save_image(tmp_path / "more.png", size=(41, 30)))


@functools.cache
def photograph(width=640, height=480, seed=0):
    """Smooth colours with detail at all scales, as photographs have them."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    noise = np.fft.fft2(rng.normal(size=(3, height, width)))
    channels = np.fft.ifft2(noise / frequency.clip(1 / width) ** 1.3).real
    levels = np.clip(120 + 50 * channels / channels.std(), 0, 255).astype(np.uint8)
    return Image.fromarray(levels.transpose(1, 2, 0))


@pytest.mark.parametrize("kind, options", [
    ("RGB", {"quality": 90}), ("L", {}), ("CMYK", {}), ("RGB", {"quality": 75, "progressive": True})])
def test_evaluation_images_equal_transformers(tmp_path, kind, options):
    """But for at most one of the 255 levels, 0.015 as normalised, in less than one of a hundred
    values: torch's kernel rounds otherwise."""
    file = tmp_path / "photo.jpg"
    photograph().convert(kind).save(file, **options)
    processor = BlipImageProcessorPil(size={"height": 224, "width": 224})
    theirs = processor(Image.open(file))["pixel_values"][0]
    with data.open_image(file) as image:
        ours = qformer.normalise(data.resize(image, 224)[None])[0]
    levels = 255 * torch.tensor(qformer.STD).view(3, 1, 1)
    apart = (ours - torch.as_tensor(theirs)).abs() * levels
    assert apart.max() < 1.001
    assert (apart > 1e-3).float().mean() < 0.01


def random_crops(file, seeds=10, **options):
    """Crops of a file by several seeds, and the sizes at which it was decoded."""
    crops, sizes = [], []
    for seed in range(seeds):
        with data.open_image(file) as image:
            rng = np.random.default_rng(seed)
            crops.append(data.random_crop(image, 224, rng, **options).float())
            sizes.append(image.size)
    return torch.stack(crops), sizes


@pytest.mark.parametrize("width, height, factors", [
    (640, 480, {2}), (330, 330, {1}), (1500, 1100, {4}), (2900, 2700, {8}), (700, 360, {1, 2})])
def test_crops_of_jpegs_are_decoded_as_coarsely_as_they_allow(tmp_path, width, height, factors):
    """At a half, a quarter, an eighth, where 3/4 of the pixels that are wanted are left; and the
    crop is where it would be."""
    file = tmp_path / "photo.jpg"
    small = photograph(width // 4, height // 4)
    smooth = small.resize((width, height)).filter(ImageFilter.GaussianBlur(width / 200))
    smooth.save(file, quality=95)
    seeds = 6 if width < 1000 else 2
    coarse, sizes = random_crops(file, seeds)
    whole, all_of_it = random_crops(file, seeds, least=np.inf)
    assert {round(width / size[0]) for size in sizes} == factors
    assert set(all_of_it) == {(width, height)}
    assert (coarse - whole).abs().mean((1, 2, 3)).max() < 4
    assert (coarse.mean((2, 3)) - whole.mean((2, 3))).abs().max() < 1


TURN = Image.Transpose
BACK = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
        6: TURN.ROTATE_90, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_270}
# an orientation that is the text "top"
TOP = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0top\0\0\0\0\0"
TURNED = [(kind, orientation) for kind in ("jpg", "tif", "png") for orientation in range(1, 10)]


@pytest.fixture(scope="module")
def upright(tmp_path_factory):
    """A picture, and {kind of file: crops of it}"""
    folder = tmp_path_factory.mktemp("upright")
    image = photograph().filter(ImageFilter.GaussianBlur(3))
    crops = {}
    for kind in ("jpg", "tif", "png"):
        image.save(folder / f"upright.{kind}", quality=95)
        crops[kind], _ = random_crops(folder / f"upright.{kind}", seeds=3)
    return image, crops


@pytest.mark.parametrize("kind, orientation", [*TURNED, ("jpg", TOP), ("png", TOP)])
def test_turned_images_are_cropped_as_upright_ones(tmp_path, upright, kind, orientation):
    """By their EXIF orientation. One that Pillow does not know turns nothing."""
    upright, expected = upright
    stored = upright.transpose(BACK[orientation]) if orientation in BACK else upright
    if isinstance(orientation, int):
        exif = Image.Exif()
        exif[0x0112] = orientation
    else:
        exif = b"Exif\0\0" + orientation
    stored.save(tmp_path / f"turned.{kind}", exif=exif, quality=95)
    crops, _ = random_crops(tmp_path / f"turned.{kind}", seeds=3)
    assert (crops - expected[kind]).abs().mean((1, 2, 3)).max() < 4


SIX = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # an entry of EXIF: turned by a quarter


@pytest.mark.parametrize("kind, exif, size", [
    ("png", b"junk", (40, 30)),
    # beside the orientation an entry of a wrong type, which Pillow reads and cannot write
    ("jpg", b"II*\0\x08\0\0\0\x02\0" + SIX + b"\0\x01\x02\0\x03\0\0\0AB\0\0" + bytes(4), (30, 40))])
def test_a_picture_with_damaged_exif_is_read(tmp_path, kind, exif, size):
    file = save_image(tmp_path / f"odd.{kind}", exif=b"Exif\0\0" + exif)
    assert data.load_image(file).size == size
    assert data.read_image(file, 8).shape == (3, 8, 8)
    with data.open_image(file) as image:
        assert data.random_crop(image, 8, np.random.default_rng(0)).shape == (3, 8, 8)


def test_random_crops_are_half_to_all_of_the_area_and_half_are_flipped():
    """On a picture of its own coordinates, a crop shows where it comes from."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0] = np.arange(100)[None] * 2
    ramp[..., 1] = np.arange(100)[:, None] * 2
    areas, flips = [], []
    for seed in range(200):
        crop = data.random_crop(Image.fromarray(ramp), 50, np.random.default_rng(seed)).float()
        width = (crop[0, 0, -1] - crop[0, 0, 0]) / 2
        height = (crop[1, -1, 0] - crop[1, 0, 0]) / 2
        areas.append(abs(width * height) / 100**2 * (50 / 49) ** 2)
        flips.append(bool(width < 0))
        assert crop.shape == (3, 50, 50)
        assert height > 0
    assert 0.45 < min(areas) < 0.55
    assert max(areas) > 0.9
    assert 70 < sum(flips) < 130


@pytest.mark.parametrize("size, crop", [((300, 100), (83, 0, 216, 100)), ((100, 300), (0, 83, 100, 216))])
def test_of_a_picture_too_wide_or_tall_for_any_crop_the_middle_is_taken(size, crop):
    """As torchvision's: the widest or tallest part that the ratios of 3/4 to 4/3 allow."""
    for seed in range(5):
        assert data.draw_crop(*size, np.random.default_rng(seed)) == crop


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    if content is None:  # half of one
        whole = save_image(tmp_path / "whole.png", size=(300, 300)).read_bytes()
        content = whole[: len(whole) // 2]
    write(tmp_path / "bad.jpg", content)
    with pytest.raises(OSError, match="bad.jpg"):
        data.load_image(tmp_path / "bad.jpg")


# ------------------------------------------------------------------------------------------- order


def test_an_epoch_has_every_pair_once_and_the_next_another_order():
    order = data.plan([30, 12], 100, seed=3)
    assert sorted(order[:42]) == sorted(order[42:84]) == list(range(42))
    assert (order[:42] != order[42:84]).any()
    assert (order == data.plan([30, 12], 100, seed=3)).all()
    assert (order != data.plan([30, 12], 100, seed=4)).any()


def test_a_mixture_holds_in_every_window():
    order = data.plan([1000, 300, 5000], 20000, seed=0, weights=[0.1, 0.2, 0.7])
    which = np.searchsorted([1000, 1300], order, side="right")
    for start in range(0, 19000, 100):
        counts = np.bincount(which[start : start + 1000], minlength=3)
        assert np.abs(counts - [100, 200, 700]).max() <= 6
    assert sorted(order[which == 0][:1000]) == list(range(1000))  # a whole pass before any repeats


# ------------------------------------------------------------------------------ samples and batches


@pytest.fixture(scope="module")
def samples(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return data.Samples([read_pairs(str(write_pairs(folder, 40)))], tok, 28, 5)


def test_ranks_share_every_batch_whatever_their_number(samples):
    order = data.plan([40], 40, seed=0)

    def files(**options):
        for step in data.load_batches(samples, order, 8, **options):
            yield sorted(file for micro in step for file in micro["files"])

    alone = list(files(micro_batch=8))
    ranks = [files(micro_batch=3, rank=r, world=2) for r in range(2)]
    assert len(alone) == 5
    assert alone == [sorted(a + b) for a, b in zip(*ranks)]


def letters(tok, rows):
    """In the captions of a sample, (T,) or packed (K,T)."""
    texts = [tok.decode(t for t in row[row >= 0][:-1].tolist()) for row in rows.view(-1, rows.shape[-1])]
    return sum(len(text.strip()) for text in texts)


@pytest.mark.parametrize("captions, count", [("each", 78), ("packed", 48)])
def test_micro_batches_hold_captions_of_like_length(samples, captions, count):
    pairs = captioned(samples, [1, 3, 2, 6, 4, 5, 9, 8])
    several = data.Samples([samples.sets[0], pairs], samples.tok, 28, 5, captions=captions)
    each = list(map(len, pairs.captions))
    if captions == "packed":
        each = np.bincount(pairs.image, each).tolist()
    assert several.lengths().tolist() == [*map(len, samples.sets[0].captions), *each]
    order = data.plan([count], count, seed=0)
    for rank in range(2):
        for micros in data.load_batches(several, order, 24, 4, rank, 2):
            lengths = [[letters(samples.tok, rows) for rows in m["target_ids"]] for m in micros]
            assert len(micros) == 3
            assert all(max(a) <= min(b) for a, b in zip(lengths, lengths[1:]))


@pytest.mark.slow
def test_starting_at_a_step_gives_what_would_have_come(samples):
    order = data.plan([40], 40, seed=0)
    whole = list(data.load_batches(samples, order, 8, 4))
    rest = list(data.load_batches(samples, order, 8, 4, first_step=3, workers=1))
    assert len(rest) == 2
    for ours, theirs in zip(rest, whole[3:]):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["images"], b["images"])
            assert torch.equal(a["target_ids"], b["target_ids"])
            assert a["files"] == b["files"]


def batches_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if torch.is_tensor(value):
                assert torch.equal(value, b[key])
                assert value.dtype == b[key].dtype
            else:
                assert value == b[key]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["no room", "few files"])
def test_batches_travel_through_pipes_where_they_do_not_fit_elsewhere(samples, monkeypatch, way):
    """The same come, to the bit."""
    if way == "no room":
        monkeypatch.setattr(data, "shared_memory", lambda: 1_000_000)
    else:
        monkeypatch.setattr(data.resource, "getrlimit", lambda _: (64, 64))
    monkeypatch.setattr(samples, "size", 224)
    assert not data.fits_in_shared_memory(samples, 4, 2, 1, 2)
    monkeypatch.setattr(samples, "size", 28)
    monkeypatch.setattr(data, "fits_in_shared_memory", lambda *_: False)
    order = data.plan([40], 40, seed=0)
    through = list(data.load_batches(samples, order, 8, 4, workers=2))
    for ours, theirs in zip(through, data.load_batches(samples, order, 8, 4), strict=True):
        batches_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int64])
def test_packed_batches_are_what_they_were(dtype):
    batch = {"x": torch.arange(6).view(2, 3).to(dtype), "files": ["a"], "twins": {}}
    batches_equal([data.unpack(data.Packed(lambda samples: samples)(batch))], [batch])


def test_shared_memory_is_counted_beforehand(samples, monkeypatch):
    """A container's 64 MB hold what two workers have on their way in micro-batches of 8 at 224
    pixels, not what eight have of 36; neighbours share them."""
    monkeypatch.setattr(data, "shared_memory", lambda: 64 * 2**20)
    monkeypatch.setattr(samples, "size", 224)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert data.fits_in_shared_memory(samples, 8, 2, 1, 2)
    assert not data.fits_in_shared_memory(samples, 36, 2, 1, 8)
    assert not data.fits_in_shared_memory(samples, 8, 2, 8, 2)
    patches = types.SimpleNamespace(shape=(256, 1024), dtype=torch.float32)  # a megabyte an image
    monkeypatch.setattr(samples, "sets", [dataclasses.replace(samples.sets[0], cache=patches)])
    assert not data.fits_in_shared_memory(samples, 8, 2, 1, 2)


@pytest.mark.parametrize("per_step, workers", [(1, 8), (6, 8), (48, 8), (48, 1), (7, 2)])
def test_a_step_is_read_while_another_is_computed(monkeypatch, samples, per_step, workers):
    """All micro-batches of a step are asked for at once: as many are read ahead, and two of each worker."""
    given = {}

    class Loader:
        def __init__(self, *_, **options):
            given.update(options)

        def __iter__(self):
            return iter([])

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    order = data.plan([40], 2 * per_step, seed=0)
    with contextlib.suppress(RuntimeError, StopIteration):
        next(data.load_batches(samples, order, per_step, 1, workers=workers))
    assert given["num_workers"] * given["prefetch_factor"] >= per_step + 2 * workers


SMALL = """
import sys
import numpy as np
import data
from pairs import read_pairs

if __name__ == "__main__":
    samples = data.Samples([read_pairs(sys.argv[1])], data.load_tokenizer(sys.argv[2]), 224, 5)
    steps = list(data.load_batches(samples, np.arange(40).repeat(20), 80, 40, workers=3))
    print(sum(len(micro["images"]) for step in steps for micro in step), "samples")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["mount -t tmpfs -o size=8m tmpfs /dev/shm", "ulimit -n 64"])
def test_little_shared_memory_or_few_open_files_do_not_end_a_run(tmp_path, world, limit):
    """In a mount namespace of its own, where the machine allows that."""
    space = ["unshare", "-m"] if limit.startswith("mount") else []
    try:
        subprocess.run([*space, "bash", "-c", limit], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here; the test with a stand-in remains")
    write(tmp_path / "small.py", SMALL)
    pairs = write_pairs(tmp_path / "pairs", 40)
    command = f"{limit} && exec {sys.executable} {tmp_path}/small.py {pairs} {world[1]}"
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    done = subprocess.run([*space, "bash", "-c", command], env=environment, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout == "800 samples\n", done.stderr


class Odd(data.Samples):
    """Samples of which reading the fifth does what a test says."""

    def look(self, pairs, file, position):
        if position == 5:
            self.happen()
        return super().look(pairs, file, position)


def kill_worker():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(1000)


@pytest.fixture
def odd(samples, tok, monkeypatch):
    monkeypatch.setattr(data, "LOOK_EVERY", 1)

    def load(happen, most=None, **options):
        made = Odd(samples.sets, tok, 28, 5)
        made.happen = happen
        batches = data.load_batches(made, np.arange(40), 4, 4, workers=2, **options)
        with contextlib.closing(batches):
            return [micro["files"] for step in itertools.islice(batches, most) for micro in step]

    yield load
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_the_remedy(odd):
    """As the system does where memory runs out; and in the main process nothing but waiting for a
    batch is interrupted."""
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(OSError, match="a worker that reads images was ended .*fewer --workers"):
        odd(kill_worker)
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.slow
def test_storage_that_stops_answering_ends_the_run_with_the_remedy(odd, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_WAIT", 2)
    with pytest.raises(OSError, match="no batch has come .* for 2 seconds: .*storage"):
        odd(hang)


@pytest.mark.slow
def test_a_run_that_waits_for_a_batch_can_be_stopped(odd):
    with pytest.raises(data.Stopped):
        odd(hang, stop=lambda: True)


@pytest.mark.slow
def test_a_run_that_ends_early_leaves_no_worker_that_hangs(odd):
    """One that reads ahead, for a step that is not taken any more."""
    assert len(odd(hang, most=1)) == 1


def test_what_goes_wrong_in_a_sample_is_no_matter_of_workers(odd):
    """It is told as it is."""
    class Broken:
        def __next__(self):
            raise RuntimeError("Caught RuntimeError in DataLoader worker process 0: mistake")

    with pytest.raises(RuntimeError, match="mistake"):
        data.wait_for(Broken(), None)


def test_an_unreadable_image_is_replaced_and_named(tok, tmp_path):
    pairs = read_pairs(str(write_pairs(tmp_path, 12)))
    (tmp_path / "5.png").write_bytes(b"no image")
    samples = data.Samples([pairs], tok, 28, 5)
    (batch,) = next(data.load_batches(samples, np.arange(12), 12, 12))
    assert len(batch["images"]) == 12
    assert batch["files"].count(str(tmp_path / "6.png")) == 2
    assert len(batch["bad"]) == 1
    assert "5.png" in batch["bad"][0]


@pytest.mark.parametrize("captions", ["each", "one", "packed"])
def test_an_unreadable_image_with_many_captions_counts_once(tok, samples, tmp_path, captions):
    bad = str(write(tmp_path / "bad.png", "<html>"))
    files = [bad, *samples.sets[0].files()[:3]]
    pairs = make_pairs([file for file in files for _ in range(20)],
                       [f"a red square {'a ' * (i % 20)}" for i in range(80)])
    many = data.Samples([pairs], tok, 28, 5, captions=captions)
    for position in range(3):
        sample = many[position, 0]
        assert sample["file"] == files[1]
        assert len(sample["bad"]) == 1
    assert not many[0, many.starts[-1] - 1]["bad"]
    none = data.Samples([make_pairs([bad] * 4, ["a red square"] * 4)], tok, 28, 5, captions=captions)
    with pytest.raises(OSError, match="1 images in a row cannot be read"):
        none[0, 0]


def test_crops_are_drawn_by_the_position_in_the_plan(samples):
    """The same sample comes out the same, at another position or with another seed differently."""
    image = samples[3, 5]["image"]
    assert torch.equal(image, samples[3, 5]["image"])
    assert not torch.equal(image, samples[4, 5]["image"])
    other_seed = data.Samples(samples.sets, samples.tok, 28, 5, seed=1)
    assert not torch.equal(image, other_seed[3, 5]["image"])


def test_validation_is_not_cropped_nor_is_a_set_that_says_so(samples):
    """Such as Visual Genome's regions."""
    pairs = samples.sets[0]
    plain = data.Samples([pairs], samples.tok, 28, 5, augment=False)[3, 5]["image"]
    whole = dataclasses.replace(pairs, crop=False)
    assert torch.equal(plain, data.Samples([whole], samples.tok, 28, 5)[3, 5]["image"])
    assert torch.equal(plain, data.resize(data.load_image(pairs.file(5)), 28))
    assert not torch.equal(plain, samples[3, 5]["image"])


@pytest.fixture(scope="module")
def prefix_lm(kinds, samples):
    """Samples of captions of 1 to 9 words, for T5 if no other kind is named."""
    words = "a red square on the brown table the white".split()
    captions = [" ".join(words[:n]) for n in range(1, 10)]
    pairs = make_pairs([samples.sets[0].file(0)] * 9, captions)

    def make(kind="Unigram", **options):
        return data.Samples([pairs], kinds[kind][0], 28, 2, **options)

    return make


def one_target(sample):
    (target,) = sample["targets"]
    return sample["prompt"], target


def test_t5_captions_are_split_at_a_word_of_the_first_half(prefix_lm):
    samples = prefix_lm()
    tok = samples.tok
    for n, caption in enumerate(samples.sets[0].captions, 1):
        cuts = set()
        for position in range(60):
            prompt, target = one_target(samples[position, n - 1])
            assert prompt[:2] == [-1, -1]
            assert prompt[-1] == 1
            assert prompt[2:-1] + target == [*tok.encode(caption), 1]
            first = tok.decode(prompt[2:-1])
            rest = tok.decode(target)
            assert first.split() + rest.split() == caption.split()
            assert prompt == data.prompt_ids(tok, 2, first)
            assert target == data.caption_ids(tok, rest)
            cuts.add(len(first.split()))
        assert cuts == set(range(n // 2 + 1))


def first_parts(samples):
    return [len(samples[position, 8]["prompt"]) - 3 for position in range(40)]


def test_splits_are_drawn_by_seed_and_position_and_not_with_the_crops(prefix_lm):
    samples = prefix_lm()
    assert first_parts(samples) == first_parts(samples) == first_parts(prefix_lm(augment=False))
    assert first_parts(samples) != first_parts(prefix_lm(seed=1))
    unsplit = prefix_lm(split=False)
    assert torch.equal(samples[3, 8]["image"], unsplit[3, 8]["image"])  # the crop is the same
    whole = [*whole_ids(prefix_lm), 1]
    rngs = [np.random.default_rng((0, position)) for position in range(40)]
    assert first_parts(samples) != [data.first_part(samples.tok, whole, rng) for rng in rngs]


def test_validation_and_decoder_only_llms_have_whole_captions_as_targets(prefix_lm):
    t5 = prefix_lm(augment=False, split=False)
    llama = prefix_lm("LLaMA, normalizer")
    caption = data.caption_ids(llama.tok, llama.sets[0].captions[8])
    for position in range(20):
        assert one_target(t5[position, 8]) == ([-1, -1, 1], [*whole_ids(prefix_lm), 1])
        assert one_target(llama[position, 8]) == ([-1, -1, 1], caption)


def whole_ids(prefix_lm):
    return prefix_lm().tok.encode(prefix_lm().sets[0].captions[8])


def test_max_tokens_holds_for_both_parts_together(prefix_lm):
    """The caption is cut first: what is split is what would be the target without a split, so
    something is left to predict."""
    samples = prefix_lm(max_tokens=6)
    kept = [*whole_ids(prefix_lm)[:5], 1]
    lengths = set()
    for position in range(40):
        prompt, target = one_target(samples[position, 8])
        assert prompt[2:-1] + target == kept
        assert len(target) >= 2
        lengths.add(len(prompt))
    assert len(lengths) > 1


def test_prompts_of_unequal_lengths_are_filled_up_on_the_left(prefix_lm):
    samples = prefix_lm()
    rows = [samples[position, 8] for position in range(12)]
    batch = samples.collate(rows)
    prompts = batch["prompt_ids"].tolist()
    targets = batch["target_ids"].tolist()
    for row, prompt_row, target_row in zip(rows, prompts, targets):
        prompt, target = one_target(row)
        assert prompt_row == [-100] * (len(prompt_row) - len(prompt)) + prompt
        assert target_row == target + [-100] * (len(target_row) - len(target))
    assert len({len(row["prompt"]) for row in rows}) > 1


# ---------------------------------------------------------------------------- captions of one image


def captioned(samples, most):
    """Samples' images, of which image i has `most`[i] captions: its number, and a word that is the
    caption's own."""
    image = np.repeat(np.arange(len(most)), most)[::-1]  # not in order
    files = samples.sets[0].files()[: len(most)]
    names = ["one", "two", "three", "four", "five"]
    own = np.concatenate([np.arange(n)[::-1] for n in most[::-1]])
    captions = [f"{names[i % 5]} {'red ' * int(k)}".strip() for i, k in zip(image, own)]
    return Pairs("test", "/", Strings.of(files), Strings.of(captions), np.array(image))


def texts(samples, sample):
    return [samples.tok.decode(target[:-1]).strip() for target in sample["targets"]]


def test_an_image_can_come_with_one_of_its_captions(samples):
    pairs = captioned(samples, [1, 3, 2])
    one = data.Samples([samples.sets[0], pairs], samples.tok, 28, 5, captions="one")
    assert data.sizes(one.sets, "one") == [40, 3]
    assert data.sizes(one.sets) == [40, 6]
    assert list(one.starts) == [0, 40, 43]

    def drawn(samples):
        return [texts(samples, samples[position, 41])[0] for position in range(60)]

    counts = {text: drawn(one).count(text) for text in ("two", "two red", "two red red")}
    assert sum(counts.values()) == 60
    assert min(counts.values()) > 8  # 20 expected
    assert texts(one, one[0, 40]) == ["one"]
    assert one[7, 42]["file"] == samples.sets[0].file(2)
    # by seed and position, and not with the crops
    assert drawn(one) == drawn(one)
    assert drawn(one) != drawn(data.Samples(one.sets, samples.tok, 28, 5, captions="one", seed=1))
    order, _ = one.groups[1]
    crops = [np.random.default_rng((0, position)).choice(3) for position in range(60)]
    assert drawn(one) != [pairs.captions[order[1 + crop]] for crop in crops]


def test_all_captions_of_an_image_can_be_packed(samples):
    pairs = captioned(samples, [1, 3, 2])
    packed = data.Samples([pairs], samples.tok, 28, 5, captions="packed")
    batch = packed.collate([packed[i, i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 28, 28)
    assert batch["target_ids"].shape[:2] == (3, 3)
    assert batch["prompt_ids"].shape == (3, 6)
    for i, rows in enumerate(batch["target_ids"]):
        own = [caption for caption, of in zip(pairs.captions, pairs.image) if of == i]
        said = [samples.tok.decode(row[row >= 0].tolist()[:-1]).strip() for row in rows if row[0] >= 0]
        assert sorted(said) == sorted(own)
    counts = [(row >= 0).any(1).tolist() for row in batch["target_ids"]]
    assert counts == [[True, False, False], [True] * 3, [True, True, False]]


def test_of_very_many_captions_some_are_drawn(samples):
    pairs = captioned(samples, [40, 2])
    packed = data.Samples([pairs], samples.tok, 28, 5, captions="packed", max_tokens=60)
    first, again, second = (texts(packed, packed[position, 0]) for position in (0, 0, 1))
    assert len(set(first)) == len(set(second)) == data.MOST_PACKED
    assert first == again != second


def test_captions_are_not_packed_for_t5(prefix_lm):
    with pytest.raises(ValueError, match="T5"):
        prefix_lm(captions="packed")
    prompt, target = one_target(prefix_lm(captions="one")[0, 0])
    assert prompt[:2] == [-1, -1]
    assert target[-1] == 1


# ----------------------------------------------------------------------------- a text of its own


class Questions:
    """The questions and answers of an item, in plain words: all answers but no question is
    scored."""

    def __init__(self, tok, num_query_tokens=2):
        self.tok = tok
        self.num_query_tokens = num_query_tokens

    def __call__(self, text, has_image, rng):
        item = json.loads(text)
        (question, answer), *others = item["turns"]
        places = self.num_query_tokens if has_image else 0
        prompt = data.prompt_ids(self.tok, places, f"Q: {question} A:")
        target = [*self.tok.encode(f" {answer}"), self.tok.eos_id]
        scored = [True] * len(target)
        for question, answer in others:
            asked = self.tok.encode(f" Q: {question} A:")
            said = [*self.tok.encode(f" {answer}"), self.tok.eos_id]
            target += asked + said
            scored += [False] * len(asked) + [True] * len(said)
        return data.Text(prompt, [target], scored if others else None)


TURNS = [[["what is it", "a red square"]],
         [["what is red", "the circle"], ["is it brown", "no"]],
         [["who", "I"]]]


def make_items(files, turns):
    """Items of conversations, of which item i has the image files[i], or none."""
    rows = [("here", file, {"id": i, "turns": turns[i]}, None) for i, file in enumerate(files)]
    return Items("talk", "", *collect(rows, item_text))


@pytest.fixture
def talk(samples):
    """Of two images and of none."""
    files = samples.sets[0].files()
    return make_items([files[0], None, files[1]], TURNS)


def asked(tok, items, **options):
    return data.Samples([items], tok, 28, 2, text=Questions(tok), **options)


@pytest.mark.parametrize("kind, first, without", [
    ("GPT-2", ([-1, -1, 2], []), ([2], [])),
    ("LLaMA, normalizer", ([-1, -1, 1], []), ([1], [])),
    ("Unigram", ([-1, -1], [1]), ([], [1]))])
def test_a_sample_can_bring_its_own_prompt_and_target(kinds, talk, kind, first, without):
    """Two soft prompts and BOS (of T5: </s> at the end), where there is an image; else BOS alone."""
    tok = kinds[kind][0]
    ids = tok.encode
    eos = {"GPT-2": 2, "LLaMA, normalizer": 2, "Unigram": 1}[kind]
    rows = [asked(tok, talk)[0, i] for i in range(3)]
    assert rows[0]["prompt"] == [*first[0], *ids("Q: what is it A:"), *first[1]]
    assert rows[0]["targets"] == [[*ids(" a red square"), eos]]
    assert rows[0]["scored"] is None
    assert rows[1]["prompt"] == [*without[0], *ids("Q: what is red A:"), *without[1]]
    answer, question, last = ids(" the circle"), ids(" Q: is it brown A:"), ids(" no")
    assert rows[1]["targets"] == [[*answer, eos, *question, *last, eos]]
    assert rows[1]["scored"] == ([True] * (len(answer) + 1) + [False] * len(question)
                                 + [True] * (len(last) + 1))
    assert rows[1]["image"] is None
    assert rows[1]["file"] == "talk: item 1"


def test_a_batch_says_what_is_scored_and_which_rows_have_an_image(kinds, talk):
    tok = kinds["GPT-2"][0]
    samples = asked(tok, talk)
    rows = [samples[0, i] for i in range(3)]
    batch = samples.collate(rows)
    assert batch["has_image"].tolist() == [True, False, True]
    assert batch["images"].shape == (3, 3, 28, 28)
    assert batch["images"][0].any() and not batch["images"][1].any()
    assert (batch["prompt_ids"] == data.IMAGE).sum(1).tolist() == [2, 0, 2]
    assert batch["scored"].dtype == torch.bool
    assert batch["scored"].shape == batch["target_ids"].shape
    assert not (batch["scored"] & (batch["target_ids"] == -100)).any()
    for i, row in enumerate(rows):
        (target,) = row["targets"]
        scored = row["scored"] or [True] * len(target)
        assert batch["scored"][i].tolist()[: len(target)] == scored
    counts = [len(rows[0]["targets"][0]), sum(rows[1]["scored"]), len(rows[2]["targets"][0])]
    assert data.count_targets(batch) == sum(counts)
    # where every token counts, nothing need be said
    plain = samples.collate([rows[0], rows[2]])
    assert "scored" not in plain
    assert data.count_targets(plain) == counts[0] + counts[2]


def test_no_row_of_a_batch_depends_on_its_neighbours(kinds, talk):
    samples = asked(kinds["GPT-2"][0], talk)
    rows = [samples[0, i] for i in range(3)]
    batch = samples.collate(rows)
    for i, row in enumerate(rows):
        alone = samples.collate([row])
        width = alone["prompt_ids"].shape[1]
        length = alone["target_ids"].shape[1]
        assert torch.equal(batch["prompt_ids"][i, -width:], alone["prompt_ids"][0])
        assert (batch["prompt_ids"][i, :-width] == -100).all()
        assert torch.equal(batch["target_ids"][i, :length], alone["target_ids"][0])
        assert (batch["target_ids"][i, length:] == -100).all()
        assert torch.equal(batch["images"][i], alone["images"][0])


@pytest.mark.parametrize("variant, kind", [
    ("opt", "GPT-2"), ("llama-1", "LLaMA, normalizer"), ("flan-t5", "Unigram")])
def test_the_mean_is_over_scored_tokens_whichever_batch_they_are_in(tmp_path, kinds, talk, variant, kind):
    """As a language model counts them, and as it sums their losses."""
    llm, _, _ = make_llm_pair(tmp_path, variant)
    samples = asked(kinds[kind][0], talk)
    rows = [samples[0, i] for i in range(3)]

    def losses(rows):
        batch = samples.collate(rows)
        prompt = batch["prompt_ids"]
        targets = batch["target_ids"]
        known = torch.where(targets < 0, targets, targets % llm.vocab_size)
        prefix = llm.embed(prompt.clamp(min=0) % llm.vocab_size)
        with torch.no_grad():
            loss, count = llm.loss(prefix, known, prompt != -100, scored=batch.get("scored"))
        assert count == data.count_targets(batch)
        return loss, count

    together = losses(rows)
    apart = [losses([row]) for row in rows]
    assert together[1] == sum(count for _, count in apart)
    torch.testing.assert_close(together[0], sum(loss for loss, _ in apart), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("captions", ["each", "packed"])
def test_of_captions_every_token_counts(samples, captions):
    pairs = captioned(samples, [1, 3, 2])
    some = data.Samples([pairs], samples.tok, 28, 5, captions=captions)
    batch = some.collate([some[0, i] for i in range(3)])
    chosen = pairs.captions if captions == "packed" else [pairs.captions[i] for i in range(3)]
    assert data.count_targets(batch) == sum(len(data.caption_ids(some.tok, text)) for text in chosen)
    assert batch["has_image"].all()
    assert "scored" not in batch


def test_answers_are_left_as_they_are(kinds, samples):
    """Caption clean-up is for captions."""
    items = make_items([samples.sets[0].file(0)], [[["Is it #1?", "Yes: (it) is.\n"]]])
    tok = kinds["GPT-2"][0]
    (target,) = asked(tok, items)[0, 0]["targets"]
    assert tok.decode(target) == " Yes: (it) is.\n"


def test_what_a_text_draws_is_drawn_by_seed_and_position(tok, talk):
    def draw(text, has_image, rng):
        return data.Text([2], [[int(rng.integers(1000))]])

    def drawn(seed):
        samples = data.Samples([talk], tok, 28, 2, text=draw, seed=seed)
        return [samples[position, 1]["targets"][0][0] for position in range(20)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 10


def test_samples_of_a_text_of_their_own_are_each_an_item(tok, talk):
    with pytest.raises(ValueError, match="packed: a text of its own is for each sample alone"):
        asked(tok, talk, captions="packed")


def test_images_of_items_are_as_those_of_captions(tok, samples):
    """Cropped by seed and position, or whole; an unreadable one gives way to the next item."""
    items = make_items([*samples.sets[0].files()[:2], None], TURNS)
    assert torch.equal(asked(tok, items)[7, 1]["image"], samples[7, 1]["image"])
    whole = asked(tok, dataclasses.replace(items, crop=False))[7, 1]["image"]
    assert torch.equal(whole, data.resize(data.load_image(items.file(1)), 28))
    bad = make_items(["missing.png", None], TURNS)
    sample = asked(tok, bad)[0, 0]
    assert sample["image"] is None
    assert sample["file"] == "talk: item 1"
    assert "missing.png" in sample["bad"][0]


def test_items_without_images_are_zeros_beside_cached_queries(tok, talk):
    cached = dataclasses.replace(talk, cache={file: torch.ones(2, 6) for file in talk.files()})
    samples = asked(tok, cached)
    batch = samples.collate([samples[0, i] for i in range(3)])
    assert batch["queries"].sum((1, 2)).tolist() == [12, 0, 12]
    assert batch["has_image"].tolist() == [True, False, True]


def test_items_of_like_length_come_together_and_prompts_count(tok, samples):
    """Each micro-batch is of items whose questions and answers are about as long."""
    file = samples.sets[0].file(0)
    lengths = [3, 50, 1, 40, 30, 2, 60, 4]
    turns = [[["red " * (n if i % 2 else 1), "red " * (1 if i % 2 else n)]] for i, n in enumerate(lengths)]
    items = make_items([file if i % 3 else None for i in range(8)], turns)
    several = asked(tok, items)
    assert several.lengths().tolist() == [len(text) for text in items.texts]
    (micros,) = data.load_batches(several, np.arange(8), 8, 2)
    widths = [micro["prompt_ids"].shape[1] + micro["target_ids"].shape[1] for micro in micros]
    assert widths == sorted(widths)
    assert widths[-1] > 50 and widths[0] < 20


def test_lengths_of_prompts_and_targets_are_measured_without_images(tok, talk, samples):
    several = asked(tok, talk)
    rows = [several[0, i] for i in range(3)]
    expected = [[len(row["prompt"]), len(row["targets"][0])] for row in rows]
    gone = dataclasses.replace(talk, root="/nowhere")
    assert asked(tok, gone).measure().tolist() == expected
    assert asked(tok, gone).measure([2, 0]).tolist() == [expected[2], expected[0]]
    assert asked(tok, gone).longest().tolist() == max(expected, key=sum)
    pairs = captioned(samples, [2, 1])
    packed = data.Samples([pairs], tok, 28, 5, captions="packed").measure()
    tokens = [len(data.caption_ids(tok, caption)) for caption in pairs.captions]
    assert packed.tolist() == [[6, sum(tokens[1:])], [6, tokens[0]]]


# -------------------------------------------------------------- pictures that must not be trained on


@pytest.mark.slow
def test_a_picture_is_known_in_another_size_quality_and_name(tmp_path, samples):
    for i in range(12):
        photograph(seed=i).save(tmp_path / f"{i}.jpg", quality=90)
    files = [tmp_path / f"{i}.jpg" for i in range(8)]
    known = data.Lookalikes([*files, tmp_path / "missing.jpg"])
    assert known.files == tuple(files)
    other = tmp_path / "other.jpg"
    for i in range(12):
        for size, quality in (((640, 480), 60), ((800, 600), 90), ((333, 250), 80)):
            photograph(seed=i).resize(size, Image.LANCZOS).save(other, quality=quality)
            with data.open_image(other) as image:
                # as in training: decoded coarsely
                data.random_crop(image, 100, np.random.default_rng(0))
                assert known.find(data.upright_rgb(image)) == (files[i] if i < 8 else None)
    photograph(seed=3).quantize(200).save(tmp_path / "palette.png")
    pairs = make_pairs([str(tmp_path / "palette.png")], ["a red square"])
    looking = data.Samples([pairs], samples.tok, 28, 5, known=known)
    assert looking.look(pairs, pairs.file(0), 0)[1] == files[3]
    turned = photograph(seed=0).copy()
    turned.paste(Image.new("RGB", (120, 90), "red"), (300, 200))  # another picture of the same place
    assert known.find(turned) is None
    assert data.Lookalikes([]).find(turned) is None


def test_plain_pictures_are_not_taken_for_each_other(tmp_path):
    """Drawings in thin lines on white, an almost black one, a flat grey one: each looks like any
    other of its kind."""
    files = []
    rng = np.random.default_rng(0)
    for i in range(12):
        image = Image.new("RGB", (200, 200), ("white", "black", "gray")[i % 3])
        for _ in range(3):
            line = rng.integers(0, 200, 4).tolist()
            ImageDraw.Draw(image).line(line, fill="gray" if i % 3 < 2 else "silver", width=1)
        image.save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    photograph().save(tmp_path / "photograph.png")
    known = data.Lookalikes([*files[:6], tmp_path / "photograph.png"])
    assert [known.find(data.load_image(file)) for file in files] == [None] * 12
    assert known.find(photograph()) == tmp_path / "photograph.png"


def test_samples_name_pictures_that_are_held_out(samples, tok):
    pairs = samples.sets[0]
    known = data.Lookalikes(pairs.files()[:2])
    looking = data.Samples([pairs], tok, 28, 5, known=known)
    (batch,) = next(data.load_batches(looking, np.arange(8), 8, 8))
    assert batch["twins"].items() >= {(file, file) for file in known.files}
    (batch,) = next(data.load_batches(samples, np.arange(8), 8, 8))
    assert not batch["twins"]


# ------------------------------------------------------------------------------- an answer as it comes


def one_by_one(ids, taken):
    """Ids as a language model gives them, and in `taken` those that were asked for."""
    for id in ids:
        taken.append(id)
        yield id


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_streams_without_half_characters(kinds, kind):
    """Each piece is whole, and stands as soon as its last token has come."""
    tok = kinds[kind][0]
    for text in ("a red square on a table", "naïve café 漢字 12 😀☃!", "x\n\ny  z", ""):
        ids = tok.encode(text)
        pieces = list(data.stream_text(tok, one_by_one(ids, [])))
        assert "".join(pieces) == tok.decode(ids)
        assert len(pieces) == len(ids) + 1
        for n in range(1, len(ids) + 1):
            whole = tok.decode(ids[:n])
            if not whole.endswith("\ufffd"):
                assert "".join(pieces[:n]) == whole
            assert "\ufffd" not in pieces[n]


def test_an_answer_that_ends_in_half_a_character_loses_it(kinds):
    tok = kinds["GPT-2"][0]
    ids = tok.encode("a 漢")
    assert tok.decode(ids[:-1]).endswith("\ufffd")
    assert "".join(data.stream_text(tok, one_by_one(ids[:-1], []))) == "a "


@pytest.mark.parametrize("kind", ["GPT-2", "LLaMA, normalizer"])
@pytest.mark.parametrize("text, shown", [
    ("red### a blue", "red"), ("red ## and# one ###", "red ## and# one "), ("###", ""),
    ("red ##", "red ##"), ("a#", "a#"), ("####", "")])
def test_a_stop_is_held_back_until_it_is_sure(kinds, kind, text, shown):
    """Nothing of it is shown, nothing behind it is asked of the model, and what is not one appears."""
    tok = kinds[kind][0]
    ids = tok.encode(text)
    taken = []
    shown_so_far = ""
    for piece in data.stream_text(tok, one_by_one(ids, taken), "###"):
        shown_so_far += piece
        assert shown.startswith(shown_so_far)
    assert shown_so_far == shown
    needed = next((n for n in range(len(ids)) if "###" in tok.decode(ids[:n])), len(ids))
    assert len(taken) == needed


def test_a_text_that_is_no_beginning_of_a_stop_is_not_held_back(kinds):
    tok = kinds["GPT-2"][0]
    ids = tok.encode("a # b")
    assert list(data.stream_text(tok, one_by_one(ids, []), "###"))[-1] == ""
    assert data.ends_early("a ##", "###") == 2
    assert data.ends_early("a #\ufffd", "###") == 2
    assert data.ends_early("a # ", "###") == 0
