"""Caption images, or ask about them, with a model that VPGTrans trained (or a BLIP-2 checkpoint).

    python sample.py cat.jpg dog.png --model out/opt-2.7b-to-opt-6.7b
    python sample.py cat.jpg --model out/opt-2.7b-to-opt-6.7b --prompt "Question: what colour is the cat? Answer:"
"""

import argparse
import sys

import torch

import data
import hub
import llm as language_models
import qformer
import vpgtrans


def load_model(name, dtype=torch.bfloat16, device="cpu"):
    """A run of ours, a BLIP-2 folder or its Hub id -> (VisualLLM in eval mode, its tokenizer)."""
    place = hub.resolve(name, "model")
    vpg = qformer.load_vpg(place.folder, dtype=dtype, device=device, vit_folder=place.vit)
    llm = language_models.load_llm(place.llm, dtype=dtype, device=device)
    hub.check_belongs(place, vit=vpg.frozen_parameters(), llm=dict(llm.named_parameters()))
    return vpgtrans.VisualLLM(vpg, qformer.load_projector(place.folder).to(device), llm).eval(), data.load_tokenizer(place.tokenizer)


def answer(model, tok, images, prompt="", **options):
    """What the model says about images (B,3,H,W) uint8 behind a prompt: a caption where that is empty. -> list of texts"""
    prompts = torch.tensor([data.prompt_ids(tok, model.vpg.num_query_tokens, prompt)]).expand(len(images), -1)
    device = model.projector.weight.device
    ids = model.generate(prompts, images=data.normalise(images.to(device)), stop=((tok.end_id,), (tok.eos_id,)), **options)
    return [tok.decode(row).strip() for row in ids]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", required=True, help="a run's folder (out/...), or a BLIP-2 checkpoint (folder, Hub id, short name)")
    parser.add_argument("--prompt", default="", help="what to continue, such as \"Question: what shape is it? Answer:\" (default: "
                        "nothing, which gives a caption)")
    parser.add_argument("--num-beams", type=int, default=5, help="beam search (default: %(default)s, as the paper)")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--min-new-tokens", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="above 0 favours long answers (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: draw at random instead of searching, with --num-beams 1")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the most probable tokens that make up this share")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of ViT and LLM (default: %(default)s)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {key: getattr(args, key) for key in ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "temperature", "top_p")}
    try:
        images = [data.load_image(file) for file in args.images]
        if args.max_new_tokens < 1:
            raise ValueError("--max-new-tokens must be at least 1")
        model, tok = load_model(args.model, torch.bfloat16 if args.precision == "bf16" else torch.float32, device)
        images = torch.stack([data.resize(image, model.vpg.image_size) for image in images])
        answers = [text for batch in images.split(16) for text in answer(model, tok, batch, args.prompt, **options)]
    except (OSError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    for file, text in zip(args.images, answers):
        print(f"{file}: {text}")


if __name__ == "__main__":
    main()
