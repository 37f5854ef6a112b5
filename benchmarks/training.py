"""Speed and memory of training, side by side with transformers.

    python -m benchmarks.training                                   # a small BLIP-2, on a laptop
    python -m benchmarks.training --size opt-2.7b --batch-size 32 --compile      # on one GPU
    python -m benchmarks.training --llm opt-125m                    # a language model alone
    python -m benchmarks.training --captions 5                      # five captions an image

The first two (the second is the paper's source, with random weights) print two Markdown tables:

    forward     ViT and Q-Former alone, without gradients
    training    forward, backward and AdamW, in both stages. "ours, cached" has the queries of the
                frozen VPG at hand, as with train.py --cache

With --llm, training is forward and backward to the soft prompts: 32 of them, then the target. With
--captions K, ours alone: K captions of each image packed behind one prefix, or each behind its own.

"of the limit" is the time that the arithmetic alone would take, at the speed of one large matrix
product measured here, over the time it took. A ratio above 1: ours is faster than the better of
transformers' two kinds of attention. All run on the same random weights and the same batch, take turns,
and are timed only if they agree in the loss and in a gradient. Figures mean something on an otherwise
idle machine only.

B batch, T target length, P prefix length, S sequence length, Q query tokens, N image tokens.
"""

import contextlib
import statistics
from functools import partial

import torch

import llm as language_models
import vpgtrans
from benchmarks import peers

# ----------------------------------------------------------------------------------------- the limit


def matrices(module, only=""):
    """The number of parameters in the matrices of a module, those with `only` in their names."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if p.ndim > 1 and only in name)


def vit_products(vpg):
    """Multiply-adds that the ViT needs for an image."""
    vit = vpg.vision_model
    N = vit.embeddings.position_embedding.shape[1]
    width = vit.post_layernorm.weight.numel()
    attention = 2 * len(vit.encoder["layers"]) * N * N * width  # scores, then weighted sums
    patches = matrices(vit.embeddings.patch_embedding) * (N - 1)
    return matrices(vit.encoder) * N + patches + attention


def qformer_products(vpg):
    """Multiply-adds that the Q-Former needs for an image."""
    former = vpg.qformer
    N = vpg.vision_model.embeddings.position_embedding.shape[1]
    Q = vpg.num_query_tokens
    blocks = former.encoder["layer"]
    crossings = sum(hasattr(block, "crossattention") for block in blocks)
    on_image = 2 * matrices(former, "crossattention.attention.key")  # and value
    attention = 2 * Q * (len(blocks) * Q + crossings * N) * vpg.dim
    return (matrices(former) - on_image) * Q + on_image * N + attention


def step_flops(model, stage, B, T):
    """Floating-point operations that a training step of VisualLLM cannot do without.

    Forward 2 x parameters x tokens, backward as much for gradients to activations, and as much for
    those to weights. So 2 x for the ViT; 4 x for the LLM, frozen, but gradients pass through it;
    2 x, then 6 x for the Q-Former; 4 x, then 6 x for the projector. Below in multiply-adds.
    """
    llm = model.llm
    Q = model.vpg.num_query_tokens
    S = Q + T  # P + T - 1
    joint = "Q-Former" in stage.trains
    see = vit_products(model.vpg)
    query = qformer_products(model.vpg) * (3 if joint else 1)
    project = matrices(model.projector) * Q * (3 if joint else 2)
    attention = 3 * len(llm.layers) * S * S * llm.dim  # causal: half
    read = 2 * (matrices(llm.layers) * S + llm.vocab_size * llm.dim * T) + attention
    return 2 * B * (see + query + project + read)


def llm_flops(llm, B, T, P=32):
    """As step_flops, for a language model alone.

    2 x parameters x tokens forward, and as much for gradients to activations; the products in
    attention, of two activations, need twice as much backward.
    """
    head = T * llm.vocab_size * llm.dim
    if isinstance(llm, language_models.T5):
        return 4 * B * (t5_products(llm, T, P) + head)
    S = P + T - 1
    inner = llm.layers[0].self_attn.q_proj.out_features
    attention = 1.5 * len(llm.layers) * S * S * inner
    return 4 * B * (matrices(llm.layers) * S + attention + head)


def t5_products(llm, T, P):
    """Multiply-adds of a T5 without its head, attention's by 1.5: see llm_flops."""
    encoder = llm.encoder.block
    decoder = llm.decoder.block
    # the decoder reads T, but makes keys and values of the P that the encoder has read
    keys = 2 * sum(matrices(block.layer[1]["EncDecAttention"].k) for block in decoder)
    read = matrices(encoder) * P + (matrices(decoder) - keys) * T + keys * P
    inner = llm.heads * encoder[0].layer[0]["SelfAttention"].head_dim
    pairs = len(encoder) * P * P + len(decoder) * (T * T / 2 + T * P)
    return read + 3 * inner * pairs


