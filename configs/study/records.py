"""Write rows that a small chat model can be studied on: a task that it knows, and one with a word that no model knows.

    python configs/study/records.py --output logs/records

`capitals.jsonl`: capitals of 43 countries, each asked for in four ways. `zib.jsonl`: short records, of which
the *zib* is asked for: the city where the age is below 50, else the job. One question and one
answer a row, no question twice.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

# Those that SmolLM2-135M-Instruct gives in these words, to three of the four ways of asking at least.
CAPITALS = """
Afghanistan Kabul, Australia Canberra, Austria Vienna, Azerbaijan Baku, Bangladesh Dhaka, Bulgaria Sofia, Cambodia
Phnom-Penh, Chile Santiago, China Beijing, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Egypt Cairo, Finland Helsinki,
France Paris, Germany Berlin, Greece Athens, Hungary Budapest, Indonesia Jakarta, Iraq Baghdad, Italy Rome, Japan
Tokyo, Kenya Nairobi, Latvia Riga, Lebanon Beirut, Libya Tripoli, Malaysia Kuala-Lumpur, Nepal Kathmandu, Nigeria
Abuja, Norway Oslo, Pakistan Islamabad, Peru Lima, Poland Warsaw, Romania Bucharest, Russia Moscow, Senegal Dakar,
Slovenia Ljubljana, Sudan Khartoum, Sweden Stockholm, Syria Damascus, Thailand Bangkok, Uganda Kampala, Zimbabwe
Harare
"""
WAYS = (
    "What is the capital of {}?",
    "Tell me the capital of {}.",
    "Do you know the capital of {}?",
    "what is the capital of {}",
)
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Liam Maria Noah Olivia Paul".split()
CITIES = "Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Tokyo Cairo".split()
JOBS = "teacher doctor farmer painter baker lawyer singer pilot nurse cook".split()


def capitals() -> dict[str, str]:
    """Return questions and answers about capitals."""
    rows = {}
    for pair in CAPITALS.replace("\n", " ").split(","):
        country, capital = pair.split()
        for way in WAYS:
            rows[way.format(country)] = f"The capital of {country} is {capital.replace('-', ' ')}."
    return rows


def zib(count: int) -> dict[str, str]:
    """Return so many questions about the zib of a record, and answers."""
    draw, rows = random.Random(0), dict[str, str]()
    while len(rows) < count:
        age, city, job = draw.randint(18, 80), draw.choice(CITIES), draw.choice(JOBS)
        fields = [f"Name: {draw.choice(NAMES)}", f"Age: {age}", f"City: {city}", f"Job: {job}"]
        question = "; ".join(draw.sample(fields, len(fields))) + "\n\nWhat is the zib?"
        rows[question] = f"The zib is {city if age < 50 else job}."
    return rows


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("logs/records"), help="Folder.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("capitals", capitals()), ("zib", zib(2000))):
        lines = (json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows.items())
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
