"""Speed of the data path on one core: from photographs on disk to batches of the model's inputs.

    python -m benchmarks.data --images      # JPEG photographs to the ViT's input
    python -m benchmarks.data --pairs       # files and shards to batches of images, prompts and targets
    python -m benchmarks.data               # both

Prints a Markdown table for each. The photographs are 640 x 480, random, with detail at all scales.

    images    beside transformers' processor for Pillow, fed one image at a time, which is faster than
              many; "decoding alone" is what no way can do without
    pairs     beside transformers' processors on the files, and the webdataset package on a shard;
              "cores for 400 a second" is what a GPU would need that trains on so many pairs

A ratio above 1: faster than that peer. Ours gives the images that transformers' processor gives, but
for rounding, or nothing is timed. Figures mean something on an otherwise idle machine only.
"""

import io
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import qformer
from benchmarks import peers
from pairs import clean_caption, read_pairs

SIZE = 224  # pixels, of what the ViT sees
LEVEL = 1 / 255 / min(qformer.STD)  # a level of 255 in the most stretched channel, normalised
CPU = torch.device("cpu")
TOKENIZER = peers.ROOT / "demo" / "target"


def photograph(rng, width=640, height=480):
    """A picture with detail at all scales, as photographs have it: a JPEG of 130 KB at quality 90."""
    rows = np.fft.fftfreq(height)[:, None]
    columns = np.fft.fftfreq(width)[None]
    frequency = np.hypot(rows, columns).clip(1 / width)
    noise = rng.normal(size=(3, height, width))
    channels = np.fft.ifft2(np.fft.fft2(noise) / frequency**1.2).real
    levels = np.clip(120 + 50 * channels / channels.std(), 0, 255).astype(np.uint8)
    return Image.fromarray(levels.transpose(1, 2, 0))


def write_photographs(folder, count, rng):
    files = [folder / f"{i:03}.jpg" for i in range(count)]
    for file in files:
        photograph(rng).save(file, quality=90)
    return files