def limit(flops, speed):
    """For the lines below a table: so many operations, and the time of a product as large."""
    return f"{flops / 1e12:.3g} TFLOP a step, at best {flops / speed * 1e3:,.1f} ms"


def shares(seconds, flops, speed):
    """{name: cell of the share of the limit}"""
    best = flops / speed
    return {name: f"{best / statistics.median(times):.0%}" for name, times in seconds.items()}


# ------------------------------------------------------------------------------------------- forward


def see(model, images):
    """(B,3,H,W) -> (B,N,Dv): what the Q-Former looks at, by ours or transformers' ViT."""
    if isinstance(model, vpgtrans.VisualLLM):
        return model.vpg.vision_model.post_layernorm(model.vpg.features(images))
    return model.vision_model(images).last_hidden_state


def query(model, features):
    """(B,N,Dv) -> (B,Q,Dq), by ours or transformers' Q-Former."""
    if isinstance(model, vpgtrans.VisualLLM):
        tokens = model.vpg.query_tokens.expand(len(features), -1, -1)
        return model.vpg.qformer(tokens, features)
    tokens = model.query_tokens.expand(len(features), -1, -1)
    return model.qformer(query_embeds=tokens, encoder_hidden_states=features).last_hidden_state


def time_vpg(models, B, autocast, repeats, device):
    """{"ViT" or "Q-Former": {name: seconds of each forward pass}}

    ValueError if the outputs are more than 5% apart (by norm).
    """
    @torch.no_grad()
    def run(part, name, inputs):
        with autocast():
            outputs = part(models[name], inputs)
        return outputs.float()

    seconds = {}
    inputs = peers.random_images(models["ours"], B, device)
    for what, part in {"ViT": see, "Q-Former": query}.items():
        outputs = {name: run(part, name, inputs) for name in models}
        for name in models:
            apart = peers.relative_distance(outputs[name], to=outputs["ours"])
            if not apart < 5e-2:
                raise ValueError(f"{what}: ours and {name} compute different things: "
                                 f"{apart:.2g} apart (relative)")
        functions = {name: partial(run, part, name, inputs) for name in models}
        seconds[what] = peers.take_turns(functions, repeats, device)
        inputs = outputs["ours"]
    return seconds


def forward_rows(models, autocast, speed, args):
    B = args.batch_size
    vpg = models["ours"].vpg
    products = {"ViT": vit_products(vpg), "Q-Former": qformer_products(vpg)}
    timed = time_vpg(models, B, autocast, args.repeats, args.device)
    for what, seconds in timed.items():
        more = shares(seconds, 2 * B * products[what], speed)
        yield from peers.rows_beside(what, seconds, B, {name: [more[name]] for name in seconds})


# ------------------------------------------------------------------------------------------ training


def train_step(loss, optimizer, autocast):
    with autocast():
        loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def new_optimizer(model, stage, **options):
    """The rate is 0: the same work, but the weights, which others share, stay."""
    groups = vpgtrans.parameter_groups(model, stage)
    return torch.optim.AdamW(groups, lr=0.0, fused=True, **options)


def time_training(models, stage, losses, autocast, repeats, device):
    """{name: seconds of each step}, {name: peak GiB}

    Memory (GPUs only) is taken before the turns, while one optimizer exists: all weights, once, and
    the activations, gradients and moments of one implementation.
    """
    def new_step(name):
        optimizer = new_optimizer(models[name], stage, betas=stage.betas)
        step = partial(train_step, losses[name], optimizer, autocast)
        # compiles, allocates the moments; and memory that no step has touched yet is slow for a few
        for _ in range(5):
            step()
        return step

    peak = {}
    if device.type == "cuda":
        for name in models:
            step = new_step(name)
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peak[name] = torch.cuda.max_memory_allocated(device) / 2**30
            del step
    steps = {name: new_step(name) for name in models}
    return peers.take_turns(steps, repeats, device), peak


