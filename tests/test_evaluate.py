"""The metrics of evaluate.py: against values worked by hand, against pycocoevalcap, against a second
writing of VQA's rules."""

import importlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_image, train_in
from PIL import Image

import data
import evaluate
import hub
import llm as language_models
import pairs
import transfer
import vpgtrans
from demo.questions import write_benchmarks, write_lessons
from evaluate import bleu4, cider, gqa_match, normalise_answer, ptb_tokens, vqa_accuracy
from study import scenes

HERE = Path(__file__).parent

# -------------------------------------------------------------------------------- tokens of captions

# what Stanford's PTBTokenizer 3.4.1 made of these lines, less the punctuation that is dropped
JAVAS = {
    "A man's dog, well-known.": "a man 's dog well-known",
    "I cannot; they gonna": "i can not they gon na",
    "gotta lemme gimme wanna 'tis 'twas": "got ta lem me gim me wan na 't is 't was",
    "It's John's; the dogs' can't don't won't I'm": "it 's john 's the dogs ca n't do n't wo n't i 'm",
    "he'd they'll we're you've o'clock y'all ma'am": "he 'd they 'll we 're you 've o'clock y' all ma'am",
    "shouldn't've stopped": "should n't 've stopped",
    "man. man .a man.a dog.Cat": "man man a man.a dog.cat",
    "Mr. Smith, main st. by 5 p.m. in the U.S.A. etc. with J. Smith vs. them":
        "mr. smith main st. by 5 p.m. in the u.s.a. etc. with j. smith vs. them",
    "The letter b. A cat": "the letter b a cat",
    "no. 5 or no. You": "no. 5 or no you",
    "1,000 1.5 10:30 3/4 $5 $.25 50% #1 1st 1990s '90s 3-4 -5":
        "1,000 1.5 10:30 3/4 $ 5 $ .25 50 % # 1 1st 1990s '90s 3-4 -5",
    "black/white AT&T b & w x_y a b@c.com www.foo.com": "black/white at&t b & w x_y a b@c.com www.foo.com",
    "(a) [b] {c} * ** = ~": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- * ** = ~",
    "a--b -- a - b ... end": "a b a b end",
    "\"quoted\" 'single' ``x'' “fancy” ‘one’ it’s … – a—b": "quoted single x fancy one it 's a b",
    "hello!! what?! no! wow?": "hello !! what ?! no wow",
    "naïve café 日本 ½ £5 €5": "naïve café 日本 1/2 # 5 $ 5",
    "2x4 5.5ft 12oz 10:30am 4pm 10-year-old 1/2-inch 5'6\" #tag":
        "2x4 5.5 ft 12oz 10:30 am 4pm 10-year-old 1/2-inch 5 6 #tag",
    "rock 'n' roll with 'em, o'neil and d'angelo": "rock 'n' roll with 'em o'neil and d'angelo",
    "a,b;c:e 1:2 a/ b": "a b c e 1:2 a / b",
    ":) ;-) :D": ":-rrb- ;--rrb- :d",
    "   ": "",
    " .": "",
}


def kept(line):
    """A line of PTBTokenizer's -> its tokens, less punctuation, as CIDEr and BLEU split them."""
    dropped = evaluate.PUNCTUATION - {'"'} | {"-LRB-", "-RRB-", "-LCB-", "-RCB-"}
    return " ".join(token for token in line.rstrip().split(" ") if token not in dropped).split()


@pytest.mark.parametrize("text", JAVAS)
def test_tokens_are_those_of_javas_tokenizer(text):
    assert ptb_tokens(text) == JAVAS[text].split()


def real_captions():
    """Of scenes, and the titles of Open Clip Art where Debian's package is installed."""
    rng = random.Random(0)
    texts = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(500)]
    for file in sorted(Path("/usr/share/openclipart/svg").rglob("*.svg")):
        title = re.search(r"(?s)<dc:title>(.*?)</dc:title>", file.read_text(errors="replace"))
        if title and title[1].strip():
            texts.append(" ".join(title[1].split()))
    return [text for text in dict.fromkeys(texts) if "&" not in text]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="no Java")
def test_tokens_and_cider_of_real_captions_are_those_of_javas_tokenizer(tmp_path, monkeypatch):
    reference = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    captions = real_captions()
    # it writes a file beside its jar
    copy = shutil.copytree(Path(reference.__file__).parent, tmp_path / "tokenizer")
    monkeypatch.setattr(reference, "__file__", str(copy / "ptbtokenizer.py"))
    theirs = reference.PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    equal = [ptb_tokens(caption) == theirs[i][0].split() for i, caption in enumerate(captions)]
    assert sum(equal) >= 0.99 * len(captions)
    # five neighbours in the alphabet are like five captions of one image: they share words
    order = sorted(range(len(captions)), key=captions.__getitem__)
    groups = [order[i : i + 5] for i in range(0, len(order) - 4, 5)]
    ours = cider({g[0]: captions[g[0]] for g in groups}, {g[0]: [captions[i] for i in g[1:]] for g in groups})
    javas = cider({g[0]: theirs[g[0]][0] for g in groups},
                  {g[0]: [theirs[i][0] for i in g[1:]] for g in groups}, str.split)
    assert javas[0] > 0.5
    assert abs(ours[0] - javas[0]) < 0.001  # 0.1 of papers' points


# ----------------------------------------------------------------------------------- CIDEr and BLEU

REFERENCES = {1: ["a red cup on a table", "the cup is red"],
              2: ["two dogs run in the snow", "dogs in snow"],
              3: ["a man rides a horse", "man on horse"]}
CANDIDATES = {1: "a red cup", 2: "two dogs in the snow", 3: "a dog on a table"}


def test_cider_is_what_was_worked_out_by_hand():
    score, of_image = cider(CANDIDATES, REFERENCES)
    assert score == pytest.approx(2.3660347421653345, abs=1e-12)
    by_hand = {1: 3.095706258409524, 2: 3.7141762582414044, 3: 0.28822170984507545}
    assert of_image == pytest.approx(by_hand, abs=1e-12)
    firsts = {id: texts[0] for id, texts in REFERENCES.items()}
    of_image = cider(firsts, REFERENCES)[1]
    assert of_image == pytest.approx({1: 5.696022, 2: 5.843067, 3: 5.859392}, abs=1e-6)
    assert cider(dict.fromkeys(REFERENCES, ""), REFERENCES)[0] == 0


def test_bleu_is_what_was_worked_out_by_hand():
    assert bleu4(CANDIDATES, REFERENCES) == pytest.approx([0.725496, 0.610922, 0.450502, 0.0000665], abs=6e-7)


