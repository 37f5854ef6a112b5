"""Speed of evaluation, of several questions about each image or of captions, side by side with LAVIS's
way and transformers.

    python -m benchmarks.answers                           # a small BLIP-2, 8 questions an image
    python -m benchmarks.answers --size opt-2.7b           # of the paper's source, on one GPU
    python -m benchmarks.answers --questions 32            # as GQA has
    python -m benchmarks.answers --captions                # of 30 tokens

Prints one Markdown table. Questions are 6 to 12 tokens long behind 32 soft prompts, BOS and two tokens
that all begin with; answers are 10 tokens, by 5 beams. "ours" is evaluate.py's way: an image is seen
once, what its questions begin with is read once, and questions of like length go together. "LAVIS's
way" is with our model, too: ViT, Q-Former and the whole prompt anew for each question, in batches as
they come. "times as long as ours" is measured, "predicted" is the same ratio of the multiplications
that have to be done, counted beforehand. With --precision fp32 all must answer alike, or nothing is
timed. A caption has nothing to share: there, LAVIS's way is ours.

Figures mean something on an otherwise idle machine only.
"""

import random
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import data
import evaluate
from benchmarks import peers

BEAMS = 5
START = [100, 101]  # what all questions begin with, as "Question:"
ANSWER = {"num_beams": BEAMS, "max_new_tokens": 10, "length_penalty": -1.0}
CAPTION = {"num_beams": BEAMS, "max_new_tokens": 30, "length_penalty": 1.0}
END = 50271  # random models do not say it

# Texts are numbers: what a tokenizer would make of words does not matter here.
TOKENIZER = SimpleNamespace(
    bos_id=peers.BOS, eos_id=END, end_id=END, encoder_decoder=False,
    encode=lambda text: [int(word) for word in text.split()],
    decode=lambda ids: " ".join(map(str, ids)))


