"""Makes the small world of the study: pictures with captions, a ViT, language models of three
families and several sizes, and a Q-Former that went through a first stage like BLIP-2's.

    python -m study.make all             # or some of: scenes tokenizers vit llms stage1
    python -m study.make llms --which opt-256 t5-256
    python -m study.make demo            # after study.runs: what is embedded in demo/
    python -m study.make smollm2         # what the second study needs beside demo/smollm2.py's folder

What is trained here is what people who run VPGTrans download. All that the paper trains, the sources
too, is trained by train.py: see runs.py. The general text is WordNet's glosses, from the Debian
package wordnet-base (apt-get install wordnet-base). Each stage reads what the earlier ones left in
--out, so a stage can be run again alone, and what lies there is not made again.
"""

import argparse
import io
import itertools
import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from study import scenes
from study.languages import LLMS, make_llms, make_tokenizers
from study.sight import make_stage1, make_vit
from study.world import SEEDS, save_bf16

ROOT = Path(__file__).resolve().parent.parent
PAIRS = dict(train=20000, val=500, test=1000)
SHARES = {"5": 0.05, "10.7": 0.107, "25": 0.25}  # parts of the training images: how many are needed?
STEPS = dict(vit=2000, stage1=1500) | {name: 1600 if "256" in name else 1000 for name in LLMS}
DEMO_PAIRS = dict(train=2400, val=300)
FOR_CHOICES = 100  # of the demo's held-out scenes: those by which earlier trials chose, too
SAMPLES = 6  # of the held-out pairs of the demo, to look at


def draw_pairs(split, count):
    """Yields PIL images of scenes with what is known of them: {"caption": text, "objects": truth}."""
    rng = random.Random(SEEDS[split])
    for _ in range(count):
        scene = scenes.random_scene(rng)
        image = Image.fromarray(scenes.render(scene)[0])
        yield image, dict(caption=scenes.caption(scene, rng), objects=scenes.truth(scene))


def make_scenes(args):
    """pairs/: PNG images, and a line for each with its caption and truth.

    There are files for training (whole and in parts), validation and test."""
    folder = args.out / "pairs"
    for split, count in PAIRS.items():
        if (folder / f"{split}.jsonl").is_file():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (image, known) in enumerate(draw_pairs(split, count)):
            name = f"{split}/{number:05d}.png"
            image.save(folder / name)
            lines.append(json.dumps(dict(image=name) | known) + "\n")
        if split == "train":
            for part, share in SHARES.items():
                (folder / f"train-{part}.jsonl").write_text("".join(lines[: round(share * count)]))
        (folder / f"{split}.jsonl").write_text("".join(lines))
        print(f"wrote {count} pairs to {folder}/{split}", flush=True)


# ------------------------------------------------------------------------------------ stage: demo


def add_file(shard, name, content):
    """Bytes into a tar, without date and owner, so that the same pairs give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_shards(folder):
    """The demo's pairs as WebDataset shards: train.tar and val.tar of KEY.png and KEY.json.

    The first held-out images lie in samples/ once more, each with its caption, to look at."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "samples").mkdir(parents=True)
    number = 0
    for split, count in DEMO_PAIRS.items():
        with tarfile.open(folder / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
            for i, (image, known) in enumerate(draw_pairs(f"demo-{split}", count)):
                key = f"{number:05d}"
                number += 1
                png = io.BytesIO()
                image.save(png, "png", optimize=True)
                add_file(shard, f"{key}.png", png.getvalue())
                add_file(shard, f"{key}.json", json.dumps(known).encode())
                if split == "val" and i < SAMPLES:
                    (folder / "samples" / f"{key}.png").write_bytes(png.getvalue())
                    (folder / "samples" / f"{key}.txt").write_text(known["caption"] + "\n")


def make_demo(args):
    """demo/: 2,700 other pairs, the largest OPT as the target, and the source of seed 0.

    study.runs has trained the source."""
    demo = ROOT / "demo"
    write_shards(demo / "pairs")
    for name in ("source", "target"):
        shutil.rmtree(demo / name, ignore_errors=True)
    shutil.copytree(args.out / "opt-256", demo / "target")
    source = args.out / "runs" / "source-opt-128-s0"
    subprocess.run([sys.executable, ROOT / "export.py", source, demo / "source"], check=True)
    (demo / "source" / "README.md").unlink()  # a model card that says how to load it


# ----------------------------------------------------------------------------------- stage: smollm2


def split_shard(shard, folder, **parts):
    """Parts of a shard of the demo's as shards in a folder, each named as its slice of the scenes is."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(ROOT / "demo" / "pairs" / shard) as whole:
        members = [(member.name, whole.extractfile(member).read()) for member in whole]
    two_files = list(zip(members[::2], members[1::2]))  # of each scene
    for name, part in parts.items():
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as own:
            for file in itertools.chain.from_iterable(two_files[part]):
                add_file(own, *file)


def make_splits(folder):
    """The demo's held-out scenes, val.tar to choose by and test.tar to report; and a part of its training
    scenes."""
    split_shard("val.tar", folder, val=slice(FOR_CHOICES), test=slice(FOR_CHOICES, None))
    few = round(SHARES["10.7"] * DEMO_PAIRS["train"])
    split_shard("train.tar", folder, **{"train-10.7": slice(few)})


def make_smollm2(args):
    """smollm2/: held-out scenes, a part of the training scenes; and a Q-Former after the first stage behind
    the ViT of demo/source, for the baseline that starts from one."""
    folder = args.out / "smollm2"
    make_splits(folder)
    make_scenes(args)
    source = ROOT / "demo" / "source"
    for name, place in {"pairs": args.out / "pairs", "opt-128": source}.items():  # its tokenizer is read
        if not (folder / name).exists():
            (folder / name).symlink_to(place.resolve())
    tensors = load_file(source / "model.safetensors")
    vit = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    save_bf16(folder / "vit" / "model.safetensors", vit)
    make_stage1(argparse.Namespace(out=folder, steps=args.steps))


# ------------------------------------------------------------------------------------ the command

STAGES = dict(
    scenes=make_scenes, tokenizers=make_tokenizers, vit=make_vit, llms=make_llms, stage1=make_stage1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all", "demo", "smollm2"])
    parser.add_argument("--out", type=Path, default=Path("out/study"),
                        help="folder of the world (default: %(default)s)")
    parser.add_argument("--which", nargs="+", choices=list(LLMS), default=list(LLMS),
                        help="language models (default: all)")
    parser.add_argument("--quick", type=float, default=1.0,
                        help="share of the steps, for a trial (default: %(default)s)")
    args = parser.parse_args()
    args.steps = {name: max(1, int(args.quick * steps)) for name, steps in STEPS.items()}
    torch.set_num_threads(1)
    for name, make in STAGES.items():
        if name in args.stages or "all" in args.stages:
            make(args)
    if "demo" in args.stages:
        make_demo(args)
    if "smollm2" in args.stages:
        make_smollm2(args)


if __name__ == "__main__":
    main()
