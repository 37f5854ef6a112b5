"""Captions of the source's own: what the vision-language model whose VPG moves says about images, in
the place of captions by people.

    sets = caption_images("opt-2.7b", 1, sets, args, processes)      # Pairs -> Pairs

They are drawn at temperature 1, not the likeliest ones: a target that learns from the likeliest
learns one way to say it. They are kept as JSON lines beside the data, so that the next run with the
same source finds them, and one that was stopped goes on where it stood.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import hub
import loop
import transfer
from pairs import Pairs, Strings, clean_caption

TEMPERATURE = 1.0
TOP_P = 0.95
LONGEST = 30  # tokens
PLACEHOLDER = "a man on a red bicycle in front of a house"


def file_beside(pairs, fingerprint, count):
    """Where the captions of a data set are kept: beside its images, or where nothing can be written
    there in $VPGTRANS_CACHE (~/.cache/vpgtrans)."""
    name = f"{pairs.name}.captions-{fingerprint[:12]}-{count}.jsonl"
    folder = Path(pairs.root)
    if not os.access(folder, os.W_OK):
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]  # others have such a name
        folder = Path(os.environ.get("VPGTRANS_CACHE", "~/.cache/vpgtrans")).expanduser() / place
        folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def read_kept(file, made_with):
    """{(image, its bytes): its captions} of a file that an earlier run has left, whose first line must
    be `made_with`. A last line that a kill has torn is cut off. ValueError where it was made otherwise."""
    if not file.is_file():
        file.write_text(json.dumps(made_with) + "\n")
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    try:
        first, *lines = map(json.loads, whole.splitlines())
        kept = {(line["image"], line["bytes"]): line["captions"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged, or of an older version ({error}); remove it, and the captions "
                         "are drawn anew") from error
    if first | {"source": made_with["source"]} != made_with:  # which goes by several names
        raise ValueError(f"{file}: captions made with {first}, not with {made_with}; remove it, or "
                         "give the data set another name, --data NAME=...")
    return kept


def look_and_say(model, tok, files, count, processes, workers):
    """-> ({file: `count` captions of it}, {file: why it cannot be read})"""
    unreadable = {}

    def read(file):
        try:
            return data.read_image(file, model.vpg.image_size)
        except OSError as error:
            unreadable[file] = str(error)

    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        images = list(pool.map(read, files))
    pixels = {file: image for file, image in zip(files, images) if image is not None}
    if not pixels:
        return {}, unreadable
    prompt = torch.tensor([data.prompt_ids(tok, model.vpg.num_query_tokens)])
    with torch.no_grad(), processes.autocast():
        sees = model.see(torch.stack(list(pixels.values())).to(processes.device))
        rows = {name: x.repeat_interleave(count, 0) for name, x in sees.items()}
        answers = model.generate(prompt.expand(len(pixels) * count, -1), **rows, max_new_tokens=LONGEST,
                                 temperature=TEMPERATURE, top_p=TOP_P, stop=transfer.ends(model, tok))
    texts = [tok.decode(answer).strip() for answer in answers]
    captions = [texts[i : i + count] for i in range(0, len(texts), count)]
    return dict(zip(pixels, captions)), unreadable


def sized(pairs):
    """{file: (image, its bytes)} of a data set: another picture in an image's place has another size.
    Of a shard's member that is in its address."""
    files = {os.path.join(pairs.root, image): image for image in pairs.images}
    return {file: (image, os.path.getsize(file) if os.path.isfile(file) else None)
            for file, image in files.items()}


def draw_captions(model, tok, images, pairs, count, file, kept, args, processes):
    """Draws captions for the `images` of a data set, as `sized` has them, that `kept` lacks; appends them
    to `file` and adds them to `kept`. All processes share the work, the first one writes. -> a message
    for each image that cannot be read

    A batch has a seed of its own, whatever --seed, so that a run that was stopped goes on with the
    captions that it would have drawn, given as many processes and --micro-batch."""
    files = list(images)
    share = max(1, args.micro_batch // count)
    problems = []
    starts = range(0, len(files), share * processes.world)
    bar = tqdm(starts, f"captions of {pairs.name}", unit="batch", disable=processes.hides_bars)
    with open(file, "a") if processes.rank == 0 else contextlib.nullcontext() as lines:
        for start in bar:
            batch = files[start : start + share * processes.world]
            if all(images[path] in kept for path in batch):
                continue
            first = share * processes.rank
            mine = [path for path in batch[first : first + share] if images[path] not in kept]
            torch.manual_seed(start + first)
            said, unreadable = look_and_say(model, tok, mine, count, processes, args.workers)
            problems += processes.gather(list(unreadable.values()))
            for path, texts in processes.gather(list(said.items())):
                kept[images[path]] = texts
                if lines:
                    image, size = images[path]
                    lines.write(json.dumps({"image": image, "bytes": size, "captions": texts}) + "\n")
            if lines:
                lines.flush()
            if processes.sum(loop.must_stop())[0]:
                processes.say("stopped while captions were drawn; the same command goes on with them")
                sys.exit(130)
    return problems


def uncaptioned(pictures):
    """Items of images alone -> Pairs, whose captions are still empty."""
    nothing = Strings.of([""] * len(pictures.image))
    return Pairs(pictures.name, pictures.root, pictures.images, nothing, pictures.image,
                 pictures.left_out, pictures.crop)


def with_captions(pairs, kept):
    """A data set with the captions that are kept of its images, {image: texts}; an image without one
    goes."""
    texts, of_image = [], []
    for i, image in enumerate(pairs.images):
        said = [clean_caption(text) for text in kept.get(image, ())]
        said = [text for text in said if text]
        texts += said
        of_image += [i] * len(said)
    if not texts:
        raise ValueError(f"{pairs.name}: the source has not said a word about any of its "
                         f"{len(pairs.images):,} images; look at --src")
    whole = dataclasses.replace(pairs, texts=Strings.of(texts), image=np.array(of_image))
    return whole.subset(np.arange(len(texts)))


def with_placeholders(pairs, count):
    """A data set as with `count` captions an image, of a usual length: before they are drawn."""
    return with_captions(pairs, {image: [PLACEHOLDER] * count for image in pairs.images})


def caption_images(source, count, sets, args, processes):
    """The same data sets with `count` captions of `source`'s own an image, drawn now or kept from
    before. OSError and ValueError say what is wrong, and SystemExit (130) ends a run that was asked to
    stop meanwhile."""
    model, tok = transfer.load_model(source, transfer.DTYPES[args.precision], processes.device)
    fingerprint = hub.fingerprint(dict(model.named_parameters()))
    made_with = {"source": source, "fingerprint": fingerprint, "captions": count,
                 "temperature": TEMPERATURE, "top_p": TOP_P}
    captioned = []
    with loop.stopping_when_asked():
        for pairs in sets:
            file = file_beside(pairs, fingerprint, count)
            with processes.first_goes_first():
                known = [(read_kept(file, made_with), sized(pairs))] if processes.rank == 0 else []
            ((kept, images),) = processes.gather(known)  # others may have another disk
            before = sum(image in kept for image in images.values())
            problems = draw_captions(model, tok, images, pairs, count, file, kept, args, processes)
            there = sum(image in kept for image in images.values())
            processes.say(f"captions: {pairs.name}, {there:,} images with {count} of {source}'s own, "
                          f"{before:,} from before ({file})")
            if problems:
                processes.say(f"captions: {len(problems):,} images cannot be read, the first: {problems[0]}")
            said = {image: kept[image, size] for image, size in images.values() if (image, size) in kept}
            captioned.append(with_captions(pairs, said))
    return captioned