def make_questions(images, questions):
    """-> texts, and which image each is about, in the order of a file."""
    rng = random.Random(0)
    texts = []
    for _ in range(images * questions):
        ids = START + [rng.randrange(200, 50000) for _ in range(rng.randint(6, 12))]
        texts.append(" ".join(map(str, ids)))
    return texts, [i // questions for i in range(len(texts))]


# --------------------------------------------------------------------------------------- three ways


@dataclass
class Asked:
    """Images, what is asked about them as texts, which image each is about, and how."""

    images: torch.Tensor  # (N,3,H,W)
    texts: list
    index: torch.Tensor  # (texts,)
    batch_size: int
    options: dict  # of generate

    def batches(self):
        for first in range(0, len(self.texts), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield self.texts[part], self.images[self.index[part]]


def answer_ours(model, asked):
    with torch.inference_mode():
        sees = model.see(asked.images)
    index = asked.index.tolist()
    return evaluate.answer_prompts(model, TOKENIZER, asked.texts, sees, index, asked.batch_size,
                                   asked.options)


def answer_lavis(model, asked):
    """Each question with its image, in the order of the file."""
    answers = []
    for texts, images in asked.batches():
        rows = [data.prompt_ids(TOKENIZER, 32, text) for text in texts]
        prompts = data.pad(rows, data.PADDING, left=True)
        answers += model.generate(prompts, images=images, stop=((END,),), **asked.options)
    return [TOKENIZER.decode(ids) for ids in answers]


def answer_theirs(peer, asked):
    """transformers' generate, likewise."""
    answers = []
    for texts, images in asked.batches():
        rows = [[peers.IMAGE_ID] * 32 + [peers.BOS, *TOKENIZER.encode(text)] for text in texts]
        ids = data.pad(rows, 1, left=True).to(images.device)
        mask = data.pad([[1] * len(row) for row in rows], 0, left=True).to(images.device)
        generated = peer.generate(
            pixel_values=images, input_ids=ids, attention_mask=mask, use_cache=True, do_sample=False,
            pad_token_id=1, **asked.options)
        answers += generated[:, -asked.options["max_new_tokens"] :].tolist()
    return [TOKENIZER.decode(ids) for ids in answers]


# ----------------------------------------------------------------------------------------- operations


def count_products(model, asked):
    """{way: multiplications an answer}, of ViT, Q-Former and language model, weights times positions.
    transformers reads the prompt once for each beam."""
    def size(module):
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    vpg = model.vpg
    positions = (vpg.image_size // 14) ** 2 + 1
    crossed = [layer.crossattention.attention for layer in vpg.qformer.encoder["layer"]
               if hasattr(layer, "crossattention")]
    keys = sum(size(a["key"]) + size(a["value"]) for a in crossed)
    see = size(vpg.vision_model) * positions + (size(vpg.qformer) - keys) * 32 + keys * positions
    blocks = sum(map(size, model.llm.layers))
    head = model.llm.lm_head.weight.numel()
    whole = 33 + statistics.mean(len(text.split()) for text in asked.texts)
    write = (asked.options["max_new_tokens"] - 1) * BEAMS * (blocks + head) + head
    questions = len(asked.texts) / len(asked.images)
    start = 33 + len(START) if questions > 1 else whole
    return {
        "ours": (see + blocks * start) / questions + blocks * (whole - start) + write,
        "LAVIS's way": see + blocks * whole + write,
        "transformers": see + BEAMS * blocks * whole + write,
    }


# --------------------------------------------------------------------------------------------- command


def compare(args):
    models = peers.build_models(args.size, args.dtype, args.device)
    ours = models["ours"].requires_grad_(False).eval()
    images = peers.random_images(ours, args.images, args.device)
    if args.captions:
        asked = Asked(images, [""] * args.images, torch.arange(args.images), args.batch_size, CAPTION)
    else:
        texts, index = make_questions(args.images, args.questions)
        asked = Asked(images, texts, torch.tensor(index), args.batch_size, ANSWER)

    def in_precision(answer, model):
        def run():
            with peers.autocast_to(args.dtype, args.device)(), torch.inference_mode():
                return answer(model, asked)
        return run

    functions = {"ours": in_precision(answer_ours, ours)}
    if not args.captions:
        functions["LAVIS's way"] = in_precision(answer_lavis, ours)
    for name, peer in models.items():
        if peer is not ours:
            functions[name] = in_precision(answer_theirs, peer.eval())
    said = {name: function() for name, function in functions.items()}  # also warms up
    equal = {}
    for name, answers in said.items():
        equal[name] = statistics.mean(a == b for a, b in zip(said["ours"], answers))
    if args.precision == "fp32" and min(equal.values()) < 1:
        raise ValueError(f"not all answer alike: {equal}")
    seconds = peers.take_turns(functions, args.repeats, args.device)
    print_speeds(seconds, count_products(ours, asked), len(asked.texts), equal)


def print_speeds(seconds, products, count, equal):
    mine = statistics.median(seconds["ours"])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        predicted = products[name.partition(",")[0]] / products["ours"]
        rows.append([name, *peers.in_ms(times, 0), f"{count / median:.1f}", f"{median / mine:.2f}",
                     f"{predicted:.2f}", f"{equal[name]:.0%}"])
    columns = ["ms", "min - max", "answers/s", "times as long as ours", "predicted", "equal answers"]
    peers.print_table(["implementation", *columns], rows)


def parse_arguments(argv):
    parser = peers.new_parser("benchmarks.answers", __doc__)
    peers.add_model_arguments(parser)
    parser.add_argument("--images", type=peers.at_least_one, default=8,
                        help="(default: %(default)s)")
    parser.add_argument("--questions", type=peers.at_least_one, default=8,
                        help="about each image (default: %(default)s)")
    parser.add_argument("--captions", action="store_true", help="instead: a caption of each image")
    parser.add_argument("--batch-size", type=peers.at_least_one, default=16,
                        help="questions answered at a time (default: %(default)s)")
    return peers.parse(parser, argv)


def main(argv=None):
    args = parse_arguments(argv)
    each = "a caption each" if args.captions else f"{args.questions} questions each"
    what = (f"{args.size}, {args.precision}, {args.images} images, {each}, "
            f"batch {args.batch_size}, medians of {args.repeats}")
    peers.print_heading("benchmarks.answers", argv, what, args.device)
    compare(args)


if __name__ == "__main__":
    main()