def test_one_image_alone_scores_nothing():
    assert cider({1: "a red cup"}, {1: ["a red cup"]})[0] == 0


@pytest.mark.parametrize("candidates, references, complaint", [
    ({1: "a"}, {1: ["a"], 2: ["b"]}, "1 of 2 images have no candidate, such as 2"),
    ({1: "a", 5: "b"}, {1: ["a"]}, "1 of 2 images have no reference, such as 5"),
    ({1: "a"}, {1: []}, "1 of 1 images have no reference, such as 1"),
])
def test_an_image_without_candidate_or_reference_is_named(candidates, references, complaint):
    for metric in (cider, bleu4):
        with pytest.raises(ValueError, match=complaint):
            metric(candidates, references)


def random_captions(images, references, longest=14, seed=0):
    """Captions of a few hundred words, the frequent ones far more frequent than the rare ones."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]

    def sentence():
        return " ".join(rng.choices(words, weights, k=rng.randint(0, longest)))

    candidates = {i: sentence() for i in range(images)}
    return candidates, {i: [sentence() for _ in range(references)] for i in range(images)}


@pytest.mark.parametrize("images, references", [(2, 1), (40, 5), (300, 3)])
def test_cider_and_bleu_are_pycocoevalcaps(images, references):
    theirs = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    bleu = importlib.import_module("pycocoevalcap.bleu.bleu").Bleu(4)
    candidates, texts = random_captions(images, references)
    results = {id: [text] for id, text in candidates.items()}
    score, of_image = cider(candidates, texts, str.split)
    expected, expected_of_image = theirs.compute_score(texts, results)
    assert score == pytest.approx(expected, abs=1e-9)
    assert list(of_image.values()) == pytest.approx(list(expected_of_image), abs=1e-9)
    expected, _ = bleu.compute_score(texts, results, verbose=0)
    assert bleu4(candidates, texts, str.split) == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_cider_of_cocos_test_set_takes_seconds():
    candidates, references = random_captions(5000, 5, longest=21)  # COCO's have 10.5 words
    began = time.process_time()
    cider(candidates, references)
    assert time.process_time() - began < 15  # 5 on a quiet core


# -------------------------------------------------------------------------------------- VQA answers

NORMALISED = {
    "Yes.": "yes", "1,000 m/s": "1000 ms", "T-shirt": "t shirt", "t- shirt": "t shirt",
    "black/white": "black white", "A dog and the cat": "dog and cat", "3.5": "3.5", ".5": ".5",
    "10:30": "10:30", "$5": "$5", "50%": "50%", "man's": "man's", "a.m.": "am", "none": "0",
    "two dogs": "2 dogs", "5 oclock": "5 o'clock", "The": "", "": "", "dont": "don't", "lets": "lets",
    "couldntve": "couldntve", "couldn'tve": "couldn't've", "couldnt've": "couldn't've",
    "somebody'd": "somebodyd", "yall": "y'all", "Twas": "'twas", "line\nbreak\t": "line break",
}


@pytest.mark.parametrize("text", NORMALISED)
def test_an_answer_is_normalised_as_by_hand(text):
    assert normalise_answer(text) == NORMALISED[text]


RIGHT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've""".split()


