"""Write what VPGTrans trained as an ordinary BLIP-2 checkpoint, which transformers loads without
knowing of this project.

    python export.py out/opt-2.7b-to-opt-6.7b blip2-opt-6.7b

    python export.py --from-lavis blip2_pretrained_opt6.7b.pth blip2-opt-6.7b --llm opt-6.7b --vit opt-2.7b

    python export.py --from-memvp checkpoint-19.pth out/memvp-7b --llm llama-7b \\
        --vit openai/clip-vit-large-patch14

The second form reads what LAVIS or the original VPGTrans saved: their names for query tokens,
Q-Former, LayerNorm and projector, and the ViT where the file has it. Such files rarely do, since it
is frozen, and all BLIP-2 checkpoints have the same one: --vit names one of them. For Vicuna, whose
tokenizer is in a format that is not read here, add --llm-tokenizer llama-7b. A file holds nothing of
its LLM, which has to be the very one: VPGTrans's vl_vicuna.pth wants Vicuna v0, made from its delta,
as a folder (vicuna-7b is v1.5).

The third makes what MemVP's authors published a run of finetune.py, for evaluate.py and sample.py.

Of the first two DIR then holds the whole model, config, tokenizer and image processor:

    model = transformers.Blip2ForConditionalGeneration.from_pretrained(DIR)
    processor = transformers.Blip2Processor.from_pretrained(DIR)

That format has no place for two things, which are refused: an LLM that embeds words in another
width than its own (opt-350m), and a ViT other than EVA (CLIP).
"""

import argparse
import dataclasses
import json
import math
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, processors
from tqdm import tqdm

import data
import hub
import llm as language_models
import qformer
import runs
import transfer
import vpgtrans

SHARD_BYTES = 5e9
IMAGE_TOKEN = "<image>"  # stands for a soft prompt in transformers' prompts
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

{origin}

{use}
"""
CAPTION = """```python
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

processor = Blip2Processor.from_pretrained("{name}")
model = Blip2ForConditionalGeneration.from_pretrained("{name}", dtype="{dtype}")
inputs = processor(images=Image.open("cat.jpg"), text="", return_tensors="pt")
ids = model.generate(**inputs.to(model.device, model.dtype), num_beams=5, max_new_tokens=30)
print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
```

`text=""` asks for a caption; `text="Question: what colour is the cat? Answer:"` is BLIP-2's way to
ask. What a decoder-only language model generates begins with its prompt. Images are expected upright
and opaque: EXIF orientation and transparency are not looked at."""
CHAT = """It was taught to converse about an image, which stands in front of the first question:

```python
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

processor = Blip2Processor.from_pretrained("{name}")
model = Blip2ForConditionalGeneration.from_pretrained("{name}", dtype="{dtype}")
tokenizer = processor.tokenizer
image = processor.image_processor(Image.open("cat.jpg"), return_tensors="pt")["pixel_values"]
question = {before!r} + "<image>" * {Q} + {behind!r} + "What is in the picture?"
messages = [{{"role": "user", "content": question}}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
image = image.to(model.device, model.dtype)
ids = model.generate(**inputs, pixel_values=image, max_new_tokens=300{stop})
answer = ids[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
```