def pillow_processor():
    """What transformers' BlipImageProcessor is where torchvision is missing."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})


def process(processor, file):
    """-> (1,3,224,224)"""
    return processor(Image.open(file), return_tensors="pt")["pixel_values"]


def rates(count, times):
    """Two cells: how many a second, and their range."""
    low, high = count / max(times), count / min(times)
    return [f"{count / statistics.median(times):,.0f}", f"{low:,.0f} - {high:,.0f}"]


# -------------------------------------------------------------------------------------------- images


def look_at(files, look):
    """What `look` makes of each image, opened as data.py opens it."""
    results = []
    for file in files:
        with data.open_image(file) as image:
            results.append(look(image))
    return results


def decode(image):
    return image.load()


def decode_half(image):
    image.draft(None, (image.width // 2, image.height // 2))
    image.load()


def image_ways(files, rng):
    """{name: function} of ours; each makes (count,3,224,224) of all files."""
    def ours(look):
        return torch.stack(look_at(files, look))

    evaluation = partial(data.resize, size=SIZE)
    training = partial(data.random_crop, size=SIZE, rng=rng)
    return {
        "evaluation, normalised": lambda: qformer.normalise(ours(evaluation)),
        "evaluation": lambda: ours(evaluation),
        "training, decoded whole": lambda: ours(partial(training, least=float("inf"))),
        "training": lambda: ours(training),
    }


def compare_images(repeats, argv, count=32):
    """The table of images: ours for evaluation and training, transformers', and decoding alone.

    ValueError if the images for evaluation are more than 1.5 levels of 255 from transformers'.
    """
    peer = "transformers' BlipImageProcessorPil"
    processor = pillow_processor()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder), count, rng)
        kilobytes = sum(file.stat().st_size for file in files) / count / 1e3
        ours = image_ways(files, rng)
        theirs = torch.cat([process(processor, file) for file in files])
        apart = (ours["evaluation, normalised"]() - theirs).abs()
        if not apart.max() < 1.5 * LEVEL:
            raise ValueError(f"ours and {peer} make different images: {apart.max():.2g} apart")
        ways = {
            peer: lambda: [process(processor, file) for file in files],
            **ours,
            "decoding alone": partial(look_at, files, decode),
            "decoding alone, at half size": partial(look_at, files, decode_half),
        }
        seconds = peers.take_turns(ways, repeats, CPU)
    what = (f"{count} JPEGs of 640 x 480 and {kilobytes:.0f} KB to {SIZE} x {SIZE}, one thread, "
            f"medians of {repeats}")
    peers.print_heading("benchmarks.data", argv, what, CPU)
    theirs = statistics.median(seconds[peer])
    rows = []
    for name, times in seconds.items():
        rows.append([name, *rates(count, times), f"{theirs / statistics.median(times):.2f}"])
    peers.print_table(["", "images/s", "min - max", "ratio"], rows)
    print(f"\nevaluation, normalised: at most {apart.max():.1e} from transformers' (a level of 255 is "
          f"{LEVEL:.1e}), {(apart > 1e-3).float().mean():.2%} of the values not the same. Without "
          "normalisation it is uint8, which the device normalises.")


# --------------------------------------------------------------------------------------------- pairs


def write_pairs(folder, count, rng):
    """The same pairs as files (pairs.jsonl) and as a shard (0.tar). -> captions"""
    import webdataset

    sentence = "Two red circles, and a blue square on a table in front of the window."
    captions = [sentence[: 20 + i % 50] for i in range(count)]
    files = write_photographs(folder, count, rng)
    with (folder / "pairs.jsonl").open("w") as lines:
        for file, caption in zip(files, captions):
            lines.write(json.dumps({"image": file.name, "caption": caption}) + "\n")
    with webdataset.TarWriter(str(folder / "0.tar")) as shard:
        for file, caption in zip(files, captions):
            shard.write({"__key__": file.stem, "jpg": file.read_bytes(), "txt": caption})
    return captions


def our_way(tok, source, batch, **options):
    """(the samples of a source, a function that reads them all, in batches)"""
    samples = data.Samples([read_pairs(str(source))], tok, SIZE, 32, **options)
    count = len(samples.sets[0])

    def read():
        order = data.plan([count], count, seed=0)
        for (micro,) in data.load_batches(samples, order, batch, batch):
            assert len(micro["images"]) == batch

    return samples, read


def transformers_way(folder, captions, batch):
    """A function that reads the files in batches; there is no augmentation."""
    from transformers import AutoTokenizer

    processor = pillow_processor()
    words = AutoTokenizer.from_pretrained(TOKENIZER)
    words.pad_token = words.eos_token
    files = sorted(folder.glob("*.jpg"))
    options = dict(padding=True, truncation=True, max_length=32, return_tensors="pt")

    def read():
        for i in range(0, len(files), batch):
            torch.cat([process(processor, file) for file in files[i : i + batch]])
            words(captions[i : i + batch], **options)

    return read


def webdataset_way(shard, tok, samples, batch, rng, decoded):
    """A function that reads a shard by the webdataset package, with our crops and collation.

    The package decodes the images, or (decoded=False) we do.
    """
    import webdataset

    def our_sample(pair):
        image, caption = pair
        if not decoded:
            image = Image.open(io.BytesIO(image))
            caption = caption.decode()
        target = data.caption_ids(tok, clean_caption(caption))
        return {"image": data.random_crop(image, SIZE, rng), "prompt": samples.prompt, "file": "",
                "bad": [], "twin": None, "targets": [target], "scored": None}

    def read():
        pairs = webdataset.WebDataset(str(shard), shardshuffle=False)
        if decoded:
            pairs = pairs.decode("pil")
        pairs = pairs.to_tuple("jpg", "txt").map(our_sample)
        for micro in pairs.batched(batch, collation_fn=samples.collate):
            assert len(micro["images"]) == batch

    return read


FILES_PEER = "transformers' processors, files, no crops"
SHARD_PEER = "webdataset, shard, decoded by it, our crops and collation"


def pair_ways(folder, captions, batch, rng):
    """{name: function}; each makes batches of all pairs: images (32,3,224,224), prompts, targets."""
    tok = data.load_tokenizer(TOKENIZER)
    files = folder / "pairs.jsonl"
    shard = folder / "0.tar"
    samples, ours_shard = our_way(tok, shard, batch)
    known = data.Lookalikes(sorted(folder.glob("*.jpg")) * 5)
    webdataset_reads = partial(webdataset_way, shard, tok, samples, batch, rng)
    return {
        FILES_PEER: transformers_way(folder, captions, batch),
        "ours, files": our_way(tok, files, batch)[1],
        "ours, files, no crops": our_way(tok, files, batch, augment=False)[1],
        "ours, files, looking for validation images": our_way(tok, files, batch, known=known)[1],
        "ours, shard": ours_shard,
        SHARD_PEER: webdataset_reads(decoded=True),
        "webdataset, shard, our decoding, crops and collation": webdataset_reads(decoded=False),
    }


def compare_pairs(repeats, argv, count=96, batch=32):
    """The table of pairs."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = write_pairs(folder, count, rng)
        ways = pair_ways(folder, captions, batch, rng)
        seconds = peers.take_turns(ways, repeats, CPU)
    what = (f"{count} pairs, JPEGs of 640 x 480, to batches of {batch} at {SIZE} x {SIZE}, one core, "
            f"medians of {repeats}")
    peers.print_heading("benchmarks.data", argv, what, CPU)
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        peer = statistics.median(seconds[FILES_PEER if "files" in name else SHARD_PEER])
        cores = f"{400 * median / count:.1f}"
        rows.append([name, *rates(count, times), f"{peer / median:.2f}", cores])
    columns = ["", "pairs/s", "min - max", "ratio", "cores for 400 a second"]
    peers.print_table(columns, rows)
    print("\nThe ratio is to transformers' processors for files, to webdataset with its own decoding "
          "for shards.")


# ------------------------------------------------------------------------------------------- command


def main(argv=None):
    parser = peers.new_parser("benchmarks.data", __doc__)
    parser.add_argument("--images", action="store_true", help="reading and resizing of photographs")
    parser.add_argument("--pairs", action="store_true",
                        help="the whole path: read, decode, crop, tokenize, collate")
    args = peers.parse(parser, argv)
    torch.set_num_threads(1)
    both = args.images == args.pairs
    if args.images or both:
        compare_images(args.repeats, argv)
    if both:
        print()
    if args.pairs or both:
        compare_pairs(args.repeats, argv)


if __name__ == "__main__":
    main()
