"""Write the demo task: one sentence about a booking in, one JSON object out.

    python examples/tiny/make_data.py

A row reads "Anna wants 3 tickets to Lisbon on Friday." and its answer is exactly {"name": "Anna", "count": 3, "city":
"Lisbon", "day": "Friday"}. The sentences have twelve shapes and several orders of the fields, and no instruction
stands in the prompt: the form of the answer has to be learnt.

The same seed gives the same files. No name goes to a city in more than one of the three files, so no row is shared
and every test row asks for a pair that training has not shown. The name, the city and the day of a row begin with
different letters and share no two letters in a row: a model of a million parameters copies letter by letter, and
would go on from one in the other.
"""

import argparse
import json
import random
from pathlib import Path

NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Leon",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
    "Quentin",
    "Rosa",
    "Simon",
    "Tara",
    "Ulla",
    "Victor",
    "Wanda",
    "Xenia",
    "Yann",
    "Zoe",
    "Amir",
    "Bianca",
    "Chen",
    "Dora",
    "Emil",
    "Fatima",
    "Goran",
    "Hana",
    "Igor",
    "Julia",
    "Kemal",
    "Lucia",
    "Marek",
    "Nadia",
]
CITIES = [
    "Lisbon",
    "Oslo",
    "Vienna",
    "Prague",
    "Dublin",
    "Athens",
    "Madrid",
    "Rome",
    "Zurich",
    "Warsaw",
    "Helsinki",
    "Budapest",
    "Porto",
    "Ghent",
    "Seville",
    "Krakow",
    "Naples",
    "Lyon",
    "Hamburg",
    "Geneva",
    "Malmo",
    "Bergen",
    "Riga",
    "Valencia",
    "Utrecht",
    "Bilbao",
    "Salzburg",
    "Cork",
    "Turin",
    "Basel",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ITEMS = ["tickets", "seats", "places"]
SHAPES = (
    "{name} wants {count} {item} to {city} on {day}.",
    "{name} would like {count} {item} to {city} for {day}.",
    "{name} needs {count} {item} for {city}, {day} please.",
    "On {day} {name} is going to {city} and needs {count} {item}.",
    "Please book {count} {item} to {city} for {name} on {day}.",
    "Can we get {count} {item} to {city} on {day}? The name is {name}.",
    "{count} {item} to {city}, {day}, {name}.",
    "For {day}: {count} {item} to {city}, under {name}.",
    "Hello, this is {name}. I need {count} {item} to {city} on {day}.",
    "To {city} on {day}, {count} {item} for {name}, thanks.",
    "Reserve {day} for {name}: {count} {item}, {city}.",
    "{name} asks for {count} {item} on {day}, destination {city}.",
)


def alike(first: str, second: str) -> bool:
    """True if both words begin with the same letter, or two letters in a row of `first` stand in `second` too."""
    first, second = first.lower(), second.lower()
    return first[0] == second[0] or any(first[place : place + 2] in second for place in range(len(first) - 1))


def days_for(name: str, city: str) -> list[str]:
    return [day for day in DAYS if not alike(name, day) and not alike(city, day)]


def make_rows(rng: random.Random, size: int, pairs: list[tuple[str, str]]) -> list[dict]:
    """`size` different rows, each with a (name, city) of `pairs`."""
    rows = {}
    while len(rows) < size:
        name, city = rng.choice(pairs)
        day = rng.choice(days_for(name, city))
        fields = {"name": name, "count": rng.randint(2, 60), "city": city, "day": day}
        question = rng.choice(SHAPES).format(item=rng.choice(ITEMS), **fields)
        answer = {"role": "assistant", "content": json.dumps(fields)}
        rows[question] = {"messages": [{"role": "user", "content": question}, answer]}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pairs = [(name, city) for name in NAMES for city in CITIES if not alike(name, city) and days_for(name, city)]
    rng.shuffle(pairs)
    fifth = len(pairs) // 5
    splits = {
        "train": (args.train, pairs[: 3 * fifth]),
        "validation": (100, pairs[3 * fifth : 4 * fifth]),
        "test": (200, pairs[4 * fifth :]),
    }
    for split, (size, own_pairs) in splits.items():
        lines = [json.dumps(row) + "\n" for row in make_rows(rng, size, own_pairs)]
        (args.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}.jsonl: {size} rows")


if __name__ == "__main__":
    main()
