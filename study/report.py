"""Tables and pictures of docs/miniature.md and docs/smollm2.md, from what study.runs recorded.

    python -m study.report                       # both and their pictures, from study/results
    python -m study.report --results out/study/results --out out/study       # of runs of one's own
"""

import argparse
import re
from pathlib import Path

from study.records import Results
from study.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("miniature.md", "smollm2.md")


def fill(text, results):
    """The document with its tables made anew.

    They stand between <!-- table NAME --> and <!-- end -->."""
    def made(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", made, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "study" / "results",
                        help="(default: study/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs",
                        help="folder of the documents and pictures (default: docs)")
    parser.add_argument("--show", nargs="*", metavar="TABLE",
                        help="print these tables, or all, and write nothing")
    args = parser.parse_args()
    results = Results(args.results)
    if args.show is not None:
        for name in args.show or TABLES:
            print(f"{name}\n{TABLES[name](results)}\n")
        return

    from study.pictures import PICTURES  # with torch and matplotlib, which tables do without

    args.out.mkdir(parents=True, exist_ok=True)
    for document in DOCUMENTS:
        text = (ROOT / "docs" / document).read_text()
        (args.out / document).write_text(fill(text, results))
    for name, draw in PICTURES.items():
        draw(results, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
