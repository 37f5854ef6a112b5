"""How much of a scene of coloured shapes stands in what a VPG makes of its picture: by a linear reader, what
the best map from the numbers to a question's answers gets right on other scenes.

    python -m demo.probe demo/source out/smollm2 out/smollm2-chat

What stands in the queries and is not said by a model that converses (demo/conversations.py), its language
model has not learnt to read; what does not stand there it cannot say.
"""

import argparse
import random

import torch
from PIL import Image

import data
import transfer
from study.scenes import random_scene, render

TRUTHS = {
    "background": lambda scene: scene["background"],
    "how many": lambda scene: len(scene["objects"]),
    "alone, beside or above": lambda scene: scene["arrangement"],
    "colour of the first": lambda scene: scene["objects"][0]["colour"],
    "shape of the first": lambda scene: scene["objects"][0]["shape"],
}
PENALTIES = (1, 10, 100, 1000)  # of ridge regression; the best one counts, so figures are a little too high


def draw(count, seed, size):
    """-> scenes, and their pictures (N,3,size,size) uint8"""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = [data.resize(Image.fromarray(render(scene)[0]), size) for scene in scenes]
    return scenes, torch.stack(pictures)


def standardise(train, test):
    """(N,F) and (M,F) -> the same in float64, with a column of ones"""
    mean = train.mean(0)
    deviation = train.std(0) + 1e-6
    both = []
    for x in (train, test):
        x = ((x - mean) / deviation).double()
        both.append(torch.cat([x, torch.ones(len(x), 1, dtype=torch.double)], dim=1))
    return both


def read(train, test, answers, truths):
    """Numbers (N,F) and (M,F), and the N and M answers -> the share of the M that the best linear map
    gets right."""
    names = sorted(set(answers), key=str)
    goal = torch.tensor([[float(answer == name) for name in names] for answer in answers]).double()
    shares = []
    for penalty in PENALTIES:
        square = train.T @ train + penalty * torch.eye(train.shape[1], dtype=torch.double)
        found = (test @ torch.linalg.solve(square, train.T @ goal)).argmax(1)
        shares.append(sum(names[i] == truth for i, truth in zip(found, truths)) / len(truths))
    return max(shares)


def look(vpg, pictures):
    """Pictures -> {"ViT": (N,Dv), its patches' mean; "queries": (N,Q*Dq)}"""
    patches = []
    queries = []
    with torch.no_grad():
        for some in pictures.split(100):
            features = vpg.features(some)
            patches.append(features.mean(1))
            queries.append(vpg.query(features).flatten(1))
    return {"ViT": torch.cat(patches), "queries": torch.cat(queries)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="runs, or BLIP-2 checkpoints")
    parser.add_argument("--scenes", type=int, default=2400, help="to fit on (default: %(default)s)")
    args = parser.parse_args()
    print(f"  {'':40}" + "".join(f"{name:>24}" for name in TRUTHS))
    for name in args.models:
        vpg = transfer.load_model(name, torch.float32)[0].vpg
        scenes, pictures = draw(args.scenes, 11, vpg.image_size)
        others, other_pictures = draw(300, 13, vpg.image_size)
        train = look(vpg, pictures)
        test = look(vpg, other_pictures)
        for kind in train:
            both = standardise(train[kind], test[kind])
            cells = [read(*both, list(map(of, scenes)), list(map(of, others))) for of in TRUTHS.values()]
            print(f"  {f'{name}, {kind}':40}" + "".join(f"{cell:>24.0%}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
