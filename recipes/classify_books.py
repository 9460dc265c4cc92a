"""Which novel an excerpt of 16 to 64 kB is from: python recipes/classify_books.py --data DIR --output R.json

The folder's split is by novel, so the excerpts come from its training novels: of each, the first 70 % for training, the
next 15 % for validation, the rest for testing. No character is in two splits.
"""

import random

from classification import Split, compare, parser, read_lines

SHORTEST, LONGEST = 16_000, 64_000
PARTS = {"train": (0.0, 0.7, 12), "validation": (0.7, 0.85, 2), "test": (0.85, 1.0, 3)}


def excerpts(novels: list[dict], part: str, seed: int = 0) -> Split:
    """Excerpts of one part of every novel, the same on every machine."""
    generator, texts, labels = random.Random(f"{seed}{part}"), [], []
    low, high, count = PARTS[part]
    for novel in novels:
        begin, end = int(low * len(novel["text"])), int(high * len(novel["text"]))
        for _ in range(count):
            length = min(generator.randint(SHORTEST, LONGEST), end - begin)
            first = generator.randint(begin, end - length)
            texts.append(novel["text"][first : first + length])
            labels.append(novel["id"])
    return Split(texts, labels)


if __name__ == "__main__":
    args = parser(__doc__).parse_args()
    novels = [n for n in read_lines(args.data / "train.jsonl.gz") if 0.15 * len(n["text"]) >= SHORTEST]
    novels = novels[:10] if args.reduced else novels
    compare("novel of an excerpt", {part: excerpts(novels, part) for part in PARTS}, args)
