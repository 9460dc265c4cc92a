"""Type or status of Python Enhancement Proposals, read whole: python recipes/classify_peps.py --data DIR --output R.json"""

from classification import COMPARED, Split, compare, read_lines
from runs import parser

if __name__ == "__main__":
    options = parser(__doc__, COMPARED)
    options.add_argument("--field", choices=("type", "status"), default="type")
    args = options.parse_args()
    splits = {}
    for name in ("train", "validation", "test"):
        records = read_lines(args.data / f"{name}.jsonl.gz")
        splits[name] = Split([r["text"] for r in records], [r[args.field] for r in records])
    compare(f"PEP {args.field}", splits, args)
