# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""What a frozen network makes of images, computed once and kept on disk, so that training behind it
need not run it again.

    made_with = {"VPG": "5f0c..."}
    cache = FeatureCache("cache/coco", files, shape=(32, 768), dtype=torch.bfloat16, made_with=made_with)
    whole, left = cache.need()          # bytes on the disk, before it is begun
    cache.fill(read, compute)           # compute(images (B,3,H,W)) -> (B,32,768), for those not there yet
    cache[files[7]]                     # (32,768)

VPGTrans uses it in stage 1, where ViT and Q-Former stand still: with the queries at hand only the
projector and the LLM run. A folder holds index.json, which says what the features belong to, and
shards of 4,096 images, each written whole or not at all.
"""

import hashlib
import json
import math
import os
import uuid
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

SHARD = 4096  # images a file


def fingerprint_files(files):
    """A short hash of a data set: of all names below their common folder, and of the sizes of a
    thousand of the files."""
    folder = os.path.dirname(os.path.commonprefix(files))
    names = [file[len(folder) :] for file in files]
    some = files[:: max(1, len(files) // 1000)]
    sizes = [os.path.getsize(file) if os.path.isfile(file) else -1 for file in some]
    return short_hash([names, sizes])


def short_hash(values):
    """Of what JSON can hold: 16 hexadecimal digits."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class FeatureCache:
    """`files` are image files without duplicates, `shape` and `dtype` are of one image's features,
    and `made_with` says in words and numbers what these depend on. ValueError says in what a
    folder's cache differs."""

    def __init__(self, folder, files, shape, dtype, made_with):
        self.folder = Path(folder)
        self.files = files
        self.shape = tuple(shape)
        self.dtype = dtype
        self.rows = {file: row for row, file in enumerate(files)}
        self.opened = {}
        self.index = made_with | {
            "data set": fingerprint_files(files),
            "images": len(files),
            "features": f"{list(shape)} {dtype}"}
        self.identity = short_hash(self.index)
        self.check()

    def check(self):
        """ValueError where the folder holds the cache of something else."""
        file = self.folder / "index.json"
        if not file.is_file():
            return
        try:
            found = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete {self.folder}, and it is computed "
                             "again") from error
        differs = [key for key, value in self.index.items() if found.get(key) != value]
        if differs:
            made_with = "; ".join(f"{key} {found.get(key)}, not {self.index[key]}" for key in differs)
            raise ValueError(f"{self.folder}: this cache was made with {made_with}. Name another folder, or "
                             "delete this one")

    def shard(self, number):
        """The file of a shard."""
        return self.folder / f"{number:05d}.safetensors"

    def length(self, number):
        """The number of images of a shard."""
        return min(SHARD, len(self.files) - number * SHARD)

    def read_shard(self, number):
        """(features, of which slices can be read; {row: why its image could not be read}) or None:
        not there, damaged, another's."""
        try:
            shard = safe_open(self.shard(number), framework="pt")
            metadata = shard.metadata()
            if metadata["identity"] != self.identity:
                return None
            return shard.get_slice("features"), json.loads(metadata["bad"])
        except Exception:  # safetensors has its own kind
            return None

    def to_do(self):
        """{shard: rows of it to compute}: all where it is missing, else those whose image could not
        be read when it was made."""
        todo = {}
        for number in range(math.ceil(len(self.files) / SHARD)):
            found = self.read_shard(number)
            if found is None:
                todo[number] = list(range(self.length(number)))
                continue
            _, bad = found
            if bad:
                todo[number] = sorted(map(int, bad))
        return todo

    def need(self):
        """(bytes of the whole cache, bytes that are still to be computed)"""
        each = math.prod(self.shape) * self.dtype.itemsize
        left = sum(len(rows) for rows in self.to_do().values())
        return len(self.files) * each, left * each

    def fill(self, read, compute, batch_size=32, workers=0, rank=0, world=1, stop=lambda: False):
        """Computes what is missing; of `world` processes each takes the shards with number % world
        == rank. -> False if stop() ended it.

        read(file) gives the pixels of an image, as a uint8 tensor, or an OSError, which is kept in
        the place of the features and tried again the next time; compute((B, ...) of them) gives (B,
        *shape)."""
        self.check()
        todo = {number: rows for number, rows in self.to_do().items() if number % world == rank}
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / "index.json"
        if not index.exists():
            self.write(index, lambda file: file.write_text(json.dumps(self.index, indent=2)))
        batches = [(number, few) for number, rows in todo.items() for few in in_batches(rows, batch_size)]
        numbers = [[number * SHARD + row for row in few] for number, few in batches]
        images = iter(torch.utils.data.DataLoader(
            Images(self.files, read), batch_sampler=numbers, num_workers=workers, collate_fn=list,
            pin_memory=torch.cuda.is_available()))
        total = sum(len(few) for _, few in batches)
        hidden = None if rank == 0 else True  # None: where nobody looks at a terminal
        with tqdm(total=total, desc=f"cache {self.folder}", unit="image", disable=hidden) as bar:
            for number, rows in todo.items():
                found = self.read_shard(number)
                new = torch.zeros(self.length(number), *self.shape, dtype=self.dtype)
                features = new if found is None else found[0][:]
                bad = {}
                for few in in_batches(rows, batch_size):
                    if stop():
                        return False
                    bad |= self.compute_rows(features, few, next(images), compute)
                    bar.update(len(few))
                if found is None or len(bad) < len(rows):
                    self.write_shard(number, features, bad)
        return True

    def compute_rows(self, features, rows, images, compute):
        """Puts the features of these images into these rows. -> {row: why its image could not be
        read}"""
        bad = {row: image for row, image in zip(rows, images, strict=True) if isinstance(image, str)}
        good = [row for row in rows if row not in bad]
        if good:
            pixels = torch.stack([image for image in images if not isinstance(image, str)])
            features[good] = compute(pixels).to("cpu", self.dtype)
        return bad

    def write_shard(self, number, features, bad):
        metadata = {"bad": json.dumps(bad), "identity": self.identity}
        tensors = {"features": features}
        self.write(self.shard(number), lambda file: save_file(tensors, file, metadata=metadata))

    @staticmethod
    def write(file, save):
        """Under another name first, so that a kill or a full disk leaves no half of a file."""
        temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors makes files that only their owner may read
            save(temporary)
            temporary.chmod(mode)
            os.replace(temporary, file)
        except Exception as error:  # safetensors has its own kind
            message = f"{file}: cannot be written ({error}); what is in the cache already stays"
            raise OSError(message) from error
        finally:
            temporary.unlink(missing_ok=True)

    def __getitem__(self, file):
        """The features of an image file. OSError if the image could not be read, as it would say
        itself."""
        number, row = divmod(self.rows[file], SHARD)
        if number not in self.opened:
            self.opened[number] = self.read_shard(number)
            if self.opened[number] is None:
                raise ValueError(f"{self.shard(number)}: missing or damaged since the cache was filled; "
                                 "start again, and it is computed anew")
        features, bad = self.opened[number]
        if str(row) in bad:
            raise OSError(bad[str(row)])
        return features[row]


def in_batches(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Images(torch.utils.data.Dataset):
    """The pixels of files, or the message of one that cannot be read."""

    def __init__(self, files, read):
        self.files, self.read = files, read

    def __getitem__(self, i):
        try:
            return self.read(self.files[i])
        except OSError as error:
            return str(error)
