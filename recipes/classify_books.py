"""Which novel an excerpt of 16 to 64 kB is from: python recipes/classify_books.py --data DIR --output R.json

The folder's split is by novel, so the excerpts come from its training novels: of each, the first 70 % for training, the
next 15 % for validation, the rest for testing. No character is in two splits. Excerpts for training are shorter (--trained): more
of them, with a label each, for the same bytes; together as long as the text they are drawn from.
"""

import math
import random

from classification import COMPARED, Split, compare, read_lines
from runs import parser

SHORTEST, LONGEST = 16_000, 64_000
FEW = 10
# part: (from, to, excerpts of a novel)
PARTS = {"train": (0.0, 0.7, None), "validation": (0.7, 0.85, 2), "test": (0.85, 1.0, 3)}


def excerpts(novels: list[dict], part: str, trained: tuple[int, int]) -> Split:
    """Excerpts of one part of every novel, the same on every machine; of few novels twice as many each.

    trained: characters of the shortest and longest excerpts of "train".
    """
    generator, texts, labels = random.Random(part), [], []
    low, high, count = PARTS[part]
    count = count and (2 * count if len(novels) <= FEW else count)
    for novel in novels:
        begin, end = int(low * len(novel["text"])), int(high * len(novel["text"]))
        for length in lengths(end - begin, count, trained, generator):
            first = generator.randint(begin, end - length)
            texts.append(novel["text"][first : first + length])
            labels.append(novel["id"])
    return Split(texts, labels)


def lengths(room: int, count: int | None, trained: tuple[int, int], generator: random.Random) -> list[int]:
    """Of `count` long excerpts, or (None) of as many for training as fill the room: log-uniform, so most are short."""
    if count is not None:
        return [min(generator.randint(SHORTEST, LONGEST), room) for _ in range(count)]
    found: list[int] = []
    while sum(found) < room:
        drawn = math.exp(generator.uniform(*map(math.log, trained)))
        found.append(min(int(drawn), room))
    return found


if __name__ == "__main__":
    options = parser(__doc__, COMPARED)
    options.add_argument(
        "--trained",
        type=int,
        nargs=2,
        default=[1_000, 16_000],
        metavar=("SHORTEST", "LONGEST"),
        help="characters of the excerpts to train on",
    )
    args = options.parse_args()
    novels = [n for n in read_lines(args.data / "train.jsonl.gz") if 0.15 * len(n["text"]) >= SHORTEST]
    novels = novels[:FEW] if args.reduced else novels
    task = f"novel of an excerpt, {len(novels)} novels"
    compare(task, {part: excerpts(novels, part, args.trained) for part in PARTS}, args)
