r"""Score captions and answers about images: COCO, NoCaps, VQAv2, GQA, OK-VQA, ScienceQA.

    python evaluate.py --model out/opt-2.7b-to-opt-6.7b coco=coco_karpathy_test.json@coco \
        vqav2=v2_OpenEnded_mscoco_val2014_questions.json@coco/val2014
    torchrun --nproc-per-node 8 evaluate.py --model opt-2.7b          # all that lies under datasets/

Files are read as they are downloaded, images are looked for beside them or in @FOLDER. Answers are
appended to OUT/evaluation/answers/ as they come, so that a killed run goes on where it was; then
OUT/evaluation/ holds each benchmark's own result file, scores.json, and a picture of the worst
answers and of some drawn at random.

The metrics stand first, as pure functions that need Python alone: this file copied into another
project scores CIDEr and VQA accuracy without Java and without a framework.

    score, of_image = cider({7: "a red cup"}, {7: ["a red cup on a table", "the cup is red"], ...})
    vqa_accuracy("two", ["2"] * 9 + ["3"])                                                      # 1.0
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# ----------------------------------------------------------------------------- tokens of a caption

# COCO's captions are scored on the tokens of Stanford's PTBTokenizer, a Java program. These rules
# give the same ones for all but a few captions in a thousand. Where they part: HTML, smileys, a lone
# letter with a full stop at a caption's end (Java's answer depends on the caption in the next line).

PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}  # dropped
LOOKALIKES = str.maketrans({
    "“": '"', "”": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "–": "--", "—": "--", "…": "...",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$"})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = """mr mrs ms mx dr prof rev gov sen rep gen sgt capt lt col cpl maj adm st ave av blvd rd
    jr sr inc corp co ltd bros vs etc dept est ft mt messrs jan feb mar apr jun jul aug sept sep oct nov
    dec mon tue tues wed thu thurs fri calif ariz ala ark colo conn del fla ga ill ind kan ky la md minn
    mo mont neb nev okla pa tenn va vt wis wyo tel univ assn hon pres""".split()
ONE_OF_TWO = re.compile(r"""(?ix)     # written as one word, read as two
    \b can(?=not\b) | \b (?:gon|wan)(?=na\b) | \b got(?=ta\b) | \b (?:lem|gim)(?=me\b)
  | (?<!\S) 't(?=(?:is|was)\b) | \b y'(?=all\b)""")
TOKEN = re.compile(rf"""(?ix)
    [a-z]+://\S+[\w/] | www\.[\w./-]+\w | [\w.]+@[\w.-]+\w      # addresses
  | '\d\ds\b | '(?:em|cause)\b | '?n'(?!\w) | (?<!\S)'t\b | y'(?=\ all\b)
  | [^\W\d_]+?(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b         # do n't, man 's
  | (?<!\S)[\#@][^\W\d_]\w*
  | (?:(?<!\S)[+-])?\d*(?:(?:[.,:]|(?<=\d)/)\d+)+(?:-[^\W\d_]+)* | (?<!\S)[+-]\d+
  | (?:{"|".join(ABBREVIATIONS)})\.(?![^\W_]) | ph\.d\.
  | (?:[^\W\d_]\.){{2,}}(?![^\W\d_])                            # u.s. a.m.
  | [^\W\d_]\.(?=\s+(?!(?-i:An?|The|There)\b)\S)                # j. smith, but not: letter b. A man
  | (?:no|nos|pp?|fig)\.(?=\s?\d)
  | at&t
  | (?:[dlo]')?\w+(?:(?:[-/]\w+)+|(?:\.\w+)+|'(?:clock|am|n'|er)\w*)?(?:(?<=\bol)')?
  | [:;]-?(?:\)|[dp]\b) | \.\.\. | --+ | [?!]+ | [*~=_]+ | \S""")


def ptb_tokens(text):
    """A caption -> its tokens, lower-cased, without punctuation, as COCO's evaluation counts them:
    "A man's dog, well-known." -> ["a", "man", "'s", "dog", "well-known"]."""
    for name, sign in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"')):
        text = text.replace(name, sign)
    text = ONE_OF_TWO.sub(r"\g<0> ", text.translate(LOOKALIKES))
    found = [token.lower() for token in TOKEN.findall(text)]
    kept = [token for token in found if token not in PUNCTUATION]
    return [re.sub(r"[][(){}]", lambda sign: BRACKETS[sign[0]], token) for token in kept]


# ----------------------------------------------------------------------------------- CIDEr and BLEU

LONGEST = 4  # n-grams of one to four tokens
SIGMA = 6.0  # of CIDEr-D's penalty of another length


def count_ngrams(tokens):
    """["a", "cup"] -> for each n up to LONGEST a Counter: ("a",) and ("cup",) once, ("a", "cup")
    once, ..."""
    return [Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, LONGEST + 1)]


def check_same_images(candidates, references):
    """ValueError unless each image has a candidate and a reference: nothing is left out silently."""
    for have, lack, what in ((candidates, references, "reference"), (references, candidates, "candidate")):
        missing = [id for id in have if id not in lack or not len(lack[id]) and what == "reference"]
        if missing:
            raise ValueError(f"{len(missing):,} of {len(have):,} images have no {what}, such as {missing[0]}")


class Weighted:
    """A sentence's n-grams, each as often as it comes times its inverse document frequency."""

    def __init__(self, tokens, rarity, of_unknown):
        self.length = max(0, len(tokens) - 1)  # in bigrams, as the original counts it
        self.weights = []  # one table for each n
        for counts in count_ngrams(tokens):
            self.weights.append({g: count * rarity.get(g, of_unknown) for g, count in counts.items()})
        self.norms = [math.sqrt(sum(w * w for w in weights.values())) for weights in self.weights]

    def similarity(self, reference):
        """CIDEr-D's similarity to a reference, 0 to 1: the mean over n = 1 to 4."""
        total = 0.0
        for n, weights in enumerate(self.weights):
            norms = self.norms[n] * reference.norms[n]
            others = reference.weights[n]
            if norms:
                shared = weights.keys() & others.keys()
                total += sum(min(weights[g], others[g]) * others[g] for g in shared) / norms
        difference = self.length - reference.length
        return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))


