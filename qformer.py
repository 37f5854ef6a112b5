# MIT licence. From an implementation of VPGTrans and MemVP; copy this file alone, it imports nothing of ours.
"""The visual prompt generator (VPG) of BLIP-2 (Li et al. 2023): a frozen ViT and the Q-Former that
queries it.

    vpg = load_vpg("folder of Salesforce/blip2-opt-2.7b")
    queries = vpg(images)                           # (B,3,224,224) -> (B,32,768)
    queries = vpg.query(vpg.features(images))       # the same in two steps, of which the first is frozen
    soft_prompts = load_projector(folder)(queries)

Q learned query tokens look at each other (self-attention) and, in every second layer, at the image
(cross-attention). Parameter names equal the checkpoint's, so that loading needs no table of names.

B batch, N image tokens, Q query tokens, Dv ViT width, Dq Q-Former width, H heads.
"""

import json
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn


def attention(q, k, v, dropout=0.0):
    """Softmax attention over (B,H,S,hd); nothing is masked: every query may look at everything."""
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.requires_grad):
        # faster on CPUs than torch's own attention in bf16, and in its backward pass (docs/notes.md)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, Sq, Sk)
        weights = scores.softmax(-1).to(v.dtype)
        return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def split_heads(x, heads):
    return rearrange(x, "b s (h d) -> b h s d", h=heads)


def merge_heads(x):
    return rearrange(x, "b h s d -> b s (h d)")


# ----------------------------- ViTs, of pre-norm blocks: EVA ViT-g/14 (BLIP-2's), and CLIP ViT-L/14


def quick_gelu(x):
    """The approximation of GELU that OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def interpolate_positions(positions, h, w):
    """Position embeddings (1,1+side*side,Dv) of a class token and a square of patches ->
    (1,1+h*w,Dv): bicubic (Dosovitskiy et al. 2021)."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (h, w) == (side, side):
        return positions
    grid = rearrange(positions[:, 1:].float(), "one (h w) d -> one d h w", h=side)
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    patches = rearrange(grid, "one d h w -> one (h w) d").to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)


def embed_patches(images, patch_embedding, class_embedding, positions):
    """(B,3,H,W), and (1,1,Dv) and (1,N,Dv) -> (B,1+h*w,Dv): the class token, then the patches, each
    with its position's embedding.

    Images may have another size than the ViT's: its position embeddings are interpolated."""
    patch = patch_embedding.kernel_size[0]
    are_images = images.ndim == 4 and images.shape[1] == 3
    if not are_images or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError("this ViT reads images (B, 3, H, W) whose sides are multiples of its patch, "
                         f"{patch} pixels; not {tuple(images.shape)}")
    patches = patch_embedding(images.to(patch_embedding.weight.dtype))  # (B, Dv, h, w)
    h, w = patches.shape[2:]
    patches = rearrange(patches, "b d h w -> b (h w) d")
    class_token = class_embedding.expand(len(images), -1, -1)
    x = torch.cat([class_token, patches], dim=1)  # (B, 1 + h * w, Dv)
    return x + interpolate_positions(positions, h, w)


class EVAAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.qkv = nn.Linear(dim, 3 * dim, bias=config["qkv_bias"])
        self.projection = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.projection(merge_heads(attention(q, k, v)))


class CLIPAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(x), self.heads)
        v = split_heads(self.v_proj(x), self.heads)
        return self.out_proj(merge_heads(attention(q, k, v)))


class ViTLayer(nn.Module):
    def __init__(self, config, self_attn):
        super().__init__()
        dim = config["hidden_size"]
        hidden = config["intermediate_size"]
        self.layer_norm1 = nn.LayerNorm(dim, config["layer_norm_eps"])
        self.layer_norm2 = nn.LayerNorm(dim, config["layer_norm_eps"])
        self.self_attn = self_attn
        self.activation = ACTIVATIONS[config["hidden_act"]]
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x, beside=None):
        x = x + self.self_attn(self.layer_norm1(x))
        y = self.layer_norm2(x)
        hidden = self.activation(self.mlp["fc1"](y))
        z = self.mlp["fc2"](hidden)
        return x + (z if beside is None else z + beside(y))


