"""What each technique contributes to the speed of a training step: the step as it is, and without it.

    python -m benchmarks.techniques                         # a small BLIP-2, minutes on a laptop
    python -m benchmarks.techniques --size opt-2.7b         # the paper's source, on one GPU

Prints a Markdown table for each stage. A step is four micro-batches with captions of unequal lengths,
half to one and a half times --target-tokens, then AdamW. "times as long" is beside the step as it is:
above 1, the technique makes training faster by so much. The last rows are what a run may choose:
compiled blocks, and in stage 1 the queries of the frozen VPG from a cache (train.py --cache).

All ways run on the same weights and take turns. Figures mean something on an otherwise idle machine
only.

B batch, T target length, P prefix length, V vocabulary.
"""

import contextlib
import copy
import statistics
from collections import namedtuple
from functools import partial

import torch
import torch.nn.functional as F

import llm as language_models
import qformer
import vpgtrans
from benchmarks import peers

# `around` makes a context in which the step runs: there, something is not as it is
Way = namedtuple("Way", "around model batches sees")

# --------------------------------------------------------------------------- what the techniques replace


def score_all_positions(llm, prefix, target_ids, prefix_mask=None, scored=None, memory=None):
    """DecoderOnly.loss as it is usually written: logits of the prefix's positions too, all at once.
    Every target counts, and there is no memory."""
    T = target_ids.shape[1]
    prefix, _, positions, mask = llm.lay_out(prefix, prefix_mask, T - 1)
    embeddings = llm.embed(target_ids[:, :-1].clamp(min=0))
    x = llm.read(torch.cat([prefix, embeddings], dim=1), positions, mask)
    logits = language_models.word_scores(llm.lm_head, x).float()  # (B, P + T - 1, V)
    targets = F.pad(target_ids, (prefix.shape[1] - 1, 0), value=-100)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, (target_ids >= 0).sum()


def qformer_sdpa(q, k, v, dropout=0.0):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def llm_sdpa(q, k, v, mask=None, causal=False):
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


@contextlib.contextmanager
def patched(*changes):
    """Each change is (place, name, what stands there for a while)."""
    before = [getattr(place, name) for place, name, _ in changes]
    for place, name, new in changes:
        setattr(place, name, new)
    try:
        yield
    finally:
        for (place, name, _), old in zip(changes, before):
            setattr(place, name, old)


@contextlib.contextmanager
def unfrozen(model):
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


# -------------------------------------------------------------------------------------------- a step


def random_batches(B, target_tokens, device):
    """Two lists of four batches of ids (B,T), -100 where a caption is over, of the same captions:
    those of like lengths together, and as they come."""
    longest = target_tokens * 3 // 2
    lengths = torch.randint(target_tokens // 2, longest + 1, (4 * B,), device=device)
    ids = torch.randint(4, peers.IMAGE_ID, (4 * B, longest), device=device)
    ids.masked_fill_(torch.arange(longest, device=device) >= lengths[:, None], -100)

    def batches(order):
        return [ids[rows, : int(lengths[rows].max())] for rows in order.split(B)]

    return batches(lengths.argsort()), batches(torch.arange(4 * B, device=device))


def all_ways(model, compiled, B, target_tokens, device):
    """{name: Way}, the step as it is first."""
    images = {"images": peers.random_images(model, B, device)}
    queries = torch.randn(B, model.vpg.num_query_tokens, model.vpg.dim, device=device)
    like, unlike = random_batches(B, target_tokens, device)
    blocks = language_models.FrozenHeadLoss
    no_limit = {device.type: 2**62}
    whole = partial(patched, (blocks, "BLOCK", no_limit), (blocks, "SLICE", no_limit))
    prefix_too = partial(patched, (language_models.OPT, "loss", score_all_positions))
    as_it_is = Way(contextlib.nullcontext, model, like, images)
    ways = {
        "as it is": as_it_is,
        "without micro-batches of like lengths": as_it_is._replace(batches=unlike),
        "all logits at once": as_it_is._replace(around=whole),
        "logits of the prefix, too": as_it_is._replace(around=prefix_too),
        "gradients for frozen weights, too": as_it_is._replace(around=partial(unfrozen, model)),
    }
    if device.type == "cpu":  # elsewhere it is torch's already
        sdpa = partial(patched, (qformer, "attention", qformer_sdpa),
                       (language_models, "attention", llm_sdpa))
        ways["torch's attention"] = as_it_is._replace(around=sdpa)
    ways["blocks compiled"] = as_it_is._replace(model=compiled)
    ways["queries from a cache"] = as_it_is._replace(sees={"queries": queries})
    return ways


def step(way, optimizer, autocast):
    B = len(way.batches[0])
    prompt = peers.image_prompt(way.model, vpgtrans.IMAGE, B)
    with way.around():
        for targets in way.batches:
            with autocast():
                loss, _ = way.model(prompt, targets, **way.sees)
                loss.backward()
        optimizer.step()
        way.model.zero_grad(set_to_none=True)


def new_optimizer(model, stage):
    """The rate is 0: the same work, but the weights, which others share, stay."""
    vpgtrans.enter_stage(model, stage)
    return torch.optim.AdamW(vpgtrans.parameter_groups(model, stage), lr=0.0, fused=True)


def time_stage(what, ways, autocast, repeats, device):
    """{name: seconds of each step}"""
    stage = vpgtrans.STAGES[what]
    if what != "warm-up":  # the VPG trains: its queries are others after each step
        ways = {name: way for name, way in ways.items() if "queries" not in way.sees}
    models = {way.model for way in ways.values()}
    optimizers = {model: new_optimizer(model, stage) for model in models}
    steps = {name: partial(step, way, optimizers[way.model], autocast) for name, way in ways.items()}
    for run in steps.values():  # compiles, allocates the moments
        run()
    return peers.take_turns(steps, repeats, device)


def main(argv=None):
    parser = peers.new_parser("benchmarks.techniques", __doc__)
    peers.add_model_arguments(parser)
    parser.add_argument("--batch-size", type=peers.at_least_one, default=8,
                        help="samples a micro-batch (default: %(default)s)")
    parser.add_argument("--target-tokens", type=peers.at_least_one, default=16,
                        help="of a caption, on average (default: %(default)s)")
    args = peers.parse(parser, argv)
    B = args.batch_size
    what = (f"{args.size}, {args.precision}, batch {B}, {args.target_tokens} target tokens, "
            f"medians of {args.repeats}")
    peers.print_heading("benchmarks.techniques", argv, what, args.device)
    model = peers.build_models(args.size, args.dtype, args.device)["ours"]
    compiled = copy.deepcopy(model)
    peers.compile_all([*compiled.vpg.layers, *compiled.llm.layers])
    ways = all_ways(model, compiled, B, args.target_tokens, args.device)
    autocast = peers.autocast_to(args.dtype, args.device)
    for name in ("warm-up", "fine-tune"):
        seconds = time_stage(name, ways, autocast, args.repeats, args.device)
        usual = statistics.median(seconds["as it is"])
        rows = []
        for way, times in seconds.items():
            rows.append([way, *peers.in_ms(times, 0), f"{statistics.median(times) / usual:.2f}"])
        peers.print_table([f"{name}, 4 x {B} samples", "ms", "min - max", "times as long"], rows)


if __name__ == "__main__":
    main()