def cider(candidates, references, tokenise=ptb_tokens):
    """CIDEr as papers print it, which is CIDEr-D without stemming (Vedantam et al. 2015, as in
    pycocoevalcap). {image: text}, {image: [texts]} -> (mean over images, {image: score}), both 0 to
    10; papers print 100 times the mean.

    Rare n-grams weigh more, and what is rare is read off these references: a subset of the images
    is scored on another scale, and one image alone scores 0. ValueError if an image lacks candidate
    or reference."""
    check_same_images(candidates, references)
    tokens = {id: [tokenise(text) for text in texts] for id, texts in references.items()}
    documents = Counter()  # how many images have an n-gram in a reference
    for sentences in tokens.values():
        documents.update(set().union(*(counts for s in sentences for counts in count_ngrams(s))))
    images = math.log(max(1, len(references)))
    rarity = {ngram: images - math.log(count) for ngram, count in documents.items()}
    scores = {}
    for id, sentences in tokens.items():
        candidate = Weighted(tokenise(candidates[id]), rarity, images)
        similarities = [candidate.similarity(Weighted(s, rarity, images)) for s in sentences]
        scores[id] = 10 * sum(similarities) / len(similarities)
    return sum(scores.values()) / max(1, len(scores)), scores


def bleu4(candidates, references, tokenise=ptb_tokens):
    """BLEU-1 to BLEU-4, 0 to 1, of all images together, with the length of the nearest reference
    (Papineni et al. 2002, as in pycocoevalcap). {image: text}, {image: [texts]} -> four floats."""
    check_same_images(candidates, references)
    matches = [0] * LONGEST
    guesses = [0] * LONGEST
    length = reference_length = 0
    for id, texts in references.items():
        candidate = tokenise(candidates[id])
        tokens = [tokenise(text) for text in texts]
        length += len(candidate)
        reference_length += min((abs(len(t) - len(candidate)), len(t)) for t in tokens)[1]
        of_references = zip(*map(count_ngrams, tokens))
        for n, (counts, of_each) in enumerate(zip(count_ngrams(candidate), of_references)):
            guesses[n] += counts.total()
            matches[n] += sum(min(count, max(t[g] for t in of_each)) for g, count in counts.items())
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores = []
    product = 1.0
    for n, (matched, guessed) in enumerate(zip(matches, guesses), start=1):
        product *= (matched + 1e-15) / (guessed + 1e-9)
        scores.append(brevity * product ** (1 / n))
    return scores


# -------------------------------------------------------------------------------------- VQA answers

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTIONS = {  # words, and how they go on
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'twas y'all 'ow's'at"}


def spelt_right():
    """{a contraction with one apostrophe left out: the contraction}, as VQA's evaluation has them."""
    right = {"somebody'd": "somebodyd"}  # the wrong way round there
    for ending, words in CONTRACTIONS.items():
        for form in (word + ending for word in words.split()):
            for place in [i for i, sign in enumerate(form) if sign == "'"]:
                right[form[:place] + form[place + 1 :]] = form
    return right


SPELT_RIGHT = spelt_right()


def one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_marks(text):
    """VQA's punctuation rules. A mark vanishes that stands beside a space, or where the text has
    digit,digit; else it becomes a space. Full stops vanish unless a digit follows."""
    text = one_line(text)
    thousands = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in MARKS:
        vanishes = thousands or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if vanishes else " ")
    # 32 of them at most: the original has a flag in the count's place
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


def plain_words(text):
    """VQA's rules for words: lower case, numbers as digits, no articles, contractions with their
    apostrophe."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(SPELT_RIGHT.get(word, word) for word in words if word not in ("a", "an", "the"))


def normalise_answer(text):
    """An answer as VQA's evaluation compares it: "A dog, and the cat." -> "dog and cat"."""
    return plain_words(strip_marks(text))


def vqa_accuracy(prediction, answers, rules="official"):
    """VQA accuracy (Antol et al. 2015) of a prediction beside ten people's answers, 0 to 1. With k
    of them equal it is min(1, 0.3 k), the mean over ten times nine of min(1, matches / 3).

    `rules` say what is normalised before. "official", since March 2021: both sides, or neither where
    all ten answers are the same. "vpgtrans", the older ones, on which the scores of VPGTrans and
    LAVIS rest: the prediction always, of the answers only the punctuation, and only where they are
    not all the same. ValueError unless there are ten answers."""
    if len(answers) != 10:
        raise ValueError(f"{len(answers)} answers: VQA accuracy is of ten")
    prediction = one_line(prediction)
    answers = [one_line(answer) for answer in answers]
    differ = len(set(answers)) > 1
    if differ:
        answers = [normalise_answer(a) if rules == "official" else strip_marks(a) for a in answers]
    if differ or rules == "vpgtrans":
        prediction = normalise_answer(prediction)
    return min(10, 3 * answers.count(prediction)) / 10


def gqa_match(prediction, answer, rules="official"):
    """Is it GQA's answer? `rules` "official" normalise both, as LAVIS does today; "vpgtrans" the
    prediction alone, which puts some answers out of reach ("t-shirt")."""
    return normalise_answer(prediction) == (normalise_answer(answer) if rules == "official" else answer)


def find_lemmatiser():
    """What gives OK-VQA's predictions the form of its answers, which are stemmed -> (its name, a
    function text -> text); (None, None) where simplemma is not installed.

    BLIP-2's and VPGTrans's scores were made with spaCy; simplemma gives the same text for 94% of
    VQAv2's answers."""
    try:
        import simplemma
    except ImportError:
        return None, None
    version = getattr(simplemma, "__version__", "")

    def lemmatise(text):
        return " ".join(simplemma.lemmatize(word, lang="en").lower() for word in text.split())

    return f"simplemma {version}".strip(), lemmatise


# ------------------------------------------------------------------------- files, as they are downloaded

# What needs more than Python is imported where it is used, so that the metrics can be copied alone.


@dataclass
class Task:
    """A benchmark's items: {id, image (a file), question (None: caption it), answers (all references),
    group (what the score is split by, or None)}, and what was left out, {problem: [places]}."""

    name: str
    items: list
    left_out: dict = field(default_factory=dict)


def known_files(benchmark, folder):
    """The files of a benchmark that lie in a folder or its annotations/."""
    files = [place / file for file in benchmark.files for place in (folder, folder / "annotations")]
    return [file for file in files if file.is_file()]


