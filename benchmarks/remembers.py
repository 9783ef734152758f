"""It remembers: told forty facts in a chat, restarted, and asked about each in other words.

Usage: python benchmarks/remembers.py [--facts FILE.jsonl] [--giant MODEL] [--show]
A line of the file: {"fact": "...", "question": "...", "answer": "the word that the reply must contain"}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import fresh_home, organism, table

FACTS = [
    ("My sister is called Marbeth.", "What is the name of my sister?", "Marbeth"),
    ("I work at the bakery on Quill Street.", "Where do I work?", "bakery"),
    ("Our dog is named Pontus.", "What did we name the dog?", "Pontus"),
    ("I was born in Harrowgate.", "In which town was I born?", "Harrowgate"),
    ("My favourite colour is ochre.", "Which colour do I like best?", "ochre"),
    ("The password of the shed is seven owls.", "How do I open the shed, what is its password?", "owls"),
    ("My grandfather built clocks.", "What did my grandfather build?", "clocks"),
    ("I am allergic to walnuts.", "What am I allergic to?", "walnuts"),
    ("Our neighbour plays the cello every evening.", "What instrument does the neighbour play?", "cello"),
    ("My train leaves at ten past six.", "When does my train leave?", "ten past six"),
    ("The blue key opens the cellar.", "Which key is for the cellar?", "blue"),
    ("I drink my tea with honey.", "How do I take my tea?", "honey"),
    ("My boss is called Ferrant.", "Who is my boss?", "Ferrant"),
    ("We moved to Ostrava in 2009.", "When did we move to Ostrava?", "2009"),
    ("My daughter studies geology.", "What does my daughter study?", "geology"),
    ("The cat sleeps in the piano.", "Where does the cat sleep?", "piano"),
    ("I lost my umbrella in the museum.", "Where did I lose the umbrella?", "museum"),
    ("My brother lives in Tromsø.", "Where is my brother living?", "Troms"),
    ("Our car is a green Saab.", "What kind of car do we have?", "Saab"),
    ("I play chess on Thursdays.", "On what day do I play chess?", "Thursday"),
    ("My doctor is Doctor Ilves.", "What is the name of my doctor?", "Ilves"),
    ("The spare key lies under the third flowerpot.", "Where is the spare key?", "flowerpot"),
    ("My wife is a surgeon.", "What is the profession of my wife?", "surgeon"),
    ("I hate the smell of lilies.", "Which smell do I hate?", "lilies"),
    ("My first computer was an Amiga.", "What was the first computer that I had?", "Amiga"),
    ("Our school stood beside the canal.", "Where did the school stand?", "canal"),
    ("My uncle Bertil keeps bees.", "What does uncle Bertil keep?", "bees"),
    ("I paid ninety crowns for the lamp.", "How much was the lamp?", "ninety"),
    ("The meeting is in room 4117.", "In what room is the meeting?", "4117"),
    ("My favourite soup is borscht.", "Which soup do I love most?", "borscht"),
    ("I broke my left arm in March.", "When did I break my arm?", "March"),
    ("The red book belongs to Anselm.", "To whom does the red book belong?", "Anselm"),
    ("Our boat is called Sea Thistle.", "What is our boat's name?", "Thistle"),
    ("My mother speaks Catalan.", "Which language does my mother speak?", "Catalan"),
    ("I wake up at five every morning.", "At what time do I wake up?", "five"),
    ("The wifi is slow because of the microwave.", "Why is the wifi slow?", "microwave"),
    ("My cousin Petra sings in the opera.", "Where does Petra sing?", "opera"),
    ("We eat pancakes on Sundays.", "What do we eat on Sunday?", "pancakes"),
    ("My bicycle has eleven gears.", "How many gears are on my bicycle?", "eleven"),
    ("The treasure is buried below the old pear tree.", "Where is the treasure buried?", "pear"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", help="a .jsonl of other facts")
    parser.add_argument("--giant", help="let a giant answer the questions, with what the organism remembers")
    parser.add_argument("--show", action="store_true", help="print every reply")
    options = parser.parse_args()
    facts = FACTS
    if options.facts:
        rows = [json.loads(line) for line in Path(options.facts).read_text().splitlines() if line.strip()]
        facts = [(r["fact"], r["question"], r["answer"]) for r in rows]
    with fresh_home() as home:
        told = organism("chat", "--json", home=home, text="\n".join(f for f, _, _ in facts) + "\n/quit\n")
        assert told.returncode == 0, told.stderr
        giant = ["--giant", options.giant] if options.giant else []
        asked = organism("chat", "--json", *giant, home=home, text="\n".join(q for _, q, _ in facts) + "\n/quit\n")
        lines = asked.stdout.splitlines()[: len(facts)]  # /quit has its line too
        replies = [json.loads(line)["text"] for line in lines]
    right = 0
    for (_, question, answer), reply in zip(facts, replies, strict=True):
        good = answer.lower() in reply.lower()
        right += good
        if options.show or not good:
            print("right" if good else "WRONG", "|", question, "|", reply)
    print(table("It remembers after a restart", ["facts", "replies with the fact", "share", "must", "aim"],
                [(len(facts), right, f"{100 * right / len(facts):.0f} %", "40 %", "80 %")]))  # fmt: skip


if __name__ == "__main__":
    main()
