"""Write what VPGTrans trained as an ordinary BLIP-2 checkpoint, which transformers loads without knowing of this project.

    python export.py out/opt-2.7b-to-opt-6.7b blip2-opt-6.7b

DIR then holds the whole model, config, tokenizer and image processor:

    model = transformers.Blip2ForConditionalGeneration.from_pretrained(DIR)
    processor = transformers.Blip2Processor.from_pretrained(DIR)

That format has no place for two things, which are refused: an LLM that embeds words in another width than its own (opt-350m),
and a ViT other than EVA (CLIP).
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

import data
import hub
import llm as language_models
import qformer
from sample import load_model

SHARD_BYTES = 5e9
IMAGE_TOKEN = "<image>"  # stands for a soft prompt in transformers' prompts
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A BLIP-2 model whose visual prompt generator was moved to {llm} by VPGTrans ([Zhang et al. 2023](https://arxiv.org/abs/2305.01278)).

```python
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

processor = Blip2Processor.from_pretrained("{name}")
model = Blip2ForConditionalGeneration.from_pretrained("{name}", dtype="{dtype}")
inputs = processor(images=Image.open("cat.jpg"), text="", return_tensors="pt").to(model.device, model.dtype)
print(processor.batch_decode(model.generate(**inputs, num_beams=5, max_new_tokens=30), skip_special_tokens=True)[0].strip())
```

`text=""` asks for a caption; `text="Question: what colour is the cat? Answer:"` is BLIP-2's way to ask. What a decoder-only language
model generates begins with its prompt. Images are expected upright and opaque: EXIF orientation and transparency are not looked at.
"""


def check_expressible(place):
    """ValueError for a model that a BLIP-2 checkpoint cannot hold; from the configs, before anything large is read."""
    llm_config = language_models.read_config(place.llm)[0]
    width = llm_config.get("hidden_size")
    if llm_config.get("word_embed_proj_dim", width) != width:
        raise ValueError(f"this LLM embeds words in {llm_config['word_embed_proj_dim']} numbers and works with {width} (opt-350m); soft prompts enter "
                         "behind that step, for which BLIP-2's format has no place. Use sample.py with this run")
    if qformer.vit_options(qformer.read_config(place.folder).get("vision_config", {}))[0] is not qformer.EVA:
        raise ValueError("this run's ViT is CLIP's, for which BLIP-2's format has no place. Use sample.py with this run")


def add_image_token(tok):
    """Changes `tok` for transformers' processor: with the image token, whose id is returned, with the specials around a
    prompt that our prompts have (BOS in front, behind T5's </s>), and with a token to pad with."""
    tok.encoder.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    before, after = ([], [tok.eos_id]) if tok.encoder_decoder else ([] if tok.bos_id is None else [tok.bos_id], [])
    piece = tok.encoder.id_to_token
    tok.encoder.post_processor = processors.TemplateProcessing(
        single=[*map(piece, before), "$A", *map(piece, after)], special_tokens=[(piece(id), id) for id in before + after])
    tok.pad_id = tok.eos_id if tok.pad_id is None else tok.pad_id
    return tok.encoder.token_to_id(IMAGE_TOKEN)


def make_room(llm, tensors, id):
    """Lengthens the word embeddings and the head in {name: tensor} where the vocabulary ends before `id`.

    The new rows are the mean of the old ones: a mean is never the greatest score, so what is generated stays as it was."""
    for name in {llm.WORDS, "lm_head.weight"} & tensors.keys():
        rows = tensors[name]
        if (new := id + 1 - len(rows)) > 0:
            tensors[name] = torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype).expand(new, -1)])
    return len(tensors[llm.WORDS])


def blip2_config(place, model, tok, image_id, vocab_size, dtype):
    """config.json, as transformers writes it for BLIP-2."""
    text = {key: value for key, value in language_models.read_config(place.llm)[0].items() if key not in ("dtype", "torch_dtype")}
    ends = [tok.end_id] + [tok.eos_id] * (tok.eos_id != tok.end_id)
    # left without a text, transformers makes a prompt of image tokens and BOS; None makes it fail where we have no BOS (Qwen)
    text |= {"vocab_size": vocab_size, "eos_token_id": ends, "pad_token_id": tok.pad_id, "bos_token_id": tok.eos_id if tok.encoder_decoder else tok.bos_id}
    if tok.encoder_decoder:
        text["decoder_start_token_id"] = model.llm.start_id
    parts = model.vpg.config
    return {"architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2", "torch_dtype": dtype,
            "vision_config": parts["vision_config"] | {"model_type": "blip_2_vision_model", "image_size": model.vpg.image_size},
            "qformer_config": parts["qformer_config"] | {"model_type": "blip_2_qformer"}, "text_config": text,
            "num_query_tokens": model.vpg.num_query_tokens, "image_token_index": image_id,
            "tie_word_embeddings": text.get("tie_word_embeddings", model.llm.DEFAULTS["tie_word_embeddings"])}


