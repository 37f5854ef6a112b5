"""Write what VPGTrans trained as an ordinary BLIP-2 checkpoint, which transformers loads without
knowing of this project.

    python export.py out/opt-2.7b-to-opt-6.7b blip2-opt-6.7b

DIR then holds the whole model, config, tokenizer and image processor:

    model = transformers.Blip2ForConditionalGeneration.from_pretrained(DIR)
    processor = transformers.Blip2Processor.from_pretrained(DIR)

That format has no place for two things, which are refused: an LLM that embeds words in another
width than its own (opt-350m), and a ViT other than EVA (CLIP).
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, processors
from tqdm import tqdm

import hub
import llm as language_models
import qformer
import transfer

SHARD_BYTES = 5e9
IMAGE_TOKEN = "<image>"  # stands for a soft prompt in transformers' prompts
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A BLIP-2 model whose visual prompt generator was moved to {llm} by VPGTrans
([Zhang et al. 2023](https://arxiv.org/abs/2305.01278)).

```python
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
and opaque: EXIF orientation and transparency are not looked at.
"""


def check_expressible(place):
    """ValueError for a model that a BLIP-2 checkpoint cannot hold; from the configs, before
    anything large is read."""
    llm_config = language_models.read_llm_config(place.llm)[0]
    width = llm_config.get("hidden_size")
    if llm_config.get("word_embed_proj_dim", width) != width:
        raise ValueError(f"this LLM embeds words in {llm_config['word_embed_proj_dim']} numbers "
                         f"and works with {width} (opt-350m); soft prompts enter behind that step, "
                         "for which BLIP-2's format has no place. Use sample.py with this run")
    vit_config = qformer.read_vpg_config(place.folder).get("vision_config", {})
    if qformer.vit_options(vit_config)[0] is not qformer.EVA:
        raise ValueError("this run's ViT is CLIP's, for which BLIP-2's format has no place. Use "
                         "sample.py with this run")


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


def blip2_config(place, model, tok, image_id, vocab_size, dtype):
    """config.json, as transformers writes it for BLIP-2."""
    text = dict(language_models.read_llm_config(place.llm)[0])
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


def export(run, folder, precision="bf16"):
    """A run (or a BLIP-2 checkpoint) -> a folder for transformers; it appears whole or not at all.
    -> bytes of its weights

    OSError and ValueError say what is wrong and what to do."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is not empty; name a new folder")
    place = hub.resolve(run, "model")
    if hub.read_config(place.folder).get("model_type") == "memvp":
        raise ValueError(f"{run}: a run of MemVP, whose images are in the memory of the LLM's FFNs; "
                         "transformers has no such model to export to")
    check_expressible(place)
    dtype = transfer.DTYPES[precision]
    model, tok = transfer.load_model(run, dtype)
    image_id = add_image_token(tok)
    tensors, vocab_size = blip2_tensors(model, image_id)
    # all of one dtype, since older versions of transformers do not load a mixture
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    dtype_name = str(dtype).removeprefix("torch.")
    llm = hub.read_config(place.folder).get("llm", {}).get("name", run)
    card = CARD.format(name=folder.name, llm=Path(llm).name, dtype=dtype_name)
    files = processor_files(model.vpg, tok)
    files["config.json"] = blip2_config(place, model, tok, image_id, vocab_size, dtype_name)

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
        (unfinished / "README.md").write_text(card)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return size


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder (out/...)")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write: a new folder")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                        help="of all weights; fp32 keeps what was trained to the last digit, and "
                             "takes twice the space (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        size = export(args.run, args.folder, args.precision)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.folder}: {size / 1e9:.2f} GB of weights, config, tokenizer and processor, for "
          "transformers.Blip2ForConditionalGeneration; README.md there shows how.")


if __name__ == "__main__":
    main()
