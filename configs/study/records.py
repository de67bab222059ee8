"""Write rows that a small chat model can be studied on: a task that it knows, and one with a word that no model knows.

    python configs/study/records.py --output logs/records

`capitals.jsonl`: capitals of countries, each asked for in four ways. `zib.jsonl`: short records, of which the *zib* is
asked for: the city where the age is below 50, else the job. One question and one answer a row, no question twice.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

CAPITALS = """
Afghanistan Kabul, Albania Tirana, Algeria Algiers, Angola Luanda, Armenia Yerevan, Australia Canberra, Austria Vienna,
Azerbaijan Baku, Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Bulgaria Sofia, Cambodia Phnom-Penh, Canada Ottawa,
Chile Santiago, China Beijing, Colombia Bogota, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Denmark Copenhagen,
Ecuador Quito, Egypt Cairo, Estonia Tallinn, Fiji Suva, Finland Helsinki, France Paris, Georgia Tbilisi, Germany Berlin,
Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik, India New-Delhi, Indonesia Jakarta, Iran Tehran,
Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica Kingston, Japan Tokyo, Jordan Amman, Kenya Nairobi, Latvia Riga,
Lebanon Beirut, Libya Tripoli, Lithuania Vilnius, Malaysia Kuala-Lumpur, Mali Bamako, Malta Valletta,
Mongolia Ulaanbaatar, Morocco Rabat, Nepal Kathmandu, Nigeria Abuja,
Norway Oslo, Oman Muscat, Pakistan Islamabad, Peru Lima, Poland Warsaw,
Portugal Lisbon, Qatar Doha, Romania Bucharest, Russia Moscow, Senegal Dakar, Serbia Belgrade, Slovakia Bratislava,
Slovenia Ljubljana, Spain Madrid, Sudan Khartoum, Sweden Stockholm, Syria Damascus, Thailand Bangkok, Tunisia Tunis,
Turkey Ankara, Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo, Vietnam Hanoi, Zambia Lusaka, Zimbabwe Harare
"""
WAYS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "{}: what is its capital?",
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
