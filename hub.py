"""Names to folders: short names, Hub ids, folders in Hugging Face layout, and the folders of our own runs.

    resolve("opt-2.7b", "source").folder      # BLIP-2 OPT-2.7B: the shards with its VPG, projector and word embeddings
    resolve("opt-6.7b", "target").llm         # facebook/opt-6.7b, whole
    resolve("out/a-to-b", "model")            # a run: its weights, and where the ViT and the LLM that belong to it lie

Files come through huggingface_hub and its cache ($HF_HOME); only those that a role needs are fetched. A cache that has
them is used without a network.
"""

import functools
import hashlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

SOURCES = {name: f"Salesforce/blip2-{name}" for name in ("opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl")}
TARGETS = {f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")}
TARGETS |= {f"flan-t5-{size}": f"google/flan-t5-{size}" for size in ("base", "large", "xl", "xxl")}
TARGETS |= {"llama-7b": "huggyllama/llama-7b", "vicuna-7b": "lmsys/vicuna-7b-v1.5", "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
            "mistral-7b": "mistralai/Mistral-7B-v0.3", "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B", "qwen2.5-7b": "Qwen/Qwen2.5-7B",
            "qwen3-8b": "Qwen/Qwen3-8B"}

# The tensors that a role reads, by the beginnings of their names; the source's LLM only lends its word embeddings.
VPG = ("vision_model.", "qformer.", "query_tokens", "language_projection.")
WORDS = tuple(f"language_model.{name}." for name in (
    "model.decoder.embed_tokens", "model.decoder.project_in", "model.embed_tokens", "shared", "encoder.embed_tokens"))
ROLES = {"source": (*VPG, *WORDS), "target": ("",), "model": ("",), "VPG": VPG, "tokenizer": (), "shapes": ()}


@dataclass(frozen=True)
class Place:
    """Where a model lies: the folder with its VPG and projector (of a target: its LLM), with its ViT, with its LLM, and with
    that LLM's tokenizer."""

    name: str
    folder: Path
    vit: Path
    llm: Path
    tokenizer: Path


def read_config(folder):
    """config.json of a folder, as a dict."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; {folder} is neither a checkpoint in Hugging Face layout nor one of our runs")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download or copy it again") from error


def resolve(name, role):
    """A short name, Hub id, folder or run, and what it is for ("source", "target", "model", "VPG", "tokenizer", or of a source only
    its config.json: "shapes") -> Place.

    FileNotFoundError says which files are missing, where they belong, and what else could be done."""
    folder = Path(name)
    if folder.is_dir():
        run = read_config(folder)
        if run.get("model_type") != "vpgtrans" or role == "shapes":
            return Place(name, folder, folder, folder, folder)
        if not {"vit", "llm"} <= run.keys():
            raise ValueError(f"{folder / 'config.json'}: does not name the run's ViT and LLM; it is damaged")
        tokenizer = resolve(run["llm"].get("tokenizer") or run["llm"]["name"], "tokenizer").folder
        if role == "tokenizer":
            return Place(name, tokenizer, tokenizer, tokenizer, tokenizer)
        llm = resolve(run["llm"]["name"], "target").llm
        return Place(name, folder, folder if role == "target" else resolve(run["vit"]["name"], "VPG").vit, llm, tokenizer)
    names = TARGETS if role in ("target", "tokenizer") else SOURCES
    repository = names.get(name, name)
    if repository.count("/") != 1 or repository.startswith((".", "/")):
        kind = "target" if role == "tokenizer" else role
        raise FileNotFoundError(f"{name}: no such folder, and no short name of a {kind}: those are {', '.join(names)}; a Hub id "
                                "reads owner/name")
    folder = fetch(repository, ROLES[role])
    return Place(name, folder, folder, folder, folder)


def lasting_name(name):
    """What a run writes down of a name, so that it is found from anywhere: a folder's absolute path, else the name."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def fingerprint(tensors):
    """A short hash of {name: tensor}: of the ends of every tensor in bfloat16, so that the dtype at hand does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        ends = torch.cat([tensor.flatten()[:8], tensor.flatten()[-8:]]).to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}{ends.float().tolist()}".encode())
    return digest.hexdigest()[:16]


def check_belongs(place, **parts):
    """A run was trained on top of one ViT and one LLM: ValueError if the {name: tensor} of vit=... or llm=... is another by now."""
    run = read_config(place.folder)
    for part, tensors in parts.items():
        if run.get("model_type") == "vpgtrans" and (found := fingerprint(tensors)) != run[part]["fingerprint"]:
            raise ValueError(f"{place.folder}: was trained with the {part} of {run[part]['name']} as it was then (fingerprint "
                             f"{run[part]['fingerprint']}, now {found}); put that one back")


# ---------------------------------------------------------------------------------------------------------------- the Hub


@functools.cache
def online():
    """Does the Hub answer? Asked once, with a short patience: huggingface_hub alone would retry for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def first_files(available):
    """The files of a checkpoint that are read first, given the names of those there are; the last one holds the weights
    or is the index of their shards."""
    tokenizers = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["tokenizer.model"])  # the last cannot be read, but be told apart
    weights = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
    return ["config.json", *next((files for files in tokenizers if available.issuperset(files)), ["tokenizer.json"]),
            *(file for file in ("tokenizer_config.json", "special_tokens_map.json") if file in available),
            next((file for file in weights if file in available), "model.safetensors")]


def shards(index, starts):
    """The files that hold the tensors whose names begin with one of `starts`, by an index file; none if it is no index."""
    if not index.name.endswith(".index.json"):
        return []
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted({file for name, file in weight_map.items() if name.startswith(starts)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged ({error}); delete it, and it is fetched again") from error


def fetch(repository, starts):
    """The folder of a Hub repository in the cache, after fetching the files with the tensors that begin with `starts`.

    Without any `starts` that is config.json and the tokenizer."""
    config = try_to_load_from_cache(repository, "config.json")
    if isinstance(config, str):
        folder = Path(config).parent
        available = {file.name for file in folder.iterdir() if file.exists()}
        needed = first_files(available)[: None if starts else -1]
        if available.issuperset(needed) and available.issuperset(shards(folder / needed[-1], starts)):
            return folder
    if not online():
        raise FileNotFoundError(
            f"{repository}: not (whole) in the cache {constants.HF_HUB_CACHE}, and the Hub cannot be reached. Either run "
            f"`hf download {repository}` where there is a network and copy that cache here, or put these files of "
            f"{constants.ENDPOINT}/{repository} into a folder and name the folder instead: config.json; tokenizer.json (or "
            f"vocab.json and merges.txt); {'' if starts else 'of a target, though not of a --tgt-tokenizer, also '}model.safetensors (or "
            "pytorch_model.bin; where it is sharded, the .index.json and the "
            f"shards with {'all tensors' if starts in ((), ('',)) else ', '.join(start + '*' for start in starts)})")
    try:
        needed = first_files(set(HfApi().list_repo_files(repository)))[: None if starts else -1]
        folder = Path([hf_hub_download(repository, file) for file in needed][0]).parent
        for file in shards(folder / needed[-1], starts):
            hf_hub_download(repository, file)
    except OSError as error:
        raise FileNotFoundError(f"{repository}: {error}; is the name right, and does it need `hf auth login`?") from error
    return folder
