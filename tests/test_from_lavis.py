"""Facts about export.py --from-lavis: files with the names and shapes that LAVIS and the original
VPGTrans save become the same BLIP-2 that transformers wrote."""

import json
import re
import shutil

import pytest
import torch
from conftest import T5_CONFIG, edit_config, make_model, write_kind
from safetensors.torch import load_file

import export
import qformer
import transfer


def theirs(name):
    """BLIP-2's name of a tensor in Hugging Face layout -> LAVIS's, written from its modules."""
    vit = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.*)", name)
    if vit:
        inside = vit[2].replace("layer_norm", "norm").replace("self_attn", "attn")
        return f"visual_encoder.blocks.{vit[1]}.{inside.replace('projection', 'proj')}"
    fixed = {
        "query_tokens": "query_tokens",
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding.weight": "visual_encoder.patch_embed.proj.weight",
        "vision_model.embeddings.patch_embedding.bias": "visual_encoder.patch_embed.proj.bias",
        "vision_model.post_layernorm.weight": "ln_vision.weight",
        "vision_model.post_layernorm.bias": "ln_vision.bias",
        "qformer.layernorm.weight": "Qformer.bert.embeddings.LayerNorm.weight",
        "qformer.layernorm.bias": "Qformer.bert.embeddings.LayerNorm.bias",
    }
    if name in fixed:
        return fixed[name]
    name = name.replace("attention.attention.", "attention.self.")  # crossattention's, too
    return name.replace("qformer.encoder", "Qformer.bert.encoder")


def as_lavis(tensors, projector="opt_proj"):
    """{BLIP-2's name: tensor} -> what LAVIS's model of it has, LLM aside."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("language_projection."):
            state[name.replace("language_projection", projector)] = tensor
        elif name.endswith("self_attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            state[theirs(name).replace("qkv.bias", "q_bias")] = q
            state[theirs(name).replace("qkv.bias", "v_bias")] = v
        elif not name.startswith("language_model."):
            state[theirs(name)] = tensor
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def is_vit(name):
    return name.startswith("visual_encoder.")


@pytest.fixture
def original(world):
    """The tensors of a random BLIP-2 as transformers wrote them; LAVIS's ViT has no bias of keys."""
    tensors = load_file(world[0] / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("self_attn.qkv.bias"):
            third = len(tensor) // 3
            tensor[third : 2 * third] = 0
    return tensors


def save(file, state):
    """As runner_base.py saves."""
    optimizer = {"state": {}, "param_groups": []}
    config = {"run": {"seed": 1}}
    torch.save({"model": state, "optimizer": optimizer, "config": config, "scaler": None, "epoch": 3}, file)
    return str(file)


def run(*arguments):
    export.main([str(argument) for argument in arguments])


def test_a_file_with_its_vit_becomes_the_same_blip2(world, original, tmp_path):
    file = save(tmp_path / "checkpoint_best.pth", as_lavis(original))
    # the ViT's depth and heads are no tensors' shapes: the tiny one's come from its folder
    config = qformer.read_vpg_config(world[0])
    tensors = export.read_lavis(file)
    ours = {name: x for name, x in original.items() if not name.startswith("language_model.")}
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], ours[name]) for name in ours)
    assert export.lavis_config(tensors, world[0])["num_query_tokens"] == config["num_query_tokens"]


@pytest.mark.parametrize("projector", ["opt_proj", "t5_proj", "llama_proj"])
def test_a_file_without_its_vit_takes_a_blip2s(world, original, tmp_path, projector, capsys):
    """The exported folder says what the source of the file says, and its tensors are the file's."""
    trained = {name: x + 0.5 for name, x in as_lavis(original, projector).items() if not is_vit(name)}
    trained["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    trained["llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    file = save(tmp_path / "checkpoint_4.pth", trained)
    options = ("--llm", world[1], "--vit", world[0], "--precision", "fp32")
    if projector == "opt_proj":  # the file's LLM is 40 wide, the target's 32
        with pytest.raises(SystemExit):
            run("--from-lavis", file, tmp_path / "wrong", *options)
        assert "projector.bias is (40,), config.json says (32,)" in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()
    trained[f"{projector}.weight"] = torch.randn(32, 32)
    trained[f"{projector}.bias"] = torch.randn(32)
    run("--from-lavis", save(tmp_path / "checkpoint_4.pth", trained), tmp_path / "out", *options)
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["language_projection.weight"], trained[f"{projector}.weight"])
    back = as_lavis(written, projector)
    for name, tensor in trained.items():
        if "inv_freq" not in name:
            assert torch.equal(back[name], tensor), name
    for name, tensor in load_file(world[0] / "model.safetensors").items():
        if qformer.is_frozen(name):
            assert torch.equal(written[name], tensor), name
    model, tok = transfer.load_model(str(tmp_path / "out"), torch.float32)
    assert len(transfer.answer(model, tok, torch.zeros(1, 3, 28, 28, dtype=torch.uint8))) == 1