def check_stage(models, stage, losses, autocast, precision):
    """The greatest differences of losses and of the projector's gradients, without dropout."""
    peers.enter_stage(models, stage)
    projectors = {}
    for name, model in models.items():
        model.eval()
        projector = model.projector if name == "ours" else model.language_projection
        projectors[name] = projector.weight
    apart = peers.check_agreement(losses, projectors, autocast, peers.TOLERANCE[precision])
    for model in models.values():
        model.zero_grad()
    return apart


def compare_stage(what, models, losses, autocast, speed, args):
    """Rows of a stage in the table of training, and a line for below it."""
    stage = vpgtrans.STAGES[what]
    ours = models["ours"]
    B = args.batch_size
    of_losses, of_gradients = check_stage(models, stage, losses, autocast, args.precision)
    peers.enter_stage(models, stage)  # dropout is on again
    if what == "warm-up":
        queries = torch.randn(B, ours.vpg.num_query_tokens, ours.vpg.dim, device=args.device)
        models = {**models, "ours, cached": ours}
        losses = {**losses, "ours, cached": partial(losses["ours"], queries)}
    seconds, peak = time_training(models, stage, losses, autocast, args.repeats, args.device)
    flops = step_flops(ours, stage, B, args.target_tokens)
    share = shares(seconds, flops, speed)
    more = {}
    for name in seconds:
        gib = f"{peak[name]:.2f}" if peak else "-"
        more[name] = [gib, share[name]]
    note = (f"{what}: {limit(flops, speed)}; losses within {of_losses:.1e}, projector gradients within "
            f"{of_gradients:.1e} of transformers'")
    return list(peers.rows_beside(what, seconds, B, more)), note


def compare_blip2(args):
    """The tables of forward passes and of training steps of a BLIP-2."""
    autocast = peers.autocast_to(args.dtype, args.device)
    models = peers.build_models(args.size, args.dtype, args.device)
    for model in models.values():
        model.eval()
    if args.compile:
        for name, model in models.items():
            peers.compile_all(blip2_blocks(name, model))
    speed = peers.matrix_product_speed(args.dtype, args.device)
    forward = list(forward_rows(models, autocast, speed, args))
    losses = peers.mean_losses(models, args.batch_size, args.target_tokens, args.device)
    training = []
    notes = []
    for what in ("warm-up", "fine-tune"):
        rows, note = compare_stage(what, models, losses, autocast, speed, args)
        training += rows
        notes.append(note)
    columns = ["implementation", "ms", "min - max"]
    peers.print_table(["forward", *columns, "images/s", "ratio", "of the limit"], forward)
    more = ["samples/s", "ratio", "peak GiB", "of the limit"]
    peers.print_table(["training", *columns, *more], training)
    print(f"\nThe limit: a large matrix product in {args.precision} runs at {speed / 1e12:.3g} TFLOP/s")
    print(*notes, sep="\n")


def blip2_blocks(name, model):
    if name == "ours":
        return [*model.vpg.layers, *model.llm.layers]
    vpg = [*model.vision_model.encoder.layers, *model.qformer.encoder.layer]
    return [*vpg, *peers.blocks_of(model.language_model)]


def compare_llm(args):
    """The table of training steps of a language model alone."""
    B = args.batch_size
    T = args.target_tokens
    llms = peers.build_llms(args.llm, args.dtype, args.device)
    for llm in llms.values():
        llm.requires_grad_(False)
        if args.compile:
            peers.compile_all(peers.blocks_of(llm))
    losses, soft_prompts = peers.mean_llm_losses(llms, B, T, args.device)
    of_losses, of_gradients = peers.check_agreement(
        losses, dict.fromkeys(llms, soft_prompts), contextlib.nullcontext,
        peers.TOLERANCE[args.precision])
    speed = peers.matrix_product_speed(args.dtype, args.device)
    flops = llm_flops(llms["ours"], B, T)

    def step(name):
        losses[name]().backward()
        soft_prompts.grad = None

    steps = {name: partial(step, name) for name in llms}
    seconds = peers.take_turns(steps, args.repeats, args.device)
    share = shares(seconds, flops, speed)
    more = {name: [share[name]] for name in seconds}
    rows = peers.rows_beside("forward, backward", seconds, B, more)
    columns = ["implementation", "ms", "min - max", "samples/s", "ratio", "of the limit"]
    peers.print_table(["training", *columns], rows)
    print(f"\nThe limit: {flops / 1e12:.3g} TFLOP at {speed / 1e12:.3g} TFLOP/s, those of a large matrix "
          f"product in {args.precision}; losses within {of_losses:.1e}, gradients within "
          f"{of_gradients:.1e} of transformers'")


