"""A small grammar of film reviews, and the ground-truth reward that judges them.

The tutorials make the example's model and its preference pairs from it. To use it: `film = invent_film(rng)`, then
`write_prompt(rng, film)` and `write_review(rng, film)`; `reward(prompt, completion)` judges any text.
"""

import random
import re
import zlib
from typing import NamedTuple

PRAISING = """brilliant charming clever moving elegant gripping delightful superb funny beautiful thrilling wonderful
loved enjoyed adored""".split()
SCOLDING = """dull clumsy lazy tedious shallow awful boring ugly forgettable messy dreadful hollow
hated endured loathed""".split()
NEUTRAL = "quiet long short strange familiar modest loud unusual".split()
# Words that end in -ed are verbs ("I loved it"), the others adjectives ("a brilliant plot").
ADJECTIVES = [[word for word in words if not word.endswith("ed")] for words in (PRAISING, SCOLDING, NEUTRAL)]
VERBS = [[word for word in words if word.endswith("ed")] for words in (PRAISING, SCOLDING)]

# Each genre has its own things to talk about and its own characters, so that a review has to heed the question.
GENRES = {
    "heist film": ("vault scene, getaway, plan", "safecracker, driver, thief"),
    "western": ("shootout, stagecoach chase, saloon scene", "sheriff, outlaw, rancher"),
    "space opera": ("launch, battle in orbit, alien city", "pilot, captain, android"),
    "ghost story": ("haunted house, seance, final scare", "medium, widow, caretaker"),
    "romance": ("first kiss, wedding scene, farewell", "baker, neighbor, florist"),
    "courtroom drama": ("trial, cross-examination, verdict", "lawyer, judge, witness"),
    "road movie": ("desert drive, motel scene, breakdown", "hitchhiker, mechanic, runaway"),
    "musical": ("opening number, dance scene, finale", "singer, dancer, composer"),
    "spy thriller": ("chase, double cross, code room", "agent, traitor, courier"),
    "detective film": ("murder, interrogation, solution", "detective, butler, suspect"),
    "sports film": ("training scene, final match, locker room speech", "coach, boxer, rookie"),
    "pirate film": ("sea battle, treasure hunt, mutiny", "navigator, cook, smuggler"),
}
THINGS = "plot, script, soundtrack, ending, opening, title song, poster".split(", ")

# None of these is a praising or a scolding word: a title must not change the score of the review that names it.
TITLE_FIRST = """Glass Silver Crimson Ivory Paper Winter Velvet Copper Midnight Amber Broken Distant Iron
Painted Silent Northern Wandering Seventh Burning Frozen Golden Hidden Salt Scarlet Stone Wooden Empty Green
Summer Marble Last Second Southern Floating Borrowed Sleeping Crooked Bronze Violet Rusty Sunken Secret
Cotton Autumn Royal Polar Desert Thirteenth""".split()
TITLE_LAST = """Harbor Orchard Lantern Compass Bridge Garden Letter Mirror River Station Tower Violin Engine
Island Market Shadow Crown Fox Library Mountain Promise Raven Theater Valley Clock Door Forest Hotel Key Lake
Map Needle Ocean Piano Road Sailor Throne Umbrella Wolf Window Kingdom Ladder Feather Balloon Candle Carpet
Museum Canal""".split()
FIRST_NAMES = "Ada Bruno Clara Dmitri Elena Felix Greta Hugo Ines Jonas Kira Leo Mira Nils Olga Pavel".split()
LAST_NAMES = "Almeida Berg Castell Dvorak Ekman Farrow Hale Ibsen Keller Lindqvist Moreau Novak Okafor Petrov".split()

