"""Small documents about people, towns and firms, with gold mentions, clusters and relations; for tests only."""

import json
import random

PEOPLE = ["Anna Weiß", "Bo Lee", "Carl Østby", "Dora Roth"]
TOWNS = ["Paris", "Köln", "漢口", "Oslo"]


def document(generator, name):
    """Everybody lives in the town named in the sentence of their full name; the surname alone comes up later."""
    text, entities, clusters, relations = "", [], {}, []

    def say(words):
        nonlocal text
        text += words

    def mention(words, label, cluster):
        start = len(text)
        say(words)
        span = {"start": start, "end": len(text), "label": label, "text": words}
        entities.append(span)
        clusters.setdefault(cluster, []).append({"start": start, "end": len(text)})

    for person in generator.sample(PEOPLE, 2):
        town = generator.choice(TOWNS)
        mention(person, "PER", person)
        say(" lives in ")
        mention(town, "LOC", town)
        say(".\r\n")
        if generator.random() < 0.7:
            mention(person.split()[1], "PER", person)
            say(" is here. ")
        relations.append({"head": person, "tail": town, "label": "lives in"})
    return {"id": name, "text": text, "entities": entities, "clusters": clusters, "relations": relations}


def documents(count, seed):
    generator = random.Random(seed)
    return [document(generator, f"d{i}") for i in range(count)]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8", newline="")
    return path
