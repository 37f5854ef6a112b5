"""What models say about scenes: captions, how many of their claims are right, and a sheet to look at."""

import json
import tarfile

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import transfer
from study.scenes import named


def read_scenes(file):
    """A .jsonl or a shard of scenes -> (image files, captions, the (colour, shape) pairs of each image)"""
    rows = read_shard(file) if file.suffix == ".tar" else read_lines(file)
    files, captions, objects = zip(*rows)
    return list(files), list(captions), [{tuple(pair) for pair in of_image} for of_image in objects]


def read_lines(file):
    """A line a scene, images named from the file's folder."""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        yield file.parent / row["image"], row["caption"], row["objects"]


def read_shard(file):
    """KEY.png and then KEY.json; images are named as data.open_image takes those of shards."""
    with tarfile.open(file) as shard:
        for member in shard:
            if member.name.endswith(".png"):
                image = f"{file}::{member.name}@{member.offset_data}+{member.size}"
            else:
                row = json.load(shard.extractfile(member))
                yield image, row["caption"], row["objects"]


def caption_all(model, tok, files, batch_size=50):
    """Greedy captions of image files."""
    images = torch.stack([data.read_image(file, model.vpg.image_size) for file in files])
    captions = []
    for batch in images.split(batch_size):
        captions += transfer.answer(model, tok, batch)
    return captions


def share_right(captions, truths):
    """-> (share of the claimed (colour, shape) pairs that are in the image, number of claims)"""
    claims = [(claim, truth) for text, truth in zip(captions, truths) for claim in named(text)]
    return sum(claim in truth for claim, truth in claims) / max(1, len(claims)), len(claims)


def draw(file, images, rows, columns=3, side=150, width=400):
    """A sheet of RGB images, each with what people and every model say about it. rows: {who: captions}"""
    font = ImageFont.load_default(13)
    line = 17  # pixels
    height = max(side, 2 * line * len(rows)) + 16
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x = i % columns * width + 8
        y = i // columns * height + 8
        sheet.paste(image.resize((side, side), Image.NEAREST), (x, y))
        for j, (who, captions) in enumerate(rows.items()):
            left = x + side + 10
            top = y + 2 * line * j
            text = captions[i]
            while pen.textlength(text, font) > width - side - 26:
                text = text[:-2].rstrip() + "…"
            pen.text((left, top), who, font=font, fill=(120, 120, 120))
            pen.text((left, top + line - 2), text, font=font, fill="black")
    sheet.save(file)
