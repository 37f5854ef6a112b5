"""Three studies as lists of experiments, each run of them one command: the paper in miniature
(docs/miniature.md); transfers to a language model that people know, and the same starts with small targets
of three families (docs/smollm2.md).

Rates were chosen on the validation images, by the runs named sweep; docs/miniature.md names two exceptions.
Sources are watched on the validation images, too. All other runs report the test images.
"""

from dataclasses import dataclass, field

WORLD, RUNS = "out/study", "out/study/runs"
SEEDS = (0, 1, 2)
SOURCES = ("opt-64", "opt-128", "opt-192")  # LLMs of sources; opt-128 where nothing else is said
TARGET = "opt-256"
BUDGETS = (300, 1000, 3000)  # optimizer steps of the runs from scratch, each with a schedule of its own
LENGTHS = (100, 300, 1000, 3000)  # of transfers; the last only with the word converter and all images
SHORTER = LENGTHS[:-1]

CAPTIONS = ("--init", "captions")

# From scratch: a random Q-Former; one after BLIP-2's first stage; a random one on top of the first half of
# the ViT, where seeing is hard to learn.
STARTS = {"random": [], "stage1": [f"{WORLD}/stage1"], "half": ["--vit-layers", 2]}
SOURCE_STEPS, SOURCE_RATE = 6000, "1e-3"

RATES = ("5e-4", "1e-3", "2e-3", "4e-3")  # swept from scratch
SWEPT = (300, 1000)  # at these budgets
CHOSEN = {
    ("random", 300): "2e-3", ("random", 1000): "2e-3",
    ("random", 3000): "1e-3",  # 2e-3 is too much for 3,000 steps: the loss leaps up
    ("stage1", 300): "2e-3", ("stage1", 1000): "1e-3", ("stage1", 3000): "1e-3",
    ("half", 300): "2e-3", ("half", 1000): "1e-3", ("half", 3000): "1e-3"}

# Of transfers in 300 steps, with the word converter and with --init captions: every pair of a warm-up rate
# and a fine-tuning rate is tried, and the best is taken.
WARM_UP_RATES = {"transfer": ("1e-2", "2e-2", "4e-2", "8e-2"), "captions": ("5e-5", "1e-4", "2e-4", "5e-4")}
FINE_TUNE_RATES = ("5e-4", "1e-3", "2e-3")
TRANSFER_RATES = {"transfer": ("2e-2", "1e-3"), "captions": ("5e-4", "5e-4")}
T5_RATES = ("1e-4", "1e-4")  # with --init captions: at higher rates, T5 forgets how to look
WARM_UP_SHARE = 0.2  # of a transfer's steps

CONVERTERS = ("unweighted", "ridge", "cosine")  # of initialise.py
VARIANTS = {  # of a transfer in 300 steps, each with one thing changed
    "random-projector": ["--init", "random"],
    "no-warm-up": ["--no-warm-up"],
    "inheritance": ["--no-warm-up", "--init", "random"],
    "projector-only": ["--stage", "warm-up"]}
FAMILIES = [  # (source, target)
    ("opt-128", "llama-128"), ("opt-128", "llama-256"), ("opt-192", "llama-256"),
    ("opt-128", "t5-128"), ("opt-128", "t5-256"), ("opt-192", "t5-256")]

# The second study moves the demo's VPG to SmolLM2-135M-Instruct: every start, with the pairs (warm-up rate,
# fine-tuning rate) that are tried. From scratch there is no warm-up. --init auto finds its warm-up rate by
# itself, in seven minutes of one core.
SMOLLM2, HELD_OUT = "datasets/smollm2", f"{WORLD}/smollm2"
SMOLLM2_STARTS = {
    "scratch": ["--from-scratch"],
    "auto": ["--init", "auto"],
    "converter": [],
    "captions": CAPTIONS,
    "random": ["--init", "random"],  # what an inherited VPG gives alone
    "cosine": [],  # the original's word converter, made by initialise.py
    "ridge-0.001": ["--ridge", 0.001],  # as in the first study
    "no-warm-up": ["--no-warm-up"],
    "captions-no-warm-up": [*CAPTIONS, "--no-warm-up"],
    "scratch-stage1": ["--from-scratch", f"{HELD_OUT}/stage1"],
    "own-captions": ["--caption-with", "source"],  # as if the images had come without a word
    "captions-own-captions": [*CAPTIONS, "--caption-with", "source"],
    "weak-captions": CAPTIONS,  # from a source that sees less
    "weak-own-captions": [*CAPTIONS, "--caption-with", "source"],
    "converter-10.7": [],  # with as many of the images as the name says, in percent
    "scratch-10.7": ["--from-scratch"]}
