"""What an image costs an LLM: in the memory of its FFNs (MemVP), or as soft prompts in its input.

    python -m benchmarks.memory                             # SmolLM2-135M's shapes
    python -m benchmarks.memory --llm llama-7b              # on a GPU

Prints a Markdown table for each length of text: a training step (forward and backward, the language
model alone, from features at hand; no optimizer), the prefill of a prompt, and one decoded token. The
ways are the text alone; MemVP; MemVP with keys and values cast and added anew in each layer, as its
authors have it; and soft prompts in the input. All ways run on the same weights and take turns.
"operations" is a count of the matrix products, "kept" what autograd keeps for the backward pass.

Figures mean something on an otherwise idle machine only.

B batch, P prompt length, T target length, N visual tokens, M memory rows.
"""

import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

import memvp
from benchmarks import peers


class AnewEachLayer(memvp.VisualMemory):
    """Keys and values as the authors compute them: in each layer, out of P and positions."""

    def forward(self, features, has_image=None, dtype=None):
        image = torch.nn.functional.pad(
            self.project(features, has_image), (0, 0, 0, len(self.key_positions) - features.shape[1]))

        def read(h, activation):
            keys = (image + self.key_positions).to(dtype)
            values = (self.scale * (image + self.value_positions)).to(dtype)
            return memvp.MemoryRead(keys, values, self.dropout if self.training else 0.0)(h, activation)

        return read


class PlainPrompts(memvp.InputPromptLLM):
    """Soft prompts in the input and nothing else: no memory that says the same whatever the image."""

    def reads(self, prompt_ids, has_image=None, images=None, features=None):
        prefix, mask, _ = super().reads(prompt_ids, has_image, images, features)
        return prefix, mask, None


class NoVision(torch.nn.Module):
    """Stands where a ViT would: features are given."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.layers = []


def make_ways(llm, N, M, device):
    """{name: model}, around the same LLM and, but for the text alone, the same trained tensors."""
    width = 1024
    sees = NoVision(width)
    memory = memvp.VisualMemory(width, llm.dim, M).to(device).train()
    anew = AnewEachLayer(width, llm.dim, M).to(device).train()
    anew.load_state_dict(memory.state_dict())
    return {
        "text alone": None,
        "MemVP": memvp.MemoryLLM(sees, memory, llm),
        "MemVP, K and V in each layer": memvp.MemoryLLM(sees, anew, llm),
        "input-space prompts": PlainPrompts(sees, memory, llm),
    }


def training_step(model, llm, batch, autocast):
    """Forward and backward; of the text alone forward, and backward to its embeddings."""
    prompts, targets, features = batch
    with autocast():
        if model is None:
            prefix = llm.embed(prompts.to(features.device)).requires_grad_()
            loss, _ = llm.loss(prefix, targets)
        else:
            loss, _ = model(prompts, targets, features=features)
    loss.backward()
    if model is not None:
        model.zero_grad(set_to_none=True)


def generation(model, llm, batch, autocast, tokens):
    prompts, _, features = batch
    options = dict(max_new_tokens=tokens, stop=())
    with autocast(), torch.inference_mode():
        if model is None:
            llm.generate(llm.embed(prompts.to(features.device)), **options)
        else:
            model.generate(prompts, features=features, **options)


def count(function):
    """-> (floating-point operations, bytes that autograd keeps beside parameters)"""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, watched:
        function()
    return counter.get_total_flops(), kept


def kept_bytes(kept, llm):
    """Of what was kept, what are not the LLM's own weights."""
    own = {p.untyped_storage()._cdata for p in llm.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def time_text(ways, llm, T, args):
    """Prints the table of one length of text, `args.target_tokens` of which are the answer."""
    B = args.batch_size
    prompts = torch.randint(3, 1000, (B, T - args.target_tokens))
    targets = torch.randint(3, 1000, (B, args.target_tokens), device=args.device)
    features = torch.randn(B, args.visual_tokens, 1024, device=args.device)
    batch = prompts, targets, features
    autocast = peers.autocast_to(args.dtype, args.device)
    steps = {}
    prefills = {}
    longer = {}
    for name, model in ways.items():
        steps[name] = lambda model=model: training_step(model, llm, batch, autocast)
        prefills[name] = lambda model=model: generation(model, llm, batch, autocast, 1)
        longer[name] = lambda model=model: generation(model, llm, batch, autocast, 1 + args.new_tokens)
    times = [peers.take_turns(of, args.repeats, args.device) for of in (steps, prefills, longer)]
    step, prefill, decoded = [{name: statistics.median(t) for name, t in of.items()} for of in times]
    rows = []
    for name in ways:
        operations, kept = count(steps[name])
        token = (decoded[name] - prefill[name]) / args.new_tokens
        against = step[name] / step["input-space prompts"]
        rows.append([name, f"{1e3 * step[name]:.0f}", f"{against:.2f}", f"{operations / 1e12:.3f}",
                     f"{kept_bytes(kept, llm) / 1e6:.0f}", f"{1e3 * prefill[name]:.0f}",
                     f"{1e3 * token:.1f}"])
    head = [f"{B} x {T} tokens of text", "step, ms", "of prompts'", "TFLOP", "kept, MB", "prefill, ms",
            "a token, ms"]
    peers.print_table(head, rows)


def main(argv=None):
    parser = peers.new_parser("benchmarks.memory", __doc__)
    parser.add_argument("--llm", choices=tuple(peers.LLMS), default="smollm2-135m")
    parser.add_argument("--precision", choices=peers.PRECISIONS, default="bf16",
                        help="of the LLM and the arithmetic (default: %(default)s)")
    parser.add_argument("--device", type=torch.device,
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=peers.at_least_one, nargs="+", default=[64, 256],
                        help="tokens of prompt and answer (default: 64 256)")
    parser.add_argument("--visual-tokens", type=peers.at_least_one, default=256)
    parser.add_argument("--rows", type=peers.at_least_one, default=320)
    parser.add_argument("--batch-size", type=peers.at_least_one, default=4)
    parser.add_argument("--target-tokens", type=peers.at_least_one, default=8)
    parser.add_argument("--new-tokens", type=peers.at_least_one, default=16)
    args = peers.parse(parser, argv)
    what = (f"{args.llm}, {args.precision}, batch {args.batch_size}, {args.visual_tokens} visual tokens, "
            f"{args.rows} memory rows, {args.target_tokens} targets, medians of {args.repeats}")
    peers.print_heading("benchmarks.memory", argv, what, args.device)
    llm = peers.build_llms(args.llm, args.dtype, args.device)["ours"].requires_grad_(False)
    ways = make_ways(llm, args.visual_tokens, args.rows, args.device)
    for T in args.text:
        time_text(ways, llm, T, args)


if __name__ == "__main__":
    main()
