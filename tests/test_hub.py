"""Facts about hub.py, without a network: a cache is a folder like any other."""

import json

import huggingface_hub
import pytest
from conftest import save_image

import hub
import sample
from hub import first_files, resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's, and no network."""

    def look_up(repository, file):
        return huggingface_hub.try_to_load_from_cache(repository, file, cache_dir=tmp_path)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", look_up)
    hub.online.cache_clear()
    yield tmp_path
    hub.online.cache_clear()


def put(cache, repository, files):
    """{name: content}, or names of empty files, in the layout of the Hub's cache. -> their folder"""
    root = cache / f"models--{repository.replace('/', '--')}"
    folder = root / "snapshots" / "main"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("main")
    if not isinstance(files, dict):
        files = dict.fromkeys(files, "")
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "config.json").write_text("{}")
    return folder


def index(**files):
    """model.safetensors.index.json: which file each tensor is in."""
    return json.dumps({"weight_map": files})


def test_short_names_mean_blip2_as_source_and_opt_as_target(cache):
    source = put(cache, "Salesforce/blip2-opt-2.7b", ["tokenizer.json", "model.safetensors"])
    target = put(cache, "facebook/opt-2.7b", ["vocab.json", "merges.txt", "pytorch_model.bin"])
    assert resolve("opt-2.7b", "source").folder == source
    assert resolve("opt-2.7b", "target").llm == target
    assert resolve("facebook/opt-2.7b", "target").llm == target


def test_a_source_needs_only_the_shards_with_its_vpg_and_word_embeddings(cache):
    shards = {
        "vision_model.x": "1",
        "language_model.model.decoder.embed_tokens.weight": "2",
        "language_model.model.decoder.layers.9.x": "3",
    }
    files = {"tokenizer.json": "", "model.safetensors.index.json": index(**shards), "1": "", "2": ""}
    folder = put(cache, "Salesforce/blip2-opt-6.7b", files)
    assert resolve("opt-6.7b", "source").folder == folder
    with pytest.raises(FileNotFoundError):  # to caption with it, the rest is needed
        resolve("opt-6.7b", "model")


def test_a_t5_source_needs_its_word_embeddings(cache):
    shards = {
        "vision_model.x": "1",
        "language_model.shared.weight": "2",
        "language_model.encoder.block.0.x": "3",
    }
    files = {"tokenizer.json": "", "model.safetensors.index.json": index(**shards), "1": ""}
    folder = put(cache, "Salesforce/blip2-flan-t5-xl", files)
    with pytest.raises(FileNotFoundError):
        resolve("flan-t5-xl", "source")
    (folder / "2").write_text("")
    assert resolve("flan-t5-xl", "source").folder == folder


def test_what_a_role_needs_of_a_tokenizer(cache):
    """Its settings where there are any, nothing else of a repository that lends it, and none of one that has
    only tokenizer.model."""
    there = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    assert first_files({*there, "vocab.json"}) == there
    chat = [*there[:3], "chat_template.jinja", "generation_config.json", "model.safetensors"]
    assert first_files({*chat, "README.md"}) == chat
    instruct = put(cache, "Qwen/Qwen2.5-7B-Instruct", chat)
    assert resolve("Qwen/Qwen2.5-7B-Instruct", "target").llm == instruct
    lender = put(cache, "huggyllama/llama-7b", ["tokenizer.json"])
    assert resolve("llama-7b", "tokenizer").tokenizer == lender
    with pytest.raises(FileNotFoundError):  # its weights are not there
        resolve("llama-7b", "target")
    vicuna = put(cache, "lmsys/vicuna-7b-v1.5", ["tokenizer.model", "pytorch_model.bin"])
    assert resolve("vicuna-7b", "target").llm == vicuna
    old = put(cache, "google/t5-v1_1-small", ["spiece.model", "tokenizer_config.json", "pytorch_model.bin"])
    assert resolve("google/t5-v1_1-small", "target").llm == old


@pytest.mark.parametrize("name, role, says", [
    ("opt-6.7b", "target", "facebook/opt-6.7b"),
    ("opt-2.7b", "source", "vision_model.*"),
])
def test_without_network_and_cache_the_message_says_what_to_put_where(cache, name, role, says):
    with pytest.raises(FileNotFoundError) as error:
        resolve(name, role)
    way_out = ("hf download", "config.json", "merges.txt", "chat_template.jinja", "name the folder instead")
    for text in (says, str(cache), *way_out):
        assert text in str(error.value)


@pytest.mark.parametrize("error, says", [
    (hub.HTTPError("half"), "the network broke off (HTTPError('half')); start again, what has come stays"),
    (RuntimeError("xet"), "the network broke off"),
    (ConnectionResetError("reset"), "the network broke off"),
    (PermissionError("gated"), "is the name right, and does it need `hf auth login`?"),
])
@pytest.mark.parametrize("function", ["list_repo_files", "hf_hub_download"])
def test_a_network_that_breaks_off_is_told_from_a_wrong_name(cache, monkeypatch, fails, function, error,
                                                             says):
    def breaks(*_):
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: None)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_: ["config.json"])
    monkeypatch.setattr(hub.HfApi if function == "list_repo_files" else hub, function, breaks)
    fails(sample.main, [str(save_image(cache / "a.png")), "--model", "opt-2.7b"], says)


@pytest.mark.parametrize("name", ["out/demoo", "out/my run"])
def test_a_folder_that_is_not_there_is_said_to_be_none_before_the_hub_is_named(cache, name):
    with pytest.raises(FileNotFoundError, match=f"^{name}: there is no such folder. As a Hub id: "):
        resolve(name, "model")


@pytest.mark.parametrize("part", ["llm", "vit"])
def test_a_run_whose_parts_have_moved_says_where_they_are_named(tmp_path, world, part):
    run = {"model_type": "vpgtrans", "llm": {"name": str(world[1])}, "vit": {"name": str(world[0])}}
    run[part]["name"] = "/gone/there"
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(FileNotFoundError, match="config.json names what is not there: /gone/there"):
        resolve(str(tmp_path), "model")


def test_an_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(FileNotFoundError, match="opt-125m, opt-350m"):
        resolve("opt-6.6b", "target")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        resolve(str(tmp_path), "source")


@pytest.mark.parametrize("name, says", [
    ("adapter_config.json", "merge_and_unload"),
    ("model-Q4.gguf", "gguf_file='model-Q4.gguf'"),
    ("x", "neither"),
])
def test_a_folder_without_a_checkpoint_says_what_it_is_and_the_way_out(tmp_path, name, says):
    (tmp_path / name).write_text("{}")
    for asked in (tmp_path, tmp_path / name):
        with pytest.raises(FileNotFoundError) as error:
            resolve(str(asked), "target")
        assert says in str(error.value)