SMOLLM2_RATES = {
    "scratch": [("", "4e-3"), ("", "2e-3"), ("", "8e-3"), ("", "1e-3")],
    "auto": [("", "1e-3")],
    "converter": [
        ("2e-3", "1e-3"), ("1e-3", "1e-3"), ("2e-3", "2e-3"), ("2e-3", "5e-4"), ("5e-3", "1e-3")],
    "captions": [("2e-3", "1e-3"), ("2e-3", "2e-3"), ("2e-3", "5e-4"), ("5e-4", "1e-3")],
    "random": [("2e-3", "1e-3"), ("5e-3", "1e-3")],
    "cosine": [("2e-3", "1e-3"), ("2e-2", "1e-3")],
    "ridge-0.001": [("2e-2", "1e-3"), ("2e-2", "2e-3"), ("5e-3", "1e-3")],
    "no-warm-up": [("", "2e-3"), ("", "1e-3")],
    "scratch-stage1": [("", "4e-3"), ("", "2e-3"), ("", "8e-3"), ("", "1e-3")],
    "own-captions": [("2e-3", "1e-3")],
    "converter-10.7": [("2e-3", "1e-3")],
    "scratch-10.7": [("", "4e-3"), ("", "2e-3")]}
# The first of them is the best of those that are recorded.
SMOLLM2_CHOSEN = {start: pairs[0] for start, pairs in SMOLLM2_RATES.items()}
SMOLLM2_BUDGETS = {
    # who wants no more than what longer runs from scratch give takes a shorter schedule
    **{steps: ("converter",) for steps in (40, 60, 80, 100, 120)},
    # not what has lost on validation images: the ridge of the first study, no warm-up
    300: ("scratch", "scratch-stage1", "converter", "captions", "auto", "own-captions", "converter-10.7",
          "scratch-10.7")}
# In 1,000 steps 4e-3 from scratch, the best in 300, leaps up after 300. So the baseline is swept again behind
# a random Q-Former, and behind a pre-trained one takes the rate found. No transfer is as long: what 300 steps
# of it reach is what these are for.
LONG = 1000
SMOLLM2_LONG_RATES = {
    "scratch": [("", "2e-3"), ("", "1e-3")],
    "scratch-stage1": [("", "2e-3")]}

# Where the source is not the demo's: one of the same language model that has learnt from the training images
# alone, in 300 steps; the demo's, with a projector that is merged with the original's word converter.
WEAK_SOURCE, COSINE_SOURCE = "small-source", "smollm2-source-cosine"
OTHER_SOURCES = {"weak-captions": WEAK_SOURCE, "weak-own-captions": WEAK_SOURCE, "cosine": COSINE_SOURCE}

# The third study moves it to small targets of three families, 300 steps each: does one start win everywhere?
# The first pair of rates of each start is the best of those that are recorded.
SMALL_TARGETS = {"opt-256": "demo/target", "llama-256": f"{WORLD}/llama-256", "t5-256": f"{WORLD}/t5-256"}
SMALL_RATES = {
    "opt-256": {
        "scratch": [("", "2e-3"), ("", "1e-3"), ("", "4e-3")],
        "scratch-stage1": [("", "2e-3"), ("", "1e-3")],
        "auto": [("", "1e-3"), ("", "5e-4")],
        "converter": [("2e-3", "1e-3"), ("5e-3", "1e-3")],
        "captions": [("5e-4", "5e-4"), ("2e-3", "1e-3")],
        "captions-no-warm-up": [("", "5e-4"), ("", "1e-3")],
        "captions-own-captions": [("5e-4", "5e-4")],
        "weak-captions": [("5e-4", "5e-4")],
        "weak-own-captions": [("5e-4", "5e-4")]},
    "llama-256": {
        "scratch": [("", "1e-3"), ("", "2e-3"), ("", "4e-3"), ("", "5e-4")],
        "scratch-stage1": [("", "2e-3"), ("", "1e-3")],
        "auto": [("", "1e-3"), ("", "5e-4")],
        "converter": [("2e-3", "1e-3"), ("5e-3", "1e-3")],
        "captions": [("5e-4", "5e-4"), ("2e-3", "1e-3")],
        "captions-no-warm-up": [("", "1e-3"), ("", "5e-4")],
        "captions-own-captions": [("5e-4", "5e-4")],
        "weak-captions": [("5e-4", "5e-4")],
        "weak-own-captions": [("5e-4", "5e-4")]},
    "t5-256": {  # T5 forgets how to look at rates that suit the others
        "scratch": [("", "1e-3"), ("", "5e-4"), ("", "2e-4")],
        "scratch-stage1": [("", "5e-4"), ("", "2e-4")],
        "auto": [("", "2e-4"), ("", "5e-4")],
        "converter": [("5e-4", "2e-4"), ("5e-3", "2e-4"), ("2e-3", "2e-4")],
        "captions": [("1e-4", "2e-4"), ("5e-4", "2e-4"), ("2e-3", "2e-4")],
        "captions-no-warm-up": [("", "2e-4"), ("", "5e-4")],
        "captions-own-captions": [("1e-4", "2e-4")],
        "weak-captions": [("1e-4", "2e-4")],
        "weak-own-captions": [("1e-4", "2e-4")]}}

