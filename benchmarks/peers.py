"""Ours and transformers' models around the same random tensors, and what the benchmarks share.

The commands are `python -m benchmarks.training`, `generation`, `data` and `techniques`; each explains
itself with --help. Ours and transformers' two kinds of attention run in one process, on the same
weights (each tensor exists once) and the same batch, with the same parts frozen. They take turns, and
are timed only if they agree: in the loss and in a gradient, or in what they generate.

Figures mean something on an otherwise idle machine only.

B batch, T target length, D LLM width.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import llm as language_models
import qformer
import vpgtrans

try:
    import transformers
except ImportError:
    transformers = None

ROOT = Path(__file__).parent.parent


def shape(**sizes):
    return {"num_hidden_layers": 12, **sizes}


EVA = shape(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16)
SIZES = {  # ViT, Q-Former, OPT
    "small": (shape(hidden_size=384, intermediate_size=1536, num_attention_heads=6),
              shape(num_hidden_layers=6),
              shape(hidden_size=768, ffn_dim=3072, num_attention_heads=12)),
    "opt-2.7b": (EVA, shape(), shape(hidden_size=2560, ffn_dim=10240,
                                     num_hidden_layers=32, num_attention_heads=32)),
    "opt-6.7b": (EVA, shape(), shape(hidden_size=4096, ffn_dim=16384,
                                     num_hidden_layers=32, num_attention_heads=32)),
}
SMOLLM2 = dict(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
LLMS = {  # what is not said is the default of transformers' configuration
    "opt-125m": dict(model_type="opt", word_embed_proj_dim=768),
    "opt-6.7b": dict(model_type="opt", word_embed_proj_dim=4096, **SIZES["opt-6.7b"][2]),
    "llama-7b": dict(model_type="llama"),
    "smollm2-135m": SMOLLM2,
    "flan-t5-base": shape(
        model_type="t5", d_model=768, d_ff=2048, num_layers=12, num_heads=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "2 GB": SMOLLM2 | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=13,
        num_attention_heads=32, num_key_value_heads=8),
}
ATTENTIONS = ("eager", "sdpa")
BOS = 2
IMAGE_ID = 50265  # stands for a soft prompt in transformers' prompts
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The greatest differences allowed: of mean losses, and (relative, by norm) of gradients. The latter
# jump a little where rounding puts an input of one of OPT's ReLUs on the other side of zero; T5's
# loss is rounded to bf16 in transformers.
TOLERANCE = {"fp32": (1e-4, 1e-2), "bf16": (7e-2, 0.25)}

# -------------------------------------------------------------------------------------------- models


def blank_peer(size, attention):
    """transformers' BLIP-2 without weights (on the meta device); attention is "eager" or "sdpa"."""
    vit, former, opt = SIZES[size]
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**vit, image_size=224, patch_size=14),
        qformer_config=transformers.Blip2QFormerConfig(
            **former, encoder_hidden_size=vit["hidden_size"]),
        # use_cache=False: else transformers keeps keys and values in training, for nothing
        text_config=transformers.OPTConfig(
            **opt, vocab_size=50272, word_embed_proj_dim=opt["hidden_size"], use_cache=False),
        num_query_tokens=32,
        image_token_index=IMAGE_ID,
    )
    build = transformers.Blip2ForConditionalGeneration._from_config
    with torch.device("meta"):
        return build(config, attn_implementation=attention)


def random_tensors(shapes, dtype, device):
    """{name: meta tensor} -> {name: random tensor}: ViT and LLM in dtype, the rest float32.

    No weight is just zero or one, and hidden states keep their scale through the layers, so that
    the loss depends on every tensor.
    """
    torch.manual_seed(0)
    tensors = {}
    for name, like in shapes.items():
        inputs = like.shape[-1] if like.shape[0] == 1 else like[0].numel()
        scale = 0.1 if like.ndim == 1 else inputs**-0.5
        frozen = qformer.is_frozen(name) or name.startswith("language_model.")
        kind = dtype if frozen else torch.float32
        tensors[name] = torch.randn(like.shape, dtype=kind, device=device).mul_(scale)
        if "norm" in name.lower() and name.endswith("weight"):
            tensors[name] += 1
        if name.endswith("Attention.q.weight"):  # T5's attention has no 1/sqrt(64)
            tensors[name] /= 8
    return tensors


