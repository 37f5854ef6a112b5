# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""Names to folders: short names, Hub ids, folders in Hugging Face layout, and the folders of our
own runs.

    resolve("opt-2.7b", "source").folder   # BLIP-2: the shards with VPG, projector, word embeddings
    resolve("opt-6.7b", "target").llm      # facebook/opt-6.7b, whole
    resolve("out/a-to-b", "model")         # a run: its weights, and where its ViT and LLM lie

Files come through huggingface_hub and its cache ($HF_HOME); only those that a role needs are
fetched. A cache that has them is used without a network.
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
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

BLIP2 = ("opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl")
OPT = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
FLAN_T5 = ("base", "large", "xl", "xxl")
SOURCES = {name: f"Salesforce/blip2-{name}" for name in BLIP2}
TARGETS = {
    **{f"opt-{size}": f"facebook/opt-{size}" for size in OPT},
    **{f"flan-t5-{size}": f"google/flan-t5-{size}" for size in FLAN_T5},
    "llama-7b": "huggyllama/llama-7b",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}

RUNS = ("vpgtrans", "memvp")  # model_type in the config.json of our runs

# The tensors that a role reads, by the beginnings of their names; the source's LLM only lends its
# word embeddings.
VPG_TENSORS = ("vision_model.", "qformer.", "query_tokens", "language_projection.")
WORD_TENSORS = (
    "language_model.model.decoder.embed_tokens.",
    "language_model.model.decoder.project_in.",
    "language_model.model.embed_tokens.",
    "language_model.shared.",
    "language_model.encoder.embed_tokens.",
)
ROLES = {
    "source": (*VPG_TENSORS, *WORD_TENSORS),
    "target": ("",),
    "model": ("",),
    "vpg": VPG_TENSORS,
    "tokenizer": (),
    "shapes": (),
}


@dataclass(frozen=True)
class Place:
    """Where a model lies: the folder with its VPG and projector (of a target: its LLM), with its
    ViT, with its LLM, and with that LLM's tokenizer."""

    name: str
    folder: Path
    vit: Path
    llm: Path
    tokenizer: Path


def what_else(folder):
    """What a folder without config.json is, and the way out, for people."""
    if (folder / "adapter_config.json").is_file():
        return ("this is an adapter (PEFT, LoRA) without its language model. Merge it, with peft's "
                "merge_and_unload() and save_pretrained(), and name the folder that this makes")
    if gguf := sorted(folder.glob("*.gguf")):
        return ("this is a GGUF file of llama.cpp. Convert it, with transformers' from_pretrained("
                f"{str(folder)!r}, gguf_file={gguf[0].name!r}) and save_pretrained() of model and "
                "tokenizer, and name the folder that this makes")
    return f"{folder} is neither a checkpoint in Hugging Face layout nor one of our runs"