def read_task(name, spec):
    """NAME, and FILE or the folder that has it, with @IMAGES behind it or not -> Task.
    FileNotFoundError and ValueError name the file and the remedy."""
    import pairs

    benchmark = BENCHMARKS[name]
    source, split, images = pairs.what_is_there(spec) or (spec, None, None)
    if Path(source).is_dir() and not split:
        files = known_files(benchmark, Path(source))
        if not files:
            raise FileNotFoundError(f"{source}: holds none of {', '.join(benchmark.files)}")
        source = str(files[0])
        spec = f"{source}@{images}" if images else source
    found = pairs.read_questions(spec)
    task = Task(name, [], dict(found.left_out))
    for item in map(found.__getitem__, range(len(found))):
        problem = None
        if not any(item["answers"]):
            problem = "without a reference"
        elif benchmark.people and len(item["answers"]) != benchmark.people:
            problem = f"with other than {benchmark.people} answers"
        if problem:
            task.left_out.setdefault(problem, []).append(item["id"])
        else:
            task.items.append({"group": None} | item)
    if not task.items:
        what = "; ".join(f"{len(places):,} {problem}" for problem, places in task.left_out.items())
        raise ValueError(f"{source}: nothing to score ({what}); answers are compared with references, which "
                         "a test split's file does not have")
    asks = {item["question"] is not None for item in task.items}
    if asks != {benchmark.asks}:
        found, wanted = ("captions", "questions") if benchmark.asks else ("questions", "captions")
        raise ValueError(f"{source}: holds {found}, and {benchmark.title} is about {wanted}")
    return task


# --------------------------------------------------------------------------------------------- scores

RULES = ("official", "vpgtrans")


def mean(numbers):
    return sum(numbers) / max(1, len(numbers))


def by_group(items, scores):
    """{group: mean score in percent} of items that have a group."""
    groups = {}
    for item in items:
        if item["group"]:
            groups.setdefault(item["group"], []).append(scores[item["id"]])
    return {group: 100 * mean(numbers) for group, numbers in sorted(groups.items())}


def score_captions(items, answers, rules):
    """-> ({metric: in papers' points}, {image: 0 to 10}). Each of NoCaps's domains has its own idf, as
    in VPGTrans, and so has the whole."""
    references = {item["id"]: item["answers"] for item in items}
    score, of_image = cider(answers, references)
    scores = {"CIDEr": 100 * score, "BLEU-4": 100 * bleu4(answers, references)[3]}
    for group in sorted({item["group"] for item in items} - {None}):
        inside = {item["id"]: item["answers"] for item in items if item["group"] == group}
        scores[f"CIDEr, {group}"] = 100 * cider({id: answers[id] for id in inside}, inside)[0]
    return scores, of_image


def score_by_rules(items, rules, compare):
    """compare(item, rules) -> 0 to 1. -> ({metric: percent}, {question: 0 to 1}) by `rules`, and overall by
    the others."""
    of_rules = {each: {item["id"]: compare(item, each) for item in items} for each in RULES}
    chosen = of_rules[rules]
    scores = {"accuracy": 100 * mean(chosen.values())} | by_group(items, chosen)
    return scores | {f"{each} rules": 100 * mean(of_rules[each].values()) for each in RULES}, chosen


def score_vqa(items, answers, rules):
    """As score_by_rules, by what people answered."""
    def compare(item, rules):
        return vqa_accuracy(answers[item["id"]], item["answers"], rules)

    return score_by_rules(items, rules, compare)


def score_okvqa(items, answers, rules):
    """As score_vqa, plain and with the predictions lemmatised, as OK-VQA's answers are; the first
    score is the lemmatised one where there is a lemmatiser."""
    scores, of_question = score_vqa(items, answers, rules)
    name, lemmatise = find_lemmatiser()
    if name is None:
        return scores | {"lemmatiser": None}, of_question
    lemmas = {id: lemmatise(answer) for id, answer in answers.items()}
    lemmatised, of_question = score_vqa(items, lemmas, rules)
    plain = {f"plain, {each} rules": scores[f"{each} rules"] for each in RULES}
    return lemmatised | plain | {"lemmatiser": name}, of_question


def score_gqa(items, answers, rules):
    """As score_by_rules, by the one answer there is."""
    def compare(item, rules):
        return gqa_match(answers[item["id"]], item["answers"][0], rules)

    return score_by_rules(items, rules, compare)


SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def scienceqa_columns(item):
    """Which of ScienceQA's columns a question counts in, beside the average; TXT and IMG overlap."""
    yield SUBJECTS.get(item.get("subject"), "other")
    if item.get("hint"):
        yield "TXT"
    if item["image"]:
        yield "IMG"
    if not item.get("hint") and not item["image"]:
        yield "NO"
    yield "G1-6" if int(re.sub(r"\D", "", item["grade"])) <= 6 else "G7-12"


def chosen_letter(text):
    """The first capital letter in an answer, which names the choice; "" if there is none."""
    return next(iter(re.findall("[A-Z]", text)), "")


def score_scienceqa(items, answers, rules):
    """-> ({"average" and column: percent}, {question: 0 or 1}). An answer without a letter, or with one
    beyond the choices, is wrong."""
    of_question = {}
    columns = {}
    for item in items:
        right = chosen_letter(answers[item["id"]]) == "ABCDE"[item["answer"]]
        of_question[item["id"]] = float(right)
        for column in scienceqa_columns(item):
            columns.setdefault(column, []).append(right)
    order = [*SUBJECTS.values(), "TXT", "IMG", "NO", "G1-6", "G7-12"]
    scores = {column: 100 * mean(columns[column]) for column in order if column in columns}
    return {"average": 100 * mean(of_question.values())} | scores, of_question


