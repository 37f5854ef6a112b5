"""Facts about train.py: the command runs from end to end, keeps a cache, and refuses bad input untouched."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import (
    LLAMA_CONFIG,
    T5_CONFIG,
    arguments,
    assert_same_losses,
    bad_data,
    copy_checkpoint,
    demo_world,
    edited,
    in_a_process,
    make_model,
    read_lines,
    rows,
    stop_at,
    train_in,
    values,
    write_kind,
    write_pairs,
    write_shard,
    write_source,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import cache
import qformer
import runs
import train
import transfer
from pairs import Pairs, Strings

# ---------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_a_run_leaves_weights_metrics_and_curves(finished, world):
    out, printed = finished
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors", "config.json", "metrics.jsonl", "curves.png", "bad_data.jsonl", runs.STATE}
    with safe_open(world[0] / "model.safetensors", framework="pt") as source:
        for name, tensor in load_file(out / "model.safetensors").items():
            assert name in source.keys()
            if not name.startswith("language_projection"):
                assert source.get_slice(name).get_shape() == list(tensor.shape)
    assert [stage for stage, _ in rows(out, "stage", "loss")] == ["warm-up"] * 3 + ["fine-tune"] * 6
    assert rows(out, "stage", "step", "val_loss_shuffled")[0][:2] == ("warm-up", 0)
    assert rows(out, "step", "val_loss")[-1][0] == 6
    assert read_lines(out / "metrics.jsonl")[1].keys() >= {
        "stage", "step", "samples", "loss", "lr", "seconds", "samples_per_second", "peak_memory"}
    for text in ("stage warm-up: 3 steps of 8 = 24 samples", "word converter: 40 -> 32", "(people: "):
        assert text in printed


@pytest.mark.slow
def test_whoever_may_read_one_file_of_a_run_may_read_all(finished):
    out, _ = finished
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


@pytest.mark.slow
def test_the_tables_printed_say_what_trains(finished):
    _, printed = finished
    table = [line for line in printed.splitlines() if line.endswith(("  train", "  eval"))]
    trainable = [line.split()[-2] for line in table]
    assert trainable[:6] == ["0", "0", "0", "0", "1,056", "0"]
    assert trainable[6:] == ["0", "96", "160", "44,864", "1,056", "0"]


@pytest.mark.slow
def test_the_warm_up_trains_only_the_projector(world, tmp_path):
    train.main(arguments(world, tmp_path / "run", "--stage", "warm-up"))
    trained = load_file(tmp_path / "run" / "model.safetensors")
    source = load_file(world[0] / "model.safetensors")
    changed = {name for name in trained if name not in source or not torch.equal(trained[name], source[name])}
    assert changed == {"language_projection.weight", "language_projection.bias"}


@pytest.mark.slow
def test_the_loss_falls(world, tmp_path):
    train.main(arguments(world, tmp_path / "run", "--steps", "60", "--lr", "1e-2"))
    losses = values(tmp_path / "run", "loss")
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options, stages, says", [
    (["--no-warm-up"], ["fine-tune"], "word converter"),
    (["--init", "random"], ["warm-up", "fine-tune"], "projector: random"),
    (["--from-scratch"], ["from-scratch"], "random Q-Former"),
    (["--stage", "fine-tune"], ["fine-tune"], "word converter"),
    (["--init", "captions"], ["warm-up", "fine-tune"], "fitted to the captions of"),
])
def test_the_papers_baselines_run(world, tmp_path, capsys, options, stages, says):
    train.main(arguments(world, tmp_path / "run", *options))
    assert list(dict.fromkeys(values(tmp_path / "run", "stage"))) == stages
    assert says in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("options, says", [
    (["--lr", "0"], "--lr must be above 0"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--workers", "-1"], "--workers must be at least 0"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--max-tokens", "1"], "--max-tokens must be above 1"),
    (["--from-scratch", "--no-warm-up"], "--from-scratch and --no-warm-up exclude each other"),
    (["--from-scratch", "--init", "random"], "--from-scratch has a random projector"),
    (["--init", "captions", "--ridge", "1"], "--ridge is for --init converter"),
    (["--no-warm-up", "--cache", "cache"], "--cache is for stage 1"),
    (["--data"], "--data: expected one argument"),
    (["--stage", "warm-up", "--steps", "5"], "give --warm-up-steps"),
    (["--from-scratch", "--ridge", "1"], "--ridge is for --init converter"),
])
def test_arguments_out_of_range_are_refused(world, tmp_path, refused, options, says):
    refused(train.main, arguments(world, tmp_path / "run", *options), says)


@pytest.mark.slow
def test_other_arguments_are_not_a_resume(finished, world, refused):
    out, _ = finished
    argv = arguments(world, out, "--resume", "--lr", "2e-3", "--precision", "bf16")
    refused(train.main, argv, "--lr was 0.001, is 0.002")


@pytest.mark.slow
def test_other_data_are_not_a_resume(world, tmp_path, refused):
    """A folder that is still being filled, say: the order of the samples would be another."""
    pairs = write_pairs(tmp_path / "pairs", 24)
    argv = arguments((*world[:2], pairs), tmp_path / "run", "--val", world[2])
    stop_at("fine-tune", 2, argv)
    whole = pairs.read_text()
    pairs.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    refused(train.main, [*argv, "--resume"], "stage warm-up had pairs 24 samples, and now there are pairs 23")
    pairs.write_text(whole)
    train.main([*argv, "--resume"])


def test_a_state_that_does_not_know_its_data_resumes(world, tmp_path):
    args = train.parse_arguments(arguments(world, tmp_path / "run"))
    train.check_same_data(args, {}, {"warm-up": [["coco", 5]]})
    with pytest.raises(ValueError, match="fine-tune had  samples, and now there are coco 5"):
        train.check_same_data(args, {"data": {"warm-up": [["coco", 5]]}}, {"fine-tune": [["coco", 5]]})


@pytest.mark.parametrize("then, same", [("absent", True), (None, True), ("", False), ("blip2", False)])
def test_states_of_earlier_versions_resume(world, tmp_path, then, same):
    """An option that they do not know has its default; from_scratch was None, "" or a name."""
    args = train.parse_arguments(arguments(world, tmp_path / "run"))
    saved = transfer.arguments(args)
    for name in ("q_former", "from_scratch", "clip"):
        del saved[name]
    if then != "absent":
        saved["from_scratch"] = then
    if same:
        train.check_same_run(args, {"arguments": saved})
    else:
        with pytest.raises(ValueError, match="--from-scratch was True, is False"):
            train.check_same_run(args, {"arguments": saved})


@pytest.mark.slow
def test_out_that_holds_a_run_or_cannot_be_written_is_refused(finished, world, tmp_path, refused):
    out, _ = finished
    refused(train.main, arguments(world, out), str(out), "--resume", "--out")
    (tmp_path / "file").write_text("")
    refused(train.main, arguments(world, tmp_path / "file" / "run"), "file")


def disk_with(free):
    return shutil._ntuple_diskusage(10**9, 10**9 - free, free)


def test_a_disk_without_room_is_refused_first(world, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk_with(free=10**5))
    out = tmp_path / "run"
    refused(train.main, arguments(world, out), str(out), "100.0 KB are free")


# ----------------------------------------------------------------------------------------- what is read


def test_no_validation_image_is_trained_on_in_any_stage(world):
    """Also where the stages name the same file with other weights."""
    pairs = str(world[2])
    argv = ["--src", "a", "--tgt", "b", "--data", f"{pairs}:0.5", "--warm-up-data", pairs]
    args = train.parse_arguments(argv)
    sets, val = train.find_data(args, train.choose_stages(args), say=print)
    assert len(val) == 2
    assert sets["fine-tune"][1] == [0.5]
    assert sets["warm-up"][1] is None
    for (pairs,), _ in sets.values():
        assert len(pairs) == 22
        assert not set(pairs.files()) & set(val.files())


def test_who_trains_on_train2017_is_told_what_karpathy_holds_out(world, tmp_path):
    for name in ("captions_train2017.json", "captions_train2014.json"):
        folder = shutil.copytree(world[2].parent, tmp_path / name.removesuffix(".json"))
        rows = [json.loads(line) for line in (folder / world[2].name).read_text().splitlines()]
        (folder / name).write_text(json.dumps(rows))
        said = []
        args = train.parse_arguments(["--src", "a", "--tgt", "b", "--data", f"{folder / name}@{folder}"])
        train.find_data(args, train.choose_stages(args), say=said.append)
        assert any("4,407 of Karpathy's 5,000" in line for line in said) == ("2017" in name)


@pytest.mark.slow
def test_without_data_the_papers_layout_is_used(world, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setenv("VPGTRANS_DATA", str(tmp_path))
    argv = arguments(world, tmp_path / "run", "--steps", "2", "--warm-up-steps", "2")
    at = argv.index("--data")
    del argv[at : at + 2]
    refused(train.main, argv, "annotations", "cocodataset.org", "--data")
    for name in ("vg", "sbu"):
        shutil.copytree(world[2].parent, tmp_path / name)
        (tmp_path / name / "pairs.jsonl").rename(tmp_path / name / f"{name}.jsonl")
    train.main(argv)
    said = capsys.readouterr().out
    assert "stage warm-up: not under" in said
    assert "left out: coco\n" in said
    assert "left out: coco, laion\n" in said
    assert "stage fine-tune: epochs of each data set in its 16 samples: vg 0.73" in said


@pytest.mark.slow
def test_shards_train_as_files_do(world, tmp_path, capsys):
    """The same pairs in two shards, read by worker processes; with a cache, too. One annotation that is empty
    is left out and named."""
    samples = {}
    for i, line in enumerate(read_lines(world[2])):
        samples[f"{i:03d}.png"] = (world[2].parent / line["image"]).read_bytes()
        samples[f"{i:03d}.txt"] = line["caption"].encode()
    members = list(samples)
    write_shard(tmp_path / "shards" / "00000.tar", {name: samples[name] for name in members[:24]})
    write_shard(tmp_path / "shards" / "00001.tar", {name: samples[name] for name in members[24:]})
    write_shard(tmp_path / "shards" / "00002.tar", {"024.png": b"", "024.txt": b" "})
    world_of_shards = (*world[:2], f"pairs={tmp_path}/shards/{{00000..00002}}.tar")
    common = ["--val", world[2], "--workers", "2"]

    train.main(arguments(world, tmp_path / "files", *common))
    capsys.readouterr()
    train.main(arguments(world_of_shards, tmp_path / "plain", *common))
    assert "1 left out: empty caption" in capsys.readouterr().out
    assert values(tmp_path / "plain", "loss") == values(tmp_path / "files", "loss")
    train.main(arguments(world_of_shards, tmp_path / "cached", *common, "--cache", tmp_path / "cache"))
    # the first stage saw no crops
    assert values(tmp_path / "cached", "loss") != values(tmp_path / "files", "loss")


@pytest.mark.slow
def test_what_is_left_out_is_written_down(world, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 24)
    pairs.write_text(pairs.read_text() + '{"image": "1.png", "caption": " "}\n{"image":\n')
    train.main(arguments((*world[:2], pairs), tmp_path / "run", "--max-bad", "0.1"))
    assert bad_data(tmp_path / "run", "empty caption") == [f"{pairs}, line 25"]
    assert bad_data(tmp_path / "run", "damaged line") == [f"{pairs}, line 26"]


@pytest.mark.slow
def test_validation_images_in_training_are_named_under_whatever_name(world, tmp_path, capsys):
    """val.jpg is 3.png in another size and format; red.png is in no training set."""
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.BICUBIC).save(tmp_path / f"{i}.png")
    with Image.open(tmp_path / "3.png") as image:
        image.resize((50, 40)).save(tmp_path / "val.jpg", quality=95)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")

    def write(file, *names):
        lines = [json.dumps({"image": name, "caption": "a red square"}) + "\n" for name in names]
        (tmp_path / file).write_text("".join(lines))
        return tmp_path / file

    pairs = write("pairs.jsonl", *[f"{i}.png" for i in range(12)])
    val = write("val.jsonl", "val.jpg", "red.png")
    train.main(arguments((*world[:2], pairs), tmp_path / "run", "--val", val))
    where = f"{tmp_path / '3.png'} looks like {tmp_path / 'val.jpg'}"
    assert bad_data(tmp_path / "run", "validation image in training") == [where]
    assert capsys.readouterr().err.count(where) == 1


@pytest.mark.parametrize("spec, says", [
    ("", ["does not read"]),
    ("{pairs}:1.2.3", [":1.2.3: there is no such file"]),
    ("{pairs}@", ["does not read"]),
    ("{folder}/none.jsonl", ["none.jsonl", "there is no such file"]),
    ("{folder}/empty.jsonl", ["empty.jsonl", "not one image with a caption"]),
    ("{folder}/half.jsonl@{images}", ["11 of 12 annotations are unusable", "11 left out: damaged line",
                                      "half.jsonl, line 2", "--max-bad 0.01"]),
    ("{folder}/one/pairs.jsonl", ["no pair is left to train on", "--val"]),
])
def test_bad_data_is_refused(world, tmp_path, refused, spec, says):
    (tmp_path / "empty.jsonl").write_text("")
    good = '{"image": "0.png", "caption": "a"}\n'
    cut = '{"image": "0.png", "capt\n'
    (tmp_path / "half.jsonl").write_text(good + 11 * cut)
    write_pairs(tmp_path / "one", 1)
    spec = spec.format(pairs=world[2], folder=tmp_path, images=world[2].parent)
    refused(train.main, arguments((*world[:2], spec), tmp_path / "run"), *says)


def test_weights_are_given_to_all_data_sets_or_none(world, tmp_path, refused):
    argv = arguments(world, tmp_path / "run", "--data", f"{world[2]}:0.5")
    refused(train.main, argv, "give each of", ":WEIGHT")


def test_data_that_do_not_fill_a_batch_are_refused(world, tmp_path, refused):
    argv = arguments(world, tmp_path / "run", "--stage", "warm-up", "--batch-size", "1000")
    at = argv.index("--warm-up-steps")
    del argv[at : at + 2]
    refused(train.main, argv, "do not fill one batch of 1,000", "--batch-size", "--warm-up-steps")


# ---------------------------------------------------------------------------- several captions an image


def pairs_of(images, captions):
    """So many images with so many captions each."""
    files = Strings.of(map(str, range(images)))
    texts = Strings.of(["a"] * images * captions)
    return Pairs("x", "/", files, texts, np.repeat(np.arange(images), captions))


def test_weights_are_shares_of_captions_where_these_are_packed():
    sets = [pairs_of(10, 5), pairs_of(40, 1), pairs_of(2, 50)]
    weights = [0.1, 0.7, 0.2]
    assert train.mixture("each", sets, weights) == (weights, 1)
    shares, captions = train.mixture("packed", sets, weights)
    assert np.allclose(shares, [0.02, 0.7, 0.0125])  # 16 of 50 are packed
    assert np.isclose(captions, 1 / 0.7325)
    assert train.mixture("packed", sets[:2], None) == (None, 90 / 50)


@pytest.mark.slow
@pytest.mark.parametrize("captions", ["one", "packed"])
def test_an_image_with_one_caption_is_the_same_sample_whichever_way(world, tmp_path, captions):
    losses = []
    for way in ("each", captions):
        train.main(arguments(world, tmp_path / way, "--captions", way))
        losses.append(values(tmp_path / way, "loss") + values(tmp_path / way, "val_loss"))
    assert len(losses[0]) == 9 + 5
    assert np.allclose(*losses, atol=2e-5)


@pytest.mark.slow
def test_packed_captions_count_as_one_sample(world, tmp_path, capsys):
    folder = tmp_path / "pairs"
    lines = []
    for line in read_lines(write_pairs(folder, 24)):
        for k in range(5):
            lines.append(json.dumps(line | {"caption": line["caption"] + " on a table" * (k % 3)}) + "\n")
    (folder / "five.jsonl").write_text("".join(lines))
    options = ["--captions", "packed", "--stage", "warm-up", "--warm-up-steps", "6", "--batch-size", "4"]
    train.main(arguments((*world[:2], folder / "five.jsonl"), tmp_path / "run", "--val", world[2], *options))
    assert "6 steps of 4 = 24 samples, 1 epochs" in capsys.readouterr().out


def test_captions_are_not_packed_for_t5(world, tmp_path, refused):
    target = write_kind(tmp_path / "t5", "Unigram")
    make_model(target, T5_CONFIG | dict(vocab_size=800))
    argv = arguments((world[0], target, world[2]), tmp_path / "run", "--captions", "packed")
    refused(train.main, argv, "--captions packed", "T5")


@pytest.mark.slow
def test_captions_are_packed_for_llamas(world, tmp_path):
    target = write_kind(tmp_path / "llama", "LLaMA, pre-tokenizer")
    make_model(target, LLAMA_CONFIG | dict(vocab_size=800))
    train.main(arguments((world[0], target, world[2]), tmp_path / "run", "--captions", "packed"))
    assert len(values(tmp_path / "run", "loss")) == 9


# ------------------------------------------------------------------------------ the cache of stage 1


@pytest.mark.slow
@pytest.mark.parametrize("precision, size, tolerance", [("fp32", 4, 1e-5), ("bf16", 2, 2e-3)])
def test_stage_1_from_the_cache_has_the_same_losses(
        tmp_path, capsys, monkeypatch, precision, size, tolerance):
    """As without it when augmentation is off; and a second run computes no image again but those of the
    validation."""
    world = demo_world(tmp_path, 64)
    options = ["--precision", precision, "--stage", "warm-up", "--warm-up-steps", "4", "--val-every", "4",
               "--batch-size", "16", "--val-samples", "4"]
    features = qformer.VPG.features
    looked_at = []

    def watched(vpg, images):
        looked_at.append(len(images))
        return features(vpg, images)

    def losses(run):
        return torch.tensor(values(tmp_path / run, "loss"))

    train.main(arguments(world, tmp_path / "plain", *options, "--augment", "none"))
    train.main(arguments(world, tmp_path / "crops", *options))
    augmented = (losses("crops") - losses("plain")).abs().max()
    monkeypatch.setattr(qformer.VPG, "features", watched)
    for run in ("first", "second"):
        looked_at.clear()
        capsys.readouterr()
        train.main(arguments(world, tmp_path / run, *options, "--cache", tmp_path / "cache"))
        said = capsys.readouterr().out
        images = json.loads((tmp_path / "cache" / "demo" / "index.json").read_text())["images"]
        kept = images if run == "first" else 0
        # validation, before and after: two images, and again for their captions
        assert sum(looked_at) == kept + 2 * (2 + 2)
        assert f"{images} images x {12 * 128 * size / 1e3:.1f} KB" in said
        assert ("which 0.0 KB are still" in said) == (run == "second")
        assert "without crops" in said
        assert (losses(run) - losses("plain")).abs().max() < tolerance < 0.2 * augmented


@pytest.mark.slow
def test_stage_2_behind_the_cache_sees_pixels(world, tmp_path):
    """Two processes share the work of the cache; both stages run, and give what one process gives."""
    train.main(arguments(world, tmp_path / "one", "--cache", tmp_path / "a"))
    train_in(2, arguments(world, tmp_path / "two", "--cache", tmp_path / "b"))
    assert_same_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_killed_cache_goes_on(world, tmp_path, monkeypatch):
    """SIGTERM while it is computed: nothing of the run is there yet, and the same command goes on."""
    write = cache.FeatureCache.write
    argv = arguments(world, tmp_path / "run", "--cache", tmp_path / "cache", "--micro-batch", "2")
    monkeypatch.setattr(cache, "SHARD", 6)

    def kill(file, save):
        write(file, save)
        if "00001" in str(file):
            os.kill(os.getpid(), signal.SIGTERM)

    def shards():
        return sorted(file.stem for file in (tmp_path / "cache" / "pairs").glob("*.safetensors"))

    with monkeypatch.context() as patch:
        patch.setattr(cache.FeatureCache, "write", staticmethod(kill))
        assert in_a_process(train.main, argv) == 130
    assert shards() == ["00000", "00001"]
    assert in_a_process(train.main, argv) == 0
    assert len(shards()) == 4


@pytest.mark.slow
def test_a_cache_of_another_vpg_or_data_set_is_refused(world, tmp_path, monkeypatch, refused):
    def cached(*options):
        return arguments(world, tmp_path / "run", "--cache", tmp_path / "cache", *options)

    train.main(arguments(world, tmp_path / "first", "--cache", tmp_path / "cache", "--stage", "warm-up"))
    write_source(tmp_path / "other", seed=5)
    other = cached("--src", tmp_path / "other")
    refused(train.main, other, "this cache was made with VPG", "delete this one")
    # the ViT is the same
    fine_tuned = copy_checkpoint(
        world[0], tmp_path / "fine-tuned", **{"qformer.layernorm.bias": torch.ones(32)})
    refused(train.main, cached("--src", fine_tuned), "this cache was made with VPG")
    corrected = copy_checkpoint(world[0], tmp_path / "corrected")
    with edited(corrected / "config.json") as config:
        config["vision_config"]["layer_norm_eps"] = 1e-5
    refused(train.main, cached("--src", corrected), "this cache was made with configuration")
    refused(train.main, cached("--image-size", "42"), "image size 28, not 42")
    refused(train.main, cached("--precision", "bf16"), "float32, not [5, 32] torch.bfloat16")

    others = write_pairs(tmp_path / "pairs", 30)
    same_name = cached("--data", f"pairs={others}")
    refused(train.main, same_name, "two data sets that it is for have the same name", "NAME=")
    instead = arguments((*world[:2], f"pairs={others}"), tmp_path / "run", "--cache", tmp_path / "cache")
    refused(train.main, instead, "this cache was made with data set")

    (tmp_path / "file").write_text("")
    refused(train.main, cached("--cache", tmp_path / "file"), "file")
    (tmp_path / "small").mkdir()  # another disk
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: disk_with(free=10**4 if folder.name == "small" else 10**9))
    both = cached("--data", f"more={others}", "--cache", tmp_path / "small")
    says = "the cache does not fit on this disk: 52 images x 0.6 KB = 33.3 KB"
    refused(train.main, both, says, "10.0 KB are free")


@pytest.mark.slow
def test_captions_of_one_image_share_its_place_in_the_cache(world, tmp_path):
    """And the cache may move between a kill and --resume."""
    twice = [json.dumps(line | {"caption": [line["caption"], "a square"]}) for line in read_lines(world[2])]
    (tmp_path / "twice.jsonl").write_text("\n".join(twice))
    pairs = f"twice={tmp_path / 'twice.jsonl'}@{world[2].parent}"
    argv = arguments((*world[:2], pairs), tmp_path / "run", "--save-every", "1")
    train.main([*argv, "--cache", str(tmp_path / "cache")])
    assert json.loads((tmp_path / "cache" / "twice" / "index.json").read_text())["images"] == 22
    train.main([*argv, "--cache", str(tmp_path / "elsewhere"), "--resume"])
    assert not (tmp_path / "elsewhere").exists()  # the run stands in stage 2, at its end


@pytest.mark.slow
def test_an_unreadable_image_stays_one_in_the_cache(world, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", 24)
    (tmp_path / "pairs" / "5.png").write_bytes(b"<html>")
    options = ["--val", world[2], "--stage", "warm-up", "--cache", tmp_path / "cache"]
    for run in ("first", "second"):
        train.main(arguments((*world[:2], pairs), tmp_path / run, *options))
        said = capsys.readouterr().err
        assert "unreadable image: " in said
        assert "5.png" in said
        assert max(values(tmp_path / run, "bad_samples")) == 1