def without_vit(original):
    """What LAVIS saves of a model whose ViT is frozen, with a projector for the target's width."""
    state = {name: x for name, x in as_lavis(original).items() if not is_vit(name)}
    return state | {"opt_proj.weight": torch.randn(32, 32), "opt_proj.bias": torch.randn(32)}


def test_a_projector_in_a_file_of_its_own(world, original, tmp_path):
    """As the original's proj_weight_path, whose OPT file has an entry without a tensor."""
    state = without_vit(original)
    projector = {"opt_proj.weight": torch.randn(32, 32), "opt_proj.bias": torch.randn(32),
                 "query_tokens": torch.ones(1), "opt_model.lm_head.weight": None}
    files = save(tmp_path / "q.pth", state), save(tmp_path / "p.pth", projector)
    run("--from-lavis", files[0], tmp_path / "out", "--llm", world[1], "--vit", world[0],
        "--projector", files[1], "--precision", "fp32")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["language_projection.weight"], projector["opt_proj.weight"])
    assert torch.equal(written["query_tokens"], state["query_tokens"])


def test_the_names_and_shapes_of_the_originals_are_those_of_blip2_vit_g():
    """All of LAVIS's names for ViT-g and a BERT-base Q-Former, without their gigabytes."""
    with torch.device("meta"):
        ours = qformer.VPG({}).state_dict()
    state = as_lavis(ours)
    depth, width = 39, 1408
    assert state["visual_encoder.pos_embed"].shape == (1, 257, width)
    assert state[f"visual_encoder.blocks.{depth - 1}.attn.qkv.weight"].shape == (3 * width, width)
    assert state["visual_encoder.blocks.0.attn.q_bias"].shape == (width,)
    assert state["visual_encoder.blocks.0.mlp.fc1.weight"].shape == (6144, width)
    assert state["Qformer.bert.encoder.layer.10.crossattention.self.key.weight"].shape == (768, width)
    assert state["Qformer.bert.encoder.layer.11.output_query.LayerNorm.bias"].shape == (768,)
    assert state["query_tokens"].shape == (1, 32, 768)
    renamed = export.rename(state)
    assert renamed.keys() == ours.keys()
    assert all(renamed[name].shape == ours[name].shape for name in ours)