def compare_letters(items, answers, letters):
    """The scores of the letters with the largest logits, and how often they are not the greedy answer's."""
    scores, _ = score_scienceqa(items, letters, None)
    differ = [chosen_letter(answers[id]) != letter for id, letter in letters.items()]
    best = {f"{column}, largest logit": score for column, score in scores.items()}
    return best | {"answers that are not the letter of the largest logit": 100 * mean(differ)}


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is scored and handed in."""

    title: str
    asks: bool  # questions, or for captions
    people: int  # who answered each question; 0: any number
    size: int  # items that published scores are of
    score: Callable
    result: tuple  # names in its own result format: of the id, of the answer
    files: tuple  # that are looked for in a folder


CAPTIONS = ("image_id", "caption")
ANSWERS = ("question_id", "answer")
VQA = "OpenEnded_mscoco_val2014_questions.json"
BENCHMARKS = {
    "coco": Benchmark("COCO", False, 0, 5000, score_captions, CAPTIONS,
                      ("coco_karpathy_test.json", "coco_karpathy_test_gt.json", "dataset_coco.json")),
    "nocaps": Benchmark("NoCaps", False, 0, 4500, score_captions, CAPTIONS,
                        ("nocaps_val_4500_captions.json",)),
    "vqav2": Benchmark("VQAv2", True, 10, 214354, score_vqa, ANSWERS, (f"v2_{VQA}", "vqa_val_eval.json")),
    "gqa": Benchmark("GQA", True, 1, 12578, score_gqa, ("questionId", "prediction"),
                     ("testdev_balanced_questions.json",)),
    "okvqa": Benchmark("OK-VQA", True, 10, 5046, score_okvqa, ANSWERS, (VQA, "okvqa_val_eval.json")),
    "scienceqa": Benchmark("ScienceQA", True, 0, 4241, score_scienceqa, ("id", "answer"),
                           ("problems.json", "problem.json")),
}

# Zero-shot; the captions are not: BLIP-2's are of models fine-tuned on COCO at 364 pixels, and
# COCO is among what VPGTrans trains on.
PUBLISHED = {
    "BLIP-2 OPT-2.7B": {"coco": 145.8, "nocaps": 119.7, "vqav2": 53.5, "gqa": 34.6, "okvqa": 31.7},
    "BLIP-2 OPT-6.7B": {"coco": 145.2, "nocaps": 121.0, "vqav2": 54.3, "gqa": 36.4, "okvqa": 36.4},
    "BLIP-2 FlanT5-XL": {"coco": 144.5, "nocaps": 121.6, "vqav2": 63.1, "gqa": 44.2, "okvqa": 40.7},
    "BLIP-2 FlanT5-XXL": {"vqav2": 65.2, "gqa": 44.7, "okvqa": 45.9},
    "VPGTrans OPT-125M to 1.3B, epoch 3 (COCO: val)": {"coco": 133.4},
    "VPGTrans OPT-2.7B to 6.7B": {"vqav2": 57.2, "gqa": 36.2, "okvqa": 39.8},
    "VPGTrans FlanT5-XL to XXL": {"vqav2": 65.2, "gqa": 45.0, "okvqa": 45.0},
    "VL-LLaMA-7B": {"vqav2": 58.1, "gqa": 37.5, "okvqa": 37.4},
    "LaVIN 7B": {"scienceqa": 89.41},
    "LLaVA 13B": {"scienceqa": 90.92},
    "MemVP LLaMA-7B": {"scienceqa": 93.07},
    "MemVP LLaMA-13B": {"scienceqa": 93.78},
}


# -------------------------------------------------------------------------------------------- answers

CAPTION = {"num_beams": 5, "min_new_tokens": 7, "max_new_tokens": 30, "length_penalty": 1.0}
QUESTION = {"num_beams": 5, "min_new_tokens": 0, "max_new_tokens": 10, "length_penalty": -1.0}


def clean_question(text, most=50):
    """A question as BLIP-2 and VPGTrans ask it: lower case, some marks deleted (the question mark
    stays), at most 50 words."""
    text = re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:most])


SHORTLY = "{}\nAnswer with one word or a short phrase."  # who converses would say a sentence


def question_prompt(tok, template=None):
    """The papers' prompt for this kind of language model; not of the papers, that of one that converses
    in a data.ChatTemplate."""
    if template:
        return SHORTLY
    return "Question: {} Short answer:" if tok.encoder_decoder else "Question: {} Answer:"


def default_prompt(asks, tok, template, taught):
    """What is asked of a model, with {} in the question's place, if it `asks` one: of a run of MemVP, as
    the task that it was `taught`."""
    import transfer

    if taught:
        import finetune

        return finetune.blank_prompt(taught)
    return question_prompt(tok, template) if asks else transfer.caption_prompt(template)


def common_start(rows):
    """How many ids all rows begin with, at most all but the last of each."""
    least = min(map(len, rows)) - 1
    return next((n for n in range(least) if len({row[n] for row in rows}) > 1), least)


def taught_task(name):
    """What a run of MemVP has learnt, a name of finetune.TASKS; None of any other model."""
    import hub

    config = hub.read_config(hub.resolve(name, "shapes").folder)
    if config.get("model_type") != "memvp":
        return None
    return config.get("arguments", {}).get("memvp", "").partition("=")[0]


def fitting_task(benchmark, taught):
    """`taught`, what a run of MemVP has learnt, where that was questions and the benchmark asks some, or
    captions and it wants some: then it is asked as it was taught. None: it is asked as any model.

    A run of ScienceQA has read choices, which no other benchmark has."""
    if taught not in BENCHMARKS or taught == "scienceqa":
        return None
    return taught if BENCHMARKS[taught].asks == BENCHMARKS[benchmark].asks else None


def read_ids(tok, places, text, template=None, taught=None):
    """The ids of a prompt: as transfer.ask_ids, or as a run of MemVP was `taught` to read them."""
    import transfer

    if taught:
        import finetune

        ids, _ = finetune.question_ids(tok, text, "", finetune.TASKS[taught].most)
        return ids
    return transfer.ask_ids(tok, places, text, template)


def answer_prompts(model, tok, prompts, sees, index, batch_size, options, template=None, taught=None):
    """Prompts as texts, what the model saw of some images (of none: {}), and which of these each prompt is
    about (a list) -> as many answers. A model that converses is asked in its template, a run of MemVP as
    the task that it was `taught`.

    Prompts of one length go together and shorter ones are padded on the left, so that no answer
    depends on its neighbours. Where an image has several questions, a decoder-only LLM reads what
    they begin with, the image above all, once."""
    import torch

    import data
    import transfer

    places = model.num_query_tokens if sees else 0
    ids = [read_ids(tok, places, text, template, taught) for text in prompts]
    options = options | {"stop": transfer.ends(model, tok, template)}
    images = len(next(iter(sees.values()))) if sees else 0
    shared = None
    start = 0
    if len(ids) > images and places and not tok.encoder_decoder:  # the image is in the prompt, no memory
        start = common_start(ids)
        head = torch.tensor([ids[0][:start]]).expand(images, -1)
        with torch.inference_mode():
            shared = model.llm.read_prefix(*model.prefix(head, **sees))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [None] * len(ids)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        padded = data.pad([ids[i][start:] for i in rows], data.PADDING, left=True)
        which = torch.tensor([index[i] for i in rows])
        if shared:
            words = start - places
            found = generate_behind(model.llm, shared.rows(which), padded, words, **options)
        elif not sees:
            found = generate_behind(model.llm, None, padded, 0, **options)
        else:
            seen = {name: x[which.to(x.device)] for name, x in sees.items()}
            found = model.generate(padded, **seen, **options)
        for i, row in zip(rows, found):
            answers[i] = transfer.read_answer(tok, row, template)
    return answers


def generate_behind(llm, cache, ids, words_before, length_penalty_counts="new", **options):
    """The LLM's answers to ids (B,P) behind what a cache holds, among it so many of the prompt's
    tokens, or behind nothing (None)."""
    import torch

    import data

    mask = ids != data.PADDING
    if length_penalty_counts == "prompt":
        options["prompt_lengths"] = words_before + mask.sum(1)
    device = device_of(llm)
    with torch.inference_mode():
        words = llm.embed(ids.clamp(min=0).to(device))
    return llm.generate(words, None if mask.all() else mask.to(device), cache=cache, **options)


READERS = 8  # threads that read images: Pillow decodes outside of Python's lock


def read_ahead(files, size, count):
    """-> a context with what gives, one after the other, the pixels of image files or, as a text, why
    there are none; while some are at work the next ones are read, `count` at most. OSError where the
    storage does not answer."""
    import cache
    import data
    import loop

    read = functools.partial(data.read_image, size=size)
    return contextlib.closing(cache.read_ahead(read, files, READERS, count, loop.must_stop))


def take(images, count):
    """The next images of read_ahead. data.Stopped if the command was asked to stop while it waited."""
    import data

    found = list(itertools.islice(images, count))
    if len(found) < count:
        raise data.Stopped
    return found


def see(model, pixels, blind):
    """What a model sees of images (B,3,H,W) uint8, as answer_prompts takes it; of none where it is
    blind."""
    import torch

    if blind and model.num_query_tokens:
        return {}
    with torch.inference_mode():
        sees = model.see(pixels.to(device_of(model)))
    if blind:  # a memory has rows of its own for a question without an image
        sees["has_image"] = torch.zeros(len(pixels), dtype=torch.bool)
    return sees


def answer_items(model, tok, items, prompt, options, batch_size, template=None, blind=False, taught=None):
    """Items -> one list for each `batch_size` images: [{id, answer, and the problem where the image
    cannot be read}]. Each image is seen once, whatever the number of its questions. `prompt` has {} in
    the question's place; where the model is `blind`, it is asked without the image. `taught` is as of
    answer_prompts."""
    import torch

    of_image = {}
    for item in items:
        of_image.setdefault(item["image"], []).append(item)
    files = list(of_image)
    # who converses is asked as people write, and so were the tasks of MemVP
    clean = str if template or taught else clean_question
    with read_ahead(files, model.image_size, 2 * batch_size) as images:
        for first in range(0, len(files), batch_size):
            rows = []
            asked = []
            index = []
            pixels = []
            some = files[first : first + batch_size]
            for file, image in zip(some, take(images, len(some))):
                if isinstance(image, str):
                    rows += [{"id": item["id"], "answer": "", "problem": image} for item in of_image[file]]
                    continue
                asked += of_image[file]
                index += [len(pixels)] * len(of_image[file])
                pixels.append(image)
            if pixels:
                sees = see(model, torch.stack(pixels), blind)
                prompts = [prompt.replace("{}", clean(item["question"] or "")) for item in asked]
                answers = answer_prompts(model, tok, prompts, sees, index, batch_size, options, template,
                                         taught)
                rows += [{"id": item["id"], "answer": text} for item, text in zip(asked, answers)]
            yield rows


def device_of(model):
    return next(model.parameters()).device


FORCED = "The answer is"  # every answer to ScienceQA begins so


def choose(model, tok, items, with_captions, images, has_image):
    """Questions with choices -> (the greedy token behind "The answer is", as texts; the letters of the
    largest logit among those offered), as MemVP asks ScienceQA."""
    import torch

    import data
    import finetune

    prompts = []
    targets = []
    letters = []
    for item in items:
        prompt, _ = finetune.ask_scienceqa(item, with_captions)
        answers = [finetune.question_ids(tok, prompt, f"{FORCED} {letter}.") for letter in finetune.LETTERS]
        # where the answers part, the letter stands; what is before it is given
        start = common_start([target for _, target in answers])
        prompts.append(answers[0][0])
        targets.append([*answers[0][1][:start], 0])
        letters.append([target[start] for _, target in answers[: len(item["choices"])]])
    device = device_of(model)
    target_ids = data.pad(targets, data.PADDING).to(device)
    padded = data.pad(prompts, data.PADDING, left=True)
    with torch.inference_mode():
        prefix, mask, memory = model.reads(padded, has_image, images=images.to(device))
        logits = model.llm(prefix, target_ids, mask, memory=memory).float().cpu()
    rows = [row[len(target) - 1] for row, target in zip(logits, targets)]
    greedy = [tok.decode([int(row.argmax())]) for row in rows]
    best = [finetune.LETTERS[int(row[ids].argmax())] for row, ids in zip(rows, letters)]
    return greedy, best


def answer_choices(model, tok, items, with_captions, batch_size, blind=False):
    """As answer_items, for questions with choices, some of which have no image: rows hold the "letter" of
    the largest logit, too."""
    import torch

    nothing = torch.zeros(3, model.image_size, model.image_size, dtype=torch.uint8)
    files = [item["image"] for item in items if item["image"]]
    with read_ahead(files, model.image_size, 2 * batch_size) as images:
        for first in range(0, len(items), batch_size):
            rows = []
            asked = []
            pixels = []
            for item in items[first : first + batch_size]:
                image = take(images, 1)[0] if item["image"] else nothing
                if isinstance(image, str):
                    rows.append({"id": item["id"], "answer": "", "letter": "", "problem": image})
                    continue
                asked.append(item)
                pixels.append(image)
            if asked:
                has_image = torch.tensor([bool(item["image"]) and not blind for item in asked])
                answers = choose(model, tok, asked, with_captions, torch.stack(pixels), has_image)
                for item, text, letter in zip(asked, *answers):
                    rows.append({"id": item["id"], "answer": text, "letter": letter})
            yield rows


def sizes(items):
    """{id: bytes of its image, or None}: by these a picture in another one's place is noticed."""
    files = {item["image"] for item in items if item["image"]}
    of_file = {file: os.path.getsize(file) for file in files if os.path.isfile(file)}
    return {item["id"]: of_file.get(item["image"]) for item in items}