def read_config(folder):
    """config.json of a folder, as a dict."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; {what_else(Path(folder))}")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download or copy it again") from error


def resolve(name, role):
    """A short name, Hub id, folder or run, and what it is for, a key of ROLES -> Place. ("shapes" of
    a run reads its config.json alone, else what "tokenizer" does.)

    FileNotFoundError says which files are missing, where they belong, and what else could be
    done."""
    folder = Path(name)
    if folder.is_dir():
        run = read_config(folder)
        if run.get("model_type") not in RUNS or role == "shapes":
            return Place(name, folder, folder, folder, folder)
        if not {"vit", "llm"} <= run.keys():
            raise ValueError(f"{folder / 'config.json'}: does not name the run's ViT and LLM; it "
                             "is damaged")
        try:
            tokenizer = resolve(run["llm"].get("tokenizer") or run["llm"]["name"], "tokenizer").folder
            if role == "tokenizer":
                return Place(name, tokenizer, tokenizer, tokenizer, tokenizer)
            llm = resolve(run["llm"]["name"], "target").llm
            vit = folder if role == "target" else resolve(run["vit"]["name"], "vpg").vit
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder / 'config.json'} names what is not there: {error}. What has "
                                    "moved is put back, or named anew in that file") from error
        return Place(name, folder, vit, llm, tokenizer)
    names = TARGETS if role in ("target", "tokenizer") else SOURCES
    if folder.is_file():
        raise FileNotFoundError(f"{name}: is a file, not a folder in Hugging Face layout; "
                                f"{what_else(folder.parent)}")
    repository = names.get(name, name)
    if repository.count("/") != 1 or repository.startswith((".", "/")):
        kind = {"tokenizer": "target", "shapes": "model"}.get(role, role)
        raise FileNotFoundError(f"{name}: no such folder, and no short name of a {kind}: those are "
                                f"{', '.join(names)}; a Hub id reads owner/name")
    try:
        folder = fetch(repository, ROLES[role])
    except (FileNotFoundError, HFValidationError) as error:  # the second: it cannot be a Hub id
        if name in names:
            raise
        raise FileNotFoundError(f"{name}: there is no such folder. As a Hub id: {error}") from error
    return Place(name, folder, folder, folder, folder)


def lasting_name(name):
    """What a run writes down of a name, so that it is found from anywhere: a folder's absolute
    path, else the name."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def fingerprint(tensors):
    """A short hash of {name: tensor}: of the ends of every tensor in bfloat16, so that the dtype at
    hand does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        ends = torch.cat([tensor.flatten()[:8], tensor.flatten()[-8:]]).to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}{ends.float().tolist()}".encode())
    return digest.hexdigest()[:16]


def check_belongs(place, **parts):
    """A run was trained on top of one ViT and one LLM: ValueError if the {name: tensor} of vit=...
    or llm=... is another by now."""
    run = read_config(place.folder)
    if run.get("model_type") != "vpgtrans":
        return
    for part, tensors in parts.items():
        check_fingerprint(place.folder, run, part, fingerprint(tensors))


def check_fingerprint(folder, run, part, found):
    """ValueError if a run, by its config.json, was trained with a "vit" or "llm" of another
    fingerprint."""
    if found != run[part]["fingerprint"]:
        raise ValueError(f"{folder}: was trained with the {part} of {run[part]['name']} "
                         f"as it was then (fingerprint {run[part]['fingerprint']}, now "
                         f"{found}); put that one back")


# ------------------------------------------------------------------------------------------ the Hub


@functools.cache
def online():
    """Does the Hub answer? Asked once, with a short patience: huggingface_hub alone would retry for
    half a minute."""
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
    """The files of a checkpoint that are read first, given the names of those there are; the last
    one holds the weights or is the index of their shards."""
    # SentencePiece's files cannot be read, but they are fetched so that they can be named
    tokenizers = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["tokenizer.model"], ["spiece.model"])
    settings = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                "generation_config.json")
    weights = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
               "pytorch_model.bin")
    there = [files for files in tokenizers if available.issuperset(files)]
    return [
        "config.json",
        *(there[0] if there else ["tokenizer.json"]),
        *(file for file in settings if file in available),
        next((file for file in weights if file in available), "model.safetensors"),
    ]


def shards(index, starts):
    """The files that hold the tensors whose names begin with one of `starts`, by an index file;
    none if it is no index."""
    if not index.name.endswith(".index.json"):
        return []
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted({file for name, file in weight_map.items() if name.startswith(starts)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged ({error}); delete it, and it is fetched "
                         "again") from error


def fetch(repository, starts):
    """The folder of a Hub repository in the cache, after fetching the files with the tensors that
    begin with `starts`.

    Without any `starts` that is config.json and the tokenizer."""
    config = try_to_load_from_cache(repository, "config.json")
    if isinstance(config, str):
        folder = Path(config).parent
        available = {file.name for file in folder.iterdir() if file.exists()}
        needed = first_files(available)[: None if starts else -1]
        needed += shards(folder / needed[-1], starts) if available.issuperset(needed) else []
        if available.issuperset(needed):
            return folder
    if not online():
        of_target = "" if starts else "of a target, though not of a --tgt-tokenizer, also "
        tensors = ", ".join(start + "*" for start in starts if start) or "all tensors"
        raise FileNotFoundError(
            f"{repository}: not (whole) in the cache {constants.HF_HUB_CACHE}, and the Hub cannot "
            f"be reached. Either run `hf download {repository}` where there is a network and copy "
            f"that cache here, or put these files of {constants.ENDPOINT}/{repository} into a "
            "folder and name the folder instead: config.json; tokenizer.json (or vocab.json and "
            "merges.txt), with tokenizer_config.json, special_tokens_map.json, chat_template.jinja and "
            f"generation_config.json, as far as they are there; {of_target}model.safetensors (or "
            "pytorch_model.bin; where it is sharded, the .index.json and the shards with "
            f"{tensors})")
    try:
        needed = first_files(set(HfApi().list_repo_files(repository)))[: None if starts else -1]
        paths = [hf_hub_download(repository, file) for file in needed]
        folder = Path(paths[0]).parent
        for file in shards(folder / needed[-1], starts):
            hf_hub_download(repository, file)
    except (OSError, HTTPError, RuntimeError) as error:  # the two are of what huggingface_hub fetches with
        of_network = (ConnectionError, TimeoutError, LocalEntryNotFoundError)
        if not isinstance(error, OSError) or isinstance(error, of_network):
            raise OSError(f"{repository}: the network broke off ({error!r}); start again, what has come "
                          f"stays in the cache {constants.HF_HUB_CACHE}") from error
        raise FileNotFoundError(f"{repository}: {error}; is the name right, and does it need `hf "
                                "auth login`?") from error
    return folder