def test_t5_has_the_exact_gelu_as_laviss_has(world, original, tmp_path):
    """google's config.json of Flan-T5 means the tanh form; LAVIS and the original set dense_act_fn."""
    write_kind(tmp_path / "t5", "Unigram")
    tokens = (tmp_path / "t5/tokenizer_config.json").read_text()
    make_model(tmp_path / "t5", T5_CONFIG | {"vocab_size": 160})  # as many as the tokenizer has, or more
    (tmp_path / "t5/tokenizer_config.json").write_text(tokens)
    width = T5_CONFIG["d_model"]
    state = {name: x for name, x in without_vit(original).items() if "opt_proj" not in name}
    state |= {"t5_proj.weight": torch.randn(width, 32), "t5_proj.bias": torch.randn(width)}
    file = save(tmp_path / "a.pth", state)
    run("--from-lavis", file, tmp_path / "out", "--llm", tmp_path / "t5", "--vit", world[0])
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["dense_act_fn"] == "gelu"


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize("change, complaint", [
    (drop("query_tokens"), "1 tensors missing, the first: vpg.query_tokens"),
    (drop("opt_proj.bias"), "1 tensors missing, the first: projector.bias"),
    (drop("Qformer.bert.encoder.layer.1.attention.self.query.weight"),
     "missing, the first: vpg.qformer.encoder.layer.1.attention.attention.query.weight"),
    (put("Qformer.cls.predictions.bias", torch.ones(3)), "1 unknown tensors, the first: vpg.Qformer.cls"),
    (put("opt_model.model.decoder.layers.0.fc1.weight", torch.ones(3)),
     "1 unknown tensors, the first: vpg.opt_model"),
    (put("ln_vision.weight", torch.ones(3)), "vpg.vision_model.post_layernorm.weight is (3,)"),
    (put("opt_model.lm_head.weight", torch.ones(300, 32)), "belongs to another language model"),
])
def test_a_tensor_missing_unknown_or_misshapen_is_named(world, original, tmp_path, capsys, change, complaint):
    state = without_vit(original)
    change(state)
    file = save(tmp_path / "a.pth", state)
    with pytest.raises(SystemExit):
        run("--from-lavis", file, tmp_path / "out", "--llm", world[1], "--vit", world[0])
    assert complaint in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tied_copies_of_the_llms_words_are_recognised(world, original, tmp_path):
    words = load_file(world[1] / "model.safetensors")["model.decoder.embed_tokens.weight"]
    file = save(tmp_path / "a.pth", without_vit(original) | {"opt_model.lm_head.weight": words.half()})
    run("--from-lavis", file, tmp_path / "out", "--llm", world[1], "--vit", world[0])
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_tokenizer_is_missed_before_the_llm_is_read_and_may_lie_elsewhere(world, original, tmp_path,
                                                                            monkeypatch, capsys):
    """As Vicuna's, which is a tokenizer.model; another LLM's is refused."""
    bare = shutil.copytree(world[1], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer.model").write_bytes(b"sentencepiece")
    file = save(tmp_path / "a.pth", without_vit(original))
    command = ["--from-lavis", file, tmp_path / "out", "--llm", bare, "--vit", world[0]]
    other = write_kind(tmp_path / "other", "LLaMA, pre-tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(export.language_models, "load_llm", None)
        for more, says in (([], "export.py --llm-tokenizer"),
                           (["--llm-tokenizer", other], "has ids up to")):
            with pytest.raises(SystemExit):
                run(*command, *more)
            assert says in capsys.readouterr().err
    run(*command, "--llm-tokenizer", world[1])
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_an_llm_that_blip2s_format_cannot_hold_is_refused_and_the_file_is_named(world, original, tmp_path,
                                                                                capsys):
    """sample.py, which a run is told to use, takes no .pth."""
    wide = shutil.copytree(world[1], tmp_path / "wide")
    edit_config(wide, word_embed_proj_dim=16)
    file = save(tmp_path / "a.pth", without_vit(original))
    with pytest.raises(SystemExit):
        run("--from-lavis", file, tmp_path / "out", "--llm", wide, "--vit", world[0])
    said = capsys.readouterr().err
    assert f"that {file} was made with" in said and "sample.py" not in said


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content, complaint", [
    (b"", "damaged, or not a file that LAVIS saved"),
    (b"<html>404</html>", "damaged, or not a file that LAVIS saved"),
    ({"model": {"query_tokens": Harmful()}}, "damaged, or not a file that LAVIS saved"),
    ({"model": {}}, "holds no ViT"),
    ([1, 2], "damaged, or not a file that LAVIS saved"),
])
def test_files_of_another_kind_are_refused_and_nothing_runs(world, tmp_path, capsys, content, complaint):
    file = tmp_path / "a.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(SystemExit):
        run("--from-lavis", file, tmp_path / "out", "--llm", world[1])
    said = capsys.readouterr()
    assert complaint in said.err and "executed" not in said.out


@pytest.mark.parametrize("arguments, complaint", [
    (["--from-lavis", "a.pth", "out"], "--from-lavis needs --llm"),
    (["run", "out", "--vit", "opt-2.7b"], "are for --from-lavis"),
    (["run", "out", "--llm-tokenizer", "llama-7b"], "are for --from-lavis"),
    (["--from-lavis", "nowhere.pth", "out", "--llm", "opt-6.7b"], "nowhere.pth: there is no such file"),
])
def test_arguments_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(*arguments)
    assert complaint in capsys.readouterr().err