`Blip2Processor` alone would put the image in front of everything. Images are expected upright and opaque:
EXIF orientation and transparency are not looked at."""


MOVED = ("A BLIP-2 model whose visual prompt generator was moved to {llm} by VPGTrans\n"
         "([Zhang et al. 2023](https://arxiv.org/abs/2305.01278)).")
AROUND = "A BLIP-2 model around {llm}."
CONVERTED = "A BLIP-2 model around {llm}, converted from {file} as LAVIS or the original VPGTrans saved it."


def check_expressible(llm_folder, vision_config, remedy="Use sample.py with this run"):
    """ValueError for a model that a BLIP-2 checkpoint cannot hold; from the configs, before
    anything large is read. `remedy` says what else could be done."""
    llm_config = language_models.read_llm_config(llm_folder)[0]
    width = llm_config.get("hidden_size")
    if llm_config.get("word_embed_proj_dim", width) != width:
        raise ValueError(f"this LLM embeds words in {llm_config['word_embed_proj_dim']} numbers "
                         f"and works with {width} (opt-350m); soft prompts enter behind that step, "
                         f"for which BLIP-2's format has no place. {remedy}")
    if qformer.vit_options(vision_config)[0] is not qformer.EVA:
        raise ValueError(f"this ViT is CLIP's, for which BLIP-2's format has no place. {remedy}")


def add_image_token(tok):
    """Changes `tok` for transformers' processor: with the image token, whose id is returned, with
    the specials around a prompt that our prompts have (BOS in front, behind T5's </s>), and with a
    token to pad with."""
    tok.encoder.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    before, after = [], []
    if tok.encoder_decoder:
        after = [tok.eos_id]
    elif tok.bos_id is not None:
        before = [tok.bos_id]
    piece = tok.encoder.id_to_token
    tok.encoder.post_processor = processors.TemplateProcessing(
        single=[*map(piece, before), "$A", *map(piece, after)],
        special_tokens=[(piece(id), id) for id in before + after])
    if tok.pad_id is None:
        tok.pad_id = tok.eos_id
    return tok.encoder.token_to_id(IMAGE_TOKEN)


def make_room(llm, tensors, id):
    """Lengthens the word embeddings and the head in {name: tensor} where the vocabulary ends before
    `id`.

    The new rows are the mean of the old ones: a mean is never the greatest score, so what is
    generated stays as it was."""
    for name in {llm.WORDS, "lm_head.weight"} & tensors.keys():
        rows = tensors[name]
        missing = id + 1 - len(rows)
        if missing > 0:
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            tensors[name] = torch.cat([rows, mean.expand(missing, -1)])
    return len(tensors[llm.WORDS])


def blip2_config(llm_folder, model, tok, image_id, vocab_size, dtype):
    """config.json, as transformers writes it for BLIP-2."""
    text = dict(language_models.read_llm_config(llm_folder)[0])
    text.pop("dtype", None)
    text.pop("torch_dtype", None)
    text["vocab_size"] = vocab_size
    text["eos_token_id"] = list(dict.fromkeys([tok.end_id, tok.eos_id]))
    text["pad_token_id"] = tok.pad_id
    # left without a text, transformers makes a prompt of image tokens and BOS; None makes it fail
    # where we have no BOS (Qwen)
    text["bos_token_id"] = tok.eos_id if tok.encoder_decoder else tok.bos_id
    if tok.encoder_decoder:
        text["decoder_start_token_id"] = model.llm.start_id
    vpg = model.vpg
    vit = {"model_type": "blip_2_vision_model", "image_size": vpg.image_size}
    tied = text.get("tie_word_embeddings", model.llm.DEFAULTS["tie_word_embeddings"])
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "torch_dtype": dtype,
        "vision_config": vpg.config["vision_config"] | vit,
        "qformer_config": vpg.config["qformer_config"] | {"model_type": "blip_2_qformer"},
        "text_config": text,
        "num_query_tokens": vpg.num_query_tokens,
        "image_token_index": image_id,
        "tie_word_embeddings": tied,
    }


def processor_files(vpg, tok):
    """{file name: object} of transformers' Blip2Processor, but for tokenizer.json."""
    specials = {"bos_token": tok.bos_id, "eos_token": tok.eos_id, "pad_token": tok.pad_id}
    named = {key: tok.encoder.id_to_token(id) for key, id in specials.items() if id is not None}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "padding_side": "right" if tok.encoder_decoder else "left",
        "clean_up_tokenization_spaces": False,
    }
    images = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vpg.image_size, "width": vpg.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(qformer.MEAN),
        "image_std": list(qformer.STD),
    }
    processor = {"processor_class": "Blip2Processor"}
    return {
        "tokenizer_config.json": processor | tokenizer,
        "preprocessor_config.json": processor | images,
        "processor_config.json": processor | {"num_query_tokens": vpg.num_query_tokens},
    }


def chat_files(tok, template):
    """{file name: text} of a chat template as transformers' tokenizers read it, which know no variables
    but their own tokens, and put no BOS in front."""
    known = [f"{{%- set {name} = {json.dumps(text)} %}}" for name, text in template.tokens.items()]
    begins = ["{{- bos_token }}"] if template.bos and tok.bos_id is not None else []
    return {"chat_template.jinja": "".join([*known, *begins, template.source])}


def describe_chat(model, template):
    """What the card has to say about a model that converses."""
    before, behind = template.image
    stop = f", stop_strings=[{template.stop!r}], tokenizer=tokenizer" if template.stop else ""
    return {"before": before, "behind": behind, "Q": model.num_query_tokens, "stop": stop}


def chat_ends(tok, template):
    """The ids that end an answer. A caption's end, a newline, does not."""
    stops = [] if template.stop else data.stop_ids(tok, template)
    return list(dict.fromkeys([*(id for id, in stops), tok.eos_id]))