def read_answers(folder, task, header, now):
    """Answers that all processes have written so far -> {id: row}; a line that was cut off is none, nor is
    one about a picture that has another size `now`. ValueError where they are another model's, or to other
    questions."""
    rows = {}
    for file in sorted(folder.glob(f"{task.name}.*.jsonl")):
        lines = file.read_text(encoding="utf-8").split("\n")
        try:
            found = [dict(json.loads(line)) for line in lines[:-1]]  # behind them is nothing, or a torn line
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); remove it, and what it answers is asked "
                             "again") from error
        for key in header if found else ():
            if found[0].get(key) != header[key]:
                raise ValueError(f"{file}: holds answers with {key} = {found[0].get(key)!r}, and now it is "
                                 f"{header[key]!r}; name another --out, or remove the file")
        for row in found[1:]:
            if now.get(row["id"]) not in (None, row.get("bytes")):
                continue
            if "problem" in rows.get(row["id"], {"problem": None}):  # a second try may have found the image
                rows[row["id"]] = row
    return rows


def open_answers(file, header):
    """A file of answers, opened to append whole lines; a new one begins with the header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = open(file, "a+b")
    opened.seek(0)
    whole = opened.read().rfind(b"\n") + 1
    opened.truncate(whole)
    if not whole:
        opened.write(json.dumps(header).encode() + b"\n")
    return opened


def share(items, processes):
    """This process's part of the items: all that are about the same image belong to one process."""
    shown = [item["image"] or item["id"] for item in items]
    images = {image: i for i, image in enumerate(dict.fromkeys(shown))}
    return [item for item, image in zip(items, shown) if images[image] % processes.world == processes.rank]