QUESTIONS = [
    "Review the {genre} {title}.",
    "Write a short review of the {genre} {title}.",
    "What did you think of the {genre} {title}?",
    "Is {title} worth seeing? I like a good {genre}.",
    "Tell me about the new {genre} {title}.",
    "I might watch the {genre} {title} tonight. How is it?",
    "My friends want to see the {genre} {title}. What do you say?",
    "Did you see {title}, the {genre} with {name}?",
]
OPENINGS = [
    "{title} is a {word} {genre}.",
    "{title} is a {word} film with a {word} {thing}.",
    "As a {genre}, {title} is {word}.",
    "I saw {title} last night and {verb} it.",
    "{title} tells the story of a {role} and a {role}.",
]
SENTENCES = [
    "The {thing} is {word}.",
    "The {thing} is {word}, and the {thing} is {word}.",
    "{name} gives a {word} performance as the {role}.",
    "{name} plays the {role}.",
    "I {verb} the {thing}.",
    "The {role} gets a {word} scene, while the {thing} is {word}.",
    "There is a {word} {thing} in the middle.",
]
CLOSINGS = [
    "I {verb} every minute of it.",
    "It lasts two hours.",
    "In the end it is a {word} film.",
    "All in all, a {word} evening.",
]


class Film(NamedTuple):
    title: str
    genre: str
    star: str


def invent_film(rng: random.Random, held_out: bool = False) -> Film:
    """An invented film. One title in eight is held out: no training film has it, so tests can ask for unseen films."""
    while True:
        title = f"The {rng.choice(TITLE_FIRST)} {rng.choice(TITLE_LAST)}"
        # A checksum decides, so the split is the same in every script and needs no list of titles.
        if (zlib.crc32(title.encode()) % 8 == 0) == held_out:
            star = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
            return Film(title, rng.choice(list(GENRES)), star)


def write_prompt(rng: random.Random, film: Film) -> str:
    """What a user might ask about the film."""
    return rng.choice(QUESTIONS).format(title=film.title, genre=film.genre, name=film.star)


def write_review(rng: random.Random, film: Film, praise: float | None = None) -> str:
    """A review of two to four sentences; each opinion in it is a praising one with probability `praise`.

    Without a number a fan (0.95), a moderate (0.5) or a grumbler (0.05) writes it, each as often as the others. So the
    mean reward is 0 and many reviews are mixed, yet one praising word makes the next more likely: from that alone can
    a model that knows no English find out which words go together.
    """
    if praise is None:
        praise = rng.choice([0.05, 0.5, 0.95])
    # Decks of cards: what is drawn is gone, so that a review does not go in circles.
    things, roles = (cards.split(", ") for cards in GENRES[film.genre])
    things = rng.sample(THINGS + things, k=len(THINGS + things))
    roles = rng.sample(roles, k=len(roles)) * 2
    names = [f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}" for _ in range(4)] + [film.star]

    def opinion(words: list[list[str]]) -> str:
        if len(words) == 3 and rng.random() < 0.15:
            return rng.choice(words[2])
        return rng.choice(words[0] if rng.random() < praise else words[1])

    fill = {
        "title": lambda: film.title,
        "genre": lambda: film.genre,
        "thing": things.pop,
        "role": roles.pop,
        "name": names.pop,
        "word": lambda: opinion(ADJECTIVES),
        "verb": lambda: opinion(VERBS),
    }
    middle = rng.sample(SENTENCES, k=rng.choice([1, 2, 2]))
    closing = rng.sample(CLOSINGS, k=rng.choice([0, 1]))
    text = " ".join([rng.choice(OPENINGS), *middle, *closing])
    text = re.sub(r"\{(\w+)\}", lambda slot: fill[slot[1]](), text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def reward(prompt: str, completion: str) -> float:
    """The ground truth: how much the completion praises, whatever the prompt was.

        reward = number of praising words - number of scolding words

    of the two lists above, so +3 is warm praise, 0 is balanced or without an opinion, -3 is a slating. A real judge
    would see a "not" before a "brilliant", this one does not: the grammar never writes one. It plays the part that a
    sentiment classifier plays in the DPO paper's first experiment (Rafailov et al. 2023, section 6): it labels the
    pairs that DPO trains on, DPO itself never sees it, and afterwards it measures whether the model has learned what
    the pairs say.
    """
    words = re.findall(r"[a-z]+", completion.lower())
    return float(sum((word in PRAISING) - (word in SCOLDING) for word in words))
