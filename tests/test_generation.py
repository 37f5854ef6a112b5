"""Facts about how llm.py generates: as transformers does, or as reading the whole text at once predicts."""

import pytest
import torch
from conftest import edit_config, make_llm_pair, random_prefix
from transformers import StoppingCriteria, StoppingCriteriaList

import llm as language_models
from llm import load_llm

HOLES = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)


def cut_at(ids, ends):
    """ids up to the first of these end marks."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@pytest.mark.parametrize("variant", ["opt", "llama-3.1", "qwen3", "flan-t5"])
@pytest.mark.parametrize("num_beams, length_penalty, min_new_tokens", [
    (1, 1.0, 0), (1, 1.0, 4), (3, 1.0, 0), (3, -1.0, 3),
    pytest.param(5, 1.0, 4, marks=pytest.mark.slow), pytest.param(5, -1.0, 0, marks=pytest.mark.slow)])
def test_generation_equals_transformers(tmp_path, variant, num_beams, length_penalty, min_new_tokens):
    """Rows side by side, with holes in their prefixes, against each row alone."""
    ours, theirs, _ = make_llm_pair(tmp_path, variant)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    ends = [5, 17, 30]  # three end marks, so that random models end early, at different lengths
    options = dict(max_new_tokens=9, num_beams=num_beams, length_penalty=length_penalty,
                   min_new_tokens=min_new_tokens)
    started = int(theirs.config.is_encoder_decoder)  # their first token starts the decoder
    for seed in range(3):
        prefix = random_prefix(3, 5, seed=seed)
        captions = ours.generate(prefix, mask, **options, stop=[(end,) for end in ends])
        for row in range(3):
            alone = prefix[row : row + 1, mask[row]]
            their_ids = theirs.generate(inputs_embeds=alone, **options, eos_token_id=ends, pad_token_id=1,
                                        do_sample=False)[0].tolist()
            assert captions[row] == cut_at(their_ids[started:], ends)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
@pytest.mark.parametrize("variant", ["opt", "llama-3.1", "flan-t5"])
@pytest.mark.parametrize("num_beams, min_new_tokens, penalty", [(1, 0, 1.3), (1, 4, 0.05), (3, 4, 1.3)])
def test_the_repetition_penalty_equals_transformers(tmp_path, variant, num_beams, min_new_tokens, penalty):
    """To the id. Below 1 it makes texts repeat themselves; in T5 the token that starts the decoder counts."""
    ours, theirs, _ = make_llm_pair(tmp_path, variant)
    options = dict(max_new_tokens=9, min_new_tokens=min_new_tokens)
    penalised = options | dict(repetition_penalty=penalty)
    ends = [5, 17, 30]
    stop = [(end,) for end in ends]
    started = int(theirs.config.is_encoder_decoder)
    prefix = random_prefix(6, 5)
    texts = ours.generate(prefix, num_beams=num_beams, **penalised, stop=stop)
    for row, ids in zip(prefix, texts, strict=True):
        their_ids = theirs.generate(inputs_embeds=row[None], num_beams=num_beams, **penalised,
                                    eos_token_id=ends, pad_token_id=1, do_sample=False)[0].tolist()
        assert ids == cut_at(their_ids[started:], ends)
        if num_beams == 1:
            assert list(ours.stream(row[None], **penalised, stop=stop)) == ids
    assert texts != ours.generate(prefix, num_beams=num_beams, **options, stop=stop)


def test_generation_continues_what_forward_predicts(llm_pair):
    """Greedy ids are the arg max of the logits of the same text read at once, also where transformers cannot
    generate."""
    ours, _, _ = llm_pair
    prefix = random_prefix(4, 5)
    ids = torch.tensor(ours.generate(prefix, HOLES, max_new_tokens=12, stop=()))
    assert torch.equal(ours(prefix, ids, HOLES).argmax(-1), ids)


def test_several_stop_sequences_of_several_ids(llm_pair):
    """A text ends at the first of them; without any it runs to the full length. Beams obey them too."""
    ours, _, _ = llm_pair
    prefix = random_prefix(4, 5)
    whole = ours.generate(prefix, max_new_tokens=12, stop=())
    assert {len(ids) for ids in whole} == {12}
    stop = [tuple(whole[0][3:6]), tuple(whole[1][6:7])]

    def as_text(ids):
        return "".join(f"{i} " for i in ids)

    for ids, full in zip(ours.generate(prefix, max_new_tokens=12, stop=stop), whole, strict=True):
        text = " " + as_text(full)
        places = [text.find(" " + as_text(sequence)) for sequence in stop]
        cut = min((place for place in places if place >= 0), default=len(text))
        assert ids == [int(i) for i in text[:cut].split()]


class EndsWith(StoppingCriteria):
    def __init__(self, stop):
        self.stop = [torch.tensor(sequence) for sequence in stop]

    def __call__(self, ids, scores, **_):
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for sequence in self.stop:
            if len(sequence) <= ids.shape[1]:
                ended |= (ids[:, -len(sequence) :] == sequence).all(1)
        return ended


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["opt", "llama-1", "flan-t5"])
@pytest.mark.parametrize("num_beams, length_penalty", [(2, 1.0), (5, -1.0)])
def test_beams_end_at_stop_sequences_as_transformers_do(tmp_path, variant, num_beams, length_penalty):
    ours, theirs, _ = make_llm_pair(tmp_path, variant)
    options = dict(max_new_tokens=12, num_beams=num_beams, length_penalty=length_penalty)
    started = int(theirs.config.is_encoder_decoder)
    early = 0
    for seed in range(6):
        prefix = random_prefix(1, 5, seed=seed)
        (whole,) = ours.generate(prefix, **options, stop=())
        stop = [tuple(whole[3:5]), tuple(whole[6:9])]
        criteria = StoppingCriteriaList([EndsWith(stop)])
        their_ids = theirs.generate(inputs_embeds=prefix, **options, eos_token_id=None, pad_token_id=1,
                                    do_sample=False, stopping_criteria=criteria)[0].tolist()
        (ids,) = ours.generate(prefix, **options, stop=stop)
        assert ids == language_models.without_end(their_ids[started:], stop)
        early += len(ids) < 12
    assert early


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
def test_no_stop_sequence_is_completed_before_min_new_tokens(llm_pair, num_beams):
    ours, _, _ = llm_pair
    prefix = random_prefix(4, 5)
    for whole, row in zip(ours.generate(prefix, max_new_tokens=9, stop=()), prefix, strict=True):
        (ids,) = ours.generate(row[None], max_new_tokens=9, min_new_tokens=6, num_beams=num_beams,
                               stop=[tuple(whole[2:4])])
        assert len(ids) >= 6 + 1 - 2


@pytest.mark.parametrize("top_p, temperature, expected", [
    (0.7, 1.0, [5 / 8, 3 / 8, 0, 0]),
    (0.9, 1.0, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    (1.0, 0.5, [0.685, 0.247, 0.062, 0.007])])
def test_the_nucleus_is_the_smallest_set_that_makes_up_top_p(top_p, temperature, expected):
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    expected = torch.tensor(expected)
    shares = language_models.sample_next(logits, temperature, top_p).bincount(minlength=4) / 4000
    assert torch.allclose(shares, expected, atol=0.03)
    assert not shares[expected == 0].any()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_generates_under_autocast(llm_pair, dtype):
    _, _, folder = llm_pair
    low = load_llm(folder, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(low.generate(random_prefix(1, 5), max_new_tokens=4, num_beams=2, stop=())[0]) == 4


@pytest.mark.slow
def test_sampling_follows_the_nucleus(llm_pair):
    """At a tiny top_p only the most probable token is left; at a high temperature the draws differ."""
    ours, _, _ = llm_pair
    prefix = random_prefix(1, 5).expand(8, -1, -1)
    assert ours.generate(prefix, temperature=1.0, top_p=1e-6) == ours.generate(prefix)
    torch.manual_seed(0)
    texts = ours.generate(prefix, temperature=9.0)
    assert len({tuple(ids) for ids in texts}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("variant, num_beams", [("opt", 1), ("opt", 3), ("llama-3.1", 3), ("flan-t5", 3)])
def test_a_decoding_step_is_one_static_graph(tmp_path, monkeypatch, variant, num_beams):
    """As on GPUs, where a step looks at all columns of the cache."""
    ours, _, _ = make_llm_pair(tmp_path, variant)
    prefix = random_prefix(2, 5)
    ids = ours.generate(prefix, max_new_tokens=12, num_beams=num_beams)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(language_models.Cache, "width", lambda cache: cache.keys.shape[-2])
    torch._dynamo.reset()
    ours.step = torch.compile(ours.step, fullgraph=True, dynamic=False, backend=count)
    assert ours.generate(prefix, max_new_tokens=12, num_beams=num_beams) == ids
    assert len(graphs) == 1


@pytest.mark.parametrize("options", [
    dict(max_new_tokens=0), dict(num_beams=0), dict(num_beams=2, temperature=1.0), dict(temperature=-1.0),
    dict(temperature=float("nan")), dict(temperature=1e-40),
    dict(top_p=1.5), dict(stop=(2,)), dict(stop=((),)), dict(repetition_penalty=0.0),
    dict(repetition_penalty=float("inf"))])
def test_options_of_generate_that_make_no_sense_are_refused(llm_pair, options):
    ours, _, _ = llm_pair
    with pytest.raises(ValueError, match="generate: .*" + list(options)[-1]):
        ours.generate(random_prefix(1, 4), **options)


@pytest.mark.parametrize("variant, ends", [
    ("opt", [(2,)]), ("llama-1", [(2,)]), ("flan-t5", [(1,)]), ("qwen2", [(2,)])])
def test_without_stop_sequences_the_eos_of_config_json_ends_a_text(tmp_path, variant, ends):
    _, _, folder = make_llm_pair(tmp_path, variant)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_llm(folder).stop == ends
    edit_config(folder, drop=["eos_token_id"])
    assert load_llm(folder).stop == ([] if variant == "qwen2" else ends)
    prefix = random_prefix(2, 5)
    whole = load_llm(folder, dtype=torch.float32).generate(prefix, stop=())
    first, second = whole[0][3], whole[1][2]
    edit_config(folder, eos_token_id=[first, second])
    ours = load_llm(folder, dtype=torch.float32)
    texts = ours.generate(prefix)
    assert texts == ours.generate(prefix, stop=((first,), (second,)))
    assert texts != whole


@pytest.mark.parametrize("written, ends", [
    ('{"eos_token_id": [7, 9]}', [(7,), (9,)]),
    ('{"eos_token_id": 7}', [(7,)]),
    ('{"eos_token_id": null}', [(2,)]),
    ("{}", [(2,)])])
def test_generation_config_has_the_last_word_on_end_marks(tmp_path, written, ends):
    """Instruct models name the ends of their turns there."""
    _, _, folder = make_llm_pair(tmp_path, "llama-1")
    (folder / "generation_config.json").write_text(written)
    assert load_llm(folder).stop == ends


def test_a_damaged_generation_config_is_named(tmp_path):
    _, _, folder = make_llm_pair(tmp_path, "llama-1")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not valid JSON"):
        load_llm(folder)


# -------------------------------------------------------------------- a prefix that is read once, and streams


QUESTION_HOLES = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)


@pytest.fixture(params=["opt", "opt-350m", "llama-3.1", "mistral", "qwen3"], scope="module")
def decoder_only(request, tmp_path_factory):
    ours, _, _ = make_llm_pair(tmp_path_factory.mktemp("llm"), request.param)
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_behind_a_cache_it_generates_as_behind_the_whole_prefix(decoder_only, device_kind, num_beams, holes):
    ours = decoder_only
    prefix = random_prefix(4, 5)
    question = random_prefix(4, 3, seed=7)
    masks = (HOLES, QUESTION_HOLES) if holes else (None, None)
    whole_mask = torch.cat(masks, dim=1) if holes else None
    options = dict(max_new_tokens=9, num_beams=num_beams, stop=((5,), (17, 30)))
    expected = ours.generate(torch.cat([prefix, question], dim=1), whole_mask, **options)
    cache = ours.read_prefix(prefix, masks[0])
    assert ours.generate(question, masks[1], **options, cache=cache) == expected
    assert ours.generate(question, masks[1], **options, cache=cache) == expected  # it stays as it was


def test_rows_of_a_cache_go_on_from_the_prefixes_that_they_name(decoder_only, device_kind):
    """One picture, many questions."""
    ours = decoder_only
    prefix = random_prefix(4, 5)
    question = random_prefix(3, 3, seed=7)
    index = [2, 0, 2]
    whole = torch.cat([prefix[index], question], dim=1)
    whole_mask = torch.cat([HOLES[index], QUESTION_HOLES[:3]], dim=1)
    expected = ours.generate(whole, whole_mask, stop=())
    cache = ours.read_prefix(prefix, HOLES).rows(index)
    assert ours.generate(question, QUESTION_HOLES[:3], stop=(), cache=cache) == expected


def test_a_cache_is_extended_piece_by_piece_and_cut(decoder_only, device_kind):
    ours = decoder_only
    pieces = [random_prefix(4, 3, seed=seed) for seed in range(4)]
    masks = [QUESTION_HOLES, QUESTION_HOLES.roll(1, 0), QUESTION_HOLES.roll(2, 0), QUESTION_HOLES]
    expected = ours.generate(torch.cat(pieces, dim=1), torch.cat(masks, dim=1), stop=())
    cache = ours.read_prefix(pieces[0], masks[0], room=9)
    cache.extend(pieces[3])
    cache.cut(3)
    cache.extend(pieces[1], masks[1])
    cache.extend(pieces[2], masks[2])
    assert ours.generate(pieces[3], masks[3], stop=(), cache=cache) == expected
    cache.extend(pieces[3], masks[3])
    assert cache.used == 12


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_yields_what_generate_gives(llm_pair, temperature):
    ours, _, _ = llm_pair
    prefix = random_prefix(1, 5)
    options = dict(max_new_tokens=12, temperature=temperature, top_p=0.9)
    torch.manual_seed(0)
    (whole,) = ours.generate(prefix, HOLES[2:3], **options, stop=())
    for stop in ((), [tuple(whole[4:6])], [tuple(whole[4:7]), tuple(whole[5:7])], [(*whole[9:12], 1)]):
        torch.manual_seed(0)
        expected = ours.generate(prefix, HOLES[2:3], **options, stop=stop)
        torch.manual_seed(0)
        assert [list(ours.stream(prefix, HOLES[2:3], **options, stop=stop))] == expected


def test_a_stream_holds_back_what_may_begin_a_stop_sequence():
    assert language_models.open_end([1, 2, 3], [(3, 4)]) == 1
    assert language_models.open_end([1, 2, 3], [(3,), (2, 3, 4), (3, 4)]) == 2
    assert language_models.open_end([1, 2, 3], [(2, 4), (2, 3)]) == 0
    assert language_models.open_end([1, 2, 3], []) == 0


def test_ids_come_as_soon_as_they_are_decided(tmp_path):
    """One at a time, each before the next is computed; those held back with the one that decides."""
    ours, _, _ = make_llm_pair(tmp_path, "llama-1")
    prefix = random_prefix(1, 5)
    (whole,) = ours.generate(prefix, max_new_tokens=8, stop=())
    steps = []
    step = ours.step

    def watched(ids, cache):
        steps.append(ids)
        return step(ids, cache)

    ours.step = watched
    no_end = (*whole[3:5], 119 if whole[5] != 119 else 118)
    seen = [(token, len(steps)) for token in ours.stream(prefix, max_new_tokens=8, stop=[no_end])]
    assert [token for token, _ in seen] == whole
    assert [count for _, count in seen] == [0, 1, 2, 5, 5, 5, 6, 7]


def test_a_conversation_reads_each_word_once(decoder_only, device_kind, monkeypatch):
    """Turn by turn, the ids are those behind the whole conversation read anew; of it, only what the cache
    lacks is read."""
    ours = decoder_only
    prefix = random_prefix(1, 5)
    cache = ours.read_prefix(prefix, room=50)
    read = type(ours).read
    heights = []

    def watched(self, x, *args, **options):
        heights.append(x.shape[1])
        return read(self, x, *args, **options)

    conversation = [prefix]
    unread = prefix[:, :0]
    for turn in range(3):
        question = random_prefix(1, 4, seed=20 + turn)
        conversation.append(question)
        expected = ours.generate(torch.cat(conversation, dim=1), max_new_tokens=6, stop=())
        with monkeypatch.context() as patched:
            patched.setattr(type(ours), "read", watched)
            heights.clear()
            behind = torch.cat([unread, question], dim=1)
            answer = list(ours.stream(behind, max_new_tokens=6, stop=(), cache=cache))
        assert [answer] == expected
        # the last id of an answer is read with the next turn
        assert heights == [4 if turn == 0 else 5] + 5 * [1]
        words = ours.embed(torch.tensor([answer]))
        conversation.append(words)
        unread = words[:, -1:]
        assert cache.used == sum(part.shape[1] for part in conversation) - 1


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_a_stream_that_ends_early_leaves_a_whole_cache(tmp_path, how):
    ours, _, _ = make_llm_pair(tmp_path, "llama-3.1")
    prefix = random_prefix(1, 5)
    question = random_prefix(1, 4, seed=7)
    cache = ours.read_prefix(prefix, room=30)
    step = ours.step

    def interrupt(ids, cache):
        if cache.used == 5 + 4 + 3:
            cache.keys[..., cache.columns, :] = torch.nan
            raise KeyboardInterrupt
        return step(ids, cache)

    stream = ours.stream(question, max_new_tokens=9, stop=(), cache=cache)
    if how == "interrupted":
        ours.step = interrupt
        ids = []
        with pytest.raises(KeyboardInterrupt):
            for token in stream:
                ids.append(token)
    else:
        ids = [next(stream) for _ in range(3)]
        stream.close()
    ours.step = step
    assert len(ids) == 3
    assert cache.used == 5 + 4 + 2
    whole = torch.cat([prefix, question, ours.embed(torch.tensor([ids]))], dim=1)
    assert ours.generate(whole[:, -1:], stop=(), cache=cache) == ours.generate(whole, stop=())


def test_what_does_not_go_with_a_cache_is_refused(tmp_path):
    ours, _, _ = make_llm_pair(tmp_path / "a", "opt")
    another, _, _ = make_llm_pair(tmp_path / "b", "llama-1")
    t5, _, _ = make_llm_pair(tmp_path / "c", "flan-t5")
    two = random_prefix(2, 5)
    one = two[:1]
    cache = ours.read_prefix(one, room=3)
    with pytest.raises(ValueError, match="an encoder, which reads a prefix whole"):
        t5.read_prefix(one)
    for other in (another, t5):
        with pytest.raises(ValueError, match="another language model's"):
            other.generate(one, cache=cache)
        with pytest.raises(ValueError, match="another language model's"):
            other.stream(one, cache=cache)
    with pytest.raises(ValueError, match="1 rows, what comes behind it 2"):
        ours.generate(two, cache=cache)
    with pytest.raises(ValueError, match="1 rows, what comes behind it 2"):
        cache.extend(two)
    with pytest.raises(ValueError, match="one row, not 2"):
        ours.stream(two)
    with pytest.raises(ValueError, match="the memory behind a cache"):
        ours.generate(one, cache=cache, memory=lambda h, activation: h)
    with pytest.raises(ValueError, match="room for 3 positions more, not 5"):
        cache.extend(one)
    with pytest.raises(ValueError, match="room for 3 positions more, not 14"):
        ours.stream(one, max_new_tokens=10, cache=cache)
    with pytest.raises(ValueError, match="top_p"):
        ours.stream(one, top_p=2.0)
    with pytest.raises(ValueError, match="69 positions .* 64"):
        ours.generate(one, max_new_tokens=60, cache=cache)
    with pytest.raises(ValueError, match="65 positions .* 64"):
        ours.read_prefix(one, room=60)
    assert cache.used == 5
