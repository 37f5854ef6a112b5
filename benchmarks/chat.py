"""Speed of a conversation about a picture: how long until an answer begins, and how fast it goes on.

    python -m benchmarks.chat out/chat demo.png            # a run that converses
    python -m benchmarks.chat out/chat demo.png --turns 12 --threads 2

Prints one Markdown table, a line a turn. "tokens" is what the conversation takes up when it is asked,
"read" how many of them are read before the answer begins: the others are known from the turn before.
"all anew" is how long it takes until the same answer begins when nothing is known; the picture is seen
once in both. Answers are 60 tokens, greedy; one that ends sooner says so.

Figures mean something on an otherwise idle machine only.
"""

import argparse
import time

import torch

import chat
import data
import transfer

QUESTIONS = ["What is in the picture?", "What colour is it?", "How many things do you see?",
             "Write a long story about it."]


def timed(answer):
    """An answer -> (seconds until its first piece, seconds of the others, how many these are)"""
    began = time.perf_counter()
    next(answer, None)
    first = time.perf_counter()
    others = sum(1 for _ in answer)
    return first - began, time.perf_counter() - first, others


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--template", choices=sorted(data.TEMPLATES))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=tuple(transfer.DTYPES), default="bf16")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    talker = transfer.load_chat(args.model, args.template, transfer.DTYPES[args.precision], device)
    image = data.load_image(args.image)
    conversation = chat.Conversation(*talker)
    for _ in range(2):  # the first time, memory is set up
        began = time.perf_counter()
        conversation.show(image)
        seen = time.perf_counter() - began
        timed(conversation.ask(QUESTIONS[0], max_new_tokens=3))
    print(f"{device}, {args.threads} threads, {args.precision}; the picture is seen in {seen:.3f} s\n")
    print("| turn | tokens | read | first token, s | all anew, s | said | tokens a second |")
    print("|---|---|---|---|---|---|---|")
    conversation.clear()
    conversation.release()
    for turn in range(args.turns):
        question = QUESTIONS[turn % len(QUESTIONS)]
        ids = conversation.prompt(question, 60)
        read = len(ids) - chat.common_beginning(ids[:-1], conversation.read)
        first, rest, others = timed(conversation.ask(question, max_new_tokens=60))
        turns = conversation.turns
        conversation.release()
        conversation.turns = turns[:turn]
        anew, _, _ = timed(conversation.ask(question, max_new_tokens=60))
        conversation.turns = turns
        speed = f"{others / rest:.1f}" if others else "-"
        print(f"| {turn + 1} | {len(ids)} | {read} | {first:.3f} | {anew:.3f} | {others} | {speed} |")


if __name__ == "__main__":
    main()
