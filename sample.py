r"""Caption images, or ask about them, with a model that VPGTrans trained (or a BLIP-2 checkpoint).

    python sample.py cat.jpg dog.png --model out/opt-2.7b-to-opt-6.7b
    python sample.py cat.jpg --model out/opt-2.7b-to-opt-6.7b \
        --prompt "Question: what colour is the cat? Answer:"
    python sample.py cat.jpg --model out/opt-6.7b-to-vicuna-7b-chat --prompt "What colour is the cat?"
"""

import argparse
import sys

import torch

import data
import llm as language_models
import transfer


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", required=True,
                        help="a run's folder (out/...), or a BLIP-2 checkpoint (folder, Hub id, "
                             "short name)")
    parser.add_argument("--prompt", default="",
                        help="what to continue, such as \"Question: what shape is it? Answer:\"; a model "
                             "that stage 3 taught to converse is asked it as a question, in its chat "
                             "template (default: a caption)")
    parser.add_argument("--template", choices=sorted(data.TEMPLATES),
                        help="ask in this chat template (default: in the one that stage 3 taught, if any)")
    parser.add_argument("--num-beams", type=int, default=5,
                        help="beam search (default: %(default)s, as the paper)")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--min-new-tokens", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--length-penalty", type=float, default=1.0,
                        help="above 0 favours long answers (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="above 0: draw at random instead of searching, with --num-beams 1")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="draw from the most probable tokens that make up this share")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                        help="of ViT and LLM (default: %(default)s)")
    parser.add_argument("--llm-weights", choices=("full", "int8", "nf4"),
                        help="of the LLM: as --precision says, or quantised, which takes less memory "
                             "(default: as in the run's training, else full)")
    return parser.parse_args(argv)


OF_GENERATE = ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "temperature",
               "top_p")


def answer_all(args):
    """Yields each image's file and what the model says about it."""
    options = {name: getattr(args, name) for name in OF_GENERATE}
    language_models.check_generation(args.max_new_tokens, args.num_beams, args.temperature, args.top_p)
    for file in args.images:  # before gigabytes are read
        with data.open_image(file):
            pass
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = transfer.DTYPES[args.precision]
    template = transfer.find_template(args.model, args.template)
    model, tok = transfer.load_model(args.model, dtype, device, args.llm_weights)
    for start in range(0, len(args.images), 16):
        some = args.images[start : start + 16]
        pixels = torch.stack([data.read_image(file, model.image_size) for file in some])
        yield from zip(some, transfer.answer(model, tok, pixels, args.prompt, template, **options))


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    args = parse_arguments(argv)
    try:
        for file, text in answer_all(args):
            print(f"{file}: {text}", flush=True)
    except (OSError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