def answer_task(task, model, tok, template, header, args, folder, processes):
    """Answers what is not answered yet, each process its share of the images -> {id: row} of all. A
    signal ends the command behind the images at work."""
    from tqdm import tqdm

    import data
    import loop

    now = sizes(task.items)
    done = {id for id, row in read_answers(folder, task, header, now).items() if "problem" not in row}
    processes.sum(0)  # all have read before one writes
    mine = [item for item in share(task.items, processes) if item["id"] not in done]
    blind = args.images == "none"
    if task.name == "scienceqa":
        answered = answer_choices(model, tok, mine, header["captions"], args.batch_size, blind)
    else:
        options = {name: header[name] for name in (*CAPTION, "length_penalty_counts")}
        answered = answer_items(model, tok, mine, header["prompt"], options, args.batch_size, template, blind,
                                header.get("task"))
    bar = tqdm(total=len(mine), desc=task.name, unit="answer", leave=False,
               disable=processes.hides_bars)
    stopped = False
    with bar, open_answers(folder / f"{task.name}.{processes.rank}.jsonl", header) as file:
        try:
            for rows in answered:
                for row in rows:
                    file.write(json.dumps(row | {"bytes": now[row["id"]]}).encode() + b"\n")
                file.flush()
                bar.update(len(rows))
                if loop.must_stop():
                    raise data.Stopped
        except data.Stopped:
            stopped = True
    if processes.sum(stopped)[0]:
        processes.say("stopped; the same command goes on with the answers that are there")
        sys.exit(130)
    return read_answers(folder, task, header, now)


def answer_greedily(task, model, tok, batch_size, processes):
    """{id: row} of all items of a task, each process its share; nothing is kept on the disk.
    loop.Failure if all is to stop while it waits for images."""
    import data
    import loop

    asks = BENCHMARKS[task.name].asks
    options = {"max_new_tokens": (QUESTION if asks else CAPTION)["max_new_tokens"]}
    prompt = question_prompt(tok) if asks else ""
    # into sharded blocks all processes go together, with the same items
    mine = task.items if processes.mesh else share(task.items, processes)
    rows = []
    stopped = False
    try:
        for some in answer_items(model, tok, mine, prompt, options, batch_size):
            rows += some
    except data.Stopped:
        stopped = True
    if processes.sum(stopped)[0]:
        raise loop.Failure(f"stopped while the images of {task.name} were waited for; --resume goes on from "
                           "the state that was saved last")
    return {row["id"]: row for row in processes.gather(rows)}


def scorer(specs, limit, tok, batch_size, processes):
    """NAME=FILE[@IMAGES] each -> a function of a model, called by all processes: what it scores on at
    most `limit` items of each benchmark, {"COCO CIDEr": 71.3}, in papers' points.

    Greedy answers, short ones too, will do along the way of a training; the papers have five beams."""
    tasks = find_tasks(specs, limit)
    if any(task.name == "scienceqa" for task in tasks):
        raise ValueError("scienceqa is for runs of MemVP, and not scored along the way")
    for task in tasks:
        for problem, places in task.left_out.items():
            processes.say(f"{task.name}: {len(places):,} left out: {problem}, such as {places[0]}")

    def score(model):
        scores = {}
        for task in tasks:
            benchmark = BENCHMARKS[task.name]
            rows = answer_greedily(task, model, tok, batch_size, processes)
            unread = [row["problem"] for row in rows.values() if "problem" in row]
            if unread:
                processes.say(f"{task.name}: {len(unread):,} scored as no answer, since their images "
                              f"cannot be read, such as {unread[0]}")
            answers = {item["id"]: rows[item["id"]]["answer"] for item in task.items}
            found, _ = benchmark.score(task.items, answers, RULES[-1])
            metric = next(iter(found))
            scores[f"{benchmark.title} {metric}"] = found[metric]
        return scores

    return score


# --------------------------------------------------------------------------------------------- report


def draw_sheet(file, cells, columns=2, side=140, width=560):
    """A picture of images with what was asked, answered, and said by people: cells [(image file,
    [(text, colour)])]. Without cells there is no picture."""
    if not cells:
        return
    from PIL import Image, ImageDraw, ImageOps

    import data

    height = side + 20
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(cells):
        x = i % columns * width + 8
        y = i // columns * height + 8
        try:
            sheet.paste(ImageOps.contain(data.load_image(image), (side, side)), (x, y))
        except OSError:
            pen.rectangle((x, y, x + side, y + side), outline="red")
            pen.text((x + 4, y + 4), "cannot be read", fill="red")
        x += side + 10
        wrapped = [(part, colour) for text, colour in lines for part in textwrap.wrap(text, 66)[:2]]
        for row, (text, colour) in enumerate(wrapped[:9]):
            pen.text((x, y + 16 * row), text, fill=colour, font_size=12)
    sheet.save(file)


def show(task, answers, of_item, count=8):
    """The worst answers and as many drawn at random, as cells of draw_sheet."""
    rng = random.Random(0)
    pictured = [item for item in task.items if item["image"]]
    order = sorted(pictured, key=lambda item: (of_item[item["id"]], rng.random()))
    drawn = rng.sample(pictured, min(count, len(pictured)))
    cells = []
    for what, items in (("among the worst", order[:count]), ("drawn at random", drawn)):
        for item in items:
            lines = [(f"{what}: score {100 * of_item[item['id']]:.0f}", "gray")]
            lines += [(item["question"], "black")] if item["question"] else []
            lines.append((answers[item["id"]] or "(no answer)", "blue"))
            for text, times in Counter(item["answers"]).most_common(5):
                lines.append((text if times == 1 else f"{text}  ({times} people)", "darkgreen"))
            cells.append((item["image"], lines))
    return cells