def stack_layers(config, attention_class):
    """The repeated blocks, under the checkpoints' names."""
    layers = [ViTLayer(config, attention_class(config)) for _ in range(config["num_hidden_layers"])]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which EVA and BLIP-2 share
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images):
    """(B,3,H,W) uint8 -> float32, less CLIP's mean, over its deviation. Images travel as bytes: a
    quarter of the traffic."""
    mean = torch.tensor(MEAN).view(3, 1, 1).to(images.device, non_blocking=True)  # else a GPU is waited for
    std = torch.tensor(STD).view(3, 1, 1).to(images.device, non_blocking=True)
    # (images / 255 - mean) / std, in one pass over the images
    return torch.addcmul(-mean / std, images, 1 / (255 * std))


def run_blocks(layers, x, beside):
    """(B,N,Dv) -> (B,N,Dv); `beside` has a function for each block, or is None."""
    if beside is None:
        beside = [None] * len(layers)
    if len(beside) != len(layers):
        raise ValueError(f"this ViT has {len(layers)} blocks; beside them stand {len(beside)} functions")
    for layer, function in zip(layers, beside):
        x = layer(x, function)
    return x


class EVA(nn.Module):
    """The ViT of BLIP-2: EVA-g without its last block, since the last but one serves language models
    better (Li et al. 2023). `post_layernorm` belongs to it by name but to the Q-Former by training:
    VPGTrans fine-tunes it."""

    DEFAULTS = dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16,
                    image_size=224, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)

    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        patch = config["patch_size"]
        N = (config["image_size"] // patch) ** 2 + 1
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.embeddings.position_embedding = nn.Parameter(torch.randn(1, N, dim) * 0.02)
        self.embeddings.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch)
        self.encoder = stack_layers(config, EVAAttention)
        self.post_layernorm = nn.LayerNorm(dim, config["layer_norm_eps"])

    def forward(self, images, beside=None):
        """(B,3,H,W) -> (B,N,Dv). `beside`: a function for each block, (B,N,Dv) -> the same, which is
        added to what the block's MLP makes of the same input (MemVP's adapters)."""
        at = self.embeddings
        x = embed_patches(images, at.patch_embedding, at.class_embedding, at.position_embedding)
        return run_blocks(self.encoder["layers"], x, beside)


class CLIP(nn.Module):
    """The ViT of CLIP (Radford et al. 2021), such as openai/clip-vit-large-patch14, names
    misspelled as there. CLIP itself applies `post_layernorm` to the class token alone; here it is,
    as EVA's, the LayerNorm in front of the Q-Former."""

    DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                    image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)

    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        patch = config["patch_size"]
        N = (config["image_size"] // patch) ** 2 + 1
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(dim) * 0.02)
        self.embeddings.position_embedding = nn.Embedding(N, dim)
        self.embeddings.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.pre_layrnorm = nn.LayerNorm(dim, config["layer_norm_eps"])
        self.encoder = stack_layers(config, CLIPAttention)
        self.post_layernorm = nn.LayerNorm(dim, config["layer_norm_eps"])

    def forward(self, images, beside=None):
        """As EVA's."""
        at = self.embeddings
        class_embedding = at.class_embedding[None, None]
        positions = at.position_embedding.weight[None]
        x = embed_patches(images, at.patch_embedding, class_embedding, positions)
        return run_blocks(self.encoder["layers"], self.pre_layrnorm(x), beside)


VITS = {"blip_2_vision_model": EVA, "clip_vision_model": CLIP}


