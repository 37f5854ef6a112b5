"""A world small enough for tests: a random BLIP-2, a random OPT, tokenizers trained on a few sentences,
image-text pairs. And what several test modules need to run a command there and to read what it left."""

import contextlib
import io
import itertools
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

import data
import llm as language_models
import loop
import pairs
import qformer
import runs
import train
import vpgtrans

ROOT = Path(__file__).parent.parent

# as they were before on_the_cpu, for test_gpu.py. Asked of NVML: who has asked CUDA cannot fork any more
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
HAS_GPU = torch.cuda.is_available()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")

# ------------------------------------------------------------------------------------ models and pairs

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "white": (250, 250, 250),
}
WORDS = itertools.product(COLOURS, ("square", "circle"), ("brown", "grey"))
TEXT = [f"a {colour} {shape} on a {table} table" for colour, shape, table in WORDS]

VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              image_size=28, patch_size=7)
QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
               encoder_hidden_size=48, vocab_size=50)


def randomise(module, seed=0, scale=0.25):
    """Every tensor random, so that no comparison is vacuous: transformers starts biases and query tokens at
    zero, norms at one."""
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
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def opt_config(vocab_size, width):
    return transformers.OPTConfig(
        vocab_size=vocab_size, hidden_size=width, word_embed_proj_dim=width, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=2)


def make_blip2(text_config, dropout=0.0, seed=0, **options):
    """A random BLIP-2 of transformers around a language model."""
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION),
        qformer_config=transformers.Blip2QFormerConfig(**QFORMER, **rates),
        text_config=text_config, num_query_tokens=5, **options)
    model = transformers.Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    return randomise(model, seed)


def write_source(folder, dropout=0.0, seed=0):
    """A random BLIP-2 whose LLM is 40 wide, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, TEXT, 290)
    model = make_blip2(opt_config(size, width=40), dropout, seed)
    model.save_pretrained(folder)
    return model


def write_clip(folder):
    """A random CLIP, its text branch included."""
    text = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    config = transformers.CLIPConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.CLIPTextConfig(**text))
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager")
    randomise(model)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def small_q_former(monkeypatch):
    """A Q-Former that begins at random, on a ViT alone, has 93M parameters otherwise: BERT's."""
    small = {key: size for key, size in QFORMER.items() if key in qformer.VPG.QFORMER}
    monkeypatch.setattr(qformer.VPG, "QFORMER", qformer.VPG.QFORMER | small)


def write_target(folder, seed=1):
    """A random OPT, 32 wide, whose tokenizer shares most but not all tokens with the source's."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, [*TEXT, "some quite different words were read here"], 320)
    model = transformers.OPTForCausalLM._from_config(opt_config(size, width=32), attn_implementation="eager")
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def copy_checkpoint(folder, copy, **changes):
    """A copy of a checkpoint with tensors of its file replaced, or removed where the change is None."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors")
    return copy


def write_pairs(folder, count=24, unequal=True):
    """Plain coloured images and captions of unequal lengths, as pairs.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as lines:
        for i in range(count):
            colour = list(COLOURS)[i % len(COLOURS)]
            pixels = np.full((36, 40, 3), COLOURS[colour]) + rng.integers(-30, 30, (36, 40, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
            caption = f"a {colour} circle on a brown table"
            if unequal and i % 3:
                caption = f"A {colour} square."
            lines.write(json.dumps({"image": f"{i}.png", "caption": caption}) + "\n")
    return folder / "pairs.jsonl"


@contextlib.contextmanager
def edited(file):
    """The content of a JSON file, written back as it is changed within this."""
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(source folder, target folder, pairs.jsonl)"""
    folder = tmp_path_factory.mktemp("world")
    write_source(folder / "source")
    write_target(folder / "target")
    return folder / "source", folder / "target", write_pairs(folder / "pairs")


def picture(world, number=0):
    """The file of an image of the world's pairs."""
    return world[2].parent / f"{number}.png"


def demo_world(folder, count):
    """The demo's models, whose loss depends on the image, and the first of its pairs, as `world` is."""
    demo = ROOT / "demo"
    with tarfile.open(demo / "pairs" / "train.tar") as pairs, tarfile.open(folder / "demo.tar", "w") as some:
        for member in itertools.islice(pairs, 2 * count):  # an image and its text
            some.addfile(member, pairs.extractfile(member))
    return demo / "source", demo / "target", f"demo={folder / 'demo.tar'}"


