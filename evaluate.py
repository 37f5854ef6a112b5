r"""Score captions and answers about images: COCO, NoCaps, VQAv2, GQA, OK-VQA.

The metrics stand first, as pure functions that need Python alone: this file copied into another
project scores CIDEr and VQA accuracy without Java and without a framework.

    score, of_image = cider({7: "a red cup"}, {7: ["a red cup on a table", "the cup is red"], ...})
    vqa_accuracy("two", ["2"] * 9 + ["3"])                                                      # 1.0
"""

import math
import re
from collections import Counter

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
