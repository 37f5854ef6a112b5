"""The metrics of evaluate.py: against values worked by hand, against pycocoevalcap, against a second
writing of VQA's rules."""

import importlib
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import llm as language_models
from evaluate import bleu4, cider, gqa_match, normalise_answer, ptb_tokens, vqa_accuracy

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
    """The demo's, and the titles of Open Clip Art where Debian's package is installed."""
    lines = (HERE.parent / "demo" / "pairs" / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["caption"] for line in lines[:500]]
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

    def __init__(self, scores):
        self.scores = iter(scores.log_softmax(-1))

    def step(self, ids, cache):
        return next(self.scores)[ids]


class NoCache:
    def advance(self, parents):
        pass


def search(scores, beams, steps, penalty, stop, prompt_lengths, least=0):
    """beam_search behind token 0, a row for each prompt length -> lists of ids without the end mark."""
    chain = Chain(scores)
    rows = len(prompt_lengths)
    lengths = None if prompt_lengths[0] is None else torch.tensor(prompt_lengths)
    first = chain.step(torch.zeros(rows, 1, dtype=torch.long), None)
    ids = language_models.beam_search(chain, first, NoCache(), steps, least, beams, penalty, [(stop,)], lengths)
    return [language_models.without_end([i for i in row if i >= 0], [(stop,)]) for row in ids.tolist()]


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