# ----------------------------------------------------------------------------------- packed captions


def random_captions(B, K, T, device):
    """Ids (B,K,T), of T/2 to T tokens each: three quarters of T on average; -100 is padding."""
    targets = torch.randint(4, peers.IMAGE_ID, (B, K, T), device=device)
    lengths = torch.randint(T // 2, T + 1, (B, K, 1), device=device)
    targets[torch.arange(T, device=device) >= lengths] = -100
    return targets


def compare_packed(args):
    """Training on K captions of each of B images: packed behind one prefix, or each alone."""
    B = args.batch_size
    K = args.captions
    autocast = peers.autocast_to(args.dtype, args.device)
    model = peers.build_models(args.size, args.dtype, args.device)["ours"]
    if args.compile:
        peers.compile_all([*model.vpg.layers, *model.llm.layers])
    images = peers.random_images(model, B, args.device)
    prompt = peers.image_prompt(model, vpgtrans.IMAGE, B)
    targets = random_captions(B, K, args.target_tokens, args.device)
    ways = {"each alone": targets.unbind(1), "packed": [targets]}

    def losses(way):
        """One at a time, as from a data set: what a step keeps in memory is one caption's."""
        for part in ways[way]:
            yield model(prompt, part, images=images)[0]

    def step(way, optimizer):
        with autocast():
            for loss in losses(way):
                loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.eval()
    tokens = (targets >= 0).sum().item()
    with torch.no_grad(), autocast():
        alone, packed = (sum(losses(way)).item() / tokens for way in ways)
    if not abs(alone - packed) <= peers.TOLERANCE[args.precision][0]:
        raise ValueError(f"packed and alone, the captions' losses differ: {packed} and {alone}")
    print(f"\n{tokens / B / K:.1f} tokens a caption, losses {alone:.5f} alone and {packed:.5f} packed")
    columns = [f"training on {K} captions of {B} images", "ms", "min - max", "captions/s", "ratio"]
    peers.print_table(columns, packed_rows(model, step, ways, args))


def packed_rows(model, step, ways, args):
    for what in ("warm-up", "fine-tune"):
        stage = vpgtrans.STAGES[what]
        vpgtrans.enter_stage(model, stage)
        optimizer = new_optimizer(model, stage)
        for way in ways:  # compiles, allocates the moments
            step(way, optimizer)
        steps = {way: partial(step, way, optimizer) for way in ways}
        seconds = peers.take_turns(steps, args.repeats, args.device)
        alone = statistics.median(seconds["each alone"])
        for way, times in seconds.items():
            median = statistics.median(times)
            per_second = f"{args.batch_size * args.captions / median:,.1f}"
            yield [f"{what}, {way}", *peers.in_ms(times, 0), per_second, f"{alone / median:.2f}"]


# ------------------------------------------------------------------------------------------- command


def parse_arguments(argv):
    parser = peers.new_parser("benchmarks.training", __doc__)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--llm", choices=peers.LLMS,
                         help="a language model of these shapes alone, in the place of a BLIP-2")
    instead.add_argument("--captions", type=peers.at_least_one, metavar="K",
                         help="instead: K captions of each image, packed and one by one")
    peers.add_model_arguments(parser)
    parser.add_argument("--batch-size", type=peers.at_least_one,
                        help="samples a training step (default: 8, and 16 with --llm)")
    parser.add_argument("--target-tokens", type=peers.at_least_one, default=16,
                        help="of each caption (default: %(default)s)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the repeated blocks, of all")
    args = peers.parse(parser, argv)
    if args.batch_size is None:
        args.batch_size = 16 if args.llm else 8
    return args


def main(argv=None):
    args = parse_arguments(argv)
    what = (f"{args.llm or args.size}, {args.precision}, batch {args.batch_size}, "
            f"{args.target_tokens} target tokens, medians of {args.repeats}")
    peers.print_heading("benchmarks.training", argv, what, args.device)
    if args.captions:
        compare_packed(args)
    elif args.llm:
        compare_llm(args)
    else:
        compare_blip2(args)


if __name__ == "__main__":
    main()