def our_name(name):
    """The name of a tensor of transformers' BLIP-2 in VisualLLM."""
    for theirs, ours in {"language_projection.": "projector.", "language_model.": "llm."}.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return "vpg." + name


def build_models(size, dtype, device):
    """{name: BLIP-2}, ours first, around the same tensors; size is one of SIZES."""
    peers = {f"transformers, {attention}": blank_peer(size, attention) for attention in ATTENTIONS}
    peer = peers["transformers, sdpa"]
    config = peer.config.to_dict()
    tensors = random_tensors(peer.state_dict(), dtype, device)
    words = tensors["language_model.model.decoder.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = words
    for peer in peers.values():
        peer.load_state_dict(tensors, assign=True)
        peer.language_model.generation_config.eos_token_id = None  # as our stop=(): no text ends
    with torch.device("meta"):
        vpg = qformer.VPG(config)
        llm = language_models.OPT(config["text_config"])
        ours = vpgtrans.VisualLLM(vpg, nn.Linear(vpg.dim, llm.dim), llm)
    ours.load_state_dict({our_name(name): tensors[name] for name in tensors}, assign=True)
    ours.llm.tie_head()
    return {"ours": ours, **peers}


def build_llms(name, dtype, device):
    """{name: language model}, ours first, around the same tensors; the argument is one of LLMS.

    Ours is frozen, as load_llm leaves it.
    """
    sizes = LLMS[name]
    config = transformers.AutoConfig.for_model(**sizes, use_cache=False, decoder_start_token_id=0)
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    peers = {}
    with torch.device("meta"):
        ours = language_models.ARCHITECTURES[config.model_type](sizes)
        for attention in ATTENTIONS:
            peer = kind.from_config(config, attn_implementation=attention)
            peers[f"transformers, {attention}"] = peer
    tied = ours.lm_head.weight is ours.get_parameter(ours.WORDS)
    tensors = random_tensors(ours.state_dict(), dtype, device)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if tied:
        tensors["lm_head.weight"] = tensors[ours.WORDS]
    ours.load_state_dict(tensors, assign=True)
    if tied:
        ours.tie_head()
    for peer in peers.values():
        give_tensors(peer, tensors, tensors[ours.WORDS], device)
    return {"ours": ours.to(device).requires_grad_(False).eval(), **peers}


def give_tensors(peer, tensors, words, device):
    """One of transformers' language models from the meta device to these tensors."""
    # T5 has further names for its word embeddings
    also = {name: words for name in peer.state_dict().keys() - tensors.keys()}
    peer.load_state_dict(tensors | also, assign=True)
    if peer.config.model_type == "llama":  # its angles are no parameters: still on the meta device
        rotary = type(peer.model.rotary_emb)
        peer.model.rotary_emb = rotary(peer.config).to(device)
    peer.generation_config.eos_token_id = None
    peer.eval()


def enter_stage(models, stage):
    """The same parts train in all models, and the same Q-Former drops out."""
    ours = models["ours"]
    vpgtrans.enter_stage(ours, stage)
    trained = {name for name, parameter in ours.saved().items() if parameter.requires_grad}
    for peer in models.values():
        if peer is ours:
            continue
        peer.eval()
        peer.qformer.train(ours.vpg.qformer.training)
        for name, parameter in peer.named_parameters():
            parameter.requires_grad_(name in trained)


def blocks_of(llm):
    """The repeated blocks of a language model, ours or transformers'."""
    if isinstance(llm, language_models.LanguageModel):
        return llm.layers
    if llm.config.is_encoder_decoder:
        return [*llm.encoder.block, *llm.decoder.block]
    return getattr(llm.model, "decoder", llm.model).layers


def compile_all(blocks):
    # all blocks of a kind share one function; past 8 variants torch would run them eagerly
    torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        block.compile()


# ----------------------------------------------------------------------------------------- agreement


def image_prompt(model, image, B):
    """Prompt ids (B, 32 + 1): `image` in each soft prompt's place, then BOS."""
    return torch.tensor([image] * model.vpg.num_query_tokens + [BOS]).expand(B, -1)


def random_images(model, B, device):
    size = model.vpg.image_size
    return torch.randn(B, 3, size, size, device=device)


def mean_losses(models, B, T, device):
    """{name: function that returns the mean loss a token} of BLIP-2s, all on the same batch."""
    ours = models["ours"]
    images = random_images(ours, B, device)
    target_ids = torch.randint(4, IMAGE_ID, (B, T), device=device)
    # transformers reads [image, BOS, caption], its last token too, which predicts nothing: the
    # tokens that count are the same
    input_ids = torch.cat([image_prompt(ours, IMAGE_ID, B).to(device), target_ids], dim=1)
    labels = input_ids.clone()
    labels[:, :-T] = -100

    def our_loss(queries=None):
        prompt = image_prompt(ours, vpgtrans.IMAGE, B)
        loss, tokens = ours(prompt, target_ids, images=images, queries=queries)
        return loss / tokens

    def their_loss(peer):
        return peer(pixel_values=images, input_ids=input_ids, labels=labels).loss

    theirs = {name: partial(their_loss, peer) for name, peer in models.items() if peer is not ours}
    return {"ours": our_loss, **theirs}


def mean_llm_losses(llms, B, T, device):
    """The same for language models alone, and the 32 soft prompts (B,32,D) that they all read."""
    ours = llms["ours"]
    soft_prompts = torch.randn(B, 32, ours.dim, device=device).to(ours.lm_head.weight.dtype)
    soft_prompts.requires_grad_()
    target_ids = torch.randint(4, ours.vocab_size, (B, T), device=device)

    def our_loss():
        loss, tokens = ours.loss(soft_prompts, target_ids)
        return loss / tokens

    def their_loss(peer):
        if peer.config.is_encoder_decoder:
            return peer(inputs_embeds=soft_prompts, labels=target_ids).loss
        embeddings = peer.get_input_embeddings()(target_ids)
        inputs = torch.cat([soft_prompts, embeddings], dim=1)  # (B, 32 + T, D)
        labels = F.pad(target_ids, (32, 0), value=-100)
        return peer(inputs_embeds=inputs, labels=labels).loss

    theirs = {name: partial(their_loss, peer) for name, peer in llms.items() if peer is not ours}
    return {"ours": our_loss, **theirs}, soft_prompts


def relative_distance(x, to):
    return ((x - to).norm() / to.norm()).item()


def check_agreement(losses, weights, autocast, tolerance):
    """The greatest differences of losses, and of their gradients to {name: tensor} (relative).

    Dropout must be off. ValueError if they are greater than `tolerance`, a pair, allows.
    """
    values = []
    gradients = []
    for name, weight in weights.items():
        with autocast():
            loss = losses[name]()
            loss.backward()
        values.append(loss.item())
        gradients.append(weight.grad)
        weight.grad = None
    # torch's max passes NaN on, which Python's can lose: NaN is no agreement
    of_losses = torch.tensor([abs(value - values[0]) for value in values]).max().item()
    of_gradients = [relative_distance(gradient, gradients[0]) for gradient in gradients]
    of_gradients = torch.tensor(of_gradients).max().item()
    agree = of_losses <= tolerance[0] and of_gradients <= tolerance[1]
    if not agree:
        raise ValueError(
            f"ours and transformers compute different things: losses {values}, gradients "
            f"{of_gradients:.2g} apart (relative); at most {tolerance[0]:g} and {tolerance[1]:g} "
            "are allowed")
    return of_losses, of_gradients


# -------------------------------------------------------------------------------------------- timing


def autocast_to(dtype, device):
    """A function that makes the context of a forward pass."""
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def take_turns(functions, repeats, device):
    """{name: function} -> {name: seconds of each call}.

    One call each in turn, so that a disturbance meets all alike.
    """
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = {name: [] for name in functions}
    for name, function in list(functions.items()) * repeats:
        wait()
        began = time.perf_counter()
        function()
        wait()
        seconds[name].append(time.perf_counter() - began)
    return seconds


def matrix_product_speed(dtype, device):
    """FLOP/s of one large matrix product, the best of a dozen.

    On a CPU it comes before what is timed: glibc keeps the memory of tensors as large as one that
    has been freed, 17 MB here, as in a run that has gone on for a while. In a fresh process a step's
    large tensors would be given back to the kernel, and their pages faulted in again.
    """
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = take_turns({"product": lambda: a @ b}, 12, device)
    return 2 * size**3 / min(seconds["product"])


# -------------------------------------------------------------------------------------------- report


def print_table(columns, rows):
    """Markdown, to be pasted as it is; columns and each row are lists of texts."""
    print()
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def in_ms(times, digits=1):
    """Seconds -> two cells: their median, and their range."""
    median, least, most = statistics.median(times), min(times), max(times)
    return [f"{median * 1e3:,.{digits}f}", f"{least * 1e3:,.{digits}f} - {most * 1e3:,.{digits}f}"]


def rows_beside(what, seconds, count, more):
    """Rows of implementations: time, range, `count` a second, ratio, and the cells more[name].

    A ratio above 1: as many times as fast as the better of transformers' two.
    """
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    better = min(median for name, median in medians.items() if not name.startswith("ours"))
    for name, median in medians.items():
        per_second = f"{count / median:,.1f}"
        ratio = f"{better / median:.2f}"
        yield [what, name, *in_ms(seconds[name]), per_second, ratio, *more[name]]


def machine(device):
    """Hardware, versions and commit, which every figure needs."""
    hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return (f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}; "
            f"commit {commit or 'unknown'}")