# ------------------------------------------------------------------------------------------ one run


@dataclass
class Run:
    """One command. `needs` names the runs whose models it reads; `program` is what python is given first;
    `scenes` is the file of those that the finished model captions."""

    name: str
    flags: list
    needs: list = field(default_factory=list)
    program: tuple = ("train.py",)
    scenes: str = ""

    @property
    def command(self):
        return ["python", *self.program, *map(str, self.flags), "--out", f"{RUNS}/{self.name}"]

    @property
    def trains(self):
        return self.program == ("train.py",)


def train(name, src, tgt, *flags, images="", split="test", seed=0, every=None, needs=()):
    """A run of train.py on all or a part (`images`) of the training images, watched on a split."""
    pairs = f"{WORLD}/pairs"
    common = ["--src", src, "--tgt", f"{WORLD}/{tgt}"]
    common += ["--data", f"{pairs}/train{images}.jsonl", "--val", f"{pairs}/{split}.jsonl"]
    common += ["--batch-size", 32, "--micro-batch", 32, "--augment", "none", "--clip", 0.5, "--workers", 0]
    common += ["--log-every", every or 50, "--gate", 0, "--seed", seed]
    if every:
        common += ["--val-every", every]
    scenes = f"{pairs}/{'val' if name.startswith('sweep-') else 'test'}.jsonl"
    return Run(name, common + list(flags), list(needs), scenes=scenes)


def scratch(name, tgt, start, steps, rate, *flags, **options):
    """A run from scratch, which starts as STARTS says."""
    flags = ["--from-scratch", *STARTS[start], "--steps", steps, "--lr", rate, *flags]
    return train(name, f"{WORLD}/vit", tgt, *flags, **options)


def transfer(name, steps, *flags, seed, source="opt-128", tgt=TARGET, rates=TRANSFER_RATES["transfer"],
             init=None, **options):
    """VPGTrans in so many steps, warm-up counted, or what `flags` make of it.

    `rates` are of warm-up and fine-tuning. Seed s takes the source of seed s, or, with `init`, what
    initialise.py made of it."""
    src = f"init-{init}-s{seed}" if init else f"source-{source}-s{seed}"
    warm_up = round(WARM_UP_SHARE * steps)
    length = ["--warm-up-steps", warm_up, "--steps", steps - warm_up]
    if "--no-warm-up" in flags:
        length = ["--steps", steps]
    if "--stage" in flags:  # the warm-up alone
        length = ["--warm-up-steps", steps]
    every = {100: 10, 300: 20, 1000: 50, 3000: 100}[steps]
    flags = [*flags, *length, "--lr", rates[1], "--warm-up-lr", rates[0]]
    options |= dict(seed=seed, every=every, needs=[src])
    return train(f"{name}-s{seed}", f"{RUNS}/{src}", tgt, *flags, **options)


def initialised(how, seed):
    """A source whose projector initialise.py fits to the target in another way than train.py does."""
    source = f"source-opt-128-s{seed}"
    flags = ["--src", f"{RUNS}/{source}", "--tgt", f"{WORLD}/{TARGET}"]
    flags += ["--data", f"{WORLD}/pairs/train.jsonl", "--how", how, "--seed", seed]
    return Run(f"init-{how}-s{seed}", flags, [source], ("-m", "study.initialise"))


# ----------------------------------------------------------------------------------------- all runs