# ------------------------------------------------------------------------------------- runs of train.py


def arguments(world, out, *more):
    """Of a short run of train.py on the CPU: 3 steps of warm-up, 6 of fine-tuning, all of them logged."""
    source, target, pairs = world
    models = ["--src", str(source), "--tgt", str(target), "--data", str(pairs), "--out", str(out)]
    length = ["--batch-size", "8", "--warm-up-steps", "3", "--lr", "1e-3"]
    if "warm-up" not in more:  # as the only stage
        length += ["--steps", "6"]
    log = ["--log-every", "1", "--val-every", "3"]
    machine = ["--workers", "0", "--precision", "fp32", "--gate", "0"]
    return [*models, *length, *log, *machine, *map(str, more)]


def read_lines(file):
    """The objects of a file with one a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(out, *keys):
    """What a run logged under all of these keys, a tuple for each such line."""
    lines = read_lines(out / "metrics.jsonl")
    return [tuple(line[key] for key in keys) for line in lines if set(keys) <= line.keys()]


def values(out, key):
    """What a run logged under one key."""
    return [value for value, in rows(out, key)]


def bad_data(out, problem):
    """Where a run met a problem of the data."""
    return [line["where"] for line in read_lines(out / "bad_data.jsonl") if line["problem"] == problem]


def assert_same_losses(one, other, key="loss", tolerance=1e-5):
    """Two runs logged the same at the same steps, up to rounding."""
    for (*at, loss), (*other_at, other_loss) in zip(
            rows(one, "stage", "step", key), rows(other, "stage", "step", key), strict=True):
        assert at == other_at
        assert abs(loss - other_loss) < tolerance, (key, at)


def stop_at(stage, step, argv):
    """train.py, asked to stop after a line of the log, as a signal asks."""

    def watch(at):
        if (at["stage"], at["step"]) == (stage, step):
            loop.stop_asked.set()

    with pytest.raises(SystemExit) as stop:
        train.main(argv, watch)
    assert stop.value.code == 130


def snapshot(folder):
    """{file: time of its last change}, or None where there is no such folder."""
    if folder.is_dir():
        return {file: file.stat().st_mtime_ns for file in folder.glob("*")}


@pytest.fixture
def fails(capsys):
    """fails(main, argv, *says): the command ends with exit code 2 and says all that."""

    def fails(main, argv, *says):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        for text in says:
            assert text in said

    return fails


@pytest.fixture
def refused(fails):
    """refused(main, argv, *says): it fails, and nothing was written to --out."""

    def refused(main, argv, *says):
        out = Path(argv[argv.index("--out") + 1])
        before = snapshot(out)
        fails(main, argv, *says)
        assert snapshot(out) == before

    return refused


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """One run of VPGTrans from end to end, in bf16, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    argv = arguments(world, out, "--precision", "bf16", "--micro-batch", "3")
    with curves(drawn=True):
        return out, train_in(1, argv)


# ------------------------------------------------------------------------------------------- processes


def python_command(*words):
    return [sys.executable, *map(str, words)]


def one_thread(**variables):
    """The environment of a process that shares the machine with others."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | variables


def python(*words, **variables):
    """Python with these arguments in a process of its own. -> subprocess.CompletedProcess"""
    env = one_thread(**variables)
    return subprocess.run(python_command(*words), capture_output=True, text=True, env=env, timeout=600)


def torchrun(count=2):
    """What stands before the script, so that so many processes run it."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def train_in(count, argv, main=train.main):
    """A command in so many processes, to its end: forks of this one, which has torch, told what torchrun
    tells them. -> what the first printed"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(count)]
        ranks = [fork.Process(target=run_rank, args=(main, argv, rank, count, port, said[rank]))
                 for rank in range(count)]
        for process in ranks:
            process.start()
        running = ranks
        while running and not any(process.exitcode for process in ranks):  # one that fails ends them all
            multiprocessing.connection.wait([process.sentinel for process in running])
            running = [process for process in ranks if process.exitcode is None]
        for process in running:
            process.kill()
            process.join()
        printed = [file.read_text() for file in said]
    assert [process.exitcode for process in ranks] == [0] * count, printed
    return printed[0]


def run_rank(main, argv, rank, world, port, said):
    """One of the processes of train_in: what it prints goes to the file `said`."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    with open(said, "w") as sys.stdout:
        sys.stderr = sys.stdout
        main(list(map(str, argv)))


def in_a_process(function, *arguments):
    """Runs a function in a process of its own. -> its exit code, or less than 0: the signal that killed it"""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