def normalise_once_more(text):
    """VQA's rules in other words, sign by sign, from their description."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    padded = list(text)
    has_thousands = any(a.isdecimal() and b == "," and c.isdecimal()
                        for a, b, c in zip(padded, padded[1:], padded[2:]))
    beside_space = set()
    for left, right in zip(padded, padded[1:]):
        if left == " ":
            beside_space.add(right)
        if right == " ":
            beside_space.add(left)
    out = []
    for sign in padded:
        if sign in "[](){};/\"=+\\_-><@`,?!":
            out += [] if sign in beside_space or has_thousands else [" "]
        else:
            out.append(sign)
    without_stops = []
    removed = 0
    for i, sign in enumerate(out):
        followed = i + 1 < len(out) and out[i + 1].isdecimal()
        if sign == "." and not followed and removed < 32:
            removed += 1
        else:
            without_stops.append(sign)
    numbers = ["none|zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in "".join(without_stops).lower().split():
        for number, names in enumerate(numbers):
            word = str(number) if word in names.split("|") else word
        if word not in {"a", "an", "the"}:
            words.append(word)
    for i, word in enumerate(words):
        for right in RIGHT:
            pieces = right.split("'")
            for k in range(1, len(pieces)):
                if word == "'".join(pieces[:k]) + "'".join(pieces[k:]):
                    words[i] = right
        if word == "somebody'd":
            words[i] = "somebodyd"
    return " ".join(words)


@pytest.mark.slow
def test_ten_thousand_random_strings_are_normalised_alike():
    rng = random.Random(0)
    pieces = [*';/[]"{}()=+\\_-><@`,?!', *" .'10aA:\t\n" * 3, *RIGHT, " a ", " The ", "1,0", "t-shirt"]
    pieces += ["Ten", "none", "é", "٣"] + [right.replace("'", "", 1) for right in RIGHT] + ["..", "." * 20]
    changed = 0
    for _ in range(10_000):
        text = "".join(rng.choice(pieces) + rng.choice(["", "", " "]) for _ in range(rng.randint(0, 9)))
        assert normalise_answer(text) == normalise_once_more(text), repr(text)
        changed += normalise_answer(text) != text
    assert changed > 5_000


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_vqa_accuracy_counts_people_who_agree(matches, accuracy):
    answers = ["red"] * matches + [f"blue {i}" for i in range(10 - matches)]
    assert vqa_accuracy("Red.", answers) == accuracy
    leave_one_out = [min(1, sum(a == "red" for a in answers[:i] + answers[i + 1 :]) / 3) for i in range(10)]
    assert accuracy == pytest.approx(sum(leave_one_out) / 10)


@pytest.mark.parametrize("prediction, answers, official, vpgtrans", [
    ("Yes", ["yes"] * 10, 0, 1),  # all the same: the official rules normalise neither side
    ("yes", ["yes"] * 10, 1, 1),
    ("t-shirt", ["t-shirt"] * 10, 1, 0),  # the older rules normalise the prediction alone
    ("2", ["two"] * 9 + ["3"], 1, 0),
    ("the wall", ["the wall"] * 9 + ["wall"], 1, 0.3),
    ("t-shirt", ["t-shirt"] * 9 + ["shirt"], 1, 1),
    ("", ["red"] * 9 + ["blue"], 0, 0),
])
def test_which_side_is_normalised(prediction, answers, official, vpgtrans):
    assert vqa_accuracy(prediction, answers) == official
    assert vqa_accuracy(prediction, answers, "vpgtrans") == vpgtrans


@pytest.mark.parametrize("answers", [[], ["yes"] * 9, ["yes"] * 11])
def test_other_than_ten_answers_are_refused(answers):
    with pytest.raises(ValueError, match="of ten"):
        vqa_accuracy("yes", answers)


@pytest.mark.parametrize("rules, accuracy", [("official", 50), ("vpgtrans", 25)])
def test_scores_are_by_the_rules_named_and_say_what_the_others_give(rules, accuracy):
    """Of four answers the official rules take two, the older ones one."""
    said = {0: "t-shirt", 1: "t-shirt", 2: "dog", 3: "dog"}
    wanted = {0: "t-shirt", 1: "shirt", 2: "dog", 3: "cat"}
    for score, people in ((evaluate.score_vqa, 10), (evaluate.score_gqa, 1)):
        items = [{"id": i, "answers": [answer] * people, "group": None} for i, answer in wanted.items()]
        scores, of_question = score(items, said, rules)
        assert scores == {"accuracy": accuracy, "official rules": 50, "vpgtrans rules": 25}
        assert of_question == {0: rules == "official", 1: 0, 2: 1, 3: 0}


def test_gqa_match():
    assert gqa_match("The T-shirt.", "t-shirt") and not gqa_match("The T-shirt.", "t-shirt", "vpgtrans")
    assert gqa_match("A dog", "dog", "vpgtrans") and not gqa_match("cat", "dog")


def test_the_lemmatiser_names_itself_or_is_missing(monkeypatch):
    simplemma = pytest.importorskip("simplemma")
    name, lemmatise = evaluate.find_lemmatiser()
    assert name == f"simplemma {simplemma.__version__}"
    assert lemmatise("riding two Horses") == "ride two horse"
    monkeypatch.setitem(sys.modules, "simplemma", None)
    assert evaluate.find_lemmatiser() == (None, None)


# ----------------------------------------------------------------- which length beam search penalises


class Chain:
    """A language model whose next token depends on the step and the token before: scores (steps,V,V)."""

    start_id = None

    def __init__(self, scores):
        self.scores = iter(scores.log_softmax(-1))

    def step(self, ids, cache):
        return next(self.scores)[ids]

    def have_ended(self, rows):
        return rows.all()


class NoCache:
    def advance(self, parents):
        pass


def search(scores, beams, steps, penalty, stop, prompt_lengths, least=0):
    """beam_search behind token 0, a row for each prompt length -> lists of ids without the end mark."""
    chain = Chain(scores)
    rows = len(prompt_lengths)
    lengths = None if prompt_lengths[0] is None else torch.tensor(prompt_lengths)
    first = chain.step(torch.zeros(rows, 1, dtype=torch.long), None)
    ends = [(stop,)]
    begun = chain, first, NoCache(), steps, least, 1.0
    ids = language_models.beam_search(*begun, beams, penalty, ends, lengths)
    return [language_models.without_end([i for i in row if i >= 0], ends) for row in ids.tolist()]


def search_as_4_28(scores, beams, steps, penalty, stop, prompt, least=0):
    """transformers 4.28's beam search of one row, written from its rules: lists and loops."""
    log_p = scores.log_softmax(-1).tolist()
    running = [(0.0, [])]
    finished = []

    def finish(total, ids):
        finished.append((total / (prompt + len(ids)) ** penalty, ids))
        finished.sort(key=lambda pair: -pair[0])
        del finished[beams:]

    for n in range(1, steps + 1):
        candidates = []
        for total, ids in running:
            for token, more in enumerate(log_p[n - 1][ids[-1] if ids else 0]):
                if token != stop or n > least:
                    candidates.append((total + more, [*ids, token]))
        candidates = sorted(candidates, key=lambda pair: -pair[0])[: 2 * beams]
        running = []
        for rank, (total, ids) in enumerate(candidates):
            if ids[-1] != stop:
                running.append((total, ids))
            elif rank < beams:
                finish(total, ids[:-1])
            if len(running) == beams:
                break
        attainable = candidates[0][0] / (prompt + n) ** penalty
        if len(finished) == beams and finished[-1][0] >= attainable:
            return finished[0][1]
    for total, ids in running:
        finish(total, ids)
    return finished[0][1]


def test_the_prompt_that_counts_makes_long_answers_win():
    """By hand, two beams, penalty -1, token 1 ends. "2" has probability 0.45, "3 4" 0.55, and ends are sure.
    New tokens and end mark: ln 0.45 x 2 = -1.60 beats ln 0.55 x 3 = -1.79. With p tokens of the prompt, and
    without the end mark, -0.80 x (p + 1) stands beside -0.60 x (p + 2): the longer one wins from p = 2 on."""
    scores = torch.full((5, 5), -50.0)
    scores[0, 2] = math.log(0.45)
    scores[0, 3] = math.log(0.55)
    scores[2, 1] = 0.0
    scores[3, 4] = 0.0
    scores[4, 1] = 0.0
    scores = scores.expand(5, 5, 5)
    assert search(scores, 2, 5, -1.0, 1, [None]) == [[2]]
    assert search(scores, 2, 5, -1.0, 1, [12]) == [[3, 4]]
    assert search(scores, 2, 5, -1.0, 1, [1, 2, 3, 12]) == [[2], [3, 4], [3, 4], [3, 4]]


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beam_search_that_counts_the_prompt_is_that_of_transformers_4_28(penalty):
    generator = torch.Generator().manual_seed(0)
    differ = 0
    for trial in range(60):
        scores = torch.randn(5, 9, 9, generator=generator) * 2
        beams = (2, 3, 5)[trial % 3]
        prompts = [1, 4, 14]
        least = trial % 2
        found = search(scores, beams, 5, penalty, 1, prompts, least)
        assert found == [search_as_4_28(scores, beams, 5, penalty, 1, p, least) for p in prompts]
        differ += found != search(scores, beams, 5, penalty, 1, [None] * 3, least)
    assert differ == 0 if penalty == 0 else differ > 0


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The five benchmarks' files, of twelve scenes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, scenes=12)
    return folder