def cpu_name():
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    _, _, rest = info.read_text().partition("model name")
    return rest.partition("\n")[0].strip("\t :")


def print_heading(command, argv, what, device):
    """The command as it was given, what was measured, and on which machine."""
    words = " ".join(["python -m", command, *(sys.argv[1:] if argv is None else argv)])
    print(f"`{words}`: {what}\n{machine(device)}")


# ----------------------------------------------------------------------------------------- arguments


def new_parser(command, doc):
    """A parser of `python -m command`, explained by a docstring, with what every benchmark takes."""
    kind = argparse.RawDescriptionHelpFormatter
    prog = f"python -m {command}"
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=kind)
    parser.add_argument("--repeats", type=at_least_one, default=9,
                        help="timed turns of each (default: %(default)s)")
    return parser


def add_model_arguments(parser):
    parser.add_argument("--size", choices=SIZES, default="small",
                        help="small: ViT 12 x 384, Q-Former 6 x 768, OPT-125M; the others: EVA ViT-g, "
                        "Q-Former 12 x 768 and that OPT, 8 and 16 GB of weights in bf16 "
                        "(default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16",
                        help="of ViT, LLM and the arithmetic (autocast); what trains is always "
                        "float32 (default: %(default)s)")
    parser.add_argument("--device", type=torch.device,
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default: %(default)s)")


def at_least_one(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def parse(parser, argv):
    """Arguments, if transformers is there to be measured beside; precision also as args.dtype."""
    args = parser.parse_args(argv)
    if transformers is None:
        sys.exit("benchmarks measure ours beside transformers, which is missing: "
                 "pip install -r requirements-dev.txt")
    transformers.logging.set_verbosity_error()
    if "precision" in args:
        args.dtype = PRECISIONS[args.precision]
    return args