def vit_options(config, layers=None):
    """`vision_config` of a BLIP-2 or CLIP config.json -> (its class, its options: those left out
    filled in, cut to `layers` blocks)"""
    kind = config.get("model_type", "blip_2_vision_model")
    if kind not in VITS:
        raise ValueError(f"a ViT of model_type {kind!r} is not implemented; there are {', '.join(VITS)}")
    options = VITS[kind].DEFAULTS | config
    if options["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"vision_config: hidden_act = {options['hidden_act']!r} is not implemented; "
                         f"there are {', '.join(ACTIVATIONS)}")
    blocks = options["num_hidden_layers"]
    if layers and not 1 <= layers <= blocks:
        raise ValueError(f"this ViT has {blocks} blocks; there are no features after block {layers}")
    return VITS[kind], options | {"num_hidden_layers": layers or blocks}


# -------------------------------------------------------------- Q-Former (a BERT; post-norm blocks)


def dense_and_norm(width, config):
    """What ends each half of a block: a linear layer, and the LayerNorm behind its residual."""
    dim = config["hidden_size"]
    norm = nn.LayerNorm(dim, config["layer_norm_eps"])
    return nn.ModuleDict({"dense": nn.Linear(width, dim), "LayerNorm": norm})


class QFormerAttention(nn.Module):
    """Attention with its residual and norm; `source_dim` is the width of what the queries look
    at."""

    def __init__(self, config, source_dim):
        super().__init__()
        dim = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.weights_dropout = config["attention_probs_dropout_prob"]
        self.attention = nn.ModuleDict({
            "query": nn.Linear(dim, dim),
            "key": nn.Linear(source_dim, dim),
            "value": nn.Linear(source_dim, dim)})
        self.output = dense_and_norm(dim, config)
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, x, source):
        q = split_heads(self.attention["query"](x), self.heads)
        k = split_heads(self.attention["key"](source), self.heads)
        v = split_heads(self.attention["value"](source), self.heads)
        y = attention(q, k, v, self.weights_dropout if self.training else 0.0)
        y = self.output["dense"](merge_heads(y))
        return self.output["LayerNorm"](x + self.dropout(y))


class QFormerLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        dim = config["hidden_size"]
        hidden = config["intermediate_size"]
        self.attention = QFormerAttention(config, dim)
        if index % config["cross_attention_frequency"] == 0:
            self.crossattention = QFormerAttention(config, config["encoder_hidden_size"])
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(dim, hidden)})
        self.output_query = dense_and_norm(hidden, config)
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, x, image):
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, image)
        y = F.gelu(self.intermediate_query["dense"](x))
        y = self.output_query["dense"](y)
        return self.output_query["LayerNorm"](x + self.dropout(y))