def blip2_tensors(model, image_id):
    """({name in BLIP-2: tensor} of the whole model, a tied head left out; the size of the
    vocabulary, the image token included)"""
    vpg, llm = model.vpg, model.llm
    llm_tensors = dict(llm.state_dict())
    if llm.lm_head.weight is llm.get_parameter(llm.WORDS):
        llm_tensors.pop("lm_head.weight")
    vocab_size = make_room(llm, llm_tensors, image_id)
    tensors = dict(vpg.state_dict())
    table = "vision_model.embeddings.position_embedding"
    patches = vpg.image_size // vpg.vision_model.embeddings.patch_embedding.stride[0]
    tensors[table] = qformer.interpolate_positions(tensors[table], patches, patches)
    for name, tensor in model.projector.state_dict().items():
        tensors[f"language_projection.{name}"] = tensor
    for name, tensor in llm_tensors.items():
        tensors[f"language_model.{name}"] = tensor
    return tensors, vocab_size


def write_shards(folder, tensors):
    """model.safetensors, or as many shards of 5 GB as it takes with their index."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    weight_map = {}
    for file, names in zip(tqdm(files, desc="writing", unit="file"), shards):
        (folder / file).touch()
        mode = (folder / file).stat().st_mode  # safetensors makes files that only their owner may read
        of_shard = {name: tensors[name].contiguous() for name in names}
        save_file(of_shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# -------------------------------------------------------------- what LAVIS and the original saved

# Their names, and BLIP-2's in Hugging Face layout.
LAVIS_NAMES = [
    (r"(opt|llama|t5|llm)_proj\.", "language_projection."),
    (r"ln_vision\.", "vision_model.post_layernorm."),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"Qformer\.bert\.(.*attention)\.self\.", r"qformer.\1.attention."),
    (r"Qformer\.bert\.", "qformer."),
    (r"visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj", r"vision_model.encoder.layers.\1.self_attn.projection"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
]
# They save what trained, and what is no parameter with a name of its own: buffers, which are
# computed here, and tied copies of the frozen LLM's word embeddings.
COMPUTED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)$")
TIED_WORDS = re.compile(r"(opt|llama|t5|llm)_model\.(.*\.embed_tokens|lm_head)\.weight$")


def read_pth(file, who):
    """A .pth file of theirs -> {name: tensor}. No code in it is executed. ValueError names a file that
    is damaged or another's."""
    try:
        mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote no archives
        with torch.serialization.safe_globals([argparse.Namespace]):  # what MemVP's lies beside
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        named = content.get("model", content)
        return {name: tensor[...] for name, tensor in named.items() if tensor is not None}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file") from None
    except Exception as error:  # torch raises all kinds at damaged files
        raise ValueError(f"{file}: damaged, or not a file that {who} saved ({error})") from error


def read_lavis(file):
    """A .pth file of LAVIS or the original VPGTrans -> {name in BLIP-2: tensor}, as read_pth."""
    return rename(read_pth(file, "LAVIS"))