def processor_files(vpg, tok):
    """{file name: object} of transformers' Blip2Processor, but for tokenizer.json."""
    specials = {"bos_token": tok.bos_id, "eos_token": tok.eos_id, "pad_token": tok.pad_id}
    named = {key: tok.encoder.id_to_token(id) for key, id in specials.items() if id is not None}
    return {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Blip2Processor", **named,
                                      "padding_side": "right" if tok.encoder_decoder else "left", "clean_up_tokenization_spaces": False},
            "preprocessor_config.json": {"image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor", "do_convert_rgb": True,
                                         "do_resize": True, "size": {"height": vpg.image_size, "width": vpg.image_size}, "resample": 3,
                                         "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                                         "image_mean": list(data.MEAN), "image_std": list(data.STD)},
            "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": vpg.num_query_tokens}}


def blip2_tensors(model, image_id):
    """({name in BLIP-2: tensor} of the whole model, a tied head left out; the size of the vocabulary, the image token included)"""
    vpg, llm = model.vpg, model.llm
    llm_tensors = {name: tensor for name, tensor in llm.state_dict().items()
                   if not (name == "lm_head.weight" and llm.lm_head.weight is llm.get_parameter(llm.WORDS))}
    vocab_size = make_room(llm, llm_tensors, image_id)
    tensors = vpg.state_dict() | {f"language_projection.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    table, patches = "vision_model.embeddings.position_embedding", vpg.image_size // vpg.vision_model.embeddings.patch_embedding.stride[0]
    tensors[table] = qformer.interpolate_positions(tensors[table], patches, patches)
    return tensors | {f"language_model.{name}": tensor for name, tensor in llm_tensors.items()}, vocab_size


def write_shards(folder, tensors):
    """model.safetensors, or as many shards of 5 GB as it takes with their index."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(tqdm(files, desc="writing", unit="file"), shards):
        (folder / file).touch()
        mode = (folder / file).stat().st_mode  # safetensors makes files that only their owner may read
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                 "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def export(run, folder, precision="bf16"):
    """A run (or a BLIP-2 checkpoint) -> a folder for transformers; it appears whole or not at all. -> bytes of its weights

    OSError and ValueError say what is wrong and what to do."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is not empty; name a new folder")
    place = hub.resolve(run, "model")
    check_expressible(place)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model, tok = load_model(run, dtype)
    image_id = add_image_token(tok)
    tensors, vocab_size = blip2_tensors(model, image_id)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}  # all alike: older versions do not load a mixture
    dtype_name, llm_name = str(dtype).removeprefix("torch."), Path(hub.read_config(place.folder).get("llm", {}).get("name", run)).name
    files = {"config.json": blip2_config(place, model, tok, image_id, vocab_size, dtype_name), **processor_files(model.vpg, tok)}

    size = sum(tensor.nbytes for tensor in tensors.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.unfinished.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        if (free := shutil.disk_usage(unfinished).free) < size + 1e8:
            raise OSError(f"{folder}: the weights are {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
        write_shards(unfinished, tensors)
        for name, content in files.items():
            (unfinished / name).write_text(json.dumps(content, indent=2) + "\n")
        tok.encoder.save(str(unfinished / "tokenizer.json"))
        (unfinished / "README.md").write_text(CARD.format(name=folder.name, llm=llm_name, dtype=dtype_name))
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return size


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder (out/...)")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write: a new folder")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of all weights; fp32 keeps what was trained to the last "
                        "digit, and takes twice the space (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        size = export(args.run, args.folder, args.precision)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.folder}: {size / 1e9:.2f} GB of weights, config, tokenizer and processor, for transformers.Blip2ForConditionalGeneration; "
          f"README.md there shows how.")


if __name__ == "__main__":
    main()