def score(world, out, *specs, **options):
    """Runs the command on the tiny BLIP-2 in float32 -> {benchmark: result}."""
    arguments = ["--model", str(world[0]), "--out", str(out), "--precision", "fp32", *map(str, specs)]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return evaluate.main(arguments)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_all_that_lies_under_datasets_is_scored(world, benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VPGTRANS_DATA", str(benchmarks))
    score(world, tmp_path)
    folder = tmp_path / "evaluation"
    said = capsys.readouterr().out
    assert "COCO" in said and "published scores are of 214,354 items: they do not compare" in said
    assert "BLIP-2 OPT-6.7B" not in said
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores["benchmarks"]) == [name for name in evaluate.BENCHMARKS if name != "scienceqa"]
    captions = {"image_id", "caption"}
    answers = {"question_id", "answer"}
    formats = {"coco": captions, "nocaps": captions, "vqav2": answers, "okvqa": answers,
               "gqa": {"questionId", "prediction"}}
    for name, keys in formats.items():
        result = json.loads((folder / f"{name}.json").read_text())
        assert len(result) == scores["benchmarks"][name]["items"] and set(result[0]) == keys
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 1000
    assert {"in-domain", "near-domain", "out-domain"} == {
        name.removeprefix("CIDEr, ") for name in scores["benchmarks"]["nocaps"]["scores"] if "domain" in name}
    assert {"yes/no", "number", "other"} < scores["benchmarks"]["vqav2"]["scores"].keys()
    assert {"query", "verify"} < scores["benchmarks"]["gqa"]["scores"].keys()


def test_short_answers_are_taught_as_they_are_asked_for(tmp_path):
    """Of other scenes than those asked about: one turn each, which a person is right to say."""
    write_lessons(tmp_path, 30, seed=2)
    items = pairs.read_conversations(str(tmp_path / "conversations.json"))
    assert len(items) == len(items.images) == 30
    said = set()
    for i in range(30):
        ((question, answer),) = items[i]["turns"]
        assert question.endswith("?\nAnswer with one word or a short phrase.")
        said.add(answer)
    assert {"1", "2", "yes", "no"} < said and len(said) > 12


def test_published_scores_stand_beside_those_of_as_many_items():
    results = {"vqav2": {"items": 214354, "scores": {"accuracy": 57.16, "yes/no": 80.0}},
               "gqa": {"items": 12, "scores": {"accuracy": 36.0}}}
    rows = [line.split() for line in evaluate.table("out/run", results)]
    assert rows[:2] == [["VQAv2", "GQA"], ["out/run", "57.2", "36.0"]]
    assert ["VPGTrans", "OPT-2.7B", "to", "6.7B", "57.2", "-"] in rows
    assert not any("epoch" in row for row in rows)  # that one has captions alone


def test_questions_without_any_image_are_scored_without_a_picture(tmp_path):
    """None is no image, neither to count nor to draw."""
    item = {"image": None, "question": "Which?", "answers": ["red"], "choices": ["red", "blue"], "answer": 0,
            "hint": "", "grade": "grade2", "subject": "natural science"}
    task = evaluate.Task("scienceqa", [item | {"id": id} for id in "12"])
    rows = {"1": {"answer": "A", "letter": "A"}, "2": {"answer": "B", "letter": "A"}}
    result = evaluate.score_task(task, rows, SimpleNamespace(normalise="official"), tmp_path)
    assert result["scores"]["average"] == 50 and result["images"] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["scienceqa.json"]
    picture(tmp_path / "red.png")
    task.items.append(item | {"id": "3", "image": str(tmp_path / "red.png")})
    rows["3"] = rows["1"]
    result = evaluate.score_task(task, rows, SimpleNamespace(normalise="official"), tmp_path)
    assert result["images"] == 1 and (tmp_path / "scienceqa.png").exists()


def test_the_result_file_is_what_pycocoevalcap_scores_alike(world, benchmarks, tmp_path):
    """The headline is CIDEr of the written captions beside the file's, whatever happened in between."""
    scores = score(world, tmp_path, f"coco={benchmarks / 'coco'}")["coco"]["scores"]
    rows = json.loads((tmp_path / "evaluation" / "coco.json").read_text())
    listed = json.loads((benchmarks / "coco/annotations/coco_karpathy_test.json").read_text())
    references = {i: [" ".join(ptb_tokens(text)) for text in row["caption"]] for i, row in enumerate(listed)}
    results = {row["image_id"]: [" ".join(ptb_tokens(row["caption"]))] for row in rows}
    theirs = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    assert scores["CIDEr"] == pytest.approx(100 * theirs.compute_score(references, results)[0], abs=1e-7)