def rename(named):
    """{LAVIS's name: tensor} -> {BLIP-2's name: tensor}. Of EVA's biases of queries and values becomes
    one: q, zeros in the keys' place, v."""
    tensors = {}
    for name, tensor in named.items():
        if not COMPUTED.match(name):
            fitting = (re.sub(f"^{old}", new, name) for old, new in LAVIS_NAMES if re.match(old, name))
            tensors[next(fitting, name)] = tensor
    for name in [name for name in tensors if name.endswith(".self_attn.q_bias")]:
        start = name.removesuffix("q_bias")
        q = tensors.pop(name)
        v = tensors.pop(f"{start}v_bias", None)
        if v is not None:  # else it is missed under its new name
            tensors[f"{start}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return tensors


def lavis_config(tensors, vit):
    """The VPG's config.json: that of the BLIP-2 folder with the ViT, or what BLIP-2's is, to which
    the file's tensors say the number of query tokens and the image size."""
    config = qformer.read_vpg_config(vit) if vit else {"vision_config": {}, "qformer_config": {}}
    config = {key: config[key] for key in ("vision_config", "qformer_config")}
    if "query_tokens" in tensors:
        config["num_query_tokens"] = tensors["query_tokens"].shape[1]
    table = tensors.get("vision_model.embeddings.position_embedding")
    if table is not None:
        patch = config["vision_config"].get("patch_size", qformer.EVA.DEFAULTS["patch_size"])
        size = patch * math.isqrt(table.shape[1] - 1)
        config["vision_config"] = config["vision_config"] | {"image_size": size}
    return config


def load_lavis(file, llm, vit=None, projector=None, dtype=torch.bfloat16, llm_tokenizer=None):
    """What LAVIS or the original VPGTrans saved, with the LLM it belongs to -> (VisualLLM in eval
    mode, its tokenizer, the LLM's folder). `vit` names a BLIP-2 checkpoint, for files without their
    ViT; `projector` is another such file, whose projector counts; `llm_tokenizer` names where the LLM's
    tokenizer is, if elsewhere. ValueError names a tensor that is missing, misshapen or unknown."""
    tensors = read_lavis(file)
    if projector:
        tensors = {name: x for name, x in tensors.items() if not name.startswith("language_projection.")}
        of_file = read_lavis(projector).items()
        tensors |= {name: x for name, x in of_file if name.startswith("language_projection.")}
    copies = {name: tensors.pop(name) for name in list(tensors) if TIED_WORDS.match(name)}
    has_vit = any(name.startswith("vision_model.embeddings.") for name in tensors)
    if not has_vit and vit is None:
        raise ValueError(f"{file}: holds no ViT; name a BLIP-2 checkpoint that has the same one, which all "
                         "have: --vit opt-2.7b")
    vit_folder = None if has_vit else hub.resolve(vit, "vpg").folder
    config = lavis_config(tensors, vit_folder)
    tokenizer, tok = transfer.find_tokenizer(llm, llm_tokenizer)  # before gigabytes are fetched and read
    place = dataclasses.replace(hub.resolve(llm, "target"), tokenizer=tokenizer)
    remedy = f"Name the --llm and --vit that {file} was made with"
    check_expressible(place.llm, config["vision_config"], remedy)
    if vit_folder:
        tensors |= {name: x for name, x in qformer.read_vit(vit_folder) if qformer.is_frozen(name)}
    with torch.device("meta"):
        vpg = qformer.VPG(config)
        empty = language_models.empty_llm(place.llm)
        linear = torch.nn.Linear(vpg.dim, empty.dim)
    transfer.check_vocabulary(tok, empty, place)
    whole = torch.nn.ModuleDict({"vpg": vpg, "projector": linear})
    named = {}
    for name, tensor in tensors.items():
        kept = dtype if qformer.is_frozen(name) else torch.float32
        is_projector = name.startswith("language_projection.")
        new = name.replace("language_projection.", "projector.") if is_projector else f"vpg.{name}"
        named[new] = tensor.to(kept)
    qformer.assign_tensors(whole, named, file)
    model = vpgtrans.VisualLLM(vpg, linear, language_models.load_llm(place.llm, dtype=dtype))
    words = model.llm.get_parameter(model.llm.WORDS)
    for name, copy in copies.items():
        same = copy.shape == words.shape and torch.allclose(copy.float(), words.float(), rtol=0.02, atol=1e-3)
        if not same:
            raise ValueError(f"{file}: {name} is not what {place.llm} has; it belongs to another language "
                             "model")
    return model.requires_grad_(False).eval(), tok, place.llm


# ------------------------------------------------------------------------- what MemVP's authors saved

MEMVP_NAMES = {
    r"adapter_emb1$": "memory.key_positions",
    r"adapter_emb2$": "memory.value_positions",
    r"adapter_proj\.fc1\.": "memory.projector.0.",
    r"adapter_proj\.fc2\.": "memory.projector.2.",
    r"backbone\.visual\.transformer\.resblocks\.(\d+)\.adapter_mlp\.fc1\.": r"vit.adapters.\1.down.",
    r"backbone\.visual\.transformer\.resblocks\.(\d+)\.adapter_mlp\.fc2\.": r"vit.adapters.\1.up.",
}


def read_memvp(file):
    """A .pth file of MemVP's authors -> {name in a run of ours: tensor}. Of what they save, the
    embedding of two modalities and the adapter of CLIP's last block are never read, and left out."""
    named = {}
    for name, tensor in read_pth(file, "MemVP").items():
        name = name.removeprefix("module.")
        for old, new in MEMVP_NAMES.items():
            if re.match(old, name):
                named[re.sub(old, new, name)] = tensor
    needed = "memory.key_positions", "memory.value_positions", "vit.adapters.0.down.weight"
    if not named.keys() >= set(needed):
        raise ValueError(f"{file}: not a file that MemVP's authors saved; it lacks adapter_emb1, "
                         "adapter_emb2 or the adapters of CLIP's blocks")
    for name in needed[:2]:
        named[name] = named[name].squeeze(0)
    return named


def export_memvp(file, folder, llm, vit, llm_tokenizer=None):
    """What MemVP's authors saved -> a run of ours, which has learnt ScienceQA. -> bytes of its weights"""
    check_new(folder)
    named = read_memvp(file)
    tokenizer, tok = transfer.find_tokenizer(llm, llm_tokenizer)
    place = dataclasses.replace(hub.resolve(llm, "target"), tokenizer=tokenizer)
    transfer.check_vocabulary(tok, language_models.empty_llm(place.llm), place)
    sees = hub.resolve(vit, "vpg")
    args = argparse.Namespace(
        memvp="scienceqa", llm=llm, llm_tokenizer=llm_tokenizer, vit=vit, prompts="memory",
        features="patches", vit_layers=None, rows=len(named["memory.key_positions"]), image_scale=0.01,
        adapters=len(named["vit.adapters.0.down.weight"]), normalise="imagenet", cache=None)
    options = transfer.memory_options(args, sees, place)
    model = transfer.build_memory_llm(options, sees, place, torch.bfloat16, "cpu")
    adapters = model.vit.adapters
    for name in ("down", "up"):
        named.pop(f"vit.adapters.{len(adapters)}.{name}.weight", None)
    trained = {"memory": model.memory, "vit": torch.nn.ModuleDict({"adapters": adapters})}
    qformer.assign_tensors(torch.nn.ModuleDict(trained), named, file)
    folder.mkdir(parents=True, exist_ok=True)
    runs.save_model(folder, model.saved())
    config = json.dumps(transfer.memory_config(args, options, model), indent=2)
    runs.write(folder / "config.json", lambda new: new.write_text(config))
    return sum(parameter.nbytes for parameter in model.saved().values())


# ---------------------------------------------------------------------------------------- the folder


def check_new(folder):
    """FileExistsError unless a folder is empty or not there yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is not empty; name a new folder")
    if folder.is_mount():
        raise FileExistsError(f"{folder}: a disk is mounted there; name a new folder in it")


def export(run, folder, precision="bf16"):
    """A run (or a BLIP-2 checkpoint) -> a folder for transformers; it appears whole or not at all.
    -> bytes of its weights

    OSError and ValueError say what is wrong and what to do."""
    check_new(folder)
    place = hub.resolve(run, "model")
    config = hub.read_config(place.folder)
    if config.get("model_type") == "memvp":
        raise ValueError(f"{run}: a run of MemVP, whose images are in the memory of the LLM's FFNs; "
                         "transformers has no such model to export to")
    check_expressible(place.llm, qformer.read_vpg_config(place.folder).get("vision_config", {}))
    template = transfer.choose_template(place) if "chat_template" in config else None
    if template and data.load_tokenizer(place.tokenizer).encoder_decoder:
        raise ValueError(f"{run}: a T5 that converses has no place for its template in transformers' "
                         "processor; use it here")
    dtype = transfer.DTYPES[precision]
    if weights := transfer.trained_with(config):
        print(f"{run}: was trained beside an LLM in {weights}; written is the LLM of its checkpoint in "
              f"{precision}, with this run's parts: what they say will differ a little")
    model, tok = transfer.load_model(run, dtype, weights="full")
    arguments = config.get("arguments", {})
    moved = "src" in arguments and arguments.get("from_scratch") in (None, False)
    llm = Path(config["llm"]["name"]).name if "llm" in config else f"the language model of {Path(run).name}"
    origin = (MOVED if moved else AROUND).format(llm=llm)
    return write_folder(folder, model, tok, place.llm, origin, dtype, template=template)


def export_lavis(file, folder, llm, vit=None, projector=None, precision="bf16", llm_tokenizer=None):
    """What LAVIS or the original VPGTrans saved -> a folder for transformers, as `export`."""
    check_new(folder)
    dtype = transfer.DTYPES[precision]
    model, tok, llm_folder = load_lavis(file, llm, vit, projector, dtype, llm_tokenizer)
    origin = CONVERTED.format(llm=Path(llm).name, file=Path(file).name)
    # theirs has the exact GELU in T5, whatever its own config.json says
    changes = {"dense_act_fn": "gelu"} if tok.encoder_decoder else {}
    return write_folder(folder, model, tok, llm_folder, origin, dtype, changes)


def write_folder(folder, model, tok, llm_folder, origin, dtype, text_config=(), template=None):
    """Writes a model with its tokenizer, config and processor, and with the chat template of one that
    converses. -> bytes of its weights"""
    folder = folder.resolve()
    texts = chat_files(tok, template) if template else {}
    ends = chat_ends(tok, template) if template else None
    image_id = add_image_token(tok)
    tensors, vocab_size = blip2_tensors(model, image_id)
    # all of one dtype, since older versions of transformers do not load a mixture
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    dtype_name = str(dtype).removeprefix("torch.")
    about = {"name": folder.name, "dtype": dtype_name}
    use = CHAT.format(**about, **describe_chat(model, template)) if template else CAPTION.format(**about)
    texts["README.md"] = CARD.format(name=folder.name, origin=origin, use=use)
    files = processor_files(model.vpg, tok)
    files["config.json"] = blip2_config(llm_folder, model, tok, image_id, vocab_size, dtype_name)
    files["config.json"]["text_config"].update(text_config)
    if template:
        files["config.json"]["text_config"]["eos_token_id"] = ends
        files["config.json"]["chat_template"] = transfer.describe_template(template)

    size = sum(tensor.nbytes for tensor in tensors.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.unfinished.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        free = shutil.disk_usage(unfinished).free
        if free < size + 1e8:
            raise OSError(f"{folder}: the weights are {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                          "are free there")
        write_shards(unfinished, tensors)
        for name, content in files.items():
            (unfinished / name).write_text(json.dumps(content, indent=2) + "\n")
        tok.encoder.save(str(unfinished / "tokenizer.json"))
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return size


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN",
                        help="a run's folder (out/...), or a file of theirs")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write: a new folder")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                        help="of all weights; fp32 keeps what was trained to the last digit, and "
                             "takes twice the space (default: %(default)s)")
    theirs = parser.add_argument_group("what LAVIS, the original VPGTrans or MemVP's authors saved")
    theirs.add_argument("--from-lavis", action="store_true",
                        help="RUN is a .pth file of LAVIS or the original VPGTrans")
    theirs.add_argument("--from-memvp", action="store_true",
                        help="RUN is checkpoint-19.pth of MemVP's authors, taught ScienceQA; DIR becomes a "
                             "run of finetune.py. Needs --llm (llama-7b) and --vit "
                             "(openai/clip-vit-large-patch14)")
    theirs.add_argument("--llm", metavar="NAME",
                        help="the language model that it belongs to: a folder, Hub id or short name "
                             "(opt-6.7b)")
    theirs.add_argument("--llm-tokenizer", metavar="NAME",
                        help="where its tokenizer is, if not with it (llama-7b for Vicuna)")
    theirs.add_argument("--vit", metavar="NAME",
                        help="a BLIP-2 checkpoint that has its ViT, where the file has none (opt-2.7b); of "
                             "MemVP CLIP (openai/clip-vit-large-patch14)")
    theirs.add_argument("--projector", metavar="FILE",
                        help="with --from-lavis: another file of theirs, whose projector counts")
    return parser


def parse_arguments(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.from_lavis and args.llm is None:
        parser.error("--from-lavis needs --llm, the language model that the file belongs to")
    if args.from_memvp and not (args.llm and args.vit):
        parser.error("--from-memvp needs --llm and --vit")
    if args.from_memvp and (args.from_lavis or args.projector or args.precision != "bf16"):
        parser.error("--from-memvp stands without --from-lavis, --projector and --precision: what was "
                     "trained stays float32")
    names = args.llm or args.llm_tokenizer or args.vit or args.projector
    if names and not (args.from_lavis or args.from_memvp):
        parser.error("--llm, --llm-tokenizer, --vit and --projector are for --from-lavis and --from-memvp; a "
                     "run names its own")
    return args


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    args = parse_arguments(argv)
    try:
        if args.from_memvp:
            size = export_memvp(args.run, args.folder, args.llm, args.vit, args.llm_tokenizer)
            print(f"{args.folder}: {size / 1e6:.0f} MB of weights. Try: python evaluate.py --model "
                  f"{shlex.quote(str(args.folder))} scienceqa=datasets/scienceqa")
            return
        if args.from_lavis:
            size = export_lavis(args.run, args.folder, args.llm, args.vit, args.projector, args.precision,
                                args.llm_tokenizer)
        else:
            size = export(args.run, args.folder, args.precision)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.folder}: {size / 1e9:.2f} GB of weights, config, tokenizer and processor, for "
          "transformers.Blip2ForConditionalGeneration; README.md there shows how.")


if __name__ == "__main__":
    main()