# ---------------------------------------------------------------- a model of any family, on any device

FAMILIES = {
    "opt": dict(model_type="opt", hidden_size=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4,
                word_embed_proj_dim=128, vocab_size=1000),
    "llama": dict(model_type="llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                  num_attention_heads=4, num_key_value_heads=2, vocab_size=1000),
    "t5": dict(model_type="t5", d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, vocab_size=1000,
               feed_forward_proj="gated-gelu"),
}


def make_visual_llm(device, family="opt"):
    """A VisualLLM of ours with 32 query tokens, for images of 56 pixels; "meta" is a device, too."""
    vit = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
               image_size=56, patch_size=7)
    q_former = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                    encoder_hidden_size=96)
    with torch.device(device):
        vpg = qformer.VPG({"vision_config": vit, "qformer_config": q_former})
        llm = language_models.ARCHITECTURES[family](FAMILIES[family])
        return vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm).to(device)


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
    "mistral": LLAMA_CONFIG | dict(model_type="mistral", num_key_value_heads=2, head_dim=12,
                                   sliding_window=64),
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
        config = transformers.AutoConfig.for_model(**options)
        theirs = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
        theirs.save_pretrained(folder)
        return theirs
    config = transformers.T5Config(**options)
    theirs = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    if not options["tie_word_embeddings"]:  # transformers ties the head of any new T5
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    randomise(theirs)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(options))
    return theirs


def make_llm_pair(folder, variant):
    """(our LLM, transformers', folder): the same weights, ours loaded from the folder."""
    theirs = make_model(folder, LLMS[variant])
    return language_models.load_llm(folder, dtype=torch.float32), theirs, folder


@pytest.fixture(params=LLMS, scope="module")
def llm_pair(request, tmp_path_factory):
    return make_llm_pair(tmp_path_factory.mktemp("llm"), request.param)


@pytest.fixture(params=["CPU", "GPU"])
def device_kind(request, monkeypatch):
    """On GPUs every step looks at all columns of the cache; on CPUs at those in use."""
    if request.param == "GPU":
        monkeypatch.setattr(language_models.Cache, "width", lambda cache: cache.keys.shape[-2])


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


# --------------------------------------------------------------------------------------------- data


def write(path, text):
    """A file of text or bytes, and the folders that it stands in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(text)
    return path


def write_json(folder, **files):
    """{name: content} as NAME.json in a folder."""
    for name, content in files.items():
        write(folder / f"{name}.json", json.dumps(content))
    return folder


def generated_text(sentences=400):
    """Sentences of made-up words and of the captions' words, and a few in other scripts."""
    rng = random.Random(0)
    syllables = "ka mi ro the in st er lo wa ne".split()
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(200)]
    words += sorted(set(" ".join(TEXT).split())) * 8
    made_up = [" ".join(rng.choices(words, k=8)) for _ in range(sentences)]
    return [*TEXT, *made_up, "don't they?", "naïve café 漢字 12 345", "It is 7:30.  A, B or C"]


CORPUS = generated_text()
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(pattern=None):
    """The content of a tokenizer.json of GPT-2's kind, or of Qwen's with its pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(tokenizer.to_str())


def sentencepiece_bpe(form, corpus=CORPUS):
    """As LLaMA's: <unk> <s> </s>, the bytes, then pieces; spaces as ▁ by a normalizer (old files)
    or a pre-tokenizer (new ones)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # words, or BPE would learn whole sentences
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"] + BYTES))
    if form == "normalizer":
        tokenizer.pre_tokenizer = None
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str())
    return content | {"added_tokens": content["added_tokens"][:3]}


