"""Facts about hub.py, without a network: a cache is a folder like any other."""

import json

import pytest
from huggingface_hub import constants

import hub
from hub import first_files, resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: lookup(tmp_path, repo, file))
    hub.online.cache_clear()
    yield tmp_path
    hub.online.cache_clear()


def snapshot(cache, repo):
    return cache / f"models--{repo.replace('/', '--')}" / "snapshots" / "main"


def lookup(cache, repo, file):
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(repo, file, cache_dir=cache)


def put(cache, repo, **files):
    """Files in the layout of the Hub's cache."""
    folder = snapshot(cache, repo)
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parents[1] / "refs").mkdir(exist_ok=True)
    (folder.parents[1] / "refs" / "main").write_text("main")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_short_names_mean_blip2_as_source_and_opt_as_target(cache):
    source = put(cache, "Salesforce/blip2-opt-2.7b", config__json="{}", tokenizer__json="{}", model__safetensors="")
    target = put(cache, "facebook/opt-2.7b", config__json="{}", vocab__json="{}", merges__txt="", pytorch_model__bin="")
    assert resolve("opt-2.7b", "source").folder == source and resolve("opt-2.7b", "target").llm == target
    assert resolve("facebook/opt-2.7b", "target").llm == target


def test_a_source_needs_only_the_shards_with_its_vpg_and_word_embeddings(cache):
    index = json.dumps({"weight_map": {"vision_model.x": "1__", "language_model.model.decoder.embed_tokens.weight": "2__", "language_model.model.decoder.layers.9.x": "3__"}})
    files = {"config__json": "{}", "tokenizer__json": "{}", "model__safetensors__index__json": index.replace("__", ""), "1": "", "2": ""}
    folder = put(cache, "Salesforce/blip2-opt-6.7b", **files)
    assert resolve("opt-6.7b", "source").folder == folder
    with pytest.raises(FileNotFoundError):  # to caption with it, the rest is needed
        resolve("opt-6.7b", "model")


def test_what_a_role_needs_of_a_tokenizer(cache):
    """Its settings where there are any, nothing else of a repository that lends it, and none of one that has only tokenizer.model."""
    assert first_files({"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "model.safetensors"}) == [
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    lender = put(cache, "huggyllama/llama-7b", config__json="{}", tokenizer__json="{}")
    assert resolve("llama-7b", "tokenizer").tokenizer == lender
    with pytest.raises(FileNotFoundError):  # its weights are not there
        resolve("llama-7b", "target")
    vicuna = put(cache, "lmsys/vicuna-7b-v1.5", config__json="{}", tokenizer__model="", pytorch_model__bin="")
    assert resolve("vicuna-7b", "target").llm == vicuna


def test_a_t5_source_needs_its_word_embeddings(cache):
    index = {"weight_map": {"vision_model.x": "1", "language_model.shared.weight": "2", "language_model.encoder.block.0.x": "3"}}
    folder = put(cache, "Salesforce/blip2-flan-t5-xl", config__json="{}", tokenizer__json="{}", model__safetensors__index__json=json.dumps(index), **{"1": ""})
    with pytest.raises(FileNotFoundError):
        resolve("flan-t5-xl", "source")
    (folder / "2").write_text("")
    assert resolve("flan-t5-xl", "source").folder == folder


@pytest.mark.parametrize("name, role, says", [("opt-6.7b", "target", "facebook/opt-6.7b"), ("opt-2.7b", "source", "vision_model.*")])
def test_without_network_and_cache_the_message_says_what_to_put_where(cache, name, role, says):
    with pytest.raises(FileNotFoundError) as error:
        resolve(name, role)
    assert all(text in str(error.value) for text in (says, str(cache), "hf download", "config.json", "merges.txt", "name the folder instead"))


def test_an_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(FileNotFoundError, match="opt-125m, opt-350m"):
        resolve("opt-6.6b", "target")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        resolve(str(tmp_path), "source")
