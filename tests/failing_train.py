"""train.py whose second process fails at a line of the log: for the test that this ends all of them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import loop
import train


def fail(at):
    if os.environ["RANK"] == "1" and at["step"] == 2:
        raise RuntimeError("this card is broken")


loop.run_command(lambda: train.main(watch=fail))