def test_each_answer_is_the_models_to_that_question_alone(world, benchmarks, tmp_path):
    """Whatever its batch: the same as transfer.answer gives for one image and the papers' prompt."""
    score(world, tmp_path / "a", f"vqav2={benchmarks / 'vqav2'}", batch_size=5)
    score(world, tmp_path / "b", f"vqav2={benchmarks / 'vqav2'}", batch_size=64)
    found = (tmp_path / "a/evaluation/vqav2.json").read_text()
    assert found == (tmp_path / "b/evaluation/vqav2.json").read_text()
    answers = {row["question_id"]: row["answer"] for row in json.loads(found)}
    assert len(set(answers.values())) > 3
    model, tok = transfer.load_model(str(world[0]), torch.float32)
    options = dict(num_beams=5, max_new_tokens=10, length_penalty=-1.0, length_penalty_counts="prompt")
    asked = json.loads((benchmarks / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    for row in asked["questions"][::7]:
        file = benchmarks / "coco/val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg"
        prompt = f"Question: {row['question'].lower()} Answer:"
        alone = transfer.answer(model, tok, data.read_image(file, 28)[None], prompt, **options)
        assert [answers[row["question_id"]]] == alone


class Parrot:
    """Stands for a model: it answers with the image's first pixel and the prompt that it was given."""

    def __init__(self, tok):
        self.tok = tok
        self.image_size = 4
        self.num_query_tokens = 2
        self.device = torch.device("cpu")

    def parameters(self):
        return iter([torch.zeros(1)])

    def see(self, images):
        return {"queries": images[:, 0, 0, 0]}

    def generate(self, prompt_ids, queries, stop, **options):
        assert options == {"num_beams": 5} and len(prompt_ids) <= 5
        prompts = [self.tok.decode([i for i in row if i >= 0]) for row in prompt_ids.tolist()]
        assert all(prompt.endswith(":") for prompt in prompts)  # a blank would spoil the next word
        return [self.tok.encode(f" {pixel}: {prompt}") for pixel, prompt in zip(queries.tolist(), prompts)]


def test_every_question_meets_its_own_image_and_prompt(world, tmp_path):
    tok = data.load_tokenizer(world[0])
    tok.encoder_decoder = True  # what a parrot reads is not shared
    items = []
    expected = {}
    for i in range(13):
        Image.new("RGB", (9, 7), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
        for n, question in enumerate(("Red?", "A Red, or a Blue Circle?", "Is it (a) square?")[: i % 4]):
            items.append({"id": (i, n), "image": str(tmp_path / f"{i}.png"), "question": question})
            asked = question.lower().replace("(", "").replace(")", "")
            expected[i, n] = f"{10 * i}: Question: {asked} Answer:"
    random.Random(0).shuffle(items)
    prompt = "Question: {} Answer: "
    batches = evaluate.answer_items(Parrot(tok), tok, items, prompt, {"num_beams": 5}, 5)
    rows = [row for batch in batches for row in batch]
    assert {row["id"]: row["answer"] for row in rows} == expected and len(rows) == len(expected)


def test_each_kind_of_language_model_is_asked_with_the_papers_prompt():
    assert evaluate.question_prompt(SimpleNamespace(encoder_decoder=False)) == "Question: {} Answer:"
    assert evaluate.question_prompt(SimpleNamespace(encoder_decoder=True)) == "Question: {} Short answer:"


@pytest.fixture(scope="module")
def demo_source():
    """The demo's source, which sees and speaks: random models say the same about every image."""
    return transfer.load_model(str(HERE.parent / "demo" / "source"), torch.float32)


@pytest.mark.parametrize("counts", ["new", "prompt"])
def test_a_prefix_read_once_gives_what_each_prompt_gives_alone(demo_source, benchmarks, counts):
    """For questions of unequal lengths, in any order, each of its own image."""
    model, tok = demo_source
    files = sorted((benchmarks / "coco/val2014").iterdir())[:4]
    images = torch.stack([data.read_image(file, model.vpg.image_size) for file in files])
    rng = random.Random(0)
    words = "red green blue circle square table on a brown".split()
    prompts = ["a picture of " + " ".join(rng.choices(words, k=rng.randint(0, 6))) for _ in range(12)]
    index = [rng.randrange(4) for _ in prompts]
    options = dict(num_beams=5, max_new_tokens=8, length_penalty=-1.0, length_penalty_counts=counts)
    found = evaluate.answer_prompts(model, tok, prompts, model.see(images), index, 5, options)
    alone = [transfer.answer(model, tok, images[i : i + 1], p, **options)[0] for p, i in zip(prompts, index)]
    assert found == alone
    assert len(set(found)) > 6
    others = [(i + 1) % 4 for i in index]
    assert found != evaluate.answer_prompts(model, tok, prompts, model.see(images), others, 5, options)


@pytest.mark.parametrize("prompts", [["Question: red? Answer:", "Question: a blue circle? Answer:"],
                                     ["Blue", "Red"]])
def test_the_prompt_that_the_length_penalty_counts_is_bos_and_its_words(demo_source, monkeypatch, prompts):
    model, tok = demo_source
    counted = []

    def generate(self, prefix, *_, prompt_lengths, **options):
        counted.extend(prompt_lengths.tolist())
        return [[]] * len(prefix)

    monkeypatch.setattr(language_models.LanguageModel, "generate", generate)
    sees = model.see(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    evaluate.answer_prompts(model, tok, prompts, sees, [0, 0], 1, {"length_penalty_counts": "prompt"})
    evaluate.answer_prompts(model, tok, prompts[:1], sees, [0], 1, {"length_penalty_counts": "prompt"})
    lengths = [1 + len(tok.encode(prompt)) for prompt in prompts]
    assert counted == [*sorted(lengths), lengths[0]]


def test_what_all_prompts_begin_with_leaves_each_a_token():
    assert evaluate.common_start([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]]) == 2
    assert evaluate.common_start([[1, 2], [1, 2, 3]]) == 1
    assert evaluate.common_start([[1, 2, 3]] * 2) == 2


def test_questions_are_asked_as_the_papers_ask_them():
    assert evaluate.clean_question('What\'s "this"; (No. 5)?  ') == "what's this no 5?"
    assert evaluate.clean_question("a well-known man, red?") == "a well-known man, red?"
    assert evaluate.clean_question("word " * 60) == " ".join(["word"] * 50)


@pytest.fixture
def seen(monkeypatch):
    """The number of images that went through ViT and Q-Former, and of prompts answered."""
    counts = Counter()
    see = vpgtrans.VisualLLM.see
    generate = language_models.LanguageModel.generate

    def counting_see(self, images):
        counts["images"] += len(images)
        return see(self, images)

    def counting_generate(self, prefix, *arguments, **options):
        counts["prompts"] += len(prefix)
        counts["positions"] += prefix.shape[0] * prefix.shape[1]
        return generate(self, prefix, *arguments, **options)

    monkeypatch.setattr(vpgtrans.VisualLLM, "see", counting_see)
    monkeypatch.setattr(language_models.LanguageModel, "generate", counting_generate)
    return counts


def test_an_image_is_seen_once_whatever_the_number_of_its_questions(world, benchmarks, tmp_path, seen):
    result = score(world, tmp_path, f"gqa={benchmarks / 'gqa'}", batch_size=5)["gqa"]
    assert seen["images"] == 12 and seen["prompts"] == result["items"] > 40
    # Q = 5 places of the image, BOS and "Question:" are read with the image
    asked = json.loads((benchmarks / "gqa/testdev_balanced_questions.json").read_text()).values()
    tok = data.load_tokenizer(world[0])
    longest = max(len(tok.encode(f" {row['question'].lower()} Answer:")) for row in asked)
    assert seen["positions"] <= seen["prompts"] * longest


@pytest.mark.slow
@pytest.mark.parametrize("torn", [b"", b'{"id": 300', b'{"id": 3001, "answer": "re'])
def test_a_killed_run_goes_on_and_asks_nothing_twice(world, benchmarks, tmp_path, seen, torn):
    spec = f"vqav2={benchmarks / 'vqav2'}"
    whole = score(world, tmp_path / "whole", spec)["vqav2"]
    file = tmp_path / "whole/evaluation/answers/vqav2.0.jsonl"
    killed = tmp_path / "killed/evaluation/answers/vqav2.0.jsonl"
    killed.parent.mkdir(parents=True)
    kept = file.read_bytes().splitlines(keepends=True)[:21]
    killed.write_bytes(b"".join(kept) + torn)
    seen.clear()
    assert score(world, tmp_path / "killed", spec)["vqav2"] == whole
    assert seen["prompts"] == whole["items"] - 20
    ids = [row["id"] for row in lines(killed)[1:]]
    assert len(ids) == len(set(ids)) == whole["items"]
    seen.clear()
    assert score(world, tmp_path / "killed", spec)["vqav2"] == whole and not seen


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"num_beams": 2}, {"length_penalty_counts": "new"}, {"precision": "bf16"},
                                    {"question_prompt": "Q: {} A:"}])
