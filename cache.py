# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""What a frozen network makes of images, computed once and kept on disk, so that training behind it
need not run it again.

    cache = FeatureCache("cache/coco", files, shape=(32, 768), dtype=torch.bfloat16, made_with={"VPG": "5f0c..."})
    whole, left = cache.need()                                                        # bytes on the disk, before it is begun
    cache.fill(read, compute)                     # compute(images (B,3,H,W)) -> (B,32,768), for those that are not there yet
    cache[files[7]]                                                            # (32,768)

VPGTrans uses it in stage 1, where ViT and Q-Former stand still: with the queries at hand only the
projector and the LLM run. A folder holds index.json, which says what the features belong to, and
shards of 4,096 images, each written whole or not at all.
"""

import hashlib
import json
import os
import uuid
from math import prod
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
    size = lambda file: os.path.getsize(file) if os.path.isfile(file) else -1
    sizes = [size(file) for file in files[:: max(1, len(files) // 1000)]]
    return hashlib.sha256(json.dumps([[file[len(folder) :] for file in files], sizes]).encode()).hexdigest()[:16]


class FeatureCache:
    """`files` are image files without doubles, `shape` and `dtype` are of one image's features, and
    `made_with` says in words and numbers what these depend on. ValueError says in what a folder's
    cache differs."""

    def __init__(self, folder, files, shape, dtype, made_with):
        self.folder, self.files, self.shape, self.dtype = Path(folder), files, tuple(shape), dtype
        self.rows, self.opened = {file: row for row, file in enumerate(files)}, {}
        self.index = made_with | {"data set": fingerprint_files(files), "images": len(files), "features": f"{list(shape)} "
                                                                                                          f"{dtype}"}
        self.identity = hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()[:16]
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
        other = [f"{key} {found.get(key)}, not {value}" for key, value in self.index.items() if found.get(key) != value]
        if other:
            raise ValueError(f"{self.folder}: this cache was made with {'; '.join(other)}. Name "
                             "another folder, or delete this one")

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
            features, metadata = shard.get_slice("features"), shard.metadata()
            return (features, json.loads(metadata["bad"])) if metadata["identity"] == self.identity else None
        except Exception:  # safetensors has its own kind
            return None

    def to_do(self):
        """{shard: rows of it to compute}: all where it is missing, else those whose image could not
        be read when it was made."""
        todo = {}
        for number in range(-(-len(self.files) // SHARD)):
            found = self.read_shard(number)
            rows = sorted(map(int, found[1])) if found else list(range(self.length(number)))
            if rows:
                todo[number] = rows
        return todo

    def need(self):
        """(bytes of the whole cache, bytes that are still to be computed)"""
        each = prod(self.shape) * self.dtype.itemsize
        return len(self.files) * each, sum(map(len, self.to_do().values())) * each

    def fill(self, read, compute, batch_size=32, workers=0, rank=0, world=1, stop=lambda: False):
        """Computes what is missing; of `world` processes each takes the shards with number % world
        == rank. -> False if stop() ended it.

        read(file) gives the pixels of an image, as a uint8 tensor, or an OSError, which is kept in
        the place of the features and tried again the next time; compute((B, ...) of them) gives (B,
        *shape)."""
        self.check()
        todo = {number: rows for number, rows in self.to_do().items() if number % world == rank}
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "index.json").exists():
            self.write(self.folder / "index.json", lambda file: file.write_text(json.dumps(self.index, indent=2)))
        batches = [[number * SHARD + row for row in rows[i : i + batch_size]] for number, rows in todo.items() for i in range(0, len(rows), batch_size)]
        loader = iter(torch.utils.data.DataLoader(Images(self.files, read), batch_sampler=batches, num_workers=workers, collate_fn=list,
                                                  pin_memory=torch.cuda.is_available()))
        with tqdm(total=sum(map(len, batches)), desc=f"cache {self.folder}", unit="image", disable=None if rank == 0 else True) as bar:
            for number, rows in todo.items():
                found, bad = self.read_shard(number), {}
                features = found[0][:] if found else torch.zeros(self.length(number), *self.shape, dtype=self.dtype)
                for start in range(0, len(rows), batch_size):
                    if stop():
                        return False
                    images = dict(zip(rows[start : start + batch_size], next(loader), strict=True))
                    bad |= {row: image for row, image in images.items() if isinstance(image, str)}
                    good = [row for row in images if row not in bad]
                    if good:
                        features[good] = compute(torch.stack([images[row] for row in good])).to("cpu", self.dtype)
                    bar.update(len(images))
                if not found or len(bad) < len(rows):
                    metadata = {"bad": json.dumps(bad), "identity": self.identity}
                    self.write(self.shard(number), lambda file: save_file({"features": features}, file, metadata=metadata))
        return True

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
            raise OSError(f"{file}: cannot be written ({error}); what is in the cache already "
                          "stays") from error
        finally:
            temporary.unlink(missing_ok=True)

    def __getitem__(self, file):
        """The features of an image file. OSError if the image could not be read, as it would say
        itself."""
        number, row = divmod(self.rows[file], SHARD)
        if number not in self.opened:
            self.opened[number] = self.read_shard(number)
            if self.opened[number] is None:
                raise ValueError(f"{self.shard(number)}: missing or damaged since the cache was "
                                 "filled; start again, and it is computed anew")
        features, bad = self.opened[number]
        if str(row) in bad:
            raise OSError(bad[str(row)])
        return features[row]


class Images(torch.utils.data.Dataset):
    """The pixels of files, or the message of one that cannot be read."""

    def __init__(self, files, read):
        self.files, self.read = files, read

    def __getitem__(self, i):
        try:
            return self.read(self.files[i])
        except OSError as error:
            return str(error)
