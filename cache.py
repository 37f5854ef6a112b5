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

import collections
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing.pool
import os
import time
import uuid
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

SHARD = 4096  # images a file
LOOK_EVERY = 5  # seconds; between looks at whether a cache that waits for an image is to stop
LONGEST_WAIT = 600  # seconds, for an image


def fingerprint_files(files):
    """A short hash of a data set: of all names below their common folder, and of the sizes of a
    thousand of the files."""
    folder = os.path.dirname(os.path.commonprefix(files))
    names = [file[len(folder) :] for file in files]
    some = files[:: max(1, len(files) // 1000)]
    sizes = [os.path.getsize(file) if os.path.isfile(file) else -1 for file in some]
    return short_hash([names, sizes])


def never():
    return False


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

    def fill(self, read, compute, batch_size=32, workers=0, rank=0, world=1, stop=never):
        """Computes what is missing; of `world` processes each takes the shards with number % world
        == rank. -> False if stop() ended it.

        read(file) gives the pixels of an image, as a uint8 tensor, or an OSError, which is kept in
        the place of the features and tried again the next time; compute((B, ...) of them) gives (B,
        *shape). `workers` threads read ahead. OSError if nothing comes from them any more."""
        self.check()
        todo = {number: rows for number, rows in self.to_do().items() if number % world == rank}
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / "index.json"
        if not index.exists():
            self.write(index, lambda file: file.write_text(json.dumps(self.index, indent=2)))
        files = [self.files[number * SHARD + row] for number, rows in todo.items() for row in rows]
        images = read_ahead(read, files, workers, 2 * batch_size, stop)
        hidden = None if rank == 0 else True  # None: where nobody looks at a terminal
        bar = tqdm(total=len(files), desc=f"cache {self.folder}", unit="image", disable=hidden)
        with bar, contextlib.closing(images):
            for number, rows in todo.items():
                found = self.read_shard(number)
                new = torch.zeros(self.length(number), *self.shape, dtype=self.dtype)
                features = new if found is None else found[0][:]
                bad = {}
                for few in in_batches(rows, batch_size):
                    some = list(itertools.islice(images, len(few)))
                    if len(some) < len(few) or stop():
                        return False
                    bad |= self.compute_rows(features, few, some, compute)
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


def read_ahead(read, files, workers, most, stop):
    """Yields read(file) of each file, or the message of its OSError, until stop() says so while it
    waits. So many threads read at most so many images ahead: decoders work outside of Python's lock."""
    def read_or_message(file):
        try:
            return read(file)
        except OSError as error:
            return str(error)

    if not workers:
        yield from map(read_or_message, files)
        return
    files = iter(files)
    # threads of such a pool end with the process, also where they hang in the storage
    with multiprocessing.pool.ThreadPool(workers) as pool:
        def begin(file):
            return file, pool.apply_async(read_or_message, [file])

        ahead = collections.deque(map(begin, itertools.islice(files, most)))
        while ahead:
            image = wait_for(*ahead.popleft(), stop)
            if image is None:
                return
            ahead.extend(map(begin, itertools.islice(files, 1)))
            yield image


def wait_for(file, reading, stop):
    """What comes of reading a file; None if stop() says so meanwhile. OSError where its storage does
    not answer."""
    began = time.monotonic()
    while True:
        try:
            return reading.get(LOOK_EVERY)
        except multiprocessing.TimeoutError:
            if stop():
                return None
        if time.monotonic() - began > LONGEST_WAIT:
            raise OSError(f"{file}: has not been read for {LONGEST_WAIT:,} seconds: look at whether its "
                          "storage answers; what was done before stays")
