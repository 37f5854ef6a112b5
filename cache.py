"""What a frozen network makes of images, computed once and kept on disk, so that training behind it need not run it again.

    cache = FeatureCache("cache/coco", files, shape=(32, 768), dtype=torch.bfloat16, made_with={"VPG": "5f0c..."})
    print(cache.need())                                                        # "118,287 images x 49.2 KB = 5.8 GB, ..."
    cache.fill(read, compute)                     # compute(images (B,3,H,W)) -> (B,32,768), for those that are not there yet
    cache[files[7]]                                                            # (32,768)

VPGTrans uses it in stage 1, where ViT and Q-Former stand still: with the queries at hand only the projector and the LLM run. A
folder holds index.json, which says what the features belong to, and shards of 4,096 images, each written whole or not at all.
"""

import hashlib
import json
import os
import shutil
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

SHARD = 4096  # images a file


def fingerprint_files(files):
    """A short hash of a data set: of all names below their common folder, and of the sizes of a thousand of the files."""
    folder = os.path.dirname(os.path.commonprefix(files))
    size = lambda file: os.path.getsize(file) if os.path.isfile(file) else -1
    sizes = [size(file) for file in files[:: max(1, len(files) // 1000)]]
    return hashlib.sha256(json.dumps([[file[len(folder) :] for file in files], sizes]).encode()).hexdigest()[:16]


class FeatureCache:
    """`files` are image files without doubles, `shape` and `dtype` are of one image's features, and `made_with` says in words
    and numbers what these depend on. ValueError says in what a folder's cache differs."""

    def __init__(self, folder, files, shape, dtype, made_with):
        self.folder, self.files, self.shape, self.dtype = Path(folder), files, tuple(shape), dtype
        self.rows, self.opened = {file: row for row, file in enumerate(files)}, {}
        self.index = made_with | {"data set": fingerprint_files(files), "images": len(files), "features": f"{list(shape)} {dtype}"}
        file = self.folder / "index.json"
        if file.is_file():
            try:
                found = dict(json.loads(file.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file}: damaged ({error}); delete {self.folder}, and it is computed again") from error
            other = [f"{key} {found.get(key)}, not {value}" for key, value in self.index.items() if found.get(key) != value]
            if other:
                raise ValueError(f"{self.folder}: this cache was made with {'; '.join(other)}. Name another folder, or delete this one")

    def shard(self, number):
        return self.folder / f"{number:05d}.safetensors"

    def missing(self):
        """The numbers of the shards that are not there yet, or damaged."""
        def is_whole(number):
            try:
                with safe_open(self.shard(number), framework="pt") as file:
                    return file.get_slice("features").get_shape()[0] == len(self.files[number * SHARD : (number + 1) * SHARD])
            except Exception:  # safetensors has its own kind
                return False

        return [number for number in range(-(-len(self.files) // SHARD)) if not is_whole(number)]

    def need(self):
        """What the cache takes on the disk, in words. OSError where the disk has not that much."""
        each = prod(self.shape) * self.dtype.itemsize
        left = sum(len(self.files[number * SHARD : (number + 1) * SHARD]) for number in self.missing())
        folder = next(f for f in [self.folder, *self.folder.absolute().parents] if f.is_dir())
        free = shutil.disk_usage(folder).free
        size = lambda n: next(f"{n / unit:.1f} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if n >= unit or name == "KB")
        text = f"{len(self.files):,} images x {size(each)} = {size(len(self.files) * each)}, of which {size(left * each)} are still to be computed; " \
               f"{size(free)} are free"
        if left * each > free:
            raise OSError(f"{self.folder}: the cache does not fit on this disk: {text}")
        return text

    def fill(self, read, compute, batch_size=32, workers=0, rank=0, world=1, stop=lambda: False):
        """Computes the shards that are missing, of every `world` of them the one of this `rank`. -> was it done, not ended by stop()?

        read(file) gives the pixels of an image, as a uint8 tensor, or an OSError, which is kept in the place of the features;
        compute((B, ...) of them) gives (B, *shape)."""
        shards = [number for number in self.missing() if number % world == rank]
        rows = [range(number * SHARD, min((number + 1) * SHARD, len(self.files))) for number in shards]
        if shards:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(self.folder / "index.json", lambda file: file.write_text(json.dumps(self.index, indent=2)))
        batches = [r[i : i + batch_size] for r in rows for i in range(0, len(r), batch_size)]
        loader = iter(torch.utils.data.DataLoader(Images(self.files, read), batch_sampler=batches, num_workers=workers, collate_fn=list,
                                                  pin_memory=torch.cuda.is_available()))
        with tqdm(total=sum(map(len, rows)), desc=f"cache {self.folder}", unit="image", disable=None if rank == 0 else True) as bar:
            for number, r in zip(shards, rows):
                features, bad = torch.zeros(len(r), *self.shape, dtype=self.dtype), {}
                for start in range(0, len(r), batch_size):
                    if stop():
                        return False
                    images = next(loader)
                    good = [i for i, image in enumerate(images) if not isinstance(image, str)]
                    bad |= {start + i: image for i, image in enumerate(images) if isinstance(image, str)}
                    if good:
                        features[start + torch.tensor(good)] = compute(torch.stack([images[i] for i in good])).to("cpu", self.dtype)
                    bar.update(len(images))
                self.write(self.shard(number), lambda file: save_file({"features": features}, file, metadata={"bad": json.dumps(bad)}))
        return True

    @staticmethod
    def write(file, save):
        """Under another name first, so that a kill or a full disk leaves no half of a file."""
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            save(temporary)
            os.replace(temporary, file)
        except Exception as error:  # safetensors has its own kind
            raise OSError(f"{file}: cannot be written ({error}); what is in the cache already stays") from error
        finally:
            temporary.unlink(missing_ok=True)

    def __getitem__(self, file):
        """The features of an image file. OSError if the image could not be read, as it would say itself."""
        number, row = divmod(self.rows[file], SHARD)
        if number not in self.opened:
            shard = safe_open(self.shard(number), framework="pt")
            self.opened[number] = shard.get_slice("features"), json.loads(shard.metadata()["bad"])
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