def test_answers_to_something_else_are_refused(world, benchmarks, tmp_path, capsys, change):
    spec = f"gqa={benchmarks / 'gqa'}"
    score(world, tmp_path, spec)
    before = (tmp_path / "evaluation/answers/gqa.0.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        score(world, tmp_path, spec, **change)
    key = "prompt" if "question_prompt" in change else next(iter(change))
    assert f"holds answers with {key} = " in capsys.readouterr().err
    assert (tmp_path / "evaluation/answers/gqa.0.jsonl").read_bytes() == before


def test_another_models_answers_are_refused(world, benchmarks, tmp_path, capsys, monkeypatch):
    spec = f"coco={benchmarks / 'coco'}"
    score(world, tmp_path, spec)
    monkeypatch.setattr(hub, "fingerprint", lambda tensors: "trained on")
    with pytest.raises(SystemExit):
        score(world, tmp_path, spec)
    assert "holds answers with fingerprint = " in capsys.readouterr().err


def test_pictures_that_have_replaced_others_are_asked_about_anew(world, benchmarks, tmp_path, seen):
    files = shutil.copytree(benchmarks / "coco", tmp_path / "coco")
    score(world, tmp_path, f"coco={files}")
    save_image(files / "val2014/COCO_val2014_000000000003.jpg", size=(77, 50))
    seen.clear()
    again = score(world, tmp_path, f"coco={files}")["coco"]["scores"]
    assert seen["images"] == 1
    assert again == score(world, tmp_path / "whole", f"coco={files}")["coco"]["scores"]


def test_a_picture_that_comes_while_answers_are_made_ends_nothing(world, benchmarks, tmp_path, monkeypatch):
    files = shutil.copytree(benchmarks / "coco", tmp_path / "coco")
    image = files / "val2014/COCO_val2014_000000000003.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    measure = evaluate.sizes

    def and_then_it_comes(items):
        found = measure(items)
        shutil.copy(tmp_path / "elsewhere.jpg", image)
        return found

    monkeypatch.setattr(evaluate, "sizes", and_then_it_comes)
    assert score(world, tmp_path, f"coco={files}")["coco"]["items"] == 12


def test_a_missing_image_is_named_scored_as_no_answer_and_found_later(world, benchmarks, tmp_path):
    files = shutil.copytree(benchmarks / "coco", tmp_path / "coco")
    image = files / "val2014/COCO_val2014_000000000003.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    first = score(world, tmp_path, f"coco={files}")["coco"]
    note = first["notes"][-1]
    assert first["items"] == 12
    assert note.startswith("1 scored as no answer") and "000000000003.jpg" in note
    rows = json.loads((tmp_path / "evaluation/coco.json").read_text())
    assert [row["image_id"] for row in rows if not row["caption"]] == [3]
    (tmp_path / "elsewhere.jpg").rename(image)
    again = score(world, tmp_path, f"coco={files}")["coco"]["scores"]
    assert again != first["scores"]
    assert again == score(world, tmp_path / "whole", f"coco={files}")["coco"]["scores"]


def test_limit_is_a_look_in_a_folder_of_its_own(world, benchmarks, tmp_path, capsys):
    result = score(world, tmp_path, f"gqa={benchmarks / 'gqa'}", limit=7)["gqa"]
    assert result["items"] == 7 and not (tmp_path / "evaluation").exists()
    assert "With --limit 7 this is a look, and no score" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation-limit-7/scores.json").read_text())["limit"] == 7


@pytest.mark.slow
def test_two_processes_share_the_images_and_nothing_comes_twice(world, benchmarks, tmp_path):
    specs = [f"{name}={benchmarks / name}" for name in ("coco", "vqav2")]
    alone = score(world, tmp_path / "alone", *specs)
    arguments = ["--model", str(world[0]), "--out", str(tmp_path), "--precision", "fp32", *specs]
    train_in(2, arguments, evaluate.main)
    folder = tmp_path / "evaluation"
    assert json.loads((folder / "scores.json").read_text())["benchmarks"] == alone
    shares = [lines(folder / f"answers/vqav2.{rank}.jsonl")[1:] for rank in (0, 1)]
    assert min(map(len, shares)) > 20 and sum(map(len, shares)) == alone["vqav2"]["items"]
    assert len({row["id"] for share in shares for row in share}) == alone["vqav2"]["items"]


@pytest.mark.slow
def test_the_file_alone_scores_without_a_framework(tmp_path):
    shutil.copy(evaluate.__file__, tmp_path)
    program = ("import sys, evaluate; print(evaluate.vqa_accuracy('two', ['2'] * 9 + ['3']));"
               "print(sorted({'torch', 'numpy', 'PIL', 'data'} & sys.modules.keys()))")
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "1.0\n[]\n"


# ------------------------------------------------------------------- files as they are downloaded


def save(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


@pytest.fixture
def disk(tmp_path):
    """Two pictures under the names of COCO, Visual Genome and Open Images."""
    for id in (42, 73):
        picture(tmp_path / f"val2014/COCO_val2014_{id:012d}.jpg")
        picture(tmp_path / f"images/n{id}.jpg")
        picture(tmp_path / f"val/{id:016x}.jpg")
    return tmp_path


def ten(*answers):
    """Ten people's answers as VQA's annotations have them: the last one given fills up."""
    said = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": text, "answer_confidence": "maybe", "answer_id": i + 1} for i, text in enumerate(said)]


def short(task):
    return [(i["id"], Path(i["image"]).name, i["question"], i["answers"], i["group"]) for i in task.items]


COCO_42 = "COCO_val2014_000000000042.jpg"
COCO_73 = "COCO_val2014_000000000073.jpg"
PETS = [(42, COCO_42, None, ["A cat.", "One cat"], None), (73, COCO_73, None, ["A dog.", "One dog"], None)]
CAPTIONS = [{"image_id": 42, "id": 1, "caption": "A cat."}, {"image_id": 73, "id": 2, "caption": "A dog."},
            {"image_id": 42, "id": 3, "caption": "One cat"}, {"image_id": 73, "id": 4, "caption": "One dog"}]
LAVIS_COCO = [{"image": f"val2014/{COCO_42}", "caption": ["A cat.", "One cat"]},
              {"image": f"val2014/{COCO_73}", "caption": ["A dog.", "One dog"]}]
KARPATHY = {"dataset": "coco", "images": [
    {"filepath": "val2014", "sentids": [1, 3], "filename": COCO_42, "imgid": 0, "split": "test", "cocoid": 42,
     "sentences": [{"tokens": ["a", "cat"], "raw": "A cat.", "imgid": 0, "sentid": 1}, {"raw": "One cat"}]},
    {"filepath": "train2014", "filename": "x.jpg", "imgid": 2, "split": "train", "cocoid": 5,
     "sentences": [{"raw": "A bird"}]},
    {"filepath": "val2014", "filename": COCO_73, "imgid": 1, "split": "test", "cocoid": 73,
     "sentences": [{"raw": "A dog."}, {"raw": "One dog"}]}]}


@pytest.mark.parametrize("name, content", [
    ("coco_karpathy_test.json", LAVIS_COCO),
    ("coco_karpathy_test_gt.json", {"images": [{"id": 42}, {"id": 73}], "annotations": CAPTIONS}),
    ("dataset_coco.json", KARPATHY),
    ("captions_val2014.json", {"info": {}, "annotations": CAPTIONS, "images": [
        {"id": 42, "file_name": COCO_42, "license": 1}, {"id": 73, "file_name": COCO_73, "license": 1}]}),
])
def test_cocos_captions_are_read_as_they_are_downloaded(disk, name, content):
    file = save(disk / "annotations" / name, content)
    task = evaluate.read_task("coco", str(file))
    assert short(task) == PETS and not task.left_out
    assert all(Path(item["image"]).is_file() for item in task.items)


def test_captions_of_an_image_come_together_and_its_whole_name_tells_it_from_others(tmp_path):
    rows = []
    for image in ("cats/001.jpg", "dogs/001.jpg"):
        save_image(tmp_path / image)
        rows += [{"image": image, "caption": f"{image[:3]} {i}"} for i in range(2)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = evaluate.read_task("coco", str(file))
    assert [(item["id"], item["answers"]) for item in task.items] == [
        ("cats/001.jpg", ["cat 0", "cat 1"]), ("dogs/001.jpg", ["dog 0", "dog 1"])]
    assert not task.left_out


def test_a_caption_that_is_no_text_goes_alone(tmp_path):
    save_image(tmp_path / "1.jpg")
    rows = [{"image": "1.jpg", "caption": caption} for caption in ("a", 5, "c")]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    task = evaluate.read_task("coco", str(file))
    assert task.items[0]["answers"] == ["a", "c"]
    assert task.left_out == {"a caption that is no text": [f"{file}, annotation 2"]}


def test_nocaps_is_read_with_its_domains(disk):
    first, second = f"{42:016x}", f"{73:016x}"
    images = [{"id": 0, "file_name": f"{first}.jpg", "open_images_id": first, "domain": "in-domain"},
              {"id": 1, "file_name": f"{second}.jpg", "open_images_id": second, "domain": "out-domain"}]
    captions = [{"id": i, "image_id": i % 2, "caption": f"caption {i}"} for i in range(20)]
    file = save(disk / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    task = evaluate.read_task("nocaps", str(file))
    assert [(i["id"], i["group"], len(i["answers"])) for i in task.items] == [
        (0, "in-domain", 10), (1, "out-domain", 10)]


QUESTIONS = {"info": {}, "data_subtype": "val2014", "questions": [
    {"image_id": 42, "question": "What is it?", "question_id": 42000},
    {"image_id": 73, "question": "Is it a cat?", "question_id": 73000}]}
ANNOTATIONS = {"info": {}, "annotations": [
    {"question_id": 73000, "image_id": 73, "question_type": "is it", "answer_type": "yes/no",
     "multiple_choice_answer": "no", "answers": ten("yes", "no")},
    {"question_id": 42000, "image_id": 42, "question_type": "what is", "answer_type": "other",
     "multiple_choice_answer": "cat", "answers": ten("cat")}]}
ASKED = [(42000, COCO_42, "What is it?", ["cat"] * 10, "other"),
         (73000, COCO_73, "Is it a cat?", ["yes"] + ["no"] * 9, "yes/no")]


@pytest.mark.parametrize("benchmark, start", [("vqav2", "v2_"), ("okvqa", "")])
def test_questions_are_read_with_the_annotations_beside_them(disk, benchmark, start):
    questions = save(disk / f"{start}OpenEnded_mscoco_val2014_questions.json", QUESTIONS)
    save(disk / f"{start}mscoco_val2014_annotations.json", ANNOTATIONS)
    for spec in (questions, disk, f"{questions}@{disk / 'val2014'}"):
        task = evaluate.read_task(benchmark, str(spec))
        assert short(task) == ASKED and not task.left_out


def test_laviss_joined_questions_are_read(disk):
    rows = [{"question_id": id, "question": question, "answer": answers, "image": f"val2014/{image}",
             "dataset": "vqa"} for id, image, question, answers, _ in ASKED]
    file = save(disk / "vqa_val_eval.json", rows)
    assert short(evaluate.read_task("vqav2", str(file))) == [(*row[:4], None) for row in ASKED]


@pytest.mark.parametrize("lavis", [False, True])
def test_gqa_is_read_with_structural_types(disk, lavis):
    rows = {"2010": {"semantic": [], "imageId": "n42", "question": "What is it?", "answer": "cat",
                     "types": {"detailed": "categoryThis", "semantic": "cat", "structural": "query"}},
            "2011": {"imageId": "n73", "question": "Is it a cat?", "answer": "no", "isBalanced": True,
                     "types": {"structural": "verify"}}}
    expected = [("2010", "n42.jpg", "What is it?", ["cat"], "query"),
                ("2011", "n73.jpg", "Is it a cat?", ["no"], "verify")]
    if lavis:
        rows = [{"image": f"{row['imageId']}.jpg", "question": row["question"], "question_id": id,
                 "answer": row["answer"]} for id, row in rows.items()]
        expected = [(*row[:4], None) for row in expected]
    file = save(disk / "testdev_balanced_questions.json", rows)
    assert short(evaluate.read_task("gqa", str(file))) == expected


# ------------------------------------------------------------------------------------------ bad input


def edited(content, edit):
    content = json.loads(json.dumps(content))
    edit(content)
    return content


def without_last(content, key):
    return edited(content, lambda c: c[key].pop())


def first_twice(content, key):
    return edited(content, lambda c: c[key].append(c[key][0]))


def other_answers(given):
    """The annotations, of which the first, to question 73000, has these answers."""
    return edited(ANNOTATIONS, lambda c: c["annotations"][0].update(answers=given))


ALL = [42000, 73000]


@pytest.mark.parametrize("questions, annotations, problem, place, scored", [
    (QUESTIONS, without_last(ANNOTATIONS, "annotations"), "no answers", "annotation 1", ALL[1:]),
    (without_last(QUESTIONS, "questions"), ANNOTATIONS, "that is not asked", "annotation 1", ALL[:1]),
    (first_twice(QUESTIONS, "questions"), ANNOTATIONS, "an id for the second time", "annotation 3", ALL),
    (QUESTIONS, first_twice(ANNOTATIONS, "annotations"), "for the second time", "annotation 3", ALL),
    (QUESTIONS, other_answers(ten("yes")[:9]), "with other than 10 answers", 73000, ALL[:1]),
    (QUESTIONS, other_answers(ten("yes") + ten("yes")), "with other than 10 answers", 73000, ALL[:1]),
    (QUESTIONS, other_answers(ten("")), "without a reference", 73000, ALL[:1]),
])
@pytest.mark.parametrize("name", ["vqav2", "okvqa"])
def test_questions_that_cannot_be_scored_are_left_out_and_named(disk, name, questions, annotations, problem,
                                                                place, scored):
    file = save(disk / "OpenEnded_mscoco_val2014_questions.json", questions)
    save(disk / "mscoco_val2014_annotations.json", annotations)
    task = evaluate.read_task(name, str(file))
    ((what, places),) = task.left_out.items()
    assert problem in what and len(places) == 1 and str(places[0]).endswith(str(place))
    assert [item["id"] for item in task.items] == scored


def test_captions_of_images_that_are_not_listed_are_named(disk):
    content = {"images": [{"id": 42}], "annotations": CAPTIONS}
    task = evaluate.read_task("coco", str(save(disk / "coco_karpathy_test_gt.json", content)))
    ((what, places),) = task.left_out.items()
    assert what == "captions of an image that is not listed" and len(places) == 1
    assert [item["id"] for item in task.items] == [42]


LOST = LAVIS_COCO[0] | {"image": "gone.jpg"}


@pytest.mark.parametrize("name, file, content, complaint", [
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", QUESTIONS, r"nothing to score \(2 without a ref"),
    ("coco", "coco_karpathy_test.json", [LAVIS_COCO[0] | {"caption": []}], r"score \(1 without a reference"),
    ("coco", "coco_karpathy_test.json", [], "coco_karpathy_test.json: "),
    ("coco", "coco_karpathy_test.json", "[{", "coco_karpathy_test.json: not valid JSON"),
    ("coco", "coco_karpathy_test.json", [{"file": "x.jpg"}], "coco_karpathy_test.json: "),
    ("coco", "coco_karpathy_test.json", [LOST], "where the images are: .*coco_karpathy_test.json@FOLDER"),
    ("coco", "gqa.json", {"1": {"imageId": "n42", "question": "What?", "answer": "cat"}},
     "holds questions, and COCO is about captions"),
    ("gqa", "coco_karpathy_test.json", [LAVIS_COCO[0] | {"caption": ["A cat."]}],
     "holds captions, and GQA is about questions"),
])
def test_what_cannot_be_scored_is_refused(disk, name, file, content, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        evaluate.read_task(name, str(save(disk / file, content)))


@pytest.mark.parametrize("specs, complaint", [
    (["cocoa=file.json"], "does not read NAME=FILE"),
    (["file.json"], "does not read NAME=FILE"),
    (["coco=nowhere.json"], "nowhere.json: there is no such file"),
    (["coco={folder}"], "holds none of coco_karpathy_test.json"),
    ([], "no benchmark: name one"),
])
def test_benchmarks_that_are_not_there_are_named(world, tmp_path, monkeypatch, capsys, specs, complaint):
    monkeypatch.setenv("VPGTRANS_DATA", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stop:
        score(world, tmp_path / "out", *[spec.format(folder=tmp_path) for spec in specs])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_captions_are_for_scienceqa(world, benchmarks, tmp_path, capsys):
    with pytest.raises(SystemExit):
        score(world, tmp_path, f"gqa={benchmarks / 'gqa'}", "--captions")
    assert "--captions is for scienceqa" in capsys.readouterr().err


def test_a_folder_with_a_sign_in_its_name_and_images_elsewhere(disk):
    file = save(disk / "a@b" / "coco_karpathy_test.json", LAVIS_COCO)
    for spec in (file.parent, file):
        assert short(evaluate.read_task("coco", f"{spec}@{disk}")) == PETS


@pytest.mark.parametrize("options, complaint", [
    ({"limit": 0}, "--limit must be at least 1"), ({"batch_size": 0}, "--batch-size must be at least 1"),
    ({"question_prompt": "What?"}, "must have {} in the question's place")])
def test_options_that_make_no_sense_are_refused(world, tmp_path, capsys, options, complaint):
    with pytest.raises(SystemExit):
        score(world, tmp_path, **options)
    assert complaint in capsys.readouterr().err


def test_empty_answers_and_answers_to_nothing_are_counted(world, benchmarks, tmp_path, monkeypatch):
    nothing = [[]]
    monkeypatch.setattr(language_models.LanguageModel, "generate",
                        lambda self, prefix, *_, **__: nothing * len(prefix))
    spec = f"coco={benchmarks / 'coco'}"
    result = score(world, tmp_path, spec)["coco"]
    assert result["scores"]["CIDEr"] == 0 and "12 answers are empty" in result["notes"]
    file = tmp_path / "evaluation/answers/coco.0.jsonl"
    file.write_text(file.read_text() + '{"id": 999, "answer": "a cat"}\n')
    notes = score(world, tmp_path, spec)["coco"]["notes"]
    assert "1 answers are to none of these items, and not scored" in notes


def test_a_damaged_file_of_answers_is_named(world, benchmarks, tmp_path, capsys):
    file = save(tmp_path / "evaluation/answers/coco.0.jsonl", "{broken}\n{}\n")
    with pytest.raises(SystemExit):
        score(world, tmp_path, f"coco={benchmarks / 'coco'}")
    assert f"{file}: damaged" in capsys.readouterr().err


def test_the_example_in_docs_prints_what_it_says(capsys):
    text = (HERE.parent / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"(?s)```python\n(.*?)```", text)
    exec(example, {})
    assert f"# {capsys.readouterr().out.strip()}\n" in example