def unigram(byte_fallback=False):
    """As T5's: <pad> </s> <unk>, then pieces."""
    tokenizer = Tokenizer(models.Unigram())
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Metaspace()
    if byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    # as saved after a training
    tokenizer.enable_truncation(50)
    tokenizer.enable_padding(length=50)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"].append(["▁red", -3.0])
    if byte_fallback:
        content["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
    content["model"]["byte_fallback"] = byte_fallback
    return content


LLAMA_TOKENS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
T5_TOKENS = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
GPT2_TOKENS = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
QWEN_TOKENS = dict(bos_token=None, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
# content of tokenizer.json, model type, the class in transformers that reads it, the tokens in
# tokenizer_config.json
KINDS = {
    "GPT-2": (byte_level, "opt", "GPT2Tokenizer", GPT2_TOKENS),
    "Qwen": (lambda: byte_level(QWEN), "qwen2", "Qwen2Tokenizer", QWEN_TOKENS),
    "LLaMA, normalizer": (lambda: sentencepiece_bpe("normalizer"), "llama", "TokenizersBackend",
                          LLAMA_TOKENS),
    "LLaMA, pre-tokenizer": (lambda: sentencepiece_bpe("pre-tokenizer"), "llama", "LlamaTokenizer",
                             LLAMA_TOKENS),
    "Unigram": (unigram, "t5", "T5Tokenizer", T5_TOKENS),
    "Unigram, bytes": (lambda: unigram(True), "t5", "TokenizersBackend", T5_TOKENS),
}


def write_kind(folder, kind):
    """A folder with a tokenizer of one of KINDS."""
    content, model_type, class_name, tokens = KINDS[kind]
    return write_json(folder, tokenizer=content(), config={"model_type": model_type},
                      tokenizer_config={"tokenizer_class": class_name, **tokens})


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """{kind: (our tokenizer, its folder)}"""
    folders = {kind: write_kind(tmp_path_factory.mktemp("kind"), kind) for kind in KINDS}
    return {kind: (data.load_tokenizer(folder), folder) for kind, folder in folders.items()}


def encoded(seed, kind="JPEG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def decoded(content):
    """The pixels of an image file's bytes."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def write_shard(path, samples):
    """{member name: bytes} as a plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def save_image(path, mode="RGB", colour="red", size=(40, 30), **options):
    """A plain picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def make_pairs(files, captions):
    """Pairs of files and captions, in memory."""
    rows = ((file, file, caption, None) for file, caption in zip(files, captions))
    return pairs.Pairs("x", "", *pairs.collect(rows, pairs.caption_text))


# ------------------------------------------------------------------------------------- for every test


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """Also where the tests were started in the background, in which shells have it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """Without GPUs: on the CPU results are the same to the bit, and two processes have room. test_gpu.py
    takes them back."""
    torch.cuda.is_available = lambda: False
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def scans(tmp_path_factory):
    """Scans of data sets are kept in a folder of the tests' own."""
    os.environ["VPGTRANS_CACHE"] = str(tmp_path_factory.mktemp("scans"))


DRAW = runs.Log.draw


@contextlib.contextmanager
def curves(drawn):
    """Runs within this draw their curves or do not: it takes more than half of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Log, "draw", DRAW if drawn else lambda log: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def nobody_looks_at_curves():
    with curves(drawn=False):
        yield


def refuse(*_, **__):
    raise AssertionError("this test trains or starts a process: mark it @pytest.mark.slow")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """`make check` runs what is not marked slow: such a test takes no optimizer step, starts no process."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        monkeypatch.setattr(torch.optim.AdamW, "step", refuse)


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
    files = {"problems": problems, "pid_splits": splits, "captions": {"captions": captions}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def memvp_world(tmp_path_factory):
    """(folders of a CLIP, a language model, questions)"""
    folder = tmp_path_factory.mktemp("memvp")
    write_clip(folder / "clip")
    return folder / "clip", write_language_model(folder / "llm"), write_scienceqa(folder / "scienceqa")


# ------------------------------------------------------------------------------------- conversations

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
          "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
          "{% endif %}")
TALKERS = {  # a random LLM inside a BLIP-2, its chat template, the option that it needs
    "llama": (dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=2,
                   pad_token_id=1), CHATML, None),
    "opt": (dict(model_type="opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=900, bos_token_id=0, eos_token_id=2,
                 pad_token_id=1), None, "vicuna-v0"),
    "t5": (dict(model_type="t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=2, pad_token_id=1),
           None, "vicuna-v1.1"),
}


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory):
    """{name: (folder, --template)} of random models that converse."""
    made = {}
    for name, (options, template, option) in TALKERS.items():
        folder = tmp_path_factory.mktemp("talker")
        write_tokenizer(folder, CORPUS, 500)
        encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
        encoder.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        encoder.save(str(folder / "tokenizer.json"))
        text_config = transformers.AutoConfig.for_model(**options, vocab_size=encoder.get_vocab_size())
        make_blip2(text_config, seed=2).save_pretrained(folder)  # a seed whose texts vary
        settings = {"bos_token": "<s>", "eos_token": "</s>"}
        if template:
            settings["chat_template"] = template
        write_json(folder, tokenizer_config=settings)
        made[name] = str(folder), option
    return made
