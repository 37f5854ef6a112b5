"""A world small enough for tests: a random BLIP-2, a random OPT, tokenizers trained on a few sentences, image-text pairs."""

import json
import multiprocessing
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig, OPTForCausalLM
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from llm import load_llm

HAS_GPU, VISIBLE = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES")  # as they were, for test_gpu.py
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
TEXT = [f"a {colour} {shape} on a {ground} table" for colour in COLOURS for shape in ("square", "circle") for ground in ("brown", "grey")]

VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7)
QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, encoder_hidden_size=48, vocab_size=50)
OPT = dict(ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=2)


def randomise(module, seed=0, scale=0.25):
    """Every tensor random, so that no comparison is vacuous: transformers starts biases and query tokens at zero, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def write_tokenizer(folder, text, vocab_size):
    """OPT's kind of tokenizer: byte-level BPE, <s> <pad> </s> <unk> as 0 to 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def make_blip2(text_config, dropout=0.0, seed=0, **options):
    """A random BLIP-2 of transformers around a language model."""
    config = Blip2Config(vision_config=Blip2VisionConfig(**VISION), num_query_tokens=5, qformer_config=Blip2QFormerConfig(
        **QFORMER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout), text_config=text_config, **options)
    return randomise(Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager"), seed)


def write_source(folder, dropout=0.0, seed=0):
    """A random BLIP-2 whose LLM is 40 wide, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, TEXT, 290)
    model = make_blip2(OPTConfig(**OPT, vocab_size=size, hidden_size=40, word_embed_proj_dim=40), dropout, seed)
    model.save_pretrained(folder)
    return model


def write_clip(folder):
    """A random CLIP, its text branch included."""
    text = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    config = CLIPConfig(vision_config=CLIPVisionConfig(**VISION), text_config=CLIPTextConfig(**text))
    model = randomise(CLIPModel._from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    return model


def write_target(folder, seed=1):
    """A random OPT, 32 wide, whose tokenizer shares most but not all tokens with the source's."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, [*TEXT, "some quite different words were read here"], 320)
    config = OPTConfig(**OPT, vocab_size=size, hidden_size=32, word_embed_proj_dim=32)
    model = randomise(OPTForCausalLM._from_config(config, attn_implementation="eager"), seed)
    model.save_pretrained(folder)
    return model


def write_pairs(folder, count=24, unequal=True):
    """Plain coloured images and captions of unequal lengths, as pairs.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as lines:
        for i in range(count):
            colour = list(COLOURS)[i % len(COLOURS)]
            pixels = np.clip(np.full((36, 40, 3), COLOURS[colour]) + rng.integers(-30, 30, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            caption = f"A {colour} square." if unequal and i % 3 else f"a {colour} circle on a brown table"
            lines.write(json.dumps({"image": f"{i}.png", "caption": caption}) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(source folder, target folder, pairs.jsonl)"""
    folder = tmp_path_factory.mktemp("world")
    write_source(folder / "source"), write_target(folder / "target")
    return folder / "source", folder / "target", write_pairs(folder / "pairs")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """Without GPUs: on the CPU results are the same to the bit, and two processes have room. test_gpu.py takes them back."""
    torch.cuda.is_available = lambda: False
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def scans(tmp_path_factory):
    """Scans of data sets are kept in a folder of the tests' own."""
    os.environ["VPGTRANS_CACHE"] = str(tmp_path_factory.mktemp("scans"))


def refuse(*_, **__):
    raise AssertionError("this test trains or starts a process: mark it @pytest.mark.slow")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """`make check` runs what is not marked slow: such a test takes no optimizer step and starts no process."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        monkeypatch.setattr(torch.optim.AdamW, "step", refuse)


# ---------------------------------------------------------------------------------- language models

OPT_CONFIG = dict(model_type="opt", vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=3,
                  num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, bos_token_id=2,
                  eos_token_id=2, word_embed_proj_dim=32)
LLAMA_CONFIG = dict(model_type="llama", vocab_size=120, hidden_size=32, intermediate_size=48,
                    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
T5_CONFIG = dict(model_type="t5", vocab_size=120, d_model=32, d_kv=6, d_ff=48, num_layers=3,
                 num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                 relative_attention_num_buckets=8, relative_attention_max_distance=10,
                 tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=32)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=500.0, factor=4.0)

# each row is what the models of that name do differently
LLMS = {
    "opt": OPT_CONFIG,
    "opt-350m": OPT_CONFIG | dict(do_layer_norm_before=False, word_embed_proj_dim=16),
    "llama-1": LLAMA_CONFIG,
    "llama-3.1": LLAMA_CONFIG | dict(num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "llama, linear rope": LLAMA_CONFIG | dict(rope_parameters=LINEAR_ROPE),
    "llama, biases": LLAMA_CONFIG | dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2),
    "smollm2": LLAMA_CONFIG | dict(num_key_value_heads=1, tie_word_embeddings=True),
    "mistral": LLAMA_CONFIG | dict(model_type="mistral", num_key_value_heads=2, head_dim=12, sliding_window=64),
    "qwen2": LLAMA_CONFIG | dict(model_type="qwen2", num_key_value_heads=2,
                                 rope_parameters=dict(rope_type="default", rope_theta=300.0)),
    "qwen3": LLAMA_CONFIG | dict(model_type="qwen3", num_key_value_heads=2, head_dim=12),
    "flan-t5": T5_CONFIG,
    "blip-2 t5": T5_CONFIG | dict(dense_act_fn="gelu"),
    "t5 v1.0": T5_CONFIG | dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "t5, tied": T5_CONFIG | dict(tie_word_embeddings=True, decoder_start_token_id=3, layer_norm_epsilon=1e-2),
}


def make_model(folder, options):
    """A random model of transformers', written to a folder as files on the Hub are."""
    folder.mkdir(parents=True, exist_ok=True)
    if options["model_type"] != "t5":
        config = AutoConfig.for_model(**options)
        theirs = randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
        theirs.save_pretrained(folder)
        return theirs
    theirs = T5ForConditionalGeneration._from_config(T5Config(**options), attn_implementation="eager")
    if not options["tie_word_embeddings"]:  # transformers ties the head of any new T5
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    randomise(theirs)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(options))
    return theirs