def from_scratch():
    """The baseline: its rate, on validation images; the sources; then annealed budgets, on test images.

    A source is a Q-Former after the first stage, trained on with a small language model, as BLIP-2's is."""
    for start in STARTS:
        for steps in SWEPT:
            for rate in RATES:
                name = f"sweep-scratch-{start}-{steps}-{rate}"
                yield scratch(name, TARGET, start, steps, rate, split="val")
    length = SOURCE_STEPS, SOURCE_RATE
    for llm in ("opt-128", "opt-64", "opt-192"):
        for seed in SEEDS:
            yield scratch(f"source-{llm}-s{seed}", llm, "stage1", *length, split="val", seed=seed)
    for seed in SEEDS:
        yield scratch(f"source-half-s{seed}", "opt-128", "half", *length, split="val", seed=seed)
    for steps in BUDGETS:
        for start in STARTS:
            for seed in SEEDS:
                options = dict(seed=seed, every=steps // 10)
                name = f"scratch-{start}-{steps}-s{seed}"
                yield scratch(name, TARGET, start, steps, CHOSEN[start, steps], **options)


def transfer_sweeps():
    """The rates of VPGTrans, on validation images."""
    for init, flags in (("transfer", ()), ("captions", CAPTIONS)):
        for warm in WARM_UP_RATES[init]:
            for rate in FINE_TUNE_RATES:
                name = f"sweep-{init}-{warm}-{rate}"
                yield transfer(name, 300, *flags, seed=0, rates=(warm, rate), split="val")


def transfers(seed):
    """What is reported of VPGTrans between OPT-like models, for one seed."""
    rate = TRANSFER_RATES["transfer"][1]
    captions = dict(seed=seed, rates=TRANSFER_RATES["captions"])
    for steps in LENGTHS:
        yield transfer(f"transfer-{steps}", steps, seed=seed)
    for part in ("5", "10.7", "25"):
        for steps in SHORTER:
            yield transfer(f"images-{part}-{steps}", steps, seed=seed, images=f"-{part}")
    for name, flags in VARIANTS.items():
        yield transfer(f"variant-{name}", 300, *flags, seed=seed)
    for times in (1, 5):
        rates = f"{times * float(rate):g}", rate
        yield transfer(f"variant-rate-x{times}", 300, seed=seed, rates=rates)
    for steps in SHORTER:
        yield transfer(f"captions-{steps}", steps, *CAPTIONS, **captions)
    for steps in LENGTHS:
        yield transfer(f"half-{steps}", steps, seed=seed, source="half")
    for steps in SHORTER:
        yield transfer(f"half-10.7-{steps}", steps, seed=seed, source="half", images="-10.7")
    for steps in SHORTER:
        yield transfer(f"half-captions-{steps}", steps, *CAPTIONS, source="half", **captions)
    for source in SOURCES:
        if source != "opt-128":
            yield transfer(f"size-{source}", 300, seed=seed, source=source)


def families():
    """From scratch and VPGTrans with targets of other families."""
    for tgt in dict.fromkeys(tgt for _, tgt in FAMILIES):
        for seed in SEEDS:
            rate = CHOSEN["stage1", 300]
            yield scratch(f"scratch-{tgt}-300-s{seed}", tgt, "stage1", 300, rate, seed=seed, every=20)
    for source, tgt in FAMILIES:
        for seed in SEEDS:
            yield transfer(f"family-{source}-{tgt}", 300, seed=seed, source=source, tgt=tgt)
    for source, tgt in FAMILIES:
        rates = T5_RATES if tgt.startswith("t5") else TRANSFER_RATES["captions"]
        for seed in SEEDS:
            options = dict(seed=seed, source=source, tgt=tgt, rates=rates)
            yield transfer(f"family-captions-{source}-{tgt}", 300, *CAPTIONS, **options)


def converters():
    """Transfers whose projector starts in other ways."""
    for how in CONVERTERS:
        for seed in SEEDS:
            yield initialised(how, seed)
            yield transfer(f"converter-{how}", 300, seed=seed, init=how)


def timed():
    """For the seconds of a step: after all others, and one at a time."""
    yield scratch("time-scratch-s0", TARGET, "stage1", 300, CHOSEN["stage1", 300], every=30)
    yield transfer("time-transfer", 300, seed=0)


def all_runs():
    """All runs, in the order in which they are best made: {name: Run}."""
    runs = [*from_scratch(), *transfer_sweeps()]
    for seed in SEEDS:
        runs += transfers(seed)
    runs += [*families(), *converters(), *timed()]
    return {run.name: run for run in runs}


# ------------------------------------- a real language model, and small ones of three families


def from_start(name, tgt, start, steps, rates, split, seed):
    """A run to a target in so many steps from a start of SMOLLM2_STARTS; a fifth of a transfer's are
    warm-up, 60 at most."""
    warm_up_rate, rate = rates
    from_scratch = start.startswith("scratch")
    images = f"{HELD_OUT}/train-10.7.tar" if start.endswith("-10.7") else "demo/pairs/train.tar"
    needs = [OTHER_SOURCES[start]] if start in OTHER_SOURCES else []
    src = f"{RUNS}/{needs[0]}" if needs else "demo/source"
    every = steps // (10 if from_scratch else 15)
    warm_up = 0
    flags = ["--src", src, "--tgt", tgt]
    flags += ["--data", images, "--val", f"{HELD_OUT}/{split}.tar", "--val-samples", 100]
    flags += ["--batch-size", 32, "--micro-batch", 32, "--augment", "none", "--clip", 0.5, "--workers", 0]
    flags += ["--val-every", every, "--log-every", 10, "--save-every", 50, "--gate", 0]
    flags += ["--seed", seed, *SMOLLM2_STARTS[start], "--lr", rate]
    if warm_up_rate:
        flags += ["--warm-up-lr", warm_up_rate]
    if not from_scratch and "--no-warm-up" not in flags:
        warm_up = min(60, round(WARM_UP_SHARE * steps))
        flags += ["--warm-up-steps", warm_up]
    flags += ["--steps", steps - warm_up]
    if steps == LONG and tgt == SMOLLM2:
        flags += ["--compile"]  # compiling takes three minutes, which so many steps win back
    return Run(name, flags, needs, scenes=f"{HELD_OUT}/{split}.tar")


def sweep_name(prefix, start, rates):
    """Of a run on validation images, by its start and its pair of rates."""
    return "-".join(filter(None, [prefix, start, *rates]))


def smollm2_reported():
    """(steps, start, rates) of the second study's runs on test images."""
    for steps, starts in SMOLLM2_BUDGETS.items():
        for start in starts:
            yield steps, start, SMOLLM2_CHOSEN[start]
    for start, pairs in SMOLLM2_LONG_RATES.items():
        yield LONG, start, pairs[0]


def smollm2_runs():
    """All runs of the second study: {name: Run}; sweeps on validation images, then what is reported."""
    flags = ["--src", "demo/source", "--tgt", SMOLLM2, "--data", "demo/pairs/train.tar", "--how", "cosine"]
    runs = [Run(COSINE_SOURCE, flags, program=("-m", "study.initialise"))]
    for start, pairs in SMOLLM2_RATES.items():
        for rates in pairs if len(pairs) > 1 else []:
            name = sweep_name("smollm2-sweep", start, rates)
            runs.append(from_start(name, SMOLLM2, start, 300, rates, "val", seed=0))
    for rates in SMOLLM2_LONG_RATES["scratch"]:
        name = sweep_name(f"smollm2-sweep-{LONG}", "scratch", rates)
        runs.append(from_start(name, SMOLLM2, "scratch", LONG, rates, "val", seed=0))
    for steps, start, rates in smollm2_reported():
        for seed in SEEDS:
            name = f"smollm2-{start}-{steps}-s{seed}"
            runs.append(from_start(name, SMOLLM2, start, steps, rates, "test", seed))
    return {run.name: run for run in runs}


def small_runs():
    """All runs of the third study: {name: Run}, target by target as those of the second."""
    weak = "scratch-stage1", 300, SMALL_RATES["opt-256"]["scratch-stage1"][0]
    runs = [from_start(WEAK_SOURCE, "demo/source", *weak, "test", seed=0)]
    for tgt, folder in SMALL_TARGETS.items():
        for start, pairs in SMALL_RATES[tgt].items():
            for rates in pairs if len(pairs) > 1 else []:
                name = sweep_name(f"small-sweep-{tgt}", start, rates)
                runs.append(from_start(name, folder, start, 300, rates, "val", seed=0))
        for start, pairs in SMALL_RATES[tgt].items():
            for seed in SEEDS:
                name = f"small-{tgt}-{start}-s{seed}"
                runs.append(from_start(name, folder, start, 300, pairs[0], "test", seed))
        for seed in SEEDS:  # the stronger baseline, for longer
            start, rates = "scratch-stage1", SMALL_RATES[tgt]["scratch-stage1"][0]
            name = f"small-{tgt}-{start}-{LONG}-s{seed}"
            runs.append(from_start(name, folder, start, LONG, rates, "test", seed))
    return {run.name: run for run in runs}


STUDIES = {"miniature": all_runs, "smollm2": smollm2_runs, "small": small_runs}


def with_needs(chosen, every):
    """Of all runs `every`, the chosen ones and those that they need, in the same order."""
    names = set()
    queue = list(chosen)
    while queue:
        run = queue.pop()
        if run.name not in names:
            names.add(run.name)
            queue += [every[name] for name in run.needs]
    return [run for run in every.values() if run.name in names]