class QFormer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layernorm = nn.LayerNorm(config["hidden_size"], config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        layers = [QFormerLayer(config, i) for i in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, query_tokens, image):
        x = self.dropout(self.layernorm(query_tokens))
        for layer in self.encoder["layer"]:
            x = layer(x, image)
        return x


class VPG(nn.Module):
    """ViT + Q-Former. `config` is a BLIP-2 config.json as a dict; fields left out have BLIP-2's
    values.

    Our runs add two fields: `image_size`, of the images to be read, and `vit_layers`, the block of
    the ViT behind which features are read. Without them both are the ViT's own. Dropout (0.1 in the
    checkpoints) is the Q-Former's alone, and active in train mode: in stage 2, not in stage 1 and not
    in generation."""

    QFORMER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                   hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.1,
                   attention_probs_dropout_prob=0.1, cross_attention_frequency=2, encoder_hidden_size=1408)

    def __init__(self, config):
        super().__init__()
        vit, vision = vit_options(config.get("vision_config", {}), config.get("vit_layers"))
        qformer = self.QFORMER | config.get("qformer_config", {})
        if qformer["hidden_act"] != "gelu":
            raise ValueError(f"qformer_config: hidden_act = {qformer['hidden_act']!r} is not implemented; "
                             "only 'gelu' is")
        if qformer["encoder_hidden_size"] != vision["hidden_size"]:
            raise ValueError(f"the Q-Former looks at {qformer['encoder_hidden_size']} wide features "
                             "(encoder_hidden_size), the ViT's are "
                             f"{vision['hidden_size']} wide (hidden_size)")
        self.dim = qformer["hidden_size"]
        self.num_query_tokens = config.get("num_query_tokens", 32)
        self.image_size = config.get("image_size", vision["image_size"])
        if self.image_size < 1 or self.image_size % vision["patch_size"]:
            raise ValueError(f"image size {self.image_size} is not a multiple of the ViT's patch, "
                             f"{vision['patch_size']} pixels")
        self.config = {  # with nothing left out
            "vision_config": vision,
            "qformer_config": qformer,
            "num_query_tokens": self.num_query_tokens,
            "image_size": self.image_size,
            "vit_layers": vision["num_hidden_layers"]}
        self.vision_model = vit(vision)
        self.query_tokens = nn.Parameter(torch.randn(1, self.num_query_tokens, self.dim) * 0.02)
        self.qformer = QFormer(qformer)

    @property
    def layers(self):
        """The repeated blocks, for torch.compile."""
        return [*self.frozen_layers, *self.qformer.encoder["layer"]]

    @property
    def frozen_layers(self):
        """Those that never train: the ViT's."""
        return self.vision_model.encoder["layers"]

    def features(self, images):
        """(B,3,H,W) -> (B,N,Dv): the frozen ViT, before the LayerNorm that trains. Images are
        uint8, or float32 that `normalise` has made of them."""
        if images.dtype == torch.uint8:
            images = normalise(images)
        return self.vision_model(images)

    def query(self, features):
        """(B,N,Dv) -> (B,Q,Dq): LayerNorm + Q-Former."""
        image = self.vision_model.post_layernorm(features.to(self.query_tokens.dtype))
        return self.qformer(self.query_tokens.expand(len(features), -1, -1), image)

    def forward(self, images):
        """(B,3,H,W) -> (B,Q,Dq)"""
        return self.query(self.features(images))

    def trained_parameters(self):
        """{name: parameter} of all but the frozen ViT: query tokens, Q-Former, the LayerNorm after
        the ViT."""
        named = self.named_parameters()
        return {name: parameter for name, parameter in named if not is_frozen(name)}

    def frozen_parameters(self):
        """{name: parameter} of the rest, the ViT; of a sharded matrix its Ends."""
        return {name: tensor for name, tensor in as_read(self).items() if is_frozen(name)}

    def reset(self):
        """Starts all but the ViT anew, as BERT does (normal, 0.02): the training from scratch that
        VPGTrans saves."""
        for name, parameter in self.trained_parameters().items():
            if "norm" in name.lower():
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


def is_frozen(name):
    """The ViT without the LayerNorm behind it: what VPGTrans never trains."""
    return name.startswith("vision_model.") and not name.startswith("vision_model.post_layernorm.")


# ------------------------------------------------------------------- a frozen ViT in several processes


class Ends:
    """Stands for a tensor where only its shape and its first and last eight numbers are asked for, as
    a fingerprint does."""

    def __init__(self, tensor):
        self.shape = tensor.shape
        self.numbers = torch.cat([tensor.flatten()[:8], tensor.flatten()[-8:]])

    def flatten(self):
        return self.numbers


def as_read(module):
    """{name: tensor} of a module's parameters as they were read, for a fingerprint: of a matrix that was
    quantised or sharded its Ends."""
    tensors = dict(module.named_parameters())
    for name, child in module.named_modules():
        ends = getattr(child, "ends", None)
        if isinstance(ends, Ends):
            tensors[f"{name}.weight"] = ends
    return tensors


