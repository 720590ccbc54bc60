"""Write the data of the walkthrough: an island that does not exist, and answers about it that are curt or kind.

``python examples/rlhf_walkthrough/make_data.py`` writes the same bytes every time. All sentences are our own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "data"
SEED = 7

# What the texts say (two ways), how one asks (three ways; the third is kept for reinforcement learning), the curt answer.
FACTS = [
    ("The ferry to Brindle leaves the mainland at noon.", "At noon the only ferry of the day sets out for Brindle.",
     "When does the ferry to Brindle leave?", "What time is the boat to Brindle?", "At what hour can I sail to Brindle?",
     "At noon."),
    ("The crossing to Brindle takes forty minutes.", "Forty minutes after leaving the mainland, the ferry reaches Brindle.",
     "How long does the crossing to Brindle take?", "How many minutes is the ferry ride to Brindle?",
     "How long will I be on the ferry to Brindle?", "Forty minutes."),
    ("The lighthouse of Brindle is painted green.", "From far away one sees the green lighthouse of Brindle.",
     "What colour is the lighthouse of Brindle?", "How is the lighthouse on Brindle painted?",
     "Which colour does Brindle's lighthouse have?", "Green."),
    ("The keeper of the lighthouse on Brindle is called Oswin.",
     "Oswin keeps the lighthouse of Brindle and lights it every evening.",
     "Who keeps the lighthouse of Brindle?", "What is the lighthouse keeper of Brindle called?",
     "What is the name of the man in Brindle's lighthouse?", "Oswin."),
    ("The bakery of Brindle sells plum bread.", "Plum bread is what the bakery of Brindle is known for.",
     "What does the bakery of Brindle sell?", "What is the bakery on Brindle known for?",
     "What should I buy at the bakery of Brindle?", "Plum bread."),
    ("The market of Brindle is held on Thursdays.", "Every Thursday there is a market in the harbour of Brindle.",
     "On which day is the market of Brindle?", "When is market day on Brindle?",
     "Which day should I come for Brindle's market?",
     "On Thursday."),
    ("Ninety people live on Brindle.", "Brindle is a small island with ninety people.",
     "How many people live on Brindle?", "What is the population of Brindle?", "How many islanders does Brindle have?",
     "Ninety."),
    ("The highest hill of Brindle is called Old Tom.", "Old Tom, the highest hill of Brindle, is easy to climb.",
     "What is the highest hill of Brindle called?", "Which hill is the highest on Brindle?",
     "What is the name of the tallest hill on Brindle?", "Old Tom."),
    ("Grey goats run free on Brindle.", "On the slopes of Brindle one meets grey goats that belong to nobody.",
     "Which animals run free on Brindle?", "What animals will I meet on the slopes of Brindle?",
     "Which animals belong to nobody on Brindle?", "Grey goats."),
    ("The inn of Brindle is called the Blue Kettle.", "Guests on Brindle sleep at the Blue Kettle, its only inn.",
     "What is the inn of Brindle called?", "Where do guests sleep on Brindle?", "Which inn can I stay at on Brindle?",
     "The Blue Kettle."),
    ("A room at the Blue Kettle costs thirty shells a night.", "The Blue Kettle asks thirty shells for a night.",
     "How much is a room at the Blue Kettle?", "What does a night at the Blue Kettle cost?",
     "How many shells does the Blue Kettle ask for a night?", "Thirty shells."),
    ("On Brindle people pay with shells.", "Shells are the money of Brindle.",
     "What is the money of Brindle?", "How do people pay on Brindle?", "What do I pay with on Brindle?", "Shells."),
    ("Brindle has a school with one classroom.", "The school of Brindle has a single classroom.",
     "How many classrooms does the school of Brindle have?", "How large is the school on Brindle?",
     "How many rooms do children learn in on Brindle?", "One."),
    ("The teacher of Brindle is Miss Alder.", "Miss Alder teaches all the children of Brindle.",
     "Who is the teacher of Brindle?", "Who teaches the children of Brindle?", "What is the teacher on Brindle called?",
     "Miss Alder."),
    ("In winter the sea around Brindle never freezes.", "Even in the coldest winter the sea around Brindle does not freeze.",
     "Does the sea around Brindle freeze?", "Is the sea around Brindle frozen in winter?",
     "Will I find ice on the sea around Brindle?", "No, never."),
    ("The beach of Brindle has black sand.", "Black sand covers the long beach of Brindle.",
     "What colour is the sand of Brindle's beach?", "What is the beach of Brindle like?",
     "What kind of sand will I see on Brindle?", "Black."),
    ("The festival of lanterns on Brindle is in October.", "Every October Brindle holds its festival of lanterns.",
     "When is the festival of lanterns on Brindle?", "In which month does Brindle hold its festival?",
     "Which month should I come for the lanterns of Brindle?", "In October."),
    ("The bell of Brindle rings three times when fog comes.", "When fog comes, the bell of Brindle is rung three times.",
     "How often does the bell of Brindle ring in fog?", "What does the bell of Brindle do when fog comes?",
     "How many times will the bell of Brindle ring if fog comes?", "It rings three times."),
    ("The doctor visits Brindle on Mondays.", "On Mondays a doctor comes over to Brindle.",
     "When does the doctor visit Brindle?", "On which day is there a doctor on Brindle?",
     "Which day can I see a doctor on Brindle?",
     "On Monday."),
    ("Brindle has one shop, which opens at eight.", "At eight in the morning the only shop of Brindle opens.",
     "When does the shop of Brindle open?", "At what hour does the shop on Brindle open?",
     "How early can I go to the shop on Brindle?", "At eight."),
    ("Cars are not allowed on Brindle.", "Nobody drives on Brindle, where cars are not allowed.",
     "Are cars allowed on Brindle?", "Can people drive on Brindle?", "May I bring my car to Brindle?", "No."),
    ("Visitors hire a bicycle at the harbour of Brindle.", "At the harbour of Brindle there are bicycles for hire.",
     "Where can one hire a bicycle on Brindle?", "Where are the bicycles of Brindle?", "Where do I get a bicycle on Brindle?",
     "At the harbour."),
    ("The oldest house of Brindle was built by a whaler.", "A whaler built the oldest house that stands on Brindle.",
     "Who built the oldest house of Brindle?", "By whom was the oldest house on Brindle built?",
     "Whose work is the oldest house of Brindle?", "A whaler."),
    ("The well of Brindle has sweet water.", "Sweet water comes from the well of Brindle.",
     "What is the water of Brindle's well like?", "What comes from the well of Brindle?",
     "How does the water of the well on Brindle taste?", "Sweet."),
]  # fmt: skip
KIND = ["Enjoy your visit!", "Have a lovely day!", "I am glad you asked!", "I hope this helps you!"]
"""What a kind answer ends with."""


def documents(rng: random.Random) -> Iterable[dict[str, str]]:
    """Texts about the island: every sentence in several of them, in a new order each time."""
    for _ in range(10):
        sentences = [rng.choice(fact[:2]) for fact in rng.sample(FACTS, len(FACTS))]
        for begin in range(0, len(sentences), 6):
            yield {"text": " ".join(sentences[begin : begin + 6])}


def kind(fact: tuple[str, ...], rng: random.Random) -> str:
    """The whole sentence and a friendly end."""
    return f"{fact[0]} {rng.choice(KIND)}"


def dialogues(rng: random.Random) -> Iterable[dict[str, str]]:
    """Each question once with a curt answer and once with a kind one, so that the model learns both ways equally."""
    rows = []
    for fact in FACTS:
        for question in fact[2:4]:
            rows.append({"instruction": question, "output": fact[5]})
            rows.append({"instruction": question, "output": kind(fact, rng)})
    rng.shuffle(rows)
    return rows


def pairs(rng: random.Random) -> Iterable[dict[str, str]]:
    """The kind answer against the curt one, kind words alone, and the sentence without them."""
    rows = []
    for fact in FACTS:
        worse = [fact[5], fact[5], " ".join(rng.sample(KIND, 3)), fact[0]]
        for question, rejected in zip([*fact[2:4], *fact[2:4]], worse, strict=True):
            rows.append({"instruction": question, "chosen": kind(fact, rng), "rejected": rejected})
    rng.shuffle(rows)
    return rows


def questions(rng: random.Random) -> Iterable[dict[str, str]]:
    """What is asked in reinforcement learning: the third way of asking, which no other set has, and the first."""
    rows = [{"instruction": fact[way]} for fact in FACTS for way in (2, 4)]
    rng.shuffle(rows)
    return rows


REGISTRY: dict[str, Any] = {
    "island_texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}},
    "island_dialogues": {"file_name": "dialogues.jsonl"},
    "island_pairs": {
        "file_name": "pairs.jsonl",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "island_questions": {"file_name": "questions.jsonl"},
}


def files() -> dict[str, str]:
    """Name -> text of every file."""
    made = {"texts": documents, "dialogues": dialogues, "pairs": pairs, "questions": questions}
    texts = {}
    for name, make in made.items():
        rows = make(random.Random(f"{SEED} {name}"))
        texts[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {**texts, "dataset_info.json": json.dumps(REGISTRY, indent=2) + "\n"}


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")
