"""Facts about benchmarks/: only what agrees is timed, and all that is compared does the same work."""

import contextlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vpgtrans
from benchmarks import answers, generation, peers, techniques, training
from benchmarks import data as data_path

CPU = torch.device("cpu")
FLOAT = torch.float32
COMMANDS = {
    "training": training.main,
    "generation": generation.main,
    "data": data_path.main,
    "techniques": techniques.main,
    "answers": answers.main,
}
NARROW = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
LLMS = {
    "opt": dict(model_type="opt", **NARROW, ffn_dim=64, word_embed_proj_dim=32, vocab_size=100),
    "llama": dict(model_type="llama", **NARROW, intermediate_size=64, num_key_value_heads=1,
                  vocab_size=100, tie_word_embeddings=True),
    "t5": dict(model_type="t5", d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
               vocab_size=100, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """--size tiny and --llm opt, llama or t5: seconds where the real sizes take minutes."""
    vit = dict(NARROW, intermediate_size=64)
    monkeypatch.setitem(peers.SIZES, "tiny", (vit, vit, dict(NARROW, ffn_dim=64)))
    for name, sizes in LLMS.items():
        monkeypatch.setitem(peers.LLMS, name, sizes)


def build(dtype=FLOAT):
    models = peers.build_models("tiny", dtype, CPU)
    for model in models.values():
        model.eval()
    return models


def change(model, name):
    """Another tensor of that name, for this model alone."""
    parameter = model.get_parameter(name)
    parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)


def agreement(models):
    no_autocast = peers.autocast_to(FLOAT, CPU)
    stage = vpgtrans.STAGES["fine-tune"]
    return training.check_stage(
        models, stage, peers.mean_losses(models, 2, 4, CPU), no_autocast, "fp32")


def llm_agreement(llms):
    losses, soft_prompts = peers.mean_llm_losses(llms, 2, 4, CPU)
    inputs = dict.fromkeys(llms, soft_prompts)
    return peers.check_agreement(losses, inputs, contextlib.nullcontext, peers.TOLERANCE["fp32"])


def test_each_tensor_exists_once():
    ours, *theirs = build().values()
    places = {parameter.data_ptr() for parameter in ours.parameters()}
    for peer in theirs:
        assert {parameter.data_ptr() for parameter in peer.parameters()} == places


def test_ours_and_transformers_agree():
    assert max(agreement(build())) < 1e-5


@pytest.mark.parametrize("name", LLMS)
def test_language_models_agree(name):
    assert max(llm_agreement(peers.build_llms(name, FLOAT, CPU))) < 1e-5


@pytest.mark.parametrize("name", [
    "vision_model.encoder.layers.1.mlp.fc1.weight",
    "qformer.encoder.layer.0.crossattention.attention.value.weight",
    "language_projection.weight",
    "language_model.model.decoder.layers.1.fc2.weight",
])
def test_models_that_differ_are_not_timed(name):
    models = build()
    change(models["transformers, eager"], name)
    with pytest.raises(ValueError, match="ours and transformers compute different things"):
        agreement(models)


def test_a_vit_that_differs_is_not_timed():
    models = build()
    change(models["transformers, sdpa"], "vision_model.encoder.layers.1.mlp.fc1.weight")
    with pytest.raises(ValueError, match="ViT: ours and transformers, sdpa compute different"):
        training.time_vpg(models, 2, contextlib.nullcontext, 1, CPU)


def test_language_models_that_differ_are_not_timed():
    llms = peers.build_llms("llama", FLOAT, CPU)
    change(llms["transformers, eager"], "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="compute different things"):
        llm_agreement(llms)
    with pytest.raises(ValueError, match="only .* of the ids that ours and transformers generate"):
        generation.time_generation(llms, 2, beams=1, repeats=1, device=CPU, exact=True)


def test_nan_is_no_agreement():
    weight = torch.ones(2, requires_grad=True)
    losses = {"ours": lambda: weight.sum(), "theirs": lambda: weight.sum() * torch.nan}
    with pytest.raises(ValueError, match="compute different things"):
        weights = dict.fromkeys(losses, weight)
        peers.check_agreement(losses, weights, contextlib.nullcontext, (1.0, 1.0))


@pytest.mark.parametrize("stage", vpgtrans.STAGES)
def test_the_same_parts_train_and_drop_out(stage):
    models = build()
    peers.enter_stage(models, vpgtrans.STAGES[stage])
    ours = models.pop("ours")
    trained = {name for name, parameter in ours.saved().items() if parameter.requires_grad}
    for peer in models.values():
        named = peer.named_parameters()
        assert trained == {name for name, parameter in named if parameter.requires_grad}
        assert peer.qformer.training == ours.vpg.qformer.training


def test_without_a_technique_a_step_computes_the_same():
    model = build()["ours"]
    vpgtrans.enter_stage(model, vpgtrans.STAGES["warm-up"])
    torch.manual_seed(0)
    ways = techniques.all_ways(model, model, 2, 4, CPU)
    del ways["queries from a cache"]  # random ones, not those of the images
    del ways["without micro-batches of like lengths"]  # other captions of an image
    found = {}

    def remember(name):
        found[name] = torch.cat([p.grad.flatten() for p in model.projector.parameters()])

    for name, way in ways.items():
        # in the place of an optimizer, which would change the weights
        look = SimpleNamespace(step=partial(remember, name))
        techniques.step(way, look, contextlib.nullcontext)
    usual = found.pop("as it is")
    assert len(found) == 5
    for name, gradient in found.items():
        assert peers.relative_distance(gradient, to=usual) < 1e-5, name


def test_what_a_technique_replaces_is_put_back():
    model = build()["ours"]
    vpgtrans.enter_stage(model, vpgtrans.STAGES["warm-up"])
    loss = techniques.language_models.OPT.loss
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    with techniques.patched((techniques.language_models.OPT, "loss", None)):
        assert techniques.language_models.OPT.loss is None
    with techniques.unfrozen(model):
        assert all(p.requires_grad for p in model.parameters())
    assert techniques.language_models.OPT.loss is loss
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]


def test_captions_of_like_lengths_are_the_same_captions():
    like, unlike = techniques.random_batches(3, 8, CPU)

    def captions(batches):
        return sorted(row[row >= 0].tolist() for batch in batches for row in batch)

    assert captions(like) == captions(unlike)
    assert sum(batch.numel() for batch in like) <= sum(batch.numel() for batch in unlike)


def test_turns_alternate():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    seconds = peers.take_turns(functions, 3, CPU)
    assert calls == list("ababab")
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_the_ratio_is_to_the_better_peer():
    seconds = {"ours": [2.0], "transformers, eager": [9.0, 8.0, 1.0], "transformers, sdpa": [4.0]}
    rows = list(peers.rows_beside("step", seconds, 8, dict.fromkeys(seconds, ["more"])))
    assert rows[0] == ["step", "ours", "2,000.0", "2,000.0 - 2,000.0", "4.0", "2.00", "more"]
    assert rows[1][2:6] == ["8,000.0", "1,000.0 - 9,000.0", "1.0", "0.50"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: python -m benchmarks.{name} ")
    assert "ratio above 1" in text or "times as long" in text


@pytest.mark.parametrize("name, option", [
    *[(name, "--repeats") for name in COMMANDS],
    *[(name, "--batch-size") for name in COMMANDS if name != "data"],
    ("training", "--captions"),
    ("training", "--target-tokens"),
    ("techniques", "--target-tokens"),
])
def test_nothing_is_done_less_than_once(name, option, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[name]([option, "0"])
    assert f"{option}: must be at least 1" in capsys.readouterr().err.replace(" K:", ":")


def test_without_transformers_a_command_says_so(monkeypatch):
    monkeypatch.setattr(peers, "transformers", None)
    with pytest.raises(SystemExit, match="transformers, which is missing"):
        training.main([])


def tables(text):
    """Rows of cells of all Markdown tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines]


OURS_AND_THEIRS = ["ours", "transformers, eager", "transformers, sdpa"]


@pytest.mark.slow
@pytest.mark.parametrize("command, options, rows", [
    ("training", "", ["implementation", *OURS_AND_THEIRS * 2,
                      "implementation", *OURS_AND_THEIRS, "ours, cached", *OURS_AND_THEIRS]),
    ("training", "--llm opt", ["implementation", *OURS_AND_THEIRS]),
    ("training", "--llm t5", ["implementation", *OURS_AND_THEIRS]),
    ("generation", "--precision fp32", ["implementation", *OURS_AND_THEIRS * 2]),
    ("generation", "--llm t5 --precision fp32", ["implementation", *OURS_AND_THEIRS * 2]),
])
def test_tables_beside_transformers(command, options, rows, capsys):
    COMMANDS[command](["--size", "tiny", "--batch-size", "2", "--repeats", "1", *options.split()])
    found = tables(capsys.readouterr().out)
    assert [cells[1] for cells in found] == rows
    assert len({len(cells) for cells in found}) <= 2  # forward and training have other columns


@pytest.mark.slow
def test_the_table_of_answers_is_of_equal_answers(capsys):
    """In float32 four ways answer alike, and the counts say that ours has less to do."""
    answers.main("--size tiny --precision fp32 --images 2 --questions 3 --batch-size 4 --repeats 1".split())
    first, *rows = tables(capsys.readouterr().out)
    assert [cells[0] for cells in rows] == ["ours", "LAVIS's way", *OURS_AND_THEIRS[1:]]
    assert {cells[-1] for cells in rows} == {"100%"}
    assert rows[0][-2] == "1.00" and 1 < float(rows[1][-2]) < float(rows[2][-2])


@pytest.mark.slow
def test_the_table_of_captions_is_of_equal_ones(capsys):
    """Beside transformers alone, which reads what is before a caption once for each of five beams."""
    answers.main("--size tiny --precision fp32 --images 3 --captions --batch-size 2 --repeats 1".split())
    first, *rows = tables(capsys.readouterr().out)
    assert [cells[0] for cells in rows] == ["ours", *OURS_AND_THEIRS[1:]]
    assert {cells[-1] for cells in rows} == {"100%"}
    assert rows[0][-2] == "1.00" and rows[1][-2] == rows[2][-2] and float(rows[1][-2]) > 1


@pytest.mark.slow
def test_the_table_of_packed_captions(capsys):
    training.main("--size tiny --batch-size 2 --repeats 1 --captions 3 --precision fp32".split())
    first, *rows = tables(capsys.readouterr().out)
    assert first[0] == "training on 3 captions of 2 images"
    assert [cells[0] for cells in rows] == [
        "warm-up, each alone", "warm-up, packed", "fine-tune, each alone", "fine-tune, packed"]


@pytest.mark.slow
def test_the_tables_of_techniques(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(peers, "compile_all", compiled.extend)
    techniques.main("--size tiny --batch-size 1 --repeats 1".split())
    names = [cells[0] for cells in tables(capsys.readouterr().out)]
    assert names[0] == "warm-up, 4 x 1 samples" and names[9] == "fine-tune, 4 x 1 samples"
    assert names[1:8] == names[10:] and names[8] == "queries from a cache"
    assert len(compiled) == 6  # of ViT, Q-Former and OPT


@pytest.mark.slow
@pytest.mark.parametrize("who, dtype", [("ours", "bfloat16"), ("transformers", "float32")])
def test_a_checkpoint_is_loaded_in_a_fresh_process(who, dtype, tmp_path):
    assert generation.write_checkpoint(tmp_path, "llama") > 10_000
    load, first, peak = generation.load_once(who, tmp_path, dtype)
    assert 0 < load < first and peak > 0


@pytest.mark.slow
def test_the_table_of_loading(capsys, monkeypatch):
    monkeypatch.setitem(peers.LLMS, "2 GB", LLMS["llama"])
    monkeypatch.setattr(generation, "load_once", lambda who, folder, dtype: [len(who), 2.0, 1e6])
    generation.main(["--loading", "--repeats", "1"])
    _, *rows = tables(capsys.readouterr().out)
    assert [cells[:4] for cells in rows] == [
        [dtype, who, f"{len(who)}.00", "2.00"]
        for dtype in ("bfloat16", "float32") for who in ("ours", "transformers")]
    in_bf16, in_float32 = (float(rows[i][4]) for i in (0, 2))
    assert in_bf16 == pytest.approx(2 * in_float32, rel=1e-3)  # twice as large when loaded


@pytest.mark.slow
def test_the_table_of_images(capsys):
    data_path.compare_images(1, [], count=2)
    text = capsys.readouterr().out
    assert len(tables(text)) == 8 and "a level of 255 is 1.5e-02" in text


@pytest.mark.slow
def test_images_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(data_path.data, "resize", lambda image, size: torch.zeros(3, size, size))
    with pytest.raises(ValueError, match="make different images"):
        data_path.compare_images(1, [], count=2)


@pytest.mark.slow
def test_the_table_of_pairs(capsys):
    data_path.compare_pairs(1, [], count=4, batch=2)
    assert len(tables(capsys.readouterr().out)) == 8


def test_photographs_have_detail_at_all_scales():
    image = data_path.photograph(np.random.default_rng(0), 64, 48)
    assert image.size == (64, 48) and len(image.getcolors(64 * 48)) > 1000