def shard_blocks(model, blocks, mesh, methods=()):
    """Spreads the matrices of a model's repeated blocks, on the meta device, over the processes of a mesh
    (FSDP, Zhao et al. 2023): each keeps some rows of each matrix, and all rows are gathered for a block while
    it is at work, those of the next meanwhile. What else there is stays whole, in every process.

    A block must be entered by its forward, the model by its forward or one of the `methods`, by all processes
    equally often. -> {name of a matrix: its linear layer}"""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes two seconds

    inside = {module for block in blocks for module in block.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sharded = {f"{name}.weight": module for name, module in linear.items() if module in inside}
    model.requires_grad_(False)
    whole = set(model.parameters()) - {module.weight for module in sharded.values()}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    # shards nothing more; but under one root, the next block is gathered while one is at work
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return sharded


def own_rows(matrix, mesh, dtype, device):
    """A matrix (out,in) as read -> the DTensor of which this process keeps its rows. Of a file that is
    mapped into memory, as read_file's are, no others are read."""
    from torch.distributed.tensor import DTensor, Shard

    rows = -(-len(matrix) // mesh.size())
    own = matrix[mesh.get_local_rank() * rows :][:rows].to(device, dtype)
    how = dict(run_check=False, shape=matrix.shape, stride=matrix.stride())
    return DTensor.from_local(own, mesh, [Shard(0)], **how)


def gather_once(blocks):
    """FSDP makes the tensors of a gathered block once, and only frees and fills them later. Made in the
    inference mode of `generate` they could not be trained through: so they are made here."""
    for block in blocks:
        block.unshard()
        block.reshard()


# ------------------------------------------------------------------------------------------ loading

# What BLIP-2 folders hold besides the VPG: the LLM and its projector, and in first-stage ones the
# Q-Former's text branch.
NOT_THE_VPG = re.compile(r"language_(model|projection)\.|"
                         r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.|"
                         r"embeddings\.|itm_head\.|(vision|text)_projection\.|.*\.position_ids$")


def not_a_checkpoint(folder, missing):
    """The error for a folder that lacks something: what lies there in its place, and the way out."""
    is_adapter = (folder / "adapter_config.json").is_file()
    gguf = min(folder.glob("*.gguf"), default=None)
    found = f"{folder} is not a checkpoint in Hugging Face layout"
    if is_adapter:
        found = (f"{folder} holds a PEFT adapter (adapter_config.json), which is no whole model: merge it "
                 "into its base model with peft's merge_and_unload(), and save that with save_pretrained")
    elif gguf:
        found = (f"{gguf.name} is a GGUF file, which is not read here: convert it with transformers' "
                 f"from_pretrained(folder, gguf_file={gguf.name!r}), and save that with save_pretrained")
    return FileNotFoundError(f"{missing}; {found}")


def checkpoint_files(folder):
    """{tensor name: file} of a folder in Hugging Face layout: safetensors, or .bin where there is
    nothing else."""
    folder = Path(folder)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        file = folder / whole
        index = folder / f"{whole}.index.json"
        if index.is_file():
            try:
                shards = json.loads(index.read_text())["weight_map"]
                return {name: folder / shard for name, shard in shards.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: damaged ({error}); download it again") from error
        if file.is_file():
            return {name: file for name, _ in read_file(file, lambda name: False)}
    lacks = "no weights (model.safetensors, pytorch_model.bin, or shards with their index)"
    raise not_a_checkpoint(folder, f"{folder}: {lacks}")


def read_file(file, wanted):
    """(name, tensor) for every tensor of a file; tensor is None, and nothing of it is read, where
    wanted(name) is False.

    A .bin is memory-mapped and read with weights_only=True: no code in it is ever executed."""
    try:
        if file.suffix == ".bin":
            mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote no archives
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            for name, tensor in tensors.items():
                yield name, tensor if wanted(name) else None
        else:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name) if wanted(name) else None
    except FileNotFoundError:
        message = f"{file}: missing; its index names it: download the checkpoint again"
        raise FileNotFoundError(message) from None
    except Exception as error:
        raise ValueError(f"{file}: damaged or no checkpoint ({error}); download or copy it again") from error


def read_tensors(folder, wanted):
    """(name, tensor) of every tensor of a checkpoint for which wanted(name) is true; opens only the
    files it needs."""
    needed = {file for name, file in checkpoint_files(folder).items() if wanted(name)}
    for file in sorted(needed):
        for name, tensor in read_file(file, wanted):
            if tensor is not None:
                yield name, tensor


def assign_tensors(module, tensors, folder):
    """Puts {name: tensor} in the place of all parameters of a module, after saying what is missing,
    extra or misshapen."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    both = shapes.keys() & found.keys()
    wrong = [name for name in both if shapes[name] != found[name]]
    problems = {
        "tensors missing": shapes.keys() - found.keys(),
        "unknown tensors": found.keys() - shapes.keys(),
        "wrong shapes": [f"{name} is {found[name]}, config.json says {shapes[name]}" for name in wrong]}
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{folder}: {len(names)} {problem}, the first: {min(names)}; is this the right "
                             "checkpoint?")
    module.load_state_dict(tensors, strict=True, assign=True)


def read_vpg_config(folder):
    """config.json of a BLIP-2 folder, of one of our runs, or of CLIP, as BLIP-2 would spell it."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise not_a_checkpoint(Path(folder), f"{file}: missing")
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download it again") from error
    if config.get("model_type") in ("clip", "clip_vision_model"):
        vision = CLIP.DEFAULTS | config.get("vision_config", config) | {"model_type": "clip_vision_model"}
        qformer = {"encoder_hidden_size": vision["hidden_size"]}
        return {"vision_config": vision, "qformer_config": qformer}
    if "qformer_config" not in config:
        raise ValueError(f"{file}: model_type {config.get('model_type')!r} has no Q-Former (no "
                         "qformer_config): a source must be a BLIP-2 checkpoint or one of our runs")
    return config


def build_from(folder, build, *config):
    """build(*config), whose errors name the config.json of the folder as the reason."""
    try:
        return build(*config)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def read_vit(folder, layers=None):
    """(name in a BLIP-2 checkpoint, tensor) of the ViT in a BLIP-2 or CLIP folder, without the
    blocks behind the first `layers`."""
    # CLIPVisionModel alone is written with or without "vision_model." before its names
    has_prefix = any(name.startswith("vision_model.") for name in checkpoint_files(folder))
    prefix = "" if has_prefix else "vision_model."
    block = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")

    def is_wanted(name):
        name = prefix + name
        if not name.startswith("vision_model.") or name.endswith(".position_ids"):
            return False
        in_block = block.match(name)
        return not layers or not in_block or int(in_block[1]) < layers

    for name, tensor in read_tensors(folder, is_wanted):
        yield prefix + name, tensor


def empty_vit(folder, layers=None):
    """The ViT of a BLIP-2 or CLIP folder as its config.json says, without weights: on the meta
    device."""
    vision = read_vpg_config(folder).get("vision_config", {})
    kind, options = build_from(folder, vit_options, vision, layers)
    with torch.device("meta"):
        return build_from(folder, kind, options)


def read_frozen(vit, folder, layers, dtype, device, mesh):
    """{name in a BLIP-2 checkpoint: tensor} of the ViT in a folder, in a dtype on a device; with a mesh, the
    matrices of the blocks are sharded over it, and are this process's rows."""
    matrices = shard_blocks(vit, vit.encoder["layers"], mesh) if mesh else {}
    tensors = {}
    for name, tensor in read_vit(folder, layers):
        module = matrices.get(name.removeprefix("vision_model."))
        if module is None:
            tensors[name] = tensor.to(device, dtype)
        else:
            module.ends = Ends(tensor)
            tensors[name] = own_rows(tensor, mesh, dtype, device)
    return tensors


def load_vit(folder, dtype=torch.bfloat16, device="cpu", layers=None, mesh=None):
    """The frozen ViT of a BLIP-2 or CLIP folder alone, up to block `layers` (None: all):
    vit(images) -> (B,N,Dv), to which vit.post_layernorm may be applied. With a mesh its blocks are
    sharded over it. FileNotFoundError or ValueError name file and tensor."""
    vit = empty_vit(folder, layers)
    tensors = read_frozen(vit, folder, layers, dtype, device, mesh)
    assign_tensors(nn.ModuleDict({"vision_model": vit}), tensors, folder)  # named as in the checkpoint
    if mesh:
        gather_once(vit.encoder["layers"])
    return vit.requires_grad_(False).eval()


def empty_vpg(folder, image_size=None, vit_layers=None):
    """The VPG of a folder as its config.json says, without weights: on the meta device, where
    tensors have shapes only."""
    config = read_vpg_config(folder)
    if image_size is not None:
        config["image_size"] = image_size
    if vit_layers is not None:
        config["vit_layers"] = vit_layers
    with torch.device("meta"):
        return build_from(folder, VPG, config)


def load_vpg(folder, dtype=torch.bfloat16, device="cpu", vit_folder=None, q_former=True, image_size=None,
             vit_layers=None, mesh=None):
    """The VPG of a BLIP-2 folder, in eval mode, with no gradients: entering a stage says what
    trains.

    The frozen ViT comes in `dtype`, what VPGTrans trains in float32. One of our runs holds only
    what was trained: `vit_folder` is then the folder with the ViT. With q_former=False what trains
    is not read but drawn (VPG.reset), and the folder may be CLIP's. `image_size` and `vit_layers`
    are as in VPG. With a mesh, a DeviceMesh of one dimension, the ViT's blocks are sharded over it.
    FileNotFoundError or ValueError name file and tensor."""
    vpg = empty_vpg(folder, image_size, vit_layers)
    vit_folder = vit_folder or folder
    if q_former:
        tensors = read_q_former(folder, device)
    else:
        trained = vpg.trained_parameters()
        tensors = {name: torch.empty(parameter.shape, device=device) for name, parameter in trained.items()}
    frozen = read_frozen(vpg.vision_model, vit_folder, vpg.config["vit_layers"], dtype, device, mesh)
    tensors |= {name: tensor for name, tensor in frozen.items() if is_frozen(name)}
    source = folder if vit_folder == folder else f"{folder} with the ViT of {vit_folder}"
    assign_tensors(vpg, tensors, source)
    if mesh:
        gather_once(vpg.frozen_layers)
    if not q_former:
        vpg.reset()
    return vpg.requires_grad_(False).eval()


def read_q_former(folder, device):
    """{name: tensor} of all that VPGTrans trains in a VPG, in float32."""
    if not any(name.startswith("qformer.") for name in checkpoint_files(folder)):
        raise ValueError(f"{folder}: holds no Q-Former (qformer.*); a ViT alone is a source for training "
                         "--from-scratch only")

    def is_wanted(name):
        return not NOT_THE_VPG.match(name) and not is_frozen(name)

    return {name: tensor.to(device, torch.float32) for name, tensor in read_tensors(folder, is_wanted)}


def load_projector(folder):
    """The projector nn.Linear(Dq, D) of a BLIP-2 folder or of one of our runs, in float32."""
    prefix = "language_projection."
    read = read_tensors(folder, lambda name: name.startswith(prefix))
    tensors = {name.removeprefix(prefix): tensor.float() for name, tensor in read}
    if not {"weight", "bias"} <= tensors.keys():
        raise ValueError(f"{folder}: no projector (language_projection.weight and .bias); is this a whole "
                         "BLIP-2 checkpoint?")
    out_dim, in_dim = tensors["weight"].shape
    projector = nn.Linear(in_dim, out_dim, device="meta")
    assign_tensors(projector, tensors, folder)
    return projector.requires_grad_(False)