def score_task(task, rows, args, folder):
    """Scores a task, and writes its result file and its picture -> {metric: score, and counts}."""
    answers = {item["id"]: rows[item["id"]]["answer"] for item in task.items}
    benchmark = BENCHMARKS[task.name]
    scores, of_item = benchmark.score(task.items, answers, args.normalise)
    if task.name == "scienceqa":
        letters = {id: rows[id]["letter"] for id in answers}
        scores |= compare_letters(task.items, answers, letters)
    id_name, answer_name = benchmark.result
    result = [{id_name: id, answer_name: answer} for id, answer in answers.items()]
    write_json(folder / f"{task.name}.json", result)
    draw_sheet(folder / f"{task.name}.png", show(task, answers, of_item))
    unread = {id: rows[id]["problem"] for id in answers if "problem" in rows[id]}
    strangers = len(rows.keys() - answers.keys())
    counts = {"items": len(answers), "images": len({item["image"] for item in task.items if item["image"]}),
              "empty answers": sum(not answer for answer in answers.values()) - len(unread)}
    notes = []
    if len(answers) != benchmark.size:
        notes.append(f"published scores are of {benchmark.size:,} items: they do not compare with these")
    for problem, places in task.left_out.items():
        notes.append(f"{len(places):,} left out: {problem}, such as {places[0]}")
    if unread:
        notes.append(f"{len(unread):,} scored as no answer, since their images cannot be read, such as "
                     f"{next(iter(unread.values()))}")
    if counts["empty answers"]:
        notes.append(f"{counts['empty answers']:,} answers are empty")
    if strangers:
        notes.append(f"{strangers:,} answers are to none of these items, and not scored")
    if len(answers) == 1 and not benchmark.asks:
        notes.append("CIDEr of one image alone is always 0")
    return {"scores": scores, **counts, "notes": notes}


def write_json(file, content):
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def table(model, results):
    """Lines: this model's first scores, beside the published ones where they are of as many items."""
    names = list(results)
    whole = {name for name in names if results[name]["items"] == BENCHMARKS[name].size}
    rows = {model: {name: next(iter(result["scores"].values())) for name, result in results.items()}}
    for who, scores in PUBLISHED.items():
        if whole & scores.keys():
            rows[who] = {name: scores[name] for name in whole & scores.keys()}
    width = max(map(len, rows))
    yield " " * width + "".join(f"{BENCHMARKS[name].title:>9}" for name in names)
    for who, scores in rows.items():
        cells = [f"{scores[name]:9.1f}" if name in scores else f"{'-':>9}" for name in names]
        yield f"{who:{width}}" + "".join(cells)
    if {"coco", "nocaps"} & whole:
        yield "(captions: CIDEr. BLIP-2's are of models fine-tuned on COCO at 364 pixels, none is zero-shot.)"


def describe(name, result):
    """Lines: all of a benchmark's scores, and what there is to know about them."""
    shown = [f"{metric} {score if not isinstance(score, float) else round(score, 2)}"
             for metric, score in result["scores"].items()]
    yield f"{name}: {result['items']:,} items of {result['images']:,} images; {', '.join(shown)}"
    if result["scores"].get("lemmatiser", "") is None:
        yield "    not lemmatised: pip install simplemma; the published scores of OK-VQA are, by spaCy"
    for note in result["notes"]:
        yield f"    {note}"


# ------------------------------------------------------------------------------------------ the command


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="NAME=FILE[@IMAGES]",
                        help=f"NAME is one of {', '.join(BENCHMARKS)}; FILE as downloaded, or the folder "
                             "that has it (default: all that lies under datasets/ or "
                             "$VPGTRANS_DATA, in folders of these names)")
    parser.add_argument("--model", required=True,
                        help="a run's folder (out/...), or a BLIP-2 checkpoint (folder, Hub id, short name)")
    parser.add_argument("--out", type=Path,
                        help="evaluation/ is made there (default: the run's folder, else out/MODEL)")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="ask about N items alone, for a look: such scores compare with no others")
    parser.add_argument("--normalise", choices=RULES, default="vpgtrans",
                        help="whose rules for answers come first: VQA's official ones since 2021, or the "
                             "older ones, on which the published scores rest (default: %(default)s); "
                             "both are in scores.json")
    add_asking(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "num_beams", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.question_prompt is not None and args.question_prompt.count("{}") != 1:
        parser.error("--question-prompt must have {} in the question's place, once")
    return args


def add_asking(parser):
    asking = parser.add_argument_group("asking")
    asking.add_argument("--template", metavar="NAME",
                        help="ask in this chat template, vicuna-v0 or vicuna-v1.1 (default: in the one that "
                             "stage 3 taught, if any; else the model continues the prompts)")
    asking.add_argument("--caption-prompt", default="",
                        help="(default: none, as VPGTrans; in a chat template a request in one sentence; "
                             "for a run of MemVP that learnt captions, what it was taught)")
    asking.add_argument("--question-prompt", metavar="TEXT",
                        help="with {} for the question (default: \"Question: {} Answer:\", for T5 "
                             "\"Question: {} Short answer:\", as VPGTrans; in a chat template the question, "
                             "and that the answer be short; for a run of MemVP that learnt VQAv2 or GQA, as "
                             "it was taught)")
    asking.add_argument("--images", choices=("right", "shuffled", "none"), default="right",
                        help="ask about each image, or about another one of the file, or without any, which "
                             "shows what can be guessed (default: %(default)s)")
    asking.add_argument("--captions", action="store_true",
                        help="ScienceQA: with captions.json's captions in the context, as MemVP's figures "
                             "were made, though its training had none (default: without)")
    asking.add_argument("--num-beams", type=int, default=5, help="(default: %(default)s, as the papers)")
    asking.add_argument("--length-penalty-counts", choices=("new", "prompt"), default="prompt",
                        help="which tokens are a text's length, for beam search's penalty: the new ones, or "
                             "the prompt's as well, on which the published scores of OPT and LLaMA rest "
                             "(default: %(default)s)")
    asking.add_argument("--batch-size", type=int, default=16,
                        help="images, and questions, at once; no answer depends on it but through rounding "
                             "(default: %(default)s)")
    asking.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                        help="of ViT and LLM (default: %(default)s)")
    asking.add_argument("--llm-weights", choices=("full", "int8", "nf4"),
                        help="of the LLM: as --precision says, or quantised, which takes less memory "
                             "(default: as in the run's training, else full)")