def make_llm_pair(folder, variant):
    """(our LLM, transformers', folder): the same weights, ours loaded from the folder."""
    theirs = make_model(folder, LLMS[variant])
    return load_llm(folder, dtype=torch.float32), theirs, folder


@pytest.fixture(params=LLMS, scope="module")
def llm_pair(request, tmp_path_factory):
    return make_llm_pair(tmp_path_factory.mktemp("llm"), request.param)


def random_prefix(B, P, D=32, seed=1):
    return torch.randn(B, P, D, generator=torch.Generator().manual_seed(seed))


def random_ids(B, T, seed=2):
    return torch.randint(3, 120, (B, T), generator=torch.Generator().manual_seed(seed))


def their_logits(theirs, prefix, target_ids):
    """transformers' logits for the targets of rows without holes."""
    if theirs.config.is_encoder_decoder:
        return theirs(inputs_embeds=prefix, labels=target_ids).logits
    words = theirs.get_input_embeddings()(target_ids[:, :-1].clamp(min=0))
    decoder = getattr(theirs.model, "decoder", None)
    project_in = getattr(decoder, "project_in", None)
    if project_in is not None:  # transformers takes embeddings before project_in; soft prompts enter after it
        words = project_in(words)
        decoder.project_in = None
    try:
        logits = theirs(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
    finally:
        if project_in is not None:
            decoder.project_in = project_in
    return logits[:, prefix.shape[1] - 1 :]


def edit_config(folder, drop=(), **new):
    """Changes fields of a folder's config.json, and takes some out."""
    config = json.loads((folder / "config.json").read_text()) | new
    kept = {key: value for key, value in config.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_tensors(folder, edit):
    """Changes the tensors of a folder by a function of {name: tensor}."""
    tensors = edit(load_file(folder / "model.safetensors"))
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors")


# -------------------------------------------------------------------------------------------- MemVP


def write_language_model(folder):
    """A random LLaMA, 32 wide, with a byte-level tokenizer of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, [*TEXT, "Question: Context: Options: Response: The answer is"], 330)
    make_model(folder, LLAMA_CONFIG | dict(vocab_size=size, bos_token_id=0, eos_token_id=2, pad_token_id=1))
    return folder


def write_scienceqa(folder, counts=None):
    """Questions about plain coloured images in ScienceQA's layout (github.com/lupantech/ScienceQA): every
    third has no image."""
    counts = counts or {"train": 12, "val": 7, "test": 5}
    problems = {}
    splits = {}
    captions = {}
    names = list(COLOURS)
    for split, count in counts.items():
        splits[split] = [str(len(problems) + i + 1) for i in range(count)]
        for i, id in enumerate(splits[split]):
            colour = names[i % len(names)]
            has_image = i % 3 != 2
            problems[id] = dict(
                question=f"Which colour is {id}?", choices=names[: 3 + i % 2], answer=i % 3,
                hint="" if i % 2 else "Look.", image="image.png" if has_image else None,
                task="closed choice", grade="grade2", subject="natural science", topic="physics",
                category="Colours", skill="Name", lecture="", solution="", split=split)
            if has_image:
                captions[id] = f"a {colour} square"
                place = folder / "images" / split / id
                place.mkdir(parents=True)
                Image.new("RGB", (30, 40), COLOURS[colour]).save(place / "image.png")
    for name, content in (("problems", problems), ("pid_splits", splits), ("captions", {"captions": captions})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def memvp_world(tmp_path_factory):
    """(folders of a CLIP, a language model, questions)"""
    folder = tmp_path_factory.mktemp("memvp")
    write_clip(folder / "clip")
    return folder / "clip", write_language_model(folder / "llm"), write_scienceqa(folder / "scienceqa")
