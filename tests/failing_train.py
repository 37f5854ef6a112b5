"""train.py whose second process fails, for the tests of what the others do then: `card` fails at a line of
the log; to `storage` no batch comes in the second stage."""

import os
import sys

import data
import loop
import train

how = sys.argv.pop(1)
is_second = os.environ["RANK"] == "1"
wait, waits = data.wait_for, iter(range(100))


def fail(at):
    if how == "card" and is_second and at["step"] == 2:
        raise RuntimeError("this card is broken")


def wait_in_vain(*loader):
    if how == "storage" and is_second and next(waits) == 5:  # three steps of warm-up, two of fine-tuning
        raise OSError("no batch has come")
    return wait(*loader)


data.wait_for = wait_in_vain
loop.run_command(lambda: train.main(watch=fail))