def find_tasks(named, limit):
    """-> [Task] of the benchmarks named, or of what lies under datasets/; `limit`: items of each, or None
    for all."""
    specs = []
    for spec in named:
        name, _, source = spec.partition("=")
        if name not in BENCHMARKS or not source:
            raise ValueError(f"{spec!r} does not read NAME=FILE[@IMAGES] with NAME one of "
                             f"{', '.join(BENCHMARKS)}")
        specs.append((name, source))
    if not specs:
        root = Path(os.environ.get("VPGTRANS_DATA", "datasets"))
        for name, benchmark in BENCHMARKS.items():
            if known_files(benchmark, root / name):
                specs.append((name, str(root / name)))
        if not specs:
            places = "\n".join(f"  {root / name}/{' or '.join(b.files)}" for name, b in BENCHMARKS.items())
            raise FileNotFoundError(f"no benchmark: name one, NAME=FILE[@IMAGES], or put there\n{places}")
    twice = [name for name, count in Counter(name for name, _ in specs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    tasks = [read_task(name, source) for name, source in specs]
    if limit:
        for task in tasks:
            random.Random(0).shuffle(task.items)
            del task.items[limit:]
    return tasks


def describe_asking(task, args, tok, template, taught=None):
    """What the answers of a task depend on beside the model: in the first line of their file. ValueError
    where --captions finds none."""
    keys = ["id", "question", "hint", "choices", *["caption"] * args.captions]
    said = [[item.get(key) for key in keys] + [os.path.basename(item["image"] or "")] for item in task.items]
    digest = short_hash(json.dumps(said).encode())
    same = {"images": args.images, "items": len(task.items), "digest": digest}
    if task.name == "scienceqa":
        if args.captions and not any("caption" in item for item in task.items):
            raise ValueError("--captions: no question has one; captions.json, which lies in data/ of "
                             "lupantech/ScienceQA, belongs beside problems.json")
        return same | {"prompt": f"QCM-A, {FORCED}", "captions": args.captions}
    asks = task.items[0]["question"] is not None
    fits = fitting_task(task.name, taught)
    if fits:
        same["task"] = fits
    own = args.question_prompt if asks else args.caption_prompt
    prompt = own or default_prompt(asks, tok, template, fits)
    template_hash = template and short_hash(template.source.encode())
    return same | (QUESTION if asks else CAPTION) | {
        "prompt": prompt, "template": template_hash, "num_beams": args.num_beams,
        "length_penalty_counts": args.length_penalty_counts}


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


def with_images(items, images):
    """Items as --images says: "shuffled", each image's questions are about the next image of the file.
    ValueError where there is no other one."""
    if images != "shuffled":
        return items
    files = list(dict.fromkeys(item["image"] for item in items if item["image"]))
    if len(files) < 2:
        raise ValueError(f"--images shuffled needs two images; here are {len(files)}")
    lent = dict(zip(files, files[1:] + files[:1]))
    return [item | {"image": lent.get(item["image"])} for item in items]


def default_out(model):
    """The run's folder, else out/ and the model's name."""
    import hub

    if Path(model).is_dir() and hub.read_config(model).get("model_type") in hub.RUNS:
        return Path(model)
    return Path("out") / model.strip("./").replace("/", "--")


def load(args, device):
    """-> the model, its tokenizer, and the chat template in which it is asked, or None."""
    import transfer

    template = transfer.find_template(args.model, args.template)
    model, tok = transfer.load_model(args.model, transfer.DTYPES[args.precision], device, args.llm_weights)
    return model, tok, template


def why_no_letters(args, model, taught):
    """Why a model cannot be asked ScienceQA, or None."""
    if model.num_query_tokens:
        return (f"scienceqa is for runs of MemVP (finetune.py), and {args.model} is none: it cannot be asked "
                "without an image")
    if taught == "scienceqa-words":
        return (f"scienceqa asks for a letter, and {args.model} has learnt to answer in words: python -m "
                f"study.memory score {args.model} FOLDER scores it")
    return None


def evaluate(args, processes):
    """-> {benchmark: result} on the first process."""
    import hub
    import loop
    import runs

    tasks = find_tasks(args.benchmarks, args.limit)
    if args.captions and all(task.name != "scienceqa" for task in tasks):
        raise ValueError("--captions is for scienceqa, which is not among what is asked")
    folder = args.out or default_out(args.model)
    folder /= "evaluation" + (f"-{args.images}" if args.images != "right" else "")
    if args.limit:
        folder = folder.with_name(f"{folder.name}-limit-{args.limit}")
    with processes.first_goes_first():
        model, tok, template = load(args, processes.device)
        taught = taught_task(args.model)
    wrong = why_no_letters(args, model, taught)
    askable = [task for task in tasks if task.name != "scienceqa" or not wrong]
    if askable != tasks and (args.benchmarks or not askable):
        raise ValueError(wrong)
    fingerprint = hub.fingerprint(dict(model.named_parameters()))
    asked = {"model": hub.lasting_name(args.model), "fingerprint": fingerprint, "precision": args.precision,
             "llm_weights": model.llm.weights}
    lock = contextlib.nullcontext()
    if processes.rank == 0:
        lock = runs.locked(folder, " ".join(sys.argv), processes.say)
    results = {}
    with lock, loop.stopping_when_asked():
        for task in askable:
            task.items = with_images(task.items, args.images)
            header = asked | describe_asking(task, args, tok, template, taught)
            rows = answer_task(task, model, tok, template, header, args, folder / "answers", processes)
            if processes.rank == 0:
                results[task.name] = score_task(task, rows, args, folder) | {"asked": header}
                processes.say("\n".join(describe(task.name, results[task.name])))
        if processes.rank == 0:
            report(args, asked["model"], results, folder, processes.say)
    return results


def report(args, model, results, folder, say):
    """Writes scores.json, and prints the table."""
    settings = {"model": model, "normalise": args.normalise, "limit": args.limit, "images": args.images}
    write_json(folder / "scores.json", settings | {"benchmarks": results})
    say("\n" + "\n".join(table(args.model, results)))
    if args.limit:
        say(f"With --limit {args.limit} this is a look, and no score; CIDEr, moreover, reads what is rare "
            "off the images at hand.")
    if args.images != "right":
        say(f"With --images {args.images} this is what is guessed, and no score.")
    say(f"Answers, scores and pictures are in {folder}/")


def main(argv=None):
    import torch

    import loop

    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    args = parse_arguments(argv)
    try:
        return evaluate(args, loop.Processes.start(args.precision))
    except torch.OutOfMemoryError as error:
        loop.end_with(f"GPU memory ran out; lower --batch-size, and start again: what is answered stays "
                      f"({error})", "evaluate.py")
    except (OSError, ValueError) as error:
        loop.end_with(error, "evaluate.py")


if __name__ == "__main__":
    import loop

    loop.run_command(main)
