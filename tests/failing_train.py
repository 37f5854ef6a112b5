"""train.py whose second process fails at a line of the log: for the test that this ends all of them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402


def fail(at):
    if os.environ["RANK"] == "1" and at["step"] == 2:
        raise RuntimeError("this card is broken")


train.main(watch=fail)
