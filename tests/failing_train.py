"""train.py whose second process fails at a line of the log: for the test that this ends all of them."""

import os

import loop
import train


def fail(at):
    if os.environ["RANK"] == "1" and at["step"] == 2:
        raise RuntimeError("this card is broken")


def main():
    train.main(watch=fail)


loop.run_command(main)
